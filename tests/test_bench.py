"""`leetcore check`, `bench` and `plot`: they find wrong results, keep what was measured, and read
their own files.

One file: one small run is the input of most tests.
"""

import csv
import importlib.util
import json
import math
import sys
import time
from pathlib import Path

import leetcore
import numpy as np
import pytest
from click.testing import CliRunner
from leetcore.bench import check, machine, measurements, problems, session, speed, tables, timing
from leetcore.bench import results as results_file
from leetcore.bench.problems import Case, Shape
from leetcore.cli import main

ROOT = Path(__file__).parent.parent
SMALL = ["--shapes", "1,2,40,8,16", "--rounds", "2"]


class Quick:
    """Ceilings that cost nothing."""

    best = "numpy"

    def __init__(self, threads):
        pass

    def matmul(self):
        return 1e9

    copy = round = matmul

    def to_json(self):
        one = {"median": 1e9, "p10": 1e9, "p90": 1e9, "n": 1}
        return {"best": "numpy", "matmul": {"numpy": one}, "copy": one}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(speed, "Ceilings", Quick)
    monkeypatch.setattr(timing, "SAMPLE_S", 1e-4)
    monkeypatch.setattr(timing, "SETTLE_S", 0)
    monkeypatch.setattr(machine, "restart_undisturbed", lambda: None)


@pytest.fixture
def register():
    """Registers functions as methods, for one test."""
    from leetcore.methods import registered

    before = dict(registered)
    yield leetcore.register_method
    registered.clear()
    registered.update(before)


def leet(*arguments, status=0):
    ran = CliRunner().invoke(main, [str(a) for a in arguments])
    assert ran.exit_code == status, ran.output + str(ran.exception)
    assert ran.exception is None or isinstance(ran.exception, SystemExit), ran.exception
    return ran


def right(q, k, v, log_decay, scale):
    return leetcore.linear_attention(q, k, v, log_decay, scale=scale, method="recurrent")


def wrong(q, k, v, log_decay, scale):
    """A power of gamma too many for all but the first 50 tokens: a mistake that published kernels
    have made."""
    o = right(q, k, v, log_decay, scale)
    o[:, :, 50:] *= np.exp(log_decay)[:, :, None, None].astype(o.dtype)
    return o


def raises(*arguments):
    raise ZeroDivisionError("of mine\nin two lines")


BROKEN = {
    "mistaken": (wrong, "WRONG"),
    "raising": (raises, "ZeroDivisionError: of mine"),
    "transposed": (lambda q, k, v, g, s: right(q, k, v, g, s).swapaxes(1, 2), "expected shape"),
    "notfinite": (lambda q, k, v, g, s: np.full_like(v, np.nan), "values that are not finite"),
    "nothing": (lambda *given: None, "expected an array, got NoneType"),
}


# ---- problems ------------------------------------------------------------------------------------


def test_a_case_is_made_again_from_its_text():
    cases = list(check.grid(["float32", "bfloat16"], "default"))
    assert len(set(cases)) == len(cases) > 300
    for case in cases[::37]:
        again = eval(str(case), {"Case": Case})
        one, other = case.arguments(), again.arguments()
        assert again == case and one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("level", ["quick", "default", "full"])
def test_the_grid_has_every_length_decay_layout_and_feature(level):
    cases = list(check.grid(["float64"], level))
    assert {c.N for c in cases} >= set(check.LENGTHS[level])
    assert {c.decay for c in cases} == set(problems.DECAYS)
    features = {(c.heads, c.layout, c.bounds is None, c.state, c.decay) for c in cases if c.decay in ("mixed", "token")}
    assert len(features) >= 4 * 2 * 2 * 2 * 2
    for N in check.LENGTHS[level]:
        assert {c.decay for c in cases if c.N == N} >= set(problems.DECAYS)


@pytest.mark.parametrize("text", ["1,2,3,4", "1,2,3,4,0", "a", "1,2,3,4,5,6", ""])
def test_wrong_shapes(text):
    with pytest.raises(ValueError, match="five positive integers"):
        Shape.parse(text)


# ---- check ---------------------------------------------------------------------------------------


def test_check_passes_what_is_right(register, tmp_path):
    register("mine", right)
    ran = leet("check", "chunk", "mine", "--quick", "--dtypes", "float32,bfloat16", "--json", tmp_path / "c.json")
    assert "MISS" not in ran.output
    assert "mine refused " in ran.output and "without data-dependent decays" in ran.output
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["misses"] == [] and {row["method"] for row in found["errors"]} == {"chunk", "mine"}
    for row in found["errors"]:
        allowed = problems.TOLERANCE[row["dtype"]]
        assert 0 < row["output"] <= allowed[0]
        assert row["state"] is None if row["method"] == "mine" else 0 <= row["state"] <= allowed[1]
    assert any("states" in r["why"] for r in found["refused"])


@pytest.mark.parametrize("name", BROKEN)
def test_check_finds_what_is_broken(register, tmp_path, name):
    fn, text = BROKEN[name]
    register(name, fn)
    options = ("--quick", "--dtypes", "float32", "--json", tmp_path / "c.json")
    ran = leet("check", name, "recurrent", *options, status=1)
    assert f"MISS {name}: " in ran.output
    assert ("output: error" if text == "WRONG" else text) in ran.output
    assert f"Error: {name}: wrong on " in ran.output and "MISS recurrent" not in ran.output
    misses = json.loads((tmp_path / "c.json").read_text())["misses"]
    assert {m["method"] for m in misses} == {name}
    if name == "mistaken":  # only where the mistake is
        cases = [eval(m["problem"], {"Case": Case}) for m in misses]
        assert all(c.N > 50 and c.decay not in ("none", "1") for c in cases)


def test_check_finds_elements_that_nobody_wrote(monkeypatch):
    original = leetcore.linear_attention

    def lazy(*arguments, out=None, **given):
        o, state = original(*arguments, **given)
        out[:, :, :-1] = o[:, :, :-1]
        return out, state

    case = Case(65, 16, 16)
    given, found = case.arguments(), check.Findings()
    monkeypatch.setattr(leetcore, "linear_attention", lazy)
    check.examine("chunk", case, given, case.expected(given), found)
    assert [m.text for m in found.misses] == ["output: values that are not finite, allowed 5e-06"]


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda o, s: (o[:, :1], s), "output: wrong shape: got [1, 1, 65, 16], expected [1, 2, 65, 16]"),
        (lambda o, s: (o.astype("f8"), s), "output: wrong dtype: got float64, expected float32"),
        (lambda o, s: (o, s[..., :3]), "state: wrong shape: got [1, 2, 16, 3], expected [1, 2, 16, 16]"),
        (lambda o, s: (list(o), s), "output: wrong type: got list, expected an array of numpy"),
    ],
)
def test_check_names_wrong_shapes_and_dtypes(monkeypatch, change, text):
    original = leetcore.linear_attention
    monkeypatch.setattr(leetcore, "linear_attention", lambda *a, **given: change(*original(*a, **given)))
    case = Case(65, 16, 16)
    given, found = case.arguments(), check.Findings()
    check.examine("chunk", case, given, case.expected(given), found)
    assert [m.text for m in found.misses] == [text]


def test_check_keeps_what_it_found_when_interrupted(register, tmp_path):
    calls = []

    def interrupted(*given):
        calls.append(0)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return right(*given)

    register("mine", interrupted)
    ran = leet("check", "mine", "--quick", "--json", tmp_path / "c.json", status=130)
    found = json.loads((tmp_path / "c.json").read_text())
    assert "Interrupted" in ran.output and found["interrupted"] and found["errors"]


def test_import_registers_methods(tmp_path):
    example = ROOT / "examples/own_method.py"
    ran = leet("check", "mine", "--quick", "--dtypes", "float64", "--import", example)
    assert "mine" in ran.output
    from leetcore.methods import registered

    registered.pop("mine")


# ---- bench ---------------------------------------------------------------------------------------


def test_bench_writes_files_that_parse(tmp_path):
    out = {name: tmp_path / f"b.{name}" for name in ("json", "csv", "markdown")}
    options = [text for name, file in out.items() for text in (f"--{name}", file)]
    ran = leet(
        "bench", "chunk", "fft", "auto", *SMALL, "--decays", "alibi,token", "--dtypes", "float32,bfloat16", *options
    )
    assert "fastest" in ran.output and "fft: refused: " in ran.output
    results = results_file.read(out["json"])
    assert results["schema"] == "leetcore results" and results["version"] == 2 and results["kind"] == "bench"
    assert not results["interrupted"] and (results["commit"], results["dirty"]) == machine.commit()
    assert {"device", "versions", "isa", "threads", "ceilings"} <= results.keys()
    assert len(results["rows"]) == 3 * 2 * 2
    for row in results["rows"]:
        if row["method"] == "fft" and row["decay"] == "token":
            assert row["status"].startswith("refused: ") and row["seconds"] is None
            continue
        assert row["status"] == "ok" and row["seconds"]["n"] == 2 and row["seconds"]["p10"] > 0
        assert row["seconds"]["p10"] <= row["seconds"]["median"] <= row["seconds"]["p90"]
        assert row["rate"]["median"] > 0 and row["fraction"]["median"] > 0 and row["least_bytes"] > 0
        assert row["peak_bytes"] >= row["workspace"] + 2 * 40 * 16 * (2 if row["dtype"] == "bfloat16" else 4)
        assert row["error"] <= problems.TOLERANCE[row["dtype"]][0]
        assert min(results_file.floors(results, row)) > 0
    lines = list(csv.DictReader(out["csv"].read_text().splitlines()))
    assert len(lines) == 12 and {line["method"] for line in lines} == {"chunk", "fft", "auto"}
    assert sum(float(line["seconds"]) > 0 for line in lines if line["seconds"]) == 10
    assert sum(float(line["memory_floor"]) > 0 and float(line["compute_floor"]) > 0 for line in lines[:4]) == 4
    table = out["markdown"].read_text().splitlines()
    assert len(table) == 4 + 12 and len({line.count("|") for line in table[2:]}) == 1


@pytest.mark.parametrize("name", BROKEN)
def test_the_gate_refuses_what_is_broken_and_goes_on(register, tmp_path, name):
    fn, text = BROKEN[name]
    register(name, fn)
    options = ("--shapes", "1,2,80,8,8", "--rounds", 2, "--json", tmp_path / "b.json")
    ran = leet("bench", name, "chunk", *options, status=1)
    assert text in ran.output and f"Error: {name}: wrong or failed" in ran.output
    broken, fine = results_file.read(tmp_path / "b.json")["rows"]
    assert broken["status"].startswith(("wrong", "failed")) and broken["seconds"] is None
    assert fine["method"] == "chunk" and fine["seconds"]["n"] == 2


def test_a_method_that_fails_later_ends_its_row_only(register, tmp_path):
    calls = []

    def tired(*given):
        calls.append(0)
        if len(calls) > 3:
            raise RuntimeError("enough")
        return right(*given)

    register("mine", tired)
    leet("bench", "mine", "chunk", *SMALL, "--json", tmp_path / "b.json", status=1)
    mine, chunk = results_file.read(tmp_path / "b.json")["rows"]
    assert "enough" in mine["status"] and chunk["status"] == "ok" and chunk["seconds"]


def test_an_interrupt_keeps_what_was_measured(register, tmp_path):
    def interrupted(q, *given):
        if q.shape[2] > 40:
            raise KeyboardInterrupt
        return right(q, *given)

    register("mine", interrupted)
    options = ("--shapes", "1,2,40,8,8 1,2,50,8,8", "--rounds", 2, "--json", tmp_path / "b.json")
    ran = leet("bench", "chunk", "mine", *options, "--markdown", tmp_path / "b.md", status=130)
    results = results_file.read(tmp_path / "b.json")
    assert "Interrupted" in ran.output and results["interrupted"] and "INTERRUPTED" in (tmp_path / "b.md").read_text()
    assert [row["seconds"] and row["seconds"]["n"] for row in results["rows"]] == [2, 2, None, None]
    assert [row["status"] for row in results["rows"]] == ["ok", "ok", *["skipped: not reached"] * 2]


def test_slow_methods_are_skipped_and_said_so(register, tmp_path):
    def slow(*given):
        time.sleep(0.02)
        return right(*given)

    register("mine", slow)
    options = ("--slow", 0.01, "--shapes", "1,1,40,8,8", "--rounds", 2, "--json", tmp_path / "b.json")
    ran = leet("bench", "chunk", "mine", *options)
    assert "mine: skipped: took" in ran.output and "(--slow 0.01)" in ran.output
    chunk, mine = results_file.read(tmp_path / "b.json")["rows"]
    assert chunk["seconds"] and not mine["seconds"]
    ran = leet("bench", "parallel", "--slow", 1e-5, "--shapes", "1,1,4000,8,8")
    assert "parallel: skipped: predicted" in ran.output


def test_the_time_limit_skips_the_rest(register, tmp_path):
    def slow(*given):
        time.sleep(0.1)
        return right(*given)

    register("mine", slow)
    options = ("--time-limit", 0.2, "--shapes", "1,1,40,8,8 1,1,50,8,8", "--rounds", 3)
    leet("bench", "mine", *options, "--json", tmp_path / "b.json")
    first, second = results_file.read(tmp_path / "b.json")["rows"]
    assert 1 <= first["seconds"]["n"] < 3 and second["status"] == "skipped: --time-limit is over"


@pytest.mark.parametrize("dtype", problems.DTYPES)
@pytest.mark.parametrize("decay", ["0", "1", "alibi", "mixed", "token"])
@pytest.mark.parametrize("N", [1, 100, 300])
def test_rivals_are_right(N, decay, dtype):
    from leetcore.bench import rivals

    case = Case.of(Shape(2, 3, N, 16, 24), dtype, decay)
    given = case.arguments()
    want, _ = case.expected(given)
    for name, rival in rivals.ALL.items():
        variants = rival(rivals.Problem.of(given), True)
        assert variants
        limit = 1 if dtype != "float16" and dtype != "bfloat16" else 3  # 16-bit intermediates: for the gate to judge
        for note, factory in variants.items():
            row = session.Row(name, "rival", Shape(2, 3, N, 16, 24), dtype, decay)
            session.gate(row, factory(), speed.judge(case, want))
            assert row.error <= limit * problems.TOLERANCE[dtype][0], (name, note, row)
            assert row.status == "ok" or (note == "" and name == "torch quadratic"), (name, note, row)


def test_bench_with_rivals(tmp_path):
    leet("bench", "chunk", *SMALL, "--rivals", "--json", tmp_path / "b.json")
    rows = results_file.read(tmp_path / "b.json")["rows"]
    assert [row["method"] for row in rows] == ["chunk", "torch chunk", "torch quadratic"]
    assert all(row["status"] == "ok" and row["peak_bytes"] is not None for row in rows)
    assert rows[1]["note"].startswith("C=") and rows[1]["flop"] is None and rows[1]["least_bytes"] > 0


def results_of(seconds, **changes):
    """A file of results with one row a method."""
    rows = []
    for (method, N), t in seconds.items():
        row = session.Row(
            method, "rival" if "torch" in method else "leetcore", Shape(1, 8, N, 64, 64), "float32", "alibi"
        )
        row.seconds, row.ceilings = [0.98 * t, t, 1.02 * t], [1e11] * 3
        if row.kind == "leetcore":
            row.cost = leetcore.cost(method, H=8, N=N, K=64)
            row.work = row.cost.flop
        rows.append(row.to_json() | changes)
    return results_file.new("bench", rounds=3, ceilings=Quick(1).to_json(), rows=rows)


def test_compare_flags_what_became_slower(tmp_path):
    old = results_of({("chunk", 100): 1.0, ("chunk", 200): 1.0, ("fft", 100): 1.0, ("scan", 100): 1.0})
    new = results_of({("chunk", 100): 1.5, ("chunk", 200): 1.05, ("fft", 100): 0.5, ("block", 100): 1.0})
    verdicts = {(c.row["method"], c.row["N"]): (round(c.ratio, 2), c.verdict) for c in tables.compare(old, new)}
    assert verdicts == {
        ("chunk", 100): (0.67, "slower"),
        ("chunk", 200): (0.95, ""),
        ("fft", 100): (2.0, "faster"),
    }
    wide = results_of({("chunk", 100): 1.5})
    wide["rows"][0]["seconds"]["p10"] = 1.0  # spreads overlap
    assert [c.verdict for c in tables.compare(old, wide)] == [""]


def test_compare_reads_records_with_sections():
    old = results_of({("chunk", 100): 2.0}, section="forward")
    new = results_of({("chunk", 100): 1.0})
    assert [c.ratio for c in tables.compare(old, new)] == [2.0]
    assert tables.compare(new, results_of({("chunk", 100): 1.0}, section="decode")) == []


def test_compare_from_the_command_line(tmp_path):
    leet("bench", "chunk", *SMALL, "--json", tmp_path / "old.json")
    old = json.loads((tmp_path / "old.json").read_text())
    for name in ("median", "p10", "p90"):
        old["rows"][0]["seconds"][name] *= 1e-3
    old["threads"] = 99
    (tmp_path / "old.json").write_text(json.dumps(old))
    ran = leet("bench", "chunk", *SMALL, "--compare", tmp_path / "old.json")
    assert "SLOWER" in ran.output and "1 slower by more than 10 %" in ran.output and "threads was 99" in ran.output


def test_a_file_that_is_not_to_be_quoted_says_so_wherever_it_is_shown(tmp_path):
    results = results_of({("chunk", 100): 1.0, ("chunk", 200): 2.0})
    noisy = results | {"dirty": True, "ceilings": Quick(1).to_json()}
    noisy["ceilings"]["matmul"] = {"numpy": {"median": 1e9, "p10": 0.7e9, "p90": 1e9, "n": 9}}
    noisy["warnings"] = results_file.warnings(noisy)
    assert len(noisy["warnings"]) == 2
    assert "Do not quote these figures: the machine was not quiet" in tables.markdown(noisy)
    assert results_file.warnings(results | {"dirty": False}) == []
    results_file.write(tmp_path / "n.json", noisy)
    assert measurements.read([tmp_path / "n.json"]).warning.startswith("Do not quote these figures")


def test_a_file_is_read_as_it_was_written(tmp_path):
    results = results_of({("chunk", 100): 1.0, ("torch chunk", 100): 2.0})
    results_file.write(tmp_path / "b.json", results)
    assert results_file.read(tmp_path / "b.json") == results
    assert results["rows"][0]["rate"]["median"] == results["rows"][0]["work"]
    assert len((tmp_path / "b.json").read_text().splitlines()) < 60


def test_floors_are_bytes_by_the_copy_and_flop_by_the_matrix_product():
    [row] = results_of({("chunk", 100): 1.0})["rows"]
    results = {"ceilings": Quick(1).to_json()}
    assert results_file.floors(results, row) == (row["least_bytes"] / 1e9, row["flop"] / 1e11)
    moved = row | {"unit": "bytes", "ceiling": {"median": 1e10}}
    assert results_file.floors(results, moved) == (row["least_bytes"] / 1e10, row["flop"] / 1e9)


@pytest.mark.parametrize(
    "processor, name",
    [
        ("AMD EPYC (family 25 model 17)", "amd-epyc-25-17"),
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "intel-xeon-platinum-8481c"),
    ],
)
def test_files_are_named_after_the_processor(processor, name):
    assert machine.slug(processor) == name


# ---- pages ---------------------------------------------------------------------------------------


@pytest.fixture
def pages(monkeypatch):
    """The program that fills the pages of docs/."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    return pytest.importorskip("pages")


def test_pages_say_what_the_records_say(pages):
    found = pages.pages()
    assert {"methods.md", "accuracy.md"} <= {page.name for page in found}
    for page in found:
        text = page.read_text()
        assert pages.filled(text) == text, f"{page.name}: run bench/pages.py"


def test_parts_of_pages_are_filled_and_unknown_ones_refused(pages, monkeypatch):
    monkeypatch.setitem(pages.PARTS, "regret", lambda: "new")
    page = "a\n<!-- figures:regret -->\nold\n<!-- end -->\nb"
    assert pages.filled(page) == page.replace("old", "new")
    with pytest.raises(Exception, match="unknown part 'speeed'"):
        pages.filled("<!-- figures:speeed -->\n<!-- end -->")


def test_interleaving_is_round_robin_and_rotates():
    order = []

    def row(name):
        return session.Row(name, "leetcore", Shape(1, 1, 1, 1, 1), "float32", "none", call=lambda: order.append(name))

    rows = [row("a"), row("b"), row("c")]
    timing.interleave(rows, 3, lambda: 2.0, lambda: 3.0)
    assert all(len(r.seconds) == len(r.ceilings) == len(r.copy) == 3 and set(r.ceilings) == {2.0} for r in rows)
    runs = "".join(a for a, b in zip(order, [*order[1:], ""], strict=True) if a != b)
    assert runs == "abc" + "abc" + "bca" + "cab"  # how long they take; then three rounds


# ---- plot ----------------------------------------------------------------------------------------


def google(seconds):
    """As --benchmark_out writes it, with a fit that is no measurement."""
    rows = [
        {
            "name": f"forward/{method}/bfloat16/B:1/H:8/N:{N}/K:64/V:64/real_time",
            "run_type": "iteration",
            "real_time": 1e3 * t,
            "time_unit": "ms",
            "flop/s": 1e9,
            "bytes/s": 1e8,
        }
        for (method, N), t in seconds.items()
    ]
    fit = {
        "name": "forward/chunk/bfloat16_BigO",
        "run_type": "aggregate",
        "aggregate_name": "BigO",
        "real_coefficient": 1,
    }
    return {"context": {}, "benchmarks": [*rows, fit]}


def test_plot_reads_all_three_kinds(tmp_path):
    seconds = {
        (method, N): 1e-6 * N**power
        for method, power in (("chunk", 1), ("parallel", 2), ("torch chunk", 1.0), ("recurrent", 1))
        for N in (256, 1024, 4096)
    }
    (tmp_path / "bench.json").write_text(json.dumps(results_of(seconds)))
    ours = {key: t for key, t in seconds.items() if "torch" not in key[0]}
    (tmp_path / "google.json").write_text(json.dumps(google(ours)))
    leet("check", "chunk", "recurrent", "--quick", "--dtypes", "float32", "--json", tmp_path / "check.json")
    files = [tmp_path / f"{name}.json" for name in ("bench", "google", "check")]
    ran = leet("plot", *files, "-o", tmp_path / "figures", "--format", "png,svg")
    written = {p.name: p for p in (tmp_path / "figures").iterdir()}
    names = {
        "time-float32-B1-H8-K64-V64-alibi",
        "time-bfloat16-B1-H8-K64-V64",
        "speedup-float32-alibi",
        "speedup-bfloat16",
        "roofline-float32-alibi",
        "roofline-bfloat16",
        "throughput-float32-B1-H8-K64-V64-alibi",
        "throughput-bfloat16-B1-H8-K64-V64",
        "error-float32",
    }
    assert set(written) == {f"{name}.{ending}" for name in names for ending in ("png", "svg")}
    assert len(ran.output.split()) == len(written)
    for path in written.values():
        data = path.read_bytes()
        assert len(data) > 5000 and data.startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml")


def test_google_benchmark_is_read(tmp_path):
    data = google({("chunk", 100): 2e-3})
    aggregate = data["benchmarks"][0] | {
        "name": "forward/scan/float32/B:1/H:8/N:9/K:64/V:64_median",
        "run_name": "forward/scan/float32/B:1/H:8/N:9/K:64/V:64",
        "run_type": "aggregate",
        "aggregate_name": "median",
    }
    data["benchmarks"] += [data["benchmarks"][0] | {"real_time": 4.0}, aggregate]
    on_gpu = "cuda/forward/chunk/float32/B:1/H:8/N:9/K:64/V:64/min_time:0.050/manual_time"
    data["benchmarks"].append(data["benchmarks"][0] | {"name": on_gpu})
    (tmp_path / "g.json").write_text(json.dumps(data))
    scan, chunk, gpu = measurements.read([tmp_path / "g.json"]).timings
    assert (scan.method, scan.dtype, scan.shape) == ("scan", "float32", Shape(1, 8, 9, 64, 64))
    assert chunk.seconds == pytest.approx(3e-3) and chunk.flop == pytest.approx(3e6)
    assert chunk.least_bytes == pytest.approx(3e5)
    assert (gpu.method, gpu.dtype, gpu.shape) == ("chunk (cuda)", "float32", Shape(1, 8, 9, 64, 64))


@pytest.mark.parametrize("power", [0.5, 1, 1.585, 2])
def test_fitted_powers(power):
    lengths = [16, 64, 256, 1024, 4096, 16384]
    seconds = [max(3e-7 * n**power, 1e-9) for n in lengths]
    assert measurements.fitted_power(lengths, seconds) == pytest.approx(power)
    seconds[0] = seconds[1] = 1.0  # short calls are overhead, and have no say
    assert measurements.fitted_power(lengths, seconds) == pytest.approx(power)
    assert measurements.fitted_power([7], [1.0]) is None


def test_baseline_is_the_fastest_rival_else_recurrent():
    from leetcore.bench.figures import baseline

    def timings(**seconds):
        kinds = {"a": "rival", "b": "rival"}
        shape = Shape(1, 1, 1, 1, 1)
        return [
            measurements.Timing(m, kinds.get(m, "leetcore"), shape, "float32", "", t, t, t) for m, t in seconds.items()
        ]

    assert baseline(timings(a=2.0, b=1.0, recurrent=0.5)).method == "b"
    assert baseline(timings(chunk=2.0, recurrent=0.5)).method == "recurrent"
    assert baseline(timings(chunk=2.0)) is None


# ---- errors --------------------------------------------------------------------------------------

REFUSED = {
    "check method": (["check", "fast"], 2, "unknown method 'fast'; known are chunk,"),
    "bench method": (["bench", "fast"], 2, "unknown method 'fast'; known are chunk,"),
    "check dtype": (["check", "--dtypes", "int8"], 2, "'int8': allowed are float64, float32, float16, bfloat16"),
    "bench dtype": (["bench", "--dtypes", "f32"], 2, "'f32': allowed are"),
    "shape": (["bench", "--shapes", "1,2,3"], 2, "expected five positive integers B,H,N,K,V, got '1,2,3'"),
    "decay": (["bench", "--decays", "1.5"], 2, "decay: expected none, alibi, "),
    "nan": (["bench", "--decays", "nan"], 2, "decay: expected none, alibi, "),
    "directory": (["check", "--json", "none/c.json"], 1, "there is no directory none"),
    "import": (["check", "--import", "none.py"], 1, "--import none.py: FileNotFoundError"),
    "module": (["bench", "--import", "no_such_module"], 1, "--import no_such_module: ModuleNotFoundError"),
    "old": (["bench", "--compare", "none.json"], 1, "none.json: No such file"),
    "kind": (["plot", "x.json", "--kind", "pie"], 2, "'pie': allowed are time, throughput, speedup, roofline, error"),
    "format": (["plot", "x.json", "--format", "gif"], 2, "'gif': allowed are png, svg"),
    "results": (["plot", "none.json"], 1, "none.json: No such file"),
    "no results": (["plot", "text.json"], 1, "text.json: no readable JSON"),
    "other json": (["plot", "other.json"], 1, "other.json: no file of results that leetcore wrote"),
    "list": (["plot", "list.json"], 1, "list.json: no file of results that leetcore wrote"),
    "version": (["plot", "new.json"], 1, "new.json: the file has version 99, and this leetcore reads version 2"),
    "broken": (["plot", "broken.json"], 1, "broken.json: not as leetcore writes it (KeyError: 'rows')"),
    "empty": (["plot", "empty.json"], 1, "nothing to draw"),
}
FILES = {
    "text": "text",
    "other": "{}",
    "list": "[1]",
    "new": '{"schema": "leetcore results", "version": 99}',
    "broken": '{"schema": "leetcore results", "version": 2}',
    "empty": '{"context": {}, "benchmarks": []}',
}


@pytest.mark.parametrize("case", REFUSED)
def test_errors_are_one_sentence(monkeypatch, tmp_path, case):
    arguments, status, text = REFUSED[case]
    for name, content in FILES.items():
        (tmp_path / f"{name}.json").write_text(content)
    monkeypatch.chdir(tmp_path)
    ran = leet(*arguments, status=status)
    last = ran.output.strip().splitlines()[-1]
    assert last.startswith("Error: ") and text in last and "Traceback" not in ran.output


def test_torch_and_matplotlib_are_optional(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "installed", lambda package: None)
    assert "torch is not installed" in leet("bench", "--rivals", status=1).output
    assert "matplotlib is not installed" in leet("plot", "x.json", status=1).output


def test_the_command_line_imports_neither_torch_nor_matplotlib():
    import subprocess

    code = "import sys, leetcore.cli; print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_extra_memory_sees_what_a_call_needs():
    if machine.extra_memory(lambda: None) is None:
        pytest.skip("Linux only")
    grown = machine.extra_memory(lambda: np.ones(1 << 23, np.uint8).sum())
    assert 0.9 * 2**23 <= grown <= 1.5 * 2**23


def test_stats():
    assert timing.stats([]) is None
    got = timing.stats(range(11))
    assert (got["median"], got["p10"], got["p90"], got["n"]) == (5, 1, 9, 11)
    assert math.isclose(timing.clock(lambda: time.sleep(0.01), 2), 0.01, rel_tol=0.5)


def test_documented_extras():
    spec = importlib.util.find_spec("tomllib")
    if spec is None:
        pytest.skip("Python 3.10 has no tomllib")
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert all(any(x.startswith("matplotlib") for x in extras[name]) for name in ("plot", "test", "bench"))
