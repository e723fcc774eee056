"""`streamprune report`: a run on one page."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(name="report")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), help="File to write; by default DIRECTORY/report.html.")
@click.option("--tasks", type=click.Path(path_type=Path), help="Scores on tasks, as eval writes them with --json.")
@click.option("--tasks-before", type=click.Path(path_type=Path), help="The same of the dense model.")
@click.option("--overwrite", is_flag=True, help="Replace the file of --output if it exists.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def report_command(
    directory: Path, output: Path | None, tasks: Path | None, tasks_before: Path | None, overwrite: bool, debug: bool
) -> None:
    """Write a page of the run that made DIRECTORY: what is left, what it took, how to repeat it."""
    from streamprune.reports.report import report

    click.echo(f"wrote {report(directory, output, tasks=tasks, tasks_before=tasks_before, overwrite=overwrite)}")
