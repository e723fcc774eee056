"""Products over tokens equal those of float64, and are summed in float32 whatever is multiplied."""

import pytest
import torch
from kernel_inputs import BACKENDS, BF16, DEVICE, F16, F32, F64, largest_allocation, needs_triton, normal

from streamprune.kernels import add_product, gram, mirror
from streamprune.kernels.gram import BLOCK_COLS, BLOCK_ROWS, FEW_COLUMNS, MIRROR_BLOCK, PANEL

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")

# (operands, error relative to the largest element); half precision is multiplied exactly, summed in float32.
DTYPES = [(F64, 1e-13), (F32, 1e-5), (BF16, 1e-5), (F16, 1e-5)]
CASES = [
    *(("torch", dtype, error) for dtype, error in DTYPES),
    *(pytest.param("triton", dtype, 1e-5, marks=needs_triton) for dtype in (BF16, F16)),
]


def sums_of(dtype):
    return F64 if dtype == F64 else F32


def close_to(actual, expected, error):
    assert (actual.double() - expected).abs().max() <= error * expected.abs().max()


@pytest.mark.parametrize("dtype,error", DTYPES)
@pytest.mark.parametrize("tokens,m,n", [(1, 1, 1), (7, 65, 63), (129, 33, 130)])
def test_a_product_is_scaled_and_added(tokens, m, n, dtype, error):
    a, b = normal((tokens, m), 1, dtype=dtype).to(DEVICE), normal((tokens, n), 2, dtype=dtype).to(DEVICE)
    total = normal((m, n), 3, dtype=sums_of(dtype)).to(DEVICE)
    expected = 0.5 * total.double() + 0.25 * (a.double().T @ b.double())
    assert add_product(total, a, b, alpha=0.25, beta=0.5) is total
    close_to(total, expected, error)


@pytest.mark.parametrize("dtype,error", DTYPES)
def test_what_was_there_does_not_count_where_beta_is_0(dtype, error):
    a, b = normal((9, 17), 1, dtype=dtype).to(DEVICE), normal((9, 5), 2, dtype=dtype).to(DEVICE)
    total = torch.full((17, 5), torch.nan, dtype=sums_of(dtype), device=DEVICE)
    close_to(add_product(total, a, b, beta=0.0), a.double().T @ b.double(), error)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_what_is_small_beside_the_sum_is_not_lost(dtype):
    # 4096 micro-batches of 2⁻¹²: a sum in half precision would stay at 1, and so would one of rounded sums.
    total, one = torch.ones(2, 3, device=DEVICE), torch.ones(1, 1, dtype=dtype, device=DEVICE)
    small = one * 2.0**-6
    for _ in range(4096):
        add_product(total, small.expand(1, 2), small.expand(1, 3))
    assert torch.equal(total, torch.full_like(total, 2.0))
    # 2⁻¹⁴ of a product that half precision holds to 2⁻⁸ or 2⁻¹¹.
    mixed = torch.tensor([[1.0], [2.0**-7]], dtype=dtype, device=DEVICE)
    assert float(add_product(torch.zeros(1, 1, device=DEVICE), mixed, mixed)) == 1 + 2.0**-14


@pytest.mark.parametrize("dtype,error", DTYPES)
def test_strided_operands_count_as_they_are(dtype, error):
    wide = normal((40, 90), 1, dtype=dtype).to(DEVICE)
    a, b = wide[3:36, ::2], wide.T.contiguous().T[3:36, 13:76]
    total = torch.zeros(45, 63, dtype=sums_of(dtype), device=DEVICE)
    close_to(add_product(total, a, b), a.double().T @ b.double(), error)


@pytest.mark.parametrize("backend,dtype,error", CASES)
@pytest.mark.parametrize("tokens,columns", [(1, 1), (7, 63), (33, 129), (65, 300), (32, 577)])
def test_the_lower_triangle_of_a_gram_matrix_is_added(tokens, columns, backend, dtype, error):
    x = normal((tokens, columns), 1, dtype=dtype).to(DEVICE)
    total = normal((columns, columns), 2, dtype=sums_of(dtype)).to(DEVICE)
    expected = (total.double() + x.double().T @ x.double()).tril()
    assert gram(total, x, backend=backend) is total
    close_to(total.tril(), expected, error)


@pytest.mark.parametrize("backend,dtype,error", CASES)
def test_a_gram_matrix_of_strided_inputs(backend, dtype, error):
    wide = normal((40, 600), 1, dtype=dtype).to(DEVICE)
    for x in (wide[3:36, 13:313], wide[:, ::2], wide.T.contiguous().T[1:]):
        total = torch.zeros(x.shape[1], x.shape[1], dtype=sums_of(dtype), device=DEVICE)
        close_to(gram(total, x, backend=backend).tril(), (x.double().T @ x.double()).tril(), error)


@needs_triton
def test_tiles_above_the_diagonal_are_not_made():
    columns = 1030  # of two bands of tiles
    total = torch.full((columns, columns), torch.nan, device=DEVICE).triu(1)
    x = normal((3, columns), 1, dtype=BF16).to(DEVICE)
    close_to(gram(total, x, backend="triton").tril(), (x.double().T @ x.double()).tril(), 1e-5)
    row, col = torch.arange(columns)[:, None], torch.arange(columns)
    above = col // BLOCK_COLS * BLOCK_COLS > row // BLOCK_ROWS * BLOCK_ROWS + BLOCK_ROWS - 1
    assert above.any() and total.cpu()[above].isnan().all()


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU's library makes the whole product")
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_panels_above_the_diagonal_are_not_made(dtype):
    columns = 2 * PANEL + 1
    total = torch.full((columns, columns), torch.nan).triu(1)
    x = normal((5, columns), 1, dtype=dtype)
    close_to(gram(total, x).tril(), (x.double().T @ x.double()).tril(), 1e-5)
    third = columns // 3
    assert total[:third, -third:].isnan().all()


@needs_triton
def test_few_columns_take_the_whole_product_unless_told():
    x = normal((2, 64), 1, dtype=BF16).to(DEVICE)
    assert x.shape[1] <= FEW_COLUMNS
    whole = gram(torch.zeros(64, 64, device=DEVICE), x)
    close_to(whole, x.double().T @ x.double(), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_add_nothing(backend):
    total = torch.ones(5, 5, device=DEVICE)
    gram(total, torch.empty(0, 5, dtype=BF16, device=DEVICE), backend=backend)
    add_product(total, *(torch.empty(0, 5, dtype=BF16, device=DEVICE) for _ in range(2)))
    assert torch.equal(total, torch.ones(5, 5, device=DEVICE))


@pytest.mark.parametrize("columns", [1, 5, MIRROR_BLOCK, 2 * MIRROR_BLOCK + 3])
def test_the_upper_triangle_is_the_mirrored_lower_one(columns):
    total = normal((columns, columns), 1, dtype=F32)
    expected = total.tril() + total.tril(-1).T
    total[torch.ones_like(total).triu(1).bool()] = torch.nan
    assert torch.equal(mirror(total), expected)


def test_mirroring_makes_no_second_matrix():
    total = torch.ones(4 * MIRROR_BLOCK, 4 * MIRROR_BLOCK)
    assert largest_allocation(lambda: mirror(total)) <= total.nbytes / 4


def test_wrong_shapes_and_dtypes_are_refused():
    a, b, total = torch.ones(3, 4), torch.ones(3, 5), torch.zeros(4, 5)
    for bad in ((total.T, a, b), (total, b, a), (total, a[:2], b), (total, a.double(), b)):
        with pytest.raises(ValueError, match="wanted"):
            add_product(*bad)
    square = torch.zeros(4, 4)
    for bad in ((square, b), (square[:3], a), (torch.zeros(4, 8)[:, ::2], a), (square, a[None])):
        with pytest.raises(ValueError, match="wanted"):
            gram(*bad)
