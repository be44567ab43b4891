"""Generation: decode_step updates the states of the named sequences in place."""

import leetcore
import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import DTYPES, TOLERANCE, log_decays, normal
from leetcore import reference

# The error that one rounding of the stored state adds: at most half a unit in the last place.
STATE_TOLERANCE = {"f16": 5e-4, "bf16": 2e-3}


def problem(dtype="f32", B=3, heads=(2, 2, 2), T=1, K=24, V=40, slots=None, state_dtype=None, kind="[Hs]"):
    rng = np.random.default_rng([B, T, K, V, *heads])
    Hq, Hk, Hv = heads
    q, k, v = (normal(rng, (B, H, T, D), DTYPES[dtype]) for H, D in ((Hq, K), (Hk, K), (Hv, V)))
    state_dtype = DTYPES[state_dtype or ("f64" if dtype == "f64" else "f32")]
    state = normal(rng, (slots or B, max(Hk, Hv), K, V), state_dtype)
    decay = kind if kind is None else log_decays(rng, kind, B, max(Hk, Hv), T)
    return {"q": q, "k": k, "v": v, "state": state, "log_decay": decay, "scale": K**-0.5}


def check(given, tolerance, state_indices=None):
    """Decodes and compares; returns the states before and after."""
    before = given["state"].copy()
    want, want_state = reference.decode_step(**given, state_indices=state_indices)
    o = leetcore.decode_step(**given, state_indices=state_indices)
    assert o.dtype == given["q"].dtype and np.linalg.norm(want) > 1e-3
    assert reference.error(o, want) <= tolerance[0]
    assert reference.error(given["state"], want_state) <= tolerance[1]
    return before, given["state"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", range(1, 9))
def test_tokens(T, dtype):
    check(problem(dtype, T=T), TOLERANCE[dtype])


@pytest.mark.parametrize("kind", [None, "[]", "[Hs]", "[B,Hs]", "[B,Hs,N]"])
@pytest.mark.parametrize("heads", [(1, 1, 1), (8, 2, 4), (1, 4, 4), (6, 1, 3)], ids=str)
@pytest.mark.parametrize("T", [1, 3, 64])
def test_decays_and_groups_of_heads(T, heads, kind):
    check(problem(T=T, heads=heads, kind=kind), TOLERANCE["f32"])


@pytest.mark.parametrize("K, V", [(1, 1), (1, 256), (256, 1), (64, 64), (128, 128), (80, 96), (17, 33)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dims(K, V, dtype):
    check(problem(dtype, K=K, V=V, T=2), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("state_dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("T", [1, 5])
def test_dtypes_of_the_state(T, state_dtype, dtype):
    output, state = TOLERANCE[dtype]
    check(problem(dtype, T=T, state_dtype=state_dtype), (output, STATE_TOLERANCE.get(state_dtype, state)))


@pytest.mark.parametrize("integer", [np.int32, np.int64])
@pytest.mark.parametrize("state_dtype", ["f32", "f16", "bf16"])
def test_indices_permute_and_skip(state_dtype, integer):
    given = problem(B=5, slots=9, T=2, state_dtype=state_dtype)
    indices = np.array([7, -1, 0, 3, -1], integer)
    tolerance = TOLERANCE["f32"][0], STATE_TOLERANCE.get(state_dtype, TOLERANCE["f32"][1])
    before, after = check(given, tolerance, indices)
    untouched = [1, 2, 4, 5, 6, 8]
    assert np.array_equal(before[untouched], after[untouched])
    assert all(not np.array_equal(before[i], after[i]) for i in (7, 0, 3))


def test_skipped_sequences_have_outputs_of_zero_whatever_they_hold():
    given = problem(B=3, slots=4)
    for name in "qkv":
        given[name][1] = np.nan
    given["state"][[2, 3]] = np.inf
    before = given["state"].copy()
    o = leetcore.decode_step(**given, state_indices=np.array([1, -1, 0], np.int32))
    assert (o[1] == 0).all() and np.isfinite(o).all()
    assert np.array_equal(given["state"][2:], before[2:])


def test_all_sequences_may_be_skipped():
    given = problem()
    before = given["state"].copy()
    assert not leetcore.decode_step(**given, state_indices=np.full(3, -1, np.int32)).any()
    assert np.array_equal(given["state"], before)


def test_more_slots_than_sequences():
    given = problem(B=2, slots=5)
    before, after = check(given | {"state": given["state"]}, TOLERANCE["f32"], np.array([0, 1], np.int32))
    assert np.array_equal(before[2:], after[2:])


def test_a_slot_named_twice_is_refused():
    given = problem(B=3, slots=4)
    before = given["state"].copy()
    with pytest.raises(ValueError, match=r"^state_indices: .*2 again"):
        leetcore.decode_step(**given, state_indices=np.array([2, 0, 2], np.int32))
    assert np.array_equal(given["state"], before)


def test_one_token_without_its_axis():
    given = problem(heads=(4, 2, 1))
    flat = {name: given[name][:, :, 0] for name in "qkv"}
    flat |= {"state": given["state"].copy(), "log_decay": given["log_decay"], "scale": given["scale"]}
    o = leetcore.decode_step(**flat)
    assert o.shape == (3, 4, 40)
    assert np.array_equal(o, leetcore.decode_step(**given)[:, :, 0])
    assert np.array_equal(flat["state"], given["state"])


def test_strided_pools_are_updated_in_place():
    given = problem(B=2, slots=2)
    pool = np.full((4, 3, 2, 24, 48), 7, np.float32)
    view = pool[::2, 1, :, :, 4:44]
    view[...] = given["state"]
    want, want_state = reference.decode_step(**given)
    o = leetcore.decode_step(**given | {"state": view})
    assert reference.error(o, want) <= 5e-6 and reference.error(view, want_state) <= 5e-6
    view[...] = 7
    assert (pool == 7).all()  # the rest of the pool is as before


@pytest.mark.parametrize("state_dtype", ["f32", "bf16"])
def test_torch(state_dtype):
    given = problem("bf16", T=3, state_dtype=state_dtype)
    want, want_state = reference.decode_step(**given)

    def tensor(x):
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if x.dtype == "bfloat16" else torch.from_numpy(x)

    tensors = {name: tensor(given[name]) for name in ("q", "k", "v", "state", "log_decay")}
    o = leetcore.decode_step(**tensors, scale=given["scale"], state_indices=torch.arange(3, dtype=torch.int32))
    assert o.dtype == torch.bfloat16
    assert reference.error(o.view(torch.int16).numpy().view(ml_dtypes.bfloat16), want) <= TOLERANCE["bf16"][0]
    assert reference.error(tensors["state"].float().numpy(), want_state) <= STATE_TOLERANCE["bf16"]


def test_the_output_can_be_given():
    given = problem(T=2)
    copy = {name: np.copy(x) for name, x in given.items()}
    out = np.full((3, 2, 2, 40), np.nan, np.float32)
    assert leetcore.decode_step(**given, out=out) is out
    assert np.array_equal(out, leetcore.decode_step(**copy | {"scale": given["scale"]}))


@pytest.mark.parametrize("state_dtype", ["f32", "f16", "bf16"])
def test_a_thousand_steps(state_dtype):
    """A float32 state stays exact over time.

    The error of a rounded state stays bounded if the state decays.
    """
    rng = np.random.default_rng(0)
    q, k, v = (normal(rng, (1, 2, 1000, 32)) for _ in range(3))
    decay = np.float32([-0.5, -0.1])
    want, want_state = reference.linear_attention(q, k, v, decay)
    state = np.zeros((1, 2, 32, 32), DTYPES[state_dtype])
    o = np.stack([leetcore.decode_step(q[:, :, t], k[:, :, t], v[:, :, t], state, decay) for t in range(1000)], 2)
    # Each rounding has relative size u and decays with the state. At gamma = e^-0.1 their sum is
    # u / sqrt(1 - gamma^2) = 2.3 u.
    tolerance = {"f32": 5e-6, "f16": 2.4 * 5e-4, "bf16": 2.4 * 2e-3}[state_dtype]
    assert reference.error(o, want) <= tolerance and reference.error(state, want_state) <= tolerance


@pytest.mark.parametrize("T", [1, 8, 64])
def test_slow_decays_keep_their_precision(T):
    """gamma = 1 - 1e-6 over 8192 tokens: factors in float32 would give wrong results."""
    rng = np.random.default_rng(0)
    q, k, v = (normal(rng, (1, 1, 8192, 16)) for _ in range(3))
    decay = leetcore.decay.from_gamma([1 - 1e-6])
    want, want_state = reference.linear_attention(q, k, v, decay)
    state = np.zeros((1, 1, 16, 16), np.float32)
    steps = (slice(t, t + T) for t in range(0, 8192, T))
    o = [leetcore.decode_step(q[:, :, t], k[:, :, t], v[:, :, t], state, decay) for t in steps]
    assert reference.error(np.concatenate(o, axis=2), want) <= TOLERANCE["f32"][0]
    assert reference.error(state, want_state) <= TOLERANCE["f32"][1]
