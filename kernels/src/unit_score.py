"""Element-wise importance |a ⊙ w| and the Taylor forms, reduced straight to rows or columns.

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

# Elements reduced at a time on a CPU, so that the product stays in cache and nothing of weight size is made.
BLOCK = 1 << 17


def _second(w: Tensor, fisher: Tensor) -> Tensor:
    return w.square().mul_(fisher)


_ELEMENTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "first": lambda w, a, fisher: torch.mul(w, a).abs_(),
    "second": lambda w, a, fisher: _second(w, fisher),
    "mix": lambda w, a, fisher: torch.mul(w, a).sub_(_second(w, fisher), alpha=0.5).abs_(),
    "vectorize": lambda w, a, fisher: torch.mul(w, a),
    "square": lambda w, a, fisher: w.square(),
}
FORMS = tuple(_ELEMENTS)


def unit_score(weight: Tensor, a: Tensor | None, dim: int, form: str = "first", fisher: Tensor | None = None) -> Tensor:
    """Scores of the lines of one matrix along `dim`.

    Args:
        weight: w [rows, columns], any float dtype.
        a: g or δ, same shape; unused by `second` and `square`.
        dim: 0 scores rows, 1 scores columns.
        form: one of `FORMS`.
        fisher: F, same shape, for `second` and `mix`.

    Returns:
        [rows] or [columns] in float64. A block of rows is summed in float32 (float64 for float64 weights), blocks are
        added in float64; the order is fixed.
    """
    work_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    rows, columns = weight.shape
    out = torch.zeros(weight.shape[dim], dtype=torch.float64, device=weight.device)
    step = max(1, BLOCK // max(1, columns)) if weight.device.type == "cpu" else rows
    for start in range(0, rows, step):
        part = slice(start, start + step)
        w = weight[part].to(work_dtype)
        other = w if a is None else a[part]
        values = _ELEMENTS[form](w, other, w if fisher is None else fisher[part])
        if dim == 0:
            out[part] = values.sum(dim=1)
        else:
            out += values.sum(dim=0)
    return out.abs_() if form == "vectorize" else out
