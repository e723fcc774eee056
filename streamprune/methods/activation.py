"""Methods that score by activations: Wanda, Wanda-sp, FLAP, ThiNet, and GBLM-Pruner, which adds gradient norms.

Where weights are pruned, a layer is pruned and run again before the next layer's inputs are taken, as published; scores
of units and layers are those of the dense model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from streamprune.kernels import gram, mirror, unit_score
from streamprune.methods.sinks import Sink, UnitScores, WeightPruner, check_scores
from streamprune.model.units import TensorRef, fold_lines
from streamprune.streaming.filling import inverse_gram
from streamprune.streaming.inputs import Gram, Moments
from streamprune.streaming.statistics import Statistics

LOOKS = 128  # times at most that units of a matrix are compared while they go, one after another
APART = 2.0**-40  # of the largest error, between units that would have the same
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
    """Score units of o and down by what each adds to the output's error as units go, the least harmful first.

    Without the lines T of its input x the output of W is off by W_T x_T, over all tokens by Σ_ij∈T Q_ij with
    Q = (Σ x xᵀ) ⊙ (WᵀW): errors that cancel count less than their sum (ThiNet, 1707.06342, Eq. 6, there of a sample of
    outputs). With `refit` the error is what a least-squares fit of the rest leaves, tr(P_TT⁻¹ W_TᵀW_T) with
    P = (Σ x xᵀ + λI)⁻¹ (ZipLM, 2302.04089, Eq. 2 and 3).
    """

    def consume(ref: TensorRef, weight: Tensor, inputs: Gram) -> None:
        assert ref.member is not None, "units cut it"
        matrix, total = ref.matrix(weight), inputs.total.div_(inputs.count)
        units = ref.geometry.units(ref.member.kind)
        if settings["refit"] == "yes":
            inverse = inverse_gram(total, ref, "refit=no")
            products = mirror(gram(inverse.new_zeros(inverse.shape), matrix, backend=statistics.backend))
            sink.units(ref, refit_errors(inverse, products, units))
            return
        q = total.mul_(mirror(gram(total.new_zeros(total.shape), matrix, backend=statistics.backend)))
        if units < len(q):
            for _ in range(2):  # its rows, and its columns
                q = fold_lines(ref.member, ref.geometry, q).T
        sink.units(ref, removal_errors(q))

    statistics.inputs(Gram, consume, lambda ref: ref.cut_by_inputs)


def removal_errors(q: Tensor) -> Tensor:
    """Return the rise of Σ_ij∈T q_ij with which each unit joins T, the least rise first (ThiNet, Algorithm 1).

    Many units join a few at a time (LOOKS), by the rise that each would be alone.

    Args:
        q: symmetric and positive semi-definite [units, units].

    Returns:
        float64 [units], on the device of `q`.
    """
    rises = q.diagonal().to(torch.float64, copy=True)

    def join(units: Tensor) -> None:
        rises.add_(q.index_select(0, units).sum(dim=0), alpha=2)

    return _rises_in_order(len(q), lambda: rises, join)


def refit_errors(inverse: Tensor, products: Tensor, units: int) -> Tensor:
    """Return the rise of tr(P_TT⁻¹ (WᵀW)_TT) with which each unit joins T, the least rise first (ZipLM, Algorithm 1).

    When units go, the rest of W is fitted, W − W_T P_TT⁻¹ P_T, and P is that of the rest: P − P_Tᵀ P_TT⁻¹ P_T.

    Args:
        inverse: P [width, width]. products: WᵀW [width, width]; both are overwritten.
        units: their number; each has as many lines, one beside the other.

    Returns:
        float64 [units], on the device of `inverse`.
    """
    size = len(inverse) // units
    lines = torch.arange(len(inverse), device=inverse.device).view(units, size)

    def blocks(matrix: Tensor) -> Tensor:
        return matrix.view(units, size, units, size).diagonal(dim1=0, dim2=2).movedim(-1, 0)

    def rises() -> Tensor:
        if size == 1:
            return products.diagonal().double() / inverse.diagonal()
        return torch.linalg.solve_ex(blocks(inverse), blocks(products))[0].diagonal(dim1=1, dim2=2).sum(dim=1).double()

    def join(gone: Tensor) -> None:
        at = lines[gone].flatten()
        rows = inverse.index_select(0, at)
        fit = torch.linalg.solve_ex(rows.index_select(1, at), rows)[0]  # P_TT⁻¹ P_T
        lost = products.index_select(0, at)
        lost -= lost.index_select(1, at) @ fit / 2
        products.addmm_(torch.cat([fit, lost]).T, torch.cat([lost, fit]), alpha=-1)
        inverse.addmm_(rows.T, fit, alpha=-1)
        inverse.diagonal().index_fill_(0, at, 1)  # what is gone is left alone

    return _rises_in_order(units, rises, join)


def _rises_in_order(units: int, rises: Callable[[], Tensor], join: Callable[[Tensor], None]) -> Tensor:
    """Let all units go, the least of `rises()` [units] first, and return the rises at which they went, float64 [units].

    A rise below an earlier one is taken up to just above it, so that the order of the result is that of going.

    Raises:
        StreampruneError: a rise is not finite.
    """
    order, found, barred = list[Tensor](), list[Tensor](), torch.zeros_like(rises())
    for count in (len(part) for part in torch.arange(units).chunk(LOOKS)):
        least, at = (rises() + barred).sort(stable=True)  # never looked at: a GPU need not be waited for
        going = at[:count]
        order.append(going)
        found.append(least[:count])
        join(going)
        barred.index_fill_(0, going, torch.inf)
    errors = torch.cat(found)
    check_scores(errors)
    errors = errors.clamp_(min=0).cummax(0).values
    errors += torch.arange(units, device=errors.device) * (errors[-1] * APART)
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
