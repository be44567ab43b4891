"""Continues a prompt with the model of examples/train_lm.py, byte by byte, and shows how fast, early and late.

python examples/generate.py [PROMPT] [--run FOLDER] [--bytes N] [--quadratic]

Everything that came before is in states of a fixed size, so that the ten-thousandth byte takes as long as the first.
--quadratic lets the same weights generate the usual way too: each byte looks at the keys and values of all before.
"""

import sys
import time

import torch
from lm import LanguageModel, parser
from rich.console import Console
from rich.table import Table
from train_lm import load

REPORTS = 10


class Quadratic:
    """One layer's attention by keys and values of all tokens: the same numbers as by its state, up to rounding."""

    def __init__(self, attention, most):
        H = attention.num_heads
        self.attention, self.seen = attention, 0
        self.k = torch.empty(H, most, attention.key_dim)
        self.v = torch.empty(H, most, attention.value_dim)
        self.age = torch.zeros(H, most)  # the sum of log_decay since each token

    def __call__(self, attention, x):
        q, k, v, log_decay = (y[0] for y in attention.project(x, None))  # [N, H, ...] of N tokens
        outputs = []
        for t in range(len(q)):
            now = self.seen = self.seen + 1
            self.k[:, now - 1], self.v[:, now - 1] = k[t], v[t]
            self.age[:, : now - 1] += log_decay[t, :, None]
            weights = (self.k[:, :now] @ q[t, :, :, None])[..., 0] * self.age[:, :now].exp()
            outputs.append(attention.scale * (weights[:, None] @ self.v[:, :now])[:, 0])
        return attention.finish(torch.stack(outputs)[None], x)


class ByState:
    """The model that carries states."""

    def __init__(self, model):
        self.model, self.states = model, model.new_states(1)

    def read(self, tokens):
        return self.model(tokens, self.states)[:, -1]

    def step(self, token):
        return self.model.step(token, self.states)


class ByCache:
    """The model that keeps all tokens."""

    def __init__(self, model, most):
        self.model, self.layers = model, [Quadratic(block.attention, most) for block in model.blocks]

    def read(self, tokens):
        x = self.model.embedding(tokens)
        for block, layer in zip(self.model.blocks, self.layers, strict=True):
            x = block(x, layer)
        return self.model.head(self.model.norm(x))[:, -1]

    def step(self, token):
        return self.read(token[:, None])


@torch.inference_mode()
def generate(way, prompt, count, temperature, write):
    """The bytes that follow, and the bytes a second in each of REPORTS parts of the way."""
    random = torch.Generator().manual_seed(0)
    logits, made, rates = way.read(prompt), [], []
    start, part = time.perf_counter(), max(1, count // REPORTS)
    for i in range(count):
        token = torch.multinomial((logits[0] / temperature).softmax(0), 1, generator=random)
        made.append(token.item())
        write(made[-1:])
        logits = way.step(token)
        if (i + 1) % part == 0:
            now = time.perf_counter()
            rates.append((i + 1, part / (now - start)))
            start = now
    return bytes(made), rates


def main(arguments, console):
    made = parser("Continues a prompt, byte by byte.")
    made.add_argument("prompt", nargs="?", default="The statement ")
    made.add_argument("--bytes", type=int, default=10_000)
    made.add_argument("--temperature", type=float, default=0.7)
    made.add_argument("--quadratic", action="store_true", help="time the quadratic form with all keys and values too")
    made.add_argument("--show", type=int, default=600, help="bytes of the text to print")
    options = made.parse_args(arguments)
    if not options.prompt:
        sys.exit("PROMPT: expected at least one character, got none")

    saved = load(options.run / "checkpoint.pt")
    model = LanguageModel(**saved["config"]).eval()
    model.load_state_dict(saved["model"])
    prompt = torch.tensor([list(options.prompt.encode())])
    torch.set_num_threads(1)  # a byte is too little work to share

    written = 0

    def write(new):
        nonlocal written
        if written < options.show:
            sys.stdout.write(bytes(new).decode(errors="replace"))
            sys.stdout.flush()
        written += 1

    sys.stdout.write(options.prompt)
    text, rates = generate(ByState(model), prompt, options.bytes, options.temperature, write)
    sys.stdout.write(" ...\n\n" if options.bytes > options.show else "\n\n")

    columns = {"by state": rates}
    if options.quadratic:
        most = prompt.shape[1] + options.bytes
        way = ByCache(model, most)
        other, columns["by all tokens"] = generate(way, prompt, options.bytes, options.temperature, lambda new: None)
        same = next((i for i, (a, b) in enumerate(zip(text, other, strict=True)) if a != b), len(text))
        console.print(f"both ways gave the same {same} first bytes")
    table = Table(title="bytes a second")
    table.add_column("up to byte", justify="right")
    for name in columns:
        table.add_column(name, justify="right")
    for row in zip(*columns.values(), strict=True):
        table.add_row(str(row[0][0]), *(f"{rate:.0f}" for _, rate in row))
    console.print(table)
    return text, columns


if __name__ == "__main__":
    main(sys.argv[1:], Console())
