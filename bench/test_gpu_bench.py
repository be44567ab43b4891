"""The GPU benchmark without a GPU: a whole run with the CPU methods, a device that breaks, its
clock, its report."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gpu
import gpu_device
import gpu_report
import lab
import leetcore.compat.mamba_ssm
import numpy as np
import pytest
import torch
from lab import Problem, TrainingProblem
from lab_mamba2 import SsdDecodeProblem, SsdProblem, SsdShape, SsdTrainingProblem
from leetcore import reference
from leetcore.bench.problems import Shape
from leetcore.bench.results import Results, complete, new, read
from leetcore.bench.session import NOT_FINITE, Row
from leetcore.bench.timing import CPU, stats
from leetcore.torch import ssd
from rivals import mamba2

PROGRAM = Path(__file__).with_name("gpu.py")


def bench(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, PROGRAM, *map(str, arguments)], capture_output=True, text=True, timeout=300)


def test_everything_on_the_cpu(tmp_path: Path) -> None:
    out = tmp_path / "x.json"
    sections = "forward,growth,backward,gated,mamba2,mamba2_training,mamba2_decode"
    ran = bench("--device=cpu", "--tiny", "--rounds=1", f"--sections={sections}", "--commit=abc", "-o", out)
    assert ran.returncode == 0, ran.stderr
    results = read(out)
    assert results["commit"] == "abc" and not results["dirty"] and len(results["facts"]["done"]) == 8
    timed = {row["method"] for row in results["rows"] if row["section"] == "forward" and row["seconds"]}
    assert {"auto", *lab.methods()} < timed and any(m.startswith("torch") for m in timed)
    assert all(row["host_seconds"] for row in results["rows"] if row["section"] == "forward" and row["seconds"])
    text = out.with_suffix(".md").read_text()
    assert text == gpu_report.markdown(results)
    assert "Forward, B,H,N,K,V = 1,2,200,16,24" in text and "Growth with N" in text and "Regret" in text
    for section in gpu_report.TRAINING:
        rows = [row for row in results["rows"] if row["section"] == section]
        assert {gpu_report.STEP, gpu_report.BACKWARD} < {row["method"] for row in rows}
        assert any(row["method"].startswith("torch autograd") for row in rows)
        assert all(row["seconds"] and row["host_seconds"] and row["peak_bytes"] is not None for row in rows)
    assert text.count("Training, forward and backward") == 2
    mamba2 = [row for row in results["rows"] if row["section"].startswith("mamba2")]
    ours = ["auto", "chunk", "scan", "bare operator", "training", "ssd_step"]
    assert [row["method"] for row in mamba2] == ours
    assert all(row["seconds"] and row["host_seconds"] and row["peak_bytes"] is not None for row in mamba2)
    assert "### Mamba-2, B,H,N,K,V = 2,4,150,16,24 G=2\n" in text and "| time / bare operator |" in text
    assert "| rows of leetcore that are wrong or failed | <= 0 | 0 | met |" in text


def test_no_time_left_is_said_and_resumed(tmp_path: Path) -> None:
    out = tmp_path / "x.json"
    assert bench("--device=cpu", "--tiny", "--time-limit=-1", "--sections=growth", "-o", out).returncode == 0
    assert len(json.loads(out.read_text())["facts"]["not reached"]) == 2
    again = bench("--device=cpu", "--tiny", "--rounds=1", "--sections=growth", "--resume", "-o", out)
    results = read(out)
    assert again.returncode == 0 and "not reached" not in results["facts"] and len(results["rows"]) > 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    ran = bench("-o", tmp_path / "x.json")
    assert ran.returncode == 1 and ran.stderr == "Error: torch sees no CUDA device\n" and not list(tmp_path.iterdir())


def test_the_clock_hides_the_host_behind_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events stand right around the call; the GPU reads for as long as the host takes to queue it,
    within bounds."""
    done: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0

        def record(self) -> None:
            done.append("event")

        def elapsed_time(self, stop: Event) -> float:
            return 3.0  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    device = gpu_device.Gpu.__new__(gpu_device.Gpu)
    device.read_s = 1e-3
    monkeypatch.setattr(device, "read", lambda: done.append("read"))
    for host, reads in ((0.2e-3, 2), (3.5e-3, 5), (1.0, gpu_device.MOST_READS)):
        monkeypatch.setattr(device, "host", lambda call, host=host: [host])
        done.clear()
        assert device.clock(lambda: done.append("call"), 2) == pytest.approx(3e-3)
        assert done == ["call"] + 2 * (["read"] * reads + ["event", "call", "event"])


class Fragile(gpu_device.Cpu):
    """A device whose context a method breaks."""

    broken = False

    def __init__(self) -> None:
        self.copies, self.products = [1.0], [1.0]
        self.timer = CPU

    def copy(self) -> float:
        return 1.0

    matmul = round = copy

    def to_json(self) -> Any:
        return {"best": "torch", "matmul": {"torch": stats(self.products)}, "copy": stats(self.copies)}

    def lost(self) -> bool:
        return self.broken


def made(device: Fragile) -> gpu.GpuSession:
    return gpu.GpuSession(1, device, device.timer, quick=True, device=device)


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> gpu.GpuSession:
    device = Fragile()
    call = Problem.call

    def breaking(p: Any, method: str, out: Any = None) -> Any:
        def broken() -> Any:
            device.broken = True
            raise RuntimeError("an illegal memory access was encountered")

        return broken if method == "scan" else call(p, method, out)

    monkeypatch.setattr(Problem, "call", breaking)
    return made(device)


def test_a_method_that_breaks_the_device_is_left_out_of_the_rest(session: gpu.GpuSession) -> None:
    group = gpu.Group("forward", Shape.parse("1,1,70,8,8"), "float32", ("chunk", "scan"), rivals=False)
    said: list[str] = []
    with pytest.raises(gpu.Lost, match=r"^scan broke the device's context"):
        gpu.run(session, [group], lambda: None, said.append)
    assert [(row.method, row.status[:6]) for row in session.rows] == [("scan", "failed")]
    assert "done" not in session.facts
    session.device.broken = False  # a new process
    gpu.run(session, [group], lambda: None, said.append)
    assert [row.method for row in session.rows] == ["scan", "chunk"]
    assert session.rows[1].seconds and session.facts["done"] == [str(group)]


def row(method: str, us: float, shape: str = "8,32,2048,128,128", section: str = "forward", **fields: Any) -> Any:
    kind = "rival" if method.startswith(("fla", "bare", "mamba_ssm")) else "leetcore"
    sizes = (SsdShape if "G=" in shape else Shape).parse(shape)
    made = Row(method, kind, sizes, "bfloat16", "alibi", section, work=1e6, unit="bytes", **fields)
    made.seconds, made.ceilings, made.copy = [1e-6 * us] * 3, [4.3e12] * 3, [4.3e12] * 3
    return complete(made.to_json())


def results_of(rows: list[Any], copy: float = 4.3e12) -> Results:
    ceilings = {"best": "torch", "matmul": {"torch": stats([1e12])}, "copy": stats([copy])}
    return new("gpu", rows=rows, ceilings=ceilings)


def verdicts(rows: list[Any], copy: float = 4.3e12) -> dict[str, tuple[str, str]]:
    lines = gpu_report.goals(results_of(rows, copy))
    return {line["goal"]: (line["measured"], line["verdict"]) for line in lines}


def test_goals_scale_with_the_bandwidth_and_take_the_best_method() -> None:
    rows = [row("chunk", 300), row("scan", 240), row("fla: chunk", 500)]
    name = "forward 8,32,2048,128,128: best method (scan), time / goal"
    assert verdicts(rows)[name] == ("1.6", "MISSED")
    assert verdicts(rows, 2.15e12)[name] == ("0.8", "met")
    assert verdicts(rows)["forward 8,32,2048,128,128: fla's chunk_simple_gla / best method, time"] == ("2.08", "met")


def test_goals_of_training() -> None:
    """A backward pass has its goal alone, and fla's step is held against ours."""
    shape = "1,32,8192,128,128"
    rows = [row(method, us, shape, "backward") for method, us in ((gpu_report.STEP, 300), (gpu_report.BACKWARD, 200))]
    rows.append(row("fla: chunk", 500, shape, "backward"))
    found = verdicts(rows)
    assert found[f"backward {shape}: best method (backward), time / goal"] == ("1.25", "met")
    assert found[f"backward {shape}: fla's forward and backward / ours, time"] == ("1.67", "MISSED")
    assert verdicts(rows, 2.15e12)[f"backward {shape}: best method (backward), time / goal"] == ("0.625", "met")
    table = "\n".join(gpu_report.method_table(results_of(rows), "backward", "Training")).splitlines()
    [step, alone] = [line for line in table for name in rows[:2] if line.startswith(f"| {name['method']} |")]
    assert "| 0.600 |" in step and "| 0.400 |" not in alone


@pytest.mark.parametrize("method", ["training", "backward"])
def test_wrong_gradients_are_no_speed(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = TrainingProblem.call

    def wrong(p: Any, name: str, out: Any = None) -> Any:
        right = call(p, name)
        return lambda: right() | {"d_log_decay": 1.1 * right()["d_log_decay"]}

    monkeypatch.setattr(TrainingProblem, "call", wrong)
    session = made(Fragile())
    row = session.leetcore_row("gated", TrainingProblem(Shape(1, 2, 70, 8, 8), torch.float32, "gates"), method)
    assert row.status == "wrong" and row.error == pytest.approx(0.1, rel=1e-3)


def test_goals_of_decode() -> None:
    step = row("decode_step", 0.25, gpu_report.DECODE, "decode", host=[9e-6])
    found = verdicts([step])
    assert found[f"decode {gpu_report.DECODE}: time / memory floor"] == ("1.07", "met")
    assert found[f"decode {gpu_report.DECODE}: host time of a call"] == ("9 us", "met")


@pytest.mark.parametrize(("status", "note"), [("wrong", ""), ("wrong", NOT_FINITE), ("failed: CUDA error", "")])
def test_wrong_rows_are_counted(status: str, note: str) -> None:
    shape = Shape(1, 1, 1, 1, 1)
    made = Row("fft", "leetcore", shape, "bfloat16", "alibi", "forward", status=status, note=note, took=1.0)
    wrong = complete(made.to_json())
    theirs = wrong | {"method": "fla: chunk", "kind": "rival"}
    assert gpu_report.bad({"rows": [wrong, theirs]}) == [wrong]
    assert verdicts([wrong, theirs])["rows of leetcore that are wrong or failed"] == ("1", "MISSED")


def test_regret_is_of_auto_over_the_best() -> None:
    rows = [row("auto", 30, note="chunk"), row("chunk", 31), row("scan", 20)]
    [(regret, auto, best)] = gpu_report.regrets({"rows": rows})
    assert regret == pytest.approx(0.5) and auto["note"] == "chunk" and best["method"] == "scan"


def test_every_goal_is_measured() -> None:
    """A shape with a goal that no group measures would stay "not measured" for ever."""
    measured = {(g.section, str(g.shape)) for g in gpu.groups(tiny=False) if g.dtype == "bfloat16" and not g.methods}
    decode = {("decode", gpu_report.DECODE), ("mamba2_decode", gpu_report.MAMBA2_DECODE)}
    assert {*gpu_report.GOAL_US, *gpu_report.PUBLISHED, *decode} <= measured
    assert {section for section, _ in measured} | {g.section for g in gpu.groups(tiny=True)} <= {*gpu.SECTIONS}


SSD_SHAPE = SsdShape.parse("2,4,150,16,24 G=2")


def test_the_oracle_of_mamba2_is_the_definition() -> None:
    p = SsdProblem(SSD_SHAPE, torch.float32)
    given = {name: x.double().numpy() for name, x in p.given.items()}
    expected = reference.ssd(**given, dt_softplus=True)
    for name, want in zip(("y", "state"), expected, strict=True):
        assert reference.error(p.wanted[name].numpy(), want) <= 1e-13
    one = SsdDecodeProblem(SsdShape.parse("3,4,1,16,24 G=2"), torch.float32)
    given = {name: x.double().numpy() for name, x in one.given.items()}
    given |= {name: np.stack([given[name]] * 2, 1) for name in ("x", "dt", "B", "C")}
    y, _ = reference.ssd(**given, dt_softplus=True, initial_state=one.new_state().numpy())
    assert reference.error(torch.stack(one.wanted, 1).numpy(), y) <= 1e-13


def test_the_gradient_oracle_of_mamba2_is_autograd_in_float64() -> None:
    p = SsdTrainingProblem(SSD_SHAPE, torch.float32)
    leaves = {name: x.double().requires_grad_() for name, x in p.given.items()}
    y = ssd(**leaves, dt_softplus=True)
    found = [y.detach(), *torch.autograd.grad(y, list(leaves.values()), p.d_o.double())]
    assert list(p.wanted) == ["o", *(f"d_{name}" for name in leaves)]
    for a, e in zip(p.wanted.values(), found, strict=True):
        assert lab.relative_error(a, e) <= 1e-11


@pytest.mark.parametrize("name", ["y", "state"])
def test_wrong_results_of_mamba2_are_no_speed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = SsdProblem.call

    def wrong(p: Any, method: str, out: Any = None) -> Any:
        right = call(p, method)
        return lambda: right() | {name: 1.1 * right()[name]}

    monkeypatch.setattr(SsdProblem, "call", wrong)
    row = made(Fragile()).leetcore_row("mamba2", SsdProblem(SSD_SHAPE, torch.float32), "chunk")
    assert row.status == "wrong" and row.error == pytest.approx(0.1, rel=1e-3)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """leetcore's stand-in for mamba_ssm, whose functions have the arguments of the package."""
    leetcore.compat.mamba_ssm.install()
    names = [name for name in sys.modules if name.partition(".")[0] in ("mamba_ssm", "causal_conv1d")]
    monkeypatch.setattr(mamba2, "find_spec", lambda name: ModuleSpec(name, None))
    yield
    for name in names:
        del sys.modules[name]


@pytest.mark.skipif(any(map(find_spec, ("mamba_ssm", "causal_conv1d"))), reason="there is no need for a stand-in")
@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rivals_of_mamba2_get_the_problem_right(dtype: torch.dtype) -> None:
    kinds: dict[type[Problem], int] = {SsdProblem: 2, SsdTrainingProblem: 1, SsdDecodeProblem: 1}
    for kind, count in kinds.items():
        shape = SsdShape.parse("3,4,1,16,24 G=2") if kind.one_token else SSD_SHAPE
        p = kind(shape, dtype)
        p.device = "cuda"
        factories = [f for rival in p.against for f in p.factories(rival, True).values()]
        assert len(factories) == count and all(p.judge(factory())[1] for factory in factories)


def test_goals_of_mamba2() -> None:
    shape, decode = "1,128,8192,128,64 G=1", gpu_report.MAMBA2_DECODE
    rows = [row("auto", 180, shape, "mamba2"), row("chunk", 120, shape, "mamba2")]
    rows += [row("bare operator", 160, shape, "mamba2"), row("bare operator", 1, f"{shape[:-1]}8", "mamba2")]
    rows += [row(gpu_report.STEP, 400, shape, "mamba2_training"), row("mamba_ssm", 800, shape, "mamba2_training")]
    rows.append(row("ssd_step", 0.25, decode, "mamba2_decode"))
    for each in rows:
        each["decay"] = f"new layers, G={each['G']}"
    found = verdicts(rows)
    assert found[f"mamba2 {shape}: best method (chunk), time / goal"] == ("0.8", "met")
    assert found[f"mamba2 {shape}: time / bare operator"] == ("1.12", "met")
    assert found[f"mamba2_training {shape}: time / mamba_ssm"] == ("0.5", "met")
    assert found[f"mamba2_decode {decode}: time / memory floor"] == ("1.07", "met")


def test_work_of_mamba2_is_that_of_the_operator_where_no_heads_share() -> None:
    plain, alone = Shape(2, 3, 100, 16, 24), SsdShape(2, 3, 100, 16, 24, G=3)
    assert alone.exact_flop(64) == plain.exact_flop(64) and alone.backward_flop(64) == plain.backward_flop(64)
    assert alone.token_bytes(2) == plain.token_bytes(2) + 2 * 2 * 3 * 100  # dt
    assert SsdShape.parse("1,128,8192,128,64 G=1").token_bytes(2) / 4.3e12 == pytest.approx(64e-6, rel=0.01)
