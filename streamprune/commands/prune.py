"""The main command: prune a model. What it shares with `plan` and `eval` is here too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from streamprune.commands.options import parse_settings
from streamprune.config import PruneConfig
from streamprune.errors import UsageError
from streamprune.figures import human, table
from streamprune.methods.table import resolve_settings
from streamprune.pipeline.progress import Progress


def config_of_options(options: dict[str, Any]) -> PruneConfig:
    """Make the config that the options of the main command, or of `plan`, ask for.

    Raises:
        UsageError: they cannot be meant. All that can be told from the options alone is told here, before torch is
            imported, which takes seconds.
    """
    no_evaluate = options.pop("no_evaluate")
    if no_evaluate:
        if options["evaluate"] is not None:
            raise UsageError("--evaluate and --no-evaluate exclude each other")
        options["evaluate"] = False
    options["settings"] = parse_settings(options.pop("assignments"))
    if options.pop("no_bias"):
        options["settings"]["bias"] = "no"
    config = PruneConfig(**options)
    resolve_settings(config.method, config.settings, config.target)
    return config


@contextmanager
def progress_of_options(quiet: bool, json_progress: bool) -> Iterator[Progress]:
    """Give the progress that `--quiet` and `--json-progress` ask for, for as long as the block runs."""
    if quiet and json_progress:
        raise UsageError("--quiet and --json-progress exclude each other; leave one of them out")
    if json_progress:
        import transformers
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # the hub's own, of a model that is fetched
        transformers.logging.set_verbosity_error()  # its warnings are no JSON
    try:
        yield Progress(quiet=quiet, as_json=json_progress)
    except KeyboardInterrupt:
        if json_progress:
            raise click.Abort from None  # without the empty line that click ends a terminal's "^C" with
        raise


def run_prune(report: bool, quiet: bool, json_progress: bool, debug: bool, **options: Any) -> None:
    """Prune as the options say, and print what came of it."""
    config = config_of_options(options)
    with progress_of_options(quiet, json_progress) as progress:
        from streamprune.pipeline.run import prune

        result = prune(config, progress)
        click.echo(_summary(result.facts))
        click.echo(f"wrote {result.output} ({result.layout})")
        if result.read_by:
            click.echo(result.read_by)
        if report:
            from streamprune.reports.report import report as write_report

            try:
                click.echo(f"wrote {write_report(result.output)}")
            except KeyboardInterrupt:
                raise click.Abort(f"{result.output} is whole, its report is not there") from None


def _summary(facts: dict[str, Any]) -> str:
    from streamprune.output.card import perplexity_cells, sizes

    rows = [["", "before", "after"]]
    rows += sizes(facts)
    if "perplexity" in facts:
        rows.append(["perplexity", *perplexity_cells(facts["perplexity"])])
    seconds, peak = facts["seconds"], human(facts["peak_rss"])
    return f"{table(rows)}\nscoring {seconds['scoring']:.1f} s, all {seconds['total']:.1f} s, peak memory {peak}"
