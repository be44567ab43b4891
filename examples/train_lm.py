"""Trains a language model of bytes, 1.9 million parameters, in minutes on two CPU cores.

python examples/train_lm.py [FILE] [--model attention|mamba2] [--run FOLDER] [--steps N]
[--minutes M] [--resume]

FILE is any text; without it, the language reference that ships with Python. The loss is in bits per
byte, held against what counting bytes and pairs of bytes gives. Ctrl-C leaves a checkpoint to go on
from; examples/generate.py uses it.
"""

import math
import statistics
import sys
import time

import torch
from lm import bits, build, chart, load, parser, positive, read
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

PIECE = 2048  # bytes of validation text per call


def count_models(train, validation):
    """Bits per byte of the validation text, by frequencies of bytes and of pairs of bytes."""
    single = torch.bincount(train, minlength=256) + 1.0
    pairs = torch.bincount(train[:-1] * 256 + train[1:], minlength=65536).view(256, 256).double()
    unigram = single / single.sum()
    bigram = (pairs + unigram) / (pairs + unigram).sum(1, keepdim=True)
    return {
        "unigram": -unigram.log2()[validation[1:]].mean().item(),
        "bigram": -bigram.log2()[validation[:-1], validation[1:]].mean().item(),
    }


@torch.no_grad()
def validate(model, text):
    """Bits per byte of a text read in pieces; each piece starts from the previous states."""
    states, total = model.new_states(1), 0.0
    for start in range(0, len(text) - 1, PIECE):
        piece = text[start : start + PIECE + 1][None]
        total += bits(model(piece[:, :-1], states), piece[:, 1:]).item() * (piece.shape[1] - 1)
    return total / (len(text) - 1)


def learning_rate(step, options):
    """The learning rate: a linear rise in the first twentieth, then a cosine to a tenth."""
    progress = step / options.steps
    return options.rate * (min(1.0, 20 * progress + 0.02) * (0.55 + 0.45 * math.cos(math.pi * progress)))


def batch(train, step, options):
    """Random pieces of the text. They depend on the step alone, so a resumed run sees the same."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(train) - options.length, (options.batch, 1), generator=generator)
    pieces = train[starts + torch.arange(options.length + 1)]
    return pieces[:, :-1], pieces[:, 1:]


def train(options, console):
    text = read(options.file)
    if len(text) < 20 * options.length:
        name = options.file or "Python's language reference"
        sys.exit(f"{name}: expected at least {20 * options.length} bytes, 20 pieces of --length, got {len(text)}")
    cut = len(text) * 9 // 10
    training, validation = text[:cut], text[cut:][: options.check]
    baselines = count_models(training, validation)

    torch.manual_seed(0)
    model = build(options.dim, options.heads, options.layers, options.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, betas=(0.9, 0.95), weight_decay=0.01)
    start, losses, validated = 0, [], []
    checkpoint = options.run / "checkpoint.pt"
    if options.resume:
        saved, loaded = load(checkpoint)
        if loaded.config != model.config:
            sys.exit(f"{checkpoint}: is of a model with {loaded.config}, not {model.config}")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start, losses, validated = saved["step"], saved["losses"], saved["validated"]
    elif checkpoint.exists():
        sys.exit(f"{checkpoint}: is there already; --resume goes on from it, --run takes another folder")
    try:
        options.run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"{options.run}: {error.strerror}; --run takes another folder")

    def save(step):
        state = {"config": model.config, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        unfinished = checkpoint.with_suffix(".part")
        torch.save(state | {"step": step, "losses": losses, "validated": validated}, unfinished)
        unfinished.replace(checkpoint)

    size = sum(p.numel() for p in model.parameters())
    console.print(f"{len(training)} bytes to learn from, {len(validation)} to be measured on; {size} parameters")
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    deadline = time.monotonic() + 60 * options.minutes
    step, stopped = start, None
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=options.steps, completed=start)
        try:
            for step in range(start + 1, options.steps + 1):
                tokens, targets = batch(training, step, options)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, options)
                loss = bits(model(tokens), targets)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                losses.append(loss.item())
                late = time.monotonic() > deadline
                if step % options.every == 0 or step == options.steps or late:
                    validated.append((step, validate(model, validation)))
                    save(step)
                    mean = statistics.fmean(losses[-options.every :])
                    progress.console.print(
                        f"step {step:5}  training {mean:.3f}  validation {validated[-1][1]:.3f} bits a byte"
                    )
                progress.update(task, completed=step, description=f"step {step}  {losses[-1]:.3f} bits a byte")
                if late:
                    stopped = "the time is up"
                    break
        except KeyboardInterrupt:
            step = len(losses)
            save(step)
            stopped = "interrupted"
    if stopped and step < options.steps:
        console.print(f"{stopped} after step {step}; --resume goes on")

    final = validated[-1][1] if validated and validated[-1][0] == step else validate(model, validation)
    table = Table(title="bits per byte of the validation text")
    for heading in ("bytes counted", "pairs counted", f"this model, step {step}"):
        table.add_column(heading, justify="right")
    table.add_row(f"{baselines['unigram']:.3f}", f"{baselines['bigram']:.3f}", f"{final:.3f}")
    console.print(table)
    lines = {"training": (range(1, len(losses) + 1), losses, {"lw": 0.6, "alpha": 0.6})}
    if validated:
        lines["validation"] = (*zip(*validated, strict=True), {"marker": "."})
    chart(options.run / "loss.png", console, ("step", "bits per byte"), lines, baselines)
    return final, baselines


def options_of(arguments):
    made = parser("Trains a language model of bytes.")
    made.add_argument("file", nargs="?", help="a text; default: Python's language reference")
    made.add_argument("--model", choices=("attention", "mamba2"), default="attention", help="the kind of layer")
    made.add_argument("--steps", type=positive(int), default=600)
    made.add_argument("--minutes", type=float, default=math.inf, help="stop after this time, with a checkpoint")
    made.add_argument("--resume", action="store_true", help="go on from the checkpoint in --run")
    made.add_argument("--batch", type=positive(int), default=8, help="pieces of text a step")
    made.add_argument("--length", type=positive(int), default=512, help="bytes of a piece")
    made.add_argument("--rate", type=positive(float), default=3e-3, help="learning rate")
    made.add_argument("--dim", type=positive(int), default=192)
    made.add_argument("--heads", type=positive(int), default=4)
    made.add_argument("--layers", type=positive(int), default=4)
    made.add_argument("--every", type=positive(int), default=100, help="steps between validations and checkpoints")
    made.add_argument("--check", type=positive(int), default=50_000, help="most bytes of a validation")
    return made.parse_args(arguments)


if __name__ == "__main__":
    train(options_of(sys.argv[1:]), Console())
