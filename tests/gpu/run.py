"""`make gpu`: builds leetcore on a machine with an NVIDIA GPU and no network, tests it there and
measures it.

Stages run one after another, each for a limited time, even if an earlier stage failed. The commands
of a stage run at the same time. Logs are in build/gpu/logs, results in bench/results/gpu-NAME.json
and .md. The machine's own Python needs torch, numpy, nanobind, scikit-build-core, pytest, click and
rich; CMake, ninja and nvcc are needed too. This program imports only the standard library.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "gpu"
SITE, CMAKE, LOGS = BUILD / "site", BUILD / "cmake", BUILD / "logs"
RESULTS = ROOT / "bench" / "results"
BUDGET_S = 540.0  # of all stages; the benchmark gets the time that other stages leave
RESERVE_S = 15.0  # part of its stage in which the benchmark ends
TAIL = 25  # lines that are shown of a failed command's log


@dataclass(frozen=True)
class Stage:
    """Commands by name, a summary of their logs, and a pattern that a log contains if the stage
    passed.
    """

    name: str
    limit_s: float
    commands: Callable[[Machine, float], dict[str, list[str]]]
    note: Callable[[dict[str, str]], str]
    proof: str = ""


@dataclass
class Machine:
    """The machine that stages run on."""

    gpu: str
    architecture: str
    commit: str
    name: str
    methods: list[str] = field(default_factory=list)

    @property
    def output(self) -> Path:
        return RESULTS / f"gpu-{self.name}.json"


@dataclass
class Outcome:
    name: str
    result: str  # passed, FAILED, "out of time" or "not run"
    seconds: float
    note: str


# ---- the stages ----------------------------------------------------------------------------------


def build(machine: Machine, limit_s: float) -> dict[str, list[str]]:
    defines = {
        "LEETCORE_CUDA": "ON",
        "LEETCORE_GPU_TESTS": "ON",
        "CMAKE_CUDA_ARCHITECTURES": machine.architecture,
    }
    settings = [f"build-dir={CMAKE}", *(f"cmake.define.{name}={value}" for name, value in defines.items())]
    flags = ["--no-build-isolation", "--no-deps", "--no-index", "--upgrade", "--verbose", "--target", str(SITE)]
    given = [part for setting in settings for part in ("--config-settings", setting)]
    return {"pip": [sys.executable, "-m", "pip", "install", *flags, *given, str(ROOT)]}


def program(name: str) -> str:
    return str(CMAKE / "tests" / "gpu" / name)


def contract(machine: Machine, limit_s: float) -> dict[str, list[str]]:
    return {"contract": [program("contract_gpu")]}


def methods(machine: Machine, limit_s: float) -> dict[str, list[str]]:
    """One process per method, as a method that breaks the context would break the others too."""
    return {method: [program("gpu_method_test"), method] for method in machine.methods}


def test(machine: Machine, limit_s: float) -> dict[str, list[str]]:
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu and not slow"]
    workers = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    return {"pytest": [*pytest, *workers, str(ROOT / "tests" / "test_gpu.py")]}


def sanitizer(machine: Machine, limit_s: float) -> dict[str, list[str]]:
    tools = {tool: ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"] for tool in ("memcheck", "racecheck")}
    return {
        f"{tool}-{method}": [*command, program("gpu_method_test"), "--small", method]
        for tool, command in tools.items()
        for method in machine.methods
    }


def bench(machine: Machine, limit_s: float) -> dict[str, list[str]]:
    options = ["-o", str(machine.output), f"--time-limit={max(limit_s - RESERVE_S, 1):.0f}"]
    commit = ["--commit", machine.commit] if machine.commit else []
    return {"bench": [sys.executable, str(ROOT / "bench" / "gpu.py"), *options, *commit]}


def last_line(logs: dict[str, str]) -> str:
    lines = [line for log in logs.values() for line in log.strip().splitlines()]
    return lines[-1].strip() if lines else ""


def counted(logs: dict[str, str]) -> str:
    """The counts of gpu_method_test and of compute-sanitizer."""
    calls = [tuple(map(int, m)) for log in logs.values() for m in re.findall(r"(\d+) calls served, (\d+) wrong", log)]
    said = [f"{sum(served for served, _ in calls)} calls, {sum(wrong for _, wrong in calls)} wrong"]
    errors = [int(n) for log in logs.values() for n in re.findall(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (\d+)", log)]
    if errors:
        said.append(f"{sum(errors)} errors in {len(errors)} programs under compute-sanitizer")
    return ", ".join(said)


def measured(logs: dict[str, str]) -> str:
    """The number of goals that were met, missed or not measured."""
    verdicts = re.findall(r"\| (met|MISSED|not measured) \|$", "\n".join(logs.values()), re.M)
    return ", ".join(f"{verdicts.count(v)} goals {v}" for v in ("met", "MISSED", "not measured") if v in verdicts)


STAGES = (  # their limits add up to BUDGET_S
    Stage("build", 200, build, lambda logs: ""),
    Stage("contract", 15, contract, last_line),
    Stage("methods", 40, methods, counted),
    Stage("test", 90, test, last_line, r"\b[1-9]\d* passed"),  # pytest passes even if all tests are skipped
    Stage("sanitizer", 75, sanitizer, counted),
    Stage("bench", 120, bench, measured),
)

# ---- running them --------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """PATH with the toolkit's usual folder, the package that was built, and the cuFFT of torch."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    found = (file for folder in sys.path for file in Path(folder).glob("nvidia/*/lib/libcufft.so.*"))
    cufft = os.environ.get("LEETCORE_CUFFT") or next(map(str, found), "")
    set_here = {"PATH": path, "PYTHONPATH": str(SITE), "PYTHONUNBUFFERED": "1"}
    return os.environ | set_here | ({"LEETCORE_CUFFT": cufft} if cufft else {})


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a command and its children, after a moment in which they may write results."""
    for sent in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sent)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(3)


def run(stage: Stage, machine: Machine, limit_s: float) -> Outcome:
    """Runs one stage, in `limit_s` seconds."""
    start = time.monotonic()
    if limit_s < 1:
        return Outcome(stage.name, "not run", 0.0, "no time was left")
    LOGS.mkdir(parents=True, exist_ok=True)
    commands = stage.commands(machine, limit_s)
    files = {name: LOGS / f"{stage.name}-{name}.log" for name in commands}
    running: dict[str, subprocess.Popen[bytes]] = {}
    failed: dict[str, str] = {}
    for name, command in commands.items():
        with files[name].open("wb") as log:
            try:
                running[name] = subprocess.Popen(
                    command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment(), start_new_session=True
                )
            except OSError as error:
                log.write(f"{command[0]}: {error.strerror}\n".encode())
                failed[name] = "could not be started"
    late = False
    try:
        for name, process in running.items():
            try:
                code = process.wait(max(0.0, start + limit_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                late = True
                failed[name] = f"was stopped after {limit_s:.0f} s"
                stop(process)
            else:
                if code:
                    failed[name] = f"exit status {code}"
    finally:
        for process in running.values():
            if process.poll() is None:
                stop(process)
    logs = {name: file.read_text(errors="replace") for name, file in files.items()}
    if not failed and not re.search(stage.proof, "\n".join(logs.values())):
        failed = dict.fromkeys(logs, "tested nothing")
    for name, why in failed.items():
        print(f"-- {stage.name} {name}: {why}; the end of {files[name].relative_to(ROOT)}:")
        print("\n".join(logs[name].splitlines()[-TAIL:]), flush=True)
    result = "out of time" if late else "FAILED" if failed else "passed"
    note = "; ".join(filter(None, [stage.note(logs), *(f"{name} {why}" for name, why in failed.items())]))
    return Outcome(stage.name, result, time.monotonic() - start, note.replace(f"{ROOT}/", ""))


def run_all(stages: Sequence[Stage], machine: Machine, budget_s: float) -> list[Outcome]:
    """Runs all stages, even if one fails. The last stage gets all the time that is left."""
    deadline, outcomes = time.monotonic() + budget_s, []
    for stage in stages:
        left = deadline - time.monotonic()
        limit_s = left if stage is stages[-1] else min(left, stage.limit_s * budget_s / BUDGET_S)
        print(f"== {stage.name} ({limit_s:.0f} s at most)", flush=True)
        outcomes.append(run(stage, machine, limit_s))
    return outcomes


# ---- results -------------------------------------------------------------------------------------


def summary(outcomes: list[Outcome]) -> str:
    lines = [f"{o.name:10} {o.result:12} {o.seconds:5.0f} s  {o.note}".rstrip() for o in outcomes]
    good = sum(o.result == "passed" for o in outcomes)
    return "\n".join([*lines, f"stages: {good} passed, {len(outcomes) - good} failed"])


def record(outcomes: list[Outcome], machine: Machine, since: float) -> str:
    """Adds the stages to the results that the benchmark wrote since `since`. Returns where they
    are.
    """
    output = machine.output
    if not output.exists() or output.stat().st_mtime < since:
        return "no results: the benchmark wrote none"
    results = json.loads(output.read_text())
    results["stages"] = [vars(o) for o in outcomes]
    output.write_text(json.dumps(results, indent=1) + "\n")
    subprocess.run([sys.executable, str(ROOT / "bench" / "gpu_report.py"), str(output)], env=environment(), check=True)
    return f"results: {output.relative_to(ROOT)} and {output.with_suffix('.md').name}"


def architecture_of(capability: str) -> str:
    """CMake's name of capability "9.0": with instructions that only this architecture has, if it
    has any.
    """
    number = capability.replace(".", "")
    return f"{number}a-real" if int(number) >= 90 else f"{number}-real"


def slug(gpu: str) -> str:
    """The GPU's name as part of a file name: "NVIDIA H100 80GB HBM3" is h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower().removeprefix("nvidia ")).strip("-")


def query() -> tuple[str, str]:
    """Name and capability of the first GPU. Raises SystemExit with a reason without one."""
    command = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        sys.exit("make gpu: no NVIDIA GPU was found (nvidia-smi does not run); --arch builds without one")
    if done.returncode or not done.stdout.strip():
        sys.exit(f"make gpu: no NVIDIA GPU was found: {done.stdout.strip() or done.stderr.strip()}")
    name, _, capability = done.stdout.strip().splitlines()[0].rpartition(",")
    return name.strip(), capability.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    names = [stage.name for stage in STAGES]
    parser.add_argument(
        "stages", nargs="*", metavar="STAGE", help=f"stages to run, of {', '.join(names)} (default: all)"
    )
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for all stages (default: %(default)g)")
    parser.add_argument("--arch", default="", help="CUDA architectures, as in CMake (default: that of the first GPU)")
    parser.add_argument("--name", default="", help="name of the results (default: from the GPU's name)")
    parser.add_argument("--commit", default="", help="commit of the working tree, written to the results")
    parser.add_argument("--list", action="store_true", help="print the commands without running them")
    given = parser.parse_args()
    if unknown := sorted(set(given.stages) - set(names)):
        parser.error(f"unknown stage {', '.join(unknown)}; there are {', '.join(names)}")

    gpu, capability = ("", "") if given.arch else query()
    architecture = given.arch or architecture_of(capability)
    rows = re.findall(r"^CUDA\((\w+)\)", (ROOT / "cpp" / "methods.def").read_text(), re.M)
    machine = Machine(gpu, architecture, given.commit, given.name or slug(gpu) or "gpu", rows)
    stages = [stage for stage in STAGES if not given.stages or stage.name in given.stages]
    if given.list:
        for stage in stages:
            for command in stage.commands(machine, stage.limit_s).values():
                print(f"{stage.name}: {' '.join(command)}")
        return
    missing = [tool for tool in ("cmake", "ninja", "nvcc") if not shutil.which(tool, path=environment()["PATH"])]
    if missing:
        print(f"make gpu: not found on PATH: {', '.join(missing)}", flush=True)
    print(f"{gpu or 'GPU not queried'}, CUDA architectures {architecture}", flush=True)
    since = time.time()
    outcomes = run_all(stages, machine, given.budget)
    where = record(outcomes, machine, since) if "bench" in (stage.name for stage in stages) else ""
    print(f"\n{summary(outcomes)}\n{where}".rstrip())
    sys.exit(any(o.result != "passed" for o in outcomes))


if __name__ == "__main__":
    main()
