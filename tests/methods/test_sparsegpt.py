"""SparseGPT: identities of its update, and the streamed method against the published algorithm column by column."""

from types import SimpleNamespace

import pytest
import torch
from plain_methods import LAYERS
from plain_weights import TinyWeights, assert_same_weights, check_zeros, whole

from streamprune.errors import StreampruneError
from streamprune.methods.sinks import Sparsity
from streamprune.methods.sparsegpt import COLUMN_BLOCK, LEAF, inverse_factor, prune_and_update

F64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def inputs(columns, tokens=200, seed=0):
    """Correlated inputs [tokens, columns] of different sizes."""
    mix = normal(columns, columns, seed=seed + 1) / columns**0.5 + torch.eye(columns, dtype=F64)
    return normal(tokens, columns, seed=seed) @ mix * torch.linspace(0.5, 2, columns, dtype=F64)


def hessian(x, samples=1):
    """H = (2/N) Σ x xᵀ, token by token."""
    return sum(torch.outer(token, token) for token in x) * (2 / samples)


def prune(weight, h, sparsity, block=COLUMN_BLOCK, damp=0.0):
    dead = h.diagonal() == 0
    return prune_and_update(weight, inverse_factor(h.clone(), damp), dead, sparsity, block)


def plain_sparsegpt(weight, h, sparsity, block=128, damp=0.01):
    """The new W and its loss by Algorithm 1 of arXiv 2301.00774, naively: a column at a time over all of the row, with
    inverses of what is left.

    U_jj² of the upper Cholesky factor of H⁻¹ is [(H_{j:,j:})⁻¹]_00, and row j of U over U_jj is that inverse's first
    row over its corner. `h` is (2/N) Σ x xᵀ, undamped.
    """
    weight, h, (rows, columns) = weight.clone(), h.clone(), weight.shape
    for j in range(columns):
        if h[j, j] == 0:
            h[j, j], weight[:, j] = 1, 0
    h += damp * h.diagonal().mean() * torch.eye(columns, dtype=F64)
    left = [torch.linalg.inv(h[j:, j:]) for j in range(columns)]
    gone, loss = torch.zeros(rows, columns, dtype=torch.bool), 0.0
    for j in range(columns):
        size = sparsity.m or block
        if j % size == 0:
            stop = min(j + size, columns)
            scores = torch.stack([weight[:, c] ** 2 / left[c][0, 0] for c in range(j, stop)], dim=1)
            if sparsity.m:
                for row in range(rows):
                    order = sorted(range(size), key=lambda place: (float(scores[row, place]), place))
                    for place in order[: size - sparsity.n]:
                        gone[row, j + place] = True
            else:
                places = [(float(scores[r, c]), c, r) for r in range(rows) for c in range(stop - j)]
                count = whole(sparsity.ratio * stop * rows) - whole(sparsity.ratio * j * rows)
                for _, c, r in sorted(places)[:count]:
                    gone[r, j + c] = True
        error = torch.where(gone[:, j], weight[:, j] / left[j][0, 0], 0)
        loss += float(error.square().sum() * left[j][0, 0]) / 2  # Σ e²/2 of e = (w − q)/U_jj
        weight[:, j:] -= torch.outer(error, left[j][0])
        weight[gone[:, j], j] = 0
    return weight, loss


# Identities; the numbers are those of the method notes.


def test_21_a_diagonal_h_updates_nothing_and_orders_by_w_sqrt_h():
    weight, diagonal = normal(7, 20), normal(20, seed=1).square() + 0.1
    pruned = prune(weight, torch.diag(diagonal), Sparsity(0.3), block=8)
    gone = torch.zeros(7, 20, dtype=torch.bool)
    for start, stop in ((0, 8), (8, 16), (16, 20)):
        scores = (weight[:, start:stop].abs() * diagonal[start:stop].sqrt()).T.flatten()
        count = whole(0.3 * stop * 7) - whole(0.3 * start * 7)
        order = sorted(range(len(scores)), key=lambda place: (float(scores[place]), place))
        for place in order[:count]:
            gone[place % 7, start + place // 7] = True
    assert torch.equal(pruned == 0, gone)
    assert torch.equal(pruned[~gone], weight[~gone])


@pytest.mark.parametrize("n,m", [(2, 4), (1, 4)])
def test_21_a_diagonal_h_in_groups_of_m(n, m):
    weight, diagonal = normal(7, 20), normal(20, seed=1).square() + 0.1
    pruned = prune(weight, torch.diag(diagonal), Sparsity(0.5, n, m), block=8)
    scores = (weight.abs() * diagonal.sqrt()).view(7, -1, m)
    stays = torch.zeros(7, 5, m, dtype=torch.bool).scatter_(2, scores.topk(n, dim=2).indices, True).view(7, 20)
    assert torch.equal(pruned, weight * stays)


def forced(rows, columns, seed=0):
    """(W, mask of what goes): in every column half of the rows are so small that no block can choose others."""
    goes = torch.stack(
        [torch.randperm(rows, generator=torch.Generator().manual_seed(c)) < rows // 2 for c in range(columns)], 1
    )
    weight = normal(rows, columns, seed=seed)
    weight = weight.sign() * (1 + weight.abs())
    return torch.where(goes, weight * 1e-3, weight), goes


def test_22_with_a_fixed_mask_the_block_size_has_no_effect():
    weight, goes = forced(10, 48)
    h = hessian(inputs(48))
    results = [prune(weight, h, Sparsity(0.5), block) for block in (1, 3, 8, 47, 48, 128)]
    change = (results[0] - weight)[~goes].abs().max()
    assert change > 1e-4, "there is an update to compare"
    for pruned in results:
        assert torch.equal(pruned == 0, goes)
        assert (pruned - results[0]).abs().max() < 1e-9 * change


def test_22_groups_of_m_are_chosen_alike_in_every_block_size():
    weight, h = normal(10, 48), hessian(inputs(48))
    first = prune(weight, h, Sparsity(0.5, 2, 4), 4)
    for block in (1, 8, 12, 44, 128):  # 1 is rounded up to M
        torch.testing.assert_close(prune(weight, h, Sparsity(0.5, 2, 4), block), first, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("block", [1, 5, 128])
@pytest.mark.parametrize("prefix", [1, 6, 15])
def test_23_a_column_prefix_is_pruned_to_the_exact_least_squares(prefix, block):
    rows, columns = 6, 20
    x, weight = inputs(columns), normal(rows, columns)
    weight = weight.sign() * (1 + weight.abs())
    weight[:, :prefix] *= 1e-3  # the lowest of a block that the prefix ends in
    first = SimpleNamespace(n=0, m=0, count=lambda elements: min(elements, prefix * rows))
    h, stays = hessian(x), slice(prefix, None)
    pruned = prune(weight, h, first, block)
    assert (pruned[:, :prefix] == 0).all()
    expected = weight @ h[:, stays] @ torch.linalg.inv(h[stays, stays])
    assert (expected - weight[:, stays]).abs().max() > 1e-5
    torch.testing.assert_close(pruned[:, stays], expected, rtol=1e-9, atol=1e-11)
    # That is what torch's own least squares finds.
    solved = torch.linalg.lstsq(x[:, stays], x @ weight.T).solution.T
    torch.testing.assert_close(pruned[:, stays], solved, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("samples", [1, 8])
@pytest.mark.parametrize("sparsity", [Sparsity(0.5), Sparsity(0.2), Sparsity(0.5, 2, 4)], ids=str)
def test_24_undamped_losses_are_the_error_of_the_output(sparsity, samples):
    x, weight = inputs(40, tokens=320), normal(9, 40)
    h = hessian(x, samples)
    pruned = prune(weight, h, sparsity, block=16)
    _, loss = plain_sparsegpt(weight, h, sparsity, block=16, damp=0.0)
    error = float((x @ (pruned - weight).T).square().sum()) / samples
    assert error > 0.1 and abs(loss / error - 1) < 1e-9


@pytest.mark.parametrize("sparsity", [Sparsity(0.5), Sparsity(0.5, 2, 4)], ids=str)
def test_what_remains_puts_out_less_error_for_the_update(sparsity):
    x, weight = inputs(40), normal(9, 40)
    pruned = prune(weight, hessian(x), sparsity, block=16, damp=0.01)
    masked = torch.where(pruned == 0, 0, weight)
    error, without = (float((x @ (made - weight).T).square().sum()) for made in (pruned, masked))
    assert error < 0.85 * without


# The update alone, against the plain one.


@pytest.mark.parametrize(
    "sparsity", [Sparsity(0.5), Sparsity(0.29), Sparsity(0.9), Sparsity(0.5, 2, 4), Sparsity(0.25, 3, 4)], ids=str
)
@pytest.mark.parametrize("block", [8, 20, 128])
def test_the_update_equals_the_algorithm_column_by_column(block, sparsity):
    weight, h = normal(11, 44), hessian(inputs(44), samples=8)
    pruned = prune(weight, h, sparsity, block, damp=0.01)
    expected, _ = plain_sparsegpt(weight, h, sparsity, block, damp=0.01)
    assert torch.equal(pruned == 0, expected == 0)
    torch.testing.assert_close(pruned, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("ratio", [0.1, 0.29, 0.5, 0.77])
def test_exactly_k_go_from_every_block(ratio):
    rows, columns, block = 7, 100, 16
    pruned = prune(normal(rows, columns), hessian(inputs(columns)), Sparsity(ratio), block, damp=0.01)
    gone = (pruned == 0).sum(0)
    assert int(gone.sum()) == whole(ratio * rows * columns)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        count = whole(ratio * rows * stop) - whole(ratio * rows * start)
        assert int(gone[start:stop].sum()) == count
        assert abs(count - ratio * rows * (stop - start)) < 1


def test_of_equal_scores_exactly_k_go():
    weight, h = torch.ones(5, 12, dtype=F64), torch.eye(12, dtype=F64)
    weight[:, ::2] = -1
    assert int((prune(weight, h, Sparsity(0.45), block=4) == 0).sum()) == 27
    pruned = prune(weight, h, Sparsity(0.5, 1, 4))
    assert torch.equal(pruned != 0, torch.arange(12).expand(5, 12) % 4 == 3), "the lowest indices go"


def test_dead_inputs_lose_their_weights_and_move_no_others():
    x, weight, alive = inputs(16), normal(5, 16), torch.ones(16, dtype=torch.bool)
    x[:, [0, 7, 11]], alive[[0, 7, 11]] = 0, False
    pruned = prune(weight, hessian(x), Sparsity(0.5), damp=0.01)
    assert (pruned[:, ~alive] == 0).all() and int((pruned == 0).sum()) == 40
    expected, _ = plain_sparsegpt(weight, hessian(x), Sparsity(0.5))
    torch.testing.assert_close(pruned, expected, rtol=1e-9, atol=1e-11)
    # They score 0 and go first; the rest is as if they were not there, but for the mean that λ is relative to.
    undamped = prune(weight, hessian(x), Sparsity(0.5))
    without = prune(weight[:, alive], hessian(x[:, alive]), Sparsity(25 / 65))
    torch.testing.assert_close(undamped[:, alive], without, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("seed", range(4))
def test_a_singular_gram_matrix_is_damped_or_refused(seed):
    x = inputs(30, tokens=12, seed=seed)  # of rank 12
    h, weight = hessian(x), normal(5, 30)
    with pytest.raises(StreampruneError, match=r"layer 3, some\.weight: .* --samples, or a larger --set damp"):
        inverse_factor(h.clone(), 0.0, "layer 3, some.weight")
    pruned = prune(weight, h, Sparsity(0.5), damp=0.01)
    torch.testing.assert_close(pruned, plain_sparsegpt(weight, h, Sparsity(0.5))[0], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("columns", [1, 40, LEAF + 1, 3 * LEAF + 7])
def test_the_factor_is_that_of_the_inverse(columns):
    h = hessian(inputs(columns, tokens=2 * columns))
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(columns, dtype=F64)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    torch.testing.assert_close(inverse_factor(h.clone(), 0.01), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tried,times,damp,rtol", [(1, 1, 1e-4, 1e-3), (2, 10, 1e-7, 0.2), (4, 100, 2e-9, 1e-5)])
def test_what_float32_cannot_factor_is_damped_more_and_at_last_factored_in_float64(tried, times, damp, rtol):
    x = inputs(64, tokens=20)  # of rank 20
    h = (x.T @ x).float()

    def damped(more):
        return h + more * damp * h.diagonal().mean() * torch.eye(64)

    fails = [bool(torch.linalg.cholesky_ex(damped(more).flip(0, 1)).info) for more in (1, 10, 100)]
    assert [*fails, False].index(False) == tried - 1
    factor = inverse_factor(h.clone(), damp)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped(times).double()), upper=True)
    assert factor.dtype == torch.float32
    assert (factor - expected).abs().max() < rtol * expected.abs().max()


@pytest.mark.parametrize("damp", [0.0, 1e-9, 0.01])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equal_inputs_are_refused_or_pruned_with_less_error_than_a_mask_makes(dtype, damp):
    weight = normal(5, 30)
    for seed in range(6):
        x = inputs(30, seed=seed).to(dtype)
        x[:, 7] = x[:, 3]
        try:
            pruned = prune(weight, x.T @ x, Sparsity(0.5), damp=damp).double()
        except StreampruneError:
            assert damp < 0.01
            continue
        masked = torch.where(pruned == 0, 0, weight)
        error, without = (float((x.double() @ (made - weight).T).square().sum()) for made in (pruned, masked))
        assert error < without


@pytest.mark.parametrize("block", [8, 128])
def test_float32_agrees_to_its_rounding(block):
    weight, goes = forced(10, 48)
    h = hessian(inputs(48))
    factor, dead = inverse_factor(h.clone(), 0.01), torch.zeros(48, dtype=torch.bool)
    wide = prune_and_update(weight, factor, dead, Sparsity(0.5), block)
    narrow = prune_and_update(weight.float(), factor.float(), dead, Sparsity(0.5), block)
    assert narrow.dtype == torch.float32 and torch.equal(narrow == 0, goes)
    assert (narrow - wide).abs().max() < 1e-6 and (wide - weight)[~goes].abs().max() > 1e-4


# The streamed method.


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}

    def make(family, **options):
        key = (family, *options.items())
        if key not in made:
            made[key] = TinyWeights(family, tmp_path_factory.mktemp(family), **options)
        return made[key]

    return make


def plain_method(tiny, sparsity, damp=0.01):
    """The published method: H of this layer's inputs behind the pruned layers, each matrix on its own."""

    def update(key, weight, x):
        return plain_sparsegpt(weight, hessian(x.flatten(0, 1), len(x)), sparsity, damp=damp)[0]

    return tiny.sequential(update)


def assert_close_weights(found, expected, rtol=1e-8):
    assert set(found) == set(expected)
    for key, weight in expected.items():
        assert torch.equal(found[key] == 0, weight == 0), key
        torch.testing.assert_close(found[key], weight, rtol=rtol, atol=rtol, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("sparsity", [Sparsity(0.5), Sparsity(0.3), Sparsity(0.5, 2, 4)], ids=str)
@pytest.mark.parametrize("family", ["llama", "phi3", "granite", "opt", "gpt2"])
def test_the_streamed_method_equals_the_plain_one(family, sparsity, models):
    tiny = models(family, width=40, samples=6)
    found = tiny.streamed("sparsegpt", sparsity)
    if sparsity.m:
        check_zeros(found, sparsity)
    else:
        for weight in found.values():
            assert int((weight == 0).sum()) == whole(sparsity.ratio * weight.numel())
    assert_close_weights(found, plain_method(tiny, sparsity))
    dense = tiny.dense()
    assert all((weight - dense[key])[weight != 0].abs().max() > 1e-3 for key, weight in found.items()), "updates"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_longer_than_a_block_are_pruned_block_by_block(family, models):
    tiny = models(family, width=COLUMN_BLOCK + 9, samples=6)
    found = tiny.streamed("sparsegpt", Sparsity(0.4), damp=0.02)
    assert_close_weights(found, plain_method(tiny, Sparsity(0.4), damp=0.02))
    down = found[LAYERS[0], "mlp.c_proj.weight" if family == "gpt2" else "mlp.down_proj.weight"]
    assert down.shape == (48, COLUMN_BLOCK + 9)
    assert int((down[:, :COLUMN_BLOCK] == 0).sum()) == whole(0.4 * 48 * COLUMN_BLOCK)


def test_channels_that_never_fire_are_dead_inputs(tmp_path):
    """OPT's ReLU leaves some: H_jj = 1 there counts in the mean that λ is relative to, beside H = (2/N) X Xᵀ."""
    tiny = TinyWeights("opt", tmp_path, samples=6)
    with torch.no_grad():
        for layer in LAYERS:
            tiny.modules(layer)["fc1.weight"].bias[3:12] = -1e3
    tiny.model.save_pretrained(tmp_path)
    found = tiny.streamed("sparsegpt", Sparsity(0.5))
    for layer in LAYERS:
        assert (found[layer, "fc2.weight"][:, 3:12] == 0).all()
    assert_close_weights(found, plain_method(tiny, Sparsity(0.5)))


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_micro_batches_give_the_same_weights_to_rounding(micro_batch, models):
    tiny = models("gpt2", width=40, samples=6)
    found = tiny.streamed("sparsegpt", Sparsity(0.5), micro_batch=micro_batch)
    assert_close_weights(found, tiny.streamed("sparsegpt", Sparsity(0.5)))


@pytest.mark.parametrize("sparsity", [Sparsity(0.0), Sparsity(0.0, 4, 4)], ids=["ratio 0", "4:4"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_ratio_0_changes_no_bit(dtype, sparsity, tmp_path):
    tiny = TinyWeights("llama", tmp_path, width=40, dtype=dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    assert_same_weights(tiny.streamed("sparsegpt", sparsity, dtype=compute), tiny.dense())


@pytest.mark.parametrize("sparsity", [Sparsity(0.0), Sparsity(0.0, 4, 4)], ids=["ratio 0", "4:4"])
def test_ratio_0_leaves_weights_of_dead_inputs(sparsity):
    x, weight = inputs(16), normal(5, 16)
    x[:, 3] = 0
    assert torch.equal(prune(weight, hessian(x), sparsity), weight)


def test_bfloat16_weights_are_rounded_once_and_the_next_layer_sees_them(tmp_path):
    tiny = TinyWeights("gpt2", tmp_path, dtype=torch.bfloat16, samples=6)
    tiny.model.double()
    found = tiny.streamed("sparsegpt", Sparsity(0.5))

    def update(key, weight, x):
        made, _ = plain_sparsegpt(weight, hessian(x.flatten(0, 1), len(x)), Sparsity(0.5))
        return made.bfloat16().double()

    assert_same_weights({key: weight.double() for key, weight in found.items()}, tiny.sequential(update))


def test_too_few_tokens_are_refused_undamped_with_the_layer_and_repaired_by_default(models):
    tiny = models("llama", samples=1)  # 12 tokens, 48 inputs
    with pytest.raises(StreampruneError, match=r"layer 1, self_attn\.q_proj\.weight: .*--set damp"):
        tiny.streamed("sparsegpt", Sparsity(0.5), damp=0.0)
    found = tiny.streamed("sparsegpt", Sparsity(0.5))
    assert_close_weights(found, plain_method(tiny, Sparsity(0.5)), rtol=1e-6)
