"""`streamprune compare`: what two runs left, side by side."""

from __future__ import annotations

import json
from pathlib import Path

import click

from streamprune.storage.directory import check_file, write_whole


@click.command(name="compare")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the figures here.")
@click.option("--draw", "picture", type=click.Path(path_type=Path), help="Also draw them: a file .svg or .png.")
@click.option("--overwrite", is_flag=True, help="Replace these files if they exist.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def compare_command(
    a: Path, b: Path, json_file: Path | None, picture: Path | None, overwrite: bool, debug: bool
) -> None:
    """Compare the outputs A and B of two runs of one model: what stays, scores, perplexity, recipe."""
    for file, option in ((json_file, "--json"), (picture, "--draw")):
        if file is not None:
            check_file(file, option, overwrite=overwrite)
    if picture is not None:
        from streamprune.reports.drawing import check_drawing

        check_drawing(picture)
    from streamprune.reports.compare import compare

    found = compare(a, b)
    click.echo(found.text)
    if json_file is not None:
        write_whole(json_file, (json.dumps(found.to_json(), indent=1) + "\n").encode())
    if picture is not None:
        from streamprune.reports.drawing import draw

        write_whole(picture, draw(found, picture.suffix))
