"""Weights go in the order of |W|(‖X‖ + α‖G‖): exactly k of a row, exactly M − N of every M, lowest index first."""

import itertools

import pytest
import torch
from kernel_inputs import BACKENDS, BF16, DEVICE, F16, F32, F64, close, largest_allocation, needs_triton, normal
from marks import slow

from streamprune.kernels import prune_n_of_m, prune_rows, weight_score
from streamprune.kernels.weight_score import MOST_COLUMNS, ROW_BLOCK

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")

SHAPES = ((1, 1), (7, 63), (3, 129), (9, 65), (2, 576), (3, 1536), (2, 2050))
DTYPES = (F32, BF16, F16)
TERMS = ("magnitude", "wanda", "gblm", "gradient")
USUAL = ((BF16, "wanda"), (BF16, "gblm"))


def operands(shape, dtype, terms, seed=0):
    """Whole numbers, so that scores are exact in every dtype and many are equal."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-9, 10, shape, generator=generator).to(dtype)
    x_norm = torch.randint(1, 5, shape[1:], generator=generator).float() if terms in ("wanda", "gblm") else None
    grad = torch.randint(0, 4, shape, generator=generator).float() if terms in ("gblm", "gradient") else None
    return [None if tensor is None else tensor.to(DEVICE) for tensor in (weight, x_norm, grad)]


def plain_scores(weight, x_norm, grad, alpha):
    """|W|(‖X‖ + α‖G‖) in float64."""
    factor = torch.zeros(weight.shape, dtype=F64)
    factor += 0 if x_norm is None else x_norm.double().cpu()
    factor += 0 if grad is None else alpha * grad.double().cpu()
    return weight.double().abs().cpu() * (factor if x_norm is not None or grad is not None else 1)


def plainly_pruned(values, scores, count):
    """One list without its `count` lowest scores, the lowest index first among equals."""
    gone = sorted(range(len(values)), key=lambda index: (scores[index], index))[:count]
    return [0.0 if index in set(gone) else value for index, value in enumerate(values)]


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("dtype,rtol", [(F64, 1e-15), (F32, 3e-7), (BF16, 3e-7), (F16, 3e-7)])
@pytest.mark.parametrize("shape", SHAPES)
def test_scores_equal_the_formula(shape, dtype, rtol, terms):
    weight = normal(shape, 1, dtype=dtype)
    x_norm = normal(shape[1], 2).abs().to(F64 if dtype == F64 else F32) if terms in ("wanda", "gblm") else None
    grad = normal(shape, 3).abs().to(F64 if dtype == F64 else F32) if terms in ("gblm", "gradient") else None
    kept = [None if tensor is None else tensor.clone() for tensor in (weight, x_norm, grad)]
    score = weight_score(weight, x_norm, grad, 100.0)
    close(score, plain_scores(weight, x_norm, grad, 100.0), rtol, 0)
    for before, after in zip(kept, (weight, x_norm, grad), strict=True):
        assert before is after or torch.equal(before, after)


# In the interpreter long rows take seconds: some of them, all in slow tests.
ROW_CASES = [
    slow(*case) if max(case[0]) > 500 and case[1:3] not in USUAL else case
    for case in itertools.product(SHAPES, DTYPES, TERMS, BACKENDS)
]


@pytest.mark.parametrize("shape,dtype,terms,backend", ROW_CASES)
def test_exactly_k_of_every_row_go_lowest_index_first(shape, dtype, terms, backend):
    for count in sorted({0, 1, shape[1] // 3, shape[1] // 2, shape[1] - 1, shape[1]} & set(range(shape[1] + 1))):
        weight, x_norm, grad = operands(shape, dtype, terms, seed=count)
        scores = plain_scores(weight, x_norm, grad, 2.0).tolist()
        rows = zip(weight.double().tolist(), scores, strict=True)
        expected = [plainly_pruned(values, row_scores, count) for values, row_scores in rows]
        assert prune_rows(weight, count, x_norm, grad, 2.0, backend=backend) is weight
        assert weight.double().tolist() == expected


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n,m", [(2, 4), (4, 8), (1, 4), (0, 2), (4, 4), (3, 6), (1, 1), (8, 16)])
def test_exactly_n_of_every_m_stay(n, m, dtype, terms, backend):
    for rows, groups in ((1, 1), (3, 65), (7, 257)):
        weight, x_norm, grad = operands((rows, groups * m), dtype, terms, seed=groups)
        scores = plain_scores(weight, x_norm, grad, 2.0).view(-1, m).tolist()
        parts = zip(weight.double().view(-1, m).tolist(), scores, strict=True)
        expected = [plainly_pruned(values, part_scores, m - n) for values, part_scores in parts]
        assert prune_n_of_m(weight, n, m, x_norm, grad, 2.0, backend=backend) is weight
        assert weight.double().view(-1, m).tolist() == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_real_scores_lose_the_lowest(backend):
    weight, x_norm = normal((17, 1537), 1, dtype=F32).to(DEVICE), normal(1537, 2).abs().float().to(DEVICE)
    grad = (normal((17, 1537), 3).abs() * 1e-3).float().to(DEVICE)
    scores = plain_scores(weight, x_norm, grad, 100.0)
    pruned = prune_rows(weight.clone(), 700, x_norm, grad, 100.0, backend=backend).cpu()
    gone = pruned == 0
    assert (gone.sum(1) == 700).all()
    assert torch.equal(pruned[~gone], weight.cpu()[~gone])
    # To rounding: a sum in float32 may order two scores that are equal to 7 digits either way.
    worst_gone, best_kept = scores.where(gone, 0).amax(1), scores.where(~gone, torch.inf).amin(1)
    assert (worst_gone <= best_kept * (1 + 1e-6)).all()


@needs_triton
def test_strided_weights_are_pruned_where_they_lie():
    whole = normal((12, 150), 1, dtype=F32).to(DEVICE)
    grad = normal((64, 10), 2).abs().float().to(DEVICE).T
    for run in (
        lambda w: prune_rows(w, 30, None, grad, 1.0, backend="triton"),
        lambda w: prune_n_of_m(w, 2, 4, None, grad, 1.0, backend="triton"),
    ):
        around = whole.clone()
        part = around[1:11, 2:130:2]
        expected = run(part.contiguous())
        run(part)
        assert torch.equal(part, expected)
        untouched = torch.ones_like(whole, dtype=torch.bool)
        untouched[1:11, 2:130:2] = False
        assert torch.equal(around[untouched], whole[untouched])


@needs_triton
def test_rows_too_long_for_a_program_take_torch():
    weight = normal((2, MOST_COLUMNS + 1), 1, dtype=F32).to(DEVICE)
    expected = prune_rows(weight.clone(), 1000, backend="torch")
    assert torch.equal(prune_rows(weight, 1000, backend="triton"), expected)


@pytest.mark.parametrize("count", [-1, 66])
def test_an_impossible_count_is_refused(count):
    with pytest.raises(ValueError, match=f"{count} weights cannot go from rows of 65"):
        prune_rows(torch.ones(3, 65), count)


@pytest.mark.parametrize("n,m", [(2, 5), (5, 4), (-1, 4), (0, 0)])
def test_an_impossible_pattern_is_refused(n, m):
    with pytest.raises(ValueError, match=f"{n} of {m}"):
        prune_n_of_m(torch.ones(3, 64), n, m)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_weights_stay(backend):
    assert prune_rows(torch.ones(0, 8, device=DEVICE), 4, backend=backend).shape == (0, 8)
    assert prune_n_of_m(torch.ones(0, 8, device=DEVICE), 2, 4, backend=backend).shape == (0, 8)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_scores_take_one_buffer_and_pruning_none_of_weight_size(dtype):
    weight, grad, x_norm = normal((1024, 2048), 1, dtype=dtype), torch.ones(1024, 2048), torch.ones(2048)
    assert largest_allocation(lambda: weight_score(weight, x_norm, grad, 2.0)) == grad.nbytes
    # Blocks of rows: a float32 score, and kthvalue's and cumsum's int64.
    for run in (lambda: prune_rows(weight, 1000, x_norm, grad, 2.0), lambda: prune_n_of_m(weight, 2, 4, x_norm)):
        assert largest_allocation(run) <= ROW_BLOCK * 8 < grad.nbytes
