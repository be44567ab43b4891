"""Every CUDA method on a real GPU, through torch. `make gpu` runs these tests.

Results and scratch are NaN before each call (conftest.py), on the stream that the call is put on.
One file: the tests share a GPU, its inputs and its checks.
"""

import importlib.util
import os
import re
from functools import partial
from pathlib import Path

import gradients
import leetcore
import numpy as np
import pytest
import torch
from conftest import DTYPES as SHORT
from leetcore import reference
from leetcore.bench.problems import TOLERANCE, Case
from leetcore.torch import linear_attention
from torch.utils.checkpoint import checkpoint

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # otherwise jax allocates most of the memory

METHODS = [m.name for m in leetcore.methods() if m.device == "cuda" and torch.cuda.is_available()]
usable = bool(METHODS)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not usable, reason="needs an NVIDIA GPU and a build with CUDA")]
DTYPES = tuple(TOLERANCE)
DEVICE = "cuda"

HEAD_DIMS = ((1, 1), (16, 32), (64, 64), (80, 96), (33, 17), (128, 128), (256, 256), (7, 256), (128, 3))
DECAYS = ("none", "0", "0.0001", "0.5", "0.999999", "1", "slope20", "mixed", "token")
CASES = (
    *(Case(N, 64, 64, state=True) for N in (1, 2, 63, 64, 65, 127, 128, 129, 1000)),
    *(Case(200, K, V, decay="token", state=True) for K, V in HEAD_DIMS),
    *(Case(300, 32, 64, decay=decay, B=2, state=True) for decay in DECAYS),
    *(
        Case(130, 64, 64, decay="token", heads=heads, state=True)
        for heads in ((8, 2, 2), (4, 1, 1), (2, 2, 4), (2, 4, 1))
    ),
    *(Case(150, 64, 32, decay=decay, B=2, layout="bnhd") for decay in ("mixed", "token")),
    *(Case(700, 64, 64, decay=decay, bounds=(0, 0, 5, 69, 69, 500, 700), state=True) for decay in ("mixed", "token")),
    Case(64, 32, 32, B=64, heads=(16, 16, 16)),
    Case(8192, 128, 128, decay="0.99", state=True),
)


@pytest.fixture(params=METHODS or ["none"])
def method(request):
    return request.param


def to_gpu(array, device=DEVICE):
    if not isinstance(array, np.ndarray):
        return array
    tensor = torch.from_numpy(array.view(np.int16)) if array.dtype == "bfloat16" else torch.from_numpy(array)
    return (tensor.view(torch.bfloat16) if array.dtype == "bfloat16" else tensor).to(device)


def error(got, want):
    got = got.double().cpu().numpy()
    assert got.shape == want.shape
    return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)


def check(case, method, device=DEVICE, **options):
    given = case.arguments()
    try:
        o, state = leetcore.linear_attention(
            **{name: to_gpu(x, device) for name, x in given.items()}, method=method, return_state=True, **options
        )
    except NotImplementedError as refusal:
        assert f"{method}: " in str(refusal)
        pytest.skip("refused, with a reason")
    want, want_state = case.expected(given)
    assert error(o, want) <= TOLERANCE[case.dtype][0]
    assert error(state, want_state) <= TOLERANCE[case.dtype][1]
    return o, state


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_definition(method, dtype, case):
    check(Case(**{**case.__dict__, "dtype": dtype}), method)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("decay", ("0.99", "token"))
def test_many_tokens(method, dtype, decay):
    if method == "parallel":
        pytest.skip("quadratic")
    check(Case(131072, 64, 64, dtype, decay, state=True), method)


def test_the_same_bits_every_time(method):
    case = Case(1000, 64, 64, "bfloat16", "mixed", B=2, heads=(8, 2, 2), state=True)
    first, again = (check(case, method) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def arguments(case=None):
    case = case or Case(500, 64, 64, "float32", "mixed", B=2, heads=(4, 4, 4), state=True)
    given = case.arguments()
    return case, given, {name: to_gpu(x) for name, x in given.items()}


def serve(method, **given):
    """A call that the method has to serve."""
    return leetcore.linear_attention(**given, method=method, return_state=True)


def test_strides(method):
    case, given, tensors = arguments()
    for name, axes in {"q": (2, 0, 1, 3), "k": (1, 2, 0, 3), "v": (1, 0, 2, 3)}.items():
        padded = torch.full((*[tensors[name].shape[i] for i in axes[:3]], 80), float("nan"), device=DEVICE)
        view = padded[..., 8:72].permute(*(axes.index(i) for i in range(4)))
        view.copy_(tensors[name])
        tensors[name] = view
    o, state = serve(method, **tensors)
    want, want_state = case.expected(given)
    assert error(o, want) <= TOLERANCE["float32"][0] and error(state, want_state) <= TOLERANCE["float32"][1]
    out = torch.full((2, 500, 4, 100), float("nan"), device=DEVICE)
    place = out[..., 4:68].transpose(1, 2)
    assert leetcore.linear_attention(**tensors, method=method, out=place) is place
    assert torch.equal(place, o)
    assert out[..., :4].isnan().all() and out[..., 68:].isnan().all()


def test_a_last_dimension_that_is_not_contiguous(method):
    _, _, tensors = arguments()
    want, _ = serve(method, **tensors)
    tensors["k"] = tensors["k"].transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(serve(method, **tensors)[0], want)


@pytest.mark.parametrize("shape", [(2, 4, 0, 16), (0, 4, 9, 16)])
def test_nothing_to_do(method, shape):
    q = torch.zeros(shape, device=DEVICE)
    before = torch.randn(shape[0], 4, 16, 16, device=DEVICE)
    o, state = leetcore.linear_attention(q, q, q, -0.1, initial_state=before, method=method, return_state=True)
    assert o.shape == shape and torch.equal(state, before)


# ---- streams -------------------------------------------------------------------------------------


def busy(milliseconds=200):
    """Blocks the current stream for about this time."""
    torch.cuda._sleep(int(milliseconds * 1.5e6))


def test_a_call_returns_before_its_work_is_done(method):
    _, _, tensors = arguments()
    want, _ = serve(method, **tensors)
    torch.cuda.synchronize()
    busy()
    o, _ = serve(method, **tensors)
    waiting = torch.cuda.Event()
    waiting.record()
    assert not waiting.query()
    assert torch.equal(o, want)


def test_a_call_allocates_nothing_behind_the_back_of_torch(method):
    _, _, tensors = arguments()
    serve(method, **tensors)
    torch.cuda.synchronize()
    free, _ = torch.cuda.mem_get_info()
    for _ in range(20):
        serve(method, **tensors)
    torch.cuda.synchronize()
    assert torch.cuda.mem_get_info()[0] == free


def test_the_current_stream(method):
    _, _, tensors = arguments()
    want, _ = serve(method, **tensors)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = {n: torch.zeros_like(x) if isinstance(x, torch.Tensor) else x for n, x in tensors.items()}
        stream.wait_stream(torch.cuda.default_stream())
        busy()
        for name, x in tensors.items():
            if isinstance(x, torch.Tensor):
                late[name].copy_(x)
        o, _ = serve(method, **late)
    stream.synchronize()
    assert torch.equal(o, want)


def test_another_stream_waits_for_the_inputs_and_they_for_it(method):
    _, _, tensors = arguments()
    want, want_state = serve(method, **tensors)
    stream = torch.cuda.Stream()
    for _ in range(3):
        late = {n: torch.zeros_like(x) if isinstance(x, torch.Tensor) else x for n, x in tensors.items()}
        busy(50)
        for name, x in tensors.items():
            if isinstance(x, torch.Tensor):
                late[name].copy_(x)
        with torch.cuda.stream(stream):
            busy(50)
        o, state = serve(method, **late, stream=stream)
        del late  # other work then writes to their memory, before that stream has read it
        for x in tensors.values():
            if isinstance(x, torch.Tensor):
                torch.full_like(x, float("nan"))
        stream.synchronize()
        assert torch.equal(o, want) and torch.equal(state, want_state)


def test_two_streams_at_once(method):
    problems = [arguments(Case(2000 + i, 64, 64, "float32", "mixed", heads=(4, 4, 4), state=True))[2] for i in range(2)]
    want = [serve(method, **x) for x in problems]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for _ in range(10):
        got = [serve(method, **x, stream=s) for x, s in zip(problems, streams, strict=True)]
        torch.cuda.synchronize()
        for x, y in zip(got, want, strict=True):
            assert torch.equal(x[0], y[0]) and torch.equal(x[1], y[1])


def captured(call):
    """A graph of call(), and the result of the call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # creates objects that are made once, such as a plan of cuFFT
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def test_a_graph_is_captured_and_replayed(method):
    case, given, tensors = arguments()
    graph, (o, state) = captured(partial(serve, method, **tensors))
    for factor in (1, -2):
        tensors["v"].copy_(factor * to_gpu(given["v"]))
        o.fill_(float("nan")), state.fill_(float("nan"))
        graph.replay()
        want, want_state = case.expected({**given, "v": factor * given["v"]})
        assert error(o, want) <= TOLERANCE["float32"][0] and error(state, want_state) <= TOLERANCE["float32"][1]


def test_packed_bounds_may_change_under_a_graph(method):
    case = Case(300, 32, 32, "float32", "mixed", bounds=(0, 100, 200, 300))
    _, given, tensors = arguments(case)
    try:
        graph, (o, state) = captured(partial(serve, method, **tensors))
    except NotImplementedError:
        pytest.skip("refused, with a reason")
    bounds = np.array([0, 1, 260, 300])
    tensors["cu_seqlens"].copy_(to_gpu(bounds))
    graph.replay()
    want, want_state = reference.linear_attention(**{**given, "cu_seqlens": bounds})
    assert error(o, want) <= TOLERANCE["float32"][0] and error(state, want_state) <= TOLERANCE["float32"][1]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_tensors(method):
    case = Case(300, 64, 64, "float32", "mixed", state=True)
    with torch.cuda.device(0):
        o, state = check(case, method, device="cuda:1")
        assert o.device == state.device == torch.device("cuda", 1)
        assert torch.cuda.current_device() == 0
    given = {name: to_gpu(x, "cuda:1") for name, x in case.arguments().items()}
    given["k"] = given["k"].to("cuda:0")
    with pytest.raises(ValueError, match=r"^k: expected on CUDA device 1 like q, got CUDA device 0"):
        leetcore.linear_attention(**given, method=method)


# ---- gradients -----------------------------------------------------------------------------------

GRADIENTS = (
    *({"N": N, "K": 64, "V": 64} for N in (1, 65, 3000)),
    *({"N": 200, "K": K, "V": V, "kind": kind} for K, V in ((128, 128), (33, 17)) for kind in (None, "[Hs]")),
    *({"N": 200, "K": K, "V": V, "kind": "[B,Hs,N]"} for K, V in ((64, 64), (128, 128), (33, 17))),
    *({"N": 70, "K": 256, "V": 64, "kind": kind} for kind in (None, "[B,Hs,N]")),
    *({"N": 130, "K": 64, "V": 64, "heads": heads, "kind": "[B,Hs]"} for heads in ((8, 2, 2), (2, 4, 1))),
    {"N": 300, "K": 64, "V": 64, "heads": (4, 1, 2), "kind": "[B,Hs,N]", "layout": "bnhd"},
    *({"lengths": [0, 5, 64, 0, 431, 200], "K": 64, "V": 64, "kind": kind} for kind in ("[Hs]", "[B,Hs,N]")),
    *({"N": 3000, "K": 64, "V": 64, "state": False, "kind": kind} for kind in ("[Hs]", "[B,Hs,N]")),
    {"B": 64, "heads": (16, 16, 16), "N": 64, "K": 32, "V": 32},
)


def on_gpu(p):
    arguments, options, d_results = p
    moved = {name: to_gpu(x) for name, x in options.items()}
    return {name: to_gpu(x) for name, x in arguments.items()}, moved, tuple(map(to_gpu, d_results))


def check_gradients(dtype, **fields):
    p = gradients.problem(dtype=SHORT[dtype], **fields)
    got = gradients.backward(*on_gpu(p))
    for name, x, want in zip(got._fields, got, gradients.definition(*p), strict=True):
        assert (x is None) == (want is None)
        assert x is None or error(x, want) <= gradients.tolerance(name, dtype), name
    return got


@pytest.mark.parametrize("dtype", ("f32", "f16", "bf16"))
@pytest.mark.parametrize("fields", GRADIENTS, ids=str)
def test_gradients_are_those_of_the_definition(fields, dtype):
    check_gradients(dtype, **fields)


@pytest.mark.parametrize("dtype", ("f32", "bf16"))
@pytest.mark.parametrize("kind", ("[Hs]", "[B,Hs,N]"))
def test_gradients_of_many_tokens(kind, dtype):
    check_gradients(dtype, B=1, N=65536, K=64, V=64, kind=kind)


@pytest.mark.parametrize("dtype", ("f32", "bf16"))
@pytest.mark.parametrize("kind", ("[Hs]", "[B,Hs,N]"))
def test_the_same_bits_of_gradients_every_time(kind, dtype):
    fields = {"N": 3000, "K": 64, "V": 64, "heads": (4, 2, 2), "kind": kind}
    first, again = (check_gradients(dtype, **fields) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def training(**fields):
    """Leaves, the options of a call, d_o, and the gradients that the library itself returns."""
    fields = {"N": 500, "K": 64, "V": 64, "kind": "[B,Hs,N]", "dtype": np.float32} | fields
    arguments, options, (d_o, _) = on_gpu(gradients.problem(**fields))
    want = gradients.backward(arguments, options, (d_o, None))
    return {name: x.requires_grad_() for name, x in arguments.items()}, options, d_o, list(want)


def gradients_of(leaves, options, d_o):
    """The gradients by autograd, as a list. The graph is freed."""
    return list(torch.autograd.grad(linear_attention(**leaves, **options), list(leaves.values()), d_o))


def same_bits(got, want):
    return all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


WAYS = {
    "eager": lambda: linear_attention,
    "compiled": lambda: torch.compile(linear_attention, fullgraph=True, backend="aot_eager"),
    "checkpointed": lambda: partial(checkpoint, linear_attention, use_reentrant=False),
}


@pytest.mark.parametrize("way", WAYS)
def test_autograd_returns_them(way):
    torch._dynamo.reset()
    leaves, options, d_o, want = training()
    WAYS[way]()(**leaves, **options).backward(d_o)
    assert same_bits([x.grad for x in leaves.values()], want)


def test_a_scalar_that_requires_a_gradient():
    p = gradients.problem(N=500, K=64, V=64, dtype=np.float32)
    p[0]["log_decay"] = np.array(-0.1, np.float32)
    leaves, options, d_results = on_gpu(p)
    leaves = {name: x.requires_grad_() for name, x in leaves.items()}
    results = linear_attention(**leaves, **options, return_state=True)
    torch.autograd.backward(results, d_results)
    assert leaves["log_decay"].grad.shape == ()
    for (name, x), want in zip(leaves.items(), gradients.definition(*p), strict=True):
        assert error(x.grad, want) <= gradients.TOLERANCE["f32"], name


def test_a_loss_that_autograd_expands():
    """The gradient of a sum is one number with strides of 0."""
    leaves, options, d_o, _ = training()
    want = gradients_of(leaves, options, torch.ones_like(d_o))
    linear_attention(**leaves, **options).sum().backward()
    assert same_bits([x.grad for x in leaves.values()], want)


def test_autograd_on_another_stream():
    leaves, options, d_o, want = training()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = {name: torch.zeros_like(x) for name, x in leaves.items()}
        busy()
        with torch.no_grad():
            for name, x in leaves.items():
                late[name].copy_(x)
        got = gradients_of({name: x.requires_grad_() for name, x in late.items()}, options, d_o)
    stream.synchronize()
    assert same_bits(got, want)


@pytest.mark.parametrize("kind", ("[Hs]", "[B,Hs,N]"))
def test_a_training_step_is_captured_and_replayed(kind):
    leaves, options, d_o, _ = training(kind=kind)
    graph, got = captured(partial(gradients_of, leaves, options, d_o))
    for factor in (1, -2):
        with torch.no_grad():
            leaves["v"].mul_(factor)
            for x in got:
                x.fill_(float("nan"))
        graph.replay()
        assert same_bits(got, gradients_of(leaves, options, d_o))


def test_float64_has_no_gradients_here():
    leaves, options, (d_o, _) = on_gpu(gradients.problem())
    o = linear_attention(**{name: x.requires_grad_() for name, x in leaves.items()}, **options)
    with pytest.raises(NotImplementedError, match="gradients of float64 on the CPU only; expected float32"):
        o.backward(d_o)


# ---- generation ----------------------------------------------------------------------------------


def decode_inputs(B=5, Hq=4, Hs=2, T=None, K=64, V=32, slots=9, dtype=torch.bfloat16, pool=torch.float32):
    generator = torch.Generator().manual_seed(0)
    tokens = () if T is None else (T,)
    q = torch.randn(B, Hq, *tokens, K, generator=generator).to(dtype)
    k = torch.randn(B, Hs, *tokens, K, generator=generator).to(dtype)
    v = torch.randn(B, Hs, *tokens, V, generator=generator).to(dtype)
    state = torch.randn(slots, Hs, K, V, generator=generator).to(pool)
    return q, k, v, state, -torch.rand(Hs, generator=generator)


def host(x):
    return x.double().numpy()


@pytest.mark.parametrize("tokens", [None, 1, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_decode_updates_the_pool(dtype, tokens):
    q, k, v, state, decay = decode_inputs(T=tokens, dtype=dtype)
    slots = np.array([3, -1, 0, 8, 5], np.int32)
    want, want_pool = reference.decode_step(*map(host, (q, k, v, state, decay)), state_indices=slots)
    pool = state.to(DEVICE)
    o = leetcore.decode_step(
        *(x.to(DEVICE) for x in (q, k, v)), pool, decay.to(DEVICE), state_indices=torch.from_numpy(slots).to(DEVICE)
    )
    tolerance = TOLERANCE[str(dtype).split(".")[1]]
    assert error(o, want) <= tolerance[0] and error(pool, want_pool) <= tolerance[1]
    assert not o[1].any()
    rest = [i for i in range(9) if i not in slots]
    assert torch.equal(pool[rest].cpu(), state[rest])


@pytest.mark.parametrize("pool", [torch.float16, torch.bfloat16], ids=str)
def test_decode_with_a_pool_of_16_bits(pool):
    q, k, v, state, decay = decode_inputs(dtype=torch.float32, pool=pool, slots=5)
    want, want_pool = reference.decode_step(*map(host, (q, k, v, state, decay)))
    given = state.to(DEVICE)
    o = leetcore.decode_step(*(x.to(DEVICE) for x in (q, k, v)), given, decay.to(DEVICE))
    tolerance = TOLERANCE[str(pool).split(".")[1]]
    assert error(o, want) <= tolerance[0] and error(given, want_pool) <= tolerance[1]


def test_slots_outside_of_the_pool_are_skipped():
    q, k, v, state, decay = (x.to(DEVICE) for x in decode_inputs(B=3, slots=4))
    before = state.clone()
    slots = torch.tensor([4, -7, 2147483647], dtype=torch.int32, device=DEVICE)
    assert not leetcore.decode_step(q, k, v, state, decay, state_indices=slots).any()
    assert torch.equal(state, before)


def test_generation_under_a_graph_equals_one_prefill():
    N, prompt = 40, 30
    case = Case(N, 64, 64, "float32", "mixed", B=2, heads=(4, 4, 4))
    _, given, tensors = arguments(case)
    q, k, v, decay, scale = (tensors[name] for name in ("q", "k", "v", "log_decay", "scale"))
    part = [x[:, :, :prompt] for x in (q, k, v)]
    o, state = leetcore.linear_attention(*part, decay, scale=scale, return_state=True)
    kept = state.clone()
    token = [x[:, :, prompt].contiguous() for x in (q, k, v)]
    graph, step = captured(lambda: leetcore.decode_step(*token, state, decay, scale=scale))
    state.copy_(kept)
    outputs = [o]
    for t in range(prompt, N):
        for to, x in zip(token, (q, k, v), strict=True):
            to.copy_(x[:, :, t])
        graph.replay()
        outputs.append(step.clone().unsqueeze(2))
    want, want_state = case.expected(given)
    assert error(torch.cat(outputs, 2), want) <= TOLERANCE["float32"][0]
    assert error(state, want_state) <= TOLERANCE["float32"][1]


# ---- what goes wrong, and other libraries --------------------------------------------------------


def test_places_are_refused_by_name():
    _, _, tensors = arguments()
    for name in ("k", "v", "log_decay", "initial_state"):
        with pytest.raises(ValueError, match=rf"^{name}: expected on CUDA device 0 like q, got the CPU"):
            leetcore.linear_attention(**{**tensors, name: tensors[name].cpu()})
    with pytest.raises(ValueError, match=r"^log_decay: expected on the CPU as every scalar, got CUDA device 0"):
        leetcore.linear_attention(**{**tensors, "log_decay": torch.tensor(-0.1, device=DEVICE)})


def test_bounds_outside_of_the_tokens_touch_nothing_else(method):
    q = torch.randn(1, 2, 90, 32, device=DEVICE)
    for bounds in ([0, 90, 60], [-7, 60, 1000], [500, 700, 900]):
        o = torch.zeros_like(q)
        try:
            leetcore.linear_attention(
                q, q, q, -0.1, cu_seqlens=torch.tensor(bounds, device=DEVICE), method=method, out=o
            )
        except NotImplementedError:
            pytest.skip("refused, with a reason")
        torch.cuda.synchronize()
        assert o.isfinite().all()


def test_the_readme_runs():
    text = (Path(__file__).parent.parent / "README.md").read_text()
    (block,) = re.findall(r"```python gpu\n(.*?)```", text, re.S)
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["o"].isfinite().all() and names["o1"].isfinite().all()


def test_the_gpu_is_named():
    facts = leetcore.build_info()["cuda"]
    assert torch.cuda.get_device_name(0) in facts
    assert leetcore.cost(N=1000, K=64, H=8, device="cuda").method in METHODS


@pytest.mark.skipif(not importlib.util.find_spec("cupy"), reason="needs cupy")
def test_cupy(method):
    import cupy

    case = Case(300, 64, 64, "float32", "mixed", state=True)
    given = case.arguments()
    want, want_state = case.expected(given)
    arrays = {name: cupy.asarray(x) if isinstance(x, np.ndarray) else x for name, x in given.items()}
    with cupy.cuda.Stream(non_blocking=True) as current:
        cupy.cuda.get_current_stream().wait_event(cupy.cuda.Stream.null.record())
        o, state = serve(method, **arrays)
        assert isinstance(o, cupy.ndarray)
        current.synchronize()
    assert error(torch.from_numpy(o.get()), want) <= TOLERANCE["float32"][0]
    assert error(torch.from_numpy(state.get()), want_state) <= TOLERANCE["float32"][1]
    other = cupy.cuda.Stream(non_blocking=True)
    o, state = serve(method, **arrays, stream=other)
    other.synchronize()
    assert error(torch.from_numpy(o.get()), want) <= TOLERANCE["float32"][0]


def jax_on_gpu():
    if not importlib.util.find_spec("jax"):
        return False
    import jax

    return jax.default_backend() == "gpu"


@pytest.mark.skipif(not (usable and jax_on_gpu()), reason="needs jax for GPUs")
def test_jax(method):
    import jax
    import jax.numpy as jnp

    case = Case(300, 64, 64, "float32", "mixed", state=True)
    given = case.arguments()
    want, want_state = case.expected(given)
    for _ in range(5):
        arrays = {name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in given.items()}
        arrays["q"] = arrays["q"] * 2 / 2  # still being computed when the call receives it
        o, state = serve(method, **arrays)
        assert isinstance(o, jax.Array)
        del arrays
        twice = jax.jit(lambda x: x * 2)(o)
        assert error(torch.from_numpy(np.array(twice)), 2 * want) <= TOLERANCE["float32"][0]
        assert error(torch.from_numpy(np.array(state)), want_state) <= TOLERANCE["float32"][1]
