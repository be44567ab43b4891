"""Constructors of log-decays: values from their formulas, and every refusal."""

import leetcore
import numpy as np
import pytest
from leetcore import decay, reference


def near(got, want):
    """Equal once the float64 value is rounded to float32."""
    assert isinstance(got, np.ndarray) and got.dtype == np.float32
    np.testing.assert_array_equal(got, np.asarray(want, np.float64).astype(np.float32))


def test_from_gamma():
    near(
        decay.from_gamma([0, 1e-4, 0.5, 1 - 1e-6, 1]), [-np.inf, -9.210340371976182, -np.log(2), -1.0000005000003e-6, 0]
    )
    near(decay.from_gamma(0.5), -np.log(2))
    assert decay.from_gamma(np.full((2, 3), 0.9)).shape == (2, 3) and decay.from_gamma([]).shape == (0,)
    assert not np.signbit(decay.from_gamma(1.0)) and not np.signbit(decay.from_slopes(0.0))


def test_gammas_near_1_keep_their_precision():
    """1 - 1e-9 is 1 in float32, but not its logarithm."""
    assert decay.from_gamma(1 - 1e-9) == pytest.approx(-1e-9, rel=1e-6)


def test_from_slopes():
    near(decay.from_slopes([0, 0.1, 20, np.inf]), [0, -0.1, -20, -np.inf])
    near(decay.from_slopes(1e300), -np.inf)
    near(decay.from_slopes(np.float32([[0.5]])), [[-0.5]])


def test_alibi():
    near(decay.alibi(8), [-1 / 2, -1 / 4, -1 / 8, -1 / 16, -1 / 32, -1 / 64, -1 / 128, -1 / 256])
    near(decay.alibi(1), [-1 / 256])
    near(decay.alibi(2), [-1 / 16, -1 / 256])
    near(decay.alibi(3), [-1 / 16, -1 / 256, -1 / 4])
    four, eight = [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8], [2.0**-1, 2.0**-3, 2.0**-5]
    near(decay.alibi(6), -np.array(four + eight[:2]))
    near(decay.alibi(7), -np.array(four + eight))
    assert len(decay.alibi(12)) == 12 and len(set(decay.alibi(12))) == 12


def test_retnet():
    near(decay.retnet(3), np.log([1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128]))
    assert decay.retnet(40)[-1] == pytest.approx(-(2.0**-44), rel=1e-6)  # 0 by way of a float32 gamma


def test_minimax():
    slopes = 2.0 ** -np.arange(1, 9)
    near(decay.minimax(8, 0, 80), -slopes * (1 + 1e-5))
    near(decay.minimax(8, 20, 80), -slopes * (1 - 20 / (79 + 1e-5) + 1e-5))
    near(decay.minimax(8, 20, 80, "vllm"), -slopes * (1 - 20 / 79 + 1e-5))
    near(decay.minimax(8, 79, 80, flavor="vllm"), -slopes * 1e-5)
    last = decay.minimax(8, 79, 80) / decay.minimax(8, 79, 80, "vllm")
    assert last.min() > 1.012 and last.max() < 1.014  # the flavors differ by 1.3 %
    near(decay.minimax(3, 0, 2), -(2.0 ** (-8 / 3 * np.arange(1, 4))) * (1 + 1e-5))
    near(decay.minimax(3, 0, 2, "vllm"), -np.array([1 / 16, 1 / 256, 1 / 4]) * (1 + 1e-5))
    near(decay.minimax(8, 0, 1, "vllm"), -slopes * (1 + 1e-5))


def test_mamba2():
    A, dt = np.array([-1.0, -16.0]), np.random.default_rng(0).random((3, 2, 5))
    g = decay.mamba2(A, dt)
    near(g, A[None, :, None] * dt)
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((3, 2, 5, 4)).astype(np.float32) for _ in range(3))
    assert reference.error(leetcore.linear_attention(q, k, v, g), reference.linear_attention(q, k, v, g)[0]) < 5e-6


REFUSED = {
    "gamma > 1": (lambda: decay.from_gamma(1.5), r"^gamma: expected values in \[0, 1\], got 1\.5$"),
    "gamma < 0": (lambda: decay.from_gamma([[0.5], [-0.1]]), r"^gamma: .*got -0\.1 at \[1, 0\]"),
    "gamma nan": (lambda: decay.from_gamma([0.5, np.nan]), r"^gamma: .*got nan at \[1\]"),
    "gamma complex": (lambda: decay.from_gamma([1j]), r"^gamma: expected real numbers, got dtype complex128"),
    "gamma text": (lambda: decay.from_gamma("0.5"), r"^gamma: expected real numbers, got dtype <U3"),
    "gamma bool": (lambda: decay.from_gamma(True), r"^gamma: expected real numbers, got dtype bool"),
    "slopes < 0": (lambda: decay.from_slopes([1, -1]), r"^slopes: expected values >= 0, got -1 at \[1\]"),
    "slopes nan": (lambda: decay.from_slopes(np.nan), r"^slopes: expected values >= 0, got nan"),
    "no heads": (lambda: decay.alibi(0), r"^num_heads: expected an integer >= 1, got 0"),
    "half a head": (lambda: decay.retnet(2.5), r"^num_heads: expected an integer >= 1, got 2\.5"),
    "heads of minimax": (lambda: decay.minimax(-1, 0, 2), r"^num_heads: .*got -1"),
    "heads of vllm": (lambda: decay.minimax("4", 0, 2, "vllm"), r"^num_heads: .*got '4'"),
    "layer": (lambda: decay.minimax(4, 2, 2), r"^layer: expected an integer from 0 to 1, got 2"),
    "no layers": (lambda: decay.minimax(4, 0, 0), r"^num_layers: expected an integer >= 1, got 0"),
    "flavor": (lambda: decay.minimax(4, 0, 2, "fla"), r"^flavor: expected 'hf' or 'vllm', got 'fla'"),
    "A_log": (lambda: decay.mamba2([1.0], np.ones((1, 1, 2))), r"^A: .*< 0.*got 1 at \[0\]"),
    "A inf": (lambda: decay.mamba2([-np.inf], np.ones((1, 1, 2))), r"^A: expected values finite.*got -inf"),
    "A rank": (lambda: decay.mamba2(-1.0, np.ones((1, 1, 2))), r"^A: expected shape \[H\], got \[\]"),
    "dt rank": (lambda: decay.mamba2([-1.0], np.ones((1, 2))), r"^dt: expected shape \[B, 1, N\].*got \[1, 2\]"),
    "dt layout": (lambda: decay.mamba2([-1.0, -2.0], np.ones((1, 5, 2))), r"^dt: .*got \[1, 5, 2\]"),
    "dt < 0": (
        lambda: decay.mamba2([-1.0], -np.ones((1, 1, 2))),
        r"^dt: expected values .*>= 0, got -1 at \[0, 0, 0\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    call, text = REFUSED[case]
    with pytest.raises(ValueError, match=text):
        call()
