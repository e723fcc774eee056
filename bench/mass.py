"""Where the policy's mass goes: what stays of each layer, beside what other methods leave there by the same budget.

    python bench/mass.py --results FILE [--setting "40% wanda-sp"] --data DIR

FILE is one that `quality.py policy` wrote; the setting's parameters are compared with those of its initialiser and of
taylor, whose z-scores are compared over all layers (`--allocation global`). DIR holds wikitext2-valid.txt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from streamprune.commands import demo
from streamprune.config import PruneConfig
from streamprune.figures import table
from streamprune.methods.sinks import UnitScores
from streamprune.methods.table import METHODS, resolve_settings
from streamprune.pipeline.progress import Progress
from streamprune.pipeline.source import Source
from streamprune.planning.decision import make_plan
from streamprune.planning.rates import default_cache
from streamprune.streaming.statistics import Statistics
from streamprune.texts.corpus import open_corpus

LAYERS = (4, 28)
OTHERS = {"wanda-sp": (128, 512), "taylor": (10, 128)}
Counts = dict[str, list[int]]


def counts(kept: Any, layers: Sequence[int]) -> dict[str, list[int]]:
    """How many units stay, layer by layer, by kind."""
    return {kind: [len(kept[layer][kind]) for layer in layers] for kind in kept[layers[0]]}


def of_method(model: str, data: Path, method: str, ratio: float) -> Counts:
    """What a method keeps of each layer."""
    config = PruneConfig(model, Path("unused"), method, ratio=ratio, allocation="global", layers=LAYERS)
    with Source(model, dtype="bfloat16", micro_batch=8).open() as sweeper:
        plan = make_plan(config, sweeper.skeleton)
        ids = open_corpus(sweeper.skeleton.checkpoint.path, data / "wikitext2-valid.txt").sequences(
            *OTHERS[method], sampling="first", seed=0
        )
        scores = UnitScores(sweeper.skeleton.all_units(plan.layers), sweeper.backend)
        METHODS[method].score(Statistics(sweeper, ids, plan.layers, 0), resolve_settings(method, {}), scores)
        return counts(plan.choice.keep(scores.values), plan.layers)


def show(found: dict[str, Counts]) -> str:
    """A row per layer: KV groups and channels that stay, by method."""
    rows = [["layer", *(f"{name}: {kind}" for name, kinds in found.items() for kind in ("groups", "channels"))]]
    first = next(iter(found.values()))
    for number in range(len(first["channel"])):
        cells = [str(kinds[kind][number]) for kinds in found.values() for kind in ("kv_group", "channel")]
        rows.append([str(LAYERS[0] + number), *cells])
    totals = [f"{sum(kinds[kind]):,}" for kinds in found.values() for kind in ("kv_group", "channel")]
    return table([*rows, ["all", *totals]], markdown=True)


@click.command()
@click.option("--results", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--setting", default="40% wanda-sp", show_default=True)
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--model", type=click.Path(path_type=Path), help="By default the demo's, fetched if need be.")
def main(results: Path, setting: str, data: Path, model: Path | None) -> None:
    """Print the table."""
    learnt = json.loads(results.read_text())["policy/bernoulli/0"][setting]["kept"]
    path = str(model or demo.fetch(default_cache(), Progress()))
    ratio = float(setting.partition("%")[0]) / 100
    print(show({"bernoulli": learnt} | {name: of_method(path, data, name, ratio) for name in OTHERS}))


if __name__ == "__main__":
    main()
