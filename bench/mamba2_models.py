"""Models of transformers with Mamba-2 layers alone, with patch() and without it.

The second model has the layers of Granite-4-H-tiny: 48 heads of 64 with states of 128. Its experts
and its attention are left out, as they take most of the time there and patch() leaves them as they
are.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from leetcore.bench import session
from leetcore.bench.timing import Call
from leetcore.torch.integrations.transformers import patch
from mamba2_calls import DTYPES, Heads
from mamba2_speed import Case, Prepared, Row
from transformers import DynamicCache, Mamba2Config, Mamba2ForCausalLM

SMALL, GRANITE = "4 layers of 32 heads", "4 layers of Granite-4-H-tiny"
WIDTHS = {SMALL: 1024, GRANITE: 1536}
VOCABULARY, STATE = 1000, 128
LENGTHS, BATCHES = (128, 512, 2048), (1, 16)
DECODED, TRAINED = 8, 512


def model(width: int, layers: int = 4) -> Any:
    """A Mamba-2 model whose layers have width / 32 heads of 64 and states of 128."""
    torch.manual_seed(0)
    config = Mamba2Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_heads=width // 32,
        head_dim=64,
        state_size=STATE,
        n_groups=1,
        num_hidden_layers=layers,
        chunk_size=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    return Mamba2ForCausalLM(config).eval()


@functools.lru_cache(maxsize=1)  # cases of a model follow one another
def pair(width: int, dtype: str, layers: int = 4) -> tuple[Any, Any]:
    """A patched model, and a copy of it that is not patched."""
    original = model(width, layers).to(DTYPES[dtype])
    patched = copy.deepcopy(original)
    patch(patched)
    return patched, original


def ids(batch: int, tokens: int) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(3, VOCABULARY, (batch, tokens))


def prefill(model: Any, batch: int, tokens: int) -> Call:
    return partial(torch.inference_mode()(model), ids(batch, tokens), use_cache=True)


def decoding(model: Any, batch: int, tokens: int) -> Call:
    """`tokens` steps of one token, which go on from a prompt of as many tokens."""
    given, cache = ids(batch, tokens), DynamicCache(config=model.config)

    @torch.inference_mode()
    def call() -> Any:
        for _ in range(tokens):
            result = model(given[:, :1], use_cache=True, cache=cache)
        return result

    with torch.inference_mode():
        model(given, use_cache=True, cache=cache)
    return call


def training(model: Any, batch: int, tokens: int) -> Call:
    """A forward and a backward pass."""
    given = ids(batch, tokens)

    def call() -> Any:
        model.zero_grad(set_to_none=True)
        result = model.train()(given, labels=given, use_cache=False)
        result.loss.backward()
        model.eval()
        return result

    return call


KINDS: dict[str, Callable[[Any, int, int], Call]] = {"prefill": prefill, "decoding": decoding, "training": training}


def finite(call: Call) -> tuple[float | None, bool]:
    """The gate of a model: tests compare patched models with others."""
    return None, bool(call().logits.isfinite().all())


def compare(name: str, width: int, kind: str, batch: int, tokens: int, dtype: str, layers: int = 4) -> Prepared:
    """The patched model and the other one."""
    shape, rows = Heads(batch, width // 32, tokens, STATE, 64), []
    for method, rowkind, each in zip(
        ("patched", "transformers"), ("leetcore", "rival"), pair(width, dtype, layers), strict=True
    ):
        row = Row(method, rowkind, shape, dtype, "", f"{kind}, {name}")
        rows.append(session.gate(row, KINDS[kind](each, batch, tokens), finite))  # type: ignore[arg-type]
    rows[1].base = rows[0]
    return rows, None


def cases(quick: bool) -> Iterator[Case]:
    """Prefill, decoding and a training step of each model in each dtype."""
    problems = [("prefill", 1, N) for N in LENGTHS]
    problems += [("decoding", batch, DECODED) for batch in BATCHES]
    problems += [("training", 1, TRAINED)]
    if quick:
        problems = [("prefill", 1, 64), ("decoding", 1, 2), ("training", 1, 64)]
    widths, layers = ({SMALL: 128}, 1) if quick else (WIDTHS, 4)
    for name, width in widths.items():
        for dtype in list(DTYPES)[: 1 if quick else None]:
            for kind, batch, tokens in problems:
                text = f"{kind}, {name}, batch {batch}, {tokens} tokens, {dtype}"
                yield Case(text, partial(compare, name, width, kind, batch, tokens, dtype, layers))
