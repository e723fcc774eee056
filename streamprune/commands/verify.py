"""`streamprune verify`: a pruned directory against the masked dense model."""

from __future__ import annotations

from pathlib import Path

import click

from streamprune.errors import StreampruneError
from streamprune.figures import table
from streamprune.verification.verify import verify


@click.command(name="verify")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--source", help="The dense model, if it is no longer where streamprune.json says.")
@click.option("--trust-remote-code", is_flag=True, help="Run modelling code that is not as streamprune writes it.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def verify_command(directory: Path, source: str | None, trust_remote_code: bool, debug: bool) -> None:
    """Load a pruned DIRECTORY in a fresh process and compare it with the masked dense model."""
    checks = verify(directory, source, trust_remote_code=trust_remote_code)
    from streamprune.verification.comparison import complaint

    rows = [["check", "result", "detail"], *([c.name, "ok" if c.passed else "FAILED", c.detail] for c in checks)]
    click.echo(table(rows))
    if (wrong := complaint(directory, checks)) is not None:
        raise StreampruneError(wrong)
