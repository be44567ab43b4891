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
from harness import Call, Problem, Shape, alibi, clock, relative_error
from leetcore.bench.machine import ENVIRONMENT, extra_memory, restart_undisturbed
from leetcore.bench.timing import stats
from rivals import torch_autograd

SHAPES = ("1,8,2048,64,64", "1,32,1024,128,128", "1,8,8192,128,128")
FINALISTS, ROUNDS = 3, 7
PLAIN = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}  # freed memory goes back
OURS = {"leetcore": ["d_q", "d_k", "d_v"], "leetcore, d_log_decay too": ["d_q", "d_k", "d_v", "d_log_decay"]}


def problem(shape: str) -> tuple[Problem, torch.Tensor]:
    s = Shape.parse(shape)
    p = Problem(s, torch.float32, alibi(s.H))
    return p, torch.randn(p.v.shape, generator=torch.Generator().manual_seed(1))


def ours(p: Problem, d_o: torch.Tensor, wants: list[str]) -> Call:
    def call() -> list[torch.Tensor]:
        o = leetcore.linear_attention(p.q, p.k, p.v, p.log_decay)
        d = leetcore.linear_attention_backward(p.q, p.k, p.v, p.log_decay, d_o=d_o, wants=wants)
        return [o, d.d_q, d.d_k, d.d_v]

    return call


def measured_peak(shape: str, name: str) -> int:
    command = [sys.executable, __file__, "--peak", shape, name]
    return int(subprocess.run(command, stdout=subprocess.PIPE, check=True, env=PLAIN).stdout)


def peak(shape: str, name: str) -> None:
    """Prints by how many bytes one training step raises the peak of this process."""
    small, d_small = problem("1,1,256,8,8")  # threads, code and tables come first
    ours(small, d_small, OURS["leetcore"])(), torch_autograd.Training(small, d_small, 64, 1, "loop")()
    p, d_o = problem(shape)
    print(extra_memory(ours(p, d_o, OURS[name]) if name in OURS else torch_autograd.training(p, d_o)[name]()))


def compare(shape: str) -> None:
    p, d_o = problem(shape)
    calls = {name: ours(p, d_o, wants) for name, wants in OURS.items()}
    reference = calls["leetcore"]()
    tried: list[tuple[float, str, Call]] = []
    for name, factory in torch_autograd.training(p, d_o).items():
        call = factory()
        errors = [relative_error(x, y.double()) for x, y in zip(call(), reference, strict=True)]
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
