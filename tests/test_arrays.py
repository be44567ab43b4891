"""Arrays of every library: the result is of the same library, without copies or conversions.

One file: every test runs for every library.
"""

import gc
import os
import threading
import time
from functools import partial

import jax
import jax.numpy as jnp
import leetcore
import leetcore.torch
import ml_dtypes
import numpy as np
import pytest
import torch
from fake_gpu import OtherArray
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

DECAY = -0.1
attend = partial(leetcore.linear_attention, method="chunk")  # bitwise comparisons need one method


def arrays(dtype=np.float32, shape=(1, 2, 9, 8), seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for _ in range(3)]


def expected(dtype=np.float32):
    return attend(*arrays(dtype), DECAY, return_state=True)


class Producer:
    """A minimal array library: DLPack export of memory that numpy owns."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **kwargs):
        return self.array.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


KINDS = {
    "numpy": (np.asarray, np.ndarray),
    "torch": (torch.from_numpy, torch.Tensor),
    "jax": (jnp.asarray, jax.Array),
    "other": (Producer, np.ndarray),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["f32", "f16"])
def test_gives_back_the_callers_kind(kind, dtype):
    make, result = KINDS[kind]
    o, state = attend(*map(make, arrays(dtype)), DECAY, return_state=True)
    want, want_state = expected(dtype)
    assert isinstance(o, result) and isinstance(state, result)
    assert np.array_equal(np.asarray(o), want) and np.asarray(o).dtype == dtype
    assert np.array_equal(np.asarray(state), want_state) and np.asarray(state).dtype == np.float32


def test_bfloat16_of_every_library():
    q, k, v = arrays(ml_dtypes.bfloat16)
    want = attend(q, k, v, DECAY)
    assert want.dtype == ml_dtypes.bfloat16
    as_torch = [torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) for x in (q, k, v)]
    o = attend(*as_torch, DECAY)
    assert o.dtype == torch.bfloat16 and np.array_equal(o.view(torch.int16).numpy(), want.view(np.int16))
    o = attend(*map(jnp.asarray, (q, k, v)), DECAY)
    assert o.dtype == jnp.bfloat16 and np.array_equal(np.asarray(o).view(np.int16), want.view(np.int16))
    for x in (q, k, v):
        x.flags.writeable = False
    assert np.array_equal(attend(q, k, v, DECAY), want)
    out = np.empty_like(want)
    assert attend(q, k, v, DECAY, out=out) is out and np.array_equal(out, want)


def test_read_only_inputs_are_welcome_and_outputs_refused():
    q, k, v = arrays()
    for x in (q, k, v):
        x.flags.writeable = False
    assert np.array_equal(attend(q, k, v, DECAY), expected()[0])
    out = np.full_like(q, 7)
    out.flags.writeable = False
    with pytest.raises(ValueError, match=r"^out: .*read-only"):
        attend(q, k, v, DECAY, out=out)
    assert (out == 7).all()


@pytest.mark.parametrize("place", ["k", "v", "log_decay", "initial_state", "out"])
def test_mixed_kinds_are_refused(place):
    q, k, v = arrays()
    given = {"k": k, "v": v, "log_decay": np.float32([-0.1, -0.1]), "initial_state": np.zeros((1, 2, 8, 8), "f4")}
    given["out"] = np.full_like(q, 7)
    given[place] = torch.from_numpy(given[place])
    with pytest.raises(TypeError, match=rf"^{place}: expected an array of numpy like q, got one of torch"):
        attend(q, **given)
    assert (np.asarray(given["out"]) == 7).all()


@pytest.mark.parametrize("bad", [None, [1.0], "q", 3.0, object()], ids=lambda x: type(x).__name__)
def test_what_is_no_array_is_refused(bad):
    q, k, v = arrays()
    with pytest.raises(TypeError, match=r"^q: expected an array"):
        attend(bad, k, v)
    with pytest.raises((TypeError, ValueError), match=r"^k: "):
        attend(q, bad, v)


@pytest.mark.parametrize("dtype", ["int32", "int64", "bool", "complex64", "uint8", "object", "U1"])
def test_other_dtypes_are_refused_not_converted(dtype):
    q, k, v = arrays()
    with pytest.raises(TypeError, match=r"^q: expected dtype float64, float32, float16 or bfloat16, got "):
        attend(q.astype(dtype), k, v)


@pytest.mark.parametrize("place", ["k", "v", "out", "initial_state", "log_decay"])
def test_a_dtype_of_its_own_is_refused_not_converted(place):
    q, k, v = arrays()
    given = {"k": k, "v": v, "log_decay": np.float32([-0.1, -0.1]), "initial_state": np.zeros((1, 2, 8, 8), "f4")}
    given["out"] = np.full_like(q, 7)
    given[place] = given[place].astype(np.float64)
    with pytest.raises(TypeError, match=rf"^{place}: expected dtype float32.*, got float64"):
        attend(q, **given)


def test_negated_and_conjugated_views_have_their_values():
    q, k, v = map(torch.from_numpy, arrays())
    negated = torch._neg_view(q)
    assert negated.is_neg()
    assert torch.equal(attend(negated, k, v, DECAY), -torch.from_numpy(expected()[0]))
    imaginary = torch.complex(q, q).conj().imag  # a negated, strided view
    assert imaginary.is_neg()
    assert torch.equal(attend(imaginary, k, v, DECAY), -torch.from_numpy(expected()[0]))
    with pytest.raises(ValueError, match=r"^out: .*negation"):
        attend(q, k, v, DECAY, out=torch._neg_view(torch.empty_like(q)))


def test_requires_grad_is_refused_unless_gradients_are_off():
    q, k, v = map(torch.from_numpy, arrays())
    q.requires_grad_()
    with pytest.raises(TypeError, match=r"^q: .*detach\(\)"):
        attend(q, k, v, DECAY)
    with torch.no_grad():
        o = attend(q, k, v, DECAY)
    assert torch.equal(o, torch.from_numpy(expected()[0]))


def test_sparse_and_meta_tensors_are_refused():
    q, k, v = map(torch.from_numpy, arrays())
    with pytest.raises(TypeError, match=r"^q: expected a dense tensor"):
        attend(q.to_sparse(), k, v)
    with pytest.raises(TypeError, match=r"^k: expected a tensor on the CPU or a CUDA device, got meta"):
        attend(q, k.to("meta"), v)


# ---- tensors that have no plain memory, each with what to do


def in_dual_level(x):
    with forward_ad.dual_level():
        return attend(forward_ad.make_dual(x, x), x, x)


def distributed(x):
    """A DTensor of one process."""
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    from torch.distributed import tensor

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        d = tensor.distribute_tensor(
            x, torch.distributed.device_mesh.init_device_mesh("cpu", (1,)), [tensor.Replicate()]
        )
        return attend(d, d, d)
    finally:
        torch.distributed.destroy_process_group()


def freed(x):
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def all_three(make):
    return lambda x: attend(make(x), make(x), make(x))


MEMORY = r"expected a tensor with memory of its own, got {}; where torch traces or .* take leetcore\.torch"
DTYPE = "expected dtype float64, float32, float16 or bfloat16, got {}"
WITHOUT_MEMORY = {
    "nested": (
        all_three(lambda x: torch.nested.nested_tensor([x[0], x[0]])),
        "expected a dense tensor, got a nested one; .* cu_seqlens",
    ),
    "jagged": (
        all_three(lambda x: torch.nested.nested_tensor([x[0, 0], x[0, 0, :5]], layout=torch.jagged)),
        "expected a dense tensor, got a nested one; .* cu_seqlens",
    ),
    "sparse": (
        all_three(torch.Tensor.to_sparse),
        r"expected a dense tensor, got layout torch\.sparse_coo; to_dense\(\)",
    ),
    "mkldnn": (all_three(torch.Tensor.to_mkldnn), r"expected a dense tensor, got layout torch\._mkldnn; to_dense\(\)"),
    "fake": (all_three(FakeTensorMode().from_tensor), MEMORY.format("FakeTensor")),
    "vmap": (lambda x: torch.vmap(lambda x: attend(x, x, x))(x[None]), MEMORY.format("one without")),
    "functionalize": (
        lambda x: torch.func.functionalize(lambda x: attend(x, x, x))(x),
        MEMORY.format("one without"),
    ),
    "func.grad": (
        lambda x: torch.func.grad(lambda x: attend(x, x, x).sum())(x),
        r"expected a tensor without requires_grad.*; detach\(\) it, or take leetcore\.torch",
    ),
    "func.jvp": (
        lambda x: torch.func.jvp(lambda x: attend(x, x, x), (x,), (x,)),
        "expected a tensor without a tangent",
    ),
    "dual": (in_dual_level, r"expected a tensor without a tangent, .*unpack_dual"),
    "distributed": (distributed, r"expected a tensor of one process, got DTensor; to_local\(\)"),
    "masked": (all_three(lambda x: torch.masked.masked_tensor(x, x > 0)), MEMORY.format("MaskedTensor")),
    "freed": (all_three(freed), MEMORY.format("one without")),
    "zeros": (all_three(lambda x: torch._efficientzerotensor(x.shape)), MEMORY.format("one without")),
    "quantized": (
        all_three(lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8)),
        DTYPE.format(r"torch\.quint8"),
    ),
    "float8_e4m3fn": (all_three(lambda x: x.to(torch.float8_e4m3fn)), DTYPE.format(r"(torch\.)?float8_e4m3fn$")),
    "float8_e5m2": (all_three(lambda x: x.to(torch.float8_e5m2)), DTYPE.format(r"(torch\.)?float8_e5m2$")),
}


@pytest.mark.parametrize("call, text", WITHOUT_MEMORY.values(), ids=WITHOUT_MEMORY)
@pytest.mark.filterwarnings("ignore:.*(prototype|quantization|quantize|deprecated).*")
def test_tensors_without_plain_memory_are_refused(call, text):
    with pytest.raises(TypeError, match=f"^q: {text}"):
        call(torch.from_numpy(arrays()[0]))


def test_a_proxy_of_fx_is_refused():
    with pytest.raises(TypeError, match=r"^q: expected an array, got a Proxy of torch\.fx.*leetcore\.torch"):
        torch.fx.symbolic_trace(lambda q: attend(q, q, q))


# ---- autograd sees what is written


def in_mode(mode, write):
    def call(x):
        with mode():
            write(x)

    return call


Q = torch.ones(1, 2, 9, 8)
STEP = Q[:, :, 0]


def write_by_method(out):
    leetcore.register_method("ones", lambda q, k, v, log_decay, scale: np.ones_like(v))
    try:
        leetcore.linear_attention(Q, Q, Q, method="ones", out=out)
    finally:
        leetcore.unregister_method("ones")


def write_state(state):
    leetcore.decode_step(STEP, STEP, STEP, state, DECAY)


WRITES = {
    "out": ((1, 2, 9, 8), lambda out: attend(Q, Q, Q, DECAY, out=out)),
    "out of a registered method": ((1, 2, 9, 8), write_by_method),
    "state": ((1, 2, 8, 8), write_state),
    "out of a step": (
        (1, 2, 8),
        lambda out: leetcore.decode_step(STEP, STEP, STEP, torch.zeros(1, 2, 8, 8), DECAY, out=out),
    ),
    "state of a pool": ((3, 2, 8, 8), lambda pool: write_state(pool[1:2])),
    "state in no_grad": ((1, 2, 8, 8), in_mode(torch.no_grad, write_state)),
    "state in inference_mode": ((1, 2, 8, 8), in_mode(torch.inference_mode, write_state)),
    "state of the operator": (
        (1, 2, 8, 8),
        lambda state: leetcore.torch.decode_step(STEP, STEP, STEP, state, DECAY),
    ),
    "state of the operator in inference_mode": (
        (1, 2, 8, 8),
        in_mode(torch.inference_mode, lambda state: leetcore.torch.decode_step(STEP, STEP, STEP, state, DECAY)),
    ),
}


@pytest.mark.parametrize("shape, write", WRITES.values(), ids=WRITES)
def test_autograd_refuses_a_saved_tensor_that_was_written(shape, write):
    tensor, w = torch.zeros(shape), torch.ones(shape, requires_grad=True)
    (w * tensor).sum().backward()  # right before the write
    loss = (w * tensor).sum()
    write(tensor)
    assert tensor.any()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_tensors_have_no_counter_and_are_written():
    with torch.inference_mode():
        state = torch.zeros(1, 2, 8, 8)
        write_state(state)
    for step in (leetcore.decode_step, leetcore.torch.decode_step):
        step(STEP, STEP, STEP, state, DECAY)
    assert state.is_inference() and state.any()


# ---- arrays of numpy and jax that are not what they seem


def packed(dtype):
    return np.zeros((1, 2, 9), [("tag", "u1"), ("q", dtype, (8,))])["q"]


def unaligned(array):
    return np.frombuffer(bytearray(array.nbytes + 1), array.dtype, offset=1, count=array.size).reshape(array.shape)


Q_OF_NUMPY = np.ones((1, 2, 9, 8), np.float32)
SEEMING = {
    "masked": (
        np.ma.masked_less(Q_OF_NUMPY, 2),
        TypeError,
        "expected an array without a mask, got MaskedArray; filled",
    ),
    "packed": (packed("f4"), ValueError, r"expected an aligned array, got a field of a packed struct; copy\(\)"),
    "packed float16": (packed("f2"), ValueError, "expected an aligned array"),
    "packed float64": (packed("f8"), ValueError, "expected an aligned array"),
    "packed bfloat16": (packed(ml_dtypes.bfloat16), ValueError, "expected an aligned array"),
    "unaligned": (
        unaligned(Q_OF_NUMPY),
        ValueError,
        "expected an address that is a multiple of 4, as a copy has, got 0x",
    ),
    "byte order": (Q_OF_NUMPY.astype(">f4"), TypeError, "expected native byte order, got dtype >f4; astype"),
    "float8": (Q_OF_NUMPY.astype(ml_dtypes.float8_e5m2), TypeError, DTYPE.format("float8_e5m2$")),
    "struct": (np.zeros((1, 2, 9, 8), [("a", "f4")]), TypeError, DTYPE.format(r"\[\('a', '<f4'\)\]")),
}


@pytest.mark.parametrize("place", ["q", "v", "out"])
@pytest.mark.parametrize("array, error, text", SEEMING.values(), ids=SEEMING)
def test_arrays_that_are_not_what_they_seem_are_refused(array, error, text, place):
    given = {"q": Q_OF_NUMPY, "k": Q_OF_NUMPY, "v": Q_OF_NUMPY} | {place: array}
    if array.dtype != np.float32 and error is ValueError:  # so that the dtype is not the error
        given |= {name: Q_OF_NUMPY.astype(array.dtype) for name in given if name != place}
    if text.startswith("expected dtype") and place != "q":
        text = text.replace("float64, float32, float16 or bfloat16", ".*")
    with pytest.raises(error, match=f"^{place}: {text}"):
        leetcore.linear_attention(**given)


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")  # np.matrix raises it
def test_subclasses_of_numpy_are_arrays(tmp_path):
    q, k, v = arrays()
    mapped = np.memmap(tmp_path / "q", np.float32, "w+", shape=q.shape)
    mapped[...] = q
    decay = np.matrix([[-0.1, -0.1]], np.float32)  # [B, Hs]
    assert np.array_equal(attend(mapped, k.view(np.recarray), v, decay), expected()[0])


def test_a_deleted_array_of_jax_is_refused():
    q, k, v = map(jnp.asarray, arrays())
    for place in ("q", "v"):
        given = {"q": q, "k": k, "v": v} | {place: jnp.array(q)}
        given[place].delete()  # as a donation to jax.jit does
        with pytest.raises(ValueError, match=rf"^{place}: expected an array of jax that exists, got a deleted one"):
            attend(**given)


@pytest.mark.parametrize("what", [[0, 9], np.float32([0, 9]), np.int16([0, 9]), np.uint32([0, 9]), 9])
def test_bounds_and_slots_of_other_types_are_refused(what):
    q, k, v = arrays()
    expected = r"expected (an array of numpy.*, got list|dtype int32.*, got \w+|an array, got a number)$"
    with pytest.raises(TypeError, match=f"^cu_seqlens: {expected}"):
        attend(q, k, v, cu_seqlens=what)
    with pytest.raises(TypeError, match=f"^state_indices: {expected}"):
        slots = what[:1] if isinstance(what, np.ndarray) else what
        leetcore.decode_step(q[:, :, 0], k[:, :, 0], v[:, :, 0], np.zeros((1, 2, 8, 8), "f4"), state_indices=slots)
    if not isinstance(what, np.ndarray):
        q = torch.from_numpy(q)
        with pytest.raises(TypeError, match=r"^cu_seqlens: expected a torch\.Tensor, got (list|int)"):
            leetcore.torch.linear_attention(q, q, q, cu_seqlens=what)
        with pytest.raises(TypeError, match=r"^state_indices: expected a torch\.Tensor, got (list|int)"):
            leetcore.torch.decode_step(STEP, STEP, STEP, torch.zeros(1, 2, 8, 8), state_indices=what)


# ---- sizes of 0


@pytest.mark.parametrize("B, N", [(0, 9), (2, 0), (0, 0)])
@pytest.mark.parametrize("form", ["none", "number", "head", "sequence", "token"])
def test_no_sequence_and_no_token_give_empty_results(B, N, form, method):
    H, K, V = 2, 8, 4
    q, k, v = np.ones((B, H, N, K), "f4"), np.ones((B, H, N, K), "f4"), np.ones((B, H, N, V), "f4")
    shape = {"head": (H,), "sequence": (B, H), "token": (B, H, N)}.get(form)
    decay = {"none": None, "number": -0.5}.get(form, np.full(shape or (), -0.5, "f4"))
    if form == "token" and method == "fft":
        pytest.skip("fft takes no decay per token")
    state = np.full((B, H, K, V), 3, "f4")
    o, after = leetcore.linear_attention(q, k, v, decay, initial_state=state, return_state=True, method=method)
    assert o.shape == v.shape and np.array_equal(after, state)
    q, k, v, state = (torch.from_numpy(x).requires_grad_() for x in (q, k, v, state))
    o, after = leetcore.torch.linear_attention(q, k, v, -0.5, initial_state=state, return_state=True)
    (o.sum() + after.sum()).backward()
    assert (q.grad.shape, state.grad.shape) == (q.shape, state.shape) and (state.grad == 1).all()


def test_no_sequence_decodes_to_nothing():
    x, state = np.ones((0, 2, 8), "f4"), np.full((3, 2, 8, 8), 3, "f4")
    assert leetcore.decode_step(x, x, x, state, DECAY).shape == x.shape and (state == 3).all()
    x = np.ones((1, 2, 0, 8), "f4")
    assert leetcore.decode_step(x, x, x, state[:1], DECAY).shape == x.shape and (state == 3).all()


@pytest.mark.parametrize(
    "shapes, text",
    [
        (((1, 0, 9, 8), (1, 2, 9, 8), (1, 2, 9, 8)), r"^q: .*, got \[1, 0, 9, 8\]; Hq is at least 1$"),
        (((1, 2, 9, 8), (1, 0, 9, 8), (1, 2, 9, 8)), r"^k: .*, got \[1, 0, 9, 8\]; Hk is at least 1$"),
        (((1, 2, 9, 0), (1, 2, 9, 0), (1, 2, 9, 8)), r"^q: .*, got \[1, 2, 9, 0\]; K is at least 1$"),
        (((1, 2, 9, 8), (1, 2, 9, 8), (1, 2, 9, 0)), r"^v: .*, got \[1, 2, 9, 0\]; V is at least 1$"),
    ],
)
def test_no_head_and_no_channel_are_refused(shapes, text):
    given = [np.ones(shape, "f4") for shape in shapes]
    with pytest.raises(ValueError, match=text):
        leetcore.linear_attention(*given)
    with pytest.raises(ValueError, match=text):
        leetcore.torch.linear_attention(*map(torch.from_numpy, given))


# ---- decays of tensors


def test_decays_of_tensors():
    gamma = torch.tensor([0.5, 0.9])
    for constructor in (leetcore.decay.from_gamma, leetcore.decay.from_slopes):
        assert np.array_equal(constructor(gamma), constructor(gamma.numpy()))
        name = "gamma" if constructor is leetcore.decay.from_gamma else "slopes"
        hint = rf"^{name}: expected numbers that numpy can read, got Tensor; x\.detach\(\)\.cpu\(\)\.double\(\)"
        for bad in (gamma.bfloat16(), gamma.clone().requires_grad_(), gamma.to("meta"), gamma.to_sparse()):
            with pytest.raises(ValueError, match=hint):
                constructor(bad)
            if bad.device.type == "cpu" and not bad.is_sparse:
                assert np.array_equal(
                    constructor(bad.detach().cpu().double()), constructor(bad.detach().double().numpy())
                )
        for bad in (np.ma.masked_array([0.5, 0.9], [False, True]), [[0.5], [0.5, 0.9]]):
            with pytest.raises(ValueError, match=rf"^{name}: expected numbers that numpy can read, got \w+$"):
                constructor(bad)


@pytest.mark.parametrize("call", [leetcore.linear_attention, leetcore.torch.linear_attention])
def test_a_decay_of_bfloat16_is_refused(call):
    with pytest.raises(TypeError, match=r"^log_decay: expected dtype float32, got bfloat16"):
        call(Q, Q, Q, torch.tensor([-0.1, -0.2]).bfloat16())


def test_arrays_on_a_gpu_that_is_not_there():
    q, k, v = (OtherArray(x, 63) for x in arrays())
    where = r"q: is on CUDA device 63, and this build of leetcore has no CUDA methods; move it to the CPU"
    with pytest.raises(RuntimeError, match=rf"^({where}|CUDA device 63: (this machine has no|expected one of))"):
        attend(q, k, v, DECAY)
    with pytest.raises(RuntimeError, match=r"CUDA device"):
        leetcore.explain(q, k, v, DECAY)
    if leetcore.build_info()["cuda"] == "no":
        with pytest.raises(RuntimeError, match="this build of leetcore has no CUDA methods"):
            leetcore.cost(N=5, K=5, device="cuda")


def test_jax_arrays_are_never_written():
    q, k, v = map(jnp.asarray, arrays())
    state = jnp.ones((1, 2, 8, 8))
    attend(q, k, v, DECAY, initial_state=state, return_state=True)
    for x, want in zip((q, k, v), arrays(), strict=True):
        assert np.array_equal(np.asarray(x), want)
    assert (state == 1).all()
    with pytest.raises(TypeError, match=r"^out: .*immutable"):
        attend(q, k, v, DECAY, out=jnp.zeros_like(q))
    with pytest.raises(TypeError, match=r"^state: .*immutable"):
        leetcore.decode_step(q[:, :, 0], k[:, :, 0], v[:, :, 0], state, DECAY)
    with pytest.raises(TypeError, match=r"^q: .*tracer"):
        jax.jit(lambda q: attend(q, q, q))(q)


def test_inputs_are_not_copied():
    """A broadcast array of 2^34 elements could not be copied; a mapped one is read in place."""
    big = np.broadcast_to(np.ones((1, 1, 1, 1 << 10), np.float32), (1 << 10, 1 << 14, 1, 1 << 10))
    with pytest.raises(ValueError, match=r"^k: expected shape"):  # validated without touching memory
        attend(big, big[:1], big)
    q = np.broadcast_to(np.float32([[[[1, 2]]]]), (1, 64, 1000, 2))
    o = attend(q, q, q, float("-inf"))
    assert o.shape == q.shape and np.array_equal(o[0, 63, 999], np.float32([5, 10]))


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_results_live_as_long_as_they_are_held(kind):
    make, _ = KINDS[kind]
    o = attend(*map(make, arrays()), DECAY)
    gc.collect()
    assert np.array_equal(np.asarray(o), expected()[0])


def test_the_gil_is_released():
    q = np.ones((1, 4, 4096, 128), np.float32)
    ticks = 0
    done = threading.Event()

    def work():
        for _ in range(3):
            attend(q, q, q, DECAY)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    while not done.is_set():
        time.sleep(0.001)
        ticks += 1
    thread.join()
    assert ticks > 3  # with the GIL held this thread would wake once a call


def test_concurrent_calls_are_independent():
    inputs = [arrays(shape=(1, 3, 300, 40), seed=i) for i in range(4)]
    serial = [attend(*x, DECAY) for x in inputs]
    results = [None] * 4

    def work(i):
        for _ in range(20):
            results[i] = attend(*inputs[i], DECAY)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for got, want in zip(results, serial, strict=True):
        assert np.array_equal(got, want)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
def test_a_forked_child_computes_too():
    q, k, v = arrays(shape=(2, 8, 500, 64))
    want = attend(q, k, v, DECAY)  # the parent's workers exist
    child = os.fork()
    if child == 0:
        same = np.array_equal(attend(q, k, v, DECAY), want)
        os._exit(0 if same else 1)
    deadline = time.monotonic() + 30
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child hung")
    assert os.waitstatus_to_exitcode(ended[1]) == 0
