"""Gram matrices: the lower triangle of total += xᵀx over tokens, summed in float32 whatever x is.

The matrix is symmetric, so only tiles or panels on and below the diagonal are made: half of the products. Cholesky
factors read no more than that triangle; `mirror` makes the matrix whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamprune.kernels.add_product import HALVES, add_product
from streamprune.kernels.launch import Backend, Launch, ceil_div, interpreted, jit, tl, use_triton

# Tiles as large as registers hold: what a product reads again from the cache is what bounds it. A block of tokens fits
# four times into the shared memory of every card from compute capability 8.0 on.
BLOCK_ROWS, BLOCK_COLS, STEP_TOKENS = 128, 256, 32
BAND = 4  # square blocks of two tiles, one upon the other, that are gone through together
# Up to here the whole product has no more tiles than a large card has multiprocessors, and half of them take as long.
FEW_COLUMNS = 2048
# Rows that a CPU multiplies together, up to the diagonal: of 1536 columns it takes 0.54 of the whole product's time.
PANEL = 256
MIRROR_BLOCK = 1024


def gram(total: Tensor, x: Tensor, *, backend: Backend | None = None) -> Tensor:
    """Add xᵀx to the lower triangle of `total`, in place, and return it; what is above the diagonal is undefined then.

    Args:
        total: [columns, columns], float32 (float64 in float64 runs), contiguous.
        x: [tokens, columns], any float dtype.
        backend: "torch" or "triton" instead of the device's own.

    bfloat16 and float16 are multiplied exactly and summed in float32: on a CPU widened first. Few columns take the
    GPU's library, and its whole product.
    """
    if x.ndim != 2 or total.shape != (x.shape[1], x.shape[1]) or not total.is_contiguous():
        raise ValueError(
            f"total {list(total.shape)}, x {list(x.shape)}: wanted [columns, columns] and contiguous, [tokens, columns]"
        )
    many = backend is not None or x.shape[1] > FEW_COLUMNS
    if many and use_triton(x, backend) and x.dtype in HALVES:
        if x.numel():
            launch(total, x).run()
        return total
    return add_product(total, x, x) if x.is_cuda else _reference(total, x)


def _reference(total: Tensor, x: Tensor) -> Tensor:
    x, columns = x.to(total.dtype), x.shape[1]
    # Panels as good as equal: one of a single row is summed in another order.
    height = ceil_div(columns, max(1, ceil_div(columns, PANEL)))
    for start in range(0, columns, height):
        stop = min(start + height, columns)
        total[start:stop, :stop].addmm_(x[:, start:stop].T, x[:, :stop])
    return total


def mirror(total: Tensor) -> Tensor:
    """Copy the lower triangle of a square matrix to the upper one, in place, and return it."""
    for start in range(0, len(total), MIRROR_BLOCK):
        rows = slice(start, start + MIRROR_BLOCK)
        total[:start, rows] = total[rows, :start].T
        block = total[rows, rows]
        block.copy_(block.tril() + block.tril(-1).T)
    return total


def launch(total: Tensor, x: Tensor) -> Launch:
    """Describe how `gram_kernel` is started for these operands; shapes as in `gram`."""
    tokens, columns = x.shape
    blocks = ceil_div(columns, BLOCK_COLS)
    return Launch(
        gram_kernel,
        # Of each band, as many programs as the longest has; those above the diagonal end at once.
        (blocks * BAND * (BLOCK_COLS // BLOCK_ROWS), ceil_div(blocks, BAND)),
        {
            "total_ptr": total,
            "x_ptr": x,
            "n_tokens": tokens,
            "n_cols": columns,
            "stride_x_token": x.stride(0),
            "stride_x_col": x.stride(1),
        },
        {
            # Triton's interpreter multiplies the bit patterns of bfloat16.
            "WIDEN": interpreted() and x.dtype == torch.bfloat16,
            "BLOCK_ROWS": BLOCK_ROWS,
            "BLOCK_COLS": BLOCK_COLS,
            "BLOCK_TOKENS": STEP_TOKENS,
            "BAND": BAND,
        },
        num_warps=8,
        num_stages=3 if torch.version.hip else 4,  # an AMD card has 64 KiB of shared memory
    )


@jit
def add_tile(total_ptr, tile, first_row, first_col, n_cols, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Add a tile [BLOCK_ROWS, BLOCK_COLS] to the square matrix `total`, as far as it lies inside."""
    row = first_row + tl.arange(0, BLOCK_ROWS)[:, None]  # [BR, 1]
    col = first_col + tl.arange(0, BLOCK_COLS)[None, :]  # [1, BC]
    inside = (row < n_cols) & (col < n_cols)
    target = total_ptr + row.to(tl.int64) * n_cols + col
    tl.store(target, tl.load(target, mask=inside, other=0) + tile, mask=inside)


@jit
def gram_kernel(
    total_ptr,
    x_ptr,
    n_tokens,
    n_cols,
    stride_x_token,
    stride_x_col,
    WIDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BAND: tl.constexpr,
):
    """Add to one tile [BLOCK_ROWS, BLOCK_COLS] of total, if any of it is on or below the diagonal.

    A band of rows is gone through column by column, so that programs that run together share their operands.
    """
    height: tl.constexpr = BAND * (BLOCK_COLS // BLOCK_ROWS)
    first_row = (tl.program_id(1) * height + tl.program_id(0) % height) * BLOCK_ROWS
    first_col = (tl.program_id(0) // height) * BLOCK_COLS
    if (first_row < n_cols) & (first_col < first_row + BLOCK_ROWS):
        row = first_row + tl.arange(0, BLOCK_ROWS)  # [BR]
        col = first_col + tl.arange(0, BLOCK_COLS)  # [BC]
        token = tl.arange(0, BLOCK_TOKENS)  # [BT]
        row_inside, col_inside = row < n_cols, col < n_cols
        # The left one is addressed transposed: a tile turned after loading would not be copied asynchronously.
        left_ptr = x_ptr + row[:, None].to(tl.int64) * stride_x_col + token[None, :].to(tl.int64) * stride_x_token
        right_ptr = x_ptr + token[:, None].to(tl.int64) * stride_x_token + col[None, :].to(tl.int64) * stride_x_col
        step = tl.full((1, 1), BLOCK_TOKENS, dtype=tl.int64) * stride_x_token
        product = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
        for start in range(0, n_tokens, BLOCK_TOKENS):
            token_inside = token < n_tokens - start
            left = tl.load(left_ptr, mask=row_inside[:, None] & token_inside[None, :], other=0)  # [BR, BT]
            right = tl.load(right_ptr, mask=token_inside[:, None] & col_inside[None, :], other=0)  # [BT, BC]
            if WIDEN:
                left, right = left.to(tl.float32), right.to(tl.float32)
            product = tl.dot(left, right, product)
            left_ptr += step
            right_ptr += step
        # By halves: all of the tile and of what it is added to would not fit into registers at the same time.
        left_half, right_half = product.reshape(BLOCK_ROWS, 2, BLOCK_COLS // 2).permute(0, 2, 1).split()
        add_tile(total_ptr, left_half, first_row, first_col, n_cols, BLOCK_ROWS, BLOCK_COLS // 2)
        add_tile(total_ptr, right_half, first_row, first_col + BLOCK_COLS // 2, n_cols, BLOCK_ROWS, BLOCK_COLS // 2)
