"""Mamba-2: leetcore.ssd and ssd_step against the definition in float64, for every method, dtype and
form of the arguments.
"""

import leetcore
import numpy as np
import pytest
from conftest import DTYPES, TOLERANCE, normal
from leetcore import reference

METHODS = [m.name for m in leetcore.methods() if m.device == "cpu" and "token_lengths" in m.serves.split()]
WITHOUT_LENGTHS = [m.name for m in leetcore.methods() if m.device == "cpu" and "token_lengths" not in m.serves.split()]
# Half a unit in the last place of a 16-bit state, which is rounded once per step.
STATE_TOLERANCE = {"f16": 5e-4, "bf16": 2e-3}


def problem(dtype="f32", B=2, N=130, H=4, P=24, G=2, K=16, *, D=None, z=False, state=False, softplus=True, seed=0):
    """Arguments of ssd as models have them: dt_bias gives lengths from 0.001 to 0.1 at dt = 0."""
    rng = np.random.default_rng([seed, B, N, H, P, G, K])
    kind = DTYPES[dtype]
    exact = np.float64 if dtype == "f64" else np.float32
    lengths = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), H))
    given = {
        "x": normal(rng, (B, N, H, P), kind),
        "dt": normal(rng, (B, N, H), kind) if softplus else np.abs(normal(rng, (B, N, H), kind)),
        "A": -rng.uniform(1, 16, H).astype(exact),
        "B": normal(rng, (B, N, G, K), kind),
        "C": normal(rng, (B, N, G, K), kind),
    }
    if softplus:
        given |= {"dt_softplus": True, "dt_bias": np.log(np.expm1(lengths)).astype(exact)}
    if D is not None:
        given["D"] = normal(rng, (H, P)[:D], exact)
    if z:
        given["z"] = normal(rng, (B, N, H, P), kind)
    if state:
        given["initial_state"] = normal(rng, (B, H, P, K), exact)
    return given


def check(given, tolerance, **options):
    want, want_state = reference.ssd(**given, fast=True)
    y, state = leetcore.ssd(**given, return_state=True, **options)
    assert y.dtype == given["x"].dtype and y.shape == want.shape and state.shape == want_state.shape
    assert reference.error(y, want) <= tolerance[0]
    assert reference.error(state, want_state) <= tolerance[1]
    alone = leetcore.ssd(**given, **options)
    assert reference.error(alone, want) <= tolerance[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softplus", [False, True])
def test_every_method(method, dtype, softplus):
    given = problem(dtype, D=1, z=True, state=True, softplus=softplus)
    check(given, TOLERANCE[dtype], method=method)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "H, P, G, K",
    [
        (1, 1, 1, 1),
        (3, 80, 1, 64),
        (8, 64, 8, 128),
        (8, 64, 1, 128),
        (24, 16, 1, 32),
        (6, 33, 3, 96),
        (5, 64, 5, 17),
        (2, 64, 1, 256),
        (16, 1, 2, 40),
    ],
)
def test_shapes_of_models(dtype, H, P, G, K):
    check(problem(dtype, B=1, N=100, H=H, P=P, G=G, K=K, D=1), TOLERANCE[dtype])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("N", [0, 1, 2, 63, 64, 65, 127, 500])
def test_lengths_of_sequences(method, N):
    check(problem(N=N, H=8, G=1, D=2, z=True, state=True), TOLERANCE["f32"], method=method)


@pytest.mark.parametrize("N", [8192])
def test_a_long_sequence(N):
    check(problem(B=1, N=N, H=8, P=16, G=1, K=16, D=1), TOLERANCE["f32"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("decay", ["none", "huge", "mixed"])
def test_decays(method, decay):
    given = problem(N=200, H=6, G=1, softplus=False)
    given["A"] = np.array(
        {"none": [0] * 6, "huge": [-1e30] * 6, "mixed": [0, -1e-6, -1, -20, -np.inf, -1e4]}[decay], np.float32
    )
    given["dt"][:, ::7] = 0  # a token of length 0 neither enters nor ages the state
    given["dt"][:, 3] = 1e4
    check(given, TOLERANCE["f32"], method=method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("limits", [(0.0, np.inf), (0.01, 0.05), (0.0, 1e-3), (0.5, 0.5)])
def test_limits_of_lengths(method, limits):
    check(problem() | {"dt_limit": limits}, TOLERANCE["f32"], method=method)


@pytest.mark.parametrize("value", [-1000.0, -100.0, -20.0, -1.0, 0.0, 1.0, 20.0, 1000.0])
def test_softplus_of_every_size(value):
    given = problem("f64", N=70)
    given["dt"] = np.full_like(given["dt"], value)
    given["A"] = given["A"] / max(value, 1)
    want, want_state = reference.ssd(**given)
    y, state = leetcore.ssd(**given, return_state=True)
    if value == -1000:  # the lengths are denormal numbers in float64
        assert np.abs(y).max() < 1e-300
        return
    assert reference.error(y, want) <= 1e-12
    assert reference.error(state, want_state) <= 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_packed_sequences_do_not_leak(method):
    starts = np.array([0, 0, 1, 65, 70, 200], np.int32)
    given = problem(B=1, N=200, D=1, z=True)
    given |= {"cu_seqlens": starts, "initial_state": normal(np.random.default_rng(1), (5, 4, 24, 16))}
    check(given, TOLERANCE["f32"], method=method)
    given["x"][:, 65:70] = np.nan
    given["initial_state"][2] = np.inf
    y, state = leetcore.ssd(**given, return_state=True, method=method)
    assert np.isfinite(y[:, :1]).all() and np.isfinite(y[:, 70:]).all() and np.isfinite(state[[0, 1, 4]]).all()


@pytest.mark.parametrize("layout", ["state of [K, P] in memory", "views of one projection", "broadcast"])
def test_strides(layout):
    given = problem(D=1, z=True, state=True)
    want, want_state = reference.ssd(**given)
    if layout.startswith("state"):
        given["initial_state"] = np.ascontiguousarray(given["initial_state"].swapaxes(2, 3)).swapaxes(2, 3)
    elif layout.startswith("views"):
        B, N, H, P = given["x"].shape
        row = np.concatenate([given[name].reshape(B, N, -1) for name in ("z", "x", "B", "C", "dt")], axis=2)
        parts = np.split(row, np.cumsum([H * P, H * P, 32, 32]), axis=2)
        for name, part in zip(("z", "x", "B", "C", "dt"), parts, strict=True):
            given[name] = part.reshape(given[name].shape)
            assert np.shares_memory(part, row)
    else:
        given["dt"] = np.broadcast_to(given["dt"][:, :1, :1], given["dt"].shape)
        given["D"] = np.broadcast_to(given["D"][:1], given["D"].shape)
        given["dt_bias"] = np.broadcast_to(given["dt_bias"][:1], given["dt_bias"].shape)
        want, want_state = reference.ssd(**given)
    y, state = leetcore.ssd(**given, return_state=True)
    assert reference.error(y, want) <= TOLERANCE["f32"][0]
    assert reference.error(state, want_state) <= TOLERANCE["f32"][1]


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_parameters_in_16_bits_and_in_float32_agree(dtype):
    given = problem(dtype, D=1)
    given["dt_bias"], given["D"] = (given[name].astype(DTYPES[dtype]) for name in ("dt_bias", "D"))
    check(given, TOLERANCE[dtype])
    wide = given | {name: given[name].astype(np.float32) for name in ("dt", "dt_bias", "D")}
    assert np.array_equal(leetcore.ssd(**given), leetcore.ssd(**wide))


def test_a_split_anywhere_gives_the_answer_of_the_whole():
    given = problem(N=150, D=1, z=True)
    want, want_state = leetcore.ssd(**given, return_state=True)
    for cut in (1, 63, 64, 100):
        parts, state = [], None
        for part in (slice(0, cut), slice(cut, None)):
            piece = {
                name: value[:, part] if name in ("x", "dt", "B", "C", "z") else value for name, value in given.items()
            }
            y, state = leetcore.ssd(**piece, initial_state=state, return_state=True)
            parts.append(y)
        assert reference.error(np.concatenate(parts, 1), want.astype(np.float64)) <= TOLERANCE["f32"][0]
        assert reference.error(state, want_state.astype(np.float64)) <= TOLERANCE["f32"][1]


def test_heads_of_a_group_are_those_of_separate_calls():
    given = problem(B=1, N=200, H=16, P=32, G=2, K=64, D=1)
    whole = leetcore.ssd(**given, method="chunk")
    for h in range(16):
        one = {
            name: value[:, :, h : h + 1] if name in ("x", "dt") else value[h : h + 1]
            for name, value in given.items()
            if name in ("x", "dt", "A", "D", "dt_bias")
        }
        group = {name: given[name][:, :, h // 8 : h // 8 + 1] for name in "BC"}
        alone = leetcore.ssd(**one, **group, dt_softplus=True, method="chunk")
        assert np.array_equal(alone[:, :, 0], whole[:, :, h])


def test_the_number_of_threads_does_not_change_a_bit():
    given = problem(B=1, N=200, H=24, G=1, D=1, state=True)
    answers = []
    for threads in (1, 2, 3, 7):
        leetcore.set_num_threads(threads)
        answers.append(leetcore.ssd(**given, return_state=True, method="chunk"))
    leetcore.set_num_threads(0)
    for y, state in answers[1:]:
        assert np.array_equal(y, answers[0][0]) and np.array_equal(state, answers[0][1])


def test_out_is_written():
    given = problem()
    out = np.full_like(given["x"], np.nan)
    assert leetcore.ssd(**given, out=out) is out
    assert np.array_equal(out, leetcore.ssd(**given))


# ---- the step


def step_problem(dtype="f32", B=3, H=4, P=24, G=2, K=16, *, slots=None, state_dtype=None, D=1, z=True, softplus=True):
    given = problem(dtype, B=B, N=1, H=H, P=P, G=G, K=K, D=D, z=z, softplus=softplus)
    for name in ("x", "dt", "B", "C", "z"):
        if name in given:
            given[name] = given[name][:, 0]
    kind = DTYPES[state_dtype or ("f64" if dtype == "f64" else "f32")]
    given["state"] = normal(np.random.default_rng(5), (slots or B, H, P, K), kind)
    return given


def expected_step(given, slots=None):
    """y and the pool after the step, in float64."""
    pool = given["state"].astype(np.float64)
    slots = np.arange(len(given["x"])) if slots is None else slots
    live = slots >= 0
    one = {name: given[name][live][:, None] for name in ("x", "dt", "B", "C", "z") if name in given}
    rest = {name: value for name, value in given.items() if name not in (*one, "state")}
    y = np.zeros(given["x"].shape)
    out, pool[slots[live]] = reference.ssd(**one, **rest, initial_state=pool[slots[live]])
    y[live] = out[:, 0]
    return y, pool


def check_step(given, tolerance, slots=None):
    want, want_state = expected_step(given, slots)
    y = leetcore.ssd_step(**given, state_indices=slots)
    assert y.dtype == given["x"].dtype
    assert reference.error(y, want) <= tolerance[0]
    assert reference.error(given["state"], want_state) <= tolerance[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H, P, G, K", [(1, 1, 1, 1), (4, 80, 1, 64), (8, 64, 8, 128), (6, 33, 3, 17), (2, 7, 1, 256)])
def test_step(dtype, H, P, G, K):
    check_step(step_problem(dtype, H=H, P=P, G=G, K=K), TOLERANCE[dtype])


@pytest.mark.parametrize("state_dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("transposed", [False, True])
def test_step_in_pools(dtype, state_dtype, transposed):
    given = step_problem(dtype, B=5, slots=9, K=40, state_dtype=state_dtype)
    if transposed:  # [H, K, P] in memory
        given["state"] = np.ascontiguousarray(given["state"].swapaxes(2, 3)).swapaxes(2, 3)
    slots = np.array([7, -1, 0, 3, -1], np.int32)
    before = given["state"].copy()
    output, state = TOLERANCE[dtype]
    check_step(given, (output, STATE_TOLERANCE.get(state_dtype, state)), slots)
    assert np.array_equal(before[[1, 2, 4, 5, 6, 8]], given["state"][[1, 2, 4, 5, 6, 8]])


@pytest.mark.parametrize("options", [{"D": 2}, {"z": False}, {"softplus": False}, {"D": None}])
def test_forms_of_a_step(options):
    check_step(step_problem(**options), TOLERANCE["f32"])


def test_steps_continue_a_sequence():
    given = problem(N=40, D=1)
    want, want_state = leetcore.ssd(**given, return_state=True)
    first = {name: value[:, :30] if name in ("x", "dt", "B", "C") else value for name, value in given.items()}
    _, state = leetcore.ssd(**first, return_state=True)
    rest = {name: given[name] for name in ("A", "D", "dt_bias")}
    for t in range(30, 40):
        one = {name: given[name][:, t] for name in ("x", "dt", "B", "C")}
        y = leetcore.ssd_step(**one, **rest, state=state, dt_softplus=True)
        assert reference.error(y, want[:, t].astype(np.float64)) <= TOLERANCE["f32"][0]
    assert reference.error(state, want_state.astype(np.float64)) <= TOLERANCE["f32"][1]


# ---- refusals


def without(given, *names):
    return {name: value for name, value in given.items() if name not in names}


@pytest.mark.parametrize(
    "change, text",
    [
        (
            {"x": np.zeros((2, 130, 5, 24), np.float32)},
            r"C: expected .* divides 5, the most of C, B and x, got 2",
        ),
        ({"dt": np.zeros((2, 130, 3), np.float32)}, r"dt: expected shape \[2, 130, 4\], got \[2, 130, 3\]"),
        ({"dt": np.zeros((2, 130, 4))}, r"dt: expected dtype float32, got float64"),
        ({"B": np.zeros((2, 131, 2, 16), np.float32)}, r"B: expected shape \[2, 130, .*, 16\], got \[2, 131, 2, 16\]"),
        ({"C": np.zeros((2, 130, 2, 8), np.float32)}, r"B: expected shape .*, 8\], got \[2, 130, 2, 16\]"),
        ({"A": np.full(4, 0.5, np.float32)}, r"A: expected values <= 0, got 0.5 at \[0\]"),
        ({"A": np.zeros((2, 4, 130), np.float32)}, r"A: expected a scalar, \[Hs\] or \[B, Hs\], as dt is given"),
        ({"D": np.zeros(3, np.float32)}, r"D: expected shape \[4\], got \[3\]"),
        ({"D": np.zeros((4, 1, 1), np.float32)}, r"D: expected \[H\] or \[H, V\], got 3 dimensions"),
        ({"z": np.zeros((2, 130, 4, 23), np.float32)}, r"z: expected shape \[2, 130, 4, 24\], got"),
        ({"z": np.zeros((2, 130, 4, 24))}, r"z: expected dtype float32 like C, got float64"),
        ({"dt_bias": np.zeros(2, np.float32)}, r"dt_bias: expected shape \[4\], got \[2\]"),
        ({"dt_limit": (1, 0.5)}, r"dt_limit: expected 0 <= least <= greatest and greatest > 0, got 1 and 0.5"),
        ({"dt_limit": (-1, 1)}, r"dt_limit: expected 0 <= least"),
        ({"dt_limit": 3}, r"dt_limit: expected two numbers, got 3"),
        ({"dt_limit": ("a", 1)}, r"dt_limit: expected a number, got str"),
        ({"initial_state": np.zeros((2, 4, 16, 24), np.float32)}, r"initial_state: expected shape"),
        ({"out": np.zeros((2, 130, 4, 23), np.float32)}, r"out: expected shape \[2, 130, 4, 24\]"),
        ({"method": "fft"}, r"method: 'fft' does not serve this problem(.|\n)*fft: its Toeplitz mask needs one decay"),
    ],
)
def test_wrong_arguments_are_named(change, text):
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=text):
        leetcore.ssd(**(problem() | change))


@pytest.mark.parametrize("method", WITHOUT_LENGTHS)
def test_methods_that_do_not_serve_lengths_say_so(method):
    with pytest.raises(NotImplementedError, match=rf"{method}: (does not take lengths|its Toeplitz)"):
        leetcore.ssd(**problem(), method=method)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"state": np.zeros((2, 4, 24, 16), np.float32)}, r"state: expected at least 3 slots"),
        ({"state": np.zeros((3, 4, 16, 24), np.float32)}, r"state: expected shape"),
        ({"state": np.zeros((3, 4, 48, 32), np.float32)[:, :, ::2, ::2]}, r"state: expected one of the last two dim"),
        ({"dt": np.zeros((3, 3), np.float32)}, r"dt: expected shape \[3, 4, 1\]"),
        ({"state_indices": np.array([0, 0, 1])}, r"state_indices: expected slots that differ, got 0 again at \[1\]"),
        ({"state_indices": np.array([0, 1, 7])}, r"state_indices: expected -1 or a slot below 3, got 7 at \[2\]"),
    ],
)
def test_wrong_arguments_of_a_step_are_named_and_nothing_is_written(change, text):
    given = step_problem() | change
    before = given["state"].copy()
    with pytest.raises((ValueError, TypeError), match=text):
        leetcore.ssd_step(**given)
    assert np.array_equal(before, given["state"])
