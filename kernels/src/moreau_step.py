"""The proximal step of MoreauPruner on δ = w_t − w, with group soft-thresholding for MoreauPruner-GS.

    δ ← (1 − γ/ρ) δ − γ g                                          arXiv 2406.07017, Alg. 1, in δ form
    δ_S ← max(0, 1 − γη/‖δ_S‖₂) δ_S   for each line S              Eq. 12 (GST)

A line is a row (dim 0) or a column (dim 1): the slice of one matrix that goes when a unit is removed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from streamprune.kernels.launch import Backend, Launch, ceil_div, jit, power_of_two, tl, use_triton

MOST_ELEMENTS = 1 << 15  # that one program holds in registers


@dataclass(frozen=True)
class MoreauStep:
    """What a step leaves.

    Attributes:
        delta: δ after the step [rows, columns], in the memory of the δ (at δ = 0: of the gradient) that was given.
        norms: ‖δ_S‖₂ before thresholding, float32 (float64 for a float64 δ), per line; None without a threshold.
        zeroed: number of lines that became zero, on δ's device; None without a threshold.
    """

    delta: Tensor
    norms: Tensor | None = None
    zeroed: Tensor | None = None


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
    """One step, in place.

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
    return _reference(target, delta is not None, grad, rho, gamma, dim, threshold)


def soft_threshold(delta: Tensor, dim: int, threshold: float, norms: Tensor) -> Tensor:
    """Group soft-thresholding alone, in place, for a threshold that comes from the `norms` of `MoreauStep`.

    Returns:
        The number of lines that are zero afterwards, on δ's device.
    """
    kept = norms > threshold
    scale = torch.where(kept, 1 - threshold / norms, torch.zeros_like(norms))
    delta.mul_(scale.unsqueeze(1 - dim))
    return (~kept).sum()


def _reference(
    target: Tensor, has_delta: bool, grad: Tensor, rho: float, gamma: float, dim: int, threshold: float | None
) -> MoreauStep:
    if has_delta:
        target.mul_(1 - gamma / rho).add_(grad, alpha=-gamma)
    else:
        target.mul_(-gamma)
    if threshold is None:
        return MoreauStep(target)
    # float32 norms of a narrower δ; no temporary of δ's size.
    norms = torch.linalg.vector_norm(target, dim=1 - dim, dtype=torch.promote_types(target.dtype, torch.float32))
    return MoreauStep(target, norms, soft_threshold(target, dim, threshold, norms))


def _with_kernel(
    target: Tensor, has_delta: bool, grad: Tensor, rho: float, gamma: float, dim: int, threshold: float | None
) -> MoreauStep:
    lines = target.shape[dim] if threshold is not None else 0
    norms = torch.empty(lines, dtype=torch.float32, device=target.device)
    if target.numel():
        launch(target, grad, norms, rho, gamma, dim=dim, threshold=threshold, has_delta=has_delta).run()
    return MoreauStep(target) if threshold is None else MoreauStep(target, norms, (norms <= threshold).sum())


def _tile(rows: int, columns: int, dim: int) -> tuple[int, int] | None:
    """(rows, columns) of a program that holds whole lines; None if a line does not fit.

    A column goes with its neighbours, at least 4 and at most 16, so that 16 bytes are contiguous.
    """
    height, width = power_of_two(rows), power_of_two(columns)
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
    """The start of `moreau_step_kernel` for these operands."""
    rows, columns = delta.shape
    tile = (4, 512) if threshold is None else _tile(rows, columns, dim)
    assert tile is not None, "moreau_step asks whether a line fits"
    block_rows, block_cols = tile
    return Launch(
        moreau_step_kernel,
        (ceil_div(rows, block_rows), ceil_div(columns, block_cols)),
        {
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
        },
        {
            "HAS_DELTA": has_delta,
            "SAME_STRIDES": delta.stride() == grad.stride(),
            "SHRINK": threshold is not None,
            "BY_ROW": dim == 0,
            "BLOCK_ROWS": block_rows,
            "BLOCK_COLS": block_cols,
        },
        num_warps=max(4, min(16, block_rows * block_cols // 1024)),
    )


@jit
def moreau_step_kernel(
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
    SAME_STRIDES: tl.constexpr,
    SHRINK: tl.constexpr,
    BY_ROW: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """δ ← GST(decay δ − γ g) for one tile, which holds whole lines where they are shrunk."""
    first_row, first_col = tl.program_id(0) * BLOCK_ROWS, tl.program_id(1) * BLOCK_COLS
    row = tl.arange(0, BLOCK_ROWS)[:, None]  # [BR, 1]
    col = tl.arange(0, BLOCK_COLS)[None, :]  # [1, BC]
    inside = (row < n_rows - first_row) & (col < n_cols - first_col)
    # The tile begins at 64-bit offsets; inside it 32 bits do, and leave registers for long columns.
    delta_ptr += first_row.to(tl.int64) * stride_delta_row + first_col.to(tl.int64) * stride_delta_col
    grad_ptr += first_row.to(tl.int64) * stride_grad_row + first_col.to(tl.int64) * stride_grad_col
    delta_offset = row * stride_delta_row + col * stride_delta_col
    grad_offset = delta_offset if SAME_STRIDES else row * stride_grad_row + col * stride_grad_col
    value = -gamma * tl.load(grad_ptr + grad_offset, mask=inside, other=0).to(tl.float32)  # [BR, BC]
    if HAS_DELTA:
        value += decay * tl.load(delta_ptr + delta_offset, mask=inside, other=0).to(tl.float32)
    if SHRINK:
        # Norms lie around 1e-6 and their squares around 1e-12: far above float32's smallest normal number.
        norm = tl.sqrt(tl.sum(value * value, axis=1 if BY_ROW else 0, keep_dims=True))
        kept = norm > threshold
        value *= tl.where(kept, 1 - threshold / tl.where(kept, norm, 1.0), 0.0)
        if BY_ROW:
            tl.store(norms_ptr + first_row + row, norm, mask=row < n_rows - first_row)
        else:
            tl.store(norms_ptr + first_col + col, norm, mask=col < n_cols - first_col)
    tl.store(delta_ptr + delta_offset, value.to(delta_ptr.dtype.element_ty), mask=inside)
