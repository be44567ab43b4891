"""Training on the CPU, a forward and a backward pass: leetcore beside torch's autograd, in time and in peak memory.

    python bench/backward.py [B,H,N,K,V ...]

One process; the best few candidates of torch, found by two calls each, are sampled in turn with leetcore. Their results
are compared first. Peak memory is what one forward and backward pass adds to the inputs, in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import leetcore
import torch
from harness import Call, Shape, TrainingProblem, alibi, clock, relative_error
from leetcore.bench.machine import ENVIRONMENT, extra_memory, restart_undisturbed
from leetcore.bench.timing import stats
from ours import backward
from rivals import torch_autograd

SHAPES = ("1,8,2048,64,64", "1,32,1024,128,128", "1,8,8192,128,128")
FINALISTS, ROUNDS = 3, 7
PLAIN = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}  # freed memory goes back
OURS = {"leetcore": ["d_q", "d_k", "d_v"], "leetcore, d_log_decay too": ["d_q", "d_k", "d_v", "d_log_decay"]}


def problem(shape: str) -> TrainingProblem:
    s = Shape.parse(shape)
    return TrainingProblem(s, torch.float32, alibi(s.H))


def ours(p: TrainingProblem, wants: list[str]) -> Call:
    gradients = backward(p, wants)
    return lambda: {"o": leetcore.linear_attention(p.q, p.k, p.v, p.log_decay)} | gradients()


def measured_peak(shape: str, name: str) -> int:
    command = [sys.executable, __file__, "--peak", shape, name]
    return int(subprocess.run(command, stdout=subprocess.PIPE, check=True, env=PLAIN).stdout)


def peak(shape: str, name: str) -> None:
    """Prints by how many bytes one training step raises the peak of this process."""
    small = problem("1,1,256,8,8")  # threads, code and tables come first
    ours(small, OURS["leetcore"])(), torch_autograd.Training(small, 64, 1, "loop")()
    p = problem(shape)
    print(extra_memory(ours(p, OURS[name]) if name in OURS else torch_autograd.training(p)[name]()))


def compare(shape: str) -> None:
    p = problem(shape)
    calls = {name: ours(p, wants) for name, wants in OURS.items()}
    reference = calls["leetcore"]()
    tried: list[tuple[float, str, Call]] = []
    for name, factory in torch_autograd.training(p).items():
        call = factory()
        errors = [relative_error(x, reference[label].double()) for label, x in call().items()]
        if max(errors) > 2e-5:
            sys.exit(f"{name}: differs from leetcore by {max(errors):.1e}")
        tried = sorted([*tried, (min(clock(call), clock(call)), name, call)])[:FINALISTS]
    calls |= {name: call for _, name, call in tried}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for i in range(ROUNDS):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            call = calls[name]
            call()
            seconds[name].append(clock(call))
    medians = {name: stats(samples)["median"] for name, samples in seconds.items()}  # type: ignore[index]
    bytes_of = {name: measured_peak(shape, name) for name in calls}
    print(f"\n{shape} float32, {torch.get_num_threads()} threads")
    for name in calls:
        ms, mb = 1e3 * medians[name], bytes_of[name] / 1e6
        ratios = medians[name] / medians["leetcore"], bytes_of[name] / bytes_of["leetcore"]
        print(f"  {name:32} {ms:8.1f} ms {ratios[0]:5.2f}   {mb:8.1f} MB {ratios[1]:5.2f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        peak(*sys.argv[2:])
    else:
        restart_undisturbed()
        for shape in sys.argv[1:] or SHAPES:
            compare(shape)
