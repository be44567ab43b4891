"""The table of methods: costs, choice, measured corrections, and registered functions."""

import re
from pathlib import Path

import leetcore
import numpy as np
import pytest
from conftest import METHODS, TOLERANCE, log_decays, normal
from leetcore import reference, tuning


def arrays(B=2, heads=(4, 2, 1), N=70, K=8, V=12, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [normal(rng, (B, H, N, D), dtype) for H, D in zip(heads, (K, K, V), strict=True)]


@pytest.fixture(autouse=True)
def clean():
    yield
    tuning.use(None)


# ---- the methods


def test_every_row_of_the_table_is_there():
    table = Path(__file__).parent.parent / "cpp" / "methods.def"
    assert sorted(METHODS) == sorted(re.findall(r"^CPU\((\w+)\)", table.read_text(), re.M))
    assert len(METHODS) >= 8


def test_lightning_is_another_name_of_chunk():
    q, k, v = arrays()
    for method in ("lightning", "chunk"):
        assert "* chunk" in leetcore.explain(q, k, v, -0.1, method=method)
    assert np.array_equal(
        leetcore.linear_attention(q, k, v, -0.1, method="lightning"),
        leetcore.linear_attention(q, k, v, -0.1, method="chunk"),
    )


def test_methods_agree():
    q, k, v = arrays(N=600)
    answers = [leetcore.linear_attention(q, k, v, -0.05, method=m, return_state=True) for m in METHODS]
    for o, state in answers[1:]:
        assert reference.error(o, answers[0][0].astype("f8")) < 2 * TOLERANCE["f32"][0]
        assert reference.error(state, answers[0][1].astype("f8")) < 2 * TOLERANCE["f32"][1]


# ---- cost


def test_cost_of_chunk_is_its_formula():
    got = leetcore.cost("chunk", B=2, H=3, N=640, K=32, V=48, initial_state=True, return_state=True)
    assert got.method == "chunk"
    assert got.flop == 2 * 3 * 640 * (65 * (32 + 48) + 4 * 32 * 48)
    states = 2 * 2 * 3 * 32 * 48 * 4
    assert got.least_bytes == got.bytes == 2 * 3 * 640 * 4 * (2 * 32 + 2 * 48) + states
    assert got.depth == 10 and got.workspace > 0 and got.microseconds > 0


@pytest.mark.parametrize("method", METHODS)
def test_costs_grow_as_the_documentation_says(method):
    flop = [leetcore.cost(method, H=2, N=N, K=64).flop for N in (1 << 14, 1 << 15)]
    growth = {"parallel": 4.0, "recursive": 2 * 14 / 13, "fft": 2 * 16 / 15}.get(method, 2.0)
    assert flop[1] / flop[0] == pytest.approx(growth, rel=0.03)


def test_auto_is_the_cheapest():
    for N in (1, 30, 5000):
        costs = [leetcore.cost(m, H=8, N=N, K=64) for m in METHODS]
        assert leetcore.cost(H=8, N=N, K=64) == min(costs, key=lambda c: c.microseconds)


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ({"method": "fast"}, ValueError, "method: unknown method 'fast'; known are auto, chunk"),
        ({"method": "fft", "per_token": True}, NotImplementedError, "chunk: serves it"),
        ({"dtype": "int8"}, ValueError, "dtype: expected one of float64, float32"),
        ({"N": 1.5}, TypeError, "N: expected an integer, got float"),
        ({"K": 0}, ValueError, "q: expected"),
        ({"Hk": 3}, ValueError, "divides"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_wrong_questions_about_cost(arguments, error, text):
    with pytest.raises(error, match=text):
        leetcore.cost(**({"H": 8, "N": 100, "K": 16} | arguments))


# ---- what methods declare, and the choice


def test_what_a_row_declares_is_what_it_serves():
    """Every combination of op, dtype and decay: a call is refused exactly where its row does not
    declare a feature.
    """
    for dtype, name in ((np.float64, "float64"), (np.float32, "float32"), (np.float16, "float16")):
        q, k, v = arrays(N=3, dtype=dtype)
        exact = np.float64 if dtype == np.float64 else np.float32
        decays = {"no_decay": None, "decay_per_head": -0.1, "decay_per_token": np.full((2, 2, 3), -0.1, exact)}
        for decay, log_decay in decays.items():
            for op in ("forward", "backward", "decode"):
                asked = {op, name, decay, "grouped_heads"}
                if op == "backward" and log_decay is not None:
                    asked.add("decay_gradients")
                choice = leetcore.candidates(q, k, v, log_decay, op=op)
                for row, answer in zip(leetcore.methods(), choice.all, strict=True):
                    assert (answer.refusal is None) == (asked <= set(row.serves.split())), (row.name, asked)


def test_an_undeclared_feature_is_refused_in_the_words_of_the_row():
    q, k, v = arrays()
    per_token = np.full((2, 2, 70), -0.1, np.float32)
    refusals = {c.method: c.refusal for c in leetcore.candidates(q, k, v, per_token).all}
    assert refusals["fft"] == "its Toeplitz mask needs one decay per head, not one per token"
    refusals = {c.method: c.refusal for c in leetcore.candidates(q, k, v, op="backward").all}
    assert refusals["scan"].startswith("does not compute gradients; method chunk does")
    assert {m for m, why in refusals.items() if why is None} == {"chunk"}


def test_candidates_say_what_decides():
    q, k, v = arrays(N=600)
    tuning.use(factors(parallel=1e-6))
    choice = leetcore.candidates(q, k, v, -0.1)
    assert (choice.op, choice.decided_by, choice.chosen.method) == ("forward", "prediction", "parallel")
    assert choice.chosen.correction == pytest.approx(1e-6)
    tuning.use(None)
    choice = leetcore.candidates(q, k, v, -0.1)
    assert choice.table == "shipped"
    for answer in choice.all:
        assert answer.microseconds == pytest.approx(answer.model_us * answer.correction)
        assert answer.bound in ("compute", "memory", "overhead")
        got = leetcore.cost(answer.method, B=2, Hq=4, Hk=2, Hv=1, N=600, K=8, V=12)
        assert (answer.flop, answer.bytes, answer.workspace) == (got.flop, got.bytes, got.workspace)
    assert choice.chosen == min(choice.all, key=lambda c: c.microseconds)
    assert leetcore.candidates(q, k, v, -0.1, method="scan").decided_by == "method"
    for op, method in (("backward", "chunk"), ("decode", "recurrent")):
        few = [x[:, :, :4] for x in (q, k, v)]
        choice = leetcore.candidates(*few, -0.1, op=op)
        assert (choice.op, choice.chosen.method, choice.decided_by) == (op, method, "only")
        assert all(c.correction == 1 for c in choice.all if c.refusal is None)
    assert leetcore.candidates(q[:, :, 0], k[:, :, 0], v[:, :, 0], op="decode").chosen.method == "recurrent"
    one = [x[:, :, 0] for x in (q, k, v)]
    pools = [leetcore.candidates(*one, op="decode", state=np.zeros((5, 2, 8, 12), t)) for t in ("f4", "f2")]
    assert pools[0].chosen.least_bytes > pools[1].chosen.least_bytes  # a state of 16 bits is shorter
    with pytest.raises(ValueError, match=r"^state: expected shape \[slots, 2, 8, 12\], got"):
        leetcore.candidates(*one, op="decode", state=np.zeros((5, 2, 8, 13), "f4"))


def test_candidates_know_the_final_state():
    q, k, v = arrays(B=1, heads=(1, 1, 1), N=64, K=64, V=64)
    less, more = (leetcore.candidates(q, k, v, -0.1, return_state=wanted) for wanted in (False, True))
    assert more.chosen.least_bytes == less.chosen.least_bytes + 64 * 64 * 4


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ({"op": "training"}, ValueError, "op: expected one of forward, backward, decode, got 'training'"),
        ({"method": "fast"}, ValueError, "method: unknown method 'fast'"),
        ({"method": 3}, TypeError, "method: expected 'auto'"),
        ({"layout": "nbhd"}, ValueError, "layout: expected 'bhnd' or 'bnhd'"),
        ({"op": "backward", "method": "scan"}, NotImplementedError, "'scan' does not serve this problem"),
        ({"op": "decode"}, ValueError, "q: expected at most 64 tokens to decode, got 70"),
        ({"op": "decode", "initial_state": np.ones(3)}, ValueError, 'initial_state: op "decode" has none'),
        ({"state": np.ones(3)}, ValueError, 'state: only op "decode" takes it; expected None'),
    ],
    ids=str,
)
def test_wrong_questions_about_candidates(arguments, error, text):
    with pytest.raises(error, match=text):
        leetcore.candidates(*arrays(), -0.1, **arguments)


def test_functions_are_candidates(mine):
    q, k, v = arrays()
    choice = leetcore.candidates(q, k, v, -0.1, method="plain")
    assert (choice.chosen.method, choice.decided_by, choice.chosen.flop) == ("plain", "method", None)
    assert leetcore.explain(q, k, v, -0.1, method="plain").startswith("method names plain\n")
    with pytest.raises(NotImplementedError, match="method: 'plain' was registered without states"):
        leetcore.candidates(q, k, v, -0.1, method="plain", return_state=True)
    with pytest.raises(NotImplementedError, match="method: 'plain' computes forward passes only"):
        leetcore.candidates(q, k, v, -0.1, method="plain", op="backward")


# ---- measured corrections


def factors(**values):
    lines = ["axis N 1 100", "axis D 1 100", "axis states 0.1 10"]
    return "\n".join(lines + [f"factor {method} 4 {' '.join([str(x)] * 8)}" for method, x in values.items()])


def test_measured_times_change_the_choice_and_the_prediction():
    shape = {"H": 8, "N": 2048, "K": 64}
    tuning.use("")
    before = leetcore.cost("parallel", **shape).microseconds
    tuning.use(factors(parallel=1e-6))
    assert leetcore.cost(**shape).method == "parallel"
    assert leetcore.cost("parallel", **shape).microseconds == pytest.approx(before * 1e-6, rel=0.2)
    assert leetcore.cost(**shape, dtype="float64").method != "parallel"  # another size of element
    tuning.use(None)
    assert leetcore.cost(**shape).method != "parallel"


def test_the_table_is_interpolated():
    tuning.use("")
    flat = leetcore.cost("chunk", N=10, K=10).microseconds
    tuning.use("axis N 1 100\naxis D 1 100\naxis states 0.01 10\nfactor chunk 4 1 1 1 1 3 3 3 3")
    assert leetcore.cost("chunk", N=10, K=10).microseconds == pytest.approx(2 * flat)
    assert leetcore.cost("chunk", N=1, K=10).microseconds < 1.01 * flat
    tuning.use("axis N 1 100\naxis D 1 100\naxis states 0.01 10\nfactor chunk 4 2 2 2 2 - - - -")
    assert leetcore.cost("chunk", N=10, K=10).microseconds == pytest.approx(2 * flat)  # the nearest N that was measured
    tuning.use("isa other\naxis N 1 2\nfactor chunk 4 1")
    assert leetcore.cost("chunk", N=10, K=10).microseconds == pytest.approx(flat)


@pytest.mark.parametrize(
    "text, message",
    [
        ("speed 1", "line 1: expected isa, axis or factor, got 'speed'"),
        ("axis", "line 1: expected more after 'axis'"),
        ("# x\naxis M 1 2", "line 2: expected axis N, D or states, got 'M'"),
        ("axis N 1", "line 1: expected at least two values"),
        ("axis N 2 1", "line 1: expected rising values, got '1'"),
        ("axis N 1 x", "line 1: expected a positive number, got 'x'"),
        ("factor chunk 3 1", "line 1: expected 2, 4 or 8 bytes, got '3'"),
        (factors(chunk=1) + " 1", "line 4: expected 8 values, got 9"),
        (factors(chunk=-1), "line 4: expected a positive number, got '-1'"),
        (factors(chunk=1) + "\naxis N 1 2", "line 5: expected axes before factors"),
    ],
)
def test_a_broken_table_is_refused_and_changes_nothing(text, message):
    before = leetcore.cost("chunk", N=10, K=10)
    with pytest.raises(ValueError, match=f"tuning: {message}"):
        tuning.use(text)
    assert leetcore.cost("chunk", N=10, K=10) == before


def test_the_table_of_the_cache_directory_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "path", lambda isa: tmp_path / "table.txt")
    shape = {"H": 8, "N": 2048, "K": 64}
    for text, chosen in (
        (tuning.completed(f"{tuning.header()}\n{factors(parallel=1e-6)}\n"), True),
        (tuning.completed(f"# leetcore 0.0.0\n{factors(parallel=1e-6)}\n"), False),
    ):
        (tmp_path / "table.txt").write_text(text)
        tuning.use(None)
        tuning.load("any")
        assert (leetcore.cost(**shape).method == "parallel") is chosen
        assert (tuning.source != "shipped") is chosen
    (tmp_path / "table.txt").write_text(tuning.completed(f"{tuning.header()}\nnonsense 1\n"))
    with pytest.warns(UserWarning, match="is not used: tuning: line 2"):
        tuning.load("any")


# ---- functions as methods


def plain(q, k, v, log_decay, scale):
    o, _ = reference.recurrence(*(x.astype("f8") for x in (q, k, v)), log_decay, scale, None)
    return o.astype(q.dtype)


def whole(q, k, v, log_decay, scale, state):
    o, final = reference.recurrence(*(x.astype("f8") for x in (q, k, v)), log_decay, scale, state)
    return o.astype(q.dtype), final.astype(state.dtype)


@pytest.fixture
def mine():
    leetcore.register_method("plain", plain, idea="the definition")
    leetcore.register_method("whole", whole, states=True, per_token=True)
    yield
    for method in leetcore.methods():
        if method.device == "python":
            leetcore.unregister_method(method.name)


def test_a_function_is_listed(mine):
    rows = {m.name: m for m in leetcore.methods()}
    assert rows["plain"][:4] == ("plain", "python", "the definition", "")
    assert "decay_per_token" not in rows["plain"].serves and "final_state" in rows["whole"].serves
    assert "plain" in leetcore.explain(*arrays(), -0.1)


@pytest.mark.parametrize("kind", [None, "[]", "[Hs]", "[B,Hs]", "[B,Hs,N]"])
@pytest.mark.parametrize("heads", [(4, 2, 1), (2, 2, 2), (1, 2, 4)])
@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
def test_a_function_serves_what_a_method_does(mine, kind, heads, layout):
    q, k, v = arrays(heads=heads)
    Hs = max(heads[1:])
    decay = None if kind is None else log_decays(np.random.default_rng(1), kind, 2, Hs, 70)
    state = normal(np.random.default_rng(2), (2, Hs, 8, 12))
    if layout == "bnhd":
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        decay = decay.swapaxes(1, 2) if kind == "[B,Hs,N]" else decay
    options = {"scale": 0.5, "initial_state": state, "return_state": True, "layout": layout}
    got = leetcore.linear_attention(q, k, v, decay, method="whole", **options)
    want = leetcore.linear_attention(q, k, v, decay, **options)
    assert all(reference.error(x, y.astype("f8")) < 1e-5 for x, y in zip(got, want, strict=True))
    out = np.full_like(want[0], np.nan)
    assert leetcore.linear_attention(q, k, v, decay, method="whole", out=out, **options)[0] is out
    assert np.array_equal(out, got[0])


def test_a_function_gets_packed_sequences_one_by_one(mine):
    q, k, v = arrays(B=1)
    ends = np.array([0, 10, 10, 70])
    got = leetcore.linear_attention(q, k, v, -0.1, method="whole", cu_seqlens=ends, return_state=True)
    want = leetcore.linear_attention(q, k, v, -0.1, cu_seqlens=ends, return_state=True)
    assert all(reference.error(x, y.astype("f8")) < 1e-5 for x, y in zip(got, want, strict=True))


def test_functions_of_torch_and_for_torch(mine):
    import torch

    def with_torch(q, k, v, log_decay, scale):
        assert isinstance(q, torch.Tensor) and q.dtype is torch.bfloat16 and log_decay.dtype is torch.float32
        age = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
        mask = torch.where(age >= 0, (log_decay[..., None, None] * age).exp(), 0.0)
        return (scale * (q.float() @ k.float().mT * mask) @ v.float()).bfloat16()

    leetcore.register_method("bad", with_torch, library="torch")
    q, k, v = (torch.from_numpy(x).bfloat16() for x in arrays(heads=(2, 2, 2)))
    o = leetcore.linear_attention(q, k, v, -0.1, method="bad")
    want = leetcore.linear_attention(q, k, v, -0.1)
    assert o.dtype is torch.bfloat16 and reference.error(o.float().numpy(), want.double().numpy()) < 1e-2
    leetcore.register_method("bad", plain)
    assert isinstance(leetcore.linear_attention(q.float(), k.float(), v.float(), -0.1, method="bad"), torch.Tensor)


@pytest.mark.parametrize(
    "fn, text",
    [
        (lambda q, *_: q, r"method 'bad': o: expected shape \[2, 4, 70, 12\], got \[2, 4, 70, 8\]"),
        (lambda *_: None, "method 'bad': o: expected an array, got NoneType"),
    ],
)
def test_broken_functions_are_named(mine, fn, text):
    leetcore.register_method("bad", fn)
    with pytest.raises(RuntimeError, match=text):
        leetcore.linear_attention(*arrays(), -0.1, method="bad")


def test_a_function_without_its_state_is_named(mine):
    leetcore.register_method("bad", plain, states=True)
    with pytest.raises(TypeError):  # Python's own message, because the function has no parameter for the state
        leetcore.linear_attention(*arrays(), -0.1, method="bad")
    leetcore.register_method("bad", lambda q, k, v, g, scale, state: plain(q, k, v, g, scale), states=True)
    with pytest.raises(RuntimeError, match=r"method 'bad': expected \(o, final_state\), got ndarray"):
        leetcore.linear_attention(*arrays(), -0.1, method="bad")


def test_what_a_function_does_not_serve(mine):
    q, k, v = arrays()
    with pytest.raises(NotImplementedError, match="'plain' was registered without states"):
        leetcore.linear_attention(q, k, v, -0.1, method="plain", return_state=True)
    with pytest.raises(NotImplementedError, match="'plain' was registered without data-dependent decays"):
        leetcore.linear_attention(q, k, v, np.full((2, 2, 70), -0.1, "f4"), method="plain")
    with pytest.raises(NotImplementedError, match="'plain' is a registered function"):
        leetcore.cost("plain", N=10, K=8)


def test_arguments_of_a_function_are_checked_first(mine):
    q, k, v = arrays()
    with pytest.raises(ValueError, match="k: expected shape"):
        leetcore.linear_attention(q, k[:, :, :5], v, -0.1, method="plain")
    with pytest.raises(ValueError, match=r"log_decay: expected values <= 0, got 0\.5"):
        leetcore.linear_attention(q, k, v, 0.5, method="plain")


@pytest.mark.parametrize("name", ["auto", "chunk", "lightning", "two words", ""])
def test_names_that_cannot_be_registered(name):
    with pytest.raises(ValueError, match="name: "):
        leetcore.register_method(name, plain)


def test_registrations_that_make_no_sense():
    with pytest.raises(TypeError, match="fn: expected a function, got int"):
        leetcore.register_method("bad", 3)
    with pytest.raises(ValueError, match="library: expected 'numpy' or 'torch', got 'jax'"):
        leetcore.register_method("bad", plain, library="jax")
    with pytest.raises(ValueError, match="name: no function 'bad' is registered"):
        leetcore.unregister_method("bad")


def test_unknown_methods_are_told_the_registered_ones():
    leetcore.register_method("mine", lambda q, k, v, log_decay, scale: v)
    try:
        q = np.ones((1, 1, 3, 4), np.float32)
        with pytest.raises(ValueError, match=r"unknown method 'nope'; known are auto, chunk, .*fft.*, mine$"):
            leetcore.linear_attention(q, q, q, method="nope")
    finally:
        leetcore.unregister_method("mine")
