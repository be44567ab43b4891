"""leetcore.torch: the operators with gradients, transforms, compilation, tracing and autocast.

One file: the parts of torch are tested on the same three operators and inputs.
"""

import functools
import importlib
import itertools
import subprocess
import sys
import types

import leetcore
import leetcore.torch
import numpy as np
import pytest
import torch
import torch._dynamo.testing
from conftest import normal
from leetcore import reference
from leetcore.torch import autograd, decode_step, linear_attention, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

FORWARD = torch.ops.leetcore.linear_attention.default
BACKWARD = torch.ops.leetcore.linear_attention_backward.default
DECODE = torch.ops.leetcore.decode_step.default
NAMES = ("q", "k", "v", "log_decay", "initial_state")
DECAYS = {"none": None, "one": (), "head": ("H",), "sequence": ("B", "H"), "token": ("B", "H", "N")}


def problem(B=2, H=3, N=7, K=4, V=5, dtype=torch.float64, decay="head", state=True, Hq=None, Hv=None, S=None):
    """Leaves that require gradients, by name; S sequences are packed if given."""
    rng = np.random.default_rng(0)
    exact = torch.float64 if dtype is torch.float64 else torch.float32
    given = {
        "q": torch.from_numpy(normal(rng, (B, Hq or H, N, K), np.float64)).to(dtype),
        "k": torch.from_numpy(normal(rng, (B, H, N, K), np.float64)).to(dtype),
        "v": torch.from_numpy(normal(rng, (B, Hv or H, N, V), np.float64)).to(dtype),
    }
    Hs = max(H, Hv or 0)
    if (dims := DECAYS[decay]) is not None:
        shape = tuple({"B": B, "H": Hs, "N": N}[d] for d in dims)
        given["log_decay"] = torch.from_numpy(np.asarray(-rng.uniform(0.01, 1, shape))).to(exact)
    if state:
        given["initial_state"] = torch.from_numpy(normal(rng, (S or B, Hs, K, V), np.float64)).to(exact)
    return {name: x.requires_grad_() for name, x in given.items()}


def gradients(call, given, seed=0):
    """The gradients of a random linear function of all results, by the tensors of `given`."""
    results = call(**given)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(seed)
    loss = sum((torch.randn(x.shape, generator=generator, dtype=x.dtype) * x).sum() for x in results)
    wanted = [x for x in given.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    return torch.autograd.grad(loss, wanted)


def definition(q, k, v, log_decay, initial_state, scale=1.0):
    """The recurrence for torch's own autograd; decay [H], equal numbers of heads."""
    state, outputs = initial_state, []
    for t in range(q.shape[2]):
        state = torch.exp(log_decay)[:, None, None] * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        outputs.append(scale * (q[:, :, t, None, :] @ state)[:, :, 0])
    return torch.stack(outputs, 2), state


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_it_is_the_operator_of_leetcore(layout, dtype):
    given = {name: x.detach() for name, x in problem(dtype=dtype, N=70, decay="token").items()}
    if layout == "bnhd":
        given = {name: x if name == "initial_state" else x.transpose(1, 2) for name, x in given.items()}
    options = {"scale": 0.5, "layout": layout, "return_state": True, "method": "recurrent"}
    for got, want in zip(
        linear_attention(**given, **options), leetcore.linear_attention(**given, **options), strict=True
    ):
        assert got.dtype == want.dtype and torch.equal(got, want)


def test_packed_sequences_and_numbers_as_decays():
    given = {name: x.detach() for name, x in problem(B=1, N=20, S=3, decay="none", dtype=torch.float32).items()}
    options = {"log_decay": -0.25, "cu_seqlens": torch.tensor([0, 4, 4, 20]), "return_state": True}
    for got, want in zip(
        linear_attention(**given, **options), leetcore.linear_attention(**given, **options), strict=True
    ):
        assert torch.equal(got, want)


def test_registered_functions_are_methods():
    calls = []

    def quadratic(q, k, v, log_decay, scale):
        calls.append(q.shape)
        return np.zeros_like(v)

    leetcore.register_method("zeros", quadratic)
    try:
        given = {name: x.detach() for name, x in problem(state=False, dtype=torch.float32).items()}
        assert not linear_attention(**given, method="zeros").any() and calls
    finally:
        leetcore.unregister_method("zeros")


@pytest.mark.parametrize("name", ["linear_attention", "linear_attention_backward", "decode_step"])
def test_operators_have_kernels_for_both_devices_and_for_tracing(name):
    for key in ("CPU", "CUDA", "Autograd"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"leetcore::{name}", key)
    assert torch._library.simple_registry.singleton.find(f"leetcore::{name}").fake_impl.kernel is not None


# ---- gradients


@pytest.mark.parametrize("heads", [{}, {"Hq": 6}, {"H": 1, "Hv": 2, "Hq": 4}], ids=["equal", "grouped q", "grouped k"])
@pytest.mark.parametrize("state", [False, True], ids=["no state", "state"])
@pytest.mark.parametrize("decay", DECAYS)
def test_gradcheck(decay, state, heads):
    given = problem(decay=decay, state=state, N=5, K=3, V=2, **heads)
    for layout, return_state in itertools.product(("bhnd", "bnhd"), (False, True)):

        def call(*tensors, layout=layout, return_state=return_state):
            named = dict(zip(given, tensors, strict=True))
            if layout == "bnhd":
                per_token = [n for n, x in named.items() if n in "qkv" or (n == "log_decay" and x.ndim == 3)]
                named |= {name: named[name].transpose(1, 2) for name in per_token}
            return linear_attention(**named, scale=0.7, return_state=return_state, layout=layout)

        assert torch.autograd.gradcheck(call, tuple(given.values()), fast_mode=True)


@pytest.mark.parametrize("decay", DECAYS)
def test_gradcheck_of_packed_sequences(decay):
    given = problem(B=1, N=9, S=3, decay=decay)
    cu_seqlens = torch.tensor([0, 4, 4, 9])

    def call(*tensors):
        return linear_attention(**dict(zip(given, tensors, strict=True)), cu_seqlens=cu_seqlens, return_state=True)

    assert torch.autograd.gradcheck(call, tuple(given.values()), fast_mode=True)


@pytest.mark.parametrize("dtype, tolerance, of_decay", [(torch.float32, 2e-5, 2e-5), (torch.bfloat16, 1e-2, 2e-2)])
def test_gradients_against_autograd_of_the_definition(dtype, tolerance, of_decay):
    given = problem(N=150, K=16, V=24, dtype=dtype)
    got = gradients(functools.partial(linear_attention, return_state=True), given)
    exact = {name: x.detach().double().requires_grad_() for name, x in given.items()}
    o, state = definition(**exact)
    generator = torch.Generator().manual_seed(0)  # the numbers that `gradients` takes
    weights = [torch.randn(x.shape, generator=generator, dtype=d) for x, d in ((o, dtype), (state, torch.float32))]
    want = torch.autograd.grad([o, state], list(exact.values()), [w.double() for w in weights])
    for name, d, expected in zip(NAMES, got, want, strict=True):
        assert d.dtype == given[name].dtype
        assert reference.error(d.double().numpy(), expected.numpy()) <= (of_decay if name == "log_decay" else tolerance)


def test_any_subset_may_require_gradients():
    given = problem()
    every = dict(zip(NAMES, gradients(linear_attention, given), strict=True))
    for wanted in itertools.chain.from_iterable(itertools.combinations(NAMES, n) for n in range(1, 5)):
        some = {name: x.detach().requires_grad_(name in wanted) for name, x in given.items()}
        for name, d in zip(wanted, gradients(linear_attention, some), strict=True):
            assert torch.equal(d, every[name]), (wanted, name)


def test_a_result_that_no_loss_uses():
    given = problem()
    o, state = linear_attention(**given, return_state=True)
    alone = torch.autograd.grad(linear_attention(**given).sum(), list(given.values()))
    for got, want in zip(torch.autograd.grad(o.sum(), list(given.values()), retain_graph=True), alone, strict=True):
        assert torch.equal(got, want)
    d_q, d_k = torch.autograd.grad(state.sum(), [given["q"], given["k"]])
    assert not d_q.any() and d_k.any()


def test_views_have_the_gradients_of_copies():
    rng = np.random.default_rng(0)
    qkv = torch.from_numpy(normal(rng, (2, 70, 3, 4 + 4 + 6), np.float64)).requires_grad_()
    shared = torch.from_numpy(-rng.uniform(0, 1, (1, 3))).requires_grad_()
    odd = torch.from_numpy(normal(rng, (2, 3, 4, 70), np.float64)).requires_grad_()

    def call(copy, qkv, shared, odd):
        q, _, v = qkv.split((4, 4, 6), dim=3)
        tensors = (q + 0, odd.permute(0, 3, 1, 2), v, shared[:, None].expand(2, 70, 3))
        return linear_attention(*(x.contiguous() if copy else x for x in tensors), layout="bnhd")

    given = {"qkv": qkv, "shared": shared, "odd": odd}
    got, want = (gradients(functools.partial(call, copy), given) for copy in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_no_grad_and_inference_mode():
    given = problem()
    want = linear_attention(**given)
    assert want.requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            o = linear_attention(**given)
        assert not o.requires_grad and torch.equal(o, want)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    given = problem()
    call = functools.partial(
        checkpoint, lambda *x: linear_attention(*x[:4], initial_state=x[4]), use_reentrant=use_reentrant
    )
    o = call(*given.values())
    (torch.randn(o.shape, generator=torch.Generator().manual_seed(0), dtype=o.dtype) * o).sum().backward()
    for x, want in zip(given.values(), gradients(linear_attention, given), strict=True):
        assert torch.equal(x.grad, want)


def test_second_derivatives_are_refused():
    given = problem()
    (first,) = torch.autograd.grad(linear_attention(**given).square().sum(), [given["q"]], create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        first.sum().backward()


# ---- torch.func


def loss(q, k, v, log_decay, initial_state=None):
    return linear_attention(q, k, v, log_decay, initial_state=initial_state).square().sum()


@pytest.mark.parametrize("decay", ["one", "head", "sequence", "token"])
def test_gradients_of_each_sample(decay):
    given = {name: x.detach() for name, x in problem(decay=decay).items()}
    qs = torch.stack([given["q"], 2 * given["q"], -given["q"]])
    rest = tuple(given.values())[1:]
    together = torch.vmap(torch.func.grad(loss, (0, 1, 2, 3, 4)), (0, None, None, None, None))(qs, *rest)
    for i, q in enumerate(qs):
        leaves = [x.clone().requires_grad_() for x in (q, *rest)]
        for got, want in zip(together, torch.autograd.grad(loss(*leaves), leaves), strict=True):
            torch.testing.assert_close(got[i], want, rtol=1e-12, atol=1e-12)


def test_vmap_is_a_loop():
    given = {name: x.detach() for name, x in problem().items()}
    qs, decays = (
        torch.stack([given["q"], -given["q"]], dim=3),
        torch.stack([given["log_decay"], 3 * given["log_decay"]]),
    )

    def call(q, log_decay):
        return linear_attention(q, given["k"], given["v"], log_decay, return_state=True)

    o, state = torch.vmap(call, (3, 0))(qs, decays)
    for i in range(2):
        want = call(qs[:, :, :, i], decays[i])
        assert torch.equal(o[i], want[0]) and torch.equal(state[i], want[1])


def test_gradients_pass_through_vmap():
    """The gradients are those of torch.func and of plain autograd. torch 2.5 loses them."""
    q, k, v, g = (torch.stack([x.detach(), -x.detach()]) for x in list(problem(state=False).values()))
    g = -g.abs()
    each = [torch.func.grad(loss)(*x) for x in zip(q, k, v, g, strict=True)]

    def together(q):
        return torch.vmap(lambda *x: linear_attention(*x).square().sum())(q, k, v, g).sum()

    q.requires_grad_()
    for got in (torch.func.grad(together)(q.detach()), torch.autograd.grad(together(q), q)[0]):
        torch.testing.assert_close(got, torch.stack(each), rtol=1e-12, atol=1e-12)


def test_transforms_of_the_operator_itself_and_of_compiled_code():
    q, k, v = (x.detach() for x in list(problem().values())[:3])
    want = torch.func.grad(loss)(q, k, v, None)
    operator = torch.func.grad(lambda q: FORWARD(q, k, v)[0].square().sum())
    torch._dynamo.reset()
    for call in (operator, torch.compile(operator, fullgraph=True, backend="aot_eager")):
        assert torch.equal(call(q), want)


def test_a_transform_inside_of_another_keeps_the_derivatives_of_both():
    given = [x.detach() for x in problem().values()]
    q, rest = given[0], given[1:]

    def outer(k):
        return torch.func.vjp(lambda q: linear_attention(q, k, rest[1], rest[2]), q)[0].square().sum()

    assert torch.equal(torch.func.grad(outer)(rest[0]), torch.func.grad(loss, 1)(q, *rest[:3]))
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        torch.func.grad(lambda q: torch.func.grad(loss)(q, *rest).sum())(q)


def test_what_vmap_refuses():
    given = {name: x.detach() for name, x in problem(B=1, S=1).items()}
    with pytest.raises(NotImplementedError, match=r"^cu_seqlens: expected None under torch\.vmap"):
        torch.vmap(lambda q: linear_attention(**{**given, "q": q}, cu_seqlens=torch.tensor([0, 7])))(given["q"][None])
    with pytest.raises(NotImplementedError, match=r"decode_step: expected no torch\.vmap"):
        torch.vmap(lambda x: decode_step(x, x, x, torch.zeros(1, 2, 3, 3)))(torch.zeros(4, 1, 2, 3))


@pytest.mark.parametrize("grad", [False, True], ids=["plain", "grad"])
def test_forward_mode_is_refused_and_never_drops_a_tangent(grad):
    given = problem() if grad else {name: x.detach() for name, x in problem().items()}
    refused = pytest.raises(NotImplementedError, match=r"leetcore\.torch has no forward mode")
    for name, x in given.items():
        with refused:
            torch.func.jvp(lambda x, name=name: linear_attention(**{**given, name: x}), (x,), (x,))
        with forward_ad.dual_level(), refused:
            linear_attention(**{**given, name: forward_ad.make_dual(x, torch.ones_like(x))})
    with refused:
        torch.func.hessian(loss)(*(x.detach() for x in given.values()))
    x = torch.ones(2, 3, 8)
    with forward_ad.dual_level():
        decode_step(x, x, x, torch.zeros(2, 3, 8, 8))  # without tangents nothing is lost
        with torch.no_grad(), refused:
            decode_step(forward_ad.make_dual(x, x), x, x, torch.zeros(2, 3, 8, 8))


# ---- versions of torch, and what they may lack


@pytest.mark.parametrize("version", ["1.13.1", "2.5.1+cu124", "2.5.0a0+git"])
def test_an_older_torch_is_refused(version, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ImportError, match=rf"^torch: expected 2\.6 or later for leetcore\.torch, got {version[:5]}"):
        importlib.reload(leetcore.torch)


@pytest.mark.parametrize("version", ["2.6.0a0+git", "2.10.0", "3.0.0"])
def test_a_newer_torch_is_not(version, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    importlib.reload(leetcore.torch)


def test_a_torch_without_the_guard_of_kernels_is_refused(monkeypatch):
    monkeypatch.delattr(torch._C, "_AutoDispatchBelowAutograd")
    with pytest.raises(ImportError, match=r"^torch: expected a version with .*BelowAutograd.*, got .* newer leetcore"):
        importlib.reload(autograd)


def test_a_torch_without_the_names_of_transforms(monkeypatch):
    given = problem(decay="none", state=False)
    want = gradients(linear_attention, given)
    q, k, v = (x.detach() for x in given.values())
    monkeypatch.setattr(autograd, "_SingleLevelFunction", None)
    for got, expected in zip(gradients(linear_attention, given), want, strict=True):
        assert torch.equal(got, expected)
    with pytest.raises(NotImplementedError, match=r"^torch\.func: expected a torch whose transforms .*, got "):
        torch.func.grad(loss)(q, k, v, None)
    monkeypatch.setattr(autograd, "_transforms_are_active", lambda: False)
    with pytest.raises(RuntimeError, match="setup_context"):  # torch raises it; no wrong result is computed
        torch.func.grad(loss)(q, k, v, None)


def test_a_torch_without_the_level_of_forward_mode(monkeypatch):
    monkeypatch.setattr(autograd, "forward_ad", types.SimpleNamespace(unpack_dual=forward_ad.unpack_dual))
    given = problem()
    assert linear_attention(**given).requires_grad
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="has no forward mode"):
        linear_attention(**{**given, "q": forward_ad.make_dual(given["q"].detach(), given["q"].detach())})


SECOND_IMPORT = """
import gc, importlib, sys
import leetcore
assert "torch" not in sys.modules
try:
    leetcore.tourch
except AttributeError as error:
    assert str(error) == "module 'leetcore' has no attribute 'tourch'"
first = leetcore.torch.linear_attention  # the first use loads the module
import torch
q = torch.randn(1, 2, 9, 8, requires_grad=True)
gradient = lambda call: torch.autograd.grad(call(q, q, q, -0.1).sum(), q)[0]
want = gradient(first)
modules = [leetcore.torch.inputs, leetcore.torch.autograd, leetcore.torch.rules, leetcore.torch.ops]
for module in (leetcore, leetcore.arrays, leetcore.api, *modules, leetcore.torch):
    importlib.reload(module)
assert leetcore.torch.linear_attention is not first and torch.equal(gradient(leetcore.torch.linear_attention), want)

def again():
    for name in [name for name in sys.modules if name.split(".")[0] == "leetcore"]:
        del sys.modules[name]
    gc.collect()
    return importlib.import_module("leetcore.torch")

second = again().linear_attention
assert second is not first and torch.equal(gradient(second), want) and torch.equal(gradient(first), want)
torch.ops.leetcore.version = "0.0.1"
try:
    again()
except ImportError as error:
    print(error)
"""


def test_a_second_import_takes_the_operators_of_the_first():
    result = subprocess.run([sys.executable, "-c", SECOND_IMPORT], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == (
        f"leetcore.torch: expected the operators of leetcore {leetcore.__version__}, got those of 0.0.1, which this "
        "process imported before; start a new process\n"
    )


def test_leetcore_without_torch():
    code = "import sys; sys.modules['torch'] = None\nimport leetcore\nassert not hasattr(leetcore, 'torch')"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- graphs of torch.fx and torch.jit.trace

LAYERS = {
    "linear": lambda: nn.LinearAttention(16, 4, log_decay=-0.1),
    "lightning": lambda: nn.Lightning(16, 4, layer=0, num_layers=3),
    "retention": lambda: nn.Retention(16, 4),
    "gated": lambda: nn.GatedLinearAttention(16, 4),
}


def test_fx_traces_calls():
    def call(q, log_decay, state):
        o, after = linear_attention(
            q, q, q, log_decay, scale=q.shape[-1] ** -0.5, initial_state=state, return_state=True
        )
        return o, after, decode_step(q[:, :, 0], q[:, :, 0], q[:, :, 0], after, -0.5)

    traced = torch.fx.symbolic_trace(call)
    targets = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert {linear_attention, decode_step} <= set(targets)
    for N in (9, 30):
        q, state = torch.randn(1, 2, N, 8), torch.randn(1, 2, 8, 8)
        for log_decay in (torch.tensor([-0.1, -0.2]), -0.3):
            for got, want in zip(traced(q, log_decay, state), call(q, log_decay, state), strict=True):
                assert torch.equal(got, want)
    q = torch.randn(1, 2, 9, 8)
    given = torch.fx.symbolic_trace(lambda g: linear_attention(q, q, q, g))  # only the decay is a proxy
    assert torch.equal(given(torch.tensor(-0.1)), linear_attention(q, q, q, -0.1))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "in a model"])
def test_fx_traces_layers(layer, alone):
    if torch.__version__ < (2, 13) and layer in ("retention", "gated"):
        pytest.skip("torch.fx of 2.6 traces neither torch.arange of a traced size nor torch.promote_types")
    layer = LAYERS[layer]()
    model = layer if alone else torch.nn.Sequential(layer, torch.nn.Linear(16, 16))
    traced = torch.fx.symbolic_trace(model)
    for N in (9, 30):
        x = torch.randn(2, N, 16)
        assert torch.equal(traced(x), model(x))
    if alone:
        with pytest.raises(AssertionError, match=r"^state: expected None, as torch\.fx traced the layer without it"):
            traced(x, layer.new_state(2))
        x, bounds = torch.randn(1, 12, 16), torch.tensor([0, 5, 12])
        assert torch.equal(traced(x, cu_seqlens=bounds), layer(x, cu_seqlens=bounds))


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, and warns of every Python number of a trace
def test_jit_traces_operators_and_layers():
    def attend(q):
        return linear_attention(q, q, q, -0.1, return_state=True)

    traced = torch.jit.trace(attend, (torch.randn(1, 2, 9, 8),))
    q = torch.randn(2, 3, 30, 8, requires_grad=True)
    for got, want in zip(traced(q), attend(q), strict=True):
        assert torch.equal(got, want)
    assert torch.equal(torch.autograd.grad(traced(q)[0].sum(), q)[0], torch.autograd.grad(attend(q)[0].sum(), q)[0])

    def step(x, state):
        return decode_step(x, x, x, state, -0.1)

    x = torch.randn(2, 3, 8)
    traced = torch.jit.trace(step, (x, torch.zeros(2, 3, 8, 8)))
    state, expected = torch.ones(2, 2, 3, 8, 8)
    assert torch.equal(traced(x, state), step(x, expected)) and torch.equal(state, expected)

    for make in LAYERS.values():
        layer = make()
        traced = torch.jit.trace(layer, (torch.randn(1, 9, 16),))
        x = torch.randn(2, 30, 16)
        assert torch.equal(traced(x), layer(x))


@pytest.mark.filterwarnings("ignore")
def test_what_a_jit_trace_would_freeze_is_refused():
    q = torch.randn(1, 2, 9, 8)
    with pytest.raises(TypeError, match=r"^scale: expected a number, got a torch\.Tensor; multiply q by it"):
        torch.jit.trace(lambda q: linear_attention(q, q, q, scale=1 / q.shape[2]), (q,))  # traced sizes are tensors
    with pytest.raises(TypeError, match=r"^q: expected a call outside of torch\.jit\.trace.*leetcore\.torch"):
        torch.jit.trace(lambda q: leetcore.linear_attention(q, q, q), (q,))


# ---- the dispatcher


@pytest.mark.parametrize("decay", DECAYS)
def test_opcheck(decay):
    given = problem(decay=decay, state=decay != "head")
    arguments = [given.get(name) for name in NAMES]
    torch.library.opcheck(FORWARD, (*arguments, None, 0.5, decay == "token"))
    plain = [None if x is None else x.detach() for x in arguments]
    d_o = torch.ones_like(plain[2])
    wants = [True, True, decay != "one", "log_decay" in given, False]
    torch.library.opcheck(BACKWARD, (*plain, None, d_o, None, 0.5, "bhnd", False, wants))
    if decay != "token":
        q, k, v = (x[:, :, 0] for x in plain[:3])
        torch.library.opcheck(DECODE, (q, k, v, torch.ones(2, 3, 4, 5, dtype=torch.float64), plain[3]))


def test_opcheck_of_packed_sequences_in_the_other_layout():
    given = problem(B=1, S=2)
    q, k, v = (given[name].transpose(1, 2) for name in "qkv")
    cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32)
    torch.library.opcheck(FORWARD, (q, k, v, None, given["initial_state"], cu_seqlens, 1.0, True, "bnhd"))


def model(x, log_decay, state):
    q, k, v = x.unflatten(-1, (3, -1)).chunk(3, dim=-1)
    o, state = linear_attention(
        q,
        k,
        v,
        -torch.nn.functional.softplus(log_decay),
        scale=0.5,
        initial_state=state,
        return_state=True,
        layout="bnhd",
    )
    return o.sigmoid(), state


def compiled_and_eager(backend, lengths):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for N in lengths:
        rng = torch.Generator().manual_seed(N)
        given = {
            "x": torch.randn(2, N, 72, generator=rng, requires_grad=True),
            "log_decay": torch.randn(3, generator=rng, requires_grad=True),
            "state": torch.randn(2, 3, 8, 8, generator=rng, requires_grad=True),
        }
        for got, want in zip(gradients(compiled, given), gradients(model, given), strict=True):
            torch.testing.assert_close(got, want)
    return counter.frame_count


def test_compile_without_a_break_and_once_for_all_lengths():
    assert compiled_and_eager("aot_eager", (7, 64, 100, 33, 200)) == 1


def test_compile_with_inductor():
    assert compiled_and_eager("inductor", (64, 100)) == 1


def test_compiled_decoding_updates_the_state():
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: decode_step(*x, -0.1) + 1, fullgraph=True, backend="aot_eager")
    state = torch.ones(2, 3, 8, 8)
    expected = state.clone()
    for _ in range(3):
        x = torch.randn(3, 2, 3, 8)
        assert torch.equal(compiled(*x, state), decode_step(*x, expected, -0.1) + 1)
    assert torch.equal(state, expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(compiled):
    torch._dynamo.reset()
    given = problem(dtype=torch.float32)
    call = torch.compile(linear_attention, fullgraph=True, backend="aot_eager") if compiled else linear_attention
    with torch.autocast("cpu", torch.bfloat16):
        o, state = call(**{**given, "log_decay": given["log_decay"].bfloat16()}, return_state=True)
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32
    (o.float().sum() + state.sum()).backward()
    assert all(x.grad.dtype == torch.float32 and x.grad.any() for x in given.values())


def test_autocast_leaves_float64_alone():
    given = problem()
    with torch.autocast("cpu", torch.bfloat16):
        assert (
            torch.equal(linear_attention(**given), linear_attention(**given))
            and linear_attention(**given).dtype == torch.float64
        )


def test_autocast_while_decoding():
    x, state = torch.randn(2, 3, 8), torch.zeros(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        o = decode_step(x, x, x, state, torch.full((3,), -0.5, dtype=torch.bfloat16))
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32 and state.any()


def test_autocast_while_decoding_updates_a_state_of_16_bits():
    x, state = torch.randn(2, 3, 8), torch.zeros(2, 3, 8, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        decode_step(x, x, x, state, -0.5)
    assert state.any()


def test_flop_of_forward_backward_and_decoding():
    B, H, N, K, V = 2, 3, 640, 16, 32
    q, k = torch.randn(2, B, H, N, K, requires_grad=True)
    v = torch.randn(B, H, N, V)
    forward = leetcore.cost("chunk", B=B, H=H, N=N, K=K, V=V).flop
    with FlopCounterMode(display=False) as counter:
        o = linear_attention(q, k, v)
    assert counter.get_total_flops() == B * H * N * (65 * (K + V) + 4 * K * V)
    assert abs(counter.get_total_flops() / forward - 1) < 0.1
    with FlopCounterMode(display=False) as counter:
        o.sum().backward()
    assert counter.get_total_flops() == B * H * N * (65 * (3 * K + 2 * V) + 10 * K * V)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        decode_step(q[:, :, 0], k[:, :, 0], v[:, :, 0], torch.zeros(B, H, K, V))
    assert counter.get_total_flops() == B * H * 4 * K * V


# ---- decoding


def test_decode_step_is_that_of_leetcore():
    rng = np.random.default_rng(0)
    q, k, v = (torch.from_numpy(normal(rng, (2, 3, 8))) for _ in range(3))
    pool = torch.from_numpy(normal(rng, (4, 3, 8, 8)))
    options = {"log_decay": -torch.rand(3), "scale": 0.5, "state_indices": torch.tensor([3, 1], dtype=torch.int32)}
    expected = pool.clone()
    before = pool._version
    o = decode_step(q, k, v, pool, **options)
    assert torch.equal(o, leetcore.decode_step(q, k, v, expected, **options)) and torch.equal(pool, expected)
    assert pool._version > before  # so that autograd would notice


def test_decode_step_has_no_gradient():
    x = torch.randn(2, 3, 8, requires_grad=True)
    with pytest.raises(NotImplementedError, match=r"decode_step has no gradient.*torch\.no_grad.*linear_attention"):
        decode_step(x, x, x, torch.zeros(2, 3, 8, 8))
    with torch.no_grad():
        assert decode_step(x, x, x, torch.zeros(2, 3, 8, 8)).any()


def test_decode_step_in_grad_mode_where_nothing_requires_a_gradient():
    project = torch.nn.Linear(8, 8)
    x = torch.randn(2, 3, 9, 8)
    _, state = linear_attention(*(project(x) for _ in range(3)), -0.1, return_state=True)
    assert state.requires_grad and torch.is_grad_enabled()
    state, expected = state.detach(), state.detach().clone()
    step = project(x[:, :, 0]).detach()
    compiled = torch.compile(lambda *x: decode_step(*x, -0.1), fullgraph=True, backend="aot_eager")
    for call in (lambda *x: decode_step(*x, -0.1), compiled):
        o = call(step, step, step, state)
        assert not o.requires_grad and torch.equal(o, leetcore.decode_step(step, step, step, expected, -0.1))
        assert torch.equal(state, expected)


def test_numpy_numbers_as_decays():
    q = torch.randn(1, 2, 9, 8)
    assert torch.equal(linear_attention(q, q, q, np.float32(-0.5)), linear_attention(q, q, q, -0.5))


# ---- refusals


REFUSED = {
    "not a tensor": ({"q": np.zeros((2, 3, 7, 4))}, TypeError, "^q: expected a torch.Tensor, got ndarray"),
    "decay of numpy": (
        {"log_decay": leetcore.decay.alibi(3)},
        TypeError,
        "^log_decay: expected a torch.Tensor, got ndarray",
    ),
    "dtype": ({"k": torch.zeros(2, 3, 7, 4)}, TypeError, "^k: expected dtype float64 like q, got float32"),
    "integers": ({n: torch.zeros(2, 3, 7, 4, dtype=torch.int64) for n in "qkv"}, TypeError, "^q: expected dtype"),
    "rank": ({"q": torch.zeros(3, 7, 4).double()}, ValueError, r"^q: expected shape \[B, Hq, N, K\], got \[3, 7, 4\]"),
    "heads": ({"k": torch.zeros(2, 2, 7, 4).double()}, ValueError, "^k: expected a number of heads that divides 3"),
    "growth": ({"log_decay": 0.5}, ValueError, "^log_decay: expected values <= 0, got 0.5"),
    "method": ({"method": "quick"}, ValueError, "^method: unknown method 'quick'; known are auto, chunk"),
    "layout": ({"layout": "nbhd"}, ValueError, "^layout: expected 'bhnd' or 'bnhd', got 'nbhd'"),
    "precision": ({"precision": "low"}, ValueError, "^precision: expected None, 'ieee' or 'tf32', got 'low'"),
    "no layout": ({"layout": None}, ValueError, "^layout: expected 'bhnd' or 'bnhd', got None"),
    "no method": ({"method": None}, TypeError, "^method: expected 'auto' or a name .*, got NoneType"),
    "text as scale": ({"scale": "1"}, TypeError, "^scale: expected a number, got str"),
    "tensor as scale": ({"scale": torch.tensor(0.5, requires_grad=True)}, TypeError, "^scale: .* multiply q by it"),
    "scale": ({"scale": float("nan")}, ValueError, "^scale: expected a finite number, got nan"),
    "served by none": (
        {"method": "fft", "log_decay": -torch.ones(2, 3, 7)},
        NotImplementedError,
        "fft: its Toeplitz mask",
    ),
    "devices": (
        {"k": torch.zeros(2, 3, 7, 4, device="meta")},
        ValueError,
        "^q: expected on one device .* cpu and meta",
    ),
    "device of the decay": (
        {"log_decay": torch.zeros(3, device="meta")},
        ValueError,
        "^q: expected on one device .* cpu and meta",
    ),
    "device of a single decay": (
        {"log_decay": torch.zeros((), device="meta")},
        ValueError,
        "^q: expected on one device .* cpu and meta",
    ),
    "sparse": ({"q": torch.zeros(2, 3, 7, 4).double().to_sparse()}, NotImplementedError, "SparseCPU"),
}


@pytest.mark.parametrize("change, error, text", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("grad", [False, True], ids=["plain", "grad"])
def test_refusals(change, error, text, grad):
    given = problem(state=False)
    if not grad:
        given = {name: x.detach() for name, x in given.items()}
    with pytest.raises(error, match=text):
        linear_attention(**{**given, **change})


def test_shapes_are_known_without_memory():
    given = {name: x.detach().to("meta") for name, x in problem(Hq=6).items()}
    o, state = linear_attention(**given, return_state=True)
    assert (o.device.type, o.shape, state.shape) == ("meta", (2, 6, 7, 5), (2, 3, 4, 5))
