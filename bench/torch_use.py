"""Overhead of the torch operators per call, and the speed of transformers' MiniMax with and without
patch().

python bench/torch_use.py [--quick]

Overheads are CPU times of one thread: medians over depths of the Python stack, as at some depths
CPython maps a new piece of the stack in each call. The two models take turns. Each time is the
least one, as interference only adds.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import leetcore
import torch
from leetcore.torch import decode_step, linear_attention
from rich.console import Console
from rich.table import Table

DEPTHS, CALLS = 40, 100


def overhead(call: Callable[[], Any]) -> float:
    """Microseconds of this process per call."""

    def at(depth: int) -> float:
        if depth:
            return at(depth - 1)
        times = []
        for _ in range(5):
            start = time.process_time()
            for _ in range(CALLS):
                call()
            times.append((time.process_time() - start) / CALLS * 1e6)
        return min(times)

    return statistics.median(at(2 * depth) for depth in range(DEPTHS))


def operators() -> Table:
    q, k, v = torch.randn(3, 1, 1, 1, 16)
    token = [x[:, :, 0] for x in (q, k, v)]
    log_decay, state, leaf = torch.full((1,), -0.5), torch.zeros(1, 1, 16, 16), q.clone().requires_grad_()
    table = Table(title="one call with a single token, us of this process")
    for heading in ("", "leetcore", "leetcore.torch", "more"):
        table.add_column(heading, justify="right" if heading else "left")
    with torch.no_grad():
        raw = overhead(lambda: leetcore.linear_attention(q, k, v, log_decay))
        rows = [("linear_attention", raw, overhead(lambda: linear_attention(q, k, v, log_decay)))]
        plain = overhead(lambda: leetcore.decode_step(*token, state, log_decay))
        rows.append(("decode_step", plain, overhead(lambda: decode_step(*token, state, log_decay))))
    rows.append(("linear_attention, with a graph", raw, overhead(lambda: linear_attention(leaf, k, v, log_decay))))
    for name, one, other in rows:
        table.add_row(name, f"{one:.1f}", f"{other:.1f}", f"{other - one:.1f}")
    return table


def against(table: Table, name: str, call: Callable[[Any], Any], original: Any, patched: Any, rounds: int) -> None:
    """Adds a row to the table: milliseconds of a call of both models, which take turns."""
    times: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for _ in range(rounds):
            for taken, model in zip(times, (original, patched), strict=True):
                start = time.perf_counter()
                call(model)
                taken.append(time.perf_counter() - start)
    one, other = (1e3 * min(taken) for taken in times)
    table.add_row(name, f"{one:.1f}", f"{other:.1f}", f"{other / one:.2f}")


def compared(title: str) -> Table:
    table = Table(title=title)
    for heading in ("", "transformers", "patched", "ratio"):
        table.add_column(heading, justify="right" if heading else "left")
    return table


def minimax(quick: bool) -> Table:
    from leetcore.torch.integrations.transformers import patch
    from transformers import MiniMaxConfig, MiniMaxForCausalLM

    torch.manual_seed(0)
    config = MiniMaxConfig(
        vocab_size=256,
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["full_attention"] + 3 * ["linear_attention"],
        pad_token_id=0,
        eos_token_id=None,
    )
    original = MiniMaxForCausalLM(config).eval()
    patched = copy.deepcopy(original)
    patch(patched)
    N, made = (512, 16) if quick else (2048, 128)
    ids = torch.randint(3, 256, (1, N))
    hidden = torch.randn(1, N, 512)

    def generate(model: Any) -> Any:
        return model.generate(ids[:, :64], max_new_tokens=made, do_sample=False)

    table = compared("MiniMax, 4 layers of 8 heads of 64, three of them linear, float32; ms")
    for name, call in (
        (f"a linear layer, {N} tokens", lambda model: model.model.layers[1].self_attn(hidden, None, None)),
        (f"the model, prefill of {N} tokens", lambda model: model(ids)),
        (f"the model, {made} tokens generated", generate),
    ):
        against(table, name, call, original, patched, 2 if quick else 5)
    return table


def minimax_cached(quick: bool) -> Table:
    """A linear layer that continues a cache.

    It has the heads of the published model and a smaller width.
    """
    from leetcore.torch.integrations.transformers import patch
    from transformers import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxCache, MiniMaxLightningAttention

    config = MiniMaxConfig(hidden_size=512, num_hidden_layers=4, num_attention_heads=64, head_dim=128)
    original = MiniMaxLightningAttention(config, 1).eval()
    patched = copy.deepcopy(original)
    patch(patched)
    table = compared("A linear layer of MiniMax after 20 tokens, 64 heads of 128, float32; ms")
    for B, N in ((1, 1), (4, 1), (1, 64), (4, 64)):
        hidden, caches = torch.randn(B, N, 512), {original: MiniMaxCache(), patched: MiniMaxCache()}

        def go_on(layer: Any, x: Any = hidden, caches: Any = caches) -> None:
            layer(x, None, None, cache=caches[layer])

        with torch.no_grad():
            for layer in caches:
                go_on(layer, torch.randn(B, 20, 512))
        against(table, f"batch {B}, tokens {N}", go_on, original, patched, 2 if quick else 8)
    return table


if __name__ == "__main__":
    console = Console()
    console.print(operators())
    for table in (minimax, minimax_cached):
        console.print(table("--quick" in sys.argv[1:]))
