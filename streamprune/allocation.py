"""From scores to kept units: how many go from each layer, and which."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from streamprune.errors import StreampruneError, UsageError
from streamprune.families import Family, Geometry, Kind

# Guards floor(r·n) against r·n being 28.999999999 where 29 is meant, as in the published code.
FLOOR_SLACK = 1e-9

KeptUnits = dict[int, dict[Kind, list[int]]]


@dataclass(frozen=True)
class Ratios:
    """What is to be removed of each prunable layer.

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
    """Units to remove from every prunable layer: whole KV groups by floor(r·groups), then channels that fill
    the rest of the layer's parameter budget to the nearest channel.

    Args:
        costs: parameters of one unit of each kind.
        stock: land on a head count that the family's stock class accepts; channels take the rest.

    Raises:
        UsageError: the ratio would leave a layer without KV groups or channels, or cannot be applied.
    """
    groups = 0
    if "kv_group" in costs:
        share = ratios.total if ratios.attention is None else ratios.attention
        groups = math.floor(share * geometry.kv_groups + FLOOR_SLACK)
        if stock:
            groups = _stock_groups(family, geometry, groups, hidden_size)
        if groups >= geometry.kv_groups:
            raise UsageError(f"a ratio of {share} leaves no KV group of {geometry.kv_groups}; lower it")
    elif ratios.attention:
        raise UsageError(f"attention of {family.model_type} cannot be pruned; leave --attention-ratio out")
    if ratios.mlp is not None:
        wanted = ratios.mlp * geometry.channels
    else:
        prunable = sum(costs[kind] * geometry.units(kind) for kind in costs)
        wanted = (ratios.total * prunable - groups * costs.get("kv_group", 0)) / costs["channel"]
    if ratios.round_to > geometry.channels:
        raise UsageError(f"--round-to {ratios.round_to}: a layer has {geometry.channels} channels; lower it")
    kept = geometry.channels - max(0, math.floor(wanted + 0.5))
    if ratios.round_to > 1 and kept != geometry.channels:
        kept = min(geometry.channels, max(1, math.floor(kept / ratios.round_to + 0.5)) * ratios.round_to)
    if kept < 1:
        raise UsageError(
            f"the ratio takes {wanted:.0f} channels of {geometry.channels} and leaves the MLP empty; lower --ratio"
            + ("" if ratios.mlp is not None else ", or move some of it to attention with --attention-ratio")
        )
    removed: dict[Kind, int] = {"channel": geometry.channels - kept}
    if "kv_group" in costs:
        removed["kv_group"] = groups
    return removed


def _stock_groups(family: Family, geometry: Geometry, groups: int, hidden_size: int) -> int:
    """The largest number of groups up to `groups` after which the stock class accepts the head count."""
    if family.stock_heads == "any":
        return groups
    while groups and hidden_size % ((geometry.kv_groups - groups) * geometry.n_rep or hidden_size + 1):
        groups -= 1
    return groups


def keep_highest(scores: Tensor, removed: int) -> list[int]:
    """Indices (ascending) that remain when exactly `removed` of `scores` [units] go, the lowest first.

    Of equal scores the lowest index goes first.
    """
    if not torch.isfinite(scores).all():
        raise StreampruneError("a score is NaN or infinite; try --dtype float32, or with moreau a smaller --set gamma")
    order = torch.argsort(scores, stable=True)
    return sorted(order[removed:].tolist())


def select(
    scores: Mapping[int, Mapping[Kind, Tensor]],
    removed: Mapping[Kind, int],
    geometry: Geometry,
    n_layers: int,
) -> KeptUnits:
    """Kept units of every layer; layers without scores keep all."""
    return {
        layer: {
            kind: keep_highest(scores[layer][kind], count) if layer in scores else list(range(geometry.units(kind)))
            for kind, count in removed.items()
        }
        for layer in range(n_layers)
    }


def removed_parameters(removed: Mapping[Kind, int], costs: Mapping[Kind, int], layers: Sequence[int]) -> int:
    """Parameters that go when `removed` units go from each of `layers`."""
    return len(layers) * sum(count * costs[kind] for kind, count in removed.items())


def prunable_layers(given: tuple[int, int] | None, n_layers: int, *, stock: bool) -> range:
    """The prunable layers: `given` as [A, B), by default [4, L − 2) as published, and all of them for `stock`.

    Raises:
        UsageError: a range that is empty, outside the model, or not all layers with `stock`.
    """
    if given is None:
        start, stop = (0, n_layers) if stock else (4, n_layers - 2)
        if start >= stop:
            raise UsageError(f"the default --layers 4:{n_layers - 2} is empty in a model of {n_layers} layers; give it")
        return range(start, stop)
    start, stop = given
    if not 0 <= start < stop <= n_layers:
        raise UsageError(f"--layers {start}:{stop} is not within the model's 0:{n_layers}")
    if stock and (start, stop) != (0, n_layers):
        raise UsageError(f"--stock gives all layers one width: use --layers 0:{n_layers} with it, or neither")
    return range(start, stop)


def describe(kept: KeptUnits) -> dict[str, Any]:
    """Kept units for streamprune.json: {"4": {"kv_group": [...], "channel": [...]}, ...}."""
    return {str(layer): dict(kinds) for layer, kinds in kept.items()}
