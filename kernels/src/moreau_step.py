"""Proximal step of MoreauPruner on δ = w_t − w, with group soft-thresholding for MoreauPruner-GS.

    δ ← (1 − γ/ρ) δ − γ g                                          arXiv 2406.07017, Alg. 1, in δ form
    δ_S ← max(0, 1 − γη/‖δ_S‖₂) δ_S   for each line S              Eq. 12 (GST)

A line is a row (dim 0) or a column (dim 1): the slice of one matrix that goes when a unit is removed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from streamprune.kernels.launch import Backend, Launch, ceil_div, jit, most_warps, power_of_two, tl, use_triton
from streamprune.kernels.unit_score import unit_score

MOST_ELEMENTS = 1 << 15  # that one program holds in registers


@dataclass(frozen=True)
class MoreauStep:
    """Result of a step.

    Attributes:
        delta: δ after the step [rows, columns], in the memory of the δ (at δ = 0: of the gradient) that was given.
        norms: ‖δ_S‖₂ before thresholding, float32 (float64 for a float64 δ), per line; None without a threshold.
    """

    delta: Tensor
    norms: Tensor | None = None


def moreau_step(
    delta: Tensor | None,
    grad: Tensor,
    rho: float,
    gamma: float,
    *,
    dim: int = 0,
    threshold: float | None = None,
    backend: Backend | None = None,
) -> MoreauStep:
    """Take one proximal step on δ, in place.

    Args:
        delta: δ [rows, columns], any float dtype, or None for δ = 0: then `grad` is overwritten.
        grad: g, same shape.
        rho: weight ρ of the Moreau pull.
        gamma: step size γ.
        dim: 0 if a line is a row, 1 if it is a column.
        threshold: γη, in units of δ: a line whose norm does not exceed it becomes exactly zero. None for no
            thresholding (MoreauPruner).
        backend: "torch" or "triton" instead of the device's own.

    With a kernel δ is read and written once, where a line fits into a program; torch's operations pass over it
    once more for the norms and once more for the scale.
    """
    target = grad if delta is None else delta
    if use_triton(grad, backend) and (threshold is None or _tile(*grad.shape, dim) is not None):
        return _with_kernel(target, delta is not None, grad, rho, gamma, dim, threshold)
    return _reference(target, delta is not None, grad, rho, gamma, dim, threshold, backend)


def soft_threshold(delta: Tensor, dim: int, threshold: float, norms: Tensor) -> None:
    """Threshold the lines of δ alone, in place, for a threshold that comes from the `norms` of `MoreauStep`."""
    kept = norms > threshold
    scale = torch.where(kept, 1 - threshold / norms, torch.zeros_like(norms))
    delta.mul_(scale.unsqueeze(1 - dim))


def _reference(
    target: Tensor,
    has_delta: bool,
    grad: Tensor,
    rho: float,
    gamma: float,
    dim: int,
    threshold: float | None,
    backend: Backend | None,
) -> MoreauStep:
    # In float32 at least, as in the kernel: δ of a narrower dtype is rounded once, when the step is through.
    wide = target.to(torch.promote_types(torch.promote_types(target.dtype, grad.dtype), torch.float32))
    if has_delta:
        wide.mul_(1 - gamma / rho).add_(grad, alpha=-gamma)
    else:
        wide.mul_(-gamma)
    norms = None
    if threshold is not None:
        # In blocks: torch's own norm of columns takes four times as long, and of bfloat16 it makes a copy.
        norms = unit_score(wide, None, dim, "square", backend=backend).sqrt_().to(wide.dtype)
        soft_threshold(wide, dim, threshold, norms)
    if wide is not target:
        target.copy_(wide)
    return MoreauStep(target, norms)


def _with_kernel(
    target: Tensor, has_delta: bool, grad: Tensor, rho: float, gamma: float, dim: int, threshold: float | None
) -> MoreauStep:
    lines = target.shape[dim] if threshold is not None else 0
    norms = torch.zeros(lines, dtype=torch.float32, device=target.device)
    if target.numel():
        launch(target, grad, norms, rho, gamma, dim=dim, threshold=threshold, has_delta=has_delta).run()
    return MoreauStep(target) if threshold is None else MoreauStep(target, norms)


def _tile(rows: int, columns: int, dim: int) -> tuple[int, int] | None:
    """Return (rows, columns) of the tile of a program that holds whole lines; None if a line does not fit into one.

    A column goes with its neighbours, at least 4 and at most 16, so that 16 bytes are contiguous.
    """
    height, width = max(2, power_of_two(rows)), power_of_two(columns)
    if dim == 0:
        return (max(1, min(height, 2048 // width)), width) if width <= MOST_ELEMENTS else None
    beside = min(16, MOST_ELEMENTS // height)
    return (height, beside) if beside >= 4 else None


def launch(
    delta: Tensor,
    grad: Tensor,
    norms: Tensor,
    rho: float,
    gamma: float,
    *,
    dim: int = 0,
    threshold: float | None = None,
    has_delta: bool = True,
) -> Launch:
    """Describe how `moreau_rows_kernel` or `moreau_columns_kernel` is started; arguments as in `moreau_step`."""
    rows, columns = delta.shape
    tile = (4, 512) if threshold is None else _tile(rows, columns, dim)
    assert tile is not None, "moreau_step asks whether a line fits"
    block_rows, block_cols = tile
    arguments = {
        "delta_ptr": delta,
        "grad_ptr": grad,
        "norms_ptr": norms,
        "decay": 1 - gamma / rho,
        "gamma": float(gamma),
        "threshold": 0.0 if threshold is None else float(threshold),
        "n_rows": rows,
        "n_cols": columns,
        "stride_delta_row": delta.stride(0),
        "stride_delta_col": delta.stride(1),
        "stride_grad_row": grad.stride(0),
        "stride_grad_col": grad.stride(1),
    }
    num_warps = max(4, min(most_warps() if dim == 1 else 16, block_rows * block_cols // 1024))
    if dim == 1 and threshold is not None:
        constants = {"HAS_DELTA": has_delta, "HALF_ROWS": block_rows // 2, "BLOCK_COLS": block_cols}
        return Launch(moreau_columns_kernel, (ceil_div(columns, block_cols),), arguments, constants, num_warps)
    constants = {"HAS_DELTA": has_delta, "SHRINK": threshold is not None}
    constants |= {"BLOCK_ROWS": block_rows, "BLOCK_COLS": block_cols}
    grid = (ceil_div(rows, block_rows), ceil_div(columns, block_cols))
    return Launch(moreau_rows_kernel, grid, arguments, constants, num_warps)


@jit
def stepped(
    delta_block,
    grad_block,
    inside,
    decay,
    gamma,
    HAS_DELTA: tl.constexpr,
):
    """Compute decay δ − γ g of a tile, in float32."""
    value = -gamma * tl.load(grad_block, mask=inside, other=0).to(tl.float32)
    if HAS_DELTA:
        value += decay * tl.load(delta_block, mask=inside, other=0).to(tl.float32)
    return value


@jit
def shrinkage(norm, threshold):
    """Compute the factor max(0, 1 − γη/‖δ_S‖) of each line, also for norms of 0."""
    kept = norm > threshold
    return tl.where(kept, 1 - tl.div_rn(threshold, tl.where(kept, norm, 1.0)), 0.0)


@jit
def moreau_rows_kernel(
    delta_ptr,
    grad_ptr,
    norms_ptr,
    decay,
    gamma,
    threshold,
    n_rows,
    n_cols,
    stride_delta_row,
    stride_delta_col,
    stride_grad_row,
    stride_grad_col,
    HAS_DELTA: tl.constexpr,
    SHRINK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Set δ ← GST(decay δ − γ g) for one tile [BR, BC], which holds whole rows where they are shrunk."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]  # [BR, 1]
    col = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]  # [1, BC]
    inside = (row < n_rows) & (col < n_cols)
    delta_block = delta_ptr + row * stride_delta_row + col.to(tl.int64) * stride_delta_col
    grad_block = grad_ptr + row * stride_grad_row + col.to(tl.int64) * stride_grad_col
    value = stepped(delta_block, grad_block, inside, decay, gamma, HAS_DELTA)
    if SHRINK:
        # Elements below 1e-19 count as 0: their squares lie below float32's smallest normal number.
        norm = tl.sqrt_rn(tl.sum(value * value, axis=1, keep_dims=True))
        value *= shrinkage(norm, threshold)
        tl.store(norms_ptr + row, norm, mask=row < n_rows)
    tl.store(delta_block, value.to(delta_ptr.dtype.element_ty), mask=inside)


@jit
def moreau_columns_kernel(
    delta_ptr,
    grad_ptr,
    norms_ptr,
    decay,
    gamma,
    threshold,
    n_rows,
    n_cols,
    stride_delta_row,
    stride_delta_col,
    stride_grad_row,
    stride_grad_col,
    HAS_DELTA: tl.constexpr,
    HALF_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Set δ ← GST(decay δ − γ g) for whole columns, in two halves [HR, BC] of rows.

    Registers are what limits a column's length. A tile begins at a 64-bit offset, and inside it 32 bits do; `zero`
    makes the compiler load a half only when the one before is summed, and make addresses anew, not keep them.
    """
    first = tl.program_id(0) * BLOCK_COLS
    col = tl.arange(0, BLOCK_COLS)[None, :]  # [1, BC]
    row = tl.arange(0, HALF_ROWS)[:, None]  # [HR, 1]
    delta_ptr += first.to(tl.int64) * stride_delta_col
    grad_ptr += first.to(tl.int64) * stride_grad_col
    col_inside = col < n_cols - first

    inside = (row < n_rows) & col_inside
    delta_block = delta_ptr + (row * stride_delta_row + col * stride_delta_col)
    grad_block = grad_ptr + (row * stride_grad_row + col * stride_grad_col)
    value_0 = stepped(delta_block, grad_block, inside, decay, gamma, HAS_DELTA)
    square = tl.sum(value_0 * value_0, axis=0, keep_dims=True)  # [1, BC]

    zero = tl.max(square.to(tl.int32, bitcast=True)) >> 31  # a square's bits have no sign, but for some NaN
    row_1 = HALF_ROWS + zero + row
    inside = (row_1 < n_rows) & col_inside
    delta_block = delta_ptr + (row_1 * stride_delta_row + col * stride_delta_col)
    grad_block = grad_ptr + (row_1 * stride_grad_row + col * stride_grad_col)
    value_1 = stepped(delta_block, grad_block, inside, decay, gamma, HAS_DELTA)
    norm = tl.sqrt_rn(square + tl.sum(value_1 * value_1, axis=0, keep_dims=True))
    tl.store(norms_ptr + first + col, norm, mask=col_inside)

    scale = shrinkage(norm, threshold)
    zero = tl.max(norm.to(tl.int32, bitcast=True)) >> 31
    row_0, row_1 = zero + row, HALF_ROWS + zero + row
    dtype = delta_ptr.dtype.element_ty
    delta_block = delta_ptr + (row_0 * stride_delta_row + col * stride_delta_col)
    tl.store(delta_block, (value_0 * scale).to(dtype), mask=(row_0 >= 0) & (row_0 < n_rows) & col_inside)
    delta_block = delta_ptr + (row_1 * stride_delta_row + col * stride_delta_col)
    tl.store(delta_block, (value_1 * scale).to(dtype), mask=(row_1 < n_rows) & col_inside)
