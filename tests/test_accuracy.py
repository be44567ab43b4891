"""Every method against the definition, by relative Frobenius norms with the tolerances that
leetcore promises."""

import functools
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import leetcore
import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import DTYPES, GAMMAS, LOG_DECAYS, METHODS, TOLERANCE, log_decays, normal, serves
from leetcore import reference

LENGTHS = [1, 2, 63, 64, 65, 127, 500, 1000, 8192]
DIMS = [1, 16, 32, 64, 80, 96, 128, 256]
KINDS = ["[]", "[Hs]", "[B,Hs]", "[B,Hs,N]"]


@dataclass(frozen=True)
class Case:
    """A problem that can be made again: hashable, so that all methods share one reference."""

    N: int
    K: int
    V: int
    dtype: str
    decay: str | float | None = "[Hs]"  # a kind, a value, none
    B: int = 1
    heads: tuple[int, int, int] = (2, 2, 2)
    state: bool = True
    seed: int = 0

    def arguments(self):
        rng = np.random.default_rng([self.seed, self.N, self.K, self.V])
        dtype, (Hq, Hk, Hv) = DTYPES[self.dtype], self.heads
        Hs = max(Hk, Hv)
        q, k, v = (
            normal(rng, (self.B, heads, self.N, D), dtype) for heads, D in ((Hq, self.K), (Hk, self.K), (Hv, self.V))
        )
        accumulator = np.float64 if self.dtype == "f64" else np.float32
        state = normal(rng, (self.B, Hs, self.K, self.V), accumulator) if self.state else None
        decay = log_decays(rng, self.decay, self.B, Hs, self.N) if isinstance(self.decay, str) else self.decay
        return {"q": q, "k": k, "v": v, "log_decay": decay, "initial_state": state, "scale": self.K**-0.5}


@functools.lru_cache(maxsize=64)  # the cases of one method come before those of the next
def expected(case):
    return reference.linear_attention(**case.arguments())


def check(case, method, growth=1.0):
    if not serves(method, given := case.arguments()):
        return
    want, want_state = expected(case)
    o, state = leetcore.linear_attention(**given, method=method, return_state=True)
    assert o.dtype == DTYPES[case.dtype] and state.dtype == (np.float64 if case.dtype == "f64" else np.float32)
    assert np.linalg.norm(want) > 1e-3 and np.linalg.norm(want_state) > 1e-3  # nothing to be small against
    errors = reference.error(o, want), reference.error(state, want_state)
    assert errors[0] <= growth * TOLERANCE[case.dtype][0], f"output: {errors[0]:.2e}"
    assert errors[1] <= growth * TOLERANCE[case.dtype][1], f"state: {errors[1]:.2e}"


def all_methods(name, values):
    """Parametrises over values and then, so that they share the references, over methods."""
    return lambda test: pytest.mark.parametrize("method", METHODS)(pytest.mark.parametrize(name, values)(test))


@pytest.mark.parametrize("dtype", DTYPES)
@all_methods("N", LENGTHS)
def test_lengths(N, dtype, method):
    check(Case(N, 40, 24, dtype), method)


@pytest.mark.parametrize("K", DIMS)
@all_methods("V", DIMS)
def test_dims(K, V, method):
    """All pairs; dtypes and lengths take turns."""
    turn = DIMS.index(K) + DIMS.index(V)
    check(Case((66, 130)[turn // 4 % 2], K, V, list(DTYPES)[turn % 4]), method)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "decay", [None, *map(float, LOG_DECAYS)], ids=["None", *map("gamma={:g}".format, GAMMAS), "slope=20"]
)
@all_methods("N", [300, 8192])
def test_every_decay_alone(N, decay, dtype, method):
    """One head and one decay, so that no other head's larger output hides an error."""
    check(Case(N, 32, 16, dtype, decay, heads=(1, 1, 1)), method)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@all_methods(
    "heads",
    [(8, 8, 8), (8, 4, 2), (2, 2, 8), (1, 1, 1)],
)
def test_decays_mixed(heads, kind, dtype, method):
    check(Case(200, 16, 20, dtype, kind, B=2, heads=heads), method)


@all_methods("dtype", DTYPES)
def test_without_initial_state(dtype, method):
    check(Case(300, 64, 64, dtype, state=False), method)


@pytest.mark.parametrize("kind", [None, *KINDS])
@all_methods("N", [1, 65, 500])
def test_torch_bfloat16(N, kind, method):
    case = Case(N, 32, 48, "bf16", kind)
    given = case.arguments()
    for name in "qkv":
        given[name] = torch.from_numpy(given[name].view(np.int16)).view(torch.bfloat16)
    for name in ("log_decay", "initial_state"):
        given[name] = None if given[name] is None else torch.from_numpy(np.asarray(given[name]))
    if not serves(method, given):
        return
    o, state = leetcore.linear_attention(**given, method=method, return_state=True)
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32
    want, want_state = expected(case)
    assert reference.error(o.view(torch.int16).numpy().view(ml_dtypes.bfloat16), want) <= TOLERANCE["bf16"][0]
    assert reference.error(state.numpy(), want_state) <= TOLERANCE["bf16"][1]


@pytest.mark.parametrize("dtype", ["f64", "f32"])
@pytest.mark.parametrize("D", [16, 64, 128])
def test_the_choice_of_method_serves_every_length(D, dtype):
    """Where the choice turns from one method to another, and the workspace with it."""
    case = Case(130, D, D, dtype, -0.1)
    given, (want, _) = case.arguments(), expected(case)
    initial = given.pop("initial_state")
    for N in range(1, 131):
        part = given | {name: given[name][:, :, :N] for name in "qkv"}
        o, _ = leetcore.linear_attention(**part, initial_state=initial, return_state=True)
        assert reference.error(o, want[:, :, :N]) <= TOLERANCE[dtype][0]
        without_state = leetcore.linear_attention(**part, initial_state=initial)
        assert reference.error(without_state, want[:, :, :N]) <= TOLERANCE[dtype][0]


OTHER_ISAS = [isa for isa in leetcore.build_info()["isas"].split() if isa != leetcore.build_info()["isa"]]


@pytest.mark.parametrize("isa", OTHER_ISAS)
def test_every_other_instruction_set(isa):
    """The set is chosen when the library is loaded, so each one that this process does not run has
    its own."""
    environment = os.environ | {"LEETCORE_ISA": isa}
    methods = [sys.executable, "-c", "import leetcore; leetcore.methods()"]
    tried = subprocess.run(methods, env=environment, capture_output=True, text=True)
    if "cannot run here" in tried.stderr:
        pytest.skip(f"this machine lacks {isa}")
    chosen = "not 8192 and (test_lengths or test_dims or test_decays or test_decode)"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen]
    ran = subprocess.run(
        [*command, __file__, Path(__file__).with_name("test_decode.py")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", LENGTHS)
@pytest.mark.parametrize("K", DIMS)
@all_methods("V", DIMS)
def test_the_whole_grid(V, K, N, dtype, method):
    """Eight heads for the eight decays, in every shape of log_decay in turn."""
    kind = [None, *KINDS][(DIMS.index(K) + 3 * DIMS.index(V) + LENGTHS.index(N)) % 5]
    check(Case(N, K, V, dtype, kind, heads=(8, 8, 8)), method)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["[Hs]", "[B,Hs,N]"])
@all_methods("N", [131072])
def test_long_sequences(N, kind, dtype, method):
    """One head for each of gamma = 1 - 1e-6 and 1, where errors would pile up, and others.

    The tolerances are promised up to 8192 tokens; beyond, the rounding of a sum without decay grows
    like sqrt(N).
    """
    check(Case(N, 16, 16, dtype, kind, heads=(8, 8, 8)), method, growth=(N / 8192) ** 0.5)


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("N", [0, 1, 128, 300])
def test_the_fast_reference_is_the_definition(N, kind):
    case = Case(N, 12, 20, "f64", kind, B=2, heads=(8, 4, 2))
    given = case.arguments()
    for got, want in zip(reference.linear_attention(**given, fast=True), expected(case), strict=True):
        assert reference.error(got, want) <= 1e-14
