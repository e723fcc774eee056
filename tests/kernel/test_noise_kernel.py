"""The kernel's noise: Philox4x32-10 by its published vectors, normals by their moments, the same for any launch."""

import math

import pytest
import torch
from kernel_inputs import BF16, BF16_STEP, DEVICE, F16, F32, F64, close, needs_triton, normal
from marks import slow

from streamprune.kernels import noise_seed, perturb
from streamprune.kernels.launch import Launch, jit, tl
from streamprune.kernels.perturb import PROGRAM_ELEMENTS, launch, philox4x32

pytestmark = [needs_triton, pytest.mark.usefixtures("uninitialised_memory_is_nan")]

WORD = 0xFFFFFFFF
# (counter, key, result): kat_vectors of Random123 (Salmon et al., SC 2011), philox 4x32 with 10 rounds.
KNOWN = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


def philox(counter, key):
    """Philox4x32-10 in whole numbers, from the definition in the paper (§3.2)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [second >> 32 ^ c[1] ^ k[0], second & WORD, first >> 32 ^ c[3] ^ k[1], first & WORD]
        k = [(k[0] + 0x9E3779B9) & WORD, (k[1] + 0xBB67AE85) & WORD]
    return tuple(c)


def plain_noise(seed, index):
    """ξ of one element in float64: Box and Muller on words 0 and 1, or 2 and 3, of counter index // 4."""
    quad, place = divmod(index, 4)
    words = philox((quad & WORD, quad >> 32, 0, 0), (seed & WORD, seed >> 32))
    x, y = words[:2] if place < 2 else words[2:]
    radius, angle = math.sqrt(-2 * math.log((x + 0.5) / 2**32)), 2 * math.pi * y / 2**32
    return radius * (math.cos(angle) if place % 2 == 0 else math.sin(angle))


def noise(n, seed):
    """ξ [n] by the kernel: at w = 1 and a large σ the 1 of w(1 + σξ) costs no digits of ξ."""
    weight, sigma = torch.ones(n, device=DEVICE), 2.0**20
    out = perturb(torch.full_like(weight, torch.nan), weight, None, sigma, seed, backend="triton")
    return (out.double().cpu() - 1) / sigma


@jit
def philox_kernel(out_ptr, words_ptr, N: tl.constexpr):
    lane = tl.arange(0, N)
    c0 = tl.load(words_ptr + lane).to(tl.uint32, bitcast=True)
    c1 = tl.load(words_ptr + N + lane).to(tl.uint32, bitcast=True)
    c2 = tl.load(words_ptr + 2 * N + lane).to(tl.uint32, bitcast=True)
    c3 = tl.load(words_ptr + 3 * N + lane).to(tl.uint32, bitcast=True)
    k0 = tl.load(words_ptr + 4 * N + lane).to(tl.uint32, bitcast=True)
    k1 = tl.load(words_ptr + 5 * N + lane).to(tl.uint32, bitcast=True)
    x0, x1, x2, x3 = philox4x32(c0, c1, c2, c3, k0, k1)
    tl.store(out_ptr + lane, x0.to(tl.int32, bitcast=True))
    tl.store(out_ptr + N + lane, x1.to(tl.int32, bitcast=True))
    tl.store(out_ptr + 2 * N + lane, x2.to(tl.int32, bitcast=True))
    tl.store(out_ptr + 3 * N + lane, x3.to(tl.int32, bitcast=True))


def kernel_philox(states):
    """Words of many (counter, key) by the kernel's function."""
    words = torch.tensor([[*counter, *key] for counter, key in states], dtype=torch.int64).T
    signed = ((words + 2**31) % 2**32 - 2**31).to(torch.int32).contiguous().to(DEVICE)
    out = torch.empty(4, len(states), dtype=torch.int32, device=DEVICE)
    Launch(philox_kernel, (1,), {"out_ptr": out, "words_ptr": signed}, {"N": len(states)}).run()
    return [tuple(value & WORD for value in column) for column in out.T.tolist()]


def test_philox_gives_the_published_vectors():
    expected = [result for _, _, result in KNOWN]
    assert [philox(counter, key) for counter, key, _ in KNOWN] == expected
    states = [(counter, key) for counter, key, _ in KNOWN]
    assert kernel_philox([*states, states[0]])[:3] == expected


def test_philox_equals_an_independent_implementation():
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 2**32, (64, 6), generator=generator).tolist()
    states = [(tuple(row[:4]), tuple(row[4:])) for row in rows]
    assert kernel_philox(states) == [philox(*state) for state in states]


@pytest.mark.parametrize("seed", [0, 1, 48, 2**31 - 1, 2**31, 2**62 + 12345, 2**63 - 1])
def test_noise_is_a_function_of_seed_and_element(seed):
    n = PROGRAM_ELEMENTS + 37
    expected = torch.tensor([plain_noise(seed, index) for index in range(n)], dtype=F64)
    # In float32 a uniform number next to 1 has steps of 2⁻²⁴, and so the smallest radius is √(2 · 2⁻²⁴).
    error = (noise(n, seed) - expected).abs()
    assert (error <= 1e-5 * expected.abs() + 4e-4).all() and error.median() < 1e-6


@pytest.mark.parametrize("elements", [256, 1024, 8192])
def test_the_same_bits_for_any_launch(elements):
    weight, delta = normal(10007, 1, dtype=BF16).to(DEVICE), normal(10007, 2, dtype=F32).to(DEVICE)
    usual, other = (torch.full((10007,), torch.nan, device=DEVICE) for _ in range(2))
    start = launch(usual, weight, delta, 0.05, 99)
    start.run()
    constants = {**start.constants, "BLOCK": elements}
    grid = (-(-10007 // elements),)
    Launch(start.kernel, grid, {**start.arguments, "out_ptr": other}, constants, num_warps=1).run()
    assert torch.equal(usual, other)


def test_noise_is_standard_normal_and_uncorrelated():
    n = 1 << 19
    xi = noise(n, noise_seed(0, 0, 0, 5, "mlp.up_proj.weight"))
    assert torch.isfinite(xi).all()
    error = n**-0.5
    assert abs(xi.mean()) < 5 * error
    assert abs(xi.var() - 1) < 5 * math.sqrt(2) * error
    assert abs((xi**3).mean()) < 5 * math.sqrt(15) * error
    assert abs((xi**4).mean() - 3) < 5 * math.sqrt(96) * error
    for lag in (1, 2, 3, 4, 5, 8, 64, 576, 1024, PROGRAM_ELEMENTS):
        assert abs((xi[:-lag] * xi[lag:]).mean()) < 5 * error, lag
        # The radius is shared by two elements; squares would show it where the angle did not part them.
        assert abs(((xi[:-lag] ** 2 - 1) * (xi[lag:] ** 2 - 1)).mean()) < 5 * 2 * error, lag
    share = torch.linspace(-4, 4, 33, dtype=F64)
    empirical = (xi[:, None] < share).double().mean(0)
    assert ((empirical - torch.special.ndtr(share)).abs() < 1.95 * error).all()  # Kolmogorov and Smirnov, p = 0.001
    assert xi.abs().max() > 4


def test_no_repeats_between_seeds_steps_draws_layers_and_tensors():
    keys = [
        (0, 0, 0, 3, "a"),
        (1, 0, 0, 3, "a"),
        (0, 1, 0, 3, "a"),
        (0, 0, 1, 3, "a"),
        (0, 0, 0, 4, "a"),
        (0, 0, 0, 3, "b"),
    ]
    drawn = torch.stack([noise(1 << 14, noise_seed(*key)) for key in keys])
    correlation = torch.corrcoef(drawn) - torch.eye(len(keys), dtype=F64)
    assert correlation.abs().max() < 5 * 2**-7
    # Single values meet by chance; fours of one counter do not.
    fours = {tuple(four) for row in drawn for four in row.view(-1, 4).tolist()}
    assert len(fours) == drawn.numel() // 4


# (w, δ, out, rtol, atol)
CASES = (
    (F32, F32, F32, 2e-6, 1e-6),
    (F32, None, F32, 2e-6, 1e-6),
    (BF16, F32, F32, 2e-6, 1e-6),
    (BF16, F32, BF16, BF16_STEP, 1e-6),
    (BF16, BF16, BF16, BF16_STEP, 1e-6),
    (BF16, None, BF16, BF16_STEP, 1e-6),
    (F16, F32, F16, 2**-10.9, 1e-6),
    (F16, BF16, F32, 2e-6, 1e-6),
)


@pytest.mark.parametrize("weight_dtype,delta_dtype,out_dtype,rtol,atol", CASES)
@pytest.mark.parametrize("shape", [(1,), (7,), (63, 65), (129, 1), (1, 576), (3, 7, 129), slow((65, 1536))])
def test_perturbed_weight_is_w_plus_delta_plus_relative_noise(shape, weight_dtype, delta_dtype, out_dtype, rtol, atol):
    weight = normal(shape, 1, dtype=weight_dtype).to(DEVICE)
    delta = None if delta_dtype is None else normal(shape, 2, 0.01, delta_dtype).to(DEVICE)
    out = torch.full(shape, torch.nan, dtype=out_dtype, device=DEVICE)
    for sigma in (0.05, 0.0):
        assert perturb(out, weight, delta, sigma, 7, backend="triton") is out
        xi = noise(weight.numel(), 7).view(shape)
        expected = weight.double().cpu() * (1 + sigma * xi)
        expected += 0 if delta is None else delta.double().cpu()
        close(out.cpu(), expected, rtol, atol)


def test_strided_operands_get_the_noise_of_their_elements():
    wide, long = normal((40, 130), 1, dtype=BF16).to(DEVICE), normal((129, 38), 2, 0.01, F32).to(DEVICE)
    weight, delta = wide[1:39, :129], long.T
    outs = [torch.full((38, 129), torch.nan, device=DEVICE) for _ in range(2)]
    perturb(outs[0], weight, delta, 0.05, 3, backend="triton")
    perturb(outs[1], weight.contiguous(), delta.contiguous(), 0.05, 3, backend="triton")
    assert torch.equal(*outs)


def test_both_backends_draw_from_one_distribution():
    weight = torch.full((1 << 17,), 2.0, device=DEVICE)
    drawn = {
        backend: perturb(torch.empty_like(weight), weight, None, 0.05, 11, backend=backend).double()
        for backend in ("torch", "triton")
    }
    for xi in ((value - 2) / 0.1 for value in drawn.values()):
        assert abs(xi.mean()) < 5 * 2**-8.5 and abs(xi.var() - 1) < 5 * 2**-8
    assert not torch.equal(*drawn.values())
