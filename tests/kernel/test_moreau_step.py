"""The Moreau step with and without group soft-thresholding equals plain float64 formulas, on both backends."""

import math

import pytest
import torch
from kernel_inputs import (
    BACKENDS,
    BF16,
    BF16_STEP,
    DEVICE,
    F16,
    F32,
    F64,
    close,
    largest_allocation,
    needs_triton,
    normal,
)
from marks import slow

from streamprune.kernels import moreau_step, soft_threshold
from streamprune.kernels.moreau_step import MOST_ELEMENTS

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")

LINES = ((1, 1), (1, 7), (7, 1), (63, 65), (65, 129), (129, 63), (576, 129), (65, 1536), slow((513, 515)))
# (backend, δ, g, rtol, atol)
STEP_CASES = [
    ("torch", F32, F32, 1e-6, 1e-7),
    ("torch", F32, F64, 1e-6, 1e-7),
    ("torch", F64, F64, 1e-14, 1e-16),
    ("torch", F64, F32, 1e-14, 1e-16),
    ("torch", BF16, F32, BF16_STEP, 1e-6),
    ("torch", BF16, BF16, BF16_STEP, 1e-6),
    ("torch", F16, F16, 2**-10.9, 1e-6),
    *(
        pytest.param("triton", *case, marks=needs_triton)
        for case in (
            (F32, F32, 1e-6, 1e-7),
            (F32, BF16, 1e-6, 1e-7),
            (BF16, F32, BF16_STEP, 1e-6),
            (F16, F16, 2**-10.9, 1e-6),
        )
    ),
]


def stepped(delta, grad, rho, gamma):
    return (1 - gamma / rho) * delta.double() - gamma * grad.double()


def zeroed(delta, dim):
    """Number of lines that are zero."""
    return int((delta == 0).all(dim=1 - dim).sum())


def shrunk(delta, dim, threshold):
    """Group soft-thresholding line by line, in float64 (Eq. 12)."""
    lines = delta.double().unbind(dim)
    norms = [math.sqrt(math.fsum(x * x for x in line.tolist())) for line in lines]
    kept = [
        line * (1 - threshold / norm) if norm > threshold else line * 0.0
        for line, norm in zip(lines, norms, strict=True)
    ]
    return torch.stack(kept, dim), torch.tensor(norms, dtype=F64)


@pytest.mark.parametrize("shape", LINES)
@pytest.mark.parametrize("backend,delta_dtype,grad_dtype,rtol,atol", STEP_CASES)
def test_a_step_is_the_pull_and_the_gradient_step_in_place(backend, delta_dtype, grad_dtype, rtol, atol, shape):
    delta = normal(shape, 1, dtype=delta_dtype).to(DEVICE)
    grad = normal(shape, 2, dtype=grad_dtype).to(DEVICE)
    kept, rho, gamma = grad.clone(), 0.2, 0.03
    expected = stepped(delta, grad, rho, gamma)
    step = moreau_step(delta, grad, rho, gamma, backend=backend)
    assert step.delta is delta and step.norms is None
    close(delta, expected, rtol, atol)
    assert torch.equal(grad, kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_first_step_takes_the_memory_of_the_gradient(backend):
    grad = normal((63, 65), 2, dtype=F32).to(DEVICE)
    expected = grad.clone() * -0.03
    step = moreau_step(None, grad, 0.2, 0.03, backend=backend)
    assert step.delta is grad and torch.equal(grad, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gamma_equal_to_rho_forgets_delta(backend):
    delta, grad = (normal((7, 65), seed, dtype=F32).to(DEVICE) for seed in (1, 2))
    assert torch.equal(moreau_step(delta, grad, 0.05, 0.05, backend=backend).delta, -0.05 * grad)


# (backend, dtype, rtol, atol). The tolerance is absolute because 1 − γη/‖δ_S‖ is a difference: next to the threshold
# it has few digits left.
SHRINK_CASES = [
    ("torch", F32, 2e-6, 2e-6),
    ("torch", F64, 1e-13, 1e-14),
    pytest.param("triton", F32, 2e-6, 2e-6, marks=needs_triton),
    pytest.param("triton", BF16, BF16_STEP, 2e-6, marks=needs_triton),
]


@pytest.mark.parametrize("backend,dtype,rtol,atol", SHRINK_CASES)
@pytest.mark.parametrize("has_delta", [True, False], ids=["step", "first step"])
@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
@pytest.mark.parametrize("shape", LINES)
def test_lines_are_shrunk_and_small_ones_zeroed(shape, dim, has_delta, backend, dtype, rtol, atol):
    # Lines of widely different norms, so that the threshold falls among them.
    spread = torch.linspace(0.2, 2, shape[dim], dtype=F64)
    spread = spread[:, None] if dim == 0 else spread
    rho, gamma = 0.2, 0.05
    grad = (normal(shape, 4) * spread).to(dtype).to(DEVICE)
    delta = (normal(shape, 5) * spread * gamma).to(dtype).to(DEVICE)
    before = stepped(delta, grad, rho, gamma) if has_delta else -gamma * grad.double()
    norms = before.square().sum(dim=1 - dim).sqrt().cpu()
    threshold = float(norms.median()) * 1.001 if shape[dim] > 1 else float(norms) * 0.4
    expected, norms = shrunk(before.cpu(), dim, threshold)
    zeros = int((norms <= threshold).sum())
    step = moreau_step(delta if has_delta else None, grad, rho, gamma, dim=dim, threshold=threshold, backend=backend)
    assert zeroed(step.delta, dim) == zeros and (shape[dim] == 1 or 0 < zeros < shape[dim])
    close(step.norms.cpu(), norms, 1e-13 if dtype == F64 else 2e-6, 0)
    close(step.delta.cpu(), expected, rtol, atol)
    # Exact zeros in the lines that go, no other line of them. (A fused multiply-add also leaves 1e-8 of an element
    # where rounded products cancel.)
    assert torch.equal((step.delta.cpu() == 0).all(dim=1 - dim), norms <= threshold)


@needs_triton
@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
def test_strided_operands_give_the_same(dim):
    wide, grads = normal((40, 130), 1, dtype=F32).to(DEVICE), normal((129, 38), 2, dtype=F32).to(DEVICE)
    delta, grad = wide[1:39, 1::1][:, :129], grads.T
    plain = moreau_step(delta.clone(), grad.contiguous(), 0.2, 0.05, dim=dim, threshold=0.3, backend="triton")
    around = wide.clone()
    step = moreau_step(delta, grad, 0.2, 0.05, dim=dim, threshold=0.3, backend="triton")
    # A compiler lays a tile out by its strides, and norms are summed in that order.
    close(step.delta, plain.delta.double(), 2e-6, 2e-6)
    close(step.norms, plain.norms.double(), 2e-6, 0)
    outside = torch.ones_like(wide, dtype=torch.bool)
    outside[1:39, 1:130] = False
    assert torch.equal(wide[outside], around[outside])


@needs_triton
@pytest.mark.parametrize("dim,shape", [(0, (3, MOST_ELEMENTS + 1)), (1, (MOST_ELEMENTS // 4 + 1, 3))])
def test_lines_too_long_for_a_program_take_torch(dim, shape):
    delta, grad = (normal(shape, seed, dtype=F32).to(DEVICE) for seed in (1, 2))
    expected, norms = shrunk(stepped(delta, grad, 0.2, 0.05).cpu(), dim, 1.0)
    step = moreau_step(delta, grad, 0.2, 0.05, dim=dim, threshold=1.0, backend="triton")
    close(step.delta.cpu(), expected, 1e-5, 1e-6)
    close(step.norms.cpu(), norms, 1e-5, 0)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
def test_one_element_lines_are_soft_thresholded_as_scalars(dim, dtype):
    values, threshold = normal(101, 5, dtype=dtype), 0.5
    delta = values.clone().view((-1, 1) if dim == 0 else (1, -1))
    soft_threshold(delta, dim, threshold, values.abs())
    scalar = values.double().sign() * (values.double().abs() - threshold).clamp(min=0)
    close(delta.view(-1), scalar, rtol=2e-6 if dtype == F32 else 1e-13, atol=1e-7 if dtype == F32 else 1e-15)
    assert zeroed(delta, dim) == int((scalar == 0).sum())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
def test_a_line_whose_norm_equals_the_threshold_becomes_zero(dim, backend):
    lines = torch.tensor([[3.0, -4.0], [6.0, 8.0]], device=DEVICE)
    grad = -lines if dim == 0 else -lines.T.contiguous()
    step = moreau_step(None, grad, 1.0, 1.0, dim=dim, threshold=5.0, backend=backend)
    expected = torch.tensor([[0.0, 0.0], [3.0, 4.0]], device=DEVICE)
    assert zeroed(step.delta, dim) == 1
    torch.testing.assert_close(step.delta if dim == 0 else step.delta.T, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threshold", [0.0, 1e-9, 1.0])
@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
def test_zero_lines_stay_zero_without_nan(dim, threshold, backend):
    grad = normal((9, 9), 6, dtype=F32).to(DEVICE)
    grad.select(dim, 2).zero_()
    grad.select(dim, 8).zero_()
    step = moreau_step(None, grad, 1.0, 1.0, dim=dim, threshold=threshold, backend=backend)
    delta = step.delta
    assert torch.isfinite(delta).all()
    assert (delta.select(dim, 2) == 0).all() and (delta.select(dim, 8) == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_threshold_of_zero_changes_no_bit(backend):
    grad = normal((65, 63), 7, dtype=F32).to(DEVICE)
    kept = -grad
    step = moreau_step(None, grad, 1.0, 1.0, dim=1, threshold=0.0, backend=backend)
    assert torch.equal(step.delta, kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tiny_norms_are_not_lost(backend):
    # γη of the paper's defaults is 1e-9: its square is 0 in fp16 and 1e-18 in fp32.
    grad = torch.full((2, 4), -1e-9, device=DEVICE)
    grad[1] /= 4
    step = moreau_step(None, grad, 1.0, 1.0, dim=0, threshold=1e-9, backend=backend)
    expected = torch.tensor([[0.5e-9] * 4, [0.0] * 4], device=DEVICE)
    torch.testing.assert_close(step.delta, expected, rtol=1e-5, atol=0)


def test_a_threshold_from_the_norms_of_a_step_can_follow_it():
    delta, grad = normal((63, 65), 1, dtype=F64), normal((63, 65), 2, dtype=F64)
    before = stepped(delta, grad, 0.2, 0.05)
    threshold = float(before.norm(dim=0).median()) * 1.001
    expected, norms = shrunk(before, 1, threshold)
    step = moreau_step(delta, grad, 0.2, 0.05, dim=1, threshold=0.0)
    assert zeroed(step.delta, 1) == 0
    soft_threshold(step.delta, 1, threshold, step.norms)
    assert zeroed(step.delta, 1) == int((norms <= threshold).sum()) > 0
    close(step.delta, expected, 1e-12, 1e-14)


def test_the_moreau_step_makes_nothing_of_weight_size():
    delta, grad = normal((4096, 4096), 1, dtype=F32), normal((4096, 4096), 2, dtype=F32)

    def step():
        for dim in (0, 1):
            moreau_step(delta, grad, 0.2, 0.01, dim=dim, threshold=1e-3)

    assert largest_allocation(step) <= delta.nbytes // 64  # a block of unit_score's
