"""The fp32 FMA peak of the processor, by the loop of peak.cpp."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path


class FmaPeak:
    """The best float32 flop/s of fused multiply-adds on `threads` threads; None without a
    compiler."""

    def __init__(self, threads: int) -> None:
        self.best: float | None = None
        self.folder = tempfile.TemporaryDirectory()
        self.command = [str(Path(self.folder.name) / "peak"), str(threads)]
        source = Path(__file__).with_name("peak.cpp")
        compiler = os.environ.get("CXX") or shutil.which("c++")
        build = [str(compiler), "-O3", "-march=native", "-pthread", str(source), "-o", self.command[0]]
        self.built = compiler is not None and subprocess.run(build, capture_output=True).returncode == 0

    def measure(self) -> None:
        """Measures once more, as one moment may be a busy one."""
        if self.built:
            done = subprocess.run(self.command, capture_output=True, text=True, check=True)
            self.best = max(self.best or 0.0, float(done.stdout))
