"""Norms of per-sample gradients: acc += Σ_n |dY_nᵀ X_n|^p, without a gradient in memory.

The gradient of Y = X Wᵀ for sample n is G_n = dY_nᵀ X_n [d_out, d_in]. Σ_n |G_n| (p = 1) and Σ_n G_n² (p = 2) are what
GBLM-Pruner asks for (arXiv 2311.04902, Eq. 6: ‖[g_1 … g_N]‖_p) and, for p = 2, the second-order Taylor form
(arXiv 2305.11627, Eq. 5). Power 0 is the plain sum Σ_n G_n, a product over all tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamprune.kernels.add_product import HALVES, add_product
from streamprune.kernels.launch import Backend, Launch, ceil_div, interpreted, jit, tl, use_triton

POWERS = (0, 1, 2)
# One choice for all shapes: another block of tokens would change the order of the sums, and with it their last bits.
BLOCK_OUT, BLOCK_IN, BLOCK_TOKENS = 128, 128, 64


def grad_norm(acc: Tensor, x: Tensor, dy: Tensor, power: int, *, backend: Backend | None = None) -> Tensor:
    """Add Σ_n |dY_nᵀ X_n|^p to `acc`, in place, and return it.

    Args:
        acc: [d_out, d_in], float32 (float64 in float64 runs), contiguous.
        x: X, the Linear's input [samples, tokens, d_in], any float dtype.
        dy: dY, the loss's gradient with respect to its output [samples, tokens, d_out], same dtype.
        power: p, 1 or 2; 0 for the plain sum Σ_n dY_nᵀ X_n.
        backend: "torch" or "triton" instead of the device's own.

    bfloat16 and float16 are multiplied on tensor cores and summed in float32; wider ends take torch's operations, which
    make one gradient at a time, in one buffer.
    """
    if power not in POWERS:
        raise ValueError(f"power {power} is not one of {POWERS}")
    if x.shape[:2] != dy.shape[:2] or acc.shape != (dy.shape[2], x.shape[2]):
        shapes = f"acc {list(acc.shape)}, x {list(x.shape)}, dy {list(dy.shape)}"
        raise ValueError(f"{shapes}: wanted [d_out, d_in], [samples, tokens, d_in], [samples, tokens, d_out]")
    if not acc.is_contiguous() or x.dtype != dy.dtype:
        raise ValueError(f"acc must be contiguous, and x {x.dtype} and dy {dy.dtype} of one dtype")
    if power == 0:
        return add_product(acc, dy.flatten(0, 1), x.flatten(0, 1))
    if use_triton(x, backend) and x.dtype in HALVES:
        if acc.numel() and x.shape[0] * x.shape[1]:
            launch(acc, x, dy, power).run()
        return acc
    return _reference(acc, x, dy, power)


def _reference(acc: Tensor, x: Tensor, dy: Tensor, power: int) -> Tensor:
    x, dy = x.to(acc.dtype), dy.to(acc.dtype)
    grad = torch.empty_like(acc)
    for inputs, gradients in zip(x, dy, strict=True):
        torch.mm(gradients.T, inputs, out=grad)
        if power == 1:
            acc.add_(grad.abs_())
        else:
            acc.addcmul_(grad, grad)
    return acc


def launch(acc: Tensor, x: Tensor, dy: Tensor, power: int) -> Launch:
    """Describe how `grad_norm_kernel` is started for these operands and power 1 or 2; shapes as in `grad_norm`."""
    samples, tokens, d_in = x.shape
    d_out = dy.shape[2]
    return Launch(
        grad_norm_kernel,
        (ceil_div(d_out, BLOCK_OUT) * ceil_div(d_in, BLOCK_IN),),
        {
            "acc_ptr": acc,
            "x_ptr": x,
            "dy_ptr": dy,
            "n_samples": samples,
            "n_tokens": tokens,
            "d_out": d_out,
            "d_in": d_in,
            "stride_x_sample": x.stride(0),
            "stride_x_token": x.stride(1),
            "stride_x_col": x.stride(2),
            "stride_dy_sample": dy.stride(0),
            "stride_dy_token": dy.stride(1),
            "stride_dy_col": dy.stride(2),
        },
        {
            "POWER": power,
            # Triton's interpreter multiplies the bit patterns of bfloat16.
            "WIDEN": interpreted() and x.dtype == torch.bfloat16,
            "BLOCK_OUT": BLOCK_OUT,
            "BLOCK_IN": BLOCK_IN,
            "BLOCK_TOKENS": BLOCK_TOKENS,
            "GROUP": 8,
        },
        num_warps=8,
        num_stages=3,
    )


@jit
def grad_norm_kernel(
    acc_ptr,
    x_ptr,
    dy_ptr,
    n_samples,
    n_tokens,
    d_out,
    d_in,
    stride_x_sample,
    stride_x_token,
    stride_x_col,
    stride_dy_sample,
    stride_dy_token,
    stride_dy_col,
    POWER: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Add to one tile [BLOCK_OUT, BLOCK_IN] of acc, over all samples; neighbouring programs share their operands."""
    tiles_in = tl.cdiv(d_in, BLOCK_IN)
    tiles_out = tl.cdiv(d_out, BLOCK_OUT)
    band = tl.program_id(0) // (GROUP * tiles_in)
    height = tl.minimum(tiles_out - band * GROUP, GROUP)
    inner = tl.program_id(0) % (GROUP * tiles_in)
    out = (band * GROUP + inner % height) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)  # [BO]
    column = (inner // height) * BLOCK_IN + tl.arange(0, BLOCK_IN)  # [BI]
    token = tl.arange(0, BLOCK_TOKENS)  # [BT]
    out_inside, column_inside = out < d_out, column < d_in
    # dY is addressed transposed: a tile turned after loading would not be copied to shared memory asynchronously.
    dy_offset = out[:, None].to(tl.int64) * stride_dy_col + token[None, :].to(tl.int64) * stride_dy_token  # [BO, BT]
    x_offset = token[:, None].to(tl.int64) * stride_x_token + column[None, :].to(tl.int64) * stride_x_col  # [BT, BI]

    # One loop over all samples, so that loads run ahead across their ends.
    blocks = tl.cdiv(n_tokens, BLOCK_TOKENS)
    total = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32)
    grad = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32)
    for step in range(0, n_samples * blocks):
        sample, first = (step // blocks).to(tl.int64), (step % blocks).to(tl.int64) * BLOCK_TOKENS
        token_inside = token < n_tokens - first
        dy_block = dy_ptr + sample * stride_dy_sample + first * stride_dy_token
        x_block = x_ptr + sample * stride_x_sample + first * stride_x_token
        dy = tl.load(dy_block + dy_offset, mask=out_inside[:, None] & token_inside[None, :], other=0)
        x = tl.load(x_block + x_offset, mask=token_inside[:, None] & column_inside[None, :], other=0)
        if WIDEN:
            dy, x = dy.to(tl.float32), x.to(tl.float32)
        grad = tl.dot(dy, x, grad)
        # A sample's gradient is whole only behind its last block: the power is taken of it, not of its parts.
        if first + BLOCK_TOKENS >= n_tokens:
            if POWER == 2:
                total += grad * grad
            else:
                total += tl.abs(grad)
            grad = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32)
    target = acc_ptr + out[:, None].to(tl.int64) * d_in + column[None, :]
    inside = out_inside[:, None] & column_inside[None, :]
    tl.store(target, tl.load(target, mask=inside, other=0) + total, mask=inside)
