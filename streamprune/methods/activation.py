"""Methods that score by activations: Wanda, Wanda-sp, FLAP, ThiNet, and GBLM-Pruner, which adds gradient norms.

Where weights are pruned, a layer is pruned and run again before the next layer's inputs are taken, as published; scores
of units and layers are those of the dense model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from streamprune.kernels import gram, mirror, unit_score
from streamprune.methods.sinks import Sink, UnitScores, WeightPruner, check_scores
from streamprune.model.units import TensorRef, fold_lines
from streamprune.streaming.inputs import Gram, Moments
from streamprune.streaming.statistics import Statistics

STEP = 2.0**-40  # of the largest error, between units that would have the same
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


def thinet(statistics: Statistics, settings: dict[str, Any], sink: UnitScores) -> None:
    """Score units of o and down by what each adds to the output's error as they go, one after another (1707.06342).

    Without the units of a set T the output of W is off by W_T x_T; over all tokens that is Σ‖W_T x_T‖² = Σ_ij∈T Q_ij with
    Q = (Σ x xᵀ) ⊙ (WᵀW), so that errors which cancel count less than their sum (Eq. 6, there of a sample of outputs).
    """

    def consume(ref: TensorRef, weight: Tensor, inputs: Gram) -> None:
        matrix, q = ref.matrix(weight), inputs.total
        products = torch.zeros_like(q)
        gram(products, matrix, backend=statistics.backend)
        mirror(products)
        q.mul_(products).div_(inputs.count)
        del products
        assert ref.member is not None, "units cut it"
        if len(q) > ref.geometry.units(ref.member.kind):
            for _ in range(2):  # its rows, and its columns
                q = fold_lines(ref.member, ref.geometry, q).T
        sink.units(ref, removal_errors(q))

    statistics.inputs(Gram, consume, lambda ref: ref.cut_by_inputs)


def removal_errors(q: Tensor) -> Tensor:
    """Return the rise of Σ_ij∈T q_ij with which each unit joins T, least first (1707.06342, Algorithm 1).

    A rise below an earlier one is taken up to just above it, so that the order of the result is the order of joining.

    Args:
        q: symmetric and positive semi-definite [units, units].

    Returns:
        float64 [units], on the device of `q`.
    """
    rises = q.diagonal().to(torch.float64, copy=True)
    order, found = list[Tensor](), list[Tensor]()
    for _ in range(len(q)):
        unit = rises.argmin(keepdim=True)  # of one element, and never looked at here: a GPU need not be waited for
        order.append(unit)
        found.append(rises.index_select(0, unit))
        rises.add_(q.index_select(0, unit)[0], alpha=2)
        rises.index_fill_(0, unit, torch.inf)
    errors = torch.cat(found)
    check_scores(errors)
    errors = errors.cummax(0).values.clamp_(min=0)
    errors += torch.arange(len(q), device=q.device) * (errors[-1] * STEP)
    return torch.empty_like(errors).index_copy_(0, torch.cat(order), errors)


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
