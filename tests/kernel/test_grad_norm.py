"""Norms over per-sample gradients equal those of gradients that float64 autograd makes one by one."""

import pytest
import torch
from kernel_inputs import BACKENDS, BF16, DEVICE, F16, F32, F64, largest_allocation, needs_triton, normal

from streamprune.kernels import grad_norm

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")

# (samples, tokens, d_in, d_out)
SHAPES = ((1, 1, 1, 1), (3, 7, 63, 65), (2, 65, 129, 7), (5, 33, 130, 129), (1, 129, 65, 192), (2, 32, 576, 128))
# (backend, X and dY, error relative to the largest element); half precision is multiplied exactly, summed in float32.
CASES = [
    ("torch", F64, 1e-13),
    ("torch", F32, 1e-5),
    ("torch", BF16, 1e-5),
    ("torch", F16, 1e-5),
    *(pytest.param("triton", dtype, 1e-5, marks=needs_triton) for dtype in (BF16, F16)),
]


def per_sample_gradients(x, dy):
    """∂/∂W Σ_t ⟨dY_t, X_t Wᵀ⟩ of each sample [samples, d_out, d_in], by autograd in float64."""
    gradients = []
    for inputs, ends in zip(x.double(), dy.double(), strict=True):
        weight = torch.zeros(dy.shape[2], x.shape[2], dtype=F64, device=x.device, requires_grad=True)
        (torch.nn.functional.linear(inputs, weight) * ends).sum().backward()
        gradients.append(weight.grad)
    return torch.stack(gradients)


def expected_sum(x, dy, power):
    gradients = per_sample_gradients(x, dy)
    return (gradients.abs() ** power if power else gradients).sum(0)


@pytest.mark.parametrize("power", [0, 1, 2])
@pytest.mark.parametrize("backend,dtype,error", CASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_powers_are_summed_over_samples_and_added(shape, backend, dtype, error, power):
    samples, tokens, d_in, d_out = shape
    x, dy = normal((samples, tokens, d_in), 1, dtype=dtype), normal((samples, tokens, d_out), 2, dtype=dtype)
    x, dy = x.to(DEVICE), dy.to(DEVICE)
    acc = normal((d_out, d_in), 3, dtype=F64 if dtype == F64 else F32).to(DEVICE)
    expected = acc.double() + expected_sum(x, dy, power)
    assert grad_norm(acc, x, dy, power, backend=backend) is acc
    assert (acc.double() - expected).abs().max() <= error * expected.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("power", [0, 1, 2])
def test_strided_ends_count_as_they_are(power, backend):
    wide = normal((4, 40, 90), 1, dtype=BF16).to(DEVICE)
    x, dy = wide[:, 3:36, :65], wide.flip(1)[:, 3:36, 13:76].transpose(0, 1).contiguous().transpose(0, 1)
    assert not x.is_contiguous() and not dy.is_contiguous()
    acc = torch.zeros(63, 65, device=DEVICE)
    expected = expected_sum(x, dy, power)
    grad_norm(acc, x, dy, power, backend=backend)
    assert (acc.double() - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_identity_12_norms_of_one_sample_and_of_doubled_data(backend):
    x, dy = normal((3, 9, 33), 1, dtype=BF16).to(DEVICE), normal((3, 9, 17), 2, dtype=BF16).to(DEVICE)

    def norm(power, x, dy):
        total = grad_norm(torch.zeros(17, 33, device=DEVICE), x, dy, power, backend=backend)
        return total.sqrt() if power == 2 else total

    one = [norm(power, x[:1], dy[:1]) for power in (0, 1, 2)]
    torch.testing.assert_close(one[1], one[0].abs(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one[2], one[0].abs(), rtol=1e-5, atol=1e-5)
    signed, l1, l2 = (norm(power, x, dy) for power in (0, 1, 2))
    slack = 1e-4
    assert (signed.abs() <= l1 + slack).all() and (l2 <= l1 + slack).all() and (l1 <= 3**0.5 * l2 + slack).all()
    twice = [torch.cat([ends, ends]) for ends in (x, dy)]
    torch.testing.assert_close(norm(1, *twice), 2 * l1, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm(2, *twice), 2**0.5 * l2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_half_precision_gradients_are_neither_lost_nor_overflow(backend):
    # 4096 samples of 0.5 and products around 1e-8: sums in float16 would stop at 1024 and at 0.
    x = torch.full((2, 64, 4), 1e-4, dtype=F16, device=DEVICE)
    dy = torch.full((2, 64, 4), 1e-4, dtype=F16, device=DEVICE)
    expected = 2 * 64 * float(x[0, 0, 0]) * float(dy[0, 0, 0])
    acc = grad_norm(torch.zeros(4, 4, device=DEVICE), x, dy, 1, backend=backend)
    torch.testing.assert_close(acc, torch.full_like(acc, expected), rtol=1e-5, atol=0)
    large = torch.full((2, 64, 4), 200.0, dtype=F16, device=DEVICE)
    acc = grad_norm(torch.zeros(4, 4, device=DEVICE), large, large, 2, backend=backend)
    torch.testing.assert_close(acc, torch.full_like(acc, 2 * (64 * 4e4) ** 2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("samples,tokens", [(0, 5), (2, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_adds_nothing(samples, tokens, backend):
    acc = torch.ones(3, 4, device=DEVICE)
    for power in (0, 1, 2):
        x, dy = (torch.empty(samples, tokens, width, dtype=BF16, device=DEVICE) for width in (4, 3))
        grad_norm(acc, x, dy, power, backend=backend)
    assert torch.equal(acc, torch.ones(3, 4, device=DEVICE))


def test_wrong_shapes_and_powers_are_refused():
    x, dy, acc = torch.ones(2, 3, 4), torch.ones(2, 3, 5), torch.zeros(5, 4)
    with pytest.raises(ValueError, match="power 3"):
        grad_norm(acc, x, dy, 3)
    for bad in (
        (acc.T, x, dy),
        (acc, dy, x),
        (acc, x[:1], dy),
        (acc, x, dy[:, :2]),
        (acc, x.double(), dy),
        (torch.zeros(4, 5).T, x, dy),
    ):
        with pytest.raises(ValueError, match="acc"):
            grad_norm(*bad, 1)


@pytest.mark.parametrize("power,most", [(0, 0), (1, 1), (2, 1)])
def test_the_torch_side_holds_one_gradient_at_a_time(power, most):
    x, dy, acc = normal((4, 8, 1024), 1, dtype=F32), normal((4, 8, 1024), 2, dtype=F32), torch.zeros(1024, 1024)
    largest = largest_allocation(lambda: grad_norm(acc, x, dy, power))
    assert largest <= max(most * acc.nbytes, x.nbytes)
