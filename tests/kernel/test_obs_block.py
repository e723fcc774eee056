"""A block of SparseGPT's columns is pruned and updated as Algorithm 1 of arXiv 2301.00774 says, in float64 by rows."""

import pytest
import torch
from kernel_inputs import BACKENDS, DEVICE, F32, F64, close, needs_triton, normal

from streamprune.kernels.obs_block import BLOCK_COLUMNS, obs_block

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")

SHAPES = ((1, 1), (5, 7), (33, 128), (70, 30), (9, 127))  # rows, columns
PATTERNS = ((2, 4), (1, 4), (0, 2), (4, 4), (1, 2), (4, 8), (5, 16), (3, 6), (1, 1))


def upper(columns, seed=0):
    """U with a diagonal that is not 1; what is below it must not be read."""
    factor = normal((columns, columns), seed, columns**-0.5, F32).triu_(1)
    factor += torch.diag(normal(columns, seed + 1).abs().add(0.5).float())
    return (factor + torch.full_like(factor, torch.nan).tril_(-1)).to(DEVICE)


def plain_row(weight, factor, goes):
    """The row and its errors, a number at a time; `goes` says whether w_j goes, of j and the row as it then is."""
    weight, errors = list(weight), []
    for j, line in enumerate(factor):
        error = weight[j] / line[j] if goes(j, weight) else 0.0
        for k in range(j + 1, len(weight)):
            weight[k] -= line[k] * error
        if goes(j, weight):
            weight[j] = 0.0
        errors.append(error)
    return weight, errors


def lowest_of_m(factor, n, m):
    """Whether column j is among the m − n lowest of its group, as the row was when the group began."""
    diagonal, chosen = factor.diagonal().double().tolist(), {}

    def goes(j, weight):
        if j % m == 0:
            group = range(j, j + m)
            chosen.setdefault(j, sorted(group, key=lambda c: ((weight[c] / diagonal[c]) ** 2, c))[: m - n])
        return j in chosen[j // m * m]

    return goes


def plain(weight, factor, goes_of):
    """(W, e) [columns, rows] in float64; `goes_of` makes a row's `goes`."""
    factor = factor.double().tolist()
    rows = [plain_row(row, factor, goes_of(index)) for index, row in enumerate(weight.T.double().cpu().tolist())]
    return [torch.tensor(side, dtype=F64).T for side in zip(*rows, strict=True)]


def check(weight, factor, expected, *arguments, **options):
    errors = obs_block(weight, factor, *arguments, **options)
    assert torch.equal(weight.cpu() == 0, expected[0] == 0) and torch.equal(errors.cpu() == 0, expected[1] == 0)
    close(weight.cpu(), expected[0], 1e-5, 1e-5)
    close(errors.cpu(), expected[1], 1e-5, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("part", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rows,columns", SHAPES)
def test_the_lowest_of_the_block_go_and_the_columns_behind_make_up_for_them(rows, columns, part, backend):
    weight, factor, count = normal((columns, rows), 2, dtype=F32).to(DEVICE), upper(columns), int(part * rows * columns)
    scores = (weight.double() / factor.double().diagonal()[:, None]).square().flatten().tolist()
    gone = set(sorted(range(rows * columns), key=scores.__getitem__)[:count])
    expected = plain(weight, factor, lambda row: lambda j, _: j * rows + row in gone)
    check(weight, factor, expected, count, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n,m", PATTERNS)
def test_of_every_m_the_lowest_go_as_they_are_when_their_turn_comes(n, m, backend):
    for rows, groups in ((1, 1), (67, 3)):
        weight, factor = normal((groups * m, rows), rows, dtype=F32).to(DEVICE), upper(groups * m)
        expected = plain(weight, factor, lambda _, u=factor: lowest_of_m(u, n, m))
        check(weight, factor, expected, 0, n, m, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n,m", [(2, 4), (3, 8)])
def test_of_equal_scores_the_lowest_index_goes_first(n, m, backend):
    weight = torch.randint(-2, 3, (8 * m, 40), generator=torch.Generator().manual_seed(1)).float().to(DEVICE)
    scores = weight.T.reshape(-1, m).square().tolist()
    gone = [sorted(range(m), key=lambda place, each=each: (each[place], place))[: m - n] for each in scores]
    expected = weight.T.reshape(-1, m).clone()
    for group, places in zip(expected, gone, strict=True):
        group[places] = 0
    obs_block(weight, torch.eye(8 * m, device=DEVICE), 0, n, m, backend=backend)
    assert torch.equal(weight, expected.view(40, -1).T)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [1, 100, 250])
def test_of_equal_scores_in_a_block_exactly_so_many_go_the_first_of_them(count, backend):
    weight = torch.randint(-2, 3, (16, 20), generator=torch.Generator().manual_seed(1)).float().to(DEVICE)
    values = weight.flatten().tolist()
    gone = sorted(range(320), key=lambda place: (values[place] ** 2, place))[:count]
    expected = weight.flatten().index_fill(0, torch.tensor(gone, device=DEVICE), 0).view(16, 20)
    obs_block(weight, torch.eye(16, device=DEVICE), count, backend=backend)
    assert torch.equal(weight, expected)


@needs_triton
def test_a_block_lies_among_others_and_its_factor_anywhere():
    work, whole = normal((96, 45), 1, dtype=F32).to(DEVICE), upper(96)
    before, part = work.clone(), slice(32, 64)
    expected = obs_block(before[part].clone(), whole[part, part], 0, 2, 4, backend="torch")
    errors = obs_block(work[part], whole.T.contiguous().T[part, part], 0, 2, 4, backend="triton")
    close(errors, expected.double(), 1e-5, 1e-5)
    assert torch.equal(work[:32], before[:32]) and torch.equal(work[64:], before[64:])


@needs_triton
def test_wider_blocks_and_float64_take_torch():
    for columns, dtype in ((BLOCK_COLUMNS + 4, F32), (8, F64)):
        weight, factor = normal((columns, 5), 1, dtype=dtype).to(DEVICE), upper(columns).to(dtype)
        expected = weight.clone()
        errors = obs_block(expected, factor, 0, 2, 4, backend="torch")
        assert torch.equal(obs_block(weight, factor, 0, 2, 4, backend="triton"), errors)
        assert torch.equal(weight, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_are_no_work(backend):
    assert obs_block(torch.ones(8, 0, device=DEVICE), upper(8), 0, 2, 4, backend=backend).shape == (8, 0)


def test_operands_that_do_not_fit_are_refused():
    weight, factor = torch.ones(8, 3), torch.eye(8)
    with pytest.raises(ValueError, match=r"weight \[8, 3\], factor \[7, 7\]"):
        obs_block(weight, torch.eye(7), 1)
    with pytest.raises(ValueError, match="2 of 3 cannot be kept in 8 columns"):
        obs_block(weight, factor, 0, 2, 3)
    with pytest.raises(ValueError, match="25 weights cannot go from a block of 24"):
        obs_block(weight, factor, 25)
    with pytest.raises(ValueError, match="weight must be contiguous"):
        obs_block(torch.ones(3, 8).T, factor, 1)
    with pytest.raises(ValueError, match=r"torch\.float64 and factor torch\.float32 of one dtype"):
        obs_block(weight.double(), factor, 1)
