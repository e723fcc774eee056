"""Scores of a matrix's rows or columns: element-wise importance |a ⊙ w| or a Taylor form, summed along each of them.

    first      Σ |g w|                                arXiv 2305.11627, Eq. 3, |∂L/∂w · w| per weight
    second     Σ |w² F|,  F = (1/N) Σ_n g_n²          (published code: no ½)
    mix        Σ |g w − ½ w² F|                       Eq. 5
    vectorize  |Σ g w|                                the line's signed sum
    square     Σ w²                                   squared ℓ2 norm of the line (magnitude)

Moreau scores are `first` with δ_T in place of g.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from streamprune.kernels.launch import Backend, Launch, ceil_div, jit, tl, use_triton

# Elements reduced at a time on a CPU, so that the product stays in cache and nothing of weight size is made.
SCORE_BLOCK = 1 << 17
# Rows that one program sums of its columns. Chunks are added afterwards, in their order: atomic additions would come in
# any order, and two runs of the same command could differ in a score's last bits.
CHUNK_ROWS = 512


def _second(w: Tensor, fisher: Tensor) -> Tensor:
    return w.square().mul_(fisher)


_ELEMENTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "first": lambda w, a, fisher: torch.mul(w, a).abs_(),
    "second": lambda w, a, fisher: _second(w, fisher),
    "mix": lambda w, a, fisher: torch.mul(w, a).sub_(_second(w, fisher), alpha=0.5).abs_(),
    "vectorize": lambda w, a, fisher: torch.mul(w, a),
    "square": lambda w, a, fisher: w.square(),
}


def unit_score(
    weight: Tensor,
    a: Tensor | None,
    dim: int,
    form: str = "first",
    fisher: Tensor | None = None,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Score the lines of one matrix along `dim`.

    Args:
        weight: w [rows, columns], any float dtype.
        a: g or δ, same shape; unused by `second` and `square`.
        dim: 0 scores rows, 1 scores columns.
        form: "first", "second", "mix", "vectorize" or "square": |w a|, w² F, |w a − w² F / 2|, |Σ w a|, w².
        fisher: F, same shape, for `second` and `mix`.
        backend: "torch" or "triton" instead of the device's own.

    Returns:
        [lines] in float64. A block of a line is summed in float32 (float64 for float64 weights), blocks and
        lines are added in float64; the order is fixed, so the same operands give the same bits.
    """
    score = _kernel_lines if use_triton(weight, backend) else _reference
    lines = score(weight, a, dim, form, fisher)
    return lines.abs_() if form == "vectorize" else lines


def _reference(weight: Tensor, a: Tensor | None, dim: int, form: str, fisher: Tensor | None) -> Tensor:
    work_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    rows, columns = weight.shape
    out = torch.zeros(weight.shape[dim], dtype=torch.float64, device=weight.device)
    step = max(1, SCORE_BLOCK // max(1, columns)) if weight.device.type == "cpu" else max(1, rows)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        w = weight[part].to(work_dtype)
        other = w if a is None else a[part]
        values = _ELEMENTS[form](w, other, w if fisher is None else fisher[part])
        if dim == 0:
            out[part] = values.sum(dim=1)
        else:
            out += values.sum(dim=0)
    return out


def _kernel_lines(weight: Tensor, a: Tensor | None, dim: int, form: str, fisher: Tensor | None) -> Tensor:
    chunks = 1 if dim == 0 else ceil_div(weight.shape[0], CHUNK_ROWS)
    partial = torch.empty((chunks, weight.shape[dim]), dtype=torch.float32, device=weight.device)
    if weight.numel() == 0:
        partial.zero_()
    else:
        launch(partial, weight, a, dim, form, fisher).run()
    return partial.sum(dim=0, dtype=torch.float64)


def launch(
    partial: Tensor, weight: Tensor, a: Tensor | None, dim: int, form: str, fisher: Tensor | None = None
) -> Launch:
    """Describe how `row_score_kernel` or `column_score_kernel` is started; other arguments as in `unit_score`.

    Args:
        partial: [chunks of rows, lines], float32; filled with the sums of each chunk.
    """
    rows, columns = weight.shape
    a = weight if a is None else a
    fisher = weight if fisher is None else fisher
    arguments = {"partial_ptr": partial, "weight_ptr": weight, "a_ptr": a, "fisher_ptr": fisher}
    arguments |= {"n_rows": rows, "n_cols": columns}
    for name, operand in (("weight", weight), ("a", a), ("fisher", fisher)):
        arguments |= {f"stride_{name}_row": operand.stride(0), f"stride_{name}_col": operand.stride(1)}
    if dim == 0:
        constants = {"FORM": form, "BLOCK_ROWS": 4, "BLOCK_COLS": 512}
        return Launch(row_score_kernel, (ceil_div(rows, 4),), arguments, constants)
    constants = {"FORM": form, "BLOCK_ROWS": 16, "BLOCK_COLS": 128, "CHUNK_ROWS": CHUNK_ROWS}
    return Launch(column_score_kernel, (ceil_div(columns, 128), len(partial)), arguments, constants)


@jit
def element_scores(
    weight_ptr,
    a_ptr,
    fisher_ptr,
    row,
    col,
    inside,
    stride_weight_row,
    stride_weight_col,
    stride_a_row,
    stride_a_col,
    stride_fisher_row,
    stride_fisher_col,
    FORM: tl.constexpr,
):
    """Compute the form's value of each element of a tile, 0 outside; `row` [BR, 1] and `col` [1, BC] are int64."""
    w = tl.load(weight_ptr + row * stride_weight_row + col * stride_weight_col, mask=inside, other=0).to(tl.float32)
    if FORM == "square":
        value = w * w
    elif FORM == "second":
        fisher = tl.load(fisher_ptr + row * stride_fisher_row + col * stride_fisher_col, mask=inside, other=0)
        value = w * w * fisher.to(tl.float32)
    else:
        a = tl.load(a_ptr + row * stride_a_row + col * stride_a_col, mask=inside, other=0)
        value = w * a.to(tl.float32)
        if FORM == "mix":
            fisher = tl.load(fisher_ptr + row * stride_fisher_row + col * stride_fisher_col, mask=inside, other=0)
            value -= 0.5 * (w * w * fisher.to(tl.float32))
        if FORM != "vectorize":
            value = tl.abs(value)
    return value


@jit
def row_score_kernel(
    partial_ptr,
    weight_ptr,
    a_ptr,
    fisher_ptr,
    n_rows,
    n_cols,
    stride_weight_row,
    stride_weight_col,
    stride_a_row,
    stride_a_col,
    stride_fisher_row,
    stride_fisher_col,
    FORM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Sum over the columns of BLOCK_ROWS rows: each lane adds its columns, the lanes are added at the end."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]  # [BR, 1]
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
    for start in range(0, n_cols, BLOCK_COLS):
        col = (start + tl.arange(0, BLOCK_COLS)[None, :]).to(tl.int64)  # [1, BC]
        inside = (row < n_rows) & (col < n_cols)
        total += element_scores(
            weight_ptr,
            a_ptr,
            fisher_ptr,
            row,
            col,
            inside,
            stride_weight_row,
            stride_weight_col,
            stride_a_row,
            stride_a_col,
            stride_fisher_row,
            stride_fisher_col,
            FORM,
        )
    tl.store(partial_ptr + row, tl.sum(total, axis=1, keep_dims=True), mask=row < n_rows)


@jit
def column_score_kernel(
    partial_ptr,
    weight_ptr,
    a_ptr,
    fisher_ptr,
    n_rows,
    n_cols,
    stride_weight_row,
    stride_weight_col,
    stride_a_row,
    stride_a_col,
    stride_fisher_row,
    stride_fisher_col,
    FORM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    CHUNK_ROWS: tl.constexpr,
):
    """Sum over one chunk of rows of BLOCK_COLS columns, into this chunk's row of `partial`."""
    col = tl.program_id(0).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]  # [1, BC]
    first = tl.program_id(1).to(tl.int64) * CHUNK_ROWS
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
    for start in range(0, CHUNK_ROWS, BLOCK_ROWS):
        row = first + start + tl.arange(0, BLOCK_ROWS)[:, None]  # [BR, 1]
        inside = (row < n_rows) & (col < n_cols)
        total += element_scores(
            weight_ptr,
            a_ptr,
            fisher_ptr,
            row,
            col,
            inside,
            stride_weight_row,
            stride_weight_col,
            stride_a_row,
            stride_a_col,
            stride_fisher_row,
            stride_fisher_col,
            FORM,
        )
    summed = tl.sum(total, axis=0, keep_dims=True)  # [1, BC]
    tl.store(partial_ptr + tl.program_id(1).to(tl.int64) * n_cols + col, summed, mask=col < n_cols)
