"""The Moreau step and the scores equal plain float64 formulas and make no temporary of weight size."""

import math

import pytest
import torch
from kernel_inputs import BF16, F16, F32, F64, close, largest_allocation, normal
from streamprune.kernels import FORMS, line_norms, moreau_step, soft_threshold, unit_score
from streamprune.kernels.unit_score import BLOCK as SCORE_BLOCK

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")


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
