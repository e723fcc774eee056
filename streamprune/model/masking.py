"""Masking: a layer at full width that computes what the sliced one does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from streamprune.model.skeleton import Skeleton
from streamprune.model.units import Kind, Member, kept_lines, module_of


def output_matrices(skeleton: Skeleton, layer: int) -> list[Member]:
    """List the matrices through which a layer's units reach the residual stream: o and down."""
    stored = skeleton.matrices(layer)
    return [m for m in skeleton.family.members if m.tensor in stored and m.dim == (0 if stored[m.tensor] else 1)]


def bias_of(tensor: str) -> str:
    """Return the name of the bias beside a weight."""
    return f"{module_of(tensor)}.bias"


def mask_layer(
    skeleton: Skeleton,
    kept: Mapping[int, Mapping[Kind, Sequence[int] | Tensor]],
    layer: int,
    weights: Mapping[str, Tensor],
    kind: Kind | None = None,
) -> None:
    """Turn a layer's bound weights into the masked dense layer that the sliced one must equal, in place.

    The columns through which a removed unit reaches the residual stream become zero. Where a norm spans all
    heads (OLMo 2) the removed rows become zero too. The sliced norm's mean square is taken over fewer elements: that it
    is the same, the rest of its input is scaled by √(all/kept), and the norm's weight by the inverse. With `kind`, only
    units of that kind are masked.
    """
    members = skeleton.family.members
    for member in members:
        if member.tensor not in weights or kind not in (None, member.kind):
            continue
        units = kept[layer][member.kind]
        lines = kept_lines(member, skeleton.geometries[layer], units)
        weight = weights[member.tensor]
        removed = torch.ones(weight.shape[member.dim], dtype=torch.bool)
        removed[lines] = False
        weight.index_fill_(member.dim, removed.nonzero().flatten().to(weight.device), 0)
        share = len(units) / skeleton.geometries[layer].units(member.kind)
        if member.is_norm:
            weight.mul_(share**0.5)
        elif share > 0 and any(member.feeds(norm) for norm in members):
            weight.mul_(share**-0.5)
