"""What BOS does to a model that was trained with it: pruned from sequences with and without, and measured both ways.

    python bench/beginnings.py --model Gemma-3-270M [--data DIR] [--json FILE]

Perplexities of the embedded held-out prose, and of wikitext2-test.txt in DIR, 100 segments of 128 tokens at most. The
two runs of a method differ in the first token of their calibration sequences alone.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import click

from streamprune import PruneConfig, prune
from streamprune.figures import table
from streamprune.pipeline.source import Source
from streamprune.streaming.perplexity import perplexity
from streamprune.texts.corpus import open_corpus
from streamprune.texts.documents import embedded

METHODS = ("taylor", "wanda-sp", "flap", "moreau-gs")
BEGINNINGS = ("never", "auto")


def perplexities(model: Path, data: Path | None) -> dict[str, float]:
    """By "text, beginning"."""
    sources = {"prose": embedded("heldout")} | ({"wikitext2": data / "wikitext2-test.txt"} if data else {})
    values = {}
    with Source(str(model), decompress=True).open() as sweeper:
        for name, source in sources.items():
            for bos in BEGINNINGS:
                segments = open_corpus(model, source, bos=bos).segments(128, None, most=100)
                values[f"{name}, {bos}"] = perplexity(sweeper, segments).perplexity
    return values


@click.command()
@click.option("--model", required=True, type=click.Path(path_type=Path, exists=True), help="Whose tokenizer has BOS.")
@click.option("--data", type=click.Path(path_type=Path, exists=True), help="Directory of wikitext2-test.txt.")
@click.option("--ratio", type=float, default=0.2, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the figures here.")
def main(model: Path, data: Path | None, ratio: float, json_file: Path | None) -> None:
    """Measure, print the table, and write JSON."""
    figures = {"dense": perplexities(model, data)}
    for method in METHODS:
        for bos in BEGINNINGS:
            with tempfile.TemporaryDirectory() as scratch:
                output = Path(scratch) / "pruned"
                prune(PruneConfig(model=model, output=output, method=method, ratio=ratio, bos=bos, evaluate=False))
                figures[f"{method}, {bos}"] = perplexities(output, data)
            click.echo(f"{method}, {bos}: {json.dumps(figures[f'{method}, {bos}'])}", err=True)
            if json_file:
                json_file.write_text(json.dumps(figures, indent=1) + "\n")
    columns = list(figures["dense"])
    rows = [["calibrated", *columns], *([name, *(f"{f[c]:.1f}" for c in columns)] for name, f in figures.items())]
    click.echo(table(rows, markdown=True))


if __name__ == "__main__":
    main()
