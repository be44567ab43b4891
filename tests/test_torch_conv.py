"""leetcore.torch.causal_conv1d: gradients, transforms, compilation, autocast, kernels of a GPU."""

import functools

import leetcore
import numpy as np
import pytest
import torch
import torch._dynamo.testing
from leetcore import reference
from leetcore.torch import causal_conv1d, causal_conv1d_step, composed
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

FORWARD = torch.ops.leetcore.causal_conv1d.default
BACKWARD = torch.ops.leetcore.causal_conv1d_backward.default
STEP = torch.ops.leetcore.causal_conv1d_step.default
NAMES = ("x", "weight", "bias", "initial_state")


def problem(B=2, D=5, N=9, W=4, L=3, dtype=torch.float64, channels=False, S=None):
    """Leaves that require gradients, by name."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "x": (B, N, D) if channels else (B, D, N),
        "weight": (D, W),
        "bias": (D,),
        "initial_state": (S or B, D, L),
    }
    given = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    if channels:
        given["x"] = given["x"].transpose(1, 2)
    return {name: a.to(dtype).requires_grad_() for name, a in given.items()}


def detached(given):
    return {name: a.detach() for name, a in given.items()}


def gradients(call, given):
    """The gradients of a random linear function of all results, by the tensors of `given`."""
    results = call(**given)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(0)
    loss = sum((torch.randn(a.shape, generator=generator, dtype=a.dtype) * a).sum() for a in results)
    return torch.autograd.grad(loss, [a for a in given.values() if a.requires_grad])


def definition(x, weight, bias, initial_state, silu=True):
    """The convolution by torch's own functions, in the layout of Mamba."""
    D, W = weight.shape
    inputs = torch.cat([initial_state, x], dim=2)
    u = torch.nn.functional.conv1d(inputs[:, :, initial_state.shape[2] - W + 1 :], weight[:, None], bias, groups=D)
    return torch.nn.functional.silu(u) if silu else u, inputs[:, :, x.shape[2] :]


@pytest.mark.parametrize("channels", [False, True], ids=["tokens", "channels"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_it_is_the_convolution_of_leetcore(dtype, channels):
    given = detached(problem(dtype=dtype, N=100, channels=channels))
    options = {"activation": "silu", "return_state": True}
    got, want = causal_conv1d(**given, **options), leetcore.causal_conv1d(**given, **options)
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(got, want, strict=True))
    assert got[0].stride() == given["x"].stride()


def test_it_is_the_convolution_of_torch():
    given = detached(problem(N=100, L=6))
    for silu in (False, True):
        got = causal_conv1d(**given, activation="silu" if silu else None, return_state=True)
        for a, b in zip(got, definition(**given, silu=silu), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", ["causal_conv1d", "causal_conv1d_backward", "causal_conv1d_step"])
def test_operators_have_kernels_for_both_devices_and_for_tracing(name):
    for key in ("CPU", "CUDA", "Autograd"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"leetcore::{name}", key)
    assert torch._library.simple_registry.singleton.find(f"leetcore::{name}").fake_impl.kernel is not None


# ---- gradients


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("channels", [False, True], ids=["tokens", "channels"])
@pytest.mark.parametrize("W, L, N", [(4, 3, 9), (2, 5, 3), (8, 7, 2)])
def test_gradcheck(W, L, N, channels, activation):
    given = problem(W=W, L=L, N=N, channels=channels)
    for return_state in (False, True):

        def call(*tensors, return_state=return_state):
            named = dict(zip(given, tensors, strict=True))
            return causal_conv1d(**named, activation=activation, return_state=return_state)

        assert torch.autograd.gradcheck(call, tuple(given.values()), fast_mode=True)


def test_gradcheck_of_packed_sequences():
    given, cu_seqlens = problem(B=1, N=12, S=3), torch.tensor([0, 4, 4, 12])

    def call(*tensors):
        named = dict(zip(given, tensors, strict=True))
        return causal_conv1d(**named, cu_seqlens=cu_seqlens, activation="silu", return_state=True)

    assert torch.autograd.gradcheck(call, tuple(given.values()), fast_mode=True)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 4e-3)])
def test_gradients_against_autograd_of_torch(dtype, tolerance):
    given = problem(N=150, dtype=dtype)
    exact = {name: a.detach().double().requires_grad_() for name, a in given.items()}
    generator = torch.Generator().manual_seed(0)  # the numbers that `gradients` takes
    results = definition(**exact)
    weights = [torch.randn(a.shape, generator=generator, dtype=dtype).double() for a in results]
    want = torch.autograd.grad(results, list(exact.values()), weights)
    got = gradients(functools.partial(causal_conv1d, activation="silu", return_state=True), given)
    for name, d, expected in zip(NAMES, got, want, strict=True):
        assert d.dtype == given[name].dtype
        assert reference.error(d.double().numpy(), expected.numpy()) <= tolerance, name


def test_any_subset_may_require_gradients():
    given = problem()
    every = dict(zip(NAMES, gradients(causal_conv1d, given), strict=True))
    for name in NAMES:
        some = {n: a.detach().requires_grad_(n == name) for n, a in given.items()}
        assert torch.equal(gradients(causal_conv1d, some)[0], every[name])
    plain = {name: given[name] for name in ("x", "weight")}
    assert len(gradients(causal_conv1d, plain)) == 2


def test_results_that_no_loss_uses():
    given = problem()
    y, state = causal_conv1d(**given, return_state=True)
    alone = torch.autograd.grad(causal_conv1d(**given).sum(), list(given.values()))
    for got, want in zip(torch.autograd.grad(y.sum(), list(given.values()), retain_graph=True), alone, strict=True):
        assert torch.equal(got, want)
    d_x, d_weight = torch.autograd.grad(state.sum(), [given["x"], given["weight"]])
    assert torch.equal(d_x[:, :, -3:], torch.ones(2, 5, 3).double()) and not d_weight.any()


def test_second_derivatives_and_forward_mode_are_refused():
    given = problem()
    (first,) = torch.autograd.grad(causal_conv1d(**given).square().sum(), [given["x"]], create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        first.sum().backward()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="has no forward mode"):
        causal_conv1d(**{**given, "x": forward_ad.make_dual(given["x"].detach(), given["x"].detach())})


# ---- torch.vmap and torch.func


@pytest.mark.parametrize("batched", [("x",), ("weight",), ("x", "weight", "bias", "initial_state"), ("initial_state",)])
def test_vmap_is_a_loop(batched):
    given = detached(problem(channels=True))
    stacked = {name: torch.stack([given[name], -given[name], 2 * given[name]], dim=1) for name in batched}

    def call(*tensors):
        return causal_conv1d(**given | dict(zip(batched, tensors, strict=True)), activation="silu", return_state=True)

    together = torch.vmap(call, in_dims=1)(*stacked.values())
    for i in range(3):
        for got, want in zip(together, call(*(a.select(1, i) for a in stacked.values())), strict=True):
            torch.testing.assert_close(got[i], want, rtol=1e-14, atol=1e-14)


def test_gradients_of_each_sample():
    given = detached(problem())
    xs = torch.stack([given["x"], 2 * given["x"], -given["x"]])
    rest = tuple(given.values())[1:]

    def loss(x, weight, bias, state):
        return causal_conv1d(x, weight, bias, initial_state=state, activation="silu").square().sum()

    together = torch.vmap(torch.func.grad(loss, (0, 1, 2, 3)), (0, None, None, None))(xs, *rest)
    for i, x in enumerate(xs):
        leaves = [a.clone().requires_grad_() for a in (x, *rest)]
        for got, want in zip(together, torch.autograd.grad(loss(*leaves), leaves), strict=True):
            torch.testing.assert_close(got[i], want, rtol=1e-12, atol=1e-12)


def test_what_vmap_refuses():
    given = detached(problem(B=1, S=2))
    bounds = torch.tensor([[0, 3, 9], [0, 5, 9]])
    shared = torch.vmap(lambda x: causal_conv1d(**{**given, "x": x}, cu_seqlens=bounds[0]))(given["x"][None])
    assert torch.equal(shared[0], causal_conv1d(**given, cu_seqlens=bounds[0]))
    with pytest.raises(NotImplementedError, match=r"^cu_seqlens: expected one for all calls under torch\.vmap"):
        torch.vmap(lambda c: causal_conv1d(**given, cu_seqlens=c))(bounds)
    with pytest.raises(NotImplementedError, match=r"causal_conv1d_step: expected no torch\.vmap"):
        torch.vmap(lambda x: causal_conv1d_step(x, torch.ones(2, 4), torch.zeros(1, 2, 3)))(torch.zeros(4, 1, 2))


# ---- the dispatcher


@pytest.mark.parametrize("channels", [False, True], ids=["tokens", "channels"])
def test_opcheck(channels):
    given = problem(channels=channels)
    torch.library.opcheck(FORWARD, (*given.values(), None, True, True))
    torch.library.opcheck(FORWARD, (given["x"], given["weight"]))
    plain = list(detached(given).values())
    torch.library.opcheck(BACKWARD, (*plain, None, torch.ones_like(plain[0]), None, True, [True, True, True, True]))
    torch.library.opcheck(BACKWARD, (*plain, None, None, torch.ones_like(plain[3]), False, [True, False, True, False]))
    state = torch.ones(3, 5, 4, dtype=torch.float64)
    torch.library.opcheck(STEP, (plain[0][:, :, 0], plain[1], state, plain[2], torch.tensor([2, 0]), True))
    torch.library.opcheck(STEP, (plain[0], plain[1], state))


def test_opcheck_of_packed_sequences():
    given = problem(B=1, S=2)
    torch.library.opcheck(FORWARD, (*given.values(), torch.tensor([0, 3, 9], dtype=torch.int32), True, True))


def model(x, weight, bias, state):
    y, state = causal_conv1d(x.transpose(1, 2), weight, bias, activation="silu", initial_state=state, return_state=True)
    return y.transpose(1, 2).sigmoid(), state


def compiled_and_eager(call, backend, lengths):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    for N in lengths:
        given = problem(D=24, N=N, dtype=torch.float32)
        tensors = {"x": torch.randn(2, N, 24, requires_grad=True), "weight": given["weight"], "bias": given["bias"]}
        tensors["state"] = given["initial_state"]
        for got, want in zip(gradients(compiled, tensors), gradients(call, tensors), strict=True):
            torch.testing.assert_close(got, want)
    return counter.frame_count


def test_compile_without_a_break_and_once_for_all_lengths():
    assert compiled_and_eager(model, "aot_eager", (7, 64, 100, 33, 200)) == 1


def test_compile_with_inductor():
    def alone(x, weight, bias, state):  # inductor has nothing to compile, which would take long
        return causal_conv1d(x.transpose(1, 2), weight, bias, activation="silu", initial_state=state)

    assert compiled_and_eager(alone, "inductor", (64, 100)) == 1


def test_compiled_steps_update_the_state():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *a: causal_conv1d_step(*a, activation="silu") + 1, fullgraph=True, backend="aot_eager"
    )
    weight, state = torch.randn(5, 4), torch.ones(2, 5, 3)
    expected = state.clone()
    for _ in range(3):
        x = torch.randn(2, 5)
        assert torch.equal(compiled(x, weight, state), causal_conv1d_step(x, weight, expected, activation="silu") + 1)
    assert torch.equal(state, expected)


def test_fx_traces_calls():
    def call(x, weight, state):
        y, after = causal_conv1d(x, weight, initial_state=state, return_state=True)
        return y, causal_conv1d_step(x[:, :, 0], weight, after)

    traced = torch.fx.symbolic_trace(call)
    for N in (9, 30):
        x, weight, state = torch.randn(2, 5, N), torch.randn(5, 4), torch.randn(2, 5, 3)
        for got, want in zip(traced(x, weight, state), call(x, weight, state), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(compiled):
    torch._dynamo.reset()
    given = problem(dtype=torch.float32)
    call = torch.compile(causal_conv1d, fullgraph=True, backend="aot_eager") if compiled else causal_conv1d
    with torch.autocast("cpu", torch.bfloat16):
        y, state = call(**{**given, "bias": given["bias"].half()}, return_state=True)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    (y.float().sum() + state.sum()).backward()
    assert all(a.grad.dtype == torch.float32 and a.grad.any() for a in given.values())


def test_autocast_of_steps_and_of_float64():
    x, weight, state = torch.randn(2, 5), torch.randn(5, 4), torch.zeros(2, 5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert causal_conv1d_step(x, weight, state).dtype == torch.bfloat16
        assert causal_conv1d(**detached(problem())).dtype == torch.float64
    assert torch.equal(state[:, :, -1], x.bfloat16().float())


def test_flop():
    given = problem()
    with FlopCounterMode(display=False) as counter:
        y = causal_conv1d(**given)
    assert counter.get_total_flops() == 2 * 4 * 2 * 5 * 9
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 4 * 4 * 2 * 5 * 9


def test_shapes_are_known_without_memory():
    given = {name: a.detach().to("meta") for name, a in problem(channels=True, L=6).items()}
    y, state = causal_conv1d(**given, return_state=True)
    assert (y.device.type, y.shape, y.stride(), state.shape) == ("meta", (2, 5, 9), (45, 1, 5), (2, 5, 6))


# ---- steps


def test_a_step_is_that_of_leetcore():
    given = detached(problem(N=1))
    pool = torch.randn(4, 5, 3, dtype=torch.float64)
    options = {"weight": given["weight"], "bias": given["bias"], "activation": "silu"}
    for x, indices in [(given["x"], torch.tensor([3, 1])), (given["x"][:, :, 0], None)]:
        expected, before = pool.clone(), pool._version
        y = causal_conv1d_step(x, state=pool, state_indices=indices, **options)
        assert torch.equal(y, leetcore.causal_conv1d_step(x, state=expected, state_indices=indices, **options))
        assert torch.equal(pool, expected) and pool._version > before


def test_steps_in_grad_mode_have_gradients():
    """They are those of one call, as the states that a step leaves carry gradients too."""
    given = problem(N=6)
    x, weight, _, initial_state = given.values()

    def steps(x, weight, bias, initial_state):
        state = initial_state.clone()
        parts = [causal_conv1d_step(x[:, :, t], weight, state, bias, activation="silu")[:, :, None] for t in range(5)]
        parts.append(causal_conv1d_step(x[:, :, 5:], weight, state, bias, activation="silu"))
        return torch.cat(parts, 2), state

    whole = functools.partial(causal_conv1d, activation="silu", return_state=True)
    for got, want in zip(steps(**given), whole(**given), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)
    for got, want in zip(gradients(steps, given), gradients(whole, given), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    with pytest.raises(NotImplementedError, match=r"^state_indices: expected None where an argument requires"):
        causal_conv1d_step(x[:, :, 0], weight, initial_state.detach(), state_indices=torch.tensor([1, 0]))
    with pytest.raises(NotImplementedError, match=r"causal_conv1d_step has no gradient"):
        STEP(x[:, :, 0], weight, initial_state.detach())
    with torch.no_grad():
        assert causal_conv1d_step(x[:, :, 0], weight, initial_state).any()


# ---- the kernels of a GPU, on tensors of the CPU


@pytest.mark.parametrize("channels", [False, True], ids=["tokens", "channels"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_the_composed_convolution_agrees(dtype, tolerance, channels):
    cases = [(problem(N=20, L=5, dtype=dtype, channels=channels), None)]
    cases.append((problem(B=1, S=3, N=20, dtype=dtype, channels=channels), torch.tensor([0, 7, 7, 20])))
    for given, cu_seqlens in cases:
        given = detached(given)
        for silu, state in [(True, given["initial_state"]), (False, None)]:
            inputs = (given["x"], given["weight"], given["bias"], state, cu_seqlens)
            results = composed.forward(*inputs, silu), FORWARD(*inputs, silu, True)
            d_y, d_state = torch.randn_like(results[0][0]), torch.randn_like(results[0][1])
            results = [
                (*found, *backward)
                for found, backward in zip(
                    results,
                    (
                        composed.backward(*inputs, d_y, d_state, silu),
                        BACKWARD(*inputs, d_y, d_state, silu, [True, True, True, True]),
                    ),
                    strict=True,
                )
            ]
            for got, want in zip(*results, strict=True):
                assert got.dtype == want.dtype and got.stride() == want.stride()
                assert reference.error(got.double().numpy(), want.double().numpy()) <= tolerance


@pytest.mark.parametrize("indices", [None, [3, -1, 0], [-1, -1, -1], [-1, 0, 2]])
def test_the_composed_step_agrees(indices):
    weight, bias = torch.randn(5, 4), torch.randn(5)
    indices = None if indices is None else torch.tensor(indices)
    for x in (torch.randn(3, 5), torch.randn(3, 2, 5).transpose(1, 2)):
        pool = torch.randn(4, 5, 4)
        expected = pool.clone()
        got = composed.step(x, weight, pool, bias, indices, True)
        want = causal_conv1d_step(x, weight, expected, bias, activation="silu", state_indices=indices)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        assert torch.equal(pool, expected) and got.stride() == want.stride()


# ---- refusals

REFUSED = {
    "not a tensor": ({"x": np.zeros((2, 5, 9))}, TypeError, "^x: expected a torch.Tensor, got ndarray"),
    "dtype": (
        {"weight": torch.zeros(5, 4)},
        TypeError,
        "^weight: expected dtype float64 with .*, got float32",
    ),
    "rank": ({"x": torch.zeros(5, 9).double()}, ValueError, r"^x: expected shape \[B, D, N\], got \[5, 9\]"),
    "taps": ({"weight": torch.zeros(5, 1, 4).double()}, ValueError, r"^weight: expected shape \[5, W\]"),
    "activation": ({"activation": "gelu"}, ValueError, "^activation: expected None, 'silu' or .*, got 'gelu'"),
    "devices": ({"weight": torch.zeros(5, 4, device="meta")}, ValueError, "^x: expected on one device .* cpu and meta"),
    "sparse": ({"x": torch.zeros(2, 5, 9).double().to_sparse()}, NotImplementedError, "SparseCPU"),
}


@pytest.mark.parametrize("change, error, text", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("grad", [False, True], ids=["plain", "grad"])
def test_refusals(change, error, text, grad):
    given = problem() if grad else detached(problem())
    with pytest.raises(error, match=text):
        causal_conv1d(**{**given, **change})
