"""Continues a prompt with the model of examples/train_lm.py, byte by byte.

It shows the speed at the start and at the end.

python examples/generate.py [PROMPT] [--run FOLDER] [--bytes N] [--quadratic]

Everything that came before is in states of a fixed size, so that the ten-thousandth byte takes as
long as the first. --quadratic lets the same weights generate the usual way too: each byte looks at
the keys and values of all before.
"""

import codecs
import os
import sys
import time

import torch
from lm import chart, load, parser, positive
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

REPORTS = 10


class Quadratic:
    """One layer's attention from the keys and values of all tokens.

    It has the numbers of the layer's state form, up to rounding.
    """

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


class Shown:
    """The first bytes as text, each when it comes, and a bar for the others."""

    def __init__(self, console, most, count):
        self.most, self.written = most, 0
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.bar = Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console, transient=True)
        self.task = self.bar.add_task("", total=count)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.stop()

    def write(self, byte):
        if self.written == self.most:
            self.bar.start()
        self.written += 1
        if self.written > self.most:
            self.bar.update(self.task, completed=self.written)
            return
        sys.stdout.write(self.decoder.decode(bytes([byte])))
        if self.written == self.most:
            sys.stdout.write(" ...\n")
        sys.stdout.flush()


@torch.inference_mode()
def generate(way, prompt, count, temperature, write):
    """The bytes that follow, and the bytes a second in each of REPORTS parts of the way."""
    random = torch.Generator().manual_seed(0)
    logits, made, rates = way.read(prompt), [], []
    start, part = time.perf_counter(), max(1, count // REPORTS)
    for i in range(count):
        made.append(torch.multinomial((logits[0] / temperature).softmax(0), 1, generator=random))
        write(made[-1].item())
        logits = way.step(made[-1])
        if (i + 1) % part == 0:
            now = time.perf_counter()
            rates.append((i + 1, part / (now - start)))
            start = now
    return bytes(torch.cat(made).tolist()), rates


def main(arguments, console):
    made = parser("Continues a prompt, byte by byte.")
    made.add_argument("prompt", nargs="?", default="The statement ")
    made.add_argument("--bytes", type=positive(int), default=10_000)
    made.add_argument("--temperature", type=positive(float), default=0.7)
    made.add_argument("--quadratic", action="store_true", help="time the quadratic form with all keys and values too")
    made.add_argument("--show", type=int, default=600, help="bytes of the text to print")
    options = made.parse_args(arguments)
    if not options.prompt:
        sys.exit("PROMPT: expected at least one character, got none")

    model = load(options.run / "checkpoint.pt")[1].eval()
    prompt = torch.tensor([list(os.fsencode(options.prompt))])
    torch.set_num_threads(1)  # a byte is too little work to share

    def run(way, most):
        with Shown(console, most, options.bytes) as shown:
            return generate(way, prompt, options.bytes, options.temperature, shown.write)

    sys.stdout.write(options.prompt)
    text, rates = run(ByState(model), min(options.show, options.bytes))
    columns = {"by state": rates}
    if options.quadratic:
        console.print("again, by the keys and values of all bytes before:")
        other, columns["by all bytes"] = run(ByCache(model, prompt.shape[1] + options.bytes), 0)
        same = next((i for i, (a, b) in enumerate(zip(text, other, strict=True)) if a != b), len(text))
        console.print(f"both ways gave the same {same} first bytes")
    table = Table(title="bytes a second")
    table.add_column("up to byte", justify="right")
    for name in columns:
        table.add_column(name, justify="right")
    for row in zip(*columns.values(), strict=True):
        table.add_row(str(row[0][0]), *(f"{rate:.0f}" for _, rate in row))
    console.print(table)
    lines = {name: (*zip(*rates, strict=True), {"marker": "."}) for name, rates in columns.items()}
    chart(options.run / "speed.png", console, ("byte", "bytes a second"), lines)
    return text, columns


if __name__ == "__main__":
    main(sys.argv[1:], Console())
