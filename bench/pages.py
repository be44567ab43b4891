"""Fills the measured parts of README.md and docs/*.md from bench/results: `python bench/pages.py`.

A part stands between `<!-- figures:NAME -->` and `<!-- end -->`. Its text comes from the newest
record of its kind, so the pages say what the files say; a test compares them. `bench/records.py`,
`bench/accuracy.py` and `bench/mamba2.py` write the records.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import click
import goals
import leetcore
import regret as regret_record
from leetcore.bench import figures, measurements
from leetcore.bench import results as of
from leetcore.bench.measurements import Measurements, Timing, fitted_power
from leetcore.bench.results import Results, Row
from leetcore.bench.tables import duration, markdown_table, number, size

ROOT = Path(__file__).resolve().parents[1]
RESULTS, IMAGES = ROOT / "bench" / "results", ROOT / "docs" / "images"
MARKED = re.compile(r"(<!-- (?:figures:|measured: )([a-z0-9 ]+) -->\n).*?(<!-- end -->)", re.S)
ORDER = {"parallel": "N^2", "recursive": "N log N", "fft": "N log N"}  # of flop; the other methods: N
TIE = 1.03  # times the fastest: as fast
PICTURED = {"B": 1, "H": 8, "K": 64, "V": 64}
FLOORS = ["memory floor", "compute floor"]


def newest(kind: str) -> Results:
    """The newest record of a kind; raises ClickException where there is none."""
    found = [of.read(file) for file in sorted(RESULTS.glob(f"{kind}-*.json"))]
    if not found:
        raise click.ClickException(f"bench/results has no record of kind {kind}; bench/records.py measures it")
    return max(found, key=lambda results: str(results["date"]))


def origin(results: Results) -> str:
    """Where the figures come from, with the file's warning."""
    commit = f", commit {results['commit']}" if results["commit"] else ""
    matmul, copy = of.matmul(results), of.copy(results)
    rates = f"a float32 matrix product ran at {matmul['median'] / 1e9:.0f} Gflop/s" if matmul else ""
    rates += f", a copy at {copy['median'] / 1e9:.0f} GB/s" if copy else ""
    warned = wrapped(f"**{of.warning(results)}**") if of.warning(results) else ""
    where = f"{results['device']['processor']}, {results['threads']} threads, {results['isa']}"
    version = f"leetcore {results['versions']['leetcore']}{commit}, {results['date'][:10]}"
    text = wrapped(f"Measured on {where}, with {version}{'; ' + rates if rates else ''}.")
    return f"{text}\n\n{warned}".rstrip()


def wrapped(text: str) -> str:
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def percent(values: list[float]) -> str:
    low, high = (f"{100 * x:.0f}" for x in (min(values), max(values)))
    return f"{low} %" if low == high else f"{low} to {high} %"


# ---- speed ---------------------------------------------------------------------------------------


def over(results: Results, section: str, method: str, rival: str, **equal: Any) -> list[float]:
    """Times over those of the fastest rival whose name begins so."""
    ratios = [goals.ratio_to(results, row, rival) for row in goals.find(results, section, method, **equal)]
    return [ratio for ratio in ratios if ratio]


def headline() -> str:
    """Three numbers for the README."""
    results = newest("cpu")
    lines = []
    if ratios := over(results, "forward", "chunk", "torch", dtype="float32"):
        lines.append(f"- a float32 forward pass takes **{percent(ratios)}** of the time of the fastest torch code")
    if ratios := over(results, "training", "training", "torch"):
        rows = goals.find(results, "training", "training")
        memory = [
            row["peak_bytes"] / least["peak_bytes"]
            for row in rows
            if (least := goals.best(r for r in goals.same_problem(results, row) if r["kind"] == "rival"))
        ]
        lines.append(f"- with the backward pass, **{percent(ratios)}** of the time and {percent(memory)} of the memory")
    if rows := goals.find(results, "growth", H=8):
        first, last = (f(rows, key=lambda row: row["N"]) for f in (min, max))
        ratio = goals.work_seconds(results, last) / goals.work_seconds(results, first)
        lines.append(f"- {last['N'] // first['N']} times the tokens take **{ratio:.0f} times** as long")
    return "\n".join(lines) + f"\n\n{origin(results)}"


def speed() -> str:
    """chunk and the fastest torch code, forward and training."""
    results, body = newest("cpu"), []
    for section, method in (("forward", "chunk"), ("training", "training")):
        for row in goals.find(results, section, method):
            same = goals.same_problem(results, row)
            torch = goals.best(r for r in same if r["kind"] == "rival" and r["method"].startswith("torch"))
            theirs = [f"{duration(torch['seconds']['median'])} ({torch['method']})"] if torch else ["-"]
            ratio = number(goals.ratio_to(results, row, "torch"))
            floors = [duration(x) for x in of.floors(results, row)]
            head = [section, goals.text(row), row["dtype"], duration(row["seconds"]["median"])]
            body.append([*head, *floors, *theirs, ratio, number(goals.fraction(row), 2)])
    head = ["pass", "B,H,N,K,V", "dtype", "leetcore", *FLOORS, "fastest torch", "ratio", "of matmul"]
    return f"{origin(results)}\n\n{markdown_table(head, body)}"


# ---- methods -------------------------------------------------------------------------------------


def timings(results: Results) -> Measurements:
    found = Measurements()
    measurements.add(results, found)
    return found


def pictured(found: Measurements) -> list[Timing]:
    return [t for t in found.timings if all(getattr(t.shape, name) == n for name, n in PICTURED.items())]


def growth() -> str:
    """Exponents of time and of flop over the same lengths, and the longest call with its floors."""
    results, rows = newest("growth"), []
    found = pictured(timings(results))
    for method in dict.fromkeys(t.method for t in found):
        points = [t for t in found if t.method == method]
        lengths, last = [t.shape.N for t in points], max(points, key=lambda t: t.shape.N)
        powers = [fitted_power(lengths, x) for x in ([t.flop or 0 for t in points], [t.seconds for t in points])]
        longest = f"{duration(last.seconds)} at N = {last.shape.N}"
        floors = [duration(x) for x in (last.memory, last.compute)]
        cells = [ORDER.get(method, "N"), *(f"{p:.2f}" if p else "-" for p in powers), longest, *floors]
        rows.append([f"`{method}`", *cells])
    shape = ", ".join(f"{name} = {n}" for name, n in PICTURED.items())
    problem = f"{shape}, float32, one decay per head (ALiBi), medians of {results['rounds']} samples."
    head = ["method", "order", "exponent of flop", "exponent of time", "time of a call", *FLOORS]
    return f"{origin(results)}\n\n{problem}\n\n{markdown_table(head, rows)}"


def wins() -> str:
    """The fastest method of each problem, with those that are as fast."""

    def sizes(t: Timing) -> tuple[int, ...]:
        return t.shape.B, t.shape.H, t.shape.K, t.shape.V

    found = timings(newest("growth")).timings
    lengths = sorted({t.shape.N for t in found})
    rows = []
    for key, group in groupby(sorted(found, key=sizes), key=sizes):
        group_timings, cells = list(group), []
        for N in lengths:
            here = sorted((t for t in group_timings if t.shape.N == N), key=lambda t: t.seconds)
            cells.append(", ".join(f"`{t.method}`" for t in here if t.seconds <= TIE * here[0].seconds))
        rows.append([", ".join(map(str, key)), *cells])
    return markdown_table(["B, H, K, V", *(f"N = {N}" for N in lengths)], rows)


def regret() -> str:
    results = newest("regret")
    worst = regret_record.table(results, least=0.1)
    found = f"{wrapped(regret_record.summary(results))}\n\n{origin(results)}"
    return f"{found}\n\nProblems with a regret above 10 %:\n\n{worst}" if worst else found


def costs() -> str:
    """The cost model of every method on one problem."""
    shape, threads, body = PICTURED | {"N": 4096}, leetcore.num_threads(), []
    leetcore.set_num_threads(2)  # workspace and the segments of scan depend on it
    try:
        for method in leetcore.methods():
            if method.device == "cpu":
                c = leetcore.cost(method.name, **shape)
                amounts = [f"{c.flop / 1e6:.0f}", f"{c.bytes / 1e6:.1f}", size(c.workspace), f"{c.depth:.0f}"]
                body.append([f"`{method.name}`", *amounts])
    finally:
        leetcore.set_num_threads(threads)
    text = ",".join(str(shape[name]) for name in "BHNKV")
    table = markdown_table(["method", "Mflop", "MB moved", "workspace", "depth"], body)
    return f"B,H,N,K,V = {text}, float32, 2 threads; the operands are {c.least_bytes / 1e6:.1f} MB:\n\n{table}"


def serves() -> str:
    """What the methods declare in the table of methods, as what each of them lacks."""
    rows = {m.name: m.serves.split() for m in leetcore.methods() if m.device == "cpu"}
    known = list(dict.fromkeys(feature for served in rows.values() for feature in served))
    body = []
    for method, served in rows.items():
        lacks = [feature for feature in known if feature not in served]
        body.append([f"`{method}`", ", ".join(lacks) or "nothing"])
    features = wrapped(f"Features that methods on the CPU declare: {', '.join(known)}.")
    return f"{features}\n\n{markdown_table(['method', 'does not serve'], body)}"


# ---- accuracy ------------------------------------------------------------------------------------


def shown(x: float | None) -> str:
    return "-" if x is None else f"{x:.1e}"


def worst(what: str) -> str:
    """The worst errors over all decays, by dtype and N."""
    rows = [row for row in newest("accuracy")["errors"] if not row["method"].startswith("decode_step")]
    lengths = sorted({row["N"] for row in rows if row["dtype"] == "float32"})
    columns = [("float32", N) for N in lengths]
    columns += [(d, max(r["N"] for r in rows if r["dtype"] == d)) for d in ("float64", "float16", "bfloat16")]
    body = []
    for method in dict.fromkeys(row["method"] for row in rows):
        of_method = [row for row in rows if row["method"] == method]
        cells = [max(r[what] for r in of_method if (r["dtype"], r["N"]) == column) for column in columns]
        body.append([f"`{method}`", *map(shown, cells)])
    return markdown_table(["method", *(f"{d}, {N}" for d, N in columns)], body)


def by_decay(N: int) -> str:
    """Errors of the output at one length, float32."""
    rows = [r for r in newest("accuracy")["errors"] if (r["dtype"], r["N"]) == ("float32", N)]
    rows = [row for row in rows if not row["method"].startswith("decode_step")]
    return _decays([(f"`{row['method']}`", row) for row in rows], ["method"])


def decode() -> str:
    rows = [row for row in newest("accuracy")["errors"] if row["method"].startswith("decode_step")]
    return _decays([(f"{row['states']} | {row['N']}", row) for row in rows], ["states", "after steps"])


def _decays(named: list[tuple[str, Row]], head: list[str]) -> str:
    names = newest("accuracy")["facts"]["decays"]
    body: dict[str, list[str]] = {}
    for name, row in named:
        body.setdefault(name, []).append(shown(row["output"]))
    lines = [[*name.split(" | "), *cells] for name, cells in body.items()]
    return markdown_table([*head, *names.values()], lines)


def conditions() -> str:
    results = newest("accuracy")
    return f"{origin(results)}\n`bench/accuracy.py` measures it."


def mamba2_errors() -> str:
    """Errors of Mamba-2 in transformers and in leetcore."""
    results = newest("mamba2")
    shape = results["facts"]["shape"]
    sizes = f"{shape['H']} heads of {shape['P']}, state {shape['K']}, {results['errors'][0]['N']} tokens"
    text = wrapped(
        f"Errors against float64 on the same rounded inputs, {sizes}, step sizes of a new layer, transformers "
        f"{results['facts']['transformers']} without mamba_ssm (`bench/mamba2.py errors`):"
    )
    body = [[r["method"], r["dtype"], shown(r["output"]), shown(r["state"])] for r in results["errors"]]
    return f"{text}\n\n{markdown_table(['call', 'dtype', 'output', 'state'], body)}\n\n{origin(results)}"


# ---- the speed of Mamba-2 ------------------------------------------------------------------------

MAMBA2_COLUMNS: dict[str, Callable[[Row], str]] = {
    "pass": lambda row: row["section"].partition(", ")[0],
    "layers": lambda row: row["section"].partition(", ")[2],
    "activation": lambda row: row["section"].partition(", ")[2],
    "heads": lambda row: f"{row['H']} x {row['V']}",
    "state": lambda row: str(row["K"]),
    "groups": lambda row: str(row["G"]),
    "tokens": lambda row: str(row["N"]),
    "batch": lambda row: str(row["B"]),
    "dtype": lambda row: str(row["dtype"]),
    "of matmul": lambda row: number(fraction(row), 2),
    "of copy": lambda row: number(fraction(row), 2),
}
MAMBA2_TABLES = {  # beginning of the sections: caption, method, columns
    "prefill": (
        "Prefill. The fraction is that of the rate of a matrix product:",
        "leetcore.ssd",
        ("heads", "state", "groups", "tokens", "dtype", "of matmul"),
    ),
    "decoding": (
        "One token of each sequence, with states in float32. The fraction is that of the bandwidth of a copy:",
        "leetcore.ssd_step",
        ("heads", "state", "batch", "dtype", "of copy"),
    ),
    "convolution": (
        "The convolution, 4 taps. The fraction is that of the bandwidth of a copy:",
        "leetcore.causal_conv1d",
        ("activation", "tokens", "dtype", "of copy"),
    ),
    "model": (
        "Models of Mamba-2 layers alone. Decoding is a call for each of the tokens:",
        "patched",
        ("pass", "layers", "batch", "tokens", "dtype"),
    ),
}


def fraction(row: Row) -> float | None:
    return row["fraction"] and float(row["fraction"]["median"])


def mamba2_rows(results: Results, section: str, method: str) -> list[Row]:
    """Rows of a method that have samples; the sections of models are those of "patched"."""
    rows = [row for row in results["rows"] if row["method"] == method and row["seconds"]]
    return rows if section == "model" else [row for row in rows if row["section"].startswith(section)]


def mamba2_table(results: Results, section: str) -> str:
    """A caption and a table: leetcore, and the time and the ratio of each other method; empty
    without rows."""
    caption, method, columns = MAMBA2_TABLES[section]
    rows = mamba2_rows(results, section, method)
    same = [{r["method"]: r for r in goals.same_problem(results, row)} for row in rows]
    others = [name for name in dict.fromkeys(name for found in same for name in found) if name != method]
    body = []
    for row, found in zip(rows, same, strict=True):
        cells = [*(MAMBA2_COLUMNS[name](row) for name in columns), duration(row["seconds"]["median"])]
        for name in others:
            ratio = found[name]["ratio"] if name in found else None
            cells += [duration(found[name]["seconds"]["median"]), number(ratio["median"], 3)] if ratio else ["-", "-"]
        body.append(cells)
    head = [*columns, f"`{method}`" if "." in method else method]
    for name in others:
        head += [f"`{name}`" if name.startswith("leetcore.") else name, "ratio"]
    return f"{wrapped(caption)}\n\n{markdown_table(head, body)}\n" if body else ""


def mamba2_memory(results: Results) -> str:
    """The memory of a prefill in a new process; empty where it was not measured."""
    rows = [row for row in results["rows"] if row["section"] == "prefill" and row["peak_bytes"]]
    body: dict[str, list[str]] = {}
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for row in rows:
        body.setdefault(f"{row['N']}", ["-"] * len(methods))[methods.index(row["method"])] = size(row["peak_bytes"])
    if not rows:
        return ""
    heads = f"{rows[0]['H']} heads of {rows[0]['V']}, state {rows[0]['K']}, {rows[0]['dtype']}"
    caption = f"Memory that a prefill of {heads}, takes besides its inputs, results included, in a new process:"
    named = [f"`{name}`" if name.startswith("leetcore.") else name for name in methods]
    return f"{wrapped(caption)}\n\n{markdown_table(['tokens', *named], [[N, *x] for N, x in body.items()])}\n"


def mamba2_speed(results: Results) -> str:
    """Every table of the record."""
    tables = [mamba2_table(results, section) for section in MAMBA2_TABLES]
    tables.insert(1, mamba2_memory(results))
    versions = results["facts"]["rivals"].items()
    absent = [name for name, version in versions if version == "not installed"]
    rivals = f"Rivals: {', '.join(f'{name} {version}' for name, version in versions if name not in absent)}."
    rivals += f" Not installed, and so not measured: {', '.join(absent)}." if absent else ""
    return "\n".join(part for part in (f"{origin(results)}\n", f"{wrapped(rivals)}\n", *tables) if part)


def mamba2_headline(results: Results) -> str:
    """A sentence about the model of Granite's layers, for the README."""
    longest, wanted = None, {"dtype": "float32", "H": 48}
    for row in mamba2_rows(results, "model", "patched"):
        fits = row["section"].startswith("prefill") and all(row[key] == x for key, x in wanted.items())
        longest = row if fits and (not longest or row["N"] > longest["N"]) else longest
    found = longest and [r for r in goals.same_problem(results, longest) if r["method"] == "transformers"]
    if not longest or not found or not found[0]["ratio"]:
        return NO_SPEED
    where = f"{results['device']['processor']}, {results['threads']} threads"
    commit = f", commit {results['commit']}" if results["commit"] else ""
    text = wrapped(
        f"On {where}, prefill of {longest['N']} tokens takes **{number(found[0]['ratio']['median'], 2)} times** less "
        f"time with the patch ({longest['section'].partition(', ')[2]}, float32, leetcore "
        f"{results['versions']['leetcore']}{commit})."
    )
    warned = wrapped(f"**{of.warning(results)}**") if of.warning(results) else ""
    return f"{text}\n\n{warned}".rstrip()


NO_SPEED = "No speed of Mamba-2 has been measured yet: `bench/mamba2.py speed` measures it."


def if_measured(text: Callable[[Results], str]) -> str:
    """The text of the newest record of Mamba-2's speed, or a sentence where there is none."""
    return text(newest("mamba2_speed")) if list(RESULTS.glob("mamba2_speed-*.json")) else NO_SPEED


PARTS: dict[str, Callable[[], str]] = {
    "headline": headline,
    "speed": speed,
    "growth": growth,
    "wins": wins,
    "regret": regret,
    "costs": costs,
    "serves": serves,
    "conditions": conditions,
    "worst o": lambda: worst("output"),
    "worst state": lambda: worst("state"),
    "decays 8192": lambda: by_decay(8192),
    "decays 131072": lambda: by_decay(131072),
    "decode": decode,
    "mamba2 errors": mamba2_errors,
    "mamba2 speed": lambda: if_measured(mamba2_speed),
    "mamba2 headline": lambda: if_measured(mamba2_headline),
}


def filled(page: str) -> str:
    """The text of a page with its parts filled; raises ClickException for a part of another
    name."""

    def part(match: re.Match[str]) -> str:
        if match[2] not in PARTS:
            raise click.ClickException(f"unknown part {match[2]!r}; known are {', '.join(PARTS)}")
        return f"{match[1]}{PARTS[match[2]]().rstrip()}\n{match[3]}"

    return MARKED.sub(part, page)


def pages() -> list[Path]:
    """The pages that have measured parts."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [page for page in found if MARKED.search(page.read_text())]


def draw() -> None:
    """Draws growth.svg (time of every method), throughput.svg (quadratic and linear),
    error-float32.svg."""
    found = timings(newest("growth"))
    shown = Measurements(pictured(found), warning=found.warning)
    two = [t for t in shown.timings if t.method in ("chunk", "parallel") and t.shape.N >= 64]
    errors = timings(newest("check"))
    errors.errors = [e for e in errors.errors if e.dtype == "float32"]
    IMAGES.mkdir(exist_ok=True)
    for name, kind, data in (
        ("growth", "time", shown),
        ("throughput", "throughput", Measurements(two, warning=found.warning)),
        ("error-float32", "error", errors),
    ):
        for _, figure in figures.draw([kind], data):
            figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None})


@click.command()
@click.option(
    "--draw/--no-draw", "drawn", default=True, show_default=True, help="Also draw the pictures of docs/images."
)
def main(drawn: bool) -> None:
    """Fill the measured parts of README.md and docs/*.md, and draw the pictures, from
    bench/results."""
    for page in pages():
        text = page.read_text()
        if (new := filled(text)) != text:
            page.write_text(new)
            click.echo(page.relative_to(ROOT))
    if drawn:
        draw()


if __name__ == "__main__":
    main()
