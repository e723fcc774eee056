"""Slicing: from kept units to sliced tensors, and to the biases that stand for what goes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from streamprune.model.masking import bias_of, output_matrices
from streamprune.model.skeleton import Skeleton
from streamprune.model.units import KeptUnits, Member, kept_lines
from streamprune.paging.pager import Page
from streamprune.storage.checkpoint import TensorEntry
from streamprune.storage.shards import TensorSpec

Means = Mapping[tuple[int, str], Tensor]  # x̄ [d_in] of the inputs of (layer, tensor)


class Slicer:
    """Slicer of stored tensors: what remains of each, and under which name."""

    def __init__(self, skeleton: Skeleton, kept: KeptUnits) -> None:
        self.geometries, self.kept = skeleton.geometries, kept
        self._members: dict[str, tuple[int, Member]] = {}
        for layer in kept:
            for member in skeleton.family.members:
                if member.tensor in skeleton.entries[layer]:
                    self._members[skeleton.layer_prefix(layer) + member.tensor] = (layer, member)
        self._layers = {skeleton.layer_prefix(layer): layer for layer in range(len(skeleton.layers))}
        self._prefixes = {layer: skeleton.layer_prefix(number) for number, layer in enumerate(kept)}

    def name(self, name: str) -> str | None:
        """Return a stored tensor's name in the output, where layers are numbered anew; None if its layer goes."""
        for prefix, layer in self._layers.items():
            if name.startswith(prefix):
                return self._prefixes[layer] + name.removeprefix(prefix) if layer in self.kept else None
        return name

    def _lines(self, name: str) -> tuple[int, Tensor] | None:
        """Return (dimension, indices that remain) of a stored tensor, None where nothing goes."""
        if name not in self._members:
            return None
        layer, member = self._members[name]
        units = self.kept[layer][member.kind]
        if len(units) == self.geometries[layer].units(member.kind):
            return None
        return member.dim, kept_lines(member, self.geometries[layer], units)

    def spec(self, entry: TensorEntry) -> TensorSpec | None:
        """Return name, dtype and shape of `entry` in the output; None if it goes."""
        name, shape = self.name(entry.name), list(entry.shape)
        if name is None:
            return None
        if (lines := self._lines(entry.name)) is not None:
            shape[lines[0]] = len(lines[1])
        return TensorSpec(name, entry.dtype, tuple(shape))

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """Cut a stored tensor to what remains of it."""
        lines = self._lines(name)
        return tensor if lines is None else tensor.index_select(lines[0], lines[1].to(tensor.device))


def mean_biases(skeleton: Skeleton, kept: KeptUnits, means: Means, page: Page) -> dict[str, Tensor]:
    """Make biases of o and down that keep the calibration-mean output: W(x̄ ⊙ removed), added to those there are.

    arXiv 2312.11983, §3.4. Layers without `means` get biases of zero.
    """
    biases = {}
    # Each layer gets them, since the output's config can only say that all layers have biases or none has.
    for member in output_matrices(skeleton, page.layer) if page.layer in kept else ():
        weight, name = page.tensors[member.tensor], bias_of(member.tensor)
        mean = means.get((page.layer, member.tensor))
        removed = torch.zeros(weight.shape[member.dim], dtype=torch.float64)
        if mean is not None:
            removed.copy_(mean)
            removed[kept_lines(member, skeleton.geometries[page.layer], kept[page.layer][member.kind])] = 0
        matrix = (weight if member.dim == 1 else weight.T).cpu().double()
        bias = matrix @ removed
        if name in page.tensors:
            bias += page.tensors[name].cpu().double()
        biases[name] = bias.to(page.tensors[name].dtype if name in page.tensors else weight.dtype)
    return biases
