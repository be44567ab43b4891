"""The goals of the chunk method, and what the results say about each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

Results = dict[str, Any]
Row = dict[str, Any]

MAX_TORCH_RATIO = {
    "1,32,1024,128,128": 0.53,
    "1,32,2048,128,128": 0.53,
    "1,8,2048,64,64": 0.45,
    "1,8,8192,128,128": 0.45,
    "1,4,32768,64,64": 0.33,
}
MIN_MATMUL = {128: 0.85, 64: 0.78}  # by K = V


def find(results: Results, section: str, method: str = "leetcore chunk", **equal: str) -> list[Row]:
    """Rows that have samples."""
    rows = [row for row in results["rows"] if row["section"] == section and row["method"] == method and row["ms"]]
    return [row for row in rows if all(row[key] == value for key, value in equal.items())]


def ms(row: Row) -> float:
    return row["ms"]["median"]


def fraction(row: Row) -> float:
    return row["fraction"]["median"]


def work_seconds(results: Results, row: Row) -> float:
    """Seconds of a row at the session's median matmul rate: what the moment gave or took is divided out."""
    rates = sorted(r["ceiling"]["median"] for r in results["rows"] if r["ceiling"] and r["section"] == row["section"])
    return row["work"] / fraction(row) / rates[len(rates) // 2]


def ratio_to_torch(results: Results, row: Row) -> float | None:
    """Time over that of the fastest torch rival of the same section, shape and dtype."""
    same = (
        r
        for r in results["rows"]
        if r["ms"] and r["note"].startswith("torch") and all(r[k] == row[k] for k in ("section", "shape", "dtype"))
    )
    best = min((ms(r) for r in same), default=None)
    return ms(row) / best if best and row["ms"] else None


def slope_and_deviation(rows: list[Row], results: Results) -> tuple[float, float]:
    """Log-log slope of time against N, and the largest relative distance from the best linear law t = a N."""
    x = [math.log(int(row["shape"].split(",")[2])) for row in rows]
    y = [math.log(work_seconds(results, row)) for row in rows]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)
    return slope, max(abs(math.expm1(b - my - (a - mx))) for a, b in zip(x, y, strict=True))


def expected_rate(row: Row, by_shape: dict[str, Row]) -> float | None:
    """Exact-causal rate over the matmul ceiling that the row's neighbours have, linear in K + V between two."""

    def width(shape: str) -> int:
        return sum(map(int, shape.split(",")[3:]))

    if any(peer not in by_shape for peer in row["peers"]):
        return None
    peers = [(width(peer), fraction(by_shape[peer])) for peer in row["peers"]]
    (x0, y0), (x1, y1) = peers[0], peers[-1]
    return y0 if x0 == x1 else y0 + (y1 - y0) * (width(row["shape"]) - x0) / (x1 - x0)


def goals(results: Results) -> Iterator[dict[str, str]]:
    """Every goal as {goal, target, measured, verdict}; verdict is met, missed or not measured."""

    def goal(name: str, target: str, value: float | None, met: Callable[[float], bool], unit: str = "") -> dict[str, str]:
        if value is None:
            return {"goal": name, "target": target, "measured": "-", "verdict": "not measured"}
        return {"goal": name, "target": target, "measured": f"{value:.3g}{unit}"} | {
            "verdict": "met" if met(value) else "MISSED"
        }

    forward = {(row["shape"], row["dtype"]): row for row in find(results, "forward")}
    for shape, limit in MAX_TORCH_RATIO.items():
        for dtype in ("float32", "bfloat16"):
            row = forward.get((shape, dtype))
            value = ratio_to_torch(results, row) if row else None
            if dtype == "float32" or row:
                yield goal(f"{shape} {dtype}: time / best torch", f"<= {limit}", value, lambda x, m=limit: x <= m)
    for (shape, dtype), row in forward.items():
        least = MIN_MATMUL.get(int(shape.split(",")[3])) if shape.split(",")[3] == shape.split(",")[4] else None
        if least and dtype == "float32":
            yield goal(f"{shape}: exact flop / matmul", f">= {least}", fraction(row), lambda x, m=least: x >= m)
    for shape in dict.fromkeys(shape for shape, _ in forward):
        single, half = forward.get((shape, "float32")), forward.get((shape, "bfloat16"))
        if single and half:
            yield goal(f"{shape}: bf16 time / fp32 time", "<= 1", ms(half) / ms(single), lambda x: x <= 1)

    heads = {row["shape"]: fraction(row) for row in find(results, "one_head")}
    one, eight = heads.get("1,1,65536,128,128"), heads.get("1,8,8192,128,128")
    value = one / eight if one and eight else None
    yield goal("one head at N=65536 / eight heads at 8192, rate", ">= 0.9", value, lambda x: x >= 0.9)

    steps = find(results, "decode")
    for row in steps:
        name = f"decode {row['shape']} {row['dtype']}: state bandwidth / copy"
        yield goal(name, ">= 0.9", fraction(row), lambda x: x >= 0.9)

    times = [ms(row) for row in find(results, "gamma")]
    value = max(times) / min(times) if len(times) > 1 else None
    yield goal("slowest / fastest gamma, time", "<= 1.1", value, lambda x: x <= 1.1)

    odd = {row["shape"]: row for row in find(results, "odd")}
    ratios = {}
    for shape, row in odd.items():
        expected = expected_rate(row, odd) if row["peers"] else None
        if expected:
            ratios[shape] = fraction(row) / expected
    worst = min(ratios, key=lambda s: ratios[s], default="")
    name = "worst odd shape / its neighbours, rate" + (f" ({worst})" if worst else "")
    yield goal(name, ">= 0.75", ratios.get(worst), lambda x: x >= 0.75)

    overhead = (results["facts"].get("overhead_us") or {}).get("numpy")
    yield goal("numpy call overhead", "<= 5 us", overhead and overhead["median"], lambda x: x <= 5, " us")

    for heads_dim in ("8,64", "4,128"):
        h, dim = heads_dim.split(",")
        rows = [r for r in find(results, "growth") if r["shape"].startswith(f"1,{h},") and r["shape"].endswith(f",{dim}")]
        slope, value = slope_and_deviation(rows, results) if len(rows) > 2 else (0.0, None)
        name = f"H={h} K=V={dim}: largest deviation from linear in N" + (f" (slope {slope:.3f})" if value else "")
        yield goal(name, "<= 0.1", value, lambda x: x <= 0.1)

    avx2 = [row for row in find(results, "isa avx2") if row["dtype"] == "float32"]
    for row in avx2:
        base = forward.get((row["shape"], "float32"))
        value = fraction(row) / fraction(base) if base else None
        yield goal(f"{row['shape']}: AVX2 rate / {results['leetcore']['isa']}", ">= 0.45", value, lambda x: x >= 0.45)
    if not avx2:
        yield goal("AVX2 rate / AVX-512 rate", ">= 0.45", None, bool)
