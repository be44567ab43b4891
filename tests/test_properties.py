"""Properties that the definition implies for every method, exact or up to rounding."""

import itertools
import mmap

import leetcore
import numpy as np
import pytest
from conftest import DTYPES, TOLERANCE, log_decays, normal, serves
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from leetcore import reference

# The fixtures need no new run for each example, because the tests check outputs in their body.
few = settings(
    max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
kinds = st.sampled_from([None, "[]", "[Hs]", "[B,Hs]", "[B,Hs,N]"])
heads_of = st.sampled_from([(1, 1, 1), (3, 3, 3), (4, 2, 1), (2, 1, 2), (2, 6, 3)])


def problem(B=2, heads=(2, 2, 2), N=150, K=24, V=40, dtype=np.float64, kind="[Hs]", seed=0):
    rng = np.random.default_rng(seed)
    Hq, Hk, Hv = heads
    q, k, v = (normal(rng, (B, H, N, D), dtype) for H, D in ((Hq, K), (Hk, K), (Hv, V)))
    decay = None if kind is None else log_decays(rng, kind, B, max(Hk, Hv), N)
    return {"q": q, "k": k, "v": v, "log_decay": decay, "scale": K**-0.5}


def states(rng, p, B=None):
    Hs = max(p["k"].shape[1], p["v"].shape[1])
    accumulator = np.float64 if p["q"].dtype == np.float64 else np.float32
    return normal(rng, (B or len(p["q"]), Hs, p["k"].shape[-1], p["v"].shape[-1]), accumulator)


def require(served):
    """Skips a test whose method does not serve the problem. Tests of hypothesis use assume."""
    if not served:
        pytest.skip("the method does not serve this decay")


def attend(p, method, **options):
    return leetcore.linear_attention(**p, method=method, return_state=True, **options)


def tokens(p, start, end):
    """The problem with the tokens start to end only."""
    part = {name: p[name][:, :, start:end] for name in "qkv"}
    per_token = p["log_decay"] is not None and p["log_decay"].ndim == 3
    return p | part | {"log_decay": p["log_decay"][:, :, start:end] if per_token else p["log_decay"]}


def same(pair, other):
    return all(np.array_equal(x, y) for x, y in zip(pair, other, strict=True))


def close(pair, other, tolerance=1e-12):
    return all(reference.error(x, y) <= tolerance for x, y in zip(pair, other, strict=True))


# ---- the sequence in parts


@few
@given(N=st.integers(1, 300), cut=st.integers(0, 300), heads=heads_of, kind=kinds, dtype=st.sampled_from(list(DTYPES)))
@example(N=192, cut=64, heads=(1, 1, 1), kind="[]", dtype="f64")
def test_a_split_with_the_state_carried_changes_nothing(method, N, cut, heads, kind, dtype):
    p = problem(N=N, heads=heads, kind=kind, dtype=DTYPES[dtype], K=16, V=20)
    assume(serves(method, p))
    state = states(np.random.default_rng(1), p)
    cut = min(cut, N)
    want, want_state = reference.linear_attention(**p, initial_state=state)
    first, carried = attend(tokens(p, 0, cut), method, initial_state=state)
    second, last = attend(tokens(p, cut, N), method, initial_state=carried)
    assert reference.error(np.concatenate([first, second], axis=2), want) <= TOLERANCE[dtype][0]
    assert reference.error(last, want_state) <= TOLERANCE[dtype][1]


@few
@given(N=st.integers(1, 150), prefill=st.integers(0, 150), heads=heads_of, kind=kinds, T=st.integers(1, 8))
def test_decoding_finishes_what_a_prefill_began(method, N, prefill, heads, kind, T):
    p = problem(N=N, heads=heads, kind=kind, K=16, V=20)
    assume(serves(method, p))
    prefill = min(prefill, N)
    want, want_state = reference.linear_attention(**p)
    o, state = attend(tokens(p, 0, prefill), method)
    parts = [o]
    for t in range(prefill, N, T):
        parts.append(leetcore.decode_step(state=state, **tokens(p, t, t + T)))
    assert close((np.concatenate(parts, axis=2), state), (want, want_state))


@few
@given(
    lengths=st.lists(st.integers(0, 140), min_size=1, max_size=5),
    heads=heads_of,
    kind=st.sampled_from([None, "[]", "[Hs]", "[B,Hs,N]"]),
    initial=st.booleans(),
)
@example(lengths=[0, 64, 0, 65, 0], heads=(4, 2, 1), kind="[B,Hs,N]", initial=True)
@example(lengths=[0, 64, 0, 65, 0], heads=(4, 2, 1), kind="[Hs]", initial=True)
@example(lengths=[0], heads=(1, 1, 1), kind=None, initial=True)
def test_packed_sequences_are_separate_calls(method, lengths, heads, kind, initial):
    p = problem(B=1, N=sum(lengths), heads=heads, kind=kind, K=16, V=20, dtype=np.float32)
    assume(serves(method, p))
    ends = np.cumsum([0, *lengths])
    state = states(np.random.default_rng(1), p, len(lengths)) if initial else None
    o, final = attend(p, method, initial_state=state, cu_seqlens=ends.astype(np.int32))
    assert same((o, final), attend(p, method, initial_state=state, cu_seqlens=ends))  # int64
    for s, (start, end) in enumerate(itertools.pairwise(ends)):
        first = None if state is None else state[s : s + 1]
        assert same((o[:, :, start:end], final[s : s + 1]), attend(tokens(p, start, end), method, initial_state=first))


@pytest.mark.parametrize("kind", [None, "[Hs]", "[B,Hs,N]"])
def test_no_token_gives_no_output_and_the_initial_state(method, kind):
    p = problem(N=0, kind=kind, dtype=np.float32)
    require(serves(method, p))
    state = states(np.random.default_rng(1), p)
    o, final = attend(p, method, initial_state=state)
    assert o.shape == (2, 2, 0, 40) and np.array_equal(final, state) and final is not state
    assert not attend(p, method)[1].any()


def test_no_sequence(method):
    p = problem(B=0, dtype=np.float32)
    o, final = attend(p, method)
    assert o.shape == (0, 2, 150, 40) and final.shape == (0, 2, 24, 40)


# ---- independence, to the last bit


@pytest.mark.parametrize("kind", ["[B,Hs]", "[B,Hs,N]"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_sequences_of_a_batch_do_not_touch(method, kind, dtype):
    p = problem(B=3, kind=kind, dtype=DTYPES[dtype])
    require(serves(method, p))
    o, state = attend(p, method)
    for b in range(3):
        alone = {name: x[b : b + 1] if isinstance(x, np.ndarray) else x for name, x in p.items()}
        assert same((o[b : b + 1], state[b : b + 1]), attend(alone, method))


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["q", "k", "v", "initial_state"])
def test_what_is_not_finite_stays_in_its_sequence_and_head(method, name, poison):
    p = problem(B=3, heads=(3, 3, 3), dtype=np.float32)
    p["initial_state"] = states(np.random.default_rng(1), p)
    clean = attend(p, method)
    p[name][1, 2, -1] = poison
    others = np.ones((3, 3), bool)
    others[1, 2] = False
    dirty = attend(p, method)
    assert same([x[others] for x in dirty], [x[others] for x in clean])
    assert not np.isfinite(dirty[0][1, 2]).all()


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_what_is_not_finite_stays_in_its_packed_sequence(method, name):
    p, ends = problem(B=1, dtype=np.float32), np.array([0, 50, 100, 150], np.int32)
    clean = attend(p, method, cu_seqlens=ends)
    p[name][0, 0, 50:100] = np.nan
    dirty = attend(p, method, cu_seqlens=ends)
    others = np.r_[0:50, 100:150]
    assert same((dirty[0][:, :, others], dirty[1][[0, 2]]), (clean[0][:, :, others], clean[1][[0, 2]]))


@few
@given(t=st.integers(0, 149), kind=kinds, dtype=st.sampled_from(["f64", "f32", "f16"]))
def test_no_output_depends_on_later_tokens(method, t, kind, dtype):
    p = problem(kind=kind, dtype=DTYPES[dtype])
    assume(serves(method, p))
    before = attend(p, method)[0]
    for name in "qkv":
        p[name][:, :, t:] = normal(np.random.default_rng(2), p[name][:, :, t:].shape, DTYPES[dtype])
    if kind == "[B,Hs,N]":
        p["log_decay"][:, :, t:] = -1
    after = attend(p, method)[0]
    if method == "fft":  # a transform spreads the rounding of every token over all of them
        mixed = np.where(np.arange(150)[:, None] < t, before, after)
        assert reference.error(mixed.astype("f8"), after.astype("f8")) <= TOLERANCE[dtype][0]
    else:
        assert np.array_equal(before[:, :, :t], after[:, :, :t])
    assert not np.array_equal(before[:, :, t:], after[:, :, t:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, H", [(1, 1), (2, 3)])
def test_answers_do_not_depend_on_the_run_or_the_threads(method, dtype, B, H):
    p = problem(B=B, heads=(H, H, H), N=700, K=64, V=96, dtype=DTYPES[dtype], kind="[B,Hs]")
    want = attend(p, method)
    try:
        for threads in (1, 2, 3, 2):
            leetcore.set_num_threads(threads)
            assert same(attend(p, method), want)
    finally:
        leetcore.set_num_threads(0)


# ---- algebra


@few
@given(a=st.floats(-4, 4), b=st.floats(-4, 4), heads=heads_of, kind=kinds)
def test_linear_in_v_and_the_initial_state(method, a, b, heads, kind):
    p = problem(heads=heads, kind=kind)
    assume(serves(method, p))
    rng = np.random.default_rng(1)
    other, s1, s2 = normal(rng, p["v"].shape, np.float64), states(rng, p), states(rng, p)
    o1, f1 = attend(p, method, initial_state=s1)
    o2, f2 = attend(p | {"v": other}, method, initial_state=s2)
    o, f = attend(p | {"v": a * p["v"] + b * other}, method, initial_state=a * s1 + b * s2)
    for sum_, x, y in ((o, o1, o2), (f, f1, f2)):
        assert np.linalg.norm(sum_ - (a * x + b * y)) <= 1e-12 * (
            abs(a) * np.linalg.norm(x) + abs(b) * np.linalg.norm(y)
        )


def test_gamma_0_sees_only_its_own_token(method):
    p = problem(kind=None) | {"log_decay": float("-inf")}
    state = states(np.random.default_rng(1), p)
    o, final = attend(p, method, initial_state=state)
    want = p["scale"] * (p["q"] * p["k"]).sum(-1, keepdims=True) * p["v"]
    assert close((o, final), (want, p["k"][:, :, -1, :, None] * p["v"][:, :, -1, None, :]))


def test_gamma_1_is_no_decay(method):
    p = problem(kind=None)
    want = p["scale"] * np.tril(p["q"] @ p["k"].swapaxes(-1, -2)) @ p["v"]
    for none in (None, 0.0, np.zeros(2, np.float32), np.zeros((2, 2, 150), np.float32)):
        if not serves(method, p | {"log_decay": none}):
            continue
        o, final = attend(p | {"log_decay": none}, method)
        assert close((o, final), (want, p["k"].swapaxes(-1, -2) @ p["v"]))


@pytest.mark.parametrize("dtype", ["f64", "f32"])
def test_a_decay_per_token_may_be_constant(method, dtype):
    p = problem(dtype=DTYPES[dtype], kind="[B,Hs]")
    constant = np.ascontiguousarray(np.broadcast_to(p["log_decay"][..., None], (2, 2, 150)))
    tolerance = 2 * max(TOLERANCE[dtype])
    require(serves(method, p | {"log_decay": constant}))
    assert close(attend(p | {"log_decay": constant}, method), attend(p, method), tolerance)
    assert same(
        attend(p | {"log_decay": np.broadcast_to(p["log_decay"][..., None], (2, 2, 150))}, method),
        attend(p | {"log_decay": constant}, method),
    )


def test_scale_multiplies_the_output_alone(method):
    p = problem()
    o, state = attend(p | {"scale": 1.0}, method)
    scaled, same_state = attend(p | {"scale": -3.0}, method)
    assert close((scaled, same_state), (-3 * o, state))
    assert not attend(p | {"scale": 0.0}, method)[0].any()


@pytest.mark.parametrize("heads", [(8, 2, 4), (8, 4, 1), (1, 4, 4), (2, 6, 3), (6, 1, 1)], ids=str)
@pytest.mark.parametrize("kind", ["[Hs]", "[B,Hs,N]"])
def test_grouped_heads_are_repeated_heads(method, heads, kind):
    p = problem(heads=heads, kind=kind)
    require(serves(method, p))
    H, Hs = max(heads), max(heads[1:])
    repeated = p | {name: np.repeat(p[name], H // p[name].shape[1], axis=1) for name in "qkv"}
    repeated["log_decay"] = np.repeat(p["log_decay"], H // Hs, axis=0 if kind == "[Hs]" else 1)
    (o, state), (want, want_state) = attend(p, method), attend(repeated, method)
    assert close((o, np.repeat(state, H // Hs, axis=1)), (want, want_state))


# ---- memory


def bnhd(x):
    return np.ascontiguousarray(x.swapaxes(1, 2))


def fused(p):
    """q, k and v as slices of one buffer [B, N, H, 2 K + V], the output of one projection."""
    buffer = np.concatenate([p[name].swapaxes(1, 2) for name in "qkv"], axis=-1)
    K = p["q"].shape[-1]
    return {"q": buffer[..., :K], "k": buffer[..., K : 2 * K], "v": buffer[..., 2 * K :]}


STRIDES = {
    "transposed": lambda p: {name: bnhd(p[name]).swapaxes(1, 2) for name in "qkv"},
    "fused": lambda p: {name: x.swapaxes(1, 2) for name, x in fused(p).items()},
    "negative": lambda p: {name: np.ascontiguousarray(p[name][::-1, ::-1, ::-1])[::-1, ::-1, ::-1] for name in "qkv"},
    "scattered": lambda p: {name: np.repeat(p[name], 3, axis=-1)[..., ::3] for name in "qkv"},  # copied
    "reversed": lambda p: {name: np.ascontiguousarray(p[name][..., ::-1])[..., ::-1] for name in "qkv"},  # copied
    "padded": lambda p: {name: np.pad(p[name], 3, constant_values=np.nan)[3:-3, 3:-3, 3:-3, 3:-3] for name in "qkv"},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("kind", ["[B,Hs]", "[B,Hs,N]"])
def test_strides_change_nothing(method, kind, strides, dtype):
    p = problem(dtype=DTYPES[dtype], kind=kind)
    require(serves(method, p))
    assert same(attend(p | STRIDES[strides](p), method), attend(p, method))


@pytest.mark.parametrize("kind", ["[B,Hs]", "[B,Hs,N]"])
def test_strided_decays_states_and_offsets(method, kind):
    p = problem(dtype=np.float32, kind=kind)
    require(serves(method, p))
    state, ends = states(np.random.default_rng(1), p), np.array([0, 40, 150], np.int64)
    one = {name: x[:1] if isinstance(x, np.ndarray) else x for name, x in p.items()}
    want, packed = attend(p, method, initial_state=state), attend(one, method, cu_seqlens=ends)
    scattered = p | {"log_decay": np.repeat(p["log_decay"], 2, axis=-1)[..., ::2]}
    assert same(attend(scattered, method, initial_state=np.asfortranarray(state)), want)
    assert same(attend(one, method, cu_seqlens=np.repeat(ends, 2)[::2]), packed)


def test_broadcast_heads(method):
    p = problem(heads=(4, 1, 1), dtype=np.float32)
    wide = {name: np.broadcast_to(p[name], (2, 4, *p[name].shape[2:])) for name in "kv"}
    decay = {"log_decay": np.broadcast_to(p["log_decay"], (4,))}
    assert same(
        attend(p | wide | decay, method)[:1], attend(p | {n: x.copy() for n, x in wide.items()} | decay, method)[:1]
    )


@pytest.mark.parametrize("kind", ["[Hs]", "[B,Hs,N]"])
def test_layouts_differ_in_strides_only(method, kind):
    p = problem(heads=(4, 2, 1), dtype=np.float32, kind=kind)
    require(serves(method, p))
    o, state = attend(p, method)
    decay = {"log_decay": bnhd(p["log_decay"])} if kind == "[B,Hs,N]" else {}
    other = attend(p | {name: bnhd(p[name]) for name in "qkv"} | decay, method, layout="bnhd")
    assert other[0].shape == (2, 150, 4, 40)
    assert same((other[0].swapaxes(1, 2), other[1]), (o, state))


@pytest.mark.parametrize("place", ["transposed", "padded", "negative"])
def test_the_output_may_have_any_strides(method, place):
    p = problem(dtype=np.float32)
    o, state = attend(p, method)
    room = np.full((2, 150, 2, 50), 7, np.float32)
    out = {"transposed": room[..., :40], "padded": room[..., 5:45], "negative": room[:, ::-1, :, :40]}[place].swapaxes(
        1, 2
    )
    given_back, other = attend(p, method, out=out)
    assert given_back is out and same((out, other), (o, state))
    out[...] = 7
    assert (room == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_of_the_results(method, dtype):
    o, state = attend(problem(dtype=DTYPES[dtype]), method)
    assert o.dtype == DTYPES[dtype] and state.dtype == (np.float64 if dtype == "f64" else np.float32)


def test_offsets_have_64_bits(method):
    """Sequences and tokens more than 2^31 elements apart, in reserved, mostly untouched memory."""
    reserve = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    space = np.frombuffer(mmap.mmap(-1, 2 * ((1 << 33) + (1 << 12)), flags=reserve), np.float16)
    p = problem(B=2, heads=(1, 1, 1), N=3, K=8, V=8, dtype=np.float16)

    def far(x, start, apart):  # apart: distances in elements between sequences and between tokens
        shape, size = x.shape, x.itemsize
        strides = (apart[0] * size, shape[2] * 8 * size, apart[1] * size, size)
        view = np.lib.stride_tricks.as_strided(space[start:], shape, strides)
        view[...] = x
        return view

    sequences, neighbours = (1 << 32, 8), (64, 1 << 31)
    for apart in (sequences, neighbours):
        views = {name: far(p[name], 512 * i, apart) for i, name in enumerate("qkv")}
        out = far(np.full_like(p["v"], 7), 512 * 3, apart)
        o, state = attend(p | views, method, out=out)
        assert same((o, state), attend(p, method))


def test_no_output_depends_on_later_decays(method):
    """Slow decays are computed another way than fast ones, token by token."""
    p = problem(dtype=np.float32, N=40, kind="[B,Hs,N]")
    p["log_decay"] = np.full((2, 2, 40), -0.001, np.float32)
    require(serves(method, p))
    before = attend(p, method)[0]
    for t in range(1, 9):
        later = p["log_decay"].copy()
        later[:, :, t:] = -1
        assert np.array_equal(attend(p | {"log_decay": later}, method)[0][:, :, :t], before[:, :, :t])
