"""Methods that score by activations: Wanda, Wanda-sp, FLAP, and GBLM-Pruner, which adds gradient norms.

Where weights are pruned, a layer is pruned and run again before the next layer's inputs are taken, as published; scores
of units and layers are those of the dense model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from streamprune.kernels import unit_score
from streamprune.methods.sinks import Sink, UnitScores, WeightPruner
from streamprune.model.units import TensorRef
from streamprune.streaming.inputs import Moments
from streamprune.streaming.statistics import Statistics

PUBLISHED_SAMPLES = 128  # of GBLM-Pruner: its α = 100 is for gradient norms over so many


def wanda(statistics: Statistics, settings: dict[str, Any], sink: Sink) -> None:
    """Score by |W_ij| ‖X_j‖₂, with ‖X_j‖ over all tokens, divided by √N (2306.11695, Eq. 1)."""

    def consume(ref: TensorRef, weight: Tensor, inputs: Moments) -> Tensor | None:
        return sink.add_norms(ref, weight, (inputs.squares / statistics.samples).sqrt_())

    statistics.inputs(Moments, consume, prunes=isinstance(sink, WeightPruner))


def wanda_sp(statistics: Statistics, settings: dict[str, Any], sink: UnitScores) -> None:
    """Score the columns of o and down by mean_i |W_ij| ‖X_j‖₂/√N, summed over a head's columns (2312.11983)."""

    def consume(ref: TensorRef, weight: Tensor, inputs: Moments) -> None:
        norms, matrix = (inputs.squares.double() / statistics.samples).sqrt_(), ref.matrix(weight)
        dtype = torch.promote_types(matrix.dtype, inputs.squares.dtype)  # weights may be stored in float64
        sums = torch.linalg.vector_norm(matrix, ord=1, dim=0, dtype=dtype)
        sink.lines(ref, sums.double() / len(matrix) * norms)

    statistics.inputs(Moments, consume, lambda ref: ref.cut_by_inputs)


def flap(statistics: Statistics, settings: dict[str, Any], sink: UnitScores) -> None:
    """Score the columns of o and down by WIFV: the sample variance of input j times Σ_i W_ij² (2312.11983).

    Columns are summed to heads before the allocation takes z-scores; the published code takes those of columns and
    averages them over a head. The means of the inputs stay in `sink.means`: a bias W(x̄ ⊙ removed) keeps the
    calibration-mean output.
    """

    def consume(ref: TensorRef, weight: Tensor, inputs: Moments) -> None:
        squares = unit_score(weight, None, ref.dim, "square", backend=statistics.backend)
        sink.lines(ref, squares * inputs.variance.double())
        if settings["bias"] == "yes":
            sink.means[ref.key] = inputs.mean.cpu()

    statistics.inputs(Moments, consume, lambda ref: ref.cut_by_inputs)


def gblm(statistics: Statistics, settings: dict[str, Any], sink: Sink) -> None:
    """Score by |W_ij| (‖X_j‖₂ + α ‖G_ij‖_p), G the samples' own gradients of the dense model (2311.04902, Eq. 6).

    The published code divides ‖X_j‖ by √N and not ‖G‖: `norm=published`. With `norm=mean` both are per sample, ‖G‖₁/N
    or ‖G‖₂/√N, and α counts as much more as makes the two agree at the published N = 128.
    """
    power, samples, alpha = settings["p"], statistics.samples, settings["alpha"]
    per_sample = settings["norm"] == "mean"
    norms = statistics.store("norm")

    def keep(ref: TensorRef, weight: Tensor, sums: dict[int, Tensor]) -> None:
        norm = sums[power].sqrt_() if power == 2 else sums[power]
        if per_sample:
            norm /= samples ** (1 / power)
        if settings["terms"] == "gradient":
            sink.add_norms(ref, weight, None, norm, 1.0)
        else:
            norms[ref.key] = norm

    def consume(ref: TensorRef, weight: Tensor, inputs: Moments) -> Tensor | None:
        factor = alpha * (PUBLISHED_SAMPLES ** (1 / power) if per_sample else 1)
        x_norm = (inputs.squares / samples).sqrt_()
        return sink.add_norms(ref, weight, x_norm, norms.pop(ref.key).to(x_norm), factor)

    # Before any weight is pruned, since the gradients are the dense model's.
    statistics.gradient_powers(keep, (power,))
    if settings["terms"] == "both":
        statistics.inputs(Moments, consume, prunes=isinstance(sink, WeightPruner))
