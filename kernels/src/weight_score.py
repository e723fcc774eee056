"""Importance of single weights, |W|(‖X_j‖ + α‖G_ij‖), and pruning by it: exactly k per row, or N kept of M.

    Wanda      |W_ij| · ‖X_j‖₂                     arXiv 2306.11695, Eq. 1
    GBLM       |W_ij| · (‖X_j‖₂ + α ‖G_ij‖_p)      arXiv 2311.04902, Eq. 6
    magnitude  |W_ij|

The lowest scores go; of equal scores the one with the lowest index goes first, so the count is exact.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from streamprune.kernels.launch import Backend, Launch, ceil_div, jit, most_warps, power_of_two, tl, use_triton
from streamprune.kernels.selection import kth_lowest

ROW_BLOCK = 1 << 17  # elements at a time on a CPU
MOST_COLUMNS = 1 << 15  # of a row that one program holds in registers


def weight_score(weight: Tensor, x_norm: Tensor | None, grad_norm: Tensor | None = None, alpha: float = 0.0) -> Tensor:
    """Score each weight: [d_out, d_in], float32 (float64 for float64 weights).

    Args:
        weight: W [d_out, d_in], any float dtype.
        x_norm: ‖X_j‖₂ [d_in], float32 or float64; None for magnitude.
        grad_norm: ‖G_ij‖_p [d_out, d_in], or None.
        alpha: weight α of the gradient term.
    """
    work_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    # Factors are not negative, so |w| f = |w f|, which needs one buffer.
    if grad_norm is None:
        score = weight.to(work_dtype, copy=True)
        return (score if x_norm is None else score.mul_(x_norm)).abs_()
    factor = grad_norm.to(work_dtype, copy=True).mul_(alpha)
    return (factor if x_norm is None else factor.add_(x_norm)).mul_(weight).abs_()


def prune_rows(
    weight: Tensor,
    count: int,
    x_norm: Tensor | None = None,
    grad_norm: Tensor | None = None,
    alpha: float = 0.0,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Zero the `count` lowest-scored weights of every row of `weight` [d_out, d_in], in place; returns it.

    Other arguments as in `weight_score`. With a kernel W is read once, zeros are written and no score is stored; rows
    of more than 32,768 weights take torch's operations.

    Raises:
        ValueError: `count` is negative or more than a row has.
    """
    rows, columns = weight.shape
    if not 0 <= count <= columns:
        raise ValueError(f"{count} weights cannot go from rows of {columns}")
    if count == 0 or rows == 0:
        return weight
    if use_triton(weight, backend) and columns <= MOST_COLUMNS:
        launch_rows(weight, count, x_norm, grad_norm, alpha).run()
        return weight
    for part in _row_blocks(weight):
        score = weight_score(weight[part], x_norm, None if grad_norm is None else grad_norm[part], alpha)
        threshold = kth_lowest(score, count)
        # Of the weights that equal the threshold only as many go as are missing, so that a row loses exactly `count`.
        gone, ties = score < threshold, score == threshold
        wanted = count - gone.sum(dim=1, keepdim=True)
        if (ties.sum(dim=1, keepdim=True) > wanted).any():
            ties &= ties.cumsum(dim=1) <= wanted
        weight[part].masked_fill_(gone.logical_or_(ties), 0)
    return weight


def prune_n_of_m(
    weight: Tensor,
    n: int,
    m: int,
    x_norm: Tensor | None = None,
    grad_norm: Tensor | None = None,
    alpha: float = 0.0,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Keep the `n` highest-scored of every `m` consecutive weights of a row, in place; returns `weight`.

    Raises:
        ValueError: `m` does not divide the row or is above 256, or `n` is not in 0 … m.
    """
    columns = weight.shape[1]
    if not 1 <= m <= 256 or columns % m or not 0 <= n <= m:  # ranks are of 8 bits
        raise ValueError(f"{n} of {m} cannot be kept in rows of {columns}")
    if weight.numel() == 0 or n == m:
        return weight
    # Triton's blocks have powers of two as sizes, and comparing every score with every other grows with M².
    if use_triton(weight, backend) and m in (2, 4, 8, 16):
        launch_n_of_m(weight, n, m, x_norm, grad_norm, alpha).run()
        return weight
    for part in _row_blocks(weight):
        score = weight_score(weight[part], x_norm, None if grad_norm is None else grad_norm[part], alpha)
        places = score.reshape(-1, m).T.contiguous()  # [m, groups]: a comparison is one pass over two lines
        rank = torch.zeros(places.shape, dtype=torch.uint8, device=weight.device)
        for place in range(m):
            for later in range(place + 1, m):
                first = places[place] <= places[later]
                rank[later] += first
                rank[place] += first.logical_not_()
        gone = (rank < m - n).T.reshape(score.shape)
        weight[part].masked_fill_(gone, 0)
    return weight


def _row_blocks(weight: Tensor) -> Iterator[slice]:
    """Yield slices of rows to work on at a time: on a CPU few enough to stay in cache, elsewhere all."""
    rows, columns = weight.shape
    step = max(1, ROW_BLOCK // columns) if weight.device.type == "cpu" else rows
    for start in range(0, rows, step):
        yield slice(start, start + step)


def _operands(weight: Tensor, x_norm: Tensor | None, grad_norm: Tensor | None, alpha: float) -> dict[str, object]:
    gradient = weight if grad_norm is None else grad_norm
    return {
        "weight_ptr": weight,
        "x_norm_ptr": weight if x_norm is None else x_norm.contiguous(),
        "grad_norm_ptr": gradient,
        "alpha": float(alpha),
        "n_cols": weight.shape[1],
        "stride_weight_row": weight.stride(0),
        "stride_weight_col": weight.stride(1),
        "stride_grad_row": gradient.stride(0),
        "stride_grad_col": gradient.stride(1),
    }


def launch_rows(
    weight: Tensor, count: int, x_norm: Tensor | None, grad_norm: Tensor | None, alpha: float = 0.0
) -> Launch:
    """Describe how `prune_rows_kernel` is started for these operands; arguments as in `prune_rows`."""
    rows, columns = weight.shape
    block = max(2, power_of_two(columns))
    return Launch(
        prune_rows_kernel,
        (rows,),
        {**_operands(weight, x_norm, grad_norm, alpha), "count": count},
        {
            "HAS_X": x_norm is not None,
            "HAS_GRAD": grad_norm is not None,
            "INDEX_BITS": block.bit_length(),
            "HALF": block // 2,
        },
        num_warps=max(1, min(most_warps(), block // 512)),
    )


def launch_n_of_m(
    weight: Tensor, n: int, m: int, x_norm: Tensor | None, grad_norm: Tensor | None, alpha: float = 0.0
) -> Launch:
    """Describe how `prune_n_of_m_kernel` is started for these operands; arguments as in `prune_n_of_m`."""
    rows, columns = weight.shape
    groups = 1024 // m
    return Launch(
        prune_n_of_m_kernel,
        (rows, ceil_div(columns // m, groups)),
        {**_operands(weight, x_norm, grad_norm, alpha), "count": m - n},
        {"HAS_X": x_norm is not None, "HAS_GRAD": grad_norm is not None, "M": m, "GROUPS": groups},
    )


@jit
def scores(weight_block, x_norm_ptr, grad_norm_block, alpha, col, inside, HAS_X: tl.constexpr, HAS_GRAD: tl.constexpr):
    """Score a tile by |w|(‖x‖ + α‖g‖). Weights are loaded last: two bytes each, they are the cheapest to wait with."""
    if HAS_GRAD:
        factor = alpha * tl.load(grad_norm_block, mask=inside, other=0).to(tl.float32)
        if HAS_X:
            factor += tl.load(x_norm_ptr + col, mask=inside, other=0).to(tl.float32)
        return tl.abs(tl.load(weight_block, mask=inside, other=0).to(tl.float32)) * factor
    score = tl.abs(tl.load(weight_block, mask=inside, other=0).to(tl.float32))
    if HAS_X:
        score *= tl.load(x_norm_ptr + col, mask=inside, other=0).to(tl.float32)
    return score


@jit
def score_bits(
    weight_ptr,
    x_norm_ptr,
    grad_norm_ptr,
    alpha,
    col,
    n_cols,
    stride_weight_col,
    stride_grad_col,
    HAS_X: tl.constexpr,
    HAS_GRAD: tl.constexpr,
):
    """Return the scores' bits for some columns of one row, int32; what is outside lies above every score."""
    inside = col < n_cols
    weight_block, grad_block = weight_ptr + col * stride_weight_col, grad_norm_ptr + col * stride_grad_col
    score = scores(weight_block, x_norm_ptr, grad_block, alpha, col, inside, HAS_X, HAS_GRAD)
    return tl.where(inside, score.to(tl.int32, bitcast=True), 0x7FFFFFFF)


@jit
def kth_smallest(one, other, k, BITS: tl.constexpr):
    """Find the k-th smallest number (k from 1) of two blocks, which must lie in 0 … 2^BITS − 1; int32."""
    result = k * 0
    for bit in range(0, BITS):
        candidate = result | (1 << (BITS - 1 - bit))
        below = tl.sum((one < candidate).to(tl.int32) + (other < candidate).to(tl.int32))
        result = tl.where(below < k, candidate, result)
    return result


@jit
def prune_rows_kernel(
    weight_ptr,
    x_norm_ptr,
    grad_norm_ptr,
    alpha,
    n_cols,
    stride_weight_row,
    stride_weight_col,
    stride_grad_row,
    stride_grad_col,
    count,
    HAS_X: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    INDEX_BITS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Zero the `count` lowest scores of one row.

    Floats that are not negative are ordered as their bits are, so the count-th smallest is found bit by bit; among the
    weights that equal it, the last index that goes is found the same way.
    """
    row = tl.program_id(0).to(tl.int64)
    # Rows begin at 64-bit offsets; inside one 32 bits do, and leave registers for long rows.
    weight_ptr += row * stride_weight_row
    grad_norm_ptr += row * stride_grad_row
    col_0 = tl.arange(0, HALF)
    bits_0 = score_bits(
        weight_ptr, x_norm_ptr, grad_norm_ptr, alpha, col_0, n_cols, stride_weight_col, stride_grad_col, HAS_X, HAS_GRAD
    )
    # Bits have no sign, so this adds 0; without the dependence the compiler would load both halves at once and spill.
    col_1 = tl.multiple_of(HALF + (tl.max(bits_0) >> 31), HALF) + col_0
    bits_1 = score_bits(
        weight_ptr, x_norm_ptr, grad_norm_ptr, alpha, col_1, n_cols, stride_weight_col, stride_grad_col, HAS_X, HAS_GRAD
    )
    threshold = kth_smallest(bits_0, bits_1, count, 31)
    # What is below goes, what is above stays, and what is equal goes by its index.
    order_0 = tl.where(bits_0 < threshold, -1, tl.where(bits_0 == threshold, col_0, 0x7FFFFFFF))
    order_1 = tl.where(bits_1 < threshold, -1, tl.where(bits_1 == threshold, col_1, 0x7FFFFFFF))
    last = kth_smallest(order_0, order_1, count, INDEX_BITS)
    # Only zeros are written: one number per weight is all that a program keeps.
    zeros = tl.zeros((HALF,), dtype=weight_ptr.dtype.element_ty)
    tl.store(weight_ptr + col_0 * stride_weight_col, zeros, mask=order_0 <= last)
    tl.store(weight_ptr + col_1 * stride_weight_col, zeros, mask=order_1 <= last)


@jit
def prune_n_of_m_kernel(
    weight_ptr,
    x_norm_ptr,
    grad_norm_ptr,
    alpha,
    n_cols,
    stride_weight_row,
    stride_weight_col,
    stride_grad_row,
    stride_grad_col,
    count,
    HAS_X: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    M: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Zero the `count` lowest scores of each of GROUPS groups of M: those that fewer than `count` others precede."""
    row = tl.program_id(0).to(tl.int64)
    # Flat for wide loads, and as groups for the comparisons.
    col = tl.program_id(1).to(tl.int64) * GROUPS * M + tl.arange(0, GROUPS * M)  # [GROUPS · M]
    inside = col < n_cols
    block = weight_ptr + row * stride_weight_row + col * stride_weight_col
    grad_block = grad_norm_ptr + row * stride_grad_row + col * stride_grad_col
    score = scores(block, x_norm_ptr, grad_block, alpha, col, inside, HAS_X, HAS_GRAD)
    score = tl.reshape(score, (GROUPS, M))
    mine, others = score[:, :, None], score[:, None, :]  # [GROUPS, M, M]: every score against every other
    place = tl.arange(0, M)
    earlier = place[None, None, :] < place[None, :, None]
    precedes = (others < mine) | ((others == mine) & earlier)
    rank = tl.reshape(tl.sum(precedes.to(tl.int32), axis=2), (GROUPS * M,))
    zeros = tl.zeros((GROUPS * M,), dtype=weight_ptr.dtype.element_ty)
    tl.store(block, zeros, mask=inside & (rank < count))
