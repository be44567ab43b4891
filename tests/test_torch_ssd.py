"""leetcore.torch.ssd and ssd_step: gradients, tracing, compilation and autocast."""

import leetcore
import numpy as np
import pytest
import torch
import torch._dynamo.testing
from conftest import normal
from leetcore.torch import ssd, ssd_step
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

INF = float("inf")
FORMS = {
    "softplus": {"dt_softplus": True},
    "limits": {"dt_softplus": True, "dt_limit": (0.9, 1.5)},
    "plain": {},
}


def problem(B=2, N=9, H=4, P=3, G=2, K=5, dtype=torch.float64, rank_of_D=1, packed=0, wide=None):
    """Leaves that require gradients, by name. `wide` is the dtype of the parameters."""
    rng = np.random.default_rng([B, N, H, P, G, K])
    exact = torch.float64 if dtype is torch.float64 else torch.float32
    wide = wide or exact

    def tensor(shape, kind):
        return torch.from_numpy(normal(rng, shape, np.float64)).to(kind).requires_grad_()

    return {
        "x": tensor((B, N, H, P), dtype),
        "dt": (tensor((B, N, H), torch.float64).detach().abs() + 0.1).to(dtype).requires_grad_(),
        "A": (-tensor((H,), torch.float64).detach().abs() - 0.1).to(exact).requires_grad_(),
        "B": tensor((B, N, G, K), dtype),
        "C": tensor((B, N, G, K), dtype),
        "D": tensor((H, P)[:rank_of_D], wide),
        "z": tensor((B, N, H, P), dtype),
        "dt_bias": (tensor((H,), torch.float64).detach().abs() * 0.1).to(wide).requires_grad_(),
        "initial_state": tensor((packed or B, H, P, K), exact),
    }


def gradients(given, **options):
    y, state = ssd(**given, return_state=True, **options)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(r.shape, generator=generator, dtype=torch.float64) for r in (y, state)]
    loss = sum((w * r).sum() for w, r in zip(weights, (y, state), strict=True))
    return torch.autograd.grad(loss, list(given.values()))


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_they_are_the_functions_of_leetcore(dtype):
    given = {name: x.detach() for name, x in problem(N=70, dtype=dtype).items()}
    options = {"dt_softplus": True, "return_state": True}
    for got, want in zip(ssd(**given, **options), leetcore.ssd(**given, **options), strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)
    state = given.pop("initial_state")
    one = {name: x[:, 0] if x.ndim > 2 else x for name, x in given.items()}
    states = state.clone(), state.clone()
    got, want = ssd_step(**one, state=states[0]), leetcore.ssd_step(**one, state=states[1])
    assert torch.equal(got, want) and torch.equal(*states) and not torch.equal(states[0], state)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank_of_D", [1, 2])
def test_gradcheck(form, rank_of_D):
    given = problem(rank_of_D=rank_of_D)
    names = list(given)

    def call(*tensors):
        return ssd(**dict(zip(names, tensors, strict=True)), return_state=True, **FORMS[form])

    assert torch.autograd.gradcheck(call, tuple(given.values()), fast_mode=True)


@pytest.mark.parametrize("absent", ["D", "z", "dt_bias", "initial_state", "y", "state"])
def test_gradcheck_without_a_part(absent):
    given = problem(N=70, P=2, K=3)
    given.pop(absent, None)
    names = list(given)

    def call(*tensors):
        y, state = ssd(**dict(zip(names, tensors, strict=True)), return_state=True, dt_softplus=True)
        return state if absent == "y" else y if absent == "state" else (y, state)

    assert torch.autograd.gradcheck(call, tuple(given.values()), fast_mode=True)


def test_gradcheck_of_packed_sequences():
    given = problem(B=1, N=12, packed=3)
    names, starts = list(given), torch.tensor([0, 5, 5, 12])

    def call(*tensors):
        return ssd(**dict(zip(names, tensors, strict=True)), return_state=True, dt_softplus=True, cu_seqlens=starts)

    assert torch.autograd.gradcheck(call, tuple(given.values()), fast_mode=True)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_each_dtype(dtype, tolerance, form):
    sizes = {"N": 200, "H": 6, "P": 24, "G": 1, "K": 16}
    given = problem(dtype=dtype, **sizes)
    exact = {name: x.detach().double().requires_grad_() for name, x in given.items()}
    for name, got, want in zip(given, gradients(given, **FORMS[form]), gradients(exact, **FORMS[form]), strict=True):
        assert got.dtype == given[name].dtype and relative(got, want) <= tolerance, name


def test_some_of_the_gradients():
    whole = problem(N=70)
    want = dict(zip(whole, gradients(whole, dt_softplus=True), strict=True))
    for name in whole:
        some = {other: x.detach().requires_grad_(other == name) for other, x in whole.items()}
        y, state = ssd(**some, return_state=True, dt_softplus=True)
        generator = torch.Generator().manual_seed(0)
        loss = sum((torch.randn(r.shape, generator=generator, dtype=torch.float64) * r).sum() for r in (y, state))
        (got,) = torch.autograd.grad(loss, some[name])
        assert relative(got, want[name]) <= 1e-13, name


def test_a_length_of_zero_has_a_gradient():
    given = problem(N=70)
    given["dt_bias"] = torch.zeros(4, dtype=torch.float64)
    with torch.no_grad():
        given["dt"][:, ::3] = 0
    eps = 1e-6
    given["dt"].requires_grad_()

    def loss(dt):
        return ssd(**(given | {"dt": dt})).sum()

    (got,) = torch.autograd.grad(loss(given["dt"]), given["dt"])
    moved = given["dt"].detach().clone()
    moved[1, 3, 2] += eps
    assert abs((loss(moved) - loss(given["dt"])).item() / eps - got[1, 3, 2].item()) < 1e-4
    assert got[1, 3, 2] != 0


def test_there_are_no_second_derivatives():
    given = problem()
    (d_x,) = torch.autograd.grad(ssd(**given).sum(), given["x"], create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        d_x.sum().backward()


def test_forward_mode_is_refused():
    given = {name: x.detach() for name, x in problem().items()}
    with forward_ad.dual_level():
        given["x"] = forward_ad.make_dual(given["x"], given["x"])
        with pytest.raises(NotImplementedError, match="no forward mode"):
            ssd(**given)


# ---- torch's transforms


def test_opcheck():
    given = problem(N=5)
    inputs = (*given.values(), None, True, 0.0, 0.0, True)
    torch.library.opcheck(torch.ops.leetcore.ssd.default, inputs)
    detached = tuple(x.detach() for x in given.values())
    backward = (*detached, None, torch.randn_like(given["x"]), None, True, 0.0, 0.0, [True] * 9)
    torch.library.opcheck(torch.ops.leetcore.ssd_backward.default, backward)
    one = [x[:, 0] if x.ndim > 2 else x for x in detached[:8]]
    step = (*one[:5], detached[8].clone(), *one[5:], None, True, 0.0, 0.0)
    torch.library.opcheck(torch.ops.leetcore.ssd_step.default, step)


def test_compile_keeps_the_graph_and_does_not_recompile_for_lengths():
    counter = torch._dynamo.testing.CompileCounter()

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def layer(given):
        return ssd(**given, dt_softplus=True, return_state=True)

    for N in (6, 9, 70):
        given = problem(N=N)
        for got, want in zip(layer(given), ssd(**given, dt_softplus=True, return_state=True), strict=True):
            assert torch.equal(got, want)
    assert counter.frame_count == 1


def test_a_compiled_step_updates_its_state():
    given = {name: x.detach() for name, x in problem().items()}
    state = given.pop("initial_state")
    one = {name: x[:, 0] if x.ndim > 2 else x for name, x in given.items()}
    states = state.clone(), state.clone()
    step = torch.compile(lambda state: ssd_step(**one, state=state), backend="aot_eager", fullgraph=True)
    assert torch.equal(step(states[0]), ssd_step(**one, state=states[1])) and torch.equal(*states)


def test_autocast():
    given = {name: x.detach() for name, x in problem(N=70, dtype=torch.float32).items()}
    with torch.autocast("cpu", torch.bfloat16):
        y, state = ssd(**given, return_state=True, dt_softplus=True)
    short = {name: x.bfloat16() if name in ("x", "B", "C", "z") else x for name, x in given.items()}
    want, want_state = ssd(**short, return_state=True, dt_softplus=True)
    assert y.dtype is torch.bfloat16 and torch.equal(y, want)
    assert state.dtype is torch.float32 and torch.equal(state, want_state)


def test_16_bit_parameters():
    given = problem(N=70, dtype=torch.bfloat16, wide=torch.bfloat16)
    given["A"] = given["A"].detach().bfloat16().requires_grad_()
    for name, got in zip(given, gradients(given, dt_softplus=True), strict=True):
        assert got.dtype is given[name].dtype and got.isfinite().all(), name


def test_flop_are_counted():
    given = problem(B=1, N=64, H=2, P=8, G=1, K=16, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        ssd(**given).sum().backward()
    per_token = 65 * (16 + 8) + 4 * 16 * 8
    assert counter.get_total_flops() == 64 * 2 * (per_token + 65 * (3 * 16 + 2 * 8) + 10 * 16 * 8)


# ---- refusals


def test_vmap_is_refused():
    given = {name: x.detach() for name, x in problem().items()}
    batch = torch.stack([given["x"], given["x"]])
    with pytest.raises(NotImplementedError, match=r"ssd: expected no torch\.vmap; use its batch"):
        torch.vmap(lambda x: ssd(**(given | {"x": x})))(batch)


def test_a_step_with_gradients_is_refused():
    given = problem()
    state = given.pop("initial_state").detach()
    one = {name: x[:, 0] if x.ndim > 2 else x for name, x in given.items()}
    with pytest.raises(NotImplementedError, match=r"ssd_step has no gradient.* ssd with initial_state"):
        ssd_step(**one, state=state)
    with torch.no_grad():
        ssd_step(**one, state=state)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"x": np.zeros((2, 9, 4, 3))}, r"x: expected a torch\.Tensor, got ndarray"),
        ({"D": "no"}, r"D: expected a torch\.Tensor, got str"),
        ({"dt_limit": (2, 1)}, r"dt_limit: expected 0 <= least <= greatest"),
        ({"method": "none"}, r"method: unknown method 'none'"),
        ({"B": torch.zeros(2, 9, 2, 5)}, r"B: expected dtype float64 like C, got float32"),
        ({"z": torch.zeros(2, 9, 4, 3, device="meta")}, r"x: expected on one device with the other arguments"),
    ],
)
def test_wrong_arguments_are_named(change, text):
    given = {name: x.detach() for name, x in problem().items()}
    with pytest.raises((TypeError, ValueError), match=text):
        ssd(**(given | change))
