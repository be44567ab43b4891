"""The figures of `leetcore plot`.

Every method has one colour, marker and line style in all of them.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import matplotlib
import matplotlib.ticker
from matplotlib.figure import Figure

from .measurements import Error, Measurements, Timing, fitted_power

# Okabe and Ito's colours, which the colour-blind can tell apart, with olive for their yellow, which
# is pale on paper. The last two are for registered functions.
_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#8A8A00",
    "#6A3D9A",
    "#8C510A",
)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
_LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (7, 2)), (0, (3, 1, 1, 1)), (0, (1, 1.5)))
_KNOWN = ("chunk", "recurrent", "parallel", "block", "recursive", "fleet", "fft", "scan")
_RIVAL_COLOURS = ("#555555", "#999999")

_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E0E0E0",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
    "legend.frameon": False,
    "svg.hashsalt": "leetcore",  # the same numbers give the same file
}
WIDTH, HEIGHT, PAGE = 6.5, 3.6, 9.0  # inches; the text of a page is 6.5 x 9
BAR, FRAME = 0.14, 0.8  # inches: height of a bar; height of title and axis

# Names in figures of throughput, whose readers may not know the methods.
LABELS = {
    "chunk": "chunk (linear)",
    "parallel": "parallel (quadratic)",
    "torch quadratic": "torch, quadratic",
    "torch chunk": "torch, chunkwise",
}

Figures = Iterator[tuple[str, Figure]]  # file names without ending


class Styles:
    """Styles of methods: built-in methods always look the same, others get theirs in the order of
    their names."""

    def __init__(self, timings: Iterable[Timing], errors: Iterable[Error]) -> None:
        kinds = {e.method: "leetcore" for e in errors} | {t.method: t.kind for t in timings}
        self.rivals = sorted(m for m, kind in kinds.items() if kind == "rival")
        others = sorted(m for m in kinds if m not in _KNOWN and m not in self.rivals)
        self.order = [*_KNOWN, *others, *self.rivals]

    def of(self, method: str) -> dict[str, Any]:
        """color, marker, linestyle for Axes.plot."""
        place = self.order.index(method)
        if method in self.rivals:
            colour = _RIVAL_COLOURS[self.rivals.index(method) % 2]
        else:
            colour = _COLOURS[place % len(_COLOURS)]
        return {
            "color": colour,
            "marker": _MARKERS[place % len(_MARKERS)],
            "linestyle": _LINES[place % len(_LINES)],  # 8 styles and 10 colours: pairs repeat late
        }

    def sorted(self, methods: Iterable[str]) -> list[str]:
        return sorted(set(methods), key=self.order.index)


def draw(kinds: Iterable[str], found: Measurements) -> Figures:
    """Draws all figures of these kinds that the measurements allow."""
    styles = Styles(found.timings, found.errors)
    drawn: dict[str, Callable[[Measurements, Styles], Figures]] = {
        "time": time,
        "throughput": throughput,
        "speedup": speedup,
        "roofline": roofline,
        "error": error,
    }
    with matplotlib.rc_context(_STYLE):
        for kind in kinds:
            for name, figure in drawn[kind](found, styles):
                if found.warning:
                    figure.suptitle(textwrap.fill(found.warning, 110), color="#B00000", fontsize=7)
                yield name, figure


def _name(*parts: Any) -> str:
    return "-".join(str(part) for part in parts if part != "")


def _decay(name: str) -> str:
    return f"decay {name}" if name else ""


def _title(*parts: Any) -> str:
    return ", ".join(str(part) for part in parts if part != "")


def _groups(items: Iterable[Any], key: Callable[[Any], Any]) -> Iterator[tuple[Any, list[Any]]]:
    for value, group in itertools.groupby(sorted(items, key=key), key=key):
        yield value, list(group)


def _side_legend(figure: Figure, axes: Any, where: Literal["upper", "center"] = "center", **options: Any) -> None:
    """Draws the legend at the right of the axes, where there are no data."""
    handles, labels = axes.get_legend_handles_labels()
    loc: Any = f"outside right {where}"
    figure.legend(handles, labels, loc=loc, handlelength=3.2, **options)


def _by_length(found: Measurements) -> Iterator[tuple[str, str, list[int], list[Timing]]]:
    """Problems that were measured at two lengths or more: file name, title, lengths, timings."""

    def key(t: Timing) -> Any:
        return t.section, t.dtype, t.shape.B, t.shape.H, t.shape.K, t.shape.V, t.decay

    for (section, dtype, B, H, K, V, decay), group in _groups(found.timings, key):
        lengths = sorted({t.shape.N for t in group})
        if len(lengths) > 1:
            title = _title(section, dtype, f"B = {B}", f"H = {H}", f"K = {K}", f"V = {V}", _decay(decay))
            name = _name(section.replace(" ", "-"), dtype, f"B{B}-H{H}-K{K}-V{V}", decay)
            yield name, title, lengths, group


def _points(group: list[Timing], method: str) -> list[Timing]:
    return sorted({t.shape.N: t for t in group if t.method == method}.values(), key=lambda t: t.shape.N)


def _floors(
    axes: Any, group: list[Timing], lengths: list[int], label: str, value: Callable[[int, float], float]
) -> None:
    """Draws the floors of a problem: that of its bytes, and the lowest one by flop of the methods
    shown."""
    for name, style in (("memory", (0, (1, 1))), ("compute", (0, (4, 2)))):
        least: dict[int, float] = {}
        for t in group:
            floor = getattr(t, name)
            if floor:
                least[t.shape.N] = min(floor, least.get(t.shape.N, math.inf))
        points = [(N, value(N, least[N])) for N in lengths if N in least]
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, color="#777777", linewidth=1, linestyle=style, label=label.format(name), zorder=1)


def time(found: Measurements, styles: Styles) -> Figures:
    """Seconds against N, both logarithmic, with the powers of N that fit."""
    for name, title, lengths, group in _by_length(found):
        figure = Figure((WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        for method in styles.sorted(t.method for t in group):
            points = _points(group, method)
            x, y = [t.shape.N for t in points], [t.seconds for t in points]
            power = fitted_power(x, y)
            label = method if power is None else f"{method}: $N^{{{power:.2f}}}$"
            spread = ([t.seconds - t.low for t in points], [t.high - t.seconds for t in points])
            axes.errorbar(x, y, spread, label=label, capsize=1.5, elinewidth=0.8, **styles.of(method))
        _floors(axes, group, lengths, "{} floor", lambda N, floor: floor)
        axes.set(xscale="log", yscale="log", xlabel="tokens N", ylabel="time of a call (s)")
        axes.set_title(title, loc="left")
        _lengths_axis(axes, lengths)
        _side_legend(figure, axes, title="method: fitted growth")
        yield _name("time", name), figure


def throughput(found: Measurements, styles: Styles) -> Figures:
    """Tokens of a sequence per second against N: constant where time grows like N, falling where it
    grows faster."""
    for name, title, lengths, group in _by_length(found):
        figure = Figure((WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        for method in styles.sorted(t.method for t in group):
            points = _points(group, method)
            y = [t.shape.N / t.seconds for t in points]
            axes.plot([t.shape.N for t in points], y, label=LABELS.get(method, method), **styles.of(method))
        _floors(axes, group, lengths, "limit by {}", lambda N, floor: N / floor)
        axes.set(xscale="log", yscale="log", xlabel="length of the sequence N (tokens)", ylabel="tokens per second")
        axes.set_title(title, loc="left")
        _lengths_axis(axes, lengths)
        _side_legend(figure, axes)
        yield _name("throughput", name), figure


def _lengths_axis(axes: Any, lengths: list[int]) -> None:
    """Puts ticks at the lengths, as many as there is room for."""
    shown = lengths[:: -(-len(lengths) // 8)]
    axes.set_xticks(shown, [str(n) for n in shown])
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())


def baseline(group: list[Timing]) -> Timing | None:
    """The timing that others of the same problem are compared with: the fastest rival, else
    recurrent."""
    rivals = [t for t in group if t.kind == "rival"] or [t for t in group if t.method == "recurrent"]
    return min(rivals, key=lambda t: t.seconds, default=None)


Problem = tuple[Timing, list[Timing]]  # a baseline, and all timings of the same problem


def _pages(problems: list[Problem]) -> list[list[Problem]]:
    """Distributes problems over pages with room for every bar."""
    pages: list[list[Problem]] = [[]]
    for problem in problems:
        if pages[-1] and sum(len(same) for _, same in [*pages[-1], problem]) > (PAGE - FRAME) / BAR:
            pages.append([])
        pages[-1].append(problem)
    return pages


def speedup(found: Measurements, styles: Styles) -> Figures:
    """Bars of the time of the baseline over the time of each method; a tick where a floor allows no
    more."""

    def key(t: Timing) -> Any:
        return t.shape.B, t.shape.H, t.shape.K, t.shape.V, t.shape.N

    for (section, dtype, decay), group in _groups(found.timings, lambda t: (t.section, t.dtype, t.decay)):
        problems = [
            (base, same)
            for _, same in _groups(group, key)
            if (base := baseline(same)) and len({t.method for t in same}) > 1
        ]
        pages = _pages(problems) if problems else []
        for number, page in enumerate(pages, 1):
            yield (
                _name("speedup", section.replace(" ", "-"), dtype, decay, number if len(pages) > 1 else ""),
                _bars(page, styles, _title(section, dtype, _decay(decay), "B,H,K,V below N")),
            )


def _bars(problems: list[Problem], styles: Styles, title: str) -> Figure:
    methods = styles.sorted(t.method for base, same in problems for t in same if t is not base)
    bars = sum(len(same) for _, same in problems)
    figure = Figure((WIDTH, max(HEIGHT, FRAME + BAR * bars)), layout="constrained")
    axes = figure.add_subplot()
    place, ticks = 0, []
    for base, same in problems:
        first = place
        for t in sorted(same, key=lambda t: styles.order.index(t.method)):
            if t.method != base.method:
                _bar(axes, place, base, t, styles.of(t.method)["color"])
                place += 1
        s = base.shape
        ticks.append(((first + place - 1) / 2, f"N = {s.N}\n{s.B},{s.H},{s.K},{s.V}\nvs. {base.method}"))
        place += 1
    for method in methods:
        axes.barh(0, 0, left=1, color=styles.of(method)["color"], label=method)
    axes.axvline(1, color="#333333", linewidth=0.8)
    axes.set(xscale="log", xlabel="speed-up: time of the baseline / time of the method")
    axes.set_yticks([y for y, _ in ticks], [text for _, text in ticks])
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0, labelsize=7)
    axes.invert_yaxis()
    axes.use_sticky_edges = False
    axes.margins(x=0.1, y=0.02)
    axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.set_title(title, loc="left")
    _side_legend(figure, axes, "upper")
    return figure


def _bar(axes: Any, place: int, base: Timing, t: Timing, colour: str) -> None:
    """Draws a bar from 1 to the speed-up, its spread, the number, and a grey tick at the highest
    floor."""
    ratio, low, high = (base.seconds / seconds for seconds in (t.seconds, t.high, t.low))
    right = ratio >= 1
    axes.barh(place, ratio - 1, left=1, height=0.85, color=colour)
    axes.plot([low, high], [place, place], color="#333333", linewidth=0.8)
    if floor := max(filter(None, (t.memory, t.compute)), default=None):
        axes.plot([base.seconds / floor] * 2, [place - 0.4, place + 0.4], color="#999999", linewidth=1.2)
    axes.annotate(
        f"{ratio:.2g}" if ratio < 100 else f"{ratio:.0f}",
        (max(1, high) if right else min(1, low), place),
        (3 if right else -3, 0),
        textcoords="offset points",
        ha="left" if right else "right",
        va="center",
        fontsize=6,
    )


def roofline(found: Measurements, styles: Styles) -> Figures:
    """flop/s against flop per byte of the operands, under the measured rates of a matrix product
    and of a copy."""
    known = [t for t in found.timings if t.flop and t.least_bytes]
    for (dtype, decay), group in _groups(known, lambda t: (t.dtype, t.decay)):
        figure = Figure((WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        x = [t.flop / t.least_bytes for t in group]
        low, high = min(x) / 2, max(x) * 2
        matmul, copy = found.matmul, found.copy
        if matmul and copy:
            low = min(low, matmul / copy / 4)
            ridge = [low, matmul / copy, max(high, 2 * matmul / copy)]
            axes.plot(
                ridge, [copy * i / 1e9 for i in ridge[:2]] + [matmul / 1e9], color="#333333", linewidth=1, zorder=1
            )
            axes.annotate(
                f"float32 matmul, {matmul / 1e9:.3g} Gflop/s",
                (ridge[2], matmul / 1e9),
                (0, 3),
                textcoords="offset points",
                ha="right",
                fontsize=7,
            )
            middle = math.sqrt(low * ridge[1])
            axes.annotate(
                f"copy, {copy / 1e9:.3g} GB/s",
                (middle, copy * middle / 1e9),
                (-4, 2),
                textcoords="offset points",
                ha="right",
                fontsize=7,
            )
        for method in styles.sorted(t.method for t in group):
            points = [t for t in group if t.method == method]
            style = styles.of(method) | {"linestyle": ""}
            xs = [(t.flop or 0) / (t.least_bytes or 1) for t in points]
            ys = [(t.flop or 0) / t.seconds / 1e9 for t in points]
            axes.plot(xs, ys, label=method, markeredgecolor="white", markeredgewidth=0.4, **style | {"markersize": 6})
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="flop of a call / bytes of its operands (flop/B)",
            ylabel="rate (Gflop/s)",
        )
        axes.set_title(_title(dtype, _decay(decay)), loc="left")
        _side_legend(figure, axes)
        yield _name("roofline", dtype, decay), figure


def error(found: Measurements, styles: Styles) -> Figures:
    """The worst relative error against the decay, with the tolerance."""
    for (dtype, N), group in _groups(found.errors, lambda e: (e.dtype, e.N or 0)):
        have = dict.fromkeys(e.decay for e in group)
        line = sorted((d for d in have if d[0].isdigit()), key=float)  # factors have an order, hence a curve
        decays = [*line, *(d for d in have if d not in line)]
        methods = styles.sorted(e.method for e in group)
        figure = Figure((WIDTH, HEIGHT + 0.3), layout="constrained")
        both = figure.subplots(1, 2, sharey=True)
        for axes, what in zip(both, ("output", "state"), strict=True):
            for place, method in enumerate(methods):
                # The worst of all files. An error of 0 has no place on a logarithmic axis.
                of = {d: [getattr(e, what) for e in group if (e.method, e.decay) == (method, d)] for d in decays}
                aside = 0.6 * ((place + 0.5) / len(methods) - 0.5)  # methods with equal errors stay visible
                points = [(i + aside, max(filter(None, of[d]))) for i, d in enumerate(decays) if any(of[d])]
                curve, rest = ([p for p in points if (p[0] < len(line) - 0.5) == known] for known in (True, False))
                style = styles.of(method) | {"markersize": 3.5, "linewidth": 0.8}
                if points:
                    axes.plot([x for x, _ in curve], [y for _, y in curve], label=method, **style)
                    axes.plot([x for x, _ in rest], [y for _, y in rest], **style | {"linestyle": ""})
            if allowed := found.tolerance.get(dtype, {}).get(what):
                axes.axhline(allowed, color="#333333", linewidth=1)
                axes.annotate(
                    f"allowed: {allowed:.0e}",
                    (0, allowed),
                    (0, -3),
                    textcoords="offset points",
                    va="top",
                    fontsize=7,
                )
            axes.axvline(len(line) - 0.5, color="#999999", linewidth=0.6)
            axes.set(yscale="log", xlabel="decay: factor, or kind")
            axes.grid(visible=False, axis="x")
            axes.set_xticks(range(len(decays)), decays, rotation=60, ha="right", rotation_mode="anchor")
            axes.set_title(_title(dtype, what, f"N = {N}" if N else ""), loc="left")
        both[0].set_ylabel("worst relative error")
        _side_legend(figure, both[0])
        yield _name("error", dtype, f"N{N}" if N else ""), figure
