"""Perturbed weights: out = w + δ + σ|w|ξ with ξ ~ N(0, 1), the noise never stored.

Noise of SmoothGrad and MoreauPruner (arXiv 2406.07017, §3): z = σ|w|ξ, element by element. ξ is symmetric, so w·ξ
has the law of |w|·ξ and the sum is made as w(1 + σξ) + δ.

On a GPU ξ comes from Philox4x32-10 (Salmon et al., SC 2011) with the seed as key and the element's index as counter:
a function of the element, whatever the launch. On a CPU torch's generator is some thirty times faster than Philox in
torch operations, and draws in the order of the elements. The two are of one distribution and not the same numbers.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from streamprune.kernels.launch import Backend, Launch, ceil_div, jit, tl, use_triton

# Elements made at a time on a CPU. The block stays in cache, and operations of this size run in the calling thread
# (torch starts its own threads above it), so that several tensors can be perturbed in threads of the caller.
NOISE_BLOCK = 1 << 15
PROGRAM_ELEMENTS = 2048


def noise_seed(*key: int | str) -> int:
    """Make a 63-bit seed from (seed, step, draw, layer, tensor).

    The noise is a pure function of this key, so the backward sweep sees the forward sweep's noise and a
    second run the first run's, in whatever order layers are visited. torch's CPU generator takes the low 32 bits.
    """
    # Not Python's hash(), which is salted anew in every process.
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def perturb(
    out: Tensor, weight: Tensor, delta: Tensor | None, sigma: float, seed: int, *, backend: Backend | None = None
) -> Tensor:
    """Write w + δ + σ|w|ξ into `out` and return it.

    Args:
        out: any float dtype, contiguous, the shape of `weight`. Overwritten.
        weight: w, any float dtype; with 3 or more dimensions contiguous.
        delta: δ, any float dtype, or None for δ = 0.
        sigma: σ, relative; 0 draws no noise.
        seed: the noise's, from `noise_seed`.
        backend: "torch" or "triton" instead of the device's own.

    Each operand is read once and `out` written once; the sum is made in float32 (in float64 for a float64 `out`).
    """
    if not out.is_contiguous():
        raise ValueError("out is not contiguous")
    if use_triton(out, backend):
        launch(out, weight, delta, sigma, seed).run()
        return out
    return _reference(out, weight, delta, sigma, seed)


def _reference(out: Tensor, weight: Tensor, delta: Tensor | None, sigma: float, seed: int) -> Tensor:
    # The sum is made in float32 also for half weights, so that it is rounded once.
    work_dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
    generator = torch.Generator(device=out.device).manual_seed(seed) if sigma else None
    flat_out, flat_weight = out.view(-1), weight.reshape(-1)
    flat_delta = None if delta is None else delta.reshape(-1)
    step = max(1, min(NOISE_BLOCK, out.numel()) if out.device.type == "cpu" else out.numel())
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


def launch(out: Tensor, weight: Tensor, delta: Tensor | None, sigma: float, seed: int) -> Launch:
    """Describe how `perturb_kernel` is started for these operands; arguments as in `perturb`."""
    # Only matrices may be strided: everything else is one line, whose row never changes.
    matrix, operand = weight.ndim == 2, weight if delta is None else delta
    weight_strides = weight.stride() if matrix else (0, 1)
    delta_strides = operand.stride() if matrix else (0, 1)
    contiguous = weight.is_contiguous() and operand.is_contiguous()
    return Launch(
        perturb_kernel,
        (ceil_div(out.numel(), PROGRAM_ELEMENTS),),
        {
            "out_ptr": out,
            "weight_ptr": weight,
            "delta_ptr": operand,
            "sigma": float(sigma),
            "seed": seed,
            "n_elements": out.numel(),
            "n_cols": weight.shape[-1],
            "stride_weight_row": weight_strides[0],
            "stride_weight_col": weight_strides[1],
            "stride_delta_row": delta_strides[0],
            "stride_delta_col": delta_strides[1],
        },
        {
            "HAS_DELTA": delta is not None,
            "HAS_NOISE": sigma != 0,
            "CONTIGUOUS": contiguous,
            "BLOCK": PROGRAM_ELEMENTS,
        },
        num_warps=8,
    )


@jit
def philox4x32(c0, c1, c2, c3, key_lo, key_hi):
    """Return four blocks of random uint32: Philox4x32-10 of counters and key, all uint32."""
    for _ in tl.static_range(10):
        high_0, high_2 = tl.umulhi(c0, 0xD2511F53), tl.umulhi(c2, 0xCD9E8D57)
        low_0 = tl.mul(c0, 0xD2511F53, sanitize_overflow=False)
        low_2 = tl.mul(c2, 0xCD9E8D57, sanitize_overflow=False)
        c0, c1, c2, c3 = high_2 ^ c1 ^ key_lo, low_2, high_0 ^ c3 ^ key_hi, low_0
        key_lo = tl.add(key_lo, 0x9E3779B9, sanitize_overflow=False)
        key_hi = tl.add(key_hi, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@jit
def normal_pair(x, y):
    """Make two blocks of independent standard normals from two of random uint32 (Box and Muller, 1958).

    The angle y/2³² of a turn is a quadrant and a rest in [−π/4, π/4), where a short series is exact to 3e-8; a
    library's sine would carry a path for large arguments, with local memory.
    """
    radius = tl.sqrt(-1.3862943611198906 * tl.log2(x.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10))
    turned = tl.add(y, 0x20000000, sanitize_overflow=False)
    quadrant = turned >> 30
    rest = (turned & 0x3FFFFFFF).to(tl.int32) - 0x20000000
    t = rest.to(tl.float32) * 1.4629180792671596e-09  # π/2 / 2³⁰
    t2 = t * t
    sine = t * (1 + t2 * (-1 / 6 + t2 * (1 / 120 + t2 * (-1 / 5040 + t2 * (1 / 362880)))))
    cosine = 1 + t2 * (-1 / 2 + t2 * (1 / 24 + t2 * (-1 / 720 + t2 * (1 / 40320))))
    odd = (quadrant & 1) != 0
    along, across = tl.where(odd, -sine, cosine), tl.where(odd, cosine, sine)
    signed = tl.where(quadrant >= 2, -radius, radius)
    return signed * along, signed * across


@jit
def normals(seed, first, BLOCK: tl.constexpr):
    """Draw ξ of the elements first … first + BLOCK − 1 [BLOCK]; `first` is a multiple of 4."""
    quads = first // 4 + tl.arange(0, BLOCK // 4)
    seed = seed.to(tl.uint64)
    counter_lo, counter_hi = quads.to(tl.uint32), (quads >> 32).to(tl.uint32)
    zero = counter_lo ^ counter_lo
    x0, x1, x2, x3 = philox4x32(counter_lo, counter_hi, zero, zero, seed.to(tl.uint32), (seed >> 32).to(tl.uint32))
    n0, n1 = normal_pair(x0, x1)
    n2, n3 = normal_pair(x2, x3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


# A seed is another one for every tensor; specialised on it, the kernel could be compiled more than once.
@jit(do_not_specialize=["seed"])
def perturb_kernel(
    out_ptr,
    weight_ptr,
    delta_ptr,
    sigma,
    seed,
    n_elements,
    n_cols,
    stride_weight_row,
    stride_weight_col,
    stride_delta_row,
    stride_delta_col,
    HAS_DELTA: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write out = w (1 + σξ) + δ over one block of elements, numbered along the rows."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    index = first + tl.arange(0, BLOCK)  # [BLOCK]
    inside = index < n_elements
    if CONTIGUOUS:
        weight_offset, delta_offset = index, index
    else:
        row, col = index // n_cols, index % n_cols
        weight_offset = row * stride_weight_row + col * stride_weight_col
        delta_offset = row * stride_delta_row + col * stride_delta_col
    value = tl.load(weight_ptr + weight_offset, mask=inside, other=0).to(tl.float32)
    if HAS_NOISE:
        value *= 1 + sigma * normals(seed, first, BLOCK)
    if HAS_DELTA:
        value += tl.load(delta_ptr + delta_offset, mask=inside, other=0).to(tl.float32)
    tl.store(out_ptr + index, value.to(out_ptr.dtype.element_ty), mask=inside)
