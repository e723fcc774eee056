"""The element-wise kernels equal plain float64 formulas, make no temporary of weight size, and the noise is noise."""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from streamprune.kernels import FORMS, line_norms, moreau_step, noise_seed, perturb, soft_threshold, unit_score
from streamprune.kernels.perturb import BLOCK as NOISE_BLOCK
from streamprune.kernels.unit_score import BLOCK as SCORE_BLOCK
from torch.profiler import ProfilerActivity, profile

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """Whatever torch.empty makes holds NaN, so that a kernel which reads it before writing it shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def normal(shape, seed, scale=1.0, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=F64) * scale).to(dtype)


def close(actual, expected, rtol, atol):
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=atol, check_dtype=False)


def largest_allocation(run):
    """Bytes of the largest block of memory that `run` asked torch's allocator for, inside operations too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    # The allocator's own events: an operation's memory in the tables is net of what it freed itself.
    events = profiled.profiler.kineto_results.events()
    return max((event.nbytes() for event in events if event.name() == "[memory]"), default=0)


# --- noise -----------------------------------------------------------------------------------------------------


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


# --- the Moreau step -------------------------------------------------------------------------------------------

LINES = ((1, 1), (1, 7), (7, 1), (63, 65), (65, 129), (129, 63), (513, 515))
# (δ, g, rtol, atol)
STEP_CASES = ((F32, F32, 1e-6, 1e-7), (F32, F64, 1e-6, 1e-7), (F64, F64, 1e-14, 1e-16), (F64, F32, 1e-14, 1e-16))


@pytest.mark.parametrize("shape", LINES)
@pytest.mark.parametrize("delta_dtype,grad_dtype,rtol,atol", STEP_CASES)
def test_moreau_step_is_the_pull_and_the_gradient_step_in_place(delta_dtype, grad_dtype, rtol, atol, shape):
    delta, grad = normal(shape, 1, dtype=delta_dtype), normal(shape, 2, dtype=grad_dtype)
    kept, rho, gamma = grad.clone(), 0.2, 0.03
    expected = (1 - gamma / rho) * delta.double() - gamma * grad.double()
    assert moreau_step(delta, grad, rho, gamma) is delta
    close(delta, expected, rtol, atol)
    assert torch.equal(grad, kept)


def test_moreau_step_with_gamma_equal_to_rho_forgets_delta():
    delta, grad = normal((7, 65), 1), normal((7, 65), 2)
    assert torch.equal(moreau_step(delta, grad, 0.05, 0.05), -0.05 * grad)


@pytest.mark.parametrize("dtype,rtol", [(F32, 1e-6), (F64, 1e-14)])
@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
@pytest.mark.parametrize("shape", LINES)
def test_line_norms_are_euclidean_norms_of_rows_or_columns(shape, dim, dtype, rtol):
    # 1e-12: what δ of real models can be; its square is far below the smallest fp16 and above that of fp32.
    for scale in (1.0, 1e-12):
        delta = normal(shape, 3, scale, dtype)
        expected = delta.double().square().sum(dim=1 - dim).sqrt()
        close(line_norms(delta, dim), expected, rtol, 0)


def shrunk(delta, dim, threshold):
    """Group soft-thresholding line by line, in float64 (Eq. 12)."""
    lines = delta.double().unbind(dim)
    norms = [math.sqrt(math.fsum(x * x for x in line.tolist())) for line in lines]
    kept = [
        line * (1 - threshold / norm) if norm > threshold else line * 0.0
        for line, norm in zip(lines, norms, strict=True)
    ]
    return torch.stack(kept, dim), sum(norm <= threshold for norm in norms)


@pytest.mark.parametrize("dtype,rtol,atol", [(F32, 2e-6, 2e-6), (F64, 1e-13, 1e-14)])
@pytest.mark.parametrize("given", [False, True], ids=["own norms", "given norms"])
@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
@pytest.mark.parametrize("shape", [*LINES[:-1], (129, 1025)])
def test_soft_threshold_shrinks_lines_and_zeroes_small_ones(shape, dim, given, dtype, rtol, atol):
    # Lines of widely different norms, so that the threshold falls among them. The tolerance is absolute because
    # 1 − γη/‖δ_S‖ is a difference: next to the threshold it has few digits left.
    spread = torch.linspace(0.2, 2, shape[dim], dtype=F64)
    delta = (normal(shape, 4) * (spread[:, None] if dim == 0 else spread)).to(dtype)
    norms = delta.double().square().sum(dim=1 - dim).sqrt()
    threshold = float(norms.median()) * 1.001 if shape[dim] > 1 else float(norms) * 0.4
    expected, zeros = shrunk(delta, dim, threshold)
    if shape[dim] > 1:
        assert 0 < zeros < shape[dim]
    result = soft_threshold(delta, dim, threshold, line_norms(delta, dim) if given else None)
    assert result == zeros
    close(delta, expected, rtol, atol)
    assert torch.equal(delta == 0, expected == 0)  # exact zeros where the formula has them, nowhere else


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
def test_one_element_lines_are_soft_thresholded_as_scalars(dim, dtype):
    values, threshold = normal(101, 5, dtype=dtype), 0.5
    delta = values.clone().view((-1, 1) if dim == 0 else (1, -1))
    zeros = soft_threshold(delta, dim, threshold)
    scalar = values.double().sign() * (values.double().abs() - threshold).clamp(min=0)
    close(delta.view(-1), scalar, rtol=2e-6 if dtype == F32 else 1e-13, atol=1e-7 if dtype == F32 else 1e-15)
    assert zeros == int((scalar == 0).sum())


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
def test_a_line_whose_norm_equals_the_threshold_becomes_zero(dim, dtype):
    lines = torch.tensor([[3.0, -4.0], [6.0, 8.0]], dtype=dtype)
    delta = lines.clone() if dim == 0 else lines.T.contiguous()
    assert soft_threshold(delta, dim, 5.0) == 1
    expected = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=dtype)
    torch.testing.assert_close(delta if dim == 0 else delta.T, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("threshold", [0.0, 1e-9, 1.0])
@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
def test_zero_lines_stay_zero_without_nan(dim, threshold):
    delta = normal((9, 9), 6, dtype=F32)
    delta.select(dim, 2).zero_()
    delta.select(dim, 8).zero_()
    zeros = soft_threshold(delta, dim, threshold)
    assert torch.isfinite(delta).all()
    assert (delta.select(dim, 2) == 0).all() and (delta.select(dim, 8) == 0).all()
    assert zeros == sum(bool((line == 0).all()) for line in delta.unbind(dim))


def test_a_threshold_of_zero_changes_no_bit():
    delta = normal((65, 63), 7, dtype=F32)
    kept = delta.clone()
    assert soft_threshold(delta, 1, 0.0) == 0
    assert torch.equal(delta, kept)


def test_tiny_norms_are_not_lost():
    # γη of the paper's defaults is 1e-9: its square is 0 in fp16 and 1e-18 in fp32.
    delta = torch.full((2, 4), 1e-9, dtype=F32)
    delta[1] /= 4
    assert soft_threshold(delta, 0, 1e-9) == 1
    torch.testing.assert_close(delta, torch.tensor([[0.5e-9] * 4, [0.0] * 4]), rtol=1e-5, atol=0)


def test_the_moreau_step_and_the_shrinking_make_nothing_of_weight_size():
    delta, grad = normal((1024, 2048), 1, dtype=F32), normal((1024, 2048), 2, dtype=F32)

    def step():
        moreau_step(delta, grad, 0.2, 0.01)
        for dim in (0, 1):
            soft_threshold(delta, dim, 1e-3)

    assert largest_allocation(step) <= delta.nbytes // 64


# --- scores ----------------------------------------------------------------------------------------------------


def plain_terms(form, w, a, fisher):
    """What is summed over a line, in float64."""
    return {
        "first": lambda: (a * w).abs(),
        "second": lambda: (w**2 * fisher).abs(),
        "mix": lambda: (a * w - w**2 * fisher / 2).abs(),
        "vectorize": lambda: a * w,
        "square": lambda: w**2,
    }[form]()


SCORE_SHAPES = ((1, 1), (7, 65), (63, 129), (129, 7), (1, 65), (65, 1), (515, 1025), (3, SCORE_BLOCK + 1))
SCORE_SHAPES += ((SCORE_BLOCK + 3, 1), (2 * SCORE_BLOCK // 64 + 5, 63))
# (weight, g and F, error relative to the sum of the terms' magnitudes). Half-precision weights are exact in fp32.
SCORE_CASES = (
    (F64, F64, 1e-13),
    (F64, F32, 1e-13),
    (F32, F32, 2e-6),
    (F32, F64, 2e-6),
    (BF16, F32, 2e-6),
    (BF16, F64, 2e-6),
    (F16, F32, 2e-6),
)


@pytest.mark.parametrize("shape", SCORE_SHAPES)
@pytest.mark.parametrize("weight_dtype,grad_dtype,error", SCORE_CASES)
def test_line_scores_equal_the_formulas(weight_dtype, grad_dtype, error, shape):
    weight, grad = normal(shape, 1, dtype=weight_dtype), normal(shape, 2, dtype=grad_dtype)
    fisher = normal(shape, 3).square().to(grad_dtype)
    inputs = [weight.clone(), grad.clone(), fisher.clone()]
    for form in FORMS:
        terms = plain_terms(form, weight.double(), grad.double(), fisher.double())
        # mix is a difference: its rounding is that of the two terms it is made of.
        size = (grad.double() * weight.double()).abs() + weight.double() ** 2 * fisher.double() / 2
        size = size if form == "mix" else terms.abs()
        for dim in (0, 1):
            a = grad if form in ("first", "mix", "vectorize") else None
            lines = unit_score(weight, a, dim, form, fisher if form in ("second", "mix") else None)
            expected = terms.sum(dim=1 - dim)
            expected = expected.abs() if form == "vectorize" else expected
            assert lines.dtype == F64 and lines.shape == (shape[dim],)
            assert ((lines - expected).abs() <= error * size.sum(dim=1 - dim)).all(), (form, dim)
    assert all(map(torch.equal, inputs, (weight, grad, fisher)))


def test_first_is_the_default_form():
    weight, grad = normal((7, 65), 1), normal((7, 65), 2)
    assert torch.equal(unit_score(weight, grad, 1), unit_score(weight, grad, 1, "first"))


def test_vectorize_cancels_and_never_exceeds_first():
    weight, grad = normal((63, 65), 1), normal((63, 65), 2)
    weight[0], grad[0, ::2], grad[0, 1::2] = 1.0, 1.0, -1.0
    for dim in (0, 1):
        signed, first = unit_score(weight, grad, dim, "vectorize"), unit_score(weight, grad, dim)
        assert (signed >= 0).all() and (signed <= first * (1 + 1e-12)).all()
    assert abs(unit_score(weight, grad, 0, "vectorize")[0] - 1) < 1e-12


def test_half_precision_weights_neither_overflow_nor_underflow():
    large, small = torch.full((3, 5), 300.0, dtype=F16), torch.full((3, 5), 1e-4, dtype=F16)
    torch.testing.assert_close(unit_score(large, None, 0, "square"), torch.full((3,), 5 * 9e4, dtype=F64))
    expected = (small.double() ** 2 * 1e-12).sum(1)
    fisher = torch.full((3, 5), 1e-12, dtype=F32)
    torch.testing.assert_close(unit_score(small, None, 0, "second", fisher), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
def test_scores_are_the_same_bits_each_time(dim):
    weight, grad = normal((515, 1025), 1, dtype=BF16), normal((515, 1025), 2, dtype=F32)
    assert torch.equal(unit_score(weight, grad, dim), unit_score(weight, grad, dim))


@pytest.mark.parametrize("dtype", [BF16, F32, F64])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
def test_unit_score_makes_nothing_of_weight_size(dim, form, dtype):
    weight, grad = normal((2053, 2048), 1, dtype=dtype), torch.ones(2053, 2048, dtype=F64 if dtype == F64 else F32)
    work = grad.element_size()
    largest = largest_allocation(lambda: unit_score(weight, grad, dim, form, grad))
    assert 0 < largest <= SCORE_BLOCK * work  # a block of float32 for half-precision weights
    assert SCORE_BLOCK * work < weight.numel() * work / 8
