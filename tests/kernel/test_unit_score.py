"""Scores of lines equal plain float64 formulas, on both backends, and make no temporary of weight size."""

import pytest
import torch
from kernel_inputs import BACKENDS, BF16, DEVICE, F16, F32, F64, largest_allocation, needs_triton, normal
from marks import slow

from streamprune.kernels import unit_score
from streamprune.kernels.unit_score import SCORE_BLOCK

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")


def plain_terms(form, w, a, fisher):
    """What is summed over a line, in float64."""
    return {
        "first": lambda: (a * w).abs(),
        "second": lambda: (w**2 * fisher).abs(),
        "mix": lambda: (a * w - w**2 * fisher / 2).abs(),
        "vectorize": lambda: a * w,
        "square": lambda: w**2,
    }[form]()


FORMS = ("first", "second", "mix", "vectorize", "square")
SHAPES = ((1, 1), (7, 65), (63, 129), (129, 7), (1, 65), (65, 1), (576, 129), (129, 1536), (515, 131))
BLOCK_SHAPES = ((3, SCORE_BLOCK + 1), (SCORE_BLOCK + 3, 1), (2 * SCORE_BLOCK // 64 + 5, 63))
# (weight, g and F, error relative to the sum of the terms' magnitudes). Half-precision weights are exact in float32.
TORCH_CASES = (
    (F64, F64, 1e-13),
    (F64, F32, 1e-13),
    (F32, F32, 2e-6),
    (F32, F64, 2e-6),
    (BF16, F32, 2e-6),
    (BF16, F64, 2e-6),
    (F16, F32, 2e-6),
)
TRITON_CASES = ((F32, F32, 2e-6), (BF16, F32, 2e-6), (F16, F32, 2e-6), (BF16, BF16, 2e-6))


@pytest.mark.parametrize("weight_dtype,grad_dtype,error", TORCH_CASES)
@pytest.mark.parametrize("shape", [*SHAPES, *BLOCK_SHAPES])
def test_line_scores_equal_the_formulas(weight_dtype, grad_dtype, error, shape):
    check_scores("torch", weight_dtype, grad_dtype, error, shape)


# In the interpreter a program of many blocks takes seconds: of these one dtype each, which smaller shapes have all.
MANY_BLOCKS = (slow((576, 129), BF16, BF16, 2e-6), slow((129, 1536), F16, F32, 2e-6), ((515, 131), BF16, F32, 2e-6))
KERNEL_CASES = [(shape, *case) for shape in SHAPES if max(shape) <= 500 for case in TRITON_CASES] + [*MANY_BLOCKS]


@needs_triton
@pytest.mark.parametrize("shape,weight_dtype,grad_dtype,error", KERNEL_CASES)
def test_line_scores_of_the_kernel_equal_the_formulas(weight_dtype, grad_dtype, error, shape):
    check_scores("triton", weight_dtype, grad_dtype, error, shape)


def check_scores(backend, weight_dtype, grad_dtype, error, shape):
    weight, grad = normal(shape, 1, dtype=weight_dtype).to(DEVICE), normal(shape, 2, dtype=grad_dtype).to(DEVICE)
    fisher = normal(shape, 3).square().to(grad_dtype).to(DEVICE)
    inputs = [weight.clone(), grad.clone(), fisher.clone()]
    for form in FORMS:
        terms = plain_terms(form, weight.double(), grad.double(), fisher.double())
        # mix is a difference: its rounding is that of the two terms it is made of.
        size = (grad.double() * weight.double()).abs() + weight.double() ** 2 * fisher.double() / 2
        size = size if form == "mix" else terms.abs()
        for dim in (0, 1):
            a = grad if form in ("first", "mix", "vectorize") else None
            lines = unit_score(weight, a, dim, form, fisher if form in ("second", "mix") else None, backend=backend)
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
def test_scores_are_the_same_bits_each_time(dim, backend):
    weight, grad = normal((515, 131), 1, dtype=BF16).to(DEVICE), normal((515, 131), 2, dtype=F32).to(DEVICE)
    first, second = (unit_score(weight, grad, dim, backend=backend) for _ in range(2))
    assert torch.equal(first, second)


@needs_triton
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
def test_strided_operands_give_the_same_scores(dim, form):
    weight = normal((130, 70), 1, dtype=BF16).to(DEVICE)[1:, 3:68]  # [129, 65]
    grad, fisher = normal((65, 129), 2, dtype=F32).to(DEVICE).T, normal((129, 130), 3, dtype=F32).to(DEVICE)[:, ::2]
    plain = unit_score(weight.contiguous(), grad.contiguous(), dim, form, fisher.contiguous(), backend="triton")
    # Strides decide which thread sums what, so only the interpreter gives the same bits.
    strided = unit_score(weight, grad, dim, form, fisher, backend="triton")
    torch.testing.assert_close(strided, plain, rtol=0 if DEVICE == "cpu" else 1e-5, atol=0)


@pytest.mark.parametrize("dtype", [BF16, F32, F64])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
def test_unit_score_makes_nothing_of_weight_size(dim, form, dtype):
    weight, grad = normal((2053, 2048), 1, dtype=dtype), torch.ones(2053, 2048, dtype=F64 if dtype == F64 else F32)
    work = grad.element_size()
    largest = largest_allocation(lambda: unit_score(weight, grad, dim, form, grad))
    assert 0 < largest <= SCORE_BLOCK * work  # a block of float32 for half-precision weights
    assert SCORE_BLOCK * work < weight.numel() * work / 8
