"""How long the command line takes to answer where nothing is computed, and what the imports cost.

    python bench/start.py [--repeat 7] [--json FILE]

Each figure is the median of fresh processes, those of all rows taken in turn, so that a busy machine is busy for all.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click

from streamprune.figures import table

ROWS = {
    "python": [sys.executable, "-c", ""],
    "import transformers": [sys.executable, "-c", "import transformers"],
    "import streamprune": [sys.executable, "-c", "import streamprune"],
    "import both": [sys.executable, "-c", "import streamprune, transformers"],
    "--help": [sys.executable, "-m", "streamprune", "--help"],
    "--version": [sys.executable, "-m", "streamprune", "--version"],
    "methods": [sys.executable, "-m", "streamprune", "methods"],
    "--ratio 2": [sys.executable, "-m", "streamprune", "--model", "a", "--output", "b", "--ratio", "2"],
}


@click.command()
@click.option("--repeat", type=int, default=7, show_default=True, help="Processes of each row.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the figures here.")
def main(repeat: int, json_file: Path | None) -> None:
    """Measure, print the table, and write JSON."""
    seconds: dict[str, list[float]] = {name: [] for name in ROWS}
    for _ in range(repeat + 1):
        for name, command in ROWS.items():
            start = time.perf_counter()
            subprocess.run(command, capture_output=True, check=False)
            seconds[name].append(time.perf_counter() - start)
    figures = {name: taken[1:] for name, taken in seconds.items()}  # the first of each finds cold files
    rows = [["", "median s", "least", "most"]]
    for name, taken in figures.items():
        rows.append([name, *(f"{f(taken):.2f}" for f in (statistics.median, min, max))])
    click.echo(table(rows, markdown=True))
    if json_file:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
