"""SparseGPT: prune a row by its second-order error and update what remains (arXiv 2301.00774, Algorithm 1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from streamprune.errors import StreampruneError
from streamprune.kernels import obs_block
from streamprune.kernels.launch import Backend
from streamprune.methods.sinks import Sparsity, WeightPruner
from streamprune.model.units import TensorRef
from streamprune.streaming.inputs import Gram
from streamprune.streaming.statistics import Statistics

COLUMN_BLOCK = 128  # columns whose updates are gathered before the rest of the row gets them
# Tried in turn where rounding leaves H without a Cholesky factor: times the damping, and in which dtype. More damping
# comes first: it gave less error than float64, which cannot bring back what H lost when it was summed in float32.
FACTOR_TRIES = ((1, torch.float32), (10, torch.float32), (100, torch.float32), (100, torch.float64))
LEAF = 256  # columns of a triangle that are solved for at once


def sparsegpt(statistics: Statistics, settings: dict[str, Any], sink: WeightPruner) -> None:
    """Prune by w²/U_jj² with the OBS update, layer by layer on the pruned prefix; q, k, v share H, gate and up too."""

    def consume(ref: TensorRef, weight: Tensor, gram: Gram) -> Tensor:
        if gram.factor is None:
            dead = gram.total.diagonal() == 0
            what = f"layer {ref.layer}, {ref.tensor}"
            gram.factor = inverse_factor(gram.total, settings["damp"], what, statistics.samples / 2), dead
            gram.total = gram.total.new_empty(0)  # overwritten by now, and as large as the factor
        factor, dead = gram.factor
        pruned = weight.clone()
        matrix = ref.matrix(pruned)
        matrix.copy_(prune_and_update(matrix, factor, dead, sink.sparsity, backend=statistics.backend))
        return sink.put(ref, weight, pruned)

    statistics.inputs(Gram, consume, prunes=True)


def inverse_factor(gram: Tensor, damp: float, what: str = "H", one: float = 1.0) -> Tensor:
    """Compute the upper Cholesky factor U of (H + λI)⁻¹ = UᵀU, with λ = `damp` times the mean of H's diagonal.

    H may be given up to a factor, which changes neither masks nor updates. Inputs that are always zero get H_jj =
    `one`, which counts in λ: 1 beside (2/N) Σ X Xᵀ, so N/2 beside Σ X Xᵀ. `gram` [d_in, d_in] is overwritten: it can
    be the largest thing in memory.

    With H + λI = R Rᵀ of an upper R, the Cholesky factor from the last column to the first, U is R⁻¹: one factor, where
    the paper's code factors H, inverts it and factors that (arXiv 2307.13304, Theorem 6, has both). R_jj² is what of
    H_jj the columns behind j do not explain; no more than the rounding of H's own sums, it says nothing.

    Raises:
        StreampruneError: H has no Cholesky factor, even with 100 times the damping.
    """
    diagonal = gram.diagonal()
    if not torch.isfinite(diagonal.sum()):
        raise StreampruneError(f"{what}: its inputs are NaN or infinite; try --dtype float32")
    fixed = torch.where(diagonal == 0, one, diagonal)
    least = torch.finfo(gram.dtype).eps
    for more, dtype in FACTOR_TRIES:
        diagonal.copy_(fixed + more * damp * fixed.mean())
        lower, failed = torch.linalg.cholesky_ex(gram.flip(0, 1).to(torch.promote_types(dtype, gram.dtype)))
        root = lower.flip(0, 1)
        if not failed and (root.diagonal().square() > least * diagonal).all():
            del lower
            return _invert(root).to(gram.dtype)
    raise StreampruneError(f"{what}: the inputs' Gram matrix is singular; give more --samples, or a larger --set damp")


def _invert(upper: Tensor) -> Tensor:
    """Invert a triangular matrix in place, by halves: nearly all of it are products, 2/3 n³ FLOPs."""
    if len(upper) <= LEAF:
        eye = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
        return upper.copy_(torch.linalg.solve_triangular(upper, eye, upper=True))
    half = len(upper) // 2
    first, corner, last = upper[:half, :half], upper[:half, half:], upper[half:, half:]
    corner.copy_(_invert(first) @ corner @ _invert(last)).neg_()
    return upper


def prune_and_update(
    weight: Tensor,
    factor: Tensor,
    dead: Tensor,
    sparsity: Sparsity,
    block: int = COLUMN_BLOCK,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Prune W [d_out, d_in] and update what remains.

    Args:
        factor: U [d_in, d_in]; float32, or float64, in which the work is done.
        dead: inputs that are always zero [d_in]; their weights become zero.
        block: columns at a time; multiples of M in N:M.
        backend: as in `obs_block`.

    Returns:
        The new W in the dtype of `factor`. Undamped, Σ e²/2 of its errors e = (w − q)/U_jj is ‖ΔW X‖²/N for
        H = (2/N) X Xᵀ.
    """
    rows, columns = weight.shape
    m = sparsity.m or 1
    block = -(-block // m) * m  # a group of M must not lie in two blocks
    # By columns: one of them is then a line of memory.
    work = weight.T.to(factor.dtype).contiguous()
    if sparsity.m == sparsity.n and sparsity.count(columns * rows) == 0:
        return work.T
    work.masked_fill_(dead[:, None], 0)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        count = 0 if sparsity.m else sparsity.count(stop * rows) - sparsity.count(start * rows)
        local = factor[start:stop, start:stop]
        errors = obs_block(work[start:stop], local, count, sparsity.n, sparsity.m, backend=backend)
        work[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return work.T
