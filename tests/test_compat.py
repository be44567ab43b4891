"""leetcore.compat.leetdecoding: gamma has one meaning for every method, dtype and shape."""

import inspect

import leetcore
import numpy as np
import pytest
from conftest import DTYPES, TOLERANCE, normal
from leetcore import reference
from leetcore.compat.leetdecoding import METHODS, causal_linear_decoder

H = 3
GAMMA = {True: [0.0, 0.5, 9.0], False: [1.0, 0.5, 0.0]}  # by is_need_exp, one value per head
LONG = 1025

NAMES = pytest.mark.parametrize("name", [None, *METHODS])
MEANINGS = pytest.mark.parametrize("is_need_exp", [True, False])


def problem(B=2, N=70, dtype=np.float32, K=8, V=5):
    rng = np.random.default_rng(0)
    return [normal(rng, (B, H, N, D), dtype) for D in (K, K, V)]


def expected(q, k, v, gamma=None, is_need_exp=True):
    if gamma is None:
        return reference.linear_attention(q, k, v)[0]
    gamma = np.asarray(gamma, np.float64)
    with np.errstate(divide="ignore"):
        return reference.linear_attention(q, k, v, -gamma if is_need_exp else np.log(gamma))[0]


def test_the_signature_is_that_of_leetdecoding():
    defaults = {name: p.default for name, p in inspect.signature(causal_linear_decoder).parameters.items()}
    required = inspect.Parameter.empty
    assert list(defaults) == ["q", "k", "v", "is_mask_weight", "gamma", "is_need_exp", "attn_method"]
    assert list(defaults.values()) == [required, required, required, False, None, True, None]


def test_all_nine_names_are_there():
    assert len(METHODS) == 9 and set(METHODS.values()) <= {m.name for m in leetcore.methods() if m.device == "cpu"}


@pytest.mark.parametrize("name", METHODS)
def test_a_name_runs_its_method(name, monkeypatch):
    ran = []
    monkeypatch.setattr(leetcore.compat.leetdecoding, "linear_attention", lambda *_, method: ran.append(method))
    causal_linear_decoder(*problem(), attn_method=name)
    assert ran == [METHODS[name]]


@NAMES
@MEANINGS
@pytest.mark.parametrize("dtype", DTYPES)
def test_gamma_has_one_meaning(name, is_need_exp, dtype):
    q, k, v = problem(dtype=DTYPES[dtype])
    gamma = np.array(GAMMA[is_need_exp])
    o = causal_linear_decoder(q, k, v, True, gamma, is_need_exp, name)
    assert o.dtype == q.dtype and o.shape == v.shape
    assert reference.error(o, expected(q, k, v, gamma, is_need_exp)) <= TOLERANCE[dtype][0]
    o = causal_linear_decoder(q, k, v, attn_method=name)
    assert reference.error(o, expected(q, k, v)) <= TOLERANCE[dtype][0]


@pytest.fixture(scope="module", params=["f32", "f16"])
def long(request):
    """The answer for LONG tokens.

    Shorter calls must return its beginning, and fewer sequences its first ones.
    """
    q, k, v = problem(B=3, N=LONG, dtype=DTYPES[request.param])
    want = {meaning: expected(q, k, v, gamma, meaning) for meaning, gamma in GAMMA.items()}
    return (q, k, v), want, TOLERANCE[request.param][0]


@NAMES
@MEANINGS
@pytest.mark.parametrize("B", [1, 3])
def test_no_length_and_no_batch_changes_the_meaning(long, name, is_need_exp, B):
    """LeetDecoding did at 32 or 128 tokens in float16, and at 1024 with a batch in float32."""
    inputs, want, tolerance = long
    for N in (31, 32, 33, 127, 128, 129, 1023, 1024, LONG):
        q, k, v = (x[:B, :, :N] for x in inputs)
        o = causal_linear_decoder(q, k, v, True, np.array(GAMMA[is_need_exp]), is_need_exp, name)
        assert reference.error(o, want[is_need_exp][:B, :, :N]) <= tolerance, N


@NAMES
@pytest.mark.parametrize("heads", [1, 32, 64])
def test_no_number_of_heads_changes_the_meaning(name, heads):
    """LeetDecoding ignored gamma in float32 for fewer than 42 sequences times heads.

    It failed for one head.
    """
    rng = np.random.default_rng(0)
    q, k, v = (normal(rng, (1, heads, 40, 16)) for _ in range(3))
    gamma = rng.random(heads)
    o = causal_linear_decoder(q, k, v, True, gamma, attn_method=name)
    assert reference.error(o, expected(q, k, v, gamma)) <= TOLERANCE["f32"][0]


def test_the_examples_of_leetdecodings_readme():
    torch = pytest.importorskip("torch")
    q, k, v = (torch.randn(2, 32, 256, 16) for _ in range(3))
    gamma = torch.full((32,), 0.5)
    for o, want in (
        (causal_linear_decoder(q, k, v), expected(q, k, v)),
        (
            causal_linear_decoder(q, k, v, is_mask_weight=True, gamma=gamma, is_need_exp=True),
            expected(q, k, v, gamma),
        ),
        (
            causal_linear_decoder(q, k, v, is_mask_weight=True, gamma=gamma, is_need_exp=False),
            expected(q, k, v, gamma, False),
        ),
        (causal_linear_decoder(q, k, v, is_mask_weight=False, attn_method="FleetAttention"), expected(q, k, v)),
    ):
        assert isinstance(o, torch.Tensor) and o.dtype == torch.float32
        assert reference.error(o, want) <= TOLERANCE["f32"][0]


@MEANINGS
@pytest.mark.parametrize("shape", [(H,), (H, 1), (H, 1, 1)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_gamma_of_any_shape_and_dtype(is_need_exp, shape, dtype):
    torch = pytest.importorskip("torch")
    q, k, v = map(torch.from_numpy, problem())
    gamma = torch.tensor(GAMMA[is_need_exp], dtype=getattr(torch, dtype)).reshape(shape)
    o = causal_linear_decoder(q, k, v, True, gamma, is_need_exp)
    assert isinstance(o, torch.Tensor)
    assert reference.error(o, expected(q, k, v, GAMMA[is_need_exp], is_need_exp)) <= TOLERANCE["f32"][0]


@MEANINGS
@pytest.mark.parametrize("gamma", [0, 1, 0.25, np.float32(0.25), np.array(0.25), np.array(1)])
def test_gamma_may_be_a_number(is_need_exp, gamma):
    q, k, v = problem(dtype=np.float64)
    o = causal_linear_decoder(q, k, v, True, gamma, is_need_exp)
    assert reference.error(o, expected(q, k, v, gamma, is_need_exp)) <= TOLERANCE["f64"][0]


def test_slow_decay_is_not_rounded_away():
    """A factor of 1 - 1e-9 is 1 in float32; its logarithm is not lost."""
    q, k, v = problem(dtype=np.float32)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leetcore.compat.leetdecoding, "linear_attention", lambda q, k, v, g, method: seen.append(g))
        causal_linear_decoder(q, k, v, True, np.full(H, 1e-9))
        causal_linear_decoder(q, k, v, True, np.full(H, 1 - 1e-9), is_need_exp=False)
    for log_decay in seen:
        assert log_decay.dtype == np.float32 and np.allclose(log_decay, -1e-9, rtol=1e-6, atol=0)


def test_jax():
    jax = pytest.importorskip("jax")
    q, k, v = map(jax.numpy.asarray, problem())
    o = causal_linear_decoder(q, k, v, True, jax.numpy.asarray(GAMMA[True]), attn_method="block-based")
    assert isinstance(o, jax.Array) and reference.error(o, expected(q, k, v, GAMMA[True])) <= TOLERANCE["f32"][0]


REFUSED = {
    "no gamma": ({"is_mask_weight": True}, ValueError, r"^gamma: expected the decay .*, got None"),
    "stray gamma": ({"gamma": 0.5}, ValueError, r"^gamma: expected None with is_mask_weight=False, got float"),
    "gamma as flag": ({"is_mask_weight": np.ones(H)}, TypeError, r"^is_mask_weight: expected True .*, got ndarray"),
    "meaning": ({"is_need_exp": None}, TypeError, r"^is_need_exp: expected True or False, got NoneType"),
    "growth": (
        {"is_mask_weight": True, "gamma": np.array([0.5, -0.25, 1])},
        ValueError,
        r"^gamma: expected values >= 0, as exp\(-gamma\) of a negative one grows, got -0\.25 at \[1\]",
    ),
    "factor > 1": (
        {"is_mask_weight": True, "gamma": 1.5, "is_need_exp": False},
        ValueError,
        r"^gamma: expected values in \[0, 1\] with is_need_exp=False, got 1\.5",
    ),
    "factor < 0": (
        {"is_mask_weight": True, "gamma": -0.5, "is_need_exp": False},
        ValueError,
        r"^gamma: expected values in \[0, 1\] .*, got -0\.5",
    ),
    "nan": ({"is_mask_weight": True, "gamma": float("nan")}, ValueError, r"^gamma: expected values >= 0.*, got nan"),
    "heads": ({"is_mask_weight": True, "gamma": np.ones(4)}, ValueError, r"^gamma: .* shape \[3\], got \[4\]"),
    "shape": ({"is_mask_weight": True, "gamma": np.ones((1, H))}, ValueError, r"^gamma: .*\[3\], got \[1, 3\]"),
    "list": ({"is_mask_weight": True, "gamma": [0.5] * H}, TypeError, r"^gamma: expected an array .*, got list"),
    "complex": ({"is_mask_weight": True, "gamma": np.ones(H, "c8")}, ValueError, r"^gamma: .*got dtype complex64"),
    "name": (
        {"attn_method": "chunk"},
        ValueError,
        r"^attn_method: expected None or one of vanilla, .*FleetAttention_torch, got 'chunk'",
    ),
    "rank": (
        {"is_mask_weight": True, "gamma": 0.5, "k": np.zeros((H, 70, 8), "f4")},
        ValueError,
        r"^k: expected shape \[B, H, N, D\], got \[3, 70, 8\]",
    ),
    "tokens": ({"v": np.zeros((2, H, 9, 5), "f4")}, ValueError, r"^v: expected shape .*, got \[2, 3, 9, 5\]"),
    "dtype": ({"q": np.zeros((2, H, 70, 8), "i4")}, TypeError, r"^q: .*int32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    changes, error, text = REFUSED[case]
    q, k, v = problem()
    with pytest.raises(error, match=text):
        causal_linear_decoder(**{"q": q, "k": k, "v": v} | changes)


def test_refusals_of_tensors():
    torch = pytest.importorskip("torch")
    q, k, v = map(torch.from_numpy, problem())
    with pytest.raises(TypeError, match=r"^gamma: expected a tensor without requires_grad"):
        causal_linear_decoder(q, k, v, True, torch.ones(H, requires_grad=True))
    with pytest.raises(TypeError, match=r"^q: expected a tensor without requires_grad"):
        causal_linear_decoder(q.clone().requires_grad_(), k, v)
    with pytest.raises(TypeError, match=r"^gamma: expected an array of torch like q, got one of numpy"):
        causal_linear_decoder(q, k, v, True, np.ones(H))
    with torch.no_grad():
        causal_linear_decoder(q, k, v, True, torch.ones(H, requires_grad=True))
