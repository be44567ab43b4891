"""The command `leetcore`."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import click
import rich.box
import rich.console
import rich.table

import leetcore

from . import files
from .bench import machine
from .bench.check import check
from .bench.plot import plot
from .bench.speed import bench
from .bench.tune import tune
from .options import Layout

_INPUTS = ("q", "k", "v", "log_decay", "initial_state", "cu_seqlens")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(leetcore.__version__, package_name="leetcore")
def main() -> None:
    """Causal linear attention with exponential decay."""
    if sys.stdout is None:  # stdout was closed before the command began
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


main.add_command(bench)
main.add_command(check)
main.add_command(plot)
main.add_command(tune)


@main.command()
def info() -> None:
    """Print the build, the machine and the settings, as a bug report needs them."""
    try:
        build = leetcore.build_info()
    except RuntimeError as error:  # a wrong LEETCORE_ISA
        raise click.ClickException(str(error)) from None
    facts = {
        "leetcore": f"{build['version']} in {Path(leetcore.__file__).parent}",
        "compiler": build["compiler"],
        "instruction set": f"{build['isa']} of {build['isas']}",
        "threads": f"{build['threads']} (by {build['threads_source']})",
        "cuda": build["cuda"],
        "tuning": leetcore.tuning.source,
        "methods": ", ".join(f"{m.name} ({m.device})" for m in leetcore.methods()),
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        **{name: machine.installed(name) or "not installed" for name in ("numpy", "torch", "jax", "ml_dtypes")},
        "platform": platform.platform(),
        "processor": f"{machine.processor()}, {os.cpu_count()} logical cores",
        "environment": ", ".join(f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("LEETCORE_")) or "-",
    }
    if sys.stdout.isatty():
        table = rich.table.Table(box=rich.box.SIMPLE, show_header=False)
        for name, fact in facts.items():
            table.add_row(name, rich.markup.escape(fact))
        rich.console.Console().print(table)
    else:
        for name, fact in facts.items():
            click.echo(f"{name}: {fact}")


@main.command()
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", metavar="OUT", type=click.Path(path_type=Path), required=True, help="The file to write."
)
@click.option("--method", default="auto", show_default=True, help="auto, or a method that `leetcore info` lists.")
@click.option("--scale", type=float, default=1.0, show_default=True, help="A factor of the output.")
@click.option(
    "--layout",
    type=click.Choice(["bhnd", "bnhd"]),
    default="bhnd",
    show_default=True,
    help="Order of the axes of q, k and v.",
)
@click.option("--state/--no-state", default=False, show_default=True, help="Whether to write final_state too.")
@click.option("--threads", type=click.IntRange(min=1), help="Number of threads. Default: one per core.")
def run(
    source: Path, output: Path, method: str, scale: float, layout: Layout, state: bool, threads: int | None
) -> None:
    """Apply the operator to the arrays of a file.

    IN contains q, k, v and optionally log_decay, initial_state and cu_seqlens, with the shapes and
    dtypes of leetcore.linear_attention. OUT receives o, and final_state with --state. Each file is
    an .npz or a .safetensors file. In an .npz, numpy stores bfloat16 as two raw bytes;
    .view(ml_dtypes.bfloat16) turns them into numbers.
    """
    try:
        files.file_format(output)
        files.require_writable(output)
        arrays = files.load(source)
        if unknown := sorted(set(arrays) - set(_INPUTS)):
            raise ValueError(f"{source}: unknown {', '.join(unknown)}; allowed are {', '.join(_INPUTS)}")
        if missing := [name for name in "qkv" if name not in arrays]:
            raise ValueError(f"{source}: no {', '.join(missing)}; it has {', '.join(arrays) or 'nothing'}")
        if threads:
            leetcore.set_num_threads(threads)
        result = leetcore.linear_attention(**arrays, scale=scale, layout=layout, method=method, return_state=state)
        files.save(output, dict(zip(("o", "final_state"), result, strict=True)) if state else {"o": result})
    except OSError as error:
        raise click.ClickException(f"{error.filename or source}: {error.strerror or error}") from None
    except (MemoryError, ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        raise click.ClickException(str(error) or "not enough memory") from None
