"""Sinks of scores: units, whole layers, or weights that are pruned as soon as they are scored.

A method gives each matrix's importance to a sink and does not ask what is pruned. The elements of importance are those
of `unit_score`'s forms, |w a|, or |w| times norms of inputs and gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from streamprune.errors import StreampruneError
from streamprune.kernels import prune_n_of_m, prune_rows, unit_score
from streamprune.kernels.launch import Backend
from streamprune.model.units import FLOOR_SLACK, KeptUnits, Kind, TensorRef, fold_lines
from streamprune.storage.journal import Key


def check_scores(scores: Tensor) -> None:
    """Raise a StreampruneError if a score is not finite: nothing can be compared with it."""
    if not torch.isfinite(scores).all():
        raise StreampruneError("a score is NaN or infinite; try --dtype float32, or with moreau a smaller --set gamma")


def zscores(scores: Tensor) -> Tensor:
    """Return scores [n], float64, less their mean and over their standard deviation; of equal ones zeros."""
    scores = scores.double()
    if len(scores) < 2:
        return torch.zeros_like(scores)
    deviation = scores.std()
    # That of equal scores may be what rounding has left of it.
    equal = deviation <= 1e-12 * scores.abs().max()
    return torch.zeros_like(scores) if equal else (scores - scores.mean()) / deviation


class _Sums:
    """Base of sinks that add up scores: everything becomes scores of a matrix's lines."""

    backend: Backend | None  # as in `unit_score`

    def lines(self, ref: TensorRef, lines: Tensor) -> None:
        """Take in a score for each line of a matrix along `ref.dim`."""
        raise NotImplementedError

    def add(
        self,
        ref: TensorRef,
        weight: Tensor,
        a: Tensor | None = None,
        form: str = "first",
        fisher: Tensor | None = None,
        scale: float = 1.0,
    ) -> None:
        """Take in a matrix's importance in one of the forms of `unit_score`, times `scale`."""
        lines = unit_score(weight, a, ref.dim, form, fisher, backend=self.backend)
        self.lines(ref, lines if scale == 1 else lines * scale)

    def add_norms(
        self, ref: TensorRef, weight: Tensor, x_norm: Tensor | None, grad_norm: Tensor | None = None, alpha: float = 0.0
    ) -> None:
        """Take in |w|(‖x_j‖ + α‖g‖); `grad_norm` may be overwritten."""
        if grad_norm is None:
            assert x_norm is not None, "one of the two counts"
            grad_norm = torch.zeros_like(weight, dtype=x_norm.dtype)
        factor = grad_norm.mul_(alpha)
        if x_norm is not None:
            ref.matrix(factor).add_(x_norm)
        self.add(ref, weight, factor)


class UnitScores(_Sums):
    """Sink of scores for the `units` of each prunable layer, in float64; the higher, the more a unit matters.

    `values[layer][kind]` is [units]. What is added for the tensors of a unit is summed (`sum` aggregation).
    `means[layer, tensor]` holds the mean inputs [d_in] of matrices whose pruned inputs a bias shall stand for.
    """

    def __init__(self, units: KeptUnits, backend: Backend | None = None) -> None:
        self.backend = backend
        self._counts = {layer: {kind: len(each) for kind, each in kinds.items()} for layer, kinds in units.items()}
        # Sums stay where they are made until somebody looks: fetching each would wait for all that is computed.
        self._values: dict[int, dict[Kind, Tensor]] = {layer: {} for layer in units}
        self.means: dict[tuple[int, str], Tensor] = {}

    @property
    def values(self) -> dict[int, dict[Kind, Tensor]]:
        """Scores by layer and kind, in host memory."""
        for layer in self._values:
            self._fetch(layer)
        return self._values

    def by_key(self) -> dict[Key, Tensor]:
        """Return scores [units] by (layer, kind)."""
        return {(layer, kind): values for layer, kinds in self.values.items() for kind, values in kinds.items()}

    def _fetch(self, layer: int) -> dict[Kind, Tensor]:
        """Return a layer's scores in host memory; what was never added to is 0."""
        if layer not in self._values:
            return {}
        values = self._values[layer]
        self._values[layer] = {
            kind: values[kind].cpu() if kind in values else torch.zeros(count, dtype=torch.float64)
            for kind, count in self._counts[layer].items()
        }
        return self._values[layer]

    def lines(self, ref: TensorRef, lines: Tensor) -> None:
        """Add the scores of one matrix's lines to its units, in the order of the calls."""
        assert ref.member is not None, "with units, only matrices that units cut are scored"
        self.units(ref, fold_lines(ref.member, ref.geometry, lines).double())

    def units(self, ref: TensorRef, scores: Tensor) -> None:
        """Add scores [units], float64, to those of the units that cut a matrix."""
        assert ref.member is not None, "with units, only matrices that units cut are scored"
        values, kind = self._values[ref.layer], ref.member.kind
        values[kind] = scores.add_(values[kind].to(scores.device)) if kind in values else scores

    def layer_state(self, layer: int) -> dict[str, Tensor]:
        """Return all that is known of a layer, for the journal."""
        means = {f"mean/{tensor}": mean for (of, tensor), mean in self.means.items() if of == layer}
        return {**{str(kind): values for kind, values in self._fetch(layer).items()}, **means}

    def load_layer(self, layer: int, state: dict[str, Tensor]) -> None:
        """Take back a `layer_state`."""
        for name, tensor in state.items():
            if name.startswith("mean/"):
                self.means[layer, name.removeprefix("mean/")] = tensor
            else:
                self._values[layer][name] = tensor  # type: ignore[index]

    def root(self) -> None:
        """Take the square root of every score: sums of squares become ℓ2 norms."""
        for kinds in self.values.values():
            for values in kinds.values():
                values.sqrt_()

    def draw(self, random: Callable[..., Tensor]) -> None:
        """Put `random(layer, kind, shape)` in the place of every score."""
        for layer, kinds in self.values.items():
            for kind, values in kinds.items():
                values.copy_(random(layer, kind, values.shape))


class LayerScores(_Sums):
    """Sink of a float64 score for each prunable layer, `values[layer]`; what is added for its matrices is summed."""

    def __init__(self, layers: Sequence[int], backend: Backend | None = None) -> None:
        self.backend = backend
        self._values: dict[int, Any] = dict.fromkeys(layers, 0.0)  # sums stay on the device until somebody looks

    @property
    def values(self) -> dict[int, float]:
        """Scores by layer."""
        for layer, value in self._values.items():
            self._values[layer] = float(value)
        return self._values

    def by_key(self) -> dict[Key, Tensor]:
        """Return scores [1] by (layer, "layer")."""
        return {(layer, "layer"): torch.tensor([value], dtype=torch.float64) for layer, value in self.values.items()}

    def lines(self, ref: TensorRef, lines: Tensor) -> None:
        """Add the scores of one matrix's lines to its layer."""
        self._values[ref.layer] = lines.sum().double() + self._values[ref.layer]

    def layer_state(self, layer: int) -> dict[str, Tensor]:
        """Return a layer's score, for the journal."""
        known = layer in self._values
        return {"score": torch.tensor(float(self._values[layer]), dtype=torch.float64)} if known else {}

    def load_layer(self, layer: int, state: dict[str, Tensor]) -> None:
        """Take back a `layer_state`."""
        self._values[layer] = float(state["score"])

    def root(self) -> None:
        """Take the square root of every score: sums of squares become ℓ2 norms."""
        self._values = {layer: math.sqrt(value) for layer, value in self.values.items()}

    def draw(self, random: Callable[..., Tensor]) -> None:
        """Put `random(layer, "layer", ())` in the place of every score."""
        self._values = {layer: float(random(layer, "layer", ())) for layer in self._values}


@dataclass(frozen=True)
class Sparsity:
    """Pattern of the weights that go: of a row the lowest-scored fraction `ratio`, or all but `n` of every `m`."""

    ratio: float
    n: int = 0
    m: int = 0

    def count(self, elements: int) -> int:
        """Count how many of `elements` go."""
        return math.floor(self.ratio * elements + FLOOR_SLACK)

    def prune(
        self,
        matrix: Tensor,
        x_norm: Tensor | None = None,
        grad_norm: Tensor | None = None,
        alpha: float = 1.0,
        backend: Backend | None = None,
    ) -> None:
        """Zero what goes of `matrix` [d_out, d_in] by |w|(‖x_j‖ + α‖g‖), in place; `backend` as in `prune_rows`."""
        if self.m:
            prune_n_of_m(matrix, self.n, self.m, x_norm, grad_norm, alpha, backend=backend)
        else:
            prune_rows(matrix, self.count(matrix.shape[1]), x_norm, grad_norm, alpha, backend=backend)


class WeightPruner:
    """Sink that prunes a matrix as soon as its importance is known and hands it on: `hand_on(ref, stored, pruned)`.

    Weights are compared within an output row, whatever the method.
    """

    def __init__(
        self,
        sparsity: Sparsity,
        hand_on: Callable[[TensorRef, Tensor, Tensor], None],
        backend: Backend | None = None,
    ) -> None:
        self.sparsity, self._hand_on, self.backend = sparsity, hand_on, backend

    def add(
        self,
        ref: TensorRef,
        weight: Tensor,
        a: Tensor | None = None,
        form: str = "first",
        fisher: Tensor | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        """Prune by a form of `unit_score`, and return the pruned weight; `a` and `fisher` may be overwritten.

        `scale` is not looked at, since it changes no order.
        """
        if form == "second":
            assert fisher is not None
            a = fisher.mul_(weight).abs_()
        elif form == "mix":
            assert fisher is not None and a is not None
            a = a.sub_(fisher.mul_(weight), alpha=0.5).abs_()
        elif form == "first":
            assert a is not None
            a = a.abs_()
        elif form != "square":
            raise ValueError(f"{form} has no element-wise importance")
        return self.add_norms(ref, weight, None, a if form != "square" else None, 1.0)

    def add_norms(
        self, ref: TensorRef, weight: Tensor, x_norm: Tensor | None, grad_norm: Tensor | None = None, alpha: float = 0.0
    ) -> Tensor:
        """Prune by |w|(‖x_j‖ + α‖g‖), and return the pruned weight."""
        for norm in (x_norm, grad_norm):
            if norm is not None and not torch.isfinite(norm.sum()):
                raise StreampruneError(
                    f"layer {ref.layer}, {ref.tensor}: a score is NaN or infinite; try --dtype float32, or with moreau "
                    "a smaller --set gamma"
                )
        pruned = weight.clone()  # the stored one is hashed as it was read
        gradient = None if grad_norm is None else ref.matrix(grad_norm)
        self.sparsity.prune(ref.matrix(pruned), x_norm, gradient, alpha, self.backend)
        return self.put(ref, weight, pruned)

    def put(self, ref: TensorRef, weight: Tensor, pruned: Tensor) -> Tensor:
        """Hand on a weight that has been pruned, and return it."""
        if not torch.isfinite(pruned.sum(dtype=torch.float32)):
            raise StreampruneError(f"layer {ref.layer}, {ref.tensor} became NaN or infinite; try --dtype float32")
        self._hand_on(ref, weight, pruned)
        return pruned

    def root(self) -> None:
        """Do nothing: the order of single weights is that of their squares."""


Sink = UnitScores | LayerScores | WeightPruner
