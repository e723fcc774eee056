"""Scores from a method's state in narrower dtypes against those from float32: ranks, and units that stay.

    python bench/narrow.py [--model DIR] [--dtype float32] [--method NAME] [--state bfloat16] [--json FILE]

The demo's 135M Llama, 10 x 128 tokens of the text in the package, layers 4:28, each method with its own defaults;
computed in bfloat16, as on a GPU where that is stored. Spearman's correlation of the scores of a layer's channels, the
lowest of all layers beside the mean, and the share of the units that stay at the default ratio which are the same.
`int8` keeps a scale for each row and is not offered: it is here to show why. What JSON has is not measured again.
"""

from __future__ import annotations

import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from streamprune import PruneConfig
from streamprune.commands import demo
from streamprune.figures import table
from streamprune.methods.sinks import UnitScores
from streamprune.methods.table import METHODS, resolve_settings
from streamprune.model.units import KeptUnits
from streamprune.pipeline.progress import Progress
from streamprune.pipeline.source import Source
from streamprune.planning.decision import make_plan
from streamprune.planning.rates import default_cache
from streamprune.storage.journal import Key
from streamprune.storage.tensor_store import Memory, make_store
from streamprune.streaming.gradients import Consumer
from streamprune.streaming.statistics import Statistics
from streamprune.streaming.sweeper import default_micro_batch
from streamprune.texts.corpus import open_corpus
from streamprune.texts.documents import embedded

KEEPING = tuple(name for name, row in METHODS.items() if row.states)
EXACT = "float32"
STATES = ("bfloat16", "int8")
WANTED, WANTED_UNITS = 0.9999, 0.999
LAYERS = range(4, 28)


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


class Together:
    """Gradients for runs of a method whose state moves no weight: a sweep is made once all have asked for it."""

    def __init__(self, statistics: Statistics, count: int) -> None:
        self._statistics, self._asked, self._barrier = statistics, list[Consumer](), threading.Barrier(count)

    def gradients(self, consume: Consumer, perturbation: Any = None) -> None:
        """Hand over the gradients of one sweep to all; each run calls it in a thread of its own."""
        self._asked.append(consume)
        if self._barrier.wait() == 0:
            asked, self._asked = self._asked, []

            def to_all(ref: Any, weight: Tensor, grad: Tensor) -> None:
                for each in asked:
                    each(ref, weight, grad.clone())

            self._statistics.gradients(to_all, perturbation)
        self._barrier.wait()


class Sharing:
    """What a method is given of a sweep that it shares: its own store beside the others' gradients."""

    def __init__(self, statistics: Statistics, together: Together, store: Callable[[str], Any]) -> None:
        self.seed, self.gradients, self.store = statistics.seed, together.gradients, store


def spearman(one: Tensor, other: Tensor) -> float:
    """Correlation of ranks; scores hardly ever are equal."""
    ranks = torch.stack([one.argsort().argsort(), other.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])


def store_of(state: str) -> Callable[[str], Any]:
    """A maker of stores that keep their tensors so."""
    return (lambda name: RowScaled()) if state == "int8" else lambda name: make_store(name, dtype=state)


def scores_of(model: str, method: str, dtype: str, states: list[str]) -> dict[str, tuple[UnitScores, KeptUnits, float]]:
    """Scores, the units that stay and seconds, by the dtype of the state."""
    settings, found = resolve_settings(method, {}, "units"), {}
    with Source(model, device="cpu", dtype=dtype, micro_batch=default_micro_batch(128)).open() as sweeper:
        config = PruneConfig(model=model, output="unused", method=method, layers=LAYERS, dtype=dtype)
        plan, units = make_plan(config, sweeper.skeleton), sweeper.skeleton.all_units(LAYERS)
        corpus = open_corpus(sweeper.skeleton.checkpoint.path, embedded("calibration"))
        ids = corpus.sequences(10, 128, "first", 0)
        scores, start = {state: UnitScores(units) for state in states}, time.perf_counter()
        if method == "smoothgrad":
            of_all = Statistics(sweeper, ids, LAYERS, 0)
            together = Together(of_all, len(states))
            threads = [
                threading.Thread(
                    target=METHODS[method].score,
                    args=(Sharing(of_all, together, store_of(state)), settings, scores[state]),
                )
                for state in states
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        for state in states:
            if method != "smoothgrad":
                start = time.perf_counter()
                METHODS[method].score(
                    Statistics(sweeper, ids, LAYERS, 0, store=store_of(state)), settings, scores[state]
                )
            found[state] = scores[state], plan.choice.keep(scores[state].values), time.perf_counter() - start
    return found


def compared(exact: tuple[UnitScores, KeptUnits, float], other: tuple[UnitScores, KeptUnits, float]) -> dict[str, Any]:
    """Figures of a narrower state against float32."""
    ranks = [
        spearman(values, other[0].values[layer][kind])
        for layer, kinds in exact[0].values.items()
        for kind, values in kinds.items()
        if len(values) > 100  # of three KV groups there are but six orders
    ]
    pairs = [(set(units), set(other[1][layer][kind])) for layer in LAYERS for kind, units in exact[1][layer].items()]
    same = sum(len(one & two) for one, two in pairs) / sum(len(one) for one, _ in pairs)
    return {"lowest": min(ranks), "mean": statistics.mean(ranks), "units": same, "seconds": [exact[2], other[2]]}


def shown(figures: dict[str, dict[str, Any]]) -> str:
    """The table of all that was measured."""
    rows = [
        ["method", "state", "computed in", "lowest correlation", "mean", "units that stay alike", "seconds", "holds"]
    ]
    for name, found in figures.items():
        holds = found["lowest"] >= WANTED and found["units"] >= WANTED_UNITS
        cells = [f"{found['lowest']:.6f}", f"{found['mean']:.6f}", f"{found['units']:.3%}"]
        rows.append([*name.split("/"), *cells, f"{found['seconds'][1]:.1f}", "yes" if holds else "no"])
    return table(rows, markdown=True)


@click.command()
@click.option("--model", type=click.Path(path_type=Path), help="By default the demo's, fetched if need be.")
@click.option("--dtype", default="bfloat16", show_default=True, help="What is computed in.")
@click.option("--method", "methods", multiple=True, help="Only this one; repeatable.")
@click.option("--state", "states", multiple=True, type=click.Choice(STATES), help="Only this one; repeatable.")
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path), help="Figures; what it has is not measured again."
)
def main(
    model: Path | None, dtype: str, methods: tuple[str, ...], states: tuple[str, ...], json_file: Path | None
) -> None:
    """Measure, print the table, and write JSON."""
    path = str(model or demo.fetch(default_cache(), Progress()))
    figures: dict[str, Any] = json.loads(json_file.read_text()) if json_file and json_file.exists() else {}
    for method in methods or KEEPING:
        left = [state for state in states or STATES if f"{method}/{state}/{dtype}" not in figures]
        if not left:
            continue
        found = scores_of(path, method, dtype, [EXACT, *left])
        for state in left:
            figures[f"{method}/{state}/{dtype}"] = compared(found[EXACT], found[state])
        print(shown(figures), file=sys.stderr)
        if json_file:
            json_file.write_text(json.dumps(figures, indent=1) + "\n")
    print(shown(figures))


if __name__ == "__main__":
    main()
