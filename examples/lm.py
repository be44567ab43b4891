"""A language model of bytes on decayed linear attention or on Mamba-2.

examples/train_lm.py and examples/generate.py use it.
"""

import argparse
import pickle
import pydoc_data.topics
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from leetcore.torch.nn import GatedLinearAttention, Mamba2
from torch import nn


def mixer(model, dim, heads):
    """The layer in which tokens see earlier ones."""
    if model == "attention":
        return GatedLinearAttention(dim, heads, key_dim=32)
    if 2 * dim % heads:
        raise ValueError(f"expected a number of heads that divides {2 * dim}, got {heads}")
    return Mamba2(dim, d_state=32, headdim=2 * dim // heads)


class Block(nn.Module):
    """A mixer and two linear maps with a nonlinearity, each added to its normalised input."""

    def __init__(self, dim, heads, model):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.attention = mixer(model, dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x, attend):
        x = x + attend(self.attention, self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class LanguageModel(nn.Module):
    """Logits of the next byte. One state of fixed size per layer holds the earlier bytes."""

    def __init__(self, dim=192, heads=4, layers=4, model="attention"):
        super().__init__()
        self.config = {"dim": dim, "heads": heads, "layers": layers, "model": model}
        self.embedding = nn.Embedding(256, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, model) for _ in range(layers))
        self.norm = nn.RMSNorm(dim)
        self.head = nn.Linear(dim, 256, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, tokens, states=None):
        """The model's output [B, N, 256] for tokens [B, N] after those of the states.

        The call updates the states.
        """
        x = self.embedding(tokens)
        for i, block in enumerate(self.blocks):
            x = block(x, lambda attention, x, i=i: attention(x, states and states[i]))
        return self.head(self.norm(x))

    def step(self, token, states):
        """The output [B, 256] for one more token [B]. It updates the states."""
        x = self.embedding(token)
        for block, state in zip(self.blocks, states, strict=True):
            x = block(x, lambda attention, x, state=state: attention.step(x, state))
        return self.head(self.norm(x))

    def new_states(self, batch_size):
        return [block.attention.new_state(batch_size) for block in self.blocks]


def bits(logits, targets):
    """The mean of -log2 of the probability of each target."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten()) / torch.log(torch.tensor(2.0))


def read(path=None):
    """The bytes of a file, or of Python's language reference, as a tensor."""
    if path is None:
        data = "\n\n".join(pydoc_data.topics.topics.values()).encode()
    else:
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            sys.exit(f"{path}: {error.strerror}")
    return torch.from_numpy(np.frombuffer(data, np.uint8).astype(np.int64))


def build(dim, heads, layers, model):
    try:
        return LanguageModel(dim, heads, layers, model)
    except ValueError as error:
        sys.exit(f"a model of dim {dim}, {heads} heads, {layers} layers: {error}")


def load(checkpoint):
    """The checkpoint of train_lm.py, and its model."""
    try:
        saved = torch.load(checkpoint, weights_only=True)
        model = LanguageModel(**saved["config"])
        model.load_state_dict(saved["model"])
        return saved, model
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        sys.exit(f"{checkpoint}: {error.strerror}; train first, or name the folder with --run")
    except (EOFError, KeyError, OSError, RuntimeError, TypeError, ValueError, pickle.UnpicklingError):
        sys.exit(f"{checkpoint}: is damaged, or not of this example; remove it, or name another folder with --run")


def chart(path, console, axis, lines, levels=None):
    """Draws lines {name: (x, y, style)} and horizontal levels {name: y}."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        console.print("no plot: matplotlib is not installed")
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, (x, y, style) in lines.items():
        axes.plot(x, y, label=name, **style)
    for (name, y), style in zip((levels or {}).items(), (":", "--"), strict=False):
        axes.axhline(y, color="gray", ls=style, lw=1, label=name)
    axes.set(xlabel=axis[0], ylabel=axis[1], ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)
    console.print(f"{path}: {axis[1]} by {axis[0]}")


def parser(description):
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--run", type=Path, default=Path("lm-run"), help="folder of the checkpoint and the plots")
    return made


def positive(kind):
    """A type for argparse: numbers > 0 of a kind."""

    def number(text):
        if not (value := kind(text)) > 0:
            raise argparse.ArgumentTypeError(f"expected a number > 0, got {text}")
        return value

    number.__name__ = kind.__name__  # argparse uses the name in its error message
    return number
