"""The goals of the method chunk on the CPU, and what the results say about each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from leetcore.bench import results as of
from leetcore.bench.results import Results, Row, matmul

MAX_TORCH_RATIO = {
    "1,32,1024,128,128": 0.53,
    "1,32,2048,128,128": 0.53,
    "1,8,2048,64,64": 0.45,
    "1,8,8192,128,128": 0.45,
    "1,4,32768,64,64": 0.33,
}
MIN_MATMUL = {128: 0.85, 64: 0.78}  # by K = V


def text(row: Row) -> str:
    """B,H,N,K,V, and G of Mamba-2."""
    return ",".join(map(str, of.shape(row))) + (f" G={row['G']}" if "G" in row else "")


def find(results: Results, section: str, method: str = "chunk", **equal: str) -> list[Row]:
    """Rows of a method of leetcore that have samples."""
    rows = [row for row in results["rows"] if row["section"] == section and row["method"] == method]
    return [row for row in rows if row["seconds"] and all(row[key] == value for key, value in equal.items())]


def seconds(row: Row) -> float:
    return float(row["seconds"]["median"])


def fraction(row: Row) -> float:
    return float(row["fraction"]["median"])


def work_seconds(results: Results, row: Row) -> float:
    """Seconds of a row at the run's median rate of the matrix product, as if the machine had always
    been so fast."""
    rate = matmul(results)
    assert rate
    return float(row["work"]) / fraction(row) / rate["median"]


def same_problem(results: Results, row: Row) -> list[Row]:
    """Rows with samples of the same section, shape, dtype and decay."""
    keys = ("section", "B", "H", "N", "K", "V", "dtype", "decay")
    return [r for r in results["rows"] if r["seconds"] and all(r[key] == row[key] for key in keys)]


def best(rows: Iterable[Row]) -> Row | None:
    return min(rows, key=seconds, default=None)


def ratio_to(results: Results, row: Row, rival: str) -> float | None:
    """Time over that of the fastest rival whose name begins so, on the same problem."""
    same = same_problem(results, row)
    least = best(r for r in same if r["kind"] == "rival" and r["method"].startswith(rival))
    return seconds(row) / seconds(least) if least and row["seconds"] else None


def slope_and_deviation(rows: list[Row], results: Results) -> tuple[float, float]:
    """Log-log slope of time against N, and the largest relative distance from the best linear law t
    = a N."""
    x = [math.log(row["N"]) for row in rows]
    y = [math.log(work_seconds(results, row)) for row in rows]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)
    return slope, max(abs(math.expm1(b - my - (a - mx))) for a, b in zip(x, y, strict=True))


def expected_rate(row: Row, by_shape: dict[str, Row]) -> float | None:
    """Fraction of the matrix product's rate that the row's neighbours have, linear in K + V between
    two of them."""

    def width(shape: str) -> int:
        return sum(map(int, shape.split(",")[3:]))

    if any(peer not in by_shape for peer in row["peers"]):
        return None
    peers = [(width(peer), fraction(by_shape[peer])) for peer in row["peers"]]
    (x0, y0), (x1, y1) = peers[0], peers[-1]
    return y0 if x0 == x1 else y0 + (y1 - y0) * (width(text(row)) - x0) / (x1 - x0)


def goal(name: str, sign: str, limit: float, value: float | None, unit: str = "") -> dict[str, str]:
    """A line of the table of goals; sign is <= or >=."""
    line = {"goal": name, "target": f"{sign} {limit:g}{unit}"}
    if value is None:
        return line | {"measured": "-", "verdict": "not measured"}
    met = value <= limit if sign == "<=" else value >= limit
    return line | {"measured": f"{value:.3g}{unit}", "verdict": "met" if met else "MISSED"}


def forward_goals(results: Results) -> Iterator[dict[str, str]]:
    rows = {(text(row), row["dtype"]): row for row in find(results, "forward")}
    for shape, limit in MAX_TORCH_RATIO.items():
        for dtype in ("float32", "bfloat16"):
            row = rows.get((shape, dtype))
            yield goal(
                f"{shape} {dtype}: time / best torch", "<=", limit, ratio_to(results, row, "torch") if row else None
            )
    for (shape, dtype), row in rows.items():
        K, V = map(int, shape.split(",")[3:])
        if K == V and K in MIN_MATMUL and dtype == "float32":
            yield goal(f"{shape}: exact flop / matmul", ">=", MIN_MATMUL[K], fraction(row))
    for shape, dtype in rows:
        single = rows.get((shape, "float32"))
        if dtype == "bfloat16" and single:
            yield goal(f"{shape}: bf16 time / fp32 time", "<=", 1, seconds(rows[shape, dtype]) / seconds(single))


def goals(results: Results) -> Iterator[dict[str, str]]:
    """Every goal as {goal, target, measured, verdict}; verdict is met, MISSED or not measured."""
    yield from forward_goals(results)

    heads = {text(row): fraction(row) for row in find(results, "one_head")}
    one, eight = heads.get("1,1,65536,128,128"), heads.get("1,8,8192,128,128")
    yield goal("one head of 65536 / eight of 8192, rate", ">=", 0.9, one / eight if one and eight else None)

    for row in find(results, "decode", "decode_step"):
        yield goal(f"decode {text(row)} {row['dtype']}: state bandwidth / copy", ">=", 0.9, fraction(row))

    times = [seconds(row) for row in find(results, "gamma")]
    yield goal("slowest / fastest gamma, time", "<=", 1.1, max(times) / min(times) if len(times) > 1 else None)

    odd = {text(row): row for row in find(results, "odd")}
    expected = {shape: expected_rate(row, odd) for shape, row in odd.items() if row["peers"]}
    ratios = {shape: fraction(odd[shape]) / rate for shape, rate in expected.items() if rate}
    worst = min(ratios, key=lambda shape: ratios[shape], default="")
    yield goal(f"worst odd shape ({worst or '-'}) / its neighbours, rate", ">=", 0.75, ratios.get(worst))

    overhead = results["facts"].get("overhead_seconds", {}).get("numpy")
    yield goal("numpy call overhead", "<=", 5, overhead and 1e6 * overhead["median"], " us")

    for h, dim in ((8, 64), (4, 128)):
        rows = [row for row in find(results, "growth") if row["H"] == h]
        slope, deviation = slope_and_deviation(rows, results) if len(rows) > 2 else (math.nan, None)
        yield goal(f"H={h} K=V={dim}: deviation from linear in N (slope {slope:.3f})", "<=", 0.1, deviation)

    isa = results["isa"]
    base = {text(row): fraction(row) for row in find(results, "forward", dtype="float32")}
    narrow = find(results, "isa avx2", dtype="float32")
    if not narrow:
        yield goal(f"avx2 rate / {isa} rate", ">=", 0.45, None)
    for row in narrow:
        wide = base.get(text(row))
        yield goal(f"{text(row)}: avx2 rate / {isa} rate", ">=", 0.45, fraction(row) / wide if wide else None)
