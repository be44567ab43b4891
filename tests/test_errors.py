"""Bad input is refused before any work, by a sentence with the argument, its value and the rule."""

import leetcore
import numpy as np
import pytest

B, H, N, K, V = 2, 4, 5, 8, 6


def good():
    rng = np.random.default_rng(0)
    shapes = {"q": (B, H, N, K), "k": (B, H, N, K), "v": (B, H, N, V)}
    given = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return given | {"log_decay": -np.ones(H, np.float32), "out": np.full((B, H, N, V), 7, np.float32)}


def f32(*shape):
    return np.zeros(shape, np.float32)


def cu(*values):
    return {
        "cu_seqlens": np.array(values, np.int32),
        **{n: f32(1, 1, 9, 4) for n in "qkv"},
        "out": f32(1, 1, 9, 4),
        "log_decay": None,
    }


REFUSED = {
    "q rank": ({"q": f32(B, N, K)}, ValueError, r"^q: expected shape \[B, Hq, N, K\], got \[2, 5, 8\]"),
    "k batch": ({"k": f32(3, H, N, K)}, ValueError, r"^k: expected shape \[2, Hk, 5, 8\], got \[3, 4, 5, 8\]"),
    "k tokens": ({"k": f32(B, H, 6, K)}, ValueError, r"^k: expected shape \[2, Hk, 5, 8\], got \[2, 4, 6, 8\]"),
    "k dim": ({"k": f32(B, H, N, 9)}, ValueError, r"^k: expected shape .*, got \[2, 4, 5, 9\]"),
    "v tokens": ({"v": f32(B, H, 4, V)}, ValueError, r"^v: expected shape \[2, Hv, 5, V\], got \[2, 4, 4, 6\]"),
    "no channel": ({"v": f32(B, H, N, 0)}, ValueError, r"^v: expected shape .*, got \[2, 4, 5, 0\]"),
    "no head": ({"q": f32(B, 0, N, K)}, ValueError, r"^q: expected shape .*, got \[2, 0, 5, 8\]"),
    "heads": ({"q": f32(B, 3, N, K)}, ValueError, r"^q: expected a number of heads that divides 4.*, got 3"),
    "state heads": (
        {"q": f32(B, 6, N, K), "k": f32(B, 2, N, K), "v": f32(B, 3, N, V), "log_decay": None, "out": None},
        ValueError,
        r"^k: expected a number of heads that divides 3.*, got 2",
    ),
    "head dim": (
        {"q": f32(1, 1, 1, 9000), "k": f32(1, 1, 1, 9000), "v": f32(1, 1, 1, 1), "log_decay": None, "out": None},
        ValueError,
        r"^q: expected a head dim of at most 8192, got 9000",
    ),
    "out shape": ({"out": f32(B, H, N, K)}, ValueError, r"^out: expected shape \[2, 4, 5, 6\], got \[2, 4, 5, 8\]"),
    "out broadcast": (
        {"out": np.lib.stride_tricks.as_strided(f32(B, H, 1, V), (B, H, N, V), (H * V * 4, V * 4, 0, 4))},
        ValueError,
        r"^out: .*do not overlap",
    ),
    "out scattered": (
        {"out": f32(B, H, N, 2 * V)[..., ::2]},
        ValueError,
        r"^out: expected a contiguous last dimension, got stride 2",
    ),
    "decay rank": ({"log_decay": f32(1, B, H, N)}, ValueError, r"^log_decay: .*got 4 dimensions"),
    "decay heads": ({"log_decay": f32(3)}, ValueError, r"^log_decay: expected shape \[4\], got \[3\]"),
    "decay batch": ({"log_decay": f32(1, H)}, ValueError, r"^log_decay: expected shape \[2, 4\], got \[1, 4\]"),
    "decay tokens": (
        {"log_decay": f32(B, H, 1)},
        ValueError,
        r"^log_decay: expected shape \[2, 4, 5\], got \[2, 4, 1\]",
    ),
    "decay > 0": (
        {"log_decay": np.float32([0, -1, 0.25, 0])},
        ValueError,
        r"^log_decay: expected values <= 0, got 0\.25 at \[2\]",
    ),
    "decay nan": (
        {"log_decay": np.full((B, H, N), np.nan, np.float32)},
        ValueError,
        r"^log_decay: expected values <= 0, got -?nan at \[0, 0, 0\]",
    ),
    "decay number": ({"log_decay": 0.5}, ValueError, r"^log_decay: expected values <= 0, got 0\.5"),
    "decay nan number": ({"log_decay": float("nan")}, ValueError, r"^log_decay: expected values <= 0, got -?nan"),
    "decay list": ({"log_decay": [-1.0]}, TypeError, r"^log_decay: expected an array .*, got list"),
    "state shape": (
        {"initial_state": f32(B, H, V, K)},
        ValueError,
        r"^initial_state: expected shape \[2, 4, 8, 6\], got \[2, 4, 6, 8\]",
    ),
    "state dtype": (
        {"initial_state": f32(B, H, K, V).astype("f2")},
        TypeError,
        r"^initial_state: expected dtype float32, got float16",
    ),
    "cu rank": (
        cu(0, 9) | {"cu_seqlens": np.zeros((2, 2), "i4")},
        ValueError,
        r"^cu_seqlens: expected shape \[S \+ 1\], got \[2, 2\]",
    ),
    "cu dtype": (
        cu(0, 9) | {"cu_seqlens": f32(2)},
        TypeError,
        r"^cu_seqlens: expected dtype int32 or int64, got float32",
    ),
    "cu first": (cu(1, 9), ValueError, r"^cu_seqlens: expected 0 as the first value, got 1"),
    "cu last": (cu(0, 5, 8), ValueError, r"^cu_seqlens: expected the number of tokens, 9, as the last value, got 8"),
    "cu order": (cu(0, 5, 4, 9), ValueError, r"^cu_seqlens: expected values that do not decrease, got 4 at \[2\]"),
    "cu batch": ({"cu_seqlens": np.array([0, N], np.int32)}, ValueError, r"^cu_seqlens: expected B = 1 .*got B = 2"),
    "cu empty": (cu(), ValueError, r"^cu_seqlens: expected shape \[S \+ 1\], got \[0\]"),
    "method": ({"method": "fastest"}, ValueError, r"^method: unknown method 'fastest'; known are auto, .*chunk"),
    "method kind": ({"method": 3}, TypeError, r"^method: .*got int"),
    "layout": ({"layout": "nbhd"}, ValueError, r"^layout: expected 'bhnd' or 'bnhd', got 'nbhd'"),
    "precision": ({"precision": "half"}, ValueError, r"^precision: expected .*, got 'half'"),
    "scale": ({"scale": float("inf")}, ValueError, r"^scale: expected a finite number, got inf"),
    "scale kind": ({"scale": "1x"}, TypeError, r"^scale: expected a number, got str"),
    "stream": ({"stream": 1}, ValueError, r"^stream: expected NULL for tensors on the CPU"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_of_linear_attention(case):
    changes, error, text = REFUSED[case]
    given = good() | changes
    out = given["out"]
    before = None if out is None else out.copy()
    with pytest.raises(error, match=text):
        leetcore.linear_attention(given.pop("q"), **given)
    assert out is None or np.array_equal(out, before)


def test_unknown_keywords_are_refused():
    given = good()
    with pytest.raises(TypeError, match="output_final_state"):
        leetcore.linear_attention(given["q"], given["k"], given["v"], output_final_state=True)


@pytest.mark.parametrize("name", ["q", "k", "v", "initial_state"])
def test_out_over_an_input_is_refused(name):
    x = {n: f32(1, 2, 8, 8) for n in ("q", "k", "v", "initial_state")}
    x[name][:] = 3
    with pytest.raises(ValueError, match=rf"^out: expected memory of its own.*overlap with {name}"):
        leetcore.linear_attention(x["q"], x["k"], x["v"], initial_state=x["initial_state"], out=x[name])
    assert (x[name] == 3).all()


def test_out_beside_the_inputs_in_one_buffer_is_allowed():
    rng = np.random.default_rng(0)
    buffer = rng.standard_normal((1, 9, 2, 4 * 8)).astype(np.float32)
    q, k, v, out = (buffer[..., i * 8 : i * 8 + 8] for i in range(4))
    want = leetcore.linear_attention(*(x.copy() for x in (q, k, v)), -0.1, layout="bnhd")
    leetcore.linear_attention(q, k, v, -0.1, layout="bnhd", out=out)
    assert np.array_equal(out, want)
    with pytest.raises(ValueError, match=r"^out: expected memory of its own"):
        leetcore.linear_attention(q, k, v, -0.1, layout="bnhd", out=buffer[..., 20:28])


def decode(**changes):
    given = {n: f32(B, H, K) for n in ("q", "k")} | {"v": f32(B, H, V), "state": np.full((3, H, K, V), 5, np.float32)}
    given |= {"out": np.full((B, H, V), 7, np.float32)} | changes
    state, out = given["state"], given["out"]
    before = state.copy(), None if out is None else out.copy()
    try:
        leetcore.decode_step(given.pop("q"), given.pop("k"), given.pop("v"), given.pop("state"), **given)
    finally:
        assert np.array_equal(state, before[0]) and (out is None or np.array_equal(out, before[1]))


REFUSED_DECODE = {
    "state shape": (
        {"state": f32(3, H, V, K)},
        ValueError,
        r"^state: expected shape \[slots, 4, 8, 6\], got \[3, 4, 6, 8\]",
    ),
    "state slots": ({"state": f32(1, H, K, V)}, ValueError, r"^state: expected at least 2 slots.*got 1"),
    "state dtype": (
        {"state": np.zeros((3, H, K, V), "f8")},
        TypeError,
        r"^state: expected dtype float32, float16 or bfloat16, got float64",
    ),
    "index shape": (
        {"state_indices": np.zeros(3, "i4")},
        ValueError,
        r"^state_indices: expected shape \[2\], got \[3\]",
    ),
    "index dtype": (
        {"state_indices": np.zeros(2, "i2")},
        TypeError,
        r"^state_indices: expected dtype int32 or int64, got int16",
    ),
    "index high": (
        {"state_indices": np.array([0, 3], "i4")},
        ValueError,
        r"^state_indices: .* below 3, got 3 at \[1\]",
    ),
    "index low": (
        {"state_indices": np.array([-2, 0], "i4")},
        ValueError,
        r"^state_indices: expected -1 or .*, got -2 at \[0\]",
    ),
    "index twice": (
        {"state_indices": np.array([2, 2], "i4")},
        ValueError,
        r"^state_indices: .*differ, got 2 again at \[1\]",
    ),
    "ranks": ({"k": f32(B, H, 2, K)}, ValueError, r"^k: expected shape \[2, Hk, 1, 8\], got \[2, 4, 2, 8\]"),
    "tokens": (
        {n: f32(B, H, 65, K if n in "qk" else V) for n in "qkv"} | {"out": None},
        ValueError,
        r"^q: expected at most 64 tokens to decode, got 65",
    ),
    "out shape": (
        {"out": f32(B, H, 1, V)[:, :3]},
        ValueError,
        r"^out: expected shape \[2, 4, 1, 6\], got \[2, 3, 1, 6\]",
    ),
    "decay": ({"log_decay": 1.0}, ValueError, r"^log_decay: expected values <= 0, got 1"),
}


@pytest.mark.parametrize("case", REFUSED_DECODE)
def test_refusals_of_decode_step(case):
    changes, error, text = REFUSED_DECODE[case]
    with pytest.raises(error, match=text):
        decode(**changes)


def test_float64_log_decay_needs_float64_inputs():
    given = good()
    with pytest.raises(TypeError, match=r"^log_decay: expected dtype float32, got float64"):
        leetcore.linear_attention(given["q"], given["k"], given["v"], np.zeros(H))
    q, k, v = (given[n].astype(np.float64) for n in "qkv")
    assert leetcore.linear_attention(q, k, v, np.zeros(H)).dtype == np.float64
