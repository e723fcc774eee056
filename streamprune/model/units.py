"""Units: KV groups and MLP channels, the tensors that they cut, and the lines of a tensor that are a unit's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["kv_group", "channel"]


Part = Literal["query", "kv", "channel"]


KINDS: tuple[Kind, ...] = ("kv_group", "channel")


KIND_NAMES: Mapping[Kind, str] = {"kv_group": "KV groups", "channel": "channels"}


@dataclass(frozen=True)
class Member:
    """Tensor of a layer that loses lines with a unit.

    Attributes:
        tensor: name inside the layer; families without it (a bias, say) simply lack it.
        dim: the dimension that is cut.
        parts: what lies along `dim`, in order.
        scored: whether its elements count in a unit's importance (weights do, biases and norms do not).
    """

    tensor: str
    dim: int
    parts: tuple[Part, ...]
    scored: bool = True

    @property
    def is_norm(self) -> bool:
        """Tell whether the tensor is the weight of a norm that spans all units (OLMo 2)."""
        return self.tensor.endswith("norm.weight")

    def feeds(self, norm: Member) -> bool:
        """Tell whether `norm` is such a norm, of what this tensor's module puts out: q_norm of q_proj."""
        return norm.is_norm and self.tensor.startswith(norm.tensor.replace("norm.weight", "proj."))

    @property
    def kind(self) -> Kind:
        """Kind of unit that the tensor's lines belong to."""
        return "channel" if self.parts[0] == "channel" else "kv_group"


@dataclass(frozen=True)
class Geometry:
    """Sizes of one decoder layer: KV groups, query heads per group, head size, MLP channels."""

    kv_groups: int
    n_rep: int
    head_dim: int
    channels: int

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.kv_groups * self.n_rep

    def units(self, kind: Kind) -> int:
        """Return the number of units of `kind` in the layer."""
        return self.kv_groups if kind == "kv_group" else self.channels

    def part_shape(self, part: Part) -> tuple[int, int]:
        """Return (units, lines per unit) of a part."""
        if part == "channel":
            return self.channels, 1
        return self.kv_groups, self.head_dim * (self.n_rep if part == "query" else 1)

    def lines(self, member: Member) -> int:
        """Return the extent of `member` along its cut dimension."""
        return sum(units * width for units, width in map(self.part_shape, member.parts))


def kept_lines(member: Member, geometry: Geometry, kept: Sequence[int] | Tensor) -> Tensor:
    """List the indices along `member.dim` that remain when the units `kept` (ascending) do, int64."""
    chosen = torch.as_tensor(kept, dtype=torch.int64)
    indices, start = [], 0
    for part in member.parts:
        units, width = geometry.part_shape(part)
        indices.append((start + chosen[:, None] * width + torch.arange(width)).reshape(-1))
        start += units * width
    return torch.cat(indices)


def fold_lines(member: Member, geometry: Geometry, lines: Tensor) -> Tensor:
    """Sum a value, or a row, per line [lines, ...] of `member` into one per unit [units, ...]."""
    widths = [units * width for units, width in map(geometry.part_shape, member.parts)]
    total = torch.zeros((geometry.units(member.kind), *lines.shape[1:]), dtype=lines.dtype, device=lines.device)
    for part, values in zip(member.parts, lines.split(widths), strict=True):
        total += values.unflatten(0, geometry.part_shape(part)).sum(dim=1)
    return total


@dataclass(frozen=True)
class TensorRef:
    """Reference to a scored matrix of a layer.

    Attributes:
        tensor: its name inside the layer.
        member: its part in units; None for a matrix that no unit cuts, where weights or layers go.
        transposed: stored as [d_in, d_out] (GPT-2's Conv1D).
    """

    layer: int
    tensor: str
    geometry: Geometry
    member: Member | None
    transposed: bool = False

    @property
    def key(self) -> tuple[int, str]:
        """Layer and name, which identify the tensor in the model."""
        return self.layer, self.tensor

    @property
    def dim(self) -> int:
        """Dimension whose lines belong to units; that of output rows where no unit cuts the matrix."""
        return self.member.dim if self.member is not None else int(self.transposed)

    @property
    def cut_by_inputs(self) -> bool:
        """Tell whether units cut the matrix's inputs (o and down), not its outputs."""
        return self.dim == (0 if self.transposed else 1)

    def matrix(self, weight: Tensor) -> Tensor:
        """View a weight as it is stored as [d_out, d_in]."""
        return weight.T if self.transposed else weight


def module_of(tensor: str) -> str:
    """Return the name of the module that has this parameter."""
    return tensor.rpartition(".")[0]


# Guards floor(r·n) against r·n being 28.999999999 where 29 is meant, as in the published code.
FLOOR_SLACK = 1e-9


# Kept units of each layer and kind; a layer that is not in it goes as a whole.
KeptUnits = dict[int, dict[Kind, list[int]]]


def all_units(geometry: Geometry, kinds: Sequence[Kind]) -> dict[Kind, list[int]]:
    """List every unit of a layer."""
    return {kind: list(range(geometry.units(kind))) for kind in kinds}
