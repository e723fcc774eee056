"""`streamprune speed`: how fast a model is in use, beside another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from streamprune.errors import UsageError


@click.command(name="speed")
@click.argument("directory")
@click.option("--against", help="Model to measure in turn with it, such as the dense one.")
@click.option("--prompt", type=int, default=256, show_default=True, help="Tokens of the prompt.")
@click.option("--new", type=int, default=32, show_default=True, help="Tokens that are generated.")
@click.option("--runs", type=int, default=5, show_default=True, help="Measurements of each model.")
@click.option("--dtype", default="auto", show_default=True, help="What transformers computes in, as of a run.")
@click.option("--device", help="cpu, cuda or cuda:N, for transformers.  [default: the GPU if there is one]")
@click.option("--no-llama-cpp", is_flag=True, help="Leave llama.cpp out.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that a model's directory brings.")
@click.option("--write", is_flag=True, help="Also write it into DIRECTORY's streamprune.json and card.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def speed_command(directory: str, no_llama_cpp: bool, write: bool, debug: bool, **options: Any) -> None:
    """Measure tokens per second and memory of the model in DIRECTORY, each model in a process of its own."""
    if options["prompt"] < 2 or options["new"] < 1 or options["runs"] < 1:
        raise UsageError("--prompt must be at least 2, --new and --runs at least 1")
    from streamprune.reports.speed import speed

    if write:
        from streamprune.reports.outputs import read_output

        read_output(Path(directory))  # refused before it is measured
    found = speed(directory, llama_cpp=not no_llama_cpp, **options)
    click.echo(found.text)
    if write:
        from streamprune.reports.recorded import record_speed

        record_speed(Path(directory), found)
        click.echo(f"wrote it into {directory}")
