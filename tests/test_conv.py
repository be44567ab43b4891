"""The causal convolution: values, layouts, states, packed sequences, steps, gradients, refusals."""

import jax.numpy as jnp
import leetcore
import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import DTYPES, normal
from leetcore import causal_conv1d, causal_conv1d_backward, causal_conv1d_step, reference

# Largest relative errors. A gradient of the weights is a sum over all tokens.
TOLERANCE = {"f64": 1e-14, "f32": 5e-7, "f16": 3e-4, "bf16": 2.5e-3}
GRADIENT_TOLERANCE = {"f64": 1e-13, "f32": 2e-6, "f16": 5e-4, "bf16": 4e-3}
LAYOUTS = ["tokens", "channels", "scattered", "reversed"]
NAMES = ("d_x", "d_weight", "d_bias", "d_initial_state")


def laid_out(x, layout):
    """The same values [B, D, N] in another layout: what is named is contiguous."""
    B, D, N = x.shape
    if layout == "tokens":
        return np.ascontiguousarray(x)
    if layout == "channels":
        return np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)
    if layout == "reversed":
        return np.ascontiguousarray(x[:, ::-1, ::-1])[:, ::-1, ::-1]
    buffer = np.full((D, B, 3 * N + 1), 7, x.dtype)
    view = buffer.transpose(1, 0, 2)[:, :, 1 : 3 * N + 1 : 3]
    view[...] = x
    return view


def problem(B=2, D=7, N=70, W=4, L=None, dtype="f32", parameters=None, states=None, seed=0, S=None):
    """Arguments of `causal_conv1d`; L None means no initial state."""
    rng = np.random.default_rng([seed, B, D, N, W])
    parameters, states = DTYPES[parameters or dtype], DTYPES[states or dtype]
    given = {"x": normal(rng, (B, D, N), DTYPES[dtype]), "weight": normal(rng, (D, W), parameters)}
    given |= {"bias": normal(rng, (D,), parameters), "activation": "silu"}
    return given | ({} if L is None else {"initial_state": normal(rng, (S or B, D, L), states)})


def check(given, dtype="f32", **more):
    want, want_state = reference.causal_conv1d(**given)
    y, state = causal_conv1d(**given, return_state=True, **more)
    assert y.dtype == given["x"].dtype and y.shape == given["x"].shape
    assert reference.error(y, want) <= TOLERANCE[dtype]
    assert state.shape == want_state.shape and np.array_equal(state.astype(np.float64), want_state)
    return y, state


# ---- values


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_layouts_and_lengths(dtype, layout, activation):
    for D, N in [(7, 0), (7, 1), (80, 3), (1, 63), (80, 64), (33, 65), (7, 1000)]:
        given = problem(D=D, N=N, dtype=dtype, L=3) | {"activation": activation}
        given["x"] = laid_out(given["x"], layout)
        y, _ = check(given, dtype)
        if layout in ("tokens", "channels") and min(D, N) > 1:
            assert y.strides == given["x"].strides


@pytest.mark.parametrize("layout", ["tokens", "channels"])
@pytest.mark.parametrize("W", range(2, 9))
def test_taps(W, layout):
    for N in (1, W - 1, W, 200):
        for L in (None, W - 1, W, 2 * W + 70):
            given = problem(W=W, N=N, L=L, D=18)
            given["x"] = laid_out(given["x"], layout)
            check(given)
            del given["bias"]
            check(given)


@pytest.mark.parametrize("layout", ["tokens", "channels"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_many_channels(dtype, layout):
    """Results that are larger than the caches go past them, from any address."""
    given = problem(B=1, D=4096 + 8, N=1000, dtype=dtype)
    x = given["x"] = laid_out(given["x"], layout)
    y, _ = check(given, dtype)
    for offset in (0, 1, 3):
        memory = np.empty(x.size + 64, x.dtype)
        out = memory[offset : offset + x.size]
        B, D, N = x.shape
        out = out.reshape(B, D, N) if layout == "tokens" else out.reshape(B, N, D).swapaxes(1, 2)
        assert causal_conv1d(**given, out=out) is out and np.array_equal(out, y)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("parameters, states", [("f32", "bf16"), ("bf16", "f32"), ("f32", "f32")])
def test_dtypes_of_parameters_and_states(parameters, states, layout):
    given = problem(dtype="bf16", parameters=parameters, states=states, L=4, N=90)
    given["x"] = laid_out(given["x"], layout)
    _, state = check(given, "bf16")
    assert state.dtype == DTYPES[states]


def test_strides_of_parameters_and_outputs():
    given = problem(D=40, N=100, L=5)
    want = causal_conv1d(**given)
    strided = given | {"weight": np.asfortranarray(given["weight"]), "bias": np.repeat(given["bias"], 3)[::3]}
    strided["initial_state"] = laid_out(given["initial_state"], "scattered")
    for layout in LAYOUTS:
        out = laid_out(np.full_like(given["x"], np.nan), layout)
        assert np.array_equal(causal_conv1d(**strided, out=out), want)
    broadcast = np.broadcast_to(given["x"][:, :, :1], (2, 40, 100))
    assert np.array_equal(causal_conv1d(**given | {"x": broadcast}), causal_conv1d(**given | {"x": broadcast.copy()}))


@pytest.mark.parametrize("layout", ["tokens", "channels"])
def test_silu_of_extreme_values(layout):
    x = np.float32([0, 1e-30, -1e-30, 20, -20, 87, -87, 88, -88, 1e4, -1e4, 3e38, -3e38, 1])
    x = laid_out(np.broadcast_to(np.tile(x, 10), (1, 40, 140)), layout)
    y = causal_conv1d(x, np.tile(np.float32([0, 1]), (40, 1)), activation="silu")
    with np.errstate(over="ignore"):
        want = x.astype(np.float64) / (1 + np.exp(-x.astype(np.float64)))
    np.testing.assert_allclose(y, want, rtol=2e-6, atol=1e-35)  # below -87 it is that of -87


def test_inputs_that_are_not_finite_reach_w_outputs():
    x = np.ones((1, 2, 100), np.float32)
    x[0, 0, 40], x[0, 1, 40] = np.inf, np.nan
    y = causal_conv1d(x, np.ones((2, 3), np.float32), activation="silu")
    assert (y[0, 0, 40:43] == np.inf).all() and np.isnan(y[0, 1, 40:43]).all()
    assert np.isfinite(y[0, :, :40]).all() and np.isfinite(y[0, :, 43:]).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sequence_in_parts_is_the_whole_sequence(layout):
    given = problem(D=33, N=300, L=3)
    x = given["x"] = laid_out(given["x"], layout)
    want, want_state = causal_conv1d(**given, return_state=True)
    for cut in (0, 1, 2, 3, 4, 63, 64, 65, 128, 299, 300):
        y1, state = causal_conv1d(**given | {"x": x[:, :, :cut]}, return_state=True)
        y2, state = causal_conv1d(**given | {"x": x[:, :, cut:], "initial_state": state}, return_state=True)
        assert np.array_equal(np.concatenate([y1, y2], axis=2), want) and np.array_equal(state, want_state)


@pytest.mark.parametrize("layout", ["tokens", "channels", "scattered"])
def test_the_number_of_threads_does_not_matter(layout):
    given = problem(B=3, D=600, N=700, L=3)
    given["x"] = laid_out(given["x"], layout)
    d_y = given["x"] + 1
    results = []
    for threads in (1, 2, 5):
        leetcore.set_num_threads(threads)
        results.append([causal_conv1d(**given), *causal_conv1d_backward(**given, d_y=d_y)])
    leetcore.set_num_threads(0)
    for other in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---- packed sequences

LENGTHS = [[70], [0, 5, 1, 0, 64, 200, 3, 2, 0], [1] * 40, [0], [0, 0], []]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("layout", ["tokens", "channels", "scattered"])
def test_packed_sequences(layout, lengths):
    for dtype, integer, L in [("f32", np.int32, None), ("bf16", np.int64, 3), ("f32", np.int64, 90)]:
        given = problem(B=1, D=20, N=sum(lengths), dtype=dtype, L=L, S=len(lengths))
        if L is not None:
            given["initial_state"] = given["initial_state"][: len(lengths)]
        given |= {"x": laid_out(given["x"], layout), "cu_seqlens": np.cumsum([0, *lengths]).astype(integer)}
        y, state = check(given, dtype)
        for s, (begin, end) in enumerate(zip(given["cu_seqlens"], given["cu_seqlens"][1:], strict=False)):
            alone = given | {"x": given["x"][:, :, begin:end], "cu_seqlens": None}
            if L is not None:
                alone["initial_state"] = given["initial_state"][s : s + 1]
            want, want_state = causal_conv1d(**alone, return_state=True)
            assert np.array_equal(y[:, :, begin:end], want) and np.array_equal(state[s : s + 1], want_state)


# ---- steps


@pytest.mark.parametrize("L", [3, 4, 9])
@pytest.mark.parametrize("T", [1, 2, 3, 4, 64])
@pytest.mark.parametrize("dtype, states", [("f64", "f64"), ("f32", "f32"), ("bf16", "bf16"), ("bf16", "f32")])
def test_steps(dtype, states, T, L):
    rng = np.random.default_rng(T)
    for layout in LAYOUTS:
        given = problem(B=3, D=70, N=T, dtype=dtype)
        given["x"] = laid_out(given["x"], layout)
        pool = laid_out(normal(rng, (5, 70, L), DTYPES[states]), layout)
        for indices in (None, np.int32([4, -1, 0])):
            want, want_state = reference.causal_conv1d_step(**given, state=pool, state_indices=indices)
            y = causal_conv1d_step(**given, state=pool, state_indices=indices)
            assert reference.error(y, want) <= TOLERANCE[dtype]
            assert np.array_equal(pool.astype(np.float64), want_state)


def test_steps_continue_a_sequence():
    given = problem(D=33, N=80)
    x = given.pop("x")
    want, want_state = causal_conv1d(x, **given, return_state=True)
    y, state = causal_conv1d(x[:, :, :50], **given, return_state=True)
    parts = [y, *(causal_conv1d_step(x[:, :, t], state=state, **given)[:, :, None] for t in range(50, 70))]
    parts.append(causal_conv1d_step(x[:, :, 70:], state=state, **given))
    assert np.array_equal(np.concatenate(parts, axis=2), want) and np.array_equal(state, want_state)


def test_a_skipped_sequence_is_neither_read_nor_written():
    given = problem(B=3, D=20, N=1)
    given["x"][1] = np.nan
    pool = np.full((4, 20, 3), 5, np.float32)
    pool[2] = np.nan
    y = causal_conv1d_step(**given, state=pool, state_indices=np.int64([1, -1, 3]))
    assert (y[1] == 0).all() and np.isfinite(y).all() and np.isnan(pool[2]).all() and (pool[0] == 5).all()
    out = np.empty((3, 20), np.float32)
    assert (
        causal_conv1d_step(given["x"][:, :, 0], given["weight"], pool, out=out, state_indices=-np.ones(3, "i4")) is out
    )
    assert not out.any()


# ---- gradients


def check_gradients(given, d_y, d_state, tolerance):
    wants = [name for name in NAMES if name != "d_initial_state" or "initial_state" in given or d_state is not None]
    got = causal_conv1d_backward(**given, d_y=d_y, d_final_state=d_state, wants=wants)
    want = reference.causal_conv1d_gradients(**given, d_y=d_y, d_final_state=d_state)
    for name in wants:
        like = given.get(name[2:], given["weight"] if name == "d_bias" else d_state)
        assert getattr(got, name).dtype == like.dtype
        assert reference.error(getattr(got, name), want[name]) <= tolerance, name
    return got


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(dtype, layout, activation):
    rng = np.random.default_rng(0)
    for D, N, W, L in [(7, 0, 4, 3), (7, 1, 4, 5), (80, 3, 4, None), (1, 64, 2, 1), (70, 65, 8, 80), (7, 1500, 4, 3)]:
        given = problem(D=D, N=N, W=W, L=L, dtype=dtype) | {"activation": activation}
        given["x"] = laid_out(given["x"], layout)
        d_y = laid_out(normal(rng, (2, D, N), DTYPES[dtype]), layout)
        d_state = normal(rng, (2, D, L or W - 1), DTYPES[dtype])
        check_gradients(given, d_y, d_state, GRADIENT_TOLERANCE[dtype])
        if N:
            check_gradients(given, d_y, None, GRADIENT_TOLERANCE[dtype])
        check_gradients(given, None, d_state, GRADIENT_TOLERANCE[dtype])


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_gradients_of_packed_sequences(lengths):
    rng = np.random.default_rng(0)
    for layout in ("tokens", "channels"):
        given = problem(B=1, D=20, N=sum(lengths), L=5, S=len(lengths))
        given["initial_state"] = given["initial_state"][: len(lengths)]
        given |= {"x": laid_out(given["x"], layout), "cu_seqlens": np.cumsum([0, *lengths]).astype(np.int32)}
        d_y, d_state = (normal(rng, given[name].shape) for name in ("x", "initial_state"))
        check_gradients(given, d_y, d_state, 2e-6)


def test_the_oracle_of_gradients_is_the_derivative_of_the_definition():
    rng = np.random.default_rng(0)
    given = problem(N=9, D=3, L=4, dtype="f64", B=1, S=3) | {"cu_seqlens": np.int32([0, 2, 2, 9])}
    d_y, d_state = (normal(rng, given[name].shape, np.float64) for name in ("x", "initial_state"))
    found = reference.causal_conv1d_gradients(**given, d_y=d_y, d_final_state=d_state)
    for name in ("x", "weight", "bias", "initial_state"):
        direction = normal(rng, given[name].shape, np.float64)
        moved = [
            sum(
                (a * b).sum()
                for a, b in zip(
                    reference.causal_conv1d(**given | {name: given[name] + h * direction}), (d_y, d_state), strict=True
                )
            )
            for h in (-1e-5, 1e-5)
        ]
        assert abs((moved[1] - moved[0]) / 2e-5 - (found[f"d_{name}"] * direction).sum()) < 1e-7


def test_gradients_of_parameters_that_are_more_precise_than_the_inputs():
    given = problem(dtype="bf16", parameters="f32", states="f32", L=3, N=200)
    rng = np.random.default_rng(0)
    d_y, d_state = normal(rng, given["x"].shape, ml_dtypes.bfloat16), normal(rng, (2, 7, 3))
    got = check_gradients(given, d_y, d_state, GRADIENT_TOLERANCE["bf16"])
    want = reference.causal_conv1d_gradients(**given, d_y=d_y, d_final_state=d_state)
    assert reference.error(got.d_weight, want["d_weight"]) <= 1e-6 and got.d_weight.dtype == np.float32


def test_only_wanted_gradients_are_computed():
    given = problem(N=20)
    every = causal_conv1d_backward(**given, d_y=given["x"], wants=NAMES)
    assert every.d_initial_state.shape == (2, 7, 3)
    assert causal_conv1d_backward(**given, d_y=given["x"]).d_initial_state is None
    for name in NAMES:
        alone = causal_conv1d_backward(**given, d_y=given["x"], wants=[name])
        assert [n for n in NAMES if getattr(alone, n) is not None] == [name]
        assert np.array_equal(getattr(alone, name), getattr(every, name))


# ---- array libraries


def test_arrays_of_every_library():
    given = problem(N=30, D=5, L=3)
    want, want_state = causal_conv1d(**given, return_state=True)
    for make, kind in [(torch.from_numpy, torch.Tensor), (jnp.asarray, type(jnp.ones(1)))]:
        arrays = {n: make(a) if isinstance(a, np.ndarray) else a for n, a in given.items()}
        y, state = causal_conv1d(**arrays, return_state=True)
        assert (
            isinstance(y, kind)
            and np.array_equal(np.asarray(y), want)
            and np.array_equal(np.asarray(state), want_state)
        )
        gradients = causal_conv1d_backward(**arrays, d_y=y)
        assert all(isinstance(d, kind) for d in gradients)
    x = torch.randn(2, 30, 5).transpose(1, 2)
    y = causal_conv1d(x, torch.ones(5, 4))
    assert y.stride() == x.stride()
    state = torch.zeros(2, 5, 3)
    version = state._version
    causal_conv1d_step(x[:, :, 0], torch.ones(5, 4), state)
    assert state._version > version and torch.equal(state[:, :, -1], x[:, :, 0])
    with pytest.raises(TypeError, match=r"^state: .*immutable"):
        causal_conv1d_step(jnp.ones((1, 2)), jnp.ones((2, 4)), jnp.ones((1, 2, 3)))


# ---- refusals


def f32(*shape):
    return np.zeros(shape, np.float32)


REFUSED = {
    "x rank": ({"x": f32(7, 70)}, ValueError, r"^x: expected shape \[B, D, N\], got \[7, 70\]"),
    "no channel": ({"x": f32(2, 0, 70)}, ValueError, r"^x: expected shape \[B, D, N\], got .*; D is at least 1"),
    "x dtype": ({"x": np.zeros((2, 7, 70), np.int32)}, TypeError, r"^x: expected dtype float64, .*, got int32"),
    "weight rank": ({"weight": f32(7, 1, 4)}, ValueError, r"^weight: expected shape \[7, W\], got \[7, 1, 4\]"),
    "weight channels": ({"weight": f32(6, 4)}, ValueError, r"^weight: expected shape \[7, W\], got \[6, 4\]"),
    "one tap": ({"weight": f32(7, 1)}, ValueError, r"^weight: .*got \[7, 1\]; W is at least 2"),
    "many taps": ({"weight": f32(7, 9)}, ValueError, r"^weight: expected at most 8 taps, got 9"),
    "weight dtype": (
        {"weight": f32(7, 4).astype("f8")},
        TypeError,
        r"^weight: expected dtype float32 with float32 inputs, got float64",
    ),
    "bias shape": ({"bias": f32(7, 1)}, ValueError, r"^bias: expected shape \[7\], got \[7, 1\]"),
    "bias dtype": ({"bias": f32(7).astype("f2")}, TypeError, r"^bias: expected dtype float32.*got float16"),
    "state shape": ({"initial_state": f32(2, 7, 2)}, ValueError, r"^initial_state: .*\[2, 7, L\].*L is at least 3"),
    "state batch": ({"initial_state": f32(3, 7, 3)}, ValueError, r"^initial_state: .*\[2, 7, L\], got \[3, 7, 3\]"),
    "state dtype": ({"initial_state": np.zeros((2, 7, 3))}, TypeError, r"^initial_state: .*float32.*got float64"),
    "activation": ({"activation": "relu"}, ValueError, r"^activation: expected None, 'silu' or 'swish'.*, got 'relu'"),
    "out shape": ({"out": f32(2, 7, 71)}, ValueError, r"^out: expected shape \[2, 7, 70\], got \[2, 7, 71\]"),
    "out dtype": ({"out": np.zeros((2, 7, 70))}, TypeError, r"^out: expected dtype float32 like x, got float64"),
    "cu batch": ({"cu_seqlens": np.int32([0, 70])}, ValueError, r"^cu_seqlens: expected B = 1 .*got B = 2"),
    "cu dtype": ({"cu_seqlens": f32(2)}, TypeError, r"^cu_seqlens: expected dtype int32 or int64, got float32"),
    "cu values": (
        {"x": f32(1, 7, 70), "cu_seqlens": np.int32([0, 60]), "out": f32(1, 7, 70)},
        ValueError,
        r"^cu_seqlens: expected the number of tokens, 70, as the last value, got 60",
    ),
    "cu states": (
        {"x": f32(1, 7, 70), "cu_seqlens": np.int32([0, 6, 70]), "initial_state": f32(1, 7, 3), "out": f32(1, 7, 70)},
        ValueError,
        r"^initial_state: expected shape \[2, 7, L\], got \[1, 7, 3\]",
    ),
    "stream": ({"stream": 1}, ValueError, r"^stream: expected NULL for tensors on the CPU"),
    "no x": ({"x": None}, TypeError, r"^x: expected an array"),
    "no weight": ({"weight": None}, ValueError, r"^weight: required, but absent"),
    "kinds": (
        {"weight": torch.zeros(7, 4)},
        TypeError,
        r"^weight: expected an array of numpy like x, .* torch",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    changes, error, text = REFUSED[case]
    given = problem() | {"out": np.full((2, 7, 70), 7, np.float32)} | changes
    before = given["out"].copy()
    with pytest.raises(error, match=text):
        causal_conv1d(**given)
    assert np.array_equal(given["out"], before)


@pytest.mark.parametrize("name", ["x", "weight", "bias", "initial_state"])
def test_out_over_an_input_is_refused(name):
    memory = np.full(2 * 7 * 70, 3, np.float32)
    given = problem(L=3)
    given[name] = memory[: given[name].size].reshape(given[name].shape)
    with pytest.raises(ValueError, match=rf"^out: expected memory of its own.*overlap with {name}"):
        causal_conv1d(**given, out=memory.reshape(2, 7, 70))
    assert (memory == 3).all()


REFUSED_STEPS = {
    "tokens": ({"x": f32(2, 7, 65), "out": None}, ValueError, r"^x: expected at most 64 tokens per step, got 65"),
    "state shape": ({"state": f32(3, 7, 2)}, ValueError, r"^state: expected shape \[slots, 7, L\].*L is at least 3"),
    "slots": ({"state": f32(1, 7, 3)}, ValueError, r"^state: expected at least 2 slots, one a sequence, got 1"),
    "state dtype": ({"state": np.zeros((3, 7, 3))}, TypeError, r"^state: expected dtype float32.*, got float64"),
    "index high": ({"state_indices": np.int32([0, 3])}, ValueError, r"^state_indices: .*below 3, got 3 at \[1\]"),
    "index twice": ({"state_indices": np.int32([2, 2])}, ValueError, r"^state_indices: .*differ, got 2 again"),
    "index shape": ({"state_indices": np.int32([0])}, ValueError, r"^state_indices: expected shape \[2\], got \[1\]"),
    "out": ({"out": f32(2, 6)}, ValueError, r"^out: expected shape \[2, 7, 1\], got \[2, 6, 1\]"),
}


@pytest.mark.parametrize("case", REFUSED_STEPS)
def test_refusals_of_steps(case):
    changes, error, text = REFUSED_STEPS[case]
    given = {"x": f32(2, 7), "weight": f32(7, 4), "state": f32(3, 7, 3) + 5, "out": f32(2, 7) + 7} | changes
    before = {n: None if given[n] is None else given[n].copy() for n in ("state", "out")}
    with pytest.raises(error, match=text):
        causal_conv1d_step(**given)
    assert all(a is None or np.array_equal(given[n], a) for n, a in before.items())


REFUSED_GRADIENTS = {
    "none": ({"d_y": None}, ValueError, r"^d_y: required where d_final_state is absent"),
    "d_y shape": ({"d_y": f32(2, 7, 3)}, ValueError, r"^d_y: expected shape \[2, 7, 70\], got \[2, 7, 3\]"),
    "d_y dtype": ({"d_y": np.zeros((2, 7, 70))}, TypeError, r"^d_y: expected dtype float32 like x, got float64"),
    "d state": (
        {"d_final_state": f32(2, 7, 4), "initial_state": f32(2, 7, 3)},
        ValueError,
        r"^d_final_state: .* got",
    ),
    "d state dtype": (
        {"d_final_state": np.zeros((2, 7, 3)), "initial_state": f32(2, 7, 3)},
        TypeError,
        r"^d_final_state: expected dtype float32 like the other states, got float64",
    ),
    "wants": ({"wants": ["d_z"]}, ValueError, r"^wants: expected names among d_x, .*, got \['d_z'\]"),
    "nothing": ({"wants": []}, ValueError, r"^d_x: expected at least one gradient to write"),
}


@pytest.mark.parametrize("case", REFUSED_GRADIENTS)
def test_refusals_of_gradients(case):
    changes, error, text = REFUSED_GRADIENTS[case]
    with pytest.raises(error, match=text):
        causal_conv1d_backward(**problem() | {"d_y": f32(2, 7, 70)} | changes)
