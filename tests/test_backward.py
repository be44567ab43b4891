"""Gradients: finite differences in float64, the tolerances of every dtype, refused arguments."""

import itertools

import leetcore
import numpy as np
import pytest
from conftest import DTYPES
from gradients import HEADS, KINDS, TOLERANCE, backward, definition, problem
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from leetcore import reference

few = settings(
    max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def loss(arguments, options, d_results):
    results = reference.linear_attention(**arguments, **options)
    return sum((np.asarray(d).astype(np.float64) * x).sum() for d, x in zip(d_results, results, strict=True))


def finite_difference(arguments, options, d_results, name, index):
    """The derivative of the loss by one element. The loss is linear in q, k, v and the state, so a
    step of any size is exact. It is smooth in log_decay, where the quotient has fourth order."""
    x = arguments[name].astype(np.float64)
    step = 1.0 if name != "log_decay" else 1e-3

    def at(shift):
        moved = np.array(x)
        moved[index] += shift
        return loss(arguments | {name: moved}, options, d_results)

    if name != "log_decay":
        return (at(step) - at(-step)) / (2 * step)
    return (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step)


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_differences(kind, heads, layout):
    lengths = None if kind == "[B,Hs]" or layout == "bhnd" else [5, 0, 4]
    arguments, options, d_results = problem(heads=heads, kind=kind, N=9, layout=layout, lengths=lengths)
    if kind is not None:  # at 0 and -inf only a one-sided difference exists
        arguments["log_decay"] = np.clip(arguments["log_decay"], -3, -0.05)
    got = backward(arguments, options, d_results)
    rng = np.random.default_rng(1)
    for name, x in arguments.items():
        gradient = getattr(got, f"d_{name}")
        if x is None:
            assert gradient is None
            continue
        assert gradient.shape == x.shape and gradient.dtype == x.dtype
        every = list(np.ndindex(x.shape))
        for i in rng.permutation(len(every))[:8]:
            want = finite_difference(arguments, options, d_results, name, every[i])
            assert gradient[every[i]] == pytest.approx(want, rel=1e-7, abs=1e-8), (name, every[i])


@few
@given(
    N=st.integers(0, 300),
    K=st.integers(1, 70),
    V=st.integers(1, 70),
    heads=st.sampled_from(HEADS),
    kind=st.sampled_from(KINDS),
    layout=st.sampled_from(["bhnd", "bnhd"]),
    dtype=st.sampled_from(list(DTYPES)),
)
@example(N=200, K=64, V=64, heads=(2, 2, 2), kind="[Hs]", layout="bhnd", dtype="f32")
@example(N=0, K=1, V=1, heads=(1, 1, 1), kind="[Hs]", layout="bhnd", dtype="f64")
@example(N=200, K=64, V=64, heads=(2, 2, 2), kind="[B,Hs,N]", layout="bnhd", dtype="bf16")
def test_every_dtype_is_as_exact_as_promised(N, K, V, heads, kind, layout, dtype):
    p = problem(N=N, K=K, V=V, heads=heads, kind=kind, layout=layout, dtype=DTYPES[dtype])
    for got, want in zip(backward(*p), definition(*p), strict=True):
        assert (got is None) == (want is None)
        if got is not None and got.shape != ():
            assert reference.error(got, want) <= TOLERANCE[dtype]


@few
@given(lengths=st.lists(st.integers(0, 140), min_size=1, max_size=5), heads=st.sampled_from(HEADS))
@example(lengths=[0, 64, 0, 65, 0], heads=(4, 2, 1))
def test_packed_sequences_are_separate_calls(lengths, heads):
    arguments, options, (d_o, d_state) = problem(lengths=lengths, heads=heads, kind="[B,Hs,N]", dtype=np.float32)
    got = backward(arguments, options, (d_o, d_state))
    for s, (start, end) in enumerate(itertools.pairwise(options["cu_seqlens"])):
        part = {name: x[:, :, start:end] for name, x in arguments.items() if name != "initial_state"}
        part["initial_state"] = arguments["initial_state"][s : s + 1]
        alone = backward(part, options | {"cu_seqlens": None}, (d_o[:, :, start:end], d_state[s : s + 1]))
        for packed, single in zip(got[:4], alone[:4], strict=True):
            assert np.array_equal(packed[:, :, start:end], single)
        assert np.array_equal(got.d_initial_state[s : s + 1], alone.d_initial_state)


@few
@given(N=st.integers(1, 300), cut=st.integers(0, 300), kind=st.sampled_from(["[Hs]", "[B,Hs,N]"]))
def test_a_split_with_states_and_gradients_carried_changes_nothing(N, cut, kind):
    arguments, options, (d_o, d_state) = problem(N=N, K=16, V=20, kind=kind)
    cut = min(cut, N)

    def part(tokens, **states):
        cuts = {name: arguments[name][:, :, tokens] for name in "qkv"}
        decay = arguments["log_decay"]
        return cuts | {"log_decay": decay[:, :, tokens] if kind == "[B,Hs,N]" else decay} | states

    first, second = slice(None, cut), slice(cut, None)
    before = part(first, initial_state=arguments["initial_state"])
    carried = leetcore.linear_attention(**before, scale=options["scale"], return_state=True)[1]
    late = backward(part(second, initial_state=carried), options, (d_o[:, :, second], d_state))
    early = backward(before, options, (d_o[:, :, first], late.d_initial_state))
    whole = backward(arguments, options, (d_o, d_state))
    for name in ("d_q", "d_k", "d_v"):
        joined = np.concatenate([getattr(early, name), getattr(late, name)], axis=2)
        assert reference.error(joined, getattr(whole, name)) <= 1e-12
    assert reference.error(early.d_initial_state, whole.d_initial_state) <= 1e-12
    if kind == "[Hs]":
        assert reference.error(early.d_log_decay + late.d_log_decay, whole.d_log_decay) <= 1e-11


def test_absent_gradients_are_zero():
    arguments, options, (d_o, d_state) = problem(N=70)
    for absent, zeros in (((d_o, None), (d_o, 0 * d_state)), ((None, d_state), (0 * d_o, d_state))):
        for got, want in zip(backward(arguments, options, absent), backward(arguments, options, zeros), strict=True):
            assert np.array_equal(got, want)


def test_wants():
    arguments, options, d_results = problem(N=70)
    every = backward(arguments, options, d_results)
    some = backward(arguments, options, d_results, wants=["d_k", "d_log_decay"])
    assert some.d_q is some.d_v is some.d_initial_state is None
    assert np.array_equal(some.d_k, every.d_k) and np.array_equal(some.d_log_decay, every.d_log_decay)
    stateless = backward(arguments | {"initial_state": None}, options, d_results, wants=("d_initial_state",))
    assert np.array_equal(stateless.d_initial_state, every.d_initial_state)  # it is independent of the state


def test_a_number_as_log_decay_has_the_sum_of_all_gradients():
    arguments, options, d_results = problem(N=70)
    got = backward(arguments | {"log_decay": -0.1}, options, d_results)
    each = backward(arguments | {"log_decay": np.full(2, -0.1)}, options, d_results)
    assert got.d_log_decay.shape == () and got.d_log_decay == pytest.approx(each.d_log_decay.sum(), rel=1e-12)


def test_the_gradient_of_no_memory_at_all_is_zero():
    arguments, options, d_results = problem(N=70)
    got = backward(arguments | {"log_decay": np.full(2, -np.inf)}, options, d_results)
    assert not got.d_log_decay.any() and not got.d_initial_state.any() and np.isfinite(got.d_k).all()


def test_steep_decays_keep_their_digits():
    """If gamma is small, so is every gradient of log_decay, although some of its terms are not."""
    for gamma in (1e-4, 1e-8):
        arguments, options, d_results = problem(N=200, K=16, V=16, dtype=np.float32)
        arguments |= {"log_decay": np.full(2, np.log(gamma), np.float32)}
        got, want = backward(arguments, options, d_results), definition(arguments, options, d_results)
        assert reference.error(got.d_log_decay, want.d_log_decay) <= 2e-5


def test_every_library_gets_its_own_arrays_back():
    torch = pytest.importorskip("torch")
    arguments, options, (d_o, d_state) = problem(N=70, dtype=np.float32)
    want = backward(arguments, options, (d_o, d_state))
    tensors = {name: torch.from_numpy(x) for name, x in arguments.items()}
    got = backward(tensors, options, (torch.from_numpy(d_o), torch.from_numpy(d_state)))
    for x, y in zip(got, want, strict=True):
        assert isinstance(x, torch.Tensor) and np.array_equal(x.numpy(), y)


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"d_o": None, "d_final_state": None}, ValueError, "d_o: required where d_final_state is absent"),
        ({"d_o": np.zeros((2, 2, 12, 3))}, ValueError, r"d_o: expected shape \[2, 2, 12, 4\], got \[2, 2, 12, 3\]"),
        ({"d_o": np.zeros((2, 2, 12, 4), "f4")}, TypeError, "d_o: expected dtype float64 like q, got float32"),
        ({"d_final_state": np.zeros((1, 2, 3, 4))}, ValueError, "d_final_state: expected shape"),
        ({"wants": []}, ValueError, "at least one gradient"),
        ({"wants": "d_q"}, ValueError, "wants: expected names among d_q, d_k"),
        ({"wants": ["d_o"]}, ValueError, "wants: expected names among d_q, d_k"),
        ({"log_decay": None, "wants": ["d_log_decay"]}, ValueError, "d_log_decay: .* log_decay is absent"),
        ({"log_decay": np.ones(2)}, ValueError, "log_decay: expected values <= 0, got 1"),
        ({"layout": "hbnd"}, ValueError, "layout: expected"),
        ({"d_o": "text"}, TypeError, "d_o: expected an array"),
    ],
)
def test_refusals(change, error, text):
    arguments, options, (d_o, d_state) = problem()
    with pytest.raises(error, match=text):
        leetcore.linear_attention_backward(**arguments | options | {"d_o": d_o, "d_final_state": d_state} | change)
