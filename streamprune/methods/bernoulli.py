"""Pruning without gradients: a Bernoulli policy on units or layers, by forward passes alone (arXiv 2406.10576)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamprune.config import Target
from streamprune.errors import UsageError
from streamprune.kernels import noise_seed
from streamprune.methods.budget import Space, start_from_scores
from streamprune.methods.policy import RAMP, ROUNDING, Policy
from streamprune.methods.sinks import LayerScores, UnitScores
from streamprune.methods.table import METHODS, resolve_settings
from streamprune.model.families import unit_costs
from streamprune.model.skeleton import Skeleton
from streamprune.model.units import Kind, TensorRef
from streamprune.storage.journal import Key
from streamprune.storage.scores import read_scores
from streamprune.streaming.filling import inverse_gram
from streamprune.streaming.inputs import Gram
from streamprune.streaming.masked import Trial
from streamprune.streaming.statistics import Goal, Statistics

PROGRESSIVE, EPOCH_STAGES = "random-progressive", 3  # a random start whose budget falls, by so many steps an epoch
NO_SCORES = ("score-const", "random", PROGRESSIVE)
CONSTANT = 0.8  # c of the start `score-const` (§3.3), before it is shifted to the budget


def bernoulli(statistics: Statistics, settings: dict[str, Any], sink: UnitScores | LayerScores) -> None:
    """Score units or layers by the keep probabilities that are learnt from losses of random masks."""
    assert statistics.goal is not None, "a run has one"
    target: Target = "layers" if isinstance(sink, LayerScores) else "units"
    start, space = settings["init"], make_space(statistics.sweeper.skeleton, target, statistics.layers, statistics.goal)
    stage = _stage(space, statistics.samples, settings) if start == PROGRESSIVE else None
    if start in METHODS:  # the sink keeps these scores while the policy learns, so a journal has them
        of_start = resolve_settings(start, {}, repairs=settings["repaired"] == "yes")
        if "bias" in of_start:  # masks are tried without one, and so they are written
            of_start["bias"] = "no"
        METHODS[start].score(statistics, of_start, sink)
    inverses = _inverses(statistics) if settings["repaired"] == "yes" else {}
    begin = _start(space, sink, statistics, settings)
    steps, each = settings["steps"], settings["per_pass"] or 1
    policy = Policy(space, begin, settings, statistics.seed, statistics.store("policy"), stage)
    for first in range(0, steps, each):
        numbers = range(first, min(first + each, steps))
        if statistics.begin_pass():
            p, masks = policy.sampled_from, {step: policy.draw(step) for step in numbers}
            rows = {step: _batch(statistics, settings["batch"], step) for step in numbers}
            trials = list(_trials(space, masks, rows))
            losses = statistics.losses_of([row for step in numbers for row in rows[step]], trials, inverses)
            for step in numbers:
                own, losses = losses[: len(masks[step])], losses[len(masks[step]) :]
                statistics.note(step=step, **policy.learn(step, steps, masks[step], own, p))
            statistics.finish_pass()
        else:  # the policy in the store has learnt from it
            for step in numbers:
                statistics.note(step=step, **policy.told(step))
        if policy.settled(numbers[-1]):
            break
    policy.check_learnt()
    _put(sink, space.split(policy.scores))


def _inverses(statistics: Statistics) -> Mapping[Key, Tensor]:
    """Make what masks' lost lines are filled in with, of the inputs of o and down."""
    store = statistics.store("inverse")

    def keep(ref: TensorRef, weight: Tensor, sums: Gram) -> None:
        store[ref.key] = inverse_gram(sums.total, ref, "repaired=no")

    statistics.inputs(Gram, keep, of=lambda ref: ref.cut_by_inputs)
    return store


def make_space(skeleton: Skeleton, target: Target, layers: Sequence[int], goal: Goal) -> Space:
    """Make the space of all units, or layers, that may go; what they cost, and how much of them stays."""
    parts, costs, n = dict[Key, slice](), list[float](), 0
    for layer in layers:
        if target == "layers":
            sizes = {"layer": (1, sum(shape.numel() for shape in skeleton.shapes(layer).values()))}
        else:
            geometry = skeleton.geometries[layer]
            each = unit_costs(skeleton.family, geometry, skeleton.shapes(layer))
            sizes = {kind: (geometry.units(kind), cost) for kind, cost in each.items()}
        for kind, (count, cost) in sizes.items():
            parts[layer, kind] = slice(n, n + count)
            costs += [float(cost)] * count
            n += count

    def lost(ordered: Mapping[Key, Tensor], part: float) -> Mapping[Key, int]:
        if goal.count is None:
            kept = goal.keep({layer: float(logit) for (layer, _), logit in ordered.items()}, part)
            return {key: int(key[0] not in kept) for key in ordered}
        units = dict[int, dict[Kind, Tensor]]()
        for (layer, kind), values in ordered.items():
            units.setdefault(layer, {})[kind] = values  # type: ignore[index]
        return {(layer, kind): gone for layer, of in goal.count(units, part).items() for kind, gone in of.items()}

    return Space(parts, torch.tensor(costs, dtype=torch.float64), goal.budgets, lost)


def _start(space: Space, sink: UnitScores | LayerScores, statistics: Statistics, settings: Mapping[str, Any]) -> Tensor:
    """Return the keep probabilities to begin with [n]."""
    start, explores = settings["init"], settings["learner"] == "explore"
    n = len(space.costs)
    generator = torch.Generator().manual_seed(noise_seed(statistics.seed, "start"))
    if start == "random":
        return torch.rand(n, generator=generator, dtype=torch.float64)
    if start == PROGRESSIVE:  # from nearly all of the parameters down
        nearly_all = space.eased(RAMP / max(RAMP, space.gone))
        return nearly_all.shifted(torch.randn(n, generator=generator, dtype=torch.float64))
    if start == "score-const":
        return torch.full((n,), CONSTANT, dtype=torch.float64)
    scores, facts = (sink.by_key(), {"method": start}) if start in METHODS else read_scores(Path(start))
    if facts["method"] == "bernoulli":  # it goes on from what it has learnt
        learnt = torch.cat([scores[key] for key in space.parts])
        return torch.sigmoid(learnt) if facts.get("learner") == "explore" else learnt
    if isinstance(sink, LayerScores):  # compared with each other, not within a layer
        return start_from_scores({(0, "layer"): torch.cat([scores[key] for key in space.parts])}, space)
    return start_from_scores({key: scores[key] for key in space.parts}, space, by_order=explores)


def check(
    settings: Mapping[str, Any], skeleton: Skeleton, target: Target, layers: Sequence[int], goal: Goal, samples: int
) -> None:
    """Refuse to begin with scores of another model, granularity or other layers, and to learn where nothing can move.

    Args:
        samples: sequences that are to be learnt from.

    Raises:
        UsageError: they are, or there are none; what is moved together goes or stays whatever moves it; a budget that
            falls would not be down before the last step.
    """
    if target == "layers" and settings["repaired"] == "yes":
        raise UsageError("--set repaired=yes is of units; leave it out, or pass --granularity units")
    start = settings["init"]
    if settings["learner"] == "explore" or start == PROGRESSIVE:
        space = make_space(skeleton, target, layers, goal)
        together = settings["learner"] == "explore" and target == "units"
        if together and space.gone > 0 and not space.can_move:
            other = ", or --allocation global of several layers" if skeleton.family.ragged else ""
            raise UsageError(
                "--method bernoulli: explore moves the units of a layer and kind together, and here each loses as many "
                f"whatever moves it; take --set variant=logits{other}"
            )
        if start == PROGRESSIVE:
            _stage(space, samples, settings)
    if start in METHODS or start in NO_SCORES:
        return
    scores, facts = read_scores(Path(start))
    if facts.get("model") != skeleton.checkpoint.outline:
        raise UsageError(
            f"--set init={start}: its scores are of another model; give those of {skeleton.checkpoint.path}"
        )
    if facts.get("granularity") != target:
        raise UsageError(
            f"--set init={start}: its scores are of {facts.get('granularity')}, wanted are those of {target}"
        )
    if missing := [layer for layer in layers if layer not in {of for of, _ in scores}]:
        raise UsageError(
            f"--set init={start}: it has no scores of layer {missing[0]}; give those of a run whose --layers have "
            f"{layers[0]}:{layers[-1] + 1}"
        )


def _stage(space: Space, samples: int, settings: Mapping[str, Any]) -> int:
    """Return the steps of a third of an epoch, after which the budget falls (§3.3).

    Raises:
        UsageError: it would not be down before the last step.
    """
    stage = math.ceil(samples / (EPOCH_STAGES * settings["batch"]))
    falls = math.ceil(space.gone / RAMP - ROUNDING) - 1
    if stage * falls >= settings["steps"]:
        raise UsageError(
            f"--set steps={settings['steps']}: {PROGRESSIVE} comes down to the budget after {stage * falls} with "
            f"batch={settings['batch']}; give more"
        )
    return stage


def _batch(statistics: Statistics, size: int, step: int) -> list[int]:
    """List the sequences of a step: all of them in a new order for each epoch, some after others."""
    samples, begin = statistics.samples, step * size
    epochs = range(begin // samples, (begin + size - 1) // samples + 1)
    orders = []
    for epoch in epochs:
        generator = torch.Generator().manual_seed(noise_seed(statistics.seed, "epoch", epoch))
        orders += torch.randperm(samples, generator=generator).tolist()
    begin -= epochs.start * samples
    return orders[begin : begin + size]


def _trials(space: Space, masks: Mapping[int, Tensor], rows: Mapping[int, list[int]]) -> Iterator[Trial]:
    """Yield a trial for each mask of each step, on that step's sequences."""
    begin = 0
    for step, drawn in masks.items():
        sequences = slice(begin, begin + len(rows[step]))
        begin = sequences.stop
        for mask in drawn:
            kept: dict[int, dict[Kind, Tensor]] = {}
            gone = set()
            for (layer, kind), part in space.split(mask).items():
                if kind == "layer":
                    gone |= set() if bool(part) else {layer}
                else:
                    kept.setdefault(layer, {})[kind] = part  # type: ignore[index]
            yield Trial(kept, frozenset(gone), sequences)


def _put(sink: UnitScores | LayerScores, learnt: Mapping[Key, Tensor]) -> None:
    """Put what was learnt in the place of the scores that it began with."""
    for (layer, kind), values in learnt.items():
        if isinstance(sink, LayerScores):
            sink.values[layer] = float(values)
        else:
            sink.values[layer][kind].copy_(values)  # type: ignore[index]
