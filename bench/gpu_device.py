"""The GPU as the benchmark sees it: a clock of its time, what it can do, what it is. `Cpu` stands in without one."""

from __future__ import annotations

import math
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import harness
import leetcore
import machine
import torch
from harness import CPU, Call, Timer
from leetcore.bench.machine import extra_memory

SAMPLE_S = 0.002
COLD_BYTES = 1 << 28  # at least; four times the L2 cache where that is more
COPY_BYTES = 1 << 30
MATMUL_SIZE = 8192
MOST_READS = 50  # of the cold buffer, ahead of one call


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
        self.copy(), self.matmul()
        self.copies.clear(), self.products.clear()

    def read(self) -> None:
        """Leaves lines in the L2 cache that are of no use and need not be written back."""
        torch.sum(self.cold, 0, out=self.sink)

    def between(self, call: Call, reps: int = 1, reads: int = 0) -> list[float]:
        """Seconds of GPU time of each of `reps` calls, `reads` reads of the cold buffer ahead of it."""
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
        """Seconds of GPU time a call: its data is not in the cache, the GPU is busy until the host has queued it."""
        reads = 1 + math.ceil(self.host(call)[0] / self.read_s)
        return statistics.fmean(self.between(call, reps, min(reads, MOST_READS)))

    def host(self, call: Call, reps: int = 1) -> list[float]:
        """Seconds until each call returns, of a GPU with nothing to do."""
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

    def peak(self, call: Call) -> int | None:
        """Bytes that torch has given out during a call at the most, beside those of before."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before

    def fits(self, size: int) -> bool:
        torch.cuda.empty_cache()
        return size < torch.cuda.mem_get_info()[0]

    def lost(self) -> bool:
        """Whether a kernel has broken this process's context: nothing will run in it any more."""
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False

    def facts(self) -> dict[str, str]:
        p = torch.cuda.get_device_properties(torch.cuda.current_device())
        return {
            "name": p.name,
            "capability": f"{p.major}.{p.minor}",
            "processors": str(p.multi_processor_count),
            "memory": f"{p.total_memory / 2**30:.0f} GiB",
            "L2": f"{p.L2_cache_size / 2**20:.0f} MiB",
            "driver": driver(),
            "cuda": torch.version.cuda or "unknown",
        }


class Cpu:
    """Runs the same benchmark on the CPU methods, to see that it works; its figures mean nothing."""

    name = "cpu"
    timer = CPU

    def __init__(self) -> None:
        self.ceilings = harness.Ceilings()
        self.copies: list[float] = []
        self.products = self.ceilings.matmul_rates

    def copy(self) -> float:
        self.copies.append(self.ceilings.copy())
        return self.copies[-1]

    def matmul(self) -> float:
        return self.ceilings.matmul()

    def host(self, call: Call, reps: int = 1) -> list[float]:
        return [CPU.clock(call, 1) for _ in range(reps)]

    def peak(self, call: Call) -> int | None:
        return extra_memory(call)

    def fits(self, size: int) -> bool:
        return True

    def lost(self) -> bool:
        return False

    def facts(self) -> dict[str, str]:
        return {"name": machine.device()["cpu"], "cuda": leetcore.build_info()["cuda"]}


DEVICES: dict[str, Callable[[], Any]] = {"cuda": Gpu, "cpu": Cpu}


def driver() -> str:
    """The version that nvidia-smi names."""
    try:
        done = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    found = re.search(r"Driver Version: ([\d.]+)", done.stdout)
    return found[1] if found else "unknown"
