"""Sums of products: total += α aᵀb over tokens, in float32 whatever the operands are.

With the ends of a Linear, dY and X, this is the gradient of its weight over micro-batches; with hidden states and
inputs the right side of a least-squares fit. A product in half precision would round every micro-batch's sum to half.
"""

from __future__ import annotations

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)


def sums_halves(tensor: Tensor) -> bool:
    """Tell whether products of such tensors are summed in float32 as they are: of half precision, on a GPU.

    Elsewhere they are widened first, which is as exact and slower.
    """
    return tensor.is_cuda and tensor.dtype in HALVES


def add_product(total: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """Compute total = β total + α aᵀb in place, and return it.

    Args:
        total: [m, n], float32 (float64 in float64 runs). With β = 0 it may hold anything before.
        a: [tokens, m], any float dtype.
        b: [tokens, n], the same dtype.

    bfloat16 and float16 are multiplied exactly and summed in float32: by cuBLAS as they are, on a CPU widened first.
    """
    if a.shape[0] != b.shape[0] or total.shape != (a.shape[1], b.shape[1]) or a.dtype != b.dtype:
        shapes = f"total {list(total.shape)}, a {list(a.shape)} in {a.dtype}, b {list(b.shape)} in {b.dtype}"
        raise ValueError(f"{shapes}: wanted [m, n], [tokens, m], [tokens, n], and a and b of one dtype")
    if sums_halves(a) and total.dtype == torch.float32:
        return torch.addmm(total, a.T, b, out_dtype=torch.float32, beta=beta, alpha=alpha, out=total)
    return total.addmm_(a.T.to(total.dtype), b.to(total.dtype), beta=beta, alpha=alpha)
