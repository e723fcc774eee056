"""SparseGPT's loop over the columns of a block: what goes leaves an error, which the columns behind it make up for.

For column j of W, with U the upper Cholesky factor of H⁻¹ = UᵀU (arXiv 2301.00774, Algorithm 1):

    e_j = w_j / U_jj where the weight goes, else 0;    w_k −= U_jk e_j for k > j;    w_j = 0 where it goes

What goes has the lowest w²/U_jj²: of the block as it is given, or of every M columns as they are when their turn comes.
Of equal ones the lowest index goes first. Beyond that, rows do not depend on each other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamprune.kernels.launch import Backend, Launch, ceil_div, jit, power_of_two, tl, use_triton
from streamprune.kernels.selection import kth_lowest

GROUP = 4  # columns that a program takes out of its tile at a time, where no N:M says it
BLOCK_COLUMNS = 128  # of a block that one program holds in registers


def obs_block(
    weight: Tensor, factor: Tensor, count: int = 0, n: int = 0, m: int = 0, *, backend: Backend | None = None
) -> Tensor:
    """Prune the columns of a block and update those behind in it, in place; return the errors e [columns, rows].

    Args:
        weight: Wᵀ [columns, rows], contiguous; float32, or float64, which has no kernel.
        factor: U of these columns [columns, columns], same dtype; what is below its diagonal is not read.
        count: how many weights of the block go.
        n, m: with m, all but `n` of every `m` columns go instead.
        backend: "torch" or "triton" instead of the device's own.

    With a kernel nothing waits for the GPU. Blocks of more than 128 columns take torch's operations, and so does M that
    is not 2, 4, 8 or 16.

    Raises:
        ValueError: shapes and dtypes do not fit each other, or the block has no such pattern.
    """
    columns, rows = weight.shape
    if factor.shape != (columns, columns):
        raise ValueError(f"weight {[columns, rows]}, factor {list(factor.shape)}: wanted [columns, columns]")
    if not weight.is_contiguous() or weight.dtype != factor.dtype:
        raise ValueError(f"weight must be contiguous, and {weight.dtype} and factor {factor.dtype} of one dtype")
    if m and (columns % m or not 0 <= n <= m):
        raise ValueError(f"{n} of {m} cannot be kept in {columns} columns")
    if not m and not 0 <= count <= weight.numel():
        raise ValueError(f"{count} weights cannot go from a block of {weight.numel()}")
    errors = torch.empty_like(weight)
    if weight.numel() == 0:
        return errors
    # As in `prune_n_of_m`: Triton's blocks have powers of two as sizes, and comparisons grow with M².
    fits = columns <= BLOCK_COLUMNS and m in (0, 2, 4, 8, 16)
    triton = use_triton(weight, backend) and fits
    gone = (
        None if m else _lowest((weight / factor.diagonal()[:, None]).square_(), count, by_topk=triton or weight.is_cuda)
    )
    if triton:
        launch(weight, factor, errors, gone, n, m).run()
    else:
        _reference(weight, factor, errors, gone, n, m)
    return errors


def _lowest(scores: Tensor, count: int, *, by_topk: bool) -> Tensor:
    """Mask exactly the `count` lowest of `scores`; of equal ones the first go."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = scores.flatten()
    # A GPU's kthvalue gives all of them to one block of threads.
    threshold = flat.topk(count, largest=False, sorted=False).values.amax() if by_topk else kth_lowest(flat, count)
    gone, ties = flat < threshold, flat == threshold
    ties &= ties.cumsum(0) <= count - gone.sum()
    return gone.logical_or_(ties).view_as(scores)


def _reference(weight: Tensor, factor: Tensor, errors: Tensor, gone: Tensor | None, n: int, m: int) -> None:
    diagonal = factor.diagonal()[:, None]
    # An operation takes longer to start than to run, so a column has two: what stays is divided by infinity.
    divisor = torch.full_like(weight, torch.inf) if gone is None else torch.where(gone, diagonal, torch.inf)
    for column, (line, by, error) in enumerate(zip(weight, divisor, errors, strict=True)):
        if gone is None and column % m == 0:
            group = slice(column, column + m)
            order = (weight[group] / diagonal[group]).square_().argsort(dim=0, stable=True)
            picked = torch.zeros_like(order, dtype=torch.bool).scatter_(0, order[: m - n], True)
            divisor[group] = torch.where(picked, diagonal[group], torch.inf)
        torch.div(line, by, out=error)
        weight[column + 1 :].addr_(factor[column, column + 1 :], error, alpha=-1)
    weight.masked_fill_(divisor.isfinite(), 0)


def launch(weight: Tensor, factor: Tensor, errors: Tensor, gone: Tensor | None, n: int = 0, m: int = 0) -> Launch:
    """Describe how `obs_block_kernel` is started for these operands.

    `errors` and what goes, `gone` (bool; None with `m`), are as `weight` is; the others as in `obs_block`.
    """
    columns, rows = weight.shape
    group = m or GROUP
    block_rows = 128 // group  # four numbers of M columns for each thread of a warp, so that every warp has them all
    return Launch(
        obs_block_kernel,
        (ceil_div(rows, block_rows),),
        {
            "weight_ptr": weight,
            # Packed, a block's 64 KiB stay in the first cache, where every row of U is read by all programs.
            "factor_ptr": factor.contiguous(),
            "errors_ptr": errors,
            "gone_ptr": weight if gone is None else gone.view(torch.uint8),
            "n_cols": columns,
            "n_rows": rows,
            "count": m - n,
        },
        {
            "HAS_GONE": gone is not None,
            "M": group,
            "GROUPS": power_of_two(ceil_div(columns, group)),
            "BLOCK_ROWS": block_rows,
        },
        num_warps=8,
    )


@jit
def obs_block_kernel(
    weight_ptr,
    factor_ptr,
    errors_ptr,
    gone_ptr,
    n_cols,
    n_rows,
    count,
    HAS_GONE: tl.constexpr,
    M: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Prune and update all columns of BLOCK_ROWS rows.

    A program has its weights in registers. It takes M columns out of them, goes through these one by one, and gives
    each error to the rest of the tile, which nothing waits for until the next M columns are taken out.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    weight_ptr += first
    errors_ptr += first
    gone_ptr += first
    row, place, group = tl.arange(0, BLOCK_ROWS), tl.arange(0, M), tl.arange(0, GROUPS)
    row_inside = row < n_rows - first
    column = group[:, None] * M + place[None, :]  # [G, M]
    tile_inside = (column < n_cols)[:, :, None] & row_inside[None, None, :]
    tile_offset = column[:, :, None] * n_rows + row[None, None, :]
    rest = tl.load(weight_ptr + tile_offset, mask=tile_inside, other=0)  # [G, M, R]
    for here in range(0, tl.cdiv(n_cols, M)):
        part = tl.sum(tl.where((group == here)[:, None, None], rest, 0), axis=0)  # [M, R]
        mine = here * M + place  # [M]
        offset = mine[:, None] * n_rows + row[None, :]
        inside = (mine < n_cols)[:, None] & row_inside[None, :]
        diagonal = tl.load(factor_ptr + mine * (n_cols + 1), mask=mine < n_cols, other=1)  # [M]
        diagonal = tl.broadcast_to(diagonal[:, None], (M, BLOCK_ROWS))
        if HAS_GONE:
            goes = tl.load(gone_ptr + offset, mask=inside, other=0) != 0
        else:
            score = tl.div_rn(part, diagonal)
            score *= score
            rank = tl.zeros((M, BLOCK_ROWS), dtype=tl.int32)
            for index in tl.static_range(0, M):
                other = tl.sum(tl.where((place == index)[:, None], score, 0), axis=0)[None, :]
                rank += ((other < score) | ((other == score) & (place > index)[:, None])).to(tl.int32)
            goes = rank < count
        errors = tl.zeros((M, BLOCK_ROWS), dtype=tl.float32)
        for index in tl.static_range(0, M):
            this = (place == index)[:, None]
            error = tl.sum(tl.where(this & goes, tl.div_rn(part, diagonal), 0), axis=0)[None, :]  # [1, R]
            errors = tl.where(this, error, errors)
            line = factor_ptr + (here * M + index) * n_cols  # row j of U
            near = tl.load(line + mine, mask=(place > index) & (mine < n_cols), other=0)
            part -= near[:, None] * error
            far = tl.load(line + column, mask=(group > here)[:, None] & (column < n_cols), other=0)
            rest -= far[:, :, None] * error[None, :, :]
        tl.store(weight_ptr + offset, tl.where(goes, 0, part), mask=inside)
        tl.store(errors_ptr + offset, errors, mask=inside)
