"""What the machine can do at this moment: the rate of a matrix product, the bandwidth of a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from . import machine
from .timing import clock_ceiling, stats

SIZE = 1024
COPY_FLOATS = 1 << 25  # 128 MiB each way: more than caches hold


class Ceilings:
    """Rates of float32 matrix products of 1024^3 (flop/s) by numpy and torch, and of a copy
    (bytes/s).

    libraries: those to ask, as far as they are installed. The copy is torch's where torch is asked,
    by all threads, and else numpy's, by one thread. Sets torch's number of threads.
    """

    def __init__(self, threads: int, libraries: Iterable[str] = ("numpy", "torch")) -> None:
        rng = np.random.default_rng(0)
        a, b, c = (rng.standard_normal((SIZE, SIZE), dtype=np.float32) for _ in range(3))
        source, target = np.ones(COPY_FLOATS, np.float32), np.ones(COPY_FLOATS, np.float32)
        self.products: dict[str, Callable[[], object]] = {"numpy": lambda: np.matmul(a, b, out=c)}
        self.copier: Callable[[], object] = lambda: np.copyto(target, source)
        if "torch" in libraries and machine.installed("torch"):
            import torch

            torch.set_num_threads(threads)
            if threads != machine.cores() or "numpy" not in libraries:  # numpy's threads cannot be counted from here
                self.products.clear()
            x, y, z, old, new = (torch.from_numpy(array) for array in (a, b, c, source, target))
            self.products["torch"] = lambda: torch.mm(x, y, out=z)
            self.copier = lambda: new.copy_(old)
        self.rates: dict[str, list[float]] = {name: [] for name in self.products}
        self.copies: list[float] = []
        for _ in range(3):
            for name in self.products:
                self.matmul(name)
        self.best = max(self.rates, key=lambda name: max(self.rates[name]))
        self.copy()
        for samples in (*self.rates.values(), self.copies):  # the samples until here warmed up
            samples.clear()

    def matmul(self, name: str | None = None) -> float:
        """flop/s of the named library, or else of the fastest one."""
        name = name or self.best
        self.rates[name].append(2 * SIZE**3 / clock_ceiling(self.products[name]))
        return self.rates[name][-1]

    def copy(self) -> float:
        """bytes/s, read and written."""
        self.copies.append(2 * 4 * COPY_FLOATS / clock_ceiling(self.copier))
        return self.copies[-1]

    def round(self) -> float:
        """Measures what is measured once a round: slower libraries' products, and the copy, which
        it returns."""
        for name in self.products:
            if name != self.best:
                self.matmul(name)
        return self.copy()

    def to_json(self) -> dict[str, object]:
        return {
            "best": self.best,
            "matmul": {name: stats(rates) for name, rates in self.rates.items()},
            "copy": stats(self.copies),
        }
