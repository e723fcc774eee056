"""How much noise the estimators of bernoulli carry: on the demo's 135M Llama, at the probabilities that it begins with.

    python bench/policy.py --data DIR [--repeat 48] [--ratio 0.4] [--json FILE]

Each estimator is given as many masks a step, of as many tokens, and estimates the slopes along what units of a layer
and kind share. Its noise is the trace of the estimates' covariance, its signal the square of their mean's length, less
what noise adds to it. Steps are what has to be averaged until the noise is as large as the slopes: those of a
first-order (Taylor) loss, whose closed form is known in the coordinates of each estimator, times what the losses of
masks show of it; of `explore`, which draws other masks, the signal. DIR holds wikitext2-valid.txt.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from streamprune.commands import demo
from streamprune.config import PruneConfig
from streamprune.figures import table
from streamprune.methods.bernoulli import _batch, _start, _trials, make_space
from streamprune.methods.budget import Space
from streamprune.methods.policy import Policy, estimate
from streamprune.methods.sinks import UnitScores
from streamprune.methods.table import METHODS, resolve_settings
from streamprune.pipeline.progress import Progress
from streamprune.pipeline.source import Source
from streamprune.planning.decision import goal, make_plan
from streamprune.planning.rates import default_cache
from streamprune.storage.tensor_store import make_store
from streamprune.streaming.statistics import Statistics
from streamprune.texts.corpus import open_corpus

LAYERS, SAMPLES, SEQ_LEN = (4, 28), 64, 128
MASKS, BATCH = 4, 2
FLOORED = {"variant": "exact", "floor": 0.05}
OTHER_TEXTS, PAIRS = "the other masks, on other texts", "opposite masks, the other pairs"
BY_PROBABILITIES, BY_FLOORED = "the other masks, by probabilities", "the same, none nearer to 0 or 1 than 0.05"
Slopes = Callable[[Tensor, Tensor, Tensor], Tensor]  # of (masks, losses, probabilities they were drawn from)


@contextmanager
def opened(model: Path, data: Path, ratio: float) -> Iterator[tuple[Statistics, Space, Tensor, Tensor]]:
    """The model, its space, the probabilities to begin with, and the scores that they are made of [n]."""
    config = PruneConfig(str(model), Path("unused"), "bernoulli", ratio=ratio, layers=LAYERS, evaluate=False)
    with Source(str(model), micro_batch=8, scope="units").open() as sweeper:
        plan = make_plan(config, sweeper.skeleton)
        ids = open_corpus(model, data / "wikitext2-valid.txt").sequences(SAMPLES, SEQ_LEN, "random", 0)
        sweeper.pager.slots = sweeper.n_layers
        wanted = goal(config, sweeper.skeleton, plan)
        statistics = Statistics(sweeper, ids, plan.layers, 0, None, make_store, goal=wanted)
        sink = UnitScores(sweeper.skeleton.all_units(plan.layers), sweeper.backend)
        METHODS["wanda-sp"].score(statistics, resolve_settings("wanda-sp", {}), sink)
        space = make_space(sweeper.skeleton, "units", plan.layers, wanted)
        start = _start(space, sink, statistics, {"init": "wanda-sp", "learner": "logits"})
        METHODS["taylor"].score(statistics, resolve_settings("taylor", {}), sink)
        scores = torch.cat([sink.values[layer][kind].double() for layer, kind in space.parts])  # type: ignore[index]
        yield statistics, space, start, scores


def losses_of(statistics: Statistics, space: Space, masks: Tensor, rows: list[list[int]]) -> Tensor:
    """Losses of masks, each on its own rows."""
    trials = list(_trials(space, {step: masks[step : step + 1] for step in range(len(masks))}, dict(enumerate(rows))))
    return torch.tensor(statistics.losses_of([row for each in rows for row in each], trials), dtype=torch.float64)


def shared(space: Space, row: Tensor) -> Tensor:
    """Sums of a row over the directions of `explore`."""
    of = space.directions()
    return torch.zeros(int(of.max()) + 1, dtype=torch.float64).index_add_(0, of, row)


def others(losses: Tensor) -> Tensor:
    """Mean of the other losses, of each."""
    return (losses.sum() - losses) / (len(losses) - 1)


def by_probabilities(space: Space) -> Slopes:
    """The paper's estimator (Eq. 6), which `natural=yes` multiplies by s(1 - s): it is the one by logits then."""
    return lambda masks, losses, p: shared(space, estimate(masks, losses - others(losses), p) / (p * (1 - p)))


def baselines(space: Space, surrogate: Tensor) -> dict[str, Slopes]:
    """Estimators on masks that were drawn one by one; what is subtracted from the losses, by name."""

    def plain(masks: Tensor, losses: Tensor, p: Tensor) -> Tensor:
        return shared(space, estimate(masks, losses, p))

    def leave_one_out(masks: Tensor, losses: Tensor, p: Tensor) -> Tensor:
        return shared(space, estimate(masks, losses - others(losses), p))

    def controlled(masks: Tensor, losses: Tensor, p: Tensor) -> Tensor:
        # What a first-order loss says of a mask, by how much of it the other masks' losses have shown; its mean slope
        # is known.
        said = (masks.double() - p) @ surrogate
        slopes = []
        for number in range(len(losses)):
            rest = [other for other in range(len(losses)) if other != number]
            beta = float(said[rest] @ (losses[rest] - losses[rest].mean()) / said[rest].square().sum())
            gain = losses[number] - losses[rest].mean() - beta * said[number]
            slopes.append(gain * (masks[number].double() - p) + beta * surrogate * p * (1 - p))
        return shared(space, torch.stack(slopes).mean(0))

    return {"no baseline": plain, "the other masks": leave_one_out, "and a first-order surrogate": controlled}


def measure(statistics: Statistics, space: Space, start: Tensor, scores: Tensor, repeat: int) -> dict[str, Any]:
    """Noise and signal of every estimator, at the same probabilities."""
    found: dict[str, list[Tensor]] = {}
    given = {"masks": MASKS, "batch": BATCH}
    apart, pairs, directed, floored = (
        Policy(space, start, resolve_settings("bernoulli", {**given, **more}, "units"), 0, {})
        for more in ({"variant": "exact"}, {"variant": "logits"}, {"variant": "best"}, FLOORED)
    )
    estimators, p = baselines(space, -scores), apart.sampled_from
    known = {name: p * (1 - p) for name in (*estimators, OTHER_TEXTS, PAIRS)}  # ∂p of an estimator's coordinates
    known |= dict.fromkeys((BY_PROBABILITIES, BY_FLOORED), torch.ones_like(p))
    said, shown = [], []
    for step in range(repeat):
        rows = _batch(statistics, BATCH, step)
        masks = apart.draw(step)
        losses = losses_of(statistics, space, masks, [rows] * MASKS)
        for name, slopes in {**estimators, BY_PROBABILITIES: by_probabilities(space)}.items():
            found.setdefault(name, []).append(slopes(masks, losses, p))
        drawn = masks.double()
        said.append((drawn - drawn.mean(0)) @ -scores)
        shown.append(losses - losses.mean())
        masks = floored.draw(step)
        losses = losses_of(statistics, space, masks, [rows] * MASKS)
        found.setdefault(BY_FLOORED, []).append(by_probabilities(space)(masks, losses, floored.sampled_from))
        own = [_batch(statistics, BATCH, repeat + step * MASKS + number) for number in range(MASKS)]
        masks = apart.draw(step)
        losses = losses_of(statistics, space, masks, own)
        found.setdefault(OTHER_TEXTS, []).append(estimators["the other masks"](masks, losses, p))
        masks = pairs.draw(step)
        losses = losses_of(statistics, space, masks, [rows] * MASKS)
        gains = losses - pairs._baseline(losses)
        found.setdefault(PAIRS, []).append(shared(space, estimate(masks, gains, p)))
        masks = directed.draw(step)
        losses = losses_of(statistics, space, masks, [rows] * MASKS)
        noise, spread = directed._noise(step), directed.settings["spread"]
        found.setdefault("explore", []).append((losses[0::2] - losses[1::2]) @ noise / (2 * spread * len(noise)))
        click.echo(f"  {step + 1} of {repeat}", err=True)
    results: dict[str, Any] = {name: signal_and_noise(torch.stack(each)) for name, each in found.items()}
    x, y = torch.cat(said), torch.cat(shown)
    for name, derivative in known.items():
        results[name]["first order"] = float(shared(space, -scores * derivative * (x @ y / (x @ x))).square().sum())
    return {"estimators": results, "correlation": float(x @ y / (x.norm() * y.norm()))}


def signal_and_noise(estimates: Tensor) -> dict[str, float]:
    """Trace of the covariance of estimates [count, directions], and the squared length of their mean without it."""
    noise = float(estimates.var(dim=0).sum())
    return {"noise": noise, "signal": float(estimates.mean(dim=0).square().sum()) - noise / len(estimates)}


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--model", type=click.Path(path_type=Path), help="By default the demo's, fetched if need be.")
@click.option("--ratio", type=float, default=0.4, show_default=True)
@click.option("--repeat", type=click.IntRange(2), default=48, show_default=True, help="Steps of each estimator.")
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(data: Path, model: Path | None, ratio: float, repeat: int, json_file: Path | None) -> None:
    """Measure, and print the table."""
    path = model or Path(demo.fetch(default_cache(), Progress()))
    with opened(path, data, ratio) as (statistics, space, start, scores):
        results = measure(statistics, space, start, scores, repeat)
    rows = [["losses are compared with", "noise", "signal", "first order", "steps"]]
    for name, each in results["estimators"].items():
        slopes = each.get("first order", each["signal"])
        steps = f"{each['noise'] / slopes:,.0f}" if slopes > 0 else "no signal found"
        first = f"{each['first order']:.3g}" if "first order" in each else "-"
        rows.append([name, f"{each['noise']:.3g}", f"{each['signal']:.3g}", first, steps])
    print(table(rows, markdown=True))
    print(f"correlation of a first-order loss with the losses of masks: {results['correlation']:.2f}")
    if json_file is not None:
        json_file.write_text(json.dumps({"ratio": ratio, "repeat": repeat, **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
