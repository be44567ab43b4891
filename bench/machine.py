"""The conditions of a run: the device, versions, the FMA peak."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
FLAGS = ("fma", "avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_bf16", "amx_fp16", "asimd", "sve")


def device() -> dict[str, str]:
    """CPU model, cores this process may use, and the instruction sets of note."""
    fields: dict[str, str] = {}
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    have = fields.get("flags", fields.get("Features", "")).split()
    model = fields.get("model name", "unknown CPU")
    family = f"family {fields['cpu family']} model {fields['model']}" if "cpu family" in fields else ""
    return {
        "cpu": f"{model} ({family})" if family else model,
        "cores": str(len(os.sched_getaffinity(0))),
        "flags": " ".join(flag for flag in FLAGS if flag in have),
        "cache": fields.get("cache size", "unknown"),
    }


def commit() -> str:
    """Of the working tree, with "+" if it has uncommitted changes."""
    try:
        text = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+"], cwd=HERE, capture_output=True, text=True
        )
        return text.stdout.strip() or "unknown"
    except OSError:
        return "unknown"


class FmaPeak:
    """The best fp32 flop/s of a loop of fused multiply-adds on `threads` threads; None without a compiler."""

    def __init__(self, threads: int) -> None:
        self.best: float | None = None
        self.folder = tempfile.TemporaryDirectory()
        self.command = [str(Path(self.folder.name) / "peak"), str(threads)]
        compiler = os.environ.get("CXX") or shutil.which("c++")
        build = [str(compiler), "-O3", "-march=native", "-pthread", str(HERE / "peak.cpp"), "-o", self.command[0]]
        self.built = compiler is not None and subprocess.run(build, capture_output=True).returncode == 0

    def measure(self) -> None:
        """To be called now and then, as one moment may be a busy one."""
        if self.built:
            done = subprocess.run(self.command, capture_output=True, text=True, check=True)
            self.best = max(self.best or 0.0, float(done.stdout))
