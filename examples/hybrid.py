"""A hybrid model of transformers, Granite 4-H with random weights, with leetcore and without it.

python examples/hybrid.py

The model has Mamba-2 layers, one attention layer and experts. patch(model) lets leetcore compute
the Mamba-2 layers. Both models must generate the same tokens in float32. Times are medians of calls
that alternate between the two.
"""

import statistics
import time
import warnings

import torch
import transformers
from leetcore.torch.integrations.transformers import patch, unpatch
from rich.console import Console
from rich.table import Table
from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

PROMPT, GENERATED, TIMES = 1024, 32, 3


def build():
    """24 heads of 64 with states of 64 x 128 per layer, as a small Granite 4-H."""
    config = GraniteMoeHybridConfig(
        vocab_size=1000,
        hidden_size=768,
        intermediate_size=256,
        num_hidden_layers=6,
        layer_types=["mamba", "mamba", "mamba", "attention", "mamba", "mamba"],
        num_attention_heads=12,
        num_key_value_heads=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=512,
        mamba_n_heads=24,
        mamba_d_head=64,
        mamba_d_state=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return GraniteMoeHybridForCausalLM(config).eval()


def seconds(call):
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def train(model, tokens):
    model.zero_grad(set_to_none=True)
    model(tokens, labels=tokens, use_cache=False).loss.backward()


def main(console):
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    model = build()
    prompt = torch.randint(1, 1000, (1, PROMPT))
    several = torch.randint(1, 1000, (8, 16))

    @torch.inference_mode()
    def generate(tokens):
        return model.generate(tokens, max_new_tokens=GENERATED, do_sample=False)

    @torch.inference_mode()
    def prefill():
        return model(prompt, use_cache=True, logits_to_keep=1).logits

    calls = {
        f"read {PROMPT} tokens": prefill,
        f"generate {GENERATED} tokens for each of 8 short prompts": lambda: generate(several),
        "a step of training on 512 tokens": lambda: train(model, prompt[:, :512]),
    }
    times = {name: {True: [], False: []} for name in calls}
    tokens = {}
    for round_ in range(TIMES + 1):  # the first round warms up
        for ours in (False, True):
            (patch if ours else unpatch)(model)
            tokens[ours] = generate(prompt)
            for name, call in calls.items():
                elapsed, _ = seconds(call)
                if round_:
                    times[name][ours].append(elapsed)

    size = sum(p.numel() for p in model.parameters()) / 1e6
    table = Table(title=f"Granite 4-H, {size:.0f} million parameters, float32")
    for heading in ("", "transformers", "patch(model)", "times faster"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, measured in times.items():
        theirs, ours = (statistics.median(measured[key]) for key in (False, True))
        table.add_row(name, f"{theirs * 1e3:.0f} ms", f"{ours * 1e3:.0f} ms", f"{theirs / ours:.1f}")
    console.print(table)
    if not torch.equal(tokens[False], tokens[True]):
        raise SystemExit("hybrid.py: expected the same tokens with and without patch(model), got different ones")
    console.print(f"Both models continued the prompt with the same {GENERATED} tokens.")


if __name__ == "__main__":
    main(Console())
