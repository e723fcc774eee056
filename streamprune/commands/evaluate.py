"""`streamprune eval`: the perplexity of a model of any size."""

from __future__ import annotations

from typing import Any

import click

from streamprune.commands.options import COMPUTE_OPTIONS, with_options
from streamprune.commands.prune import progress_of_options
from streamprune.pipeline.evaluate import evaluate


@click.command(name="eval")
@click.option("--model", required=True, help="Model directory (dense or pruned) or hub id.")
@click.option("--text", help="Text, as --calibration; else embedded held-out prose.")
@click.option("--field", default="text", help="Of the text in records and tables.")
@click.option("--seq-len", type=int, default=128, show_default=True, help="Tokens of a segment.")
@click.option("--samples", type=int, help="Segments from the start of the text; all by default.")
@with_options(COMPUTE_OPTIONS)
@click.option("--quiet", is_flag=True, help="No progress.")
@click.option("--json-progress", is_flag=True, help="Progress for machines: a JSON object per line on stderr.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def evaluate_command(quiet: bool, json_progress: bool, debug: bool, **options: Any) -> None:
    """Streamed perplexity of a model of any size, over non-overlapping segments."""
    with progress_of_options(quiet, json_progress) as progress:
        found = evaluate(**options, progress=progress)
    click.echo(f"perplexity {found.perplexity:.4f} (loss {found.loss:.6f} nats, {found.text}, in {found.dtype})")
