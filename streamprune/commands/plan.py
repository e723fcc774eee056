"""`streamprune plan`: what a run will cost, before it costs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from streamprune.commands.options import COMPUTE_OPTIONS, PRUNE_OPTIONS, with_options
from streamprune.commands.prune import config_of_options
from streamprune.errors import UsageError
from streamprune.planning.cards import CARDS


@click.command(name="plan")
@with_options(PRUNE_OPTIONS + COMPUTE_OPTIONS)
@click.option("--measure", is_flag=True, help="Measure this machine for a few seconds; kept for the next time.")
@click.option("--assume", type=click.Choice(list(CARDS)), help="Take a card's data sheet and an NVMe drive.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def plan_command(measure: bool, assume: str | None, debug: bool, **options: Any) -> None:
    """Say what a run with the same options will hold, read and take, from config.json and headers alone."""
    if measure and assume:
        raise UsageError("--measure and --assume exclude each other")
    if options["model"] is None:
        raise UsageError("--model is missing; see streamprune plan --help")
    options["output"] = options["output"] or Path("unused")
    config = config_of_options(options)
    from streamprune.pipeline.run import foretell

    click.echo(foretell(config, measure=measure, assume=assume).text)
