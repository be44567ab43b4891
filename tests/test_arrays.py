"""Every kind of array in, the same kind out, without copies, conversions or surprises."""

import gc
import os
import threading
import time
from functools import partial

import jax
import jax.numpy as jnp
import leetcore
import ml_dtypes
import numpy as np
import pytest
import torch
from fake_gpu import OtherArray

DECAY = -0.1
attend = partial(leetcore.linear_attention, method="chunk")  # bitwise comparisons want one method


def arrays(dtype=np.float32, shape=(1, 2, 9, 8), seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for _ in range(3)]


def expected(dtype=np.float32):
    return attend(*arrays(dtype), DECAY, return_state=True)


class Producer:
    """The least an array library has: DLPack export, of memory that numpy owns."""

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
    """A broadcast array of 2^34 elements could not be copied; a mapped one is read where it lies."""
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
