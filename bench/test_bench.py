"""Tests of the CPU benchmark: oracle, gate, every rival in every configuration, and the arithmetic
of the goals."""

from __future__ import annotations

import math
from typing import Any

import goals
import lab
import leetcore
import pytest
import rivals
import torch
from lab import DecodeProblem, Problem, TrainingProblem
from leetcore import reference
from leetcore.bench import problems, session, timing
from leetcore.bench.problems import Shape
from leetcore.bench.results import complete, new
from leetcore.bench.session import Row
from rivals import minimax, torch_autograd

GAMMAS = ("1", "0.9", "0.5", "0.001", "0")


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("n", [1, 128, 300])
def test_the_oracle_in_chunks_is_the_recurrence(gamma: str, n: int) -> None:
    p = Problem(Shape(2, 3, n, 5, 7), torch.float32, gamma)
    given = [x.double().numpy() for x in (p.q, p.k, p.v)]
    expected = reference.linear_attention(*given, p.log_decay.numpy())
    actual = reference.in_chunks(p.q, p.k, p.v, p.log_decay, xp=torch)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, torch.from_numpy(e), rtol=1e-12, atol=1e-12)
    alike = reference.in_chunks(*given, p.log_decay.numpy())
    assert all(reference.error(a, e) <= 1e-13 for a, e in zip(alike, expected, strict=True))


def test_a_chunk_is_as_long_as_the_method_says() -> None:
    [idea] = [m.idea for m in leetcore.methods() if m.name == "chunk"]
    assert f"chunks of {lab.chunk_size()} tokens" in idea


@pytest.mark.parametrize("gated", [False, True])
def test_the_gradient_oracle_is_autograd_of_the_recurrence(gated: bool) -> None:
    s = Shape(2, 3, 300, 5, 7)
    p = TrainingProblem(s, torch.float32, "gates" if gated else "0.9")
    leaves = [getattr(p, name).double().requires_grad_() for name in ("q", "k", "v")]
    decay = p.log_decay.double() if gated else p.log_decay.double()[None, :, None].expand(2, 3, 300)
    leaves += [decay.requires_grad_()] if gated else []
    state, outputs = torch.zeros(2, 3, 5, 7, dtype=torch.float64), []
    q, k, v = leaves[:3]
    for t in range(s.N):
        state = decay[:, :, t, None, None].exp() * state + k[:, :, t, :, None] * v[:, :, t, None]
        outputs.append((q[:, :, t, None] @ state)[:, :, 0])
    o = torch.stack(outputs, 2)
    expected = [o.detach(), *torch.autograd.grad(o, leaves, p.d_o.double())]
    assert list(p.wanted) == ["o", "d_q", "d_k", "d_v", "d_log_decay"][: len(expected)]
    for a, e in zip(p.wanted.values(), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", ["alibi", "gates", "1", "0.5", "0"])
@pytest.mark.parametrize("shape", ["1,4,512,16,16", "2,3,300,16,24", "1,2,20,8,8"])
@pytest.mark.parametrize("rival", rivals.ALL, ids=lambda r: r.name)
def test_every_variant_is_right(rival: Any, shape: str, decay: str, dtype: torch.dtype) -> None:
    p = Problem(Shape.parse(shape), dtype, decay)
    # A rival that keeps 16-bit intermediates may be a little worse than the gate allows.
    limit = problems.TOLERANCE[p.dtype_name][0] * (1 if dtype == torch.float32 else 3)
    for name, factory in rival.forward(p, False).items():
        call = factory()
        for repeat in range(2):  # buffers are reused: the second call must not see the first
            assert p.judge(call)[0] <= limit, (name, repeat)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "decay"),
    [("1,4,512,16,16", "alibi"), *(("2,3,256,16,24", decay) for decay in ("alibi", "gates", "1", "0.5", "0"))],
)
def test_every_training_variant_is_right(shape: str, decay: str, dtype: torch.dtype) -> None:
    p = TrainingProblem(Shape.parse(shape), dtype, decay)
    for name, factory in torch_autograd.training(p).items():
        results = factory()()
        assert list(results) == list(p.wanted)
        for what, x in results.items():
            limit = p.tolerance(what) * (1 if dtype == torch.float32 else 3)
            assert lab.relative_error(x, p.wanted[what]) <= limit, (name, what)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rival", rivals.ALL, ids=lambda r: r.name)
def test_every_decode_variant_is_right(rival: Any, dtype: torch.dtype) -> None:
    p = DecodeProblem(Shape(3, 4, 1, 16, 24), dtype)
    for name, factory in rival.decode(p, False).items():
        assert p.judge(factory())[1], name


class OpenGate(torch.nn.Module):
    """An output gate whose sigmoid is 1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.full_like(x[..., : x.shape[-1] // 3], math.inf)


def test_minimax_is_the_module_of_transformers() -> None:
    """With identity projections, its norm and gate switched off, the module computes the core
    alone."""
    pytest.importorskip("transformers")
    from transformers.models.minimax.configuration_minimax import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    heads, dim, n = 4, 16, 600
    config = MiniMaxConfig(
        hidden_size=3 * heads * dim,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=dim,
        num_hidden_layers=2,
        block_size=minimax.BLOCK,
        hidden_act="linear",
        layer_types=["linear_attention", "linear_attention"],
    )
    module: Any = MiniMaxLightningAttention(config, layer_idx=0)
    module.qkv_proj = module.norm = module.out_proj = torch.nn.Identity()
    module.output_gate = OpenGate()
    q, k, v = torch.randn(3, 2, heads, n, dim)
    packed = torch.cat([q, k, v], dim=3).transpose(1, 2).reshape(2, n, 3 * heads * dim)
    with torch.inference_mode():
        expected, expected_state = module(packed, position_embeddings=None, attention_mask=None)
    o, state = minimax.Core(module.slope_rate.flatten(), torch.float32).prefill(q, k, v)
    assert torch.equal(o, expected.view(2, n, heads, dim).transpose(1, 2))
    assert torch.equal(state, expected_state)


@pytest.mark.parametrize(("factor", "status"), [(1.0, "ok"), (1.0001, "wrong"), (math.nan, "wrong")])
def test_the_gate_refuses_wrong_answers(factor: float, status: str) -> None:
    p = Problem(Shape(1, 2, 50, 8, 8), torch.float32)
    row = Row("x", "leetcore", p.shape, "float32", "alibi", "forward")
    assert session.gate(row, lambda: (factor * p.wanted).float(), p.judge).status == status
    assert (row.note == session.NOT_FINITE) == math.isnan(factor)
    timing.interleave([row], 2, lambda: 1.0, lambda: 1.0)
    assert len(row.seconds) == (2 if status == "ok" else 0)
    assert (row.to_json()["wrong_seconds"] is None) == (status == "ok")


def test_a_rival_that_raises_is_left_out() -> None:
    def broken() -> Any:
        raise MemoryError("too large")

    p = Problem(Shape(1, 2, 50, 8, 8), torch.float32)
    rows = [Row("torch", "rival", p.shape, "float32", "alibi", note=note) for note in ("broken", "fine")]
    kept, failed = session.tune(zip(rows, (broken, lambda: lambda: p.wanted), strict=True), p.judge)
    assert [row.note for row in kept] == ["fine"]
    assert [row.status for row in failed] == ["failed: MemoryError: too large"]


def sampled(section: str, shape: str, work: float, seconds: float, method: str = "chunk") -> dict[str, Any]:
    kind = "rival" if method.startswith("torch") else "leetcore"
    row = Row(method, kind, Shape.parse(shape), "float32", "alibi", section, work=work, dense_work=work)
    row.seconds, row.ceilings, row.copy = [seconds] * 3, [1e9] * 3, [1.0] * 3
    return complete(row.to_json())


def results_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    rate = {"median": 1e9, "p10": 1e9, "p90": 1e9, "n": 3}
    return new("cpu", rows=rows, ceilings={"best": "torch", "matmul": {"torch": rate}, "copy": rate})


@pytest.mark.parametrize(("power", "slope"), [(1.0, 1.0), (2.0, 2.0)])
def test_growth_fit(power: float, slope: float) -> None:
    # A file keeps six digits, with which the times and the rates at these lengths are exact.
    rows = [sampled("growth", f"1,8,{n},64,64", n, 1e-9 * n**power) for n in (500, 1000, 2000)]
    fitted, deviation = goals.slope_and_deviation(rows, results_of(rows))
    assert fitted == pytest.approx(slope)
    assert deviation == pytest.approx(0 if power == 1 else 1, abs=1e-9)


def test_odd_rate_is_held_against_the_line_between_neighbours() -> None:
    rows = {
        s: sampled("odd", s, 1.0, 1e-9 / rate) for s, rate in {"1,8,2048,64,64": 0.6, "1,8,2048,128,128": 0.8}.items()
    }
    row = sampled("odd", "1,8,2048,80,80", 1.0, 1.0) | {"peers": list(rows)}
    assert goals.expected_rate(row, rows) == pytest.approx(0.65)


def test_ratio_is_to_the_fastest_torch_of_the_same_problem() -> None:
    ours = sampled("forward", "1,8,512,64,64", 1.0, 2.0)
    others = [sampled("forward", "1,8,512,64,64", 1.0, t, f"torch {t}") for t in (5.0, 4.0)]
    elsewhere = sampled("forward", "1,8,2048,64,64", 1.0, 1.0, "torch chunk")
    assert goals.ratio_to(results_of([ours, *others, elsewhere]), ours, "torch") == pytest.approx(0.5)
