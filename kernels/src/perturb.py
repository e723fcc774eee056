"""Perturbed weights: out = w + δ + σ|w|ξ with ξ ~ N(0, 1), the noise never stored.

Noise of SmoothGrad and MoreauPruner (arXiv 2406.07017, §3): z = σ|w|ξ, element by element.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

# Elements made at a time on a CPU. The block stays in cache, and operations of this size run in the calling thread
# (torch starts its own threads above it), so that several tensors can be perturbed in threads of the caller.
BLOCK = 1 << 15


def noise_seed(*key: int | str) -> int:
    """A 63-bit seed from (seed, step, draw, layer, tensor).

    The noise is a pure function of this key, so the backward sweep sees the forward sweep's noise and a
    second run the first run's, in whatever order layers are visited. torch's CPU generator takes the low 32 bits.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def perturb(out: Tensor, weight: Tensor, delta: Tensor | None, sigma: float, seed: int) -> Tensor:
    """Write w + δ + σ|w|ξ into `out` and return it.

    Args:
        out: any float dtype, contiguous, the shape of `weight`. Overwritten.
        weight: w, any float dtype, contiguous.
        delta: δ, float32 or float64, contiguous, or None for δ = 0.
        sigma: σ, relative; 0 draws no noise.
        seed: of the noise, from `noise_seed`.

    w·ξ has the law of |w|·ξ (ξ is symmetric), so the sum is made as w(1 + σξ) + δ: no temporary is
    larger than one block.
    """
    work_dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
    generator = torch.Generator(device=out.device).manual_seed(seed) if sigma else None
    flat_out, flat_weight = out.view(-1), weight.view(-1)
    flat_delta = None if delta is None else delta.view(-1)
    step = max(1, min(BLOCK, out.numel()) if out.device.type == "cpu" else out.numel())
    block = torch.empty(step if out.dtype != work_dtype else 0, dtype=work_dtype, device=out.device)
    for start in range(0, out.numel(), step):
        stop = min(start + step, out.numel())
        target = flat_out[start:stop] if out.dtype == work_dtype else block[: stop - start]
        if generator is None:
            target.copy_(flat_weight[start:stop])
        else:
            target.normal_(generator=generator).mul_(sigma).add_(1).mul_(flat_weight[start:stop])
        if flat_delta is not None:
            target.add_(flat_delta[start:stop])
        if out.dtype != work_dtype:
            flat_out[start:stop].copy_(target)
    return out
