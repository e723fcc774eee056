"""`streamprune export`: a checkpoint in the formats of other programs."""

from __future__ import annotations

from pathlib import Path

import click

from streamprune.figures import human
from streamprune.values import AUTO, GGUF_TYPES


@click.group(name="export")
def export_command() -> None:
    """Write a checkpoint, pruned or not, for other programs."""


@export_command.command(name="gguf")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The file to write.")
@click.option(
    "--type", "type_name", type=click.Choice(GGUF_TYPES), default=AUTO, show_default=True, help="Of matrices."
)
@click.option("--pre", help="How the tokenizer splits texts, by llama.cpp's name, where it cannot be told.")
@click.option("--overwrite", is_flag=True, help="Replace the file if it exists.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def gguf_command(directory: Path, output: Path, type_name: str, pre: str | None, overwrite: bool, debug: bool) -> None:
    """Write the model in DIRECTORY as a GGUF file, for llama.cpp."""
    from streamprune.output.gguf import write_gguf

    written = write_gguf(directory, output, type_name, pre=pre, overwrite=overwrite)
    click.echo(f"wrote {written.path}: {human(written.nbytes)}, {written.type}, llama.cpp's {written.architecture}")
