"""Perturbed weights are w + δ + relative noise, and the noise is noise."""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from kernel_inputs import BF16, F16, F32, F64, close, largest_allocation, normal

from streamprune.kernels import noise_seed, perturb
from streamprune.kernels.perturb import NOISE_BLOCK

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")


def noise(n, seed, dtype=F64):
    """ξ alone, in float64: at w = 1 and a large σ the 1 of w(1 + σξ) costs no digits of ξ."""
    sigma = 2.0**20
    out = perturb(torch.full((n,), torch.nan, dtype=dtype), torch.ones(n, dtype=dtype), None, sigma, seed)
    return (out.double() - 1) / sigma


SIZES = (1, 7, 63, 65, 129, NOISE_BLOCK - 1, NOISE_BLOCK, NOISE_BLOCK + 1, 2 * NOISE_BLOCK + 77)
# (weight, δ, out, rtol, atol): half-precision outputs are one rounding away, 2⁻⁸ in bf16 and 2⁻¹¹ in fp16, and
# the absolute part is for w and δ that cancel; fp16 has steps of 6e-8 near zero.
PERTURB_CASES = (
    (F64, F64, F64, 1e-13, 1e-15),
    (F64, F32, F64, 1e-13, 1e-15),
    (F32, F32, F64, 1e-13, 1e-15),
    (F32, F32, F32, 1e-6, 1e-7),
    (F32, F64, F32, 1e-6, 1e-7),
    (BF16, F32, F32, 1e-6, 1e-7),
    (F16, F32, F32, 1e-6, 1e-7),
    (F64, F32, F32, 1e-6, 1e-7),
    (BF16, F32, BF16, 2**-7.9, 1e-7),
    (F32, F32, BF16, 2**-7.9, 1e-7),
    (F16, F32, F16, 2**-10.9, 2e-7),
    (F32, F32, F16, 2**-10.9, 2e-7),
)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("weight_dtype,delta_dtype,out_dtype,rtol,atol", PERTURB_CASES)
def test_perturbed_weight_is_w_plus_delta_plus_relative_noise(weight_dtype, delta_dtype, out_dtype, rtol, atol, size):
    weight, delta = normal(size, 1, dtype=weight_dtype), normal(size, 2, 0.1, delta_dtype)
    before = weight.clone(), delta.clone()
    out = torch.full((size,), torch.nan, dtype=out_dtype)
    sigma, seed = 0.05, noise_seed(0, 0, 0, 1, "w")
    assert perturb(out, weight, delta, sigma, seed) is out
    xi = noise(size, seed, F64 if out_dtype == F64 else F32)
    close(out, weight.double() * (1 + sigma * xi) + delta.double(), rtol, atol)
    assert torch.equal(weight, before[0]) and torch.equal(delta, before[1])


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64])
@pytest.mark.parametrize("shape", [(1, 1), (7, 65), (1025, 1027)])
def test_no_noise_and_no_delta_copies_the_weight(shape, dtype):
    weight = normal(shape, 1, dtype=dtype)
    assert torch.equal(perturb(torch.full_like(weight, torch.nan), weight, None, 0.0, 5), weight)


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64])
def test_no_noise_adds_delta_alone(dtype):
    weight, delta = normal((63, 129), 1, dtype=dtype), normal((63, 129), 2, 0.1, F32)
    exact = (weight.double() + delta.double()).to(dtype)
    out = perturb(torch.full_like(weight, torch.nan), weight, delta, 0.0, 5)
    # Half-precision sums are made in float32 first, which rounds at most once more, by 2⁻²⁴.
    torch.testing.assert_close(out, exact, rtol=2**-7 if dtype == BF16 else 2**-10 if dtype == F16 else 0, atol=0)
    assert (out != exact).double().mean() < 0.01


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64])
def test_a_zero_weight_gets_no_noise(dtype):
    size = NOISE_BLOCK + 3
    weight = normal(size, 1, dtype=dtype)
    weight[::3] = 0
    out = perturb(torch.full_like(weight, torch.nan), weight, None, 0.5, 9)
    assert (out[::3] == 0).all()
    assert (out[1::3] != weight[1::3]).double().mean() > 0.9
    delta = normal(size, 2, 0.1, F32)
    out = perturb(torch.full_like(weight, torch.nan), weight, delta, 0.5, 9)
    assert torch.equal(out[::3], delta[::3].to(dtype))


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_half_precision_sees_the_float32_noise_rounded_once(dtype):
    weight, delta = normal(70_001, 1, dtype=dtype), normal(70_001, 2, 1e-3, F32)
    half = perturb(torch.full_like(weight, torch.nan), weight, delta, 0.05, 11)
    single = perturb(torch.full(weight.shape, torch.nan), weight, delta, 0.05, 11)
    assert torch.equal(half, single.to(dtype))


@pytest.mark.parametrize("dtype", [BF16, F32, F64])
def test_the_same_seed_gives_the_same_bits_whatever_was_drawn_between(dtype):
    weight = normal((33, 70), 1, dtype=dtype)
    first = perturb(torch.empty_like(weight), weight, None, 0.05, 123)
    torch.randn(1000)
    perturb(torch.empty_like(weight), weight, None, 0.05, 124)
    assert torch.equal(perturb(torch.empty_like(weight), weight, None, 0.05, 123), first)


def test_tensors_drawn_at_the_same_time_get_the_bits_of_one_after_the_other():
    weight = normal(3 * NOISE_BLOCK + 5, 1, dtype=F32)

    def draw(seed):
        return perturb(torch.empty_like(weight), weight, None, 0.05, seed)

    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(draw, range(12)))
    assert all(torch.equal(bits, draw(seed)) for seed, bits in enumerate(together))


def test_noise_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    noise(100, 3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_noise_is_standard_normal_and_uncorrelated(dtype):
    n = 1_500_013  # many blocks, and the last one not full
    xi = noise(n, noise_seed(0, 0, 0, 0, "w"), dtype)
    mean, variance = xi.mean(), xi.var()
    z = (xi - mean) / variance.sqrt()
    # Five standard errors of each estimate.
    assert abs(mean) < 5 / math.sqrt(n)
    assert abs(variance - 1) < 5 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 5 * math.sqrt(6 / n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(24 / n)
    # 16 is the width in which a CPU makes normals, NOISE_BLOCK would show a generator seeded anew per block.
    for lag in (1, 2, 8, 16, NOISE_BLOCK):
        assert abs((z[lag:] * z[:-lag]).mean()) < 5 / math.sqrt(n - lag), lag
    # Kolmogorov-Smirnov at a level of 1e-4.
    uniform, grid = torch.special.ndtr(xi.sort().values), torch.arange(n, dtype=F64) / n
    assert (uniform - grid).abs().max() < 2.23 / math.sqrt(n)
    assert xi.abs().max() > 4  # tails are there


def test_noise_of_tiny_tensors_is_standard_normal_over_seeds():
    # Fewer than 16 elements take another path in torch, and a size that is not a multiple of 16 a third one.
    for size in (1, 7, 17):
        draws = torch.stack([noise(size, noise_seed(0, 0, draw, 0, "w"), F32) for draw in range(3000)])
        n = draws.numel()
        assert abs(draws.mean()) < 5 / math.sqrt(n)
        assert abs(draws.var() - 1) < 5 * math.sqrt(2 / n)
        between = torch.corrcoef(draws.T) - torch.eye(size) if size > 1 else torch.zeros(1)
        assert between.abs().max() < 5 / math.sqrt(len(draws))


def test_noise_scales_with_the_weight_and_is_unbiased_for_both_signs():
    n, sigma = 200_000, 0.05
    magnitudes = torch.tensor([1e-4, 1e-4, 1.0, 1.0, 30.0, 30.0], dtype=F64)
    weight = (magnitudes * torch.tensor([1, -1, 1, -1, 1, -1]))[:, None].expand(-1, n).contiguous()
    z = perturb(torch.full_like(weight, torch.nan), weight, None, sigma, 7) - weight
    error = sigma * magnitudes / math.sqrt(n)
    assert (z.mean(1).abs() < 5 * error).all()
    assert ((z.std(1) - sigma * magnitudes).abs() < 5 * error / math.sqrt(2)).all()


def test_noise_of_other_seeds_steps_draws_layers_and_tensors_is_independent():
    keys = [(0, 0, 0, 0, "a")]
    keys += [(1, 0, 0, 0, "a"), (0, 1, 0, 0, "a"), (0, 0, 1, 0, "a"), (0, 0, 0, 1, "a"), (0, 0, 0, 0, "b")]
    keys += [(0, 0, 2, 0, "a"), (0, 0, 0, 2, "a"), (0, 1, 1, 0, "a")]
    n = 100_000
    draws = {key: noise(n, noise_seed(*key)) for key in keys}
    for one, other in itertools.combinations(keys, 2):
        for power in (1, 2):  # squares show a common scale
            x, y = draws[one] ** power, draws[other] ** power
            correlation = torch.corrcoef(torch.stack([x, y]))[0, 1]
            assert abs(correlation) < 5 / math.sqrt(n), (one, other, power)


def test_averaged_noise_shrinks_with_the_number_of_draws():
    m, n = 64, 20_000
    mean = sum(noise(n, noise_seed(0, 0, draw, 0, "w")) for draw in range(m)) / m
    assert abs(mean.var() * m - 1) < 5 * math.sqrt(2 / n)


def test_noise_seeds_are_63_bit_distinct_and_do_not_depend_on_the_process():
    keys = list(itertools.product((0, 1), range(10), range(20), range(12), ("mlp.up_proj.weight", "q")))
    seeds = [noise_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    bits = torch.tensor([[seed >> bit & 1 for bit in range(63)] for seed in seeds], dtype=F64)
    assert ((bits.mean(0) - 0.5).abs() < 3 / math.sqrt(len(seeds))).all()
    # A number from another process: with Python's own hash of strings, a resumed run would see other noise.
    assert noise_seed(0, 0, 0, 0, "mlp.up_proj.weight") == 4229837566489945413


def test_noise_seed_keeps_the_parts_of_its_key_apart():
    keys = [(1, 23), (12, 3), (123,), (1, 2, 3), ("1", 23), (1, "23"), ("1, 23",), (23, 1), (-1, 23), (1, 23, ""), ()]
    assert len({noise_seed(*key) for key in keys}) == len(keys)


@pytest.mark.parametrize("dtype", [BF16, F32, F64])
@pytest.mark.parametrize("with_delta", [False, True], ids=["no delta", "delta"])
def test_perturb_makes_nothing_of_weight_size(with_delta, dtype):
    weight = normal((1031, 8 * 1024), 1, dtype=dtype)
    delta = normal(weight.shape, 2, 1e-3, F32) if with_delta else None
    out = torch.empty_like(weight)
    work = torch.empty(0, dtype=F64 if dtype == F64 else F32).element_size()
    assert largest_allocation(lambda: weight + 0) >= weight.nbytes  # the measurement sees a temporary
    assert largest_allocation(lambda: perturb(out, weight, delta, 0.05, 1)) <= NOISE_BLOCK * work
    assert NOISE_BLOCK * work < weight.numel() * work / 8
