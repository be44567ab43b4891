"""`python -m leetcore`: the command line."""

from .cli import main

main(prog_name="leetcore")
