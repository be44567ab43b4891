"""Prints, for each N given, by how many bytes one call with out= raises the peak resident memory of this process.

Its own process with an untuned malloc, so that memory freed earlier cannot hide the growth. Linux only.
"""

import sys
from pathlib import Path

import leetcore
import numpy as np


def resident(key: str) -> int:
    """VmRSS or VmHWM in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def growth(n: int) -> int:
    """Peak growth of one call at (1, 8, n, 64, 64), fp32, inputs and output resident before it."""
    q, k, v = (np.ones((1, 8, n, 64), np.float32) for _ in range(3))
    out = np.ones_like(v)
    Path("/proc/self/clear_refs").write_text("5")  # peak := now
    before = resident("VmRSS")
    leetcore.linear_attention(q, k, v, -0.1, method="chunk", out=out)
    return max(0, resident("VmHWM") - before)


growth(256)  # threads, code and tables come first
for argument in sys.argv[1:]:
    print(growth(int(argument)))
