"""The GPU of the benchmark: its clock, its ceilings, its name.

`Cpu` runs the same benchmark without a GPU.
"""

from __future__ import annotations

import math
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import leetcore
import torch
from leetcore.bench.ceilings import Ceilings
from leetcore.bench.machine import cores, extra_memory, processor
from leetcore.bench.timing import CPU, Call, Timer, stats

SAMPLE_S = 0.002
COLD_BYTES = 1 << 28  # or four times the L2 cache where that is more
COPY_BYTES = 1 << 30
MATMUL_SIZE = 8192
MOST_READS = 50  # of the cold buffer before one call


class Gpu:
    """The current CUDA device."""

    name = "cuda"

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.cold = torch.zeros(max(4 * properties.L2_cache_size, COLD_BYTES) // 4, device="cuda")
        self.sink = torch.zeros((), device="cuda")
        self.source, self.target = (torch.ones(COPY_BYTES // 4, device="cuda") for _ in range(2))
        self.a, self.b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device="cuda").bfloat16() for _ in range(2))
        self.c = torch.empty_like(self.a)
        self.read_s = self.between(self.read)[0]
        self.timer = Timer(self.clock, SAMPLE_S, 0.0)
        self.copies: list[float] = []
        self.products: list[float] = []
        self.copy()
        self.matmul()
        self.copies.clear()
        self.products.clear()

    def read(self) -> None:
        """Fills the L2 cache with useless lines that need not be written back."""
        torch.sum(self.cold, 0, out=self.sink)

    def between(self, call: Call, reps: int = 1, reads: int = 0) -> list[float]:
        """Seconds of GPU time of each of `reps` calls; `reads` reads of the cold buffer precede
        each of them."""
        events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(reps)]
        call()
        for start, stop in events:
            for _ in range(reads):
                self.read()
            start.record()
            call()
            stop.record()
        torch.cuda.synchronize()
        return [1e-3 * start.elapsed_time(stop) for start, stop in events]

    def clock(self, call: Call, reps: int = 1) -> float:
        """Seconds of GPU time per call.

        Its data are not in the cache; the GPU is busy until the call is queued.
        """
        reads = 1 + math.ceil(self.host(call)[0] / self.read_s)
        return statistics.fmean(self.between(call, reps, min(reads, MOST_READS)))

    def host(self, call: Call, reps: int = 1) -> list[float]:
        """Seconds until each call returns; the GPU has nothing else to do."""
        samples = []
        for _ in range(reps):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            samples.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        return samples

    def copy(self) -> float:
        """bytes/s, read and written."""
        self.copies.append(2 * COPY_BYTES / min(self.between(lambda: self.target.copy_(self.source), 2)))
        return self.copies[-1]

    def matmul(self) -> float:
        """flop/s of a bfloat16 product of random matrices."""
        seconds = self.between(lambda: torch.mm(self.a, self.b, out=self.c), 2)
        self.products.append(2 * MATMUL_SIZE**3 / min(seconds))
        return self.products[-1]

    round = copy

    def peak(self, call: Call) -> int | None:
        """The most bytes that torch has allocated during a call, less those allocated before it."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before

    def fits(self, size: int) -> bool:
        torch.cuda.empty_cache()
        return size < torch.cuda.mem_get_info()[0]

    def lost(self) -> bool:
        """Whether a kernel has broken the context of this process, so that no other kernel can run
        in it."""
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False

    def to_json(self) -> dict[str, Any]:
        return {"best": "torch", "matmul": {"torch": stats(self.products)}, "copy": stats(self.copies)}

    def facts(self) -> dict[str, str]:
        p = torch.cuda.get_device_properties(torch.cuda.current_device())
        return {
            "processor": p.name,
            "capability": f"{p.major}.{p.minor}",
            "processors": str(p.multi_processor_count),
            "memory": f"{p.total_memory / 2**30:.0f} GiB",
            "L2": f"{p.L2_cache_size / 2**20:.0f} MiB",
            "driver": driver(),
            "cuda": torch.version.cuda or "unknown",
        }


class Cpu:
    """Runs the same benchmark on the CPU methods, as a test of the benchmark; its figures mean
    nothing."""

    name = "cpu"
    timer = CPU

    def __init__(self) -> None:
        self.ceilings = Ceilings(cores(), ("torch",))
        self.copy = self.round = self.ceilings.copy
        self.matmul, self.to_json = self.ceilings.matmul, self.ceilings.to_json

    def host(self, call: Call, reps: int = 1) -> list[float]:
        return [CPU.clock(call, 1) for _ in range(reps)]

    def peak(self, call: Call) -> int | None:
        return extra_memory(call)

    def fits(self, size: int) -> bool:
        return True

    def lost(self) -> bool:
        return False

    def facts(self) -> dict[str, str]:
        return {"processor": processor(), "cuda": leetcore.build_info()["cuda"]}


DEVICES: dict[str, Callable[[], Any]] = {"cuda": Gpu, "cpu": Cpu}


def driver() -> str:
    """The version of the driver, from nvidia-smi."""
    try:
        done = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    found = re.search(r"Driver Version: ([\d.]+)", done.stdout)
    return found[1] if found else "unknown"
