"""`streamprune recover`: LoRA on a data set, merged into the checkpoint or kept as an adapter."""

from __future__ import annotations

from typing import Any

import click

from streamprune.commands.options import options_from, with_options
from streamprune.commands.prune import progress_of_options
from streamprune.errors import UsageError
from streamprune.figures import human, table
from streamprune.recovery.options import RecoverConfig


@click.command(name="recover")
@with_options(options_from(RecoverConfig))
@click.option("--quiet", is_flag=True, help="No progress.")
@click.option("--json-progress", is_flag=True, help="Progress for machines: a JSON object per line on stderr.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def recover_command(quiet: bool, json_progress: bool, debug: bool, **options: Any) -> None:
    """Train a checkpoint further by LoRA, in memory or, with --streamed, layer by layer."""
    for name in ("model", "output"):
        if options[name] is None:
            raise UsageError(f"--{name} is missing; see streamprune recover --help")
    if options.pop("no_evaluate"):
        if options["evaluate"] is not None:
            raise UsageError("--evaluate and --no-evaluate exclude each other")
        options["evaluate"] = False
    config = RecoverConfig(**options)
    with progress_of_options(quiet, json_progress) as progress:
        import transformers

        from streamprune.pipeline.recover import recover

        transformers.logging.disable_progress_bar()  # its own, of a model that is loaded
        result = recover(config, progress)
        click.echo(_summary(result.facts["recovery"]))
        click.echo(f"wrote {result.output} ({result.layout})")


def _summary(recovery: dict[str, Any]) -> str:
    rows = [["", "before", "after"]]
    for name, digits in (("loss", 4), ("perplexity", 2)):
        if name in recovery:
            rows.append([name, *(f"{recovery[name][when]:.{digits}f}" for when in ("before", "after"))])
    seconds, peak = recovery["seconds"], human(recovery["peak_rss"])
    lines = [table(rows)] if len(rows) > 1 else []
    return "\n".join([*lines, f"all {seconds:.1f} s, peak memory {peak}"])
