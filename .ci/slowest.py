"""Prints the slowest tests of JUnit files: python .ci/slowest.py FILE..."""

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

tests = [
    (float(case.get("time", 0)), Path(file).stem, case.get("name"))
    for file in sys.argv[1:]
    if Path(file).exists()
    for case in ElementTree.parse(file).iter("testcase")
]
for seconds, stage, name in sorted(tests, reverse=True)[:15]:
    print(f"{seconds:6.1f} s  {stage:16} {name}")
