"""Arrays on a GPU, tested without one: fake libraries (fake_gpu.py) on the emulated devices.

ctest runs these with the extension module that is built on the emulator; LEETCORE_EMULATED_CORE is
its path. One file: all its tests share the fake libraries and one emulated module.
"""

import gc
import importlib.util
import os
import sys
import weakref

import fake_gpu
import gradients
import leetcore
import leetcore.torch.ops
import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import TOLERANCE
from fake_gpu import CuPyArray, CuPyStream, JaxArray, JaxDevice, OldArray, OtherArray, TorchArray, TorchStream, emulator
from leetcore import reference
from leetcore.compat.leetdecoding import causal_linear_decoder
from leetcore.torch.inputs import BackwardInputs

CORE = os.environ.get("LEETCORE_EMULATED_CORE")
pytestmark = pytest.mark.skipif(not CORE, reason="needs the emulated extension module: ctest runs this")

KINDS = {
    "torch": (fake_gpu.torch_array, TorchArray),
    "cupy": (CuPyArray, CuPyArray),
    "jax": (JaxArray, JaxArray),
    "other": (OtherArray, OtherArray),
    "old": (OldArray, OtherArray),
}
DECAY = np.float32([-0.1, -0.5])


@pytest.fixture(scope="module")
def core():
    spec = importlib.util.spec_from_file_location("emulated._core", CORE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    emulator.use(CORE)
    return module


@pytest.fixture(autouse=True)
def gpu(monkeypatch, core):
    for module in ("api", "arrays", "choice", "mamba2", "methods"):
        monkeypatch.setattr(sys.modules[f"leetcore.{module}"], "_core", core)
    monkeypatch.setattr(leetcore.arrays, "_of_type", dict(leetcore.arrays._of_type))
    fake_gpu.install(monkeypatch)
    emulator.forget()


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def inputs(dtype=np.float32, shape=(1, 2, 40, 8), seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for _ in range(3)]


def host(array):
    if not isinstance(array, TorchArray):
        return array.host
    return fake_gpu._bits(array)


def error(got, want):
    return np.linalg.norm(host(got).astype(np.float64) - want) / np.linalg.norm(want)


def methods():
    return [m.name for m in leetcore.methods() if m.device == "cuda"]


def serve(*args, **kwargs):
    try:
        return leetcore.linear_attention(*args, **kwargs)
    except NotImplementedError as refusal:
        assert "does not serve this problem" in str(refusal)
        return None


def test_gives_back_the_callers_kind_on_the_same_device(kind):
    make, result = kind
    given = [*inputs(), DECAY, np.random.default_rng(1).standard_normal((1, 2, 8, 8), dtype=np.float32)]
    before = [x.copy() for x in given]
    want, want_state = reference.linear_attention(*given[:4], initial_state=given[4])
    q, k, v, g, s = (make(x, 1) for x in given)
    o, state = leetcore.linear_attention(q, k, v, g, initial_state=s, return_state=True)
    assert type(o) is type(state) is result
    assert o.number == state.number == emulator.device == 1
    assert error(o, want) < TOLERANCE["f32"][0] and error(state, want_state) < TOLERANCE["f32"][1]
    assert all(np.array_equal(x, y) for x, y in zip(given, before, strict=True))


def test_every_method_and_dtype():
    served = set()
    for short, dtype in {"f64": "f8", "f32": "f4", "f16": "f2", "bf16": ml_dtypes.bfloat16}.items():
        q, k, v = inputs(dtype)
        exact = np.float64 if short == "f64" else np.float32
        want, want_state = reference.linear_attention(q, k, v, DECAY)
        given = [CuPyArray(x) for x in (q, k, v, DECAY.astype(exact))]
        for method in methods():
            answer = serve(*given, method=method, return_state=True)
            if answer is None:
                continue
            o, state = answer
            assert o.dtype == dtype and state.dtype == exact
            assert error(o, want) < TOLERANCE[short][0] and error(state, want_state) < TOLERANCE[short][1]
            served.add((method, short))
    assert {method for method, _ in served} == set(methods())
    assert {short for _, short in served} == {"f64", "f32", "f16", "bf16"}


def test_packed_sequences_and_layouts():
    q, k, v = inputs(shape=(1, 40, 2, 8))
    bounds = np.int32([0, 7, 7, 40])
    want, want_state = reference.linear_attention(q, k, v, DECAY, cu_seqlens=bounds, layout="bnhd")
    given = [CuPyArray(x) for x in (q, k, v, DECAY)]
    o, state = leetcore.linear_attention(*given, cu_seqlens=CuPyArray(bounds), layout="bnhd", return_state=True)
    assert error(o, want) < TOLERANCE["f32"][0] and error(state, want_state) < TOLERANCE["f32"][1]


def test_out_is_written_where_it_lies(kind):
    make, _ = kind
    q, k, v = inputs()
    out = make(np.full_like(q, np.nan))
    call = {"q": make(q), "k": make(k), "v": make(v), "log_decay": -0.1, "out": out}
    if isinstance(out, JaxArray):
        with pytest.raises(TypeError, match=r"^out: expected an array that can be written, got one of jax"):
            leetcore.linear_attention(**call)
        return
    assert leetcore.linear_attention(**call) is out
    assert error(out, reference.linear_attention(q, k, v, np.float64(-0.1))[0]) < TOLERANCE["f32"][0]


def test_a_scattered_array_is_copied_on_its_device(kind):
    make, _ = kind
    q, k, v = inputs()
    wide = np.zeros((1, 2, 40, 16), np.float32)
    wide[..., ::2] = q
    scattered = make(wide)[..., ::2] if make is fake_gpu.torch_array else make(wide[..., ::2])
    o = leetcore.linear_attention(scattered, make(k), make(v), -0.1)
    assert error(o, reference.linear_attention(q, k, v, np.float64(-0.1))[0]) < TOLERANCE["f32"][0]


def test_decode_updates_the_pool_in_place():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((3, 2, 8), dtype=np.float32) for _ in range(3))
    pool, slots = rng.standard_normal((4, 2, 8, 8), dtype=np.float32), np.int32([2, -1, 0])
    want, want_pool = reference.decode_step(q, k, v, pool, DECAY, state_indices=slots)
    for make, result in (KINDS["torch"], KINDS["cupy"]):
        state = make(pool.copy())
        call = [make(x) for x in (q, k, v)]
        o = leetcore.decode_step(*call, state, make(DECAY), state_indices=make(slots))
        assert type(o) is result and error(o, want) < TOLERANCE["f32"][0]
        assert error(state, want_pool) < TOLERANCE["f32"][1]
    q, k, v, state = (JaxArray(x) for x in (q, k, v, pool))
    with pytest.raises(TypeError, match=r"^state: expected an array that can be written, got one of jax"):
        leetcore.decode_step(q, k, v, state, -0.1)


# ---- Mamba-2 -------------------------------------------------------------------------------------


def of_mamba2(N=70, seed=0):
    rng = np.random.default_rng(seed)
    sizes = {"x": (1, N, 4, 16), "dt": (1, N, 4), "B": (1, N, 2, 8), "C": (1, N, 2, 8), "z": (1, N, 4, 16)}
    given = {name: rng.standard_normal(size, dtype=np.float32) for name, size in sizes.items()}
    given["A"] = -np.exp(rng.standard_normal(4, dtype=np.float32))
    given["D"], given["dt_bias"] = rng.standard_normal((2, 4), dtype=np.float32)
    given["initial_state"] = rng.standard_normal((1, 4, 16, 8), dtype=np.float32)
    return given


def test_ssd_gives_back_the_callers_kind(kind):
    make, result = kind
    given = of_mamba2()
    want, want_state = reference.ssd(**given, dt_softplus=True, dt_limit=(0.1, 2.0))
    there = {name: make(x) for name, x in given.items()}
    y, state = leetcore.ssd(**there, dt_softplus=True, dt_limit=(0.1, 2.0), return_state=True)
    assert type(y) is type(state) is result and emulator.launches
    assert error(y, want) < TOLERANCE["f32"][0] and error(state, want_state) < TOLERANCE["f32"][1]


def test_ssd_step_updates_the_pool_in_place():
    given = of_mamba2(N=1)
    want, want_state = reference.ssd(**given, dt_softplus=True)
    given = {name: x[:, 0] if x.ndim > 2 and name != "initial_state" else x for name, x in given.items()}
    for make, result in (KINDS["torch"], KINDS["cupy"]):
        there = {name: make(x.copy()) for name, x in given.items()}
        state = there.pop("initial_state")
        y = leetcore.ssd_step(**there, state=state, dt_softplus=True)
        assert type(y) is result and error(y, want[:, 0]) < TOLERANCE["f32"][0]
        assert error(state, want_state) < TOLERANCE["f32"][1]


def test_gradients_of_ssd_are_those_of_the_cpu(monkeypatch, core):
    given = of_mamba2()
    names = ("x", "dt", "A", "B", "C", "dt_bias", "initial_state")
    options = {
        "d_y": np.random.default_rng(1).standard_normal((1, 70, 4, 16), dtype=np.float32),
        "d_final_state": np.ones((1, 4, 16, 8), np.float32),
        "dt_softplus": True,
        "dt_limit": (0.1, 2.0),
        "wants": (True,) * 6,
    }
    there = {name: CuPyArray(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    got = leetcore.mamba2.core_gradients(*(CuPyArray(given[name]) for name in names), None, **there)
    assert emulator.launches
    monkeypatch.setattr(leetcore.mamba2, "_core", leetcore._core)
    monkeypatch.setattr(leetcore.arrays, "_core", leetcore._core)
    want = leetcore.mamba2.core_gradients(*(given[name] for name in names), None, **options)
    for x, y in zip(got, want, strict=True):
        assert error(x, y.astype(np.float64)) < 2e-5


# ---- gradients -----------------------------------------------------------------------------------


def moved(make, p):
    """The arguments of a problem of gradients.py, on the GPU."""
    arguments, options, d_results = p
    arguments = {name: make(x) if isinstance(x, np.ndarray) else x for name, x in arguments.items()}
    bounds = options["cu_seqlens"]
    return arguments, options | {"cu_seqlens": None if bounds is None else make(bounds)}, list(map(make, d_results))


@pytest.mark.parametrize("decay", ["[Hs]", "[B,Hs,N]"])
def test_gradients_are_those_of_the_cpu(kind, decay):
    make, result = kind
    p = gradients.problem(N=70, K=8, V=8, dtype=np.float32, kind=decay)
    got, want = gradients.backward(*moved(make, p)), gradients.definition(*p)
    assert emulator.launches
    for name, x, y in zip(got._fields, got, want, strict=True):
        assert type(x) is result and x.number == 0 and host(x).shape == y.shape, name
        assert error(x, y) <= gradients.TOLERANCE["f32"], name


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16])
def test_gradients_of_16_bits(dtype):
    p = gradients.problem(heads=(4, 2, 1), K=8, V=16, dtype=dtype, lengths=[5, 0, 66], layout="bnhd", kind="[B,Hs,N]")
    short = "f16" if dtype == "float16" else "bf16"
    got, want = gradients.backward(*moved(CuPyArray, p)), gradients.definition(*p)
    for name, x, y in zip(got._fields, got, want, strict=True):
        assert x.dtype == (np.float32 if name in ("d_log_decay", "d_initial_state") else dtype)
        assert error(x, y) <= gradients.tolerance(name, short), name


def test_the_gradient_of_a_scalar_is_on_the_device(kind):
    make, result = kind
    arguments, options, d_results = gradients.problem(dtype=np.float32)
    p = arguments | {"log_decay": -0.1}, options, d_results
    got, want = gradients.backward(*moved(make, p)).d_log_decay, gradients.definition(*p).d_log_decay
    assert type(got) is result and got.number == 0 and host(got).shape == () and error(got, want) <= 2e-5


def test_gradients_go_to_the_stream_and_allocate_there():
    arguments, options, d_results = moved(fake_gpu.torch_array, gradients.problem(dtype=np.float32))
    TorchStream.current = TorchStream(0x70)
    gradients.backward(arguments, options, d_results)
    assert emulator.stream == 0x70 and TorchStream.events == []
    fake_gpu.reset()
    gradients.backward(arguments, options, d_results, stream=0x90)
    assert emulator.stream == 0x90 and TorchStream.events[0] == ("wait", 0x90, 0x70)
    assert {stream for _, stream, _ in fake_gpu.made} == {0x90} == set(fake_gpu.exports)
    read = {shape for event, shape, stream in TorchStream.events if event == "record" and stream == 0x90}
    assert {tuple(x.shape) for x in (*arguments.values(), *d_results)} <= read


def test_gradients_that_a_gpu_does_not_have():
    arguments, options, d_results = moved(fake_gpu.torch_array, gradients.problem())
    with pytest.raises(NotImplementedError, match="chunk: does not compute in float64 on a GPU; on the CPU it does"):
        gradients.backward(arguments, options, d_results)
    with pytest.raises(NotImplementedError, match=r"^linear_attention has gradients of float64 .* expected float32"):
        inputs = *arguments.values(), None, *d_results, 1.0, "bhnd", False, 5 * [True]
        leetcore.torch.ops._backward(BackwardInputs(*inputs))
    assert emulator.launches == 0


@pytest.mark.parametrize("place", [0, 1])
def test_gradients_of_two_places_are_refused(place):
    p = gradients.problem(dtype=np.float32)
    arguments, options, d_results = moved(fake_gpu.torch_array, p)
    d_results[place] = torch.from_numpy(p[2][place])
    name = ("d_o", "d_final_state")[place]
    with pytest.raises(ValueError, match=rf"^{name}: expected on CUDA device 0 like q, got the CPU"):
        gradients.backward(arguments, options, d_results)
    assert emulator.launches == 0


# ---- streams -------------------------------------------------------------------------------------


def call(make, **options):
    q, k, v = inputs()
    o, _ = leetcore.linear_attention(make(q), make(k), make(v), make(DECAY), return_state=True, **options)
    assert emulator.launches
    assert error(o, reference.linear_attention(q, k, v, DECAY)[0]) < TOLERANCE["f32"][0]
    return o


@pytest.mark.parametrize("current", [0, 0x70])
def test_torch_current_stream(current):
    TorchStream.current = TorchStream(current or 8)
    TorchStream.current.cuda_stream = current
    call(fake_gpu.torch_array)
    assert emulator.stream == current
    assert TorchStream.events == []  # no stream waits, nothing is recorded
    assert {stream for _, stream, _ in fake_gpu.made} == {current}
    call(fake_gpu.torch_array, stream=current)
    assert TorchStream.events == []


@pytest.mark.parametrize("stream, number", [(0x90, 0x90), (0, 0), (1, 0), (2, 2)])
def test_torch_another_stream(stream, number):
    TorchStream.current = TorchStream(0x70)
    call(fake_gpu.torch_array, stream=stream)
    assert emulator.stream == number
    assert TorchStream.events[0] == ("wait", number, 0x70)  # before anything is made or read
    assert TorchStream.events[1:4] == 3 * [("record", (1, 2, 40, 8), number)]
    assert {event[0] for event in TorchStream.events} == {"wait", "record"}
    assert {made for _, made, _ in fake_gpu.made} == {number} == set(fake_gpu.exports)
    assert TorchStream.current.cuda_stream == 0x70


@pytest.mark.parametrize("current, given", [(0, 1), (0x70, 0x70)])
def test_cupy_current_stream(current, given):
    CuPyStream.current = CuPyStream(current)
    call(CuPyArray)
    assert emulator.stream == current and set(fake_gpu.exports) == {given}
    assert CuPyStream.waits == []
    assert {stream for _, stream, _ in fake_gpu.made} == {current}


def test_cupy_another_stream():
    CuPyStream.current = CuPyStream(0x70)
    call(CuPyArray, stream=CuPyStream(0x90))
    assert emulator.stream == 0x90 and set(fake_gpu.exports) == {0x90}
    assert set(CuPyStream.waits) == {(0x90, 0x70)}
    assert {stream for _, stream, _ in fake_gpu.made} == {0x90}
    assert CuPyStream.current.ptr == 0x70 and fake_gpu.CuPyDevice.current == 0


@pytest.mark.parametrize("make", [OtherArray, OldArray])
def test_the_stream_of_other_libraries(make):
    call(make)
    assert emulator.stream == 0 and set(fake_gpu.exports) == {1}  # the legacy default stream has two names
    fake_gpu.exports.clear()
    call(make, stream=0x90)
    assert emulator.stream == 0x90 and set(fake_gpu.exports) == {0x90}


def test_jax_orders_by_the_stream_that_it_waits_on():
    call(JaxArray)
    assert emulator.stream == JaxDevice.external and set(fake_gpu.exports) == {JaxDevice.external}
    with pytest.raises(ValueError, match=r"^stream: expected None with jax arrays"):
        call(JaxArray, stream=0x90)


def test_results_of_jax_hold_the_inputs():
    q, k, v = (JaxArray(x) for x in inputs())
    watched = weakref.ref(q)
    o = leetcore.linear_attention(q, k, v, -0.1)
    del q, k, v
    gc.collect()
    assert watched() is not None
    del o
    gc.collect()
    assert watched() is None


@pytest.mark.parametrize("make", [fake_gpu.torch_array, CuPyArray, OtherArray])
def test_arrays_of_others_are_let_go(make):
    given = [make(x) for x in inputs()]
    watched = [weakref.ref(x) for x in given]
    o = leetcore.linear_attention(*given, -0.1)
    del given
    gc.collect()
    assert o is not None and not any(x() for x in watched)


class Named:
    def __init__(self, **names):
        self.__dict__ |= names


class Protocol:
    def __cuda_stream__(self):
        return 0, 0x90


@pytest.mark.parametrize("stream", [0x90, Protocol(), Named(cuda_stream=0x90), Named(ptr=0x90)])
def test_what_a_stream_may_be(stream):
    call(OtherArray, stream=stream)
    assert emulator.stream == 0x90


@pytest.mark.parametrize("stream", [True, -1, 1.5, "0x90", Named(ptr=None)])
@pytest.mark.parametrize("make", [fake_gpu.torch_array, CuPyArray, OtherArray, np.asarray])
def test_what_a_stream_may_not_be(make, stream):
    with pytest.raises(TypeError, match=r"^stream: expected None, a cudaStream_t as a number, or a stream of"):
        call(make, stream=stream)


def test_host_arrays_stay_on_the_host_and_have_no_stream():
    q, k, v = inputs()
    leetcore.linear_attention(q, k, v, -0.1)
    leetcore.linear_attention(*map(torch.from_numpy, (q, k, v)), -0.1)
    assert emulator.launches == 0 and fake_gpu.made == []
    for make in (np.asarray, torch.from_numpy):
        with pytest.raises(ValueError, match=r"^stream: expected NULL for tensors on the CPU"):
            leetcore.linear_attention(*map(make, (q, k, v)), -0.1, stream=1)


def test_scratch_is_an_array_of_the_caller():
    shape = {"B": 1, "H": 2, "N": 300, "K": 8}
    needy = [m for m in methods() if leetcore.cost(m, **shape, device="cuda").workspace]
    assert needy
    for make in (fake_gpu.torch_array, CuPyArray, OtherArray, JaxArray):
        q, k, v = inputs(shape=(1, 2, 300, 8))
        fake_gpu.made.clear()
        o = leetcore.linear_attention(make(q), make(k), make(v), -0.1, method=needy[0])
        assert error(o, reference.linear_attention(q, k, v, np.float64(-0.1))[0]) < TOLERANCE["f32"][0]
        bytes = leetcore.cost(needy[0], **shape, device="cuda").workspace
        assert [shape for shape, *_ in fake_gpu.made] == [(1, 2, 300, 8), ((bytes + 3) // 4,)]


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["k", "v", "log_decay", "initial_state", "cu_seqlens", "out"])
@pytest.mark.parametrize("to", ["host", 1])
def test_arrays_of_two_places_are_refused(place, to):
    q, k, v = inputs()
    given = {"q": q, "k": k, "v": v, "log_decay": DECAY, "initial_state": np.zeros((1, 2, 8, 8), "f4")}
    given |= {"cu_seqlens": np.int32([0, 40]), "out": np.zeros_like(q)}
    moved = torch.from_numpy(given[place]) if to == "host" else fake_gpu.torch_array(given[place], to)
    given = {name: fake_gpu.torch_array(x) for name, x in given.items()} | {place: moved}
    where = "the CPU" if to == "host" else "CUDA device 1"
    with pytest.raises(ValueError, match=rf"^{place}: expected on CUDA device 0 like q, got {where}"):
        leetcore.linear_attention(given.pop("q"), **given)
    assert emulator.launches == 0


def test_a_host_array_does_not_take_gpu_arrays():
    q, k, v = inputs()
    with pytest.raises(ValueError, match=r"^k: expected on the CPU like q, got CUDA device 0"):
        leetcore.linear_attention(torch.from_numpy(q), fake_gpu.torch_array(k), torch.from_numpy(v))
    with pytest.raises(TypeError, match=r"^k: expected an array of numpy like q, got one of cupy"):
        leetcore.linear_attention(q, CuPyArray(k), v)
    with pytest.raises(TypeError, match=r"^k: expected an array of cupy like q, got one of numpy"):
        leetcore.linear_attention(CuPyArray(q), k, CuPyArray(v))


def test_scalars_are_on_the_host():
    q, k, v = map(fake_gpu.torch_array, inputs())
    want = reference.linear_attention(*inputs(), np.float64(-0.1))[0]
    for scalar in (-0.1, torch.tensor(-0.1), np.float64(-0.1)):
        assert error(leetcore.linear_attention(q, k, v, scalar), want) < TOLERANCE["f32"][0]
    with pytest.raises(ValueError, match=r"^log_decay: expected on the CPU as every scalar, got CUDA device 0"):
        leetcore.linear_attention(q, k, v, fake_gpu.torch_array(np.float32(-0.1)))


def test_no_such_device():
    q, k, v = (CuPyArray(x, 7) for x in inputs())
    with pytest.raises(RuntimeError, match=r"^CUDA device 7: expected one of 2 devices"):
        leetcore.linear_attention(q, k, v)


def test_an_export_that_fails_names_the_argument():
    class Stubborn(OtherArray):
        __module__ = "fakelib"

        def __dlpack__(self, **_):
            raise BufferError("not today")

    q, k, v = inputs()
    with pytest.raises(BufferError, match=r"^k: not today"):
        leetcore.linear_attention(OtherArray(q), Stubborn(k), OtherArray(v))


def test_read_only_inputs_are_welcome_and_outputs_refused():
    q, k, v = inputs()
    o = leetcore.linear_attention(*map(fake_gpu.ReadOnlyArray, (q, k, v)), -0.1)
    assert error(o, reference.linear_attention(q, k, v, np.float64(-0.1))[0]) < TOLERANCE["f32"][0]
    with pytest.raises(ValueError, match=r"^out: expected a writable array, got a read-only one"):
        leetcore.linear_attention(*map(OtherArray, (q, k, v)), -0.1, out=fake_gpu.ReadOnlyArray(np.zeros_like(q)))


def test_a_library_that_cannot_make_arrays_is_refused():
    class Bare(fake_gpu.Array):
        __module__ = "barelib"
        device = "gpu:0"

    q, k, v = map(Bare, inputs())
    with pytest.raises(TypeError, match=r"^q: expected an array of torch, cupy, jax or a library with __array_names"):
        leetcore.linear_attention(q, k, v)


# ---- around it -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["torch", "cupy", "jax"])
def test_registered_methods_and_the_migration_call(kind, monkeypatch):
    make, result = KINDS[kind]
    q, k, v = inputs()
    given = [make(x) for x in (q, k, v)]
    want = reference.linear_attention(q, k, v, DECAY)[0]
    o = causal_linear_decoder(*given, True, 0.25)
    assert type(o) is result and emulator.launches == 1  # gamma is a number: the host reads nothing from the GPU
    fake_gpu.readable = True
    leetcore.register_method("mine", lambda *x: reference.linear_attention(*x[:4], scale=x[4])[0].astype("f4"))
    try:
        o = leetcore.linear_attention(*given, make(DECAY), method="mine")
        assert type(o) is result and error(o, want) < TOLERANCE["f32"][0]
        if kind != "jax":
            out = make(np.zeros_like(q))
            assert leetcore.linear_attention(*given, make(DECAY), method="mine", out=out) is out
            assert error(out, want) < TOLERANCE["f32"][0]
    finally:
        leetcore.unregister_method("mine")
    o = causal_linear_decoder(*given, True, make(-DECAY))
    assert type(o) is result and error(o, want) < TOLERANCE["f32"][0]


def test_costs_and_choices_on_a_gpu():
    rows = leetcore.methods()
    assert {m.device for m in rows} == {"cpu", "cuda"}
    cost = leetcore.cost(H=2, N=40, K=8, device="cuda")
    assert cost.method in methods() and cost.microseconds > 0
    choice = leetcore.candidates(*map(CuPyArray, inputs()), -0.1)
    assert [(c.method, c.device) for c in choice.all] == [(m.name, m.device) for m in rows]
    assert choice.chosen.device == "cuda" and choice.chosen.refusal is None
    assert all(c.refusal == "is for another device" for c in choice.all if c.device == "cpu")
    assert leetcore.explain(*map(CuPyArray, inputs()), -0.1).count("\n*") == 1
    assert emulator.launches == 0
    with pytest.raises(ValueError, match=r"^device: expected 'cpu' or 'cuda', got 'gpu'"):
        leetcore.cost(N=4, K=4, device="gpu")
