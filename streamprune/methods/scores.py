"""Importance per unit: the one thing that every method returns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from streamprune.capture import TensorRef
from streamprune.families import Geometry, Kind, fold_lines
from streamprune.sweep import Statistics


class UnitScores:
    """A float64 score for each unit of each prunable layer; the higher, the more it matters.

    `values[layer][kind]` is [units]. What is added for the tensors of a unit is summed (`sum` aggregation).
    """

    def __init__(self, layers: Sequence[int], kinds: Sequence[Kind], geometry: Geometry) -> None:
        self.values: dict[int, dict[Kind, Tensor]] = {
            layer: {kind: torch.zeros(geometry.units(kind), dtype=torch.float64) for kind in kinds} for layer in layers
        }

    @classmethod
    def zeros(cls, statistics: Statistics) -> UnitScores:
        """Scores of 0 for what `statistics` covers."""
        return cls(statistics.layers, statistics.kinds, statistics.geometry)

    def add(self, ref: TensorRef, lines: Tensor) -> None:
        """Add the scores of one tensor's lines to its units. Summed in the order of the calls."""
        self.values[ref.layer][ref.member.kind] += fold_lines(ref.member, ref.geometry, lines).cpu()
