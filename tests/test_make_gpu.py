"""`make gpu` without a GPU: its runner on commands of a shell, the names that it makes, what it
says."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "gpu" / "run.py"


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """The runner as a module, writing into tmp_path."""
    spec = importlib.util.spec_from_file_location("make_gpu", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    for name in ("ROOT", "LOGS", "RESULTS"):
        monkeypatch.setattr(module, name, tmp_path)
    return module


def machine(gpu):
    return gpu.Machine("NVIDIA X", "90a-real", "abc", "x", ["chunk", "fft"])


def stage(gpu, name, limit_s=10.0, note=lambda logs: "", **commands):
    return gpu.Stage(name, limit_s, lambda m, s: {k: ["sh", "-c", c] for k, c in commands.items()}, note)


def test_a_failing_stage_stops_no_other(gpu, capsys):
    stages = [
        stage(gpu, "one", a="echo fine"),
        stage(gpu, "two", a="echo why it failed; exit 3", b="true"),
        gpu.Stage("three", 10, lambda m, s: {"c": ["/no/such/program"]}, lambda logs: ""),
        stage(gpu, "four", a="echo so", note=gpu.last_line),
    ]
    outcomes = gpu.run_all(stages, machine(gpu), 60)
    assert [(o.name, o.result, o.note) for o in outcomes] == [
        ("one", "passed", ""),
        ("two", "FAILED", "a exit status 3"),
        ("three", "FAILED", "c could not be started"),
        ("four", "passed", "so"),
    ]
    assert "why it failed" in capsys.readouterr().out
    assert gpu.summary(outcomes).splitlines()[-1] == "stages: 2 passed, 2 failed"


def test_a_stage_that_is_late_is_stopped_with_all_it_started(gpu, tmp_path):
    late = tmp_path / "late"
    start = time.monotonic()
    outcome = gpu.run(stage(gpu, "slow", a=f"(sleep 5; touch {late}) & wait", b="true"), machine(gpu), 1.0)
    assert outcome.result == "out of time" and outcome.note == "a was stopped after 1 s"
    time.sleep(max(0.0, start + 6 - time.monotonic()))
    assert not late.exists()


@pytest.mark.parametrize("said, result", [("2 passed, 3 skipped", "passed"), ("5 skipped", "FAILED")])
def test_a_stage_that_tested_nothing_has_not_passed(gpu, said, result):
    proof = next(s.proof for s in gpu.STAGES if s.name == "test")
    tested = gpu.Stage("test", 10, lambda m, s: {"pytest": ["echo", said]}, gpu.last_line, proof)
    assert gpu.run(tested, machine(gpu), 10).result == result


def test_commands_of_a_stage_run_at_the_same_time(gpu):
    outcome = gpu.run(stage(gpu, "both", a="sleep 1", b="sleep 1", c="sleep 1"), machine(gpu), 30)
    assert outcome.result == "passed" and outcome.seconds < 2.5


def test_the_last_stage_gets_the_time_that_is_left(gpu):
    limits = {}

    def watched(name, limit_s):
        def commands(m, s):
            limits[name] = s
            return {"a": ["true"]}

        return gpu.Stage(name, limit_s, commands, lambda logs: "")

    gpu.run_all([watched("first", 100), watched("last", 1)], machine(gpu), gpu.BUDGET_S / 2)
    assert limits["first"] == 50 and gpu.BUDGET_S / 2 - 10 < limits["last"] <= gpu.BUDGET_S / 2
    assert gpu.run(watched("none", 1), machine(gpu), 0.5).result == "not run"


def test_the_budget_is_that_of_the_stages_and_under_ten_minutes(gpu):
    assert sum(s.limit_s for s in gpu.STAGES) == gpu.BUDGET_S <= 570


def test_every_method_has_a_process_of_its_own(gpu):
    for make, names in ((gpu.methods, {"chunk", "fft"}), (gpu.sanitizer, {"memcheck-chunk", "racecheck-fft"})):
        assert names <= set(make(machine(gpu), 10))
    assert all("--small" in command for command in gpu.sanitizer(machine(gpu), 10).values())


@pytest.mark.parametrize(
    "capability, name", [("8.0", "80-real"), ("8.9", "89-real"), ("9.0", "90a-real"), ("12.0", "120a-real")]
)
def test_architectures(gpu, capability, name):
    assert gpu.architecture_of(capability) == name


def test_cufft_of_torch_is_found(gpu, monkeypatch, tmp_path):
    library = tmp_path / "nvidia" / "cu13" / "lib" / "libcufft.so.12"
    library.parent.mkdir(parents=True)
    library.touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delenv("LEETCORE_CUFFT", raising=False)
    assert gpu.environment()["LEETCORE_CUFFT"] == str(library)
    monkeypatch.setenv("LEETCORE_CUFFT", "mine")
    assert gpu.environment()["LEETCORE_CUFFT"] == "mine"


def test_names_of_results(gpu):
    assert gpu.slug("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3" and gpu.slug("NVIDIA H200") == "h200"


def test_notes(gpu):
    logs = {
        "memcheck-chunk": "chunk   16 calls served, 0 wrong\n========= ERROR SUMMARY: 0 errors\n",
        "racecheck-fft": "fft   4 calls served, 1 wrong\n"
        "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n",
    }
    assert gpu.counted(logs) == "20 calls, 1 wrong, 2 errors in 2 programs under compute-sanitizer"
    table = "| a | <= 1 | 0.5 | met |\n| b | <= 1 | 2 | MISSED |\n| c | <= 1 | - | not measured |\n| d | x | y | met |"
    assert gpu.measured({"bench": table}) == "2 goals met, 1 goals MISSED, 1 goals not measured"


def test_results_hold_the_stages(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu.subprocess, "run", lambda command, **options: None)
    outcomes = [gpu.Outcome("bench", "passed", 1.0, "")]
    since = time.time() - 1
    assert gpu.record(outcomes, machine(gpu), since) == "no results: the benchmark wrote none"
    (tmp_path / "gpu-x.json").write_text('{"rows": []}')
    assert gpu.record(outcomes, machine(gpu), since) == "results: gpu-x.json and gpu-x.md"
    assert json.loads((tmp_path / "gpu-x.json").read_text())["stages"][0]["name"] == "bench"
    assert gpu.record(outcomes, machine(gpu), time.time() + 60) == "no results: the benchmark wrote none"


def run(*arguments, **options):
    return subprocess.run([sys.executable, PROGRAM, *arguments], capture_output=True, text=True, timeout=60, **options)


def test_without_a_gpu_it_says_so(tmp_path):
    ran = run(env={"PATH": str(tmp_path)})
    assert ran.returncode == 1 and ran.stderr.startswith("make gpu: no NVIDIA GPU was found (nvidia-smi does not run)")


def test_the_list_of_commands_and_a_wrong_name():
    ran = run("--arch", "80-real", "--list", "build", "bench")
    assert [line.split(":")[0] for line in ran.stdout.splitlines()] == ["build", "bench"]
    assert "cmake.define.CMAKE_CUDA_ARCHITECTURES=80-real" in ran.stdout and "--no-build-isolation" in ran.stdout
    assert "unknown stage benhc" in run("benhc").stderr
