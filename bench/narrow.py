"""Scores from a method's state in narrower dtypes against those from float32: rank correlations.

    python bench/narrow.py [--model DIR] [--json FILE]

The demo's 135M Llama, 10 x 128 tokens of the text in the package, layers 4:28. Spearman's correlation of the scores of
a layer's units of one kind, the lowest of all layers and kinds beside the mean. `int8` keeps a scale for each row and
is not offered: it is here to show why.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator, MutableMapping
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from streamprune.commands import demo
from streamprune.figures import table
from streamprune.methods.sinks import UnitScores
from streamprune.methods.table import METHODS, resolve_settings
from streamprune.pipeline.progress import Progress
from streamprune.pipeline.source import Source
from streamprune.planning.rates import default_cache
from streamprune.storage.journal import Key
from streamprune.storage.tensor_store import Memory, make_store
from streamprune.streaming.statistics import Statistics
from streamprune.streaming.sweeper import default_micro_batch
from streamprune.texts.corpus import open_corpus
from streamprune.texts.documents import embedded

RUNS = [
    ("gblm", {}),
    ("smoothgrad", {"draws": 4}),
    ("moreau-gs", {}),
]
DTYPES = ("float32", "bfloat16", "int8")
WANTED = 0.999


class RowScaled(MutableMapping[Key, Tensor]):
    """Matrices in eight bits and a scale for each row."""

    def __init__(self) -> None:
        self._codes, self._scales = Memory(), Memory()

    def __getitem__(self, key: Key) -> Tensor:
        codes = self._codes[key]
        return codes if codes.dtype != torch.int8 else codes.float() * self._scales[key]

    def __setitem__(self, key: Key, value: Tensor) -> None:
        if value.dim() == 2:
            scale = value.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
            self._scales[key], value = scale, (value / scale).round().to(torch.int8)
        self._codes[key] = value

    def __delitem__(self, key: Key) -> None:
        del self._codes[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._codes)

    def __len__(self) -> int:
        return len(self._codes)


def spearman(one: Tensor, other: Tensor) -> float:
    """Correlation of ranks; scores hardly ever are equal."""
    ranks = torch.stack([one.argsort().argsort(), other.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])


def scores_of(model: str, method: str, given: dict[str, Any], dtype: str) -> tuple[UnitScores, float]:
    """Scores of units, and seconds."""
    settings = resolve_settings(method, given, "units")
    with Source(model, device="cpu", micro_batch=default_micro_batch(128)).open() as sweeper:
        corpus = open_corpus(sweeper.skeleton.checkpoint.path, embedded("calibration"))
        ids = corpus.sequences(10, 128, "first", 0)
        store = (lambda name: RowScaled()) if dtype == "int8" else partial(make_store, dtype=dtype)
        statistics_of = Statistics(sweeper, ids, range(4, 28), 0, store=store)
        scores, start = UnitScores(statistics_of.sweeper.skeleton.all_units(statistics_of.layers)), time.perf_counter()
        METHODS[method].score(statistics_of, settings, scores)
        return scores, time.perf_counter() - start


@click.command()
@click.option("--model", type=click.Path(path_type=Path), help="By default the demo's, fetched if need be.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the figures here.")
def main(model: Path | None, json_file: Path | None) -> None:
    """Measure, print the table, and write JSON."""
    path = str(model or demo.fetch(default_cache(), Progress()))
    rows, figures = [["method", "settings", "state", "lowest correlation", "mean", "seconds", f">= {WANTED}"]], []
    for method, given in RUNS:
        exact: UnitScores | None = None
        for dtype in DTYPES:
            scores, seconds = scores_of(path, method, given, dtype)
            exact = exact or scores
            found = [
                spearman(values, scores.values[layer][kind])
                for layer, kinds in exact.values.items()
                for kind, values in kinds.items()
                if len(values) > 100  # of three KV groups there are but six orders
            ]
            lowest, mean = min(found), statistics.mean(found)
            figures.append({"method": method, "settings": given, "state": dtype, "lowest": lowest, "mean": mean})
            said = ", ".join(f"{name}={value}" for name, value in given.items())
            cells = [f"{lowest:.6f}", f"{mean:.6f}", f"{seconds:.1f}", "yes" if lowest >= WANTED else "no"]
            rows.append([method, said, dtype, *cells])
            print(table(rows, markdown=True), file=sys.stderr)
    print(table(rows, markdown=True))
    if json_file:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
