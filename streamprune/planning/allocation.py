"""Allocation: from scores to what is kept, how many units go from each layer and which; or which layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from streamprune.errors import UsageError
from streamprune.methods.sinks import check_scores, zscores
from streamprune.model.families import Family, stock_takes
from streamprune.model.units import FLOOR_SLACK, KIND_NAMES, Geometry, KeptUnits, Kind

UnitCosts = Mapping[int, Mapping[Kind, int]]  # parameters of a unit, by layer and kind
SORTED_AT_ONCE, HALVINGS = 4096, 64  # blocks at the end of a budget, and steps to find them


@dataclass(frozen=True)
class Ratios:
    """Fractions that are to be removed of each prunable layer.

    Attributes:
        total: fraction of its prunable parameters.
        attention, mlp: fractions of its KV groups and of its channels, where the two are set apart.
        round_to: the kept number of channels is a multiple of this.
    """

    total: float
    attention: float | None = None
    mlp: float | None = None
    round_to: int = 1


def uniform(
    family: Family,
    geometry: Geometry,
    costs: Mapping[Kind, int],
    ratios: Ratios,
    hidden_size: int,
    *,
    stock: bool,
) -> dict[Kind, int]:
    """Count the units to remove from a layer, by kind.

    Whole KV groups go by floor(r·groups), then channels fill the rest of the layer's parameter budget to the nearest
    channel. Where no channels can go, KV groups meet the budget to the nearest group.

    Args:
        geometry: sizes of the layer.
        costs: parameters of one of its units of each kind.
        stock: land on a head count that the family's stock class accepts; channels take the rest.

    Raises:
        UsageError: the ratio would leave a layer without KV groups or channels, or cannot be applied.
    """
    groups = 0
    if "kv_group" in costs:
        groups = _groups(family, geometry, costs, ratios, hidden_size, stock=stock) if geometry.kv_groups else 0
    elif ratios.attention:
        raise UsageError(f"attention of {family.model_type} cannot be pruned; leave --attention-ratio out")
    removed: dict[Kind, int] = {"kv_group": groups} if "kv_group" in costs else {}
    if "channel" in costs:
        removed["channel"] = _channels(geometry, costs, ratios, groups) if geometry.channels else 0
    elif ratios.mlp:
        raise UsageError(f"channels of {family.model_type} cannot be pruned; leave --mlp-ratio out")
    elif ratios.round_to > 1:
        raise UsageError(f"--round-to is of channels, which cannot be pruned in {family.model_type}; leave it out")
    return removed


def _groups(
    family: Family, geometry: Geometry, costs: Mapping[Kind, int], ratios: Ratios, hidden_size: int, *, stock: bool
) -> int:
    """Count the KV groups to remove from a layer."""
    share = ratios.total if ratios.attention is None else ratios.attention
    alone = "channel" not in costs  # nothing else makes up what rounding leaves
    groups = math.floor(share * geometry.kv_groups + (0.5 if alone else FLOOR_SLACK))
    if alone and share > 0 and groups == 0:
        raise UsageError(f"a ratio of {share} is less than half of one of {geometry.kv_groups} KV groups; raise it")
    if stock:
        groups = _stock_groups(family, geometry, groups, hidden_size)
    if groups >= geometry.kv_groups:
        raise UsageError(f"a ratio of {share} leaves no KV group of {geometry.kv_groups}; lower it")
    return groups


def _channels(geometry: Geometry, costs: Mapping[Kind, int], ratios: Ratios, groups: int) -> int:
    """Count the channels to remove from a layer that loses so many KV groups."""
    if ratios.mlp is not None:
        wanted = ratios.mlp * geometry.channels
    else:
        prunable = sum(costs[kind] * geometry.units(kind) for kind in costs)
        wanted = (ratios.total * prunable - groups * costs.get("kv_group", 0)) / costs["channel"]
    if ratios.round_to > geometry.channels:
        raise UsageError(f"--round-to {ratios.round_to}: a layer has {geometry.channels} channels; lower it")
    kept = geometry.channels - max(0, math.floor(wanted + 0.5))
    if ratios.round_to > 1 and 0 < kept < geometry.channels:
        kept = min(geometry.channels, max(1, math.floor(kept / ratios.round_to + 0.5)) * ratios.round_to)
    if kept < 1:
        raise UsageError(
            f"the ratio takes {wanted:.0f} channels of {geometry.channels} and leaves the MLP empty; lower "
            + ("--mlp-ratio" if ratios.mlp is not None else "--ratio, or move some of it with --attention-ratio")
        )
    return geometry.channels - kept


def _stock_groups(family: Family, geometry: Geometry, groups: int, hidden_size: int) -> int:
    """Return the largest number of groups, up to `groups`, after whose removal the stock class takes the heads."""
    while groups and not stock_takes(family, geometry, geometry.kv_groups - groups, hidden_size):
        groups -= 1
    return groups


def keep_highest(scores: Tensor, removed: int) -> list[int]:
    """List the indices (ascending) that remain when exactly `removed` of `scores` [units] go, the lowest first.

    Of equal scores the lowest index goes first.
    """
    check_scores(scores)
    # By rank, not by a threshold: equal scores on its wrong side would change the count.
    return torch.argsort(scores, stable=True)[removed:].sort().values.tolist()


def select(
    scores: Mapping[int, Mapping[Kind, Tensor]], removed: Mapping[int, Mapping[Kind, int]], everything: KeptUnits
) -> KeptUnits:
    """Return the kept units of every layer when so many go of some; of the others, `everything`."""
    return everything | {
        layer: {kind: keep_highest(scores[layer][kind], count) for kind, count in counts.items()}
        for layer, counts in removed.items()
    }


@dataclass(frozen=True)
class GlobalRule:
    """Rule by which the units of all prunable layers are compared.

    Attributes:
        ratio: fraction of their parameters that goes.
        normalize: "zscore" of the scores in each layer and kind, "raw" scores divided by the unit's parameters, or
            "none": as they are.
        min_keep: fraction of each kind that every layer keeps, one unit at least.
        round_to: the kept number of channels is a multiple of this.
        apart: fractions of kinds that have a budget of their own; what is left of `ratio` is for the others.
    """

    ratio: float
    normalize: str = "zscore"
    min_keep: float = 0.1
    round_to: int = 1
    apart: Mapping[Kind, float] = field(default_factory=dict)

    def eased(self, part: float) -> GlobalRule:
        """Return the rule by which that part of it goes."""
        return replace(self, ratio=part * self.ratio, apart={kind: part * share for kind, share in self.apart.items()})

    def step(self, kind: Kind) -> int:
        """Return how many units of a kind go together."""
        return self.round_to if kind == "channel" else 1

    def most(self, kind: Kind, units: int) -> int:
        """Return how many of its `units` a layer may lose."""
        step = self.step(kind)
        least = max(1, math.ceil(self.min_keep * units - FLOOR_SLACK))
        return max(0, units - -(-least // step) * step)


def check_global(rule: GlobalRule, costs: UnitCosts, prunable: KeptUnits) -> None:
    """Refuse a ratio that `min_keep` does not leave room for in the prunable layers, of which all units are given.

    Raises:
        UsageError: with the largest ratio that there is room for.
    """
    room, total = dict[Kind, int](), dict[Kind, int]()
    for layer, kinds in prunable.items():
        for kind, units in kinds.items():
            room[kind] = room.get(kind, 0) + costs[layer][kind] * rule.most(kind, len(units))
            total[kind] = total.get(kind, 0) + costs[layer][kind] * len(units)
    for wanted, together in _budgets(rule, total):
        size = sum(total[kind] for kind in together)
        most = sum(room[kind] for kind in together) / max(1, size)
        if wanted > most * size:
            most = math.floor(most * 1000) / 1000  # rounded up it would be refused again
            which = " and ".join(KIND_NAMES[kind] for kind in together)
            of = "a ratio" if len(together) == len(total) else f"of the {which} a ratio"
            raise UsageError(
                f"{of} of {round(wanted / size, 6)} is more than --min-keep {rule.min_keep} leaves room for, "
                f"{most:.3f}; lower one of them"
            )


def _budgets(rule: GlobalRule, total: Mapping[Kind, int]) -> list[tuple[float, list[Kind]]]:
    """List the parameters that are to go, and the kinds that they are taken from, of `total` of each kind."""
    alone = [(share * total[kind], [kind]) for kind, share in rule.apart.items() if kind in total]
    others = [kind for kind in total if kind not in rule.apart]
    rest = max(0.0, rule.ratio * sum(total.values()) - sum(wanted for wanted, _ in alone))
    return [*alone, (rest, others)] if others else alone


def allocate_globally(
    scores: Mapping[int, Mapping[Kind, Tensor]],
    rule: GlobalRule,
    costs: UnitCosts,
    everything: KeptUnits,
) -> KeptUnits:
    """Choose kept units when the lowest of all layers with scores go, as `count_globally` has it."""
    ordered = {layer: {kind: values.sort().values for kind, values in kinds.items()} for layer, kinds in scores.items()}
    return select(scores, count_globally(ordered, rule, costs), everything)


def count_globally(
    ordered: Mapping[int, Mapping[Kind, Tensor]], rule: GlobalRule, costs: UnitCosts
) -> dict[int, dict[Kind, int]]:
    """Count the units that go of each layer and kind when the lowest go, until the budget of parameters is met.

    Units go in blocks of `rule.step`, in the order of their mean scores (per unit); the first block of a layer is as
    small as makes the rest a multiple. A block that is too large for what is left of the budget is passed over, so
    that what goes is the budget to the nearest smallest block.

    Args:
        ordered: scores of each layer and kind, from the lowest up.
    """
    parts = [(layer, kind, values) for layer, kinds in ordered.items() for kind, values in kinds.items() if len(values)]
    total = dict[Kind, int]()
    for layer, kind, values in parts:
        total[kind] = total.get(kind, 0) + costs[layer][kind] * len(values)
    removed = dict[tuple[int, Kind], int]()
    for budget, together in _budgets(rule, total):
        if budget == 0:  # of a kind that is set apart, nor half a block
            continue
        chosen = [part for part in parts if part[1] in together]
        slack = min(costs[layer][kind] * rule.step(kind) for layer, kind, _ in chosen) / 2
        removed |= _lowest(chosen, rule, costs, budget + slack)
    return {layer: {kind: removed.get((layer, kind), 0) for kind in kinds} for layer, kinds in ordered.items()}


@dataclass(frozen=True)
class _Blocks:
    """Blocks of units of one layer and kind that may go together, the lowest first.

    Attributes:
        values: their mean normalised scores, float64.
        first, step: units of the first, and of each other.
        cost: parameters of a unit.
    """

    values: Tensor
    first: int
    step: int
    cost: int

    def units(self, count: int) -> int:
        """Count the units of the first blocks."""
        return self.first + (count - 1) * self.step if count else 0

    def price(self, count: int) -> int:
        """Count the parameters of the first blocks."""
        return self.units(count) * self.cost

    def prices(self, begin: int, end: int) -> Tensor:
        """Return the parameters of each of some blocks, int64."""
        each = torch.full((end - begin,), self.step * self.cost)
        if begin == 0 < end:
            each[0] = self.first * self.cost
        return each

    def fitting(self, begin: int, end: int, room: float) -> int:
        """Return where those of some blocks end that are not larger than `room`; only the first may be smaller."""
        sizes = self.first if begin == 0 else self.step, self.step
        small = [size * self.cost <= room for size in sizes]
        return begin if not small[0] else end if small[1] else min(end, begin + 1)


def _lowest(
    parts: Sequence[tuple[int, Kind, Tensor]], rule: GlobalRule, costs: UnitCosts, room: float
) -> dict[tuple[int, Kind], int]:
    """Count the units that go of each layer and kind when the lowest blocks go that `room` has place for."""
    blocks = [_blocks(scores, kind, rule, costs[layer][kind]) for layer, kind, scores in parts]
    # Blocks of each part that go already, and those behind them that still may.
    gone, ends = [0] * len(parts), [len(each.values) for each in blocks]
    while any(begin < end for begin, end in zip(gone, ends, strict=True)):
        sure, most = _bracket(blocks, gone, ends, room + sum(map(_Blocks.price, blocks, gone)))
        room -= sum(map(_Blocks.price, blocks, sure)) - sum(map(_Blocks.price, blocks, gone))
        between = list(zip(blocks, sure, most, strict=True))
        order = torch.cat([each.values[begin:end] for each, begin, end in between]).argsort(stable=True)
        spent = torch.cat([each.prices(begin, end) for each, begin, end in between])[order].cumsum(0)
        taken = int((spent <= room).sum())
        room -= int(spent[taken - 1]) if taken else 0
        owner = torch.arange(len(parts)).repeat_interleave(torch.tensor([end - begin for _, begin, end in between]))
        gone = list(map(sum, zip(sure, owner[order[:taken]].bincount(minlength=len(parts)).tolist(), strict=True)))
        ends = [each.fitting(begin, end, room) for each, begin, end in zip(blocks, gone, ends, strict=True)]
    return {(layer, kind): each.units(count) for (layer, kind, _), each, count in zip(parts, blocks, gone, strict=True)}


def _bracket(
    blocks: Sequence[_Blocks], gone: Sequence[int], ends: Sequence[int], room: float
) -> tuple[Sequence[int], Sequence[int]]:
    """Return two ends of each part between which that of the lowest blocks lies that `room` has place for.

    Few blocks lie between them, unless many are equal: to sort the millions of a large model for each mask that is
    tried would take longer than to try it.
    """
    open_ones = [(each, begin, end) for each, begin, end in zip(blocks, gone, ends, strict=True) if begin < end]
    least = min(float(each.values[begin]) for each, begin, _ in open_ones)
    most = max(float(each.values[end - 1]) for each, _, end in open_ones)
    low, high = gone, ends
    for _ in range(HALVINGS):
        middle = (least + most) / 2
        if sum(high) - sum(low) <= SORTED_AT_ONCE or not least < middle < most:
            break
        at = [
            min(end, max(begin, int(torch.searchsorted(each.values, middle, right=True))))
            for each, begin, end in zip(blocks, gone, ends, strict=True)
        ]
        if sum(map(_Blocks.price, blocks, at)) <= room:
            low, least = at, middle
        else:
            high, most = at, middle
    return low, high


def _blocks(ordered: Tensor, kind: Kind, rule: GlobalRule, cost: int) -> _Blocks:
    """Make the blocks of one layer and kind, of its scores from the lowest up."""
    check_scores(ordered[:: max(1, len(ordered) - 1)])  # what is not finite stands at an end
    ordered = ordered.double()
    if rule.normalize == "raw":
        ordered = ordered / cost
    elif rule.normalize == "zscore":
        ordered = zscores(ordered)
    step, most = rule.step(kind), rule.most(kind, len(ordered))
    if step == 1:
        return _Blocks(ordered[:most], 1, 1, cost)
    first = len(ordered) % step
    values = ordered[first : first + max(0, most - first) // step * step].view(-1, step).mean(dim=1)
    if 0 < first <= most:
        values = torch.cat([ordered[:first].mean()[None], values])
    # Means of equal scores differ in their last digits, and may fall then.
    return _Blocks(values.cummax(0).values if len(values) else values, first or step, step, cost)


def layers_to_remove(ratio: float, layers: Sequence[int], n_layers: int) -> int:
    """Count the prunable layers that go: the nearest number to the ratio.

    Raises:
        UsageError: none although the ratio is not 0, or all of the model.
    """
    count = math.floor(ratio * len(layers) + 0.5)
    if ratio > 0 and count == 0:
        raise UsageError(f"a ratio of {ratio} is less than half of one of {len(layers)} layers; raise it")
    if count >= n_layers:
        raise UsageError(f"a ratio of {ratio} takes all {n_layers} layers; lower it")
    return count


def select_layers(scores: Mapping[int, float], count: int, everything: KeptUnits, *, contiguous: bool) -> KeptUnits:
    """Return all units of the layers that remain when the `count` lowest-scored go, or the lowest run of `count`."""
    prunable = list(scores)
    values = torch.tensor([scores[layer] for layer in prunable], dtype=torch.float64)
    if contiguous and count:
        check_scores(values)
        first = int(values.unfold(0, count, 1).sum(dim=1).argmin())  # of equal ones the first
        gone = set(prunable[first : first + count])
    else:
        stay = keep_highest(values, count)
        gone = set(prunable) - {prunable[index] for index in stay}
    return {layer: units for layer, units in everything.items() if layer not in gone}


def prunable_layers(given: tuple[int, int] | None, n_layers: int, *, stock: bool, whole: bool = False) -> range:
    """Return the prunable layers: `given` as [A, B), by default [4, L − 2) as published, or the `whole` model.

    Raises:
        UsageError: a range that is empty, outside the model, or not all layers with `stock`.
    """
    if given is None:
        start, stop = (0, n_layers) if whole or stock else (4, n_layers - 2)
        if start >= stop:
            raise UsageError(f"the default --layers 4:{n_layers - 2} is empty in a model of {n_layers} layers; give it")
        return range(start, stop)
    start, stop = given
    if start == stop:
        raise UsageError(f"--layers {start}:{stop} is empty: the second number is the first layer behind them")
    if not 0 <= start < stop <= n_layers:
        raise UsageError(f"--layers {start}:{stop} is not within the model's 0:{n_layers}")
    if stock and (start, stop) != (0, n_layers):
        raise UsageError(f"--stock gives all layers one width: use --layers 0:{n_layers} with it, or neither")
    return range(start, stop)


def kept_facts(kept: KeptUnits) -> dict[str, Any]:
    """Kept units for streamprune.json: {"4": {"kv_group": [...], "channel": [...]}, ...}."""
    return {str(layer): dict(kinds) for layer, kinds in kept.items()}
