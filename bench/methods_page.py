"""Fills docs/methods.md and draws its picture: `python bench/methods_page.py GROWTH.json REGRET.json`.

GROWTH.json is what `leetcore bench --json` measured on SHAPES; --measure runs it first. REGRET.json: bench/regret.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import click
import pages
import regret as regret_table
from leetcore.bench import figures
from leetcore.bench.measurements import Measurements, Timing, fitted_power, read
from matplotlib import rc_context

PAGE = "methods.md"
HEADS = ("1,1,{},64,64", "1,8,{},16,16", "1,8,{},32,32", "1,8,{},64,64", "1,8,{},128,128", "1,8,{},256,256")
SHAPES = " ".join(heads.format(4**i) for heads in HEADS for i in range(8))
PICTURED = (1, 8, 64, 64)  # B, H, K, V
ORDER = {"parallel": "N^2", "recursive": "N log N", "fft": "N log N"}
TIE = 1.03  # times the fastest: as fast


def sizes(t: Timing) -> tuple[int, ...]:
    s = t.shape
    return s.B, s.H, s.K, s.V


def conditions(results: dict[str, Any]) -> str:
    device, rates = results["device"], results["ceilings"]["matmul"]
    matmul = max(rate["median"] for rate in rates.values()) / 1e9
    return (
        f"{device['processor']}, {results['threads']} threads, {results['isa']}, leetcore "
        f"{results['versions']['leetcore']}, {results['date'][:10]}; a float32 matrix product ran at {matmul:.0f} "
        f"Gflop/s. float32, one decay a head (ALiBi), medians of {results['rounds']} interleaved samples."
    )


def growth(found: Measurements) -> str:
    """Exponents of time and of flop over the same lengths."""
    rows = []
    for method in dict.fromkeys(t.method for t in found.timings):
        points = [t for t in found.timings if t.method == method and sizes(t) == PICTURED]
        lengths = [t.shape.N for t in points]
        powers = [fitted_power(lengths, x) for x in ([t.flop or 0 for t in points], [t.seconds for t in points])]
        last = max(points, key=lambda t: t.shape.N)
        longest = f"{1e3 * last.seconds:.3g} ms at N = {last.shape.N}"
        rows.append([f"`{method}`", ORDER.get(method, "N"), *(f"{p:.2f}" for p in powers if p), longest])
    return pages.table(["method", "order", "exponent of flop", "exponent of time", "time of a call"], rows)


def wins(found: Measurements) -> str:
    """The fastest method of each problem, with those that are as fast."""
    lengths = sorted({t.shape.N for t in found.timings})
    rows = []
    for key, group in groupby(sorted(found.timings, key=sizes), key=sizes):
        timings, cells = list(group), []
        for N in lengths:
            here = sorted((t for t in timings if t.shape.N == N), key=lambda t: t.seconds)
            cells.append(", ".join(f"`{t.method}`" for t in here if t.seconds <= TIE * here[0].seconds))
        rows.append([", ".join(map(str, key)), *cells])
    return pages.table(["B, H, K, V", *(f"N = {N}" for N in lengths)], rows)


def draw(found: Measurements) -> None:
    shown = Measurements([t for t in found.timings if sizes(t) == PICTURED])
    with rc_context({"svg.hashsalt": "leetcore"}):
        for _, figure in figures.draw(["time"], shown):
            (pages.DOCS / "images").mkdir(exist_ok=True)
            figure.savefig(pages.DOCS / "images" / "growth.svg", metadata={"Date": None})


@click.command()
@click.option("--measure", is_flag=True, help="Write GROWTH_FILE first: five minutes on a quiet machine.")
@click.argument("growth_file", type=click.Path(path_type=Path))
@click.argument("regret_file", type=click.Path(exists=True, path_type=Path))
def main(measure: bool, growth_file: Path, regret_file: Path) -> None:
    """Fills the page from measured files."""
    if measure:
        bench = [sys.executable, "-m", "leetcore", "bench", "--shapes", SHAPES, "--rounds", "9"]
        subprocess.run([*bench, "--json", str(growth_file)], check=True)
    found = read([growth_file])
    pages.fill(PAGE, "growth conditions", conditions(json.loads(growth_file.read_text())))
    pages.fill(PAGE, "growth", growth(found))
    pages.fill(PAGE, "wins", wins(found))
    pages.fill(PAGE, "regret", regret_table.summary(json.loads(regret_file.read_text())))
    draw(found)


if __name__ == "__main__":
    main()
