"""Streamed scores and masks of the activation family, and of every method on weights, equal plain whole-model ones."""

import itertools

import pytest
import torch
from marks import slow
from plain_methods import LAYERS, SEED, assert_scores, run
from plain_weights import (
    FAMILIES,
    MATRICES,
    TinyWeights,
    assert_same_weights,
    check_zeros,
    input_squares,
    without_lowest,
)

from streamprune.errors import StreampruneError
from streamprune.kernels import noise_seed, perturb
from streamprune.methods.activation import refit_errors, removal_errors
from streamprune.methods.sinks import LayerScores, Sparsity, WeightPruner
from streamprune.methods.table import METHODS, resolve_settings
from streamprune.model.units import Geometry, TensorRef

HALF = Sparsity(0.5)
PUBLISHED = 128  # samples of GBLM-Pruner
GBLM = (  # weights α with which both terms count in models this small, and the default
    {},
    {"alpha": 1.0},
    {"p": 2, "alpha": 30.0},
    {"norm": "published"},
    {"norm": "published", "p": 2, "alpha": 60.0},
    {"terms": "gradient"},
    {"terms": "gradient", "p": 2, "norm": "published"},
)
MOREAU = {"steps": 3, "draws": 2, "rho": 0.3, "gamma": 0.1, "sigma": 0.05}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """tiny(family, width): a saved model, made once."""
    made = {}

    def make(family, width=37):
        if (family, width) not in made:
            # Heads of 12, not of 48/6, so that 8 divides every row of 72.
            options = {"head_dim": 12} if (family, width) == ("llama", 40) else {}
            made[family, width] = TinyWeights(family, tmp_path_factory.mktemp(family), width=width, **options)
        return made[family, width]

    return make


# Units: elements as [d_out, d_in] or, for GPT-2, [d_in, d_out], as they are stored.


def case_inputs(case):
    """{(layer, name): x [n, seq, d_in]} of every scored matrix of the dense model."""
    seen, handles = {}, []
    for key in case.weights:
        module = case.model.get_submodule(f"{case.layer_path}.{key[0]}.{key[1].removesuffix('.weight')}")
        handles.append(module.register_forward_pre_hook(lambda m, given, key=key: seen.update({key: given[0].clone()})))
    with torch.no_grad():
        case.model(case.ids)
    for handle in handles:
        handle.remove()
    return seen


def along_inputs(case, values):
    """Values per input [d_in], to be multiplied with a weight as it is stored."""
    return values[:, None] if case.family == "gpt2" else values


def cut_by_inputs(key):
    return key[1] in ("self_attn.o_proj.weight", "mlp.down_proj.weight", "mlp.c_proj.weight")


def column_totals(case, of):
    """Unit scores from `of`(W [d_out, d_in], x) [d_in], for the matrices whose columns units cut."""
    elements = {}
    for key, x in case_inputs(case).items():
        weight = case.weights[key]
        columns = torch.zeros_like(weight)
        if cut_by_inputs(key):
            values = of(weight.T if case.family == "gpt2" else weight, x)
            # A column's score in one of its places; the unit's sum then has it once.
            columns.select(1 if case.family == "gpt2" else 0, 0).copy_(values)
        elements[key] = columns
    return case.totals(elements)


def test_wanda_units_equal_the_whole_model(case):
    inputs = case_inputs(case)
    elements = {
        key: weight.abs() * along_inputs(case, input_squares(inputs[key]).sqrt())
        for key, weight in case.weights.items()
    }
    assert_scores(run("wanda", case.statistics()), case.totals(elements))


def test_wanda_sp_equals_the_whole_model(case):
    expected = column_totals(case, lambda weight, x: weight.abs().mean(0) * input_squares(x).sqrt())
    assert_scores(run("wanda-sp", case.statistics()), expected)


@pytest.mark.parametrize("bias", ["yes", "no"])
def test_flap_is_the_sample_variance_over_all_tokens_times_squared_columns(bias, case):
    def of(weight, x):
        return torch.var(x.flatten(0, 1), dim=0, correction=1) * (weight * weight).sum(0)

    assert_scores(run("flap", case.statistics(), bias=bias), column_totals(case, of))


def noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def units_of(case, key, columns):
    """The columns [d_in] of o or down by their unit: equal runs."""
    kind = "kv_group" if "attn" in key[1] else "channel"
    units = case.statistics().sweeper.skeleton.geometries[key[0]].units(kind)
    return torch.arange(columns) // (columns // units), kind


def test_thinet_adds_the_unit_that_raises_the_outputs_error_least(case):
    scores = run("thinet", case.statistics())
    for key, x in case_inputs(case).items():
        if not cut_by_inputs(key):
            continue
        weight = case.weights[key].T if case.family == "gpt2" else case.weights[key]
        x = x.flatten(0, 1)
        of, kind = units_of(case, key, x.shape[1])

        def error(gone, weight=weight, x=x, of=of):
            at = torch.isin(of, torch.tensor(gone))
            return float((x[:, at] @ weight[:, at].T).square().sum() / len(x))

        left, gone, before, most = set(of.tolist()), [], 0.0, 0.0
        found = scores[key[0], kind]
        for unit in found.argsort().tolist():
            rises = {other: error([*gone, other]) - before for other in left}
            assert rises[unit] == pytest.approx(min(rises.values()), rel=1e-9, abs=1e-12 * error([*of.tolist()]))
            most = max(most, rises[unit])
            assert float(found[unit]) == pytest.approx(most, rel=1e-6)
            before += rises[unit]
            gone.append(unit)
            left.remove(unit)
        assert found.unique().numel() == len(found)


@pytest.mark.parametrize("size", [1, 4])
def test_with_a_fit_the_unit_goes_that_what_is_fitted_misses_least(size):
    width, rows = 12, 5
    x, weight = noise(0, 40, width) @ noise(1, width, width), noise(2, rows, width)
    gram = x.T @ x
    found = refit_errors(torch.linalg.inv(gram), weight.T @ weight, width // size)

    def error(gone):
        stays = torch.isin(torch.arange(width) // size, torch.tensor(gone), invert=True)
        fitted = torch.linalg.lstsq(x[:, stays], x @ weight.T).solution
        return float((x @ weight.T - x[:, stays] @ fitted).square().sum())

    left, gone, before, most = set(range(width // size)), [], 0.0, 0.0
    for unit in found.argsort().tolist():
        rises = {other: error([*gone, other]) - before for other in left}
        assert rises[unit] == pytest.approx(min(rises.values()), rel=1e-7)
        most = max(most, rises[unit])
        assert float(found[unit]) == pytest.approx(most, rel=1e-7)
        before += rises[unit]
        gone.append(unit)
        left.remove(unit)


def test_many_units_go_a_few_at_a_time_and_in_the_same_order_where_they_do_not_touch():
    q = torch.diag(noise(3, 1000).square())
    for errors in (removal_errors(q), refit_errors(torch.eye(1000).double(), q.clone(), 1000)):
        assert errors.argsort().equal(q.diagonal().argsort())
        torch.testing.assert_close(errors, q.diagonal(), rtol=1e-6, atol=1e-9)


def test_of_equal_units_the_first_goes_first_and_what_is_not_finite_is_refused():
    assert removal_errors(torch.ones(300, 300)).diff().min() > 0
    assert refit_errors(torch.eye(300), torch.eye(300), 300).diff().min() > 0
    for damage in (float("nan"), float("inf")):
        with pytest.raises(StreampruneError, match="a score is NaN"):
            removal_errors(torch.full((4, 4), damage))


def gblm_factor(grads, squares, *, p=1, alpha=100.0, terms="both", norm="mean"):
    """‖X_j‖ + α‖G_ij‖ as §3 has it: grads [samples, …] of one matrix, squares (1/N) Σ‖X_n‖² beside it."""
    samples = len(grads)
    total = sum(grad.abs() if p == 1 else grad * grad for grad in grads)
    g_norm = total if p == 1 else total.sqrt()
    if norm == "mean":
        # At the published N, α is the published one.
        g_norm = g_norm * (PUBLISHED / samples if p == 1 else (PUBLISHED / samples) ** 0.5)
    if terms == "gradient":
        return g_norm
    return squares.sqrt() + alpha * g_norm


@pytest.mark.parametrize("settings", GBLM, ids=str)
def test_gblm_units_equal_the_whole_model(settings, case):
    inputs = case_inputs(case)
    samples = [case.gradients(ids=case.ids[n : n + 1]) for n in range(len(case.ids))]
    elements = {}
    for key, weight in case.weights.items():
        squares = along_inputs(case, input_squares(inputs[key]))
        elements[key] = weight.abs() * gblm_factor([grads[key] for grads in samples], squares, **settings)
    scores = run("gblm", case.statistics(), **settings)
    if settings.get("terms") == "gradient":  # its scale is free
        first = next(iter(scores))
        factor = case.totals(elements)[first][0] / scores[first][0]
        scores = {key: values * factor for key, values in scores.items()}
    # A sample on its own is another batch size, and Llama's norms compute in float32.
    assert_scores(scores, case.totals(elements), rtol=1e-5)


@pytest.mark.parametrize("method", ["wanda", "gblm"])
def test_a_layers_score_is_the_sum_of_its_units(method, case):
    statistics = case.statistics()
    sink = LayerScores(LAYERS)
    METHODS[method].score(statistics, resolve_settings(method, {}), sink)
    units = run(method, statistics)
    assert set(sink.values) == set(LAYERS)
    for layer, value in sink.values.items():
        expected = sum(float(units[layer, kind].sum()) for kind in case.kinds)
        assert abs(value / expected - 1) < 1e-12


def test_units_are_scored_on_the_dense_model_whatever_is_scored_before(case):
    # A layer's inputs must not depend on which layers below it are scored.
    alone = case.statistics()
    alone.layers = LAYERS[1:]
    both = run("wanda", case.statistics())
    for key, values in run("wanda", alone).items():
        assert torch.equal(values, both[key])


# Weights: every matrix of a layer, in rows of W [d_out, d_in].


def plain_weights(tiny, method, sparsity, settings):
    """The plain implementation of a method on weights."""
    if method in ("wanda", "gblm"):
        grads = tiny.sample_gradients() if method == "gblm" else None

        def prune(key, weight, x):
            factor = input_squares(x).sqrt()
            if grads is not None:
                factor = gblm_factor(grads[key], input_squares(x), **settings)
            return without_lowest(weight, weight.abs() * factor, sparsity)

        return tiny.sequential(prune)
    dense = tiny.dense()
    if method == "magnitude":
        scores = {key: weight.abs() for key, weight in dense.items()}
    elif method == "random":
        scores = {key: plain_uniform(tiny, key, weight) for key, weight in dense.items()}
    elif method == "taylor":
        scores = plain_taylor(tiny, dense, settings["order"])
    else:
        scores = plain_moreau(tiny, dense, **settings)
    return {key: without_lowest(weight, scores[key], sparsity) for key, weight in dense.items()}


def plain_uniform(tiny, key, weight):
    generator = torch.Generator().manual_seed(noise_seed(SEED, *key))
    scores = torch.rand(weight.T.shape if tiny.family == "gpt2" else weight.shape, generator=generator)
    return scores.T if tiny.family == "gpt2" else scores


def plain_taylor(tiny, dense, order):
    grads = tiny.gradients()
    if order == "first":
        return {key: (grads[key] * weight).abs() for key, weight in dense.items()}
    fisher = {key: (values**2).mean(0) for key, values in tiny.sample_gradients().items()}
    if order == "second":
        return {key: weight**2 * fisher[key] for key, weight in dense.items()}
    return {key: (grads[key] * weight - weight**2 * fisher[key] / 2).abs() for key, weight in dense.items()}


def plain_moreau(tiny, dense, *, steps, draws, rho, gamma, sigma):
    delta = {key: torch.zeros_like(weight) for key, weight in dense.items()}
    for step in range(steps):
        total = {key: torch.zeros_like(weight) for key, weight in dense.items()}
        for draw in range(draws):
            moved = {}
            for key, weight in dense.items():
                # Noise is drawn for the weight as it is stored.
                stored = (weight.T if tiny.family == "gpt2" else weight).contiguous()
                noisy = perturb(torch.empty_like(stored), stored, None, sigma, noise_seed(SEED, step, draw, *key))
                moved[key] = (noisy.T if tiny.family == "gpt2" else noisy) + delta[key]
            for key, grad in tiny.gradients(moved=moved).items():
                total[key] += grad / draws
        for key, grad in total.items():
            delta[key] = (1 - gamma / rho) * delta[key] - gamma * grad
    return {key: (delta[key] * weight).abs() / rho for key, weight in dense.items()}


ON_WEIGHTS = (
    ("wanda", {}),
    *(("gblm", settings) for settings in GBLM),
    ("magnitude", {}),
    ("random", {}),
    *(("taylor", {"order": order}) for order in ("first", "second", "mix")),
    ("moreau", MOREAU),
)


@pytest.mark.parametrize("method,settings", ON_WEIGHTS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_lose_what_the_plain_method_takes(family, method, settings, tiny):
    model, sparsity = tiny(family), Sparsity(0.3)
    found = model.streamed(method, sparsity, **settings)
    assert len(found) == len(LAYERS) * MATRICES.get(family, 7)
    check_zeros(found, sparsity)
    assert_same_weights(found, plain_weights(model, method, sparsity, settings))


@pytest.mark.parametrize("n,m", [(2, 4), slow(5, 8)])
@pytest.mark.parametrize("method,settings", [ON_WEIGHTS[0], ON_WEIGHTS[1], *ON_WEIGHTS[8:11], ON_WEIGHTS[-1]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_n_of_every_m_stay_as_in_the_plain_method(family, method, settings, n, m, tiny):
    model, sparsity = tiny(family, 40), Sparsity(1 - n / m, n, m)
    found = model.streamed(method, sparsity, **settings)
    check_zeros(found, sparsity)
    assert_same_weights(found, plain_weights(model, method, sparsity, settings))


def test_each_setting_takes_other_weights(tiny):
    """What the tests above compare is not the same thing again and again."""
    model = tiny("llama")
    # w²F is in the order of |w|‖G‖₂.
    rows = [row for row in ON_WEIGHTS if row != ("taylor", {"order": "second"})]
    found = [model.streamed(method, HALF, **settings) for method, settings in rows]
    for one, other in itertools.combinations(found, 2):
        assert any((one[key] != other[key]).double().mean() > 0.004 for key in one)


@pytest.mark.parametrize("method,settings", [("wanda", {}), ("gblm", {"alpha": 1.0})])
def test_a_layer_is_scored_on_what_the_pruned_layer_below_puts_out(method, settings, tiny):
    model = tiny("qwen2")
    found = model.streamed(method, HALF, **settings)
    dense, sink = {}, WeightPruner(HALF, lambda ref, stored, pruned: dense.update({ref.key: pruned.clone()}))
    METHODS[method].score(model.statistics(layers=LAYERS[1:]), resolve_settings(method, settings), sink)
    assert {layer for layer, _ in dense} == {LAYERS[1]}
    assert all((found[key] != weight).any() for key, weight in dense.items())


@pytest.mark.parametrize("pattern", [Sparsity(0.5), Sparsity(0.5, 2, 4)], ids=["half", "2:4"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_of_equal_weights_the_lowest_index_goes_first(family, pattern, tmp_path):
    model = TinyWeights(family, tmp_path, width=40)
    with torch.no_grad():
        for layer in LAYERS:
            for module in model.modules(layer).values():
                weight = module.weight  # a few values, and no zero among them
                weight.copy_(weight.sign() * (0.1 + 0.1 * (weight.abs() * 10).floor()))
    model.model.save_pretrained(tmp_path)
    assert all(len(weight[0].abs().unique()) < 8 for weight in model.dense().values())
    found = model.streamed("magnitude", pattern)
    check_zeros(found, pattern)
    assert_same_weights(found, plain_weights(model, "magnitude", pattern, {}))


@pytest.mark.parametrize("method", ["wanda", "gblm", "magnitude"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bfloat16_weights_keep_their_bits(family, method, tmp_path):
    model = TinyWeights(family, tmp_path, dtype=torch.bfloat16)
    model.model.double()
    found = model.streamed(method, HALF)
    assert all(weight.dtype == torch.bfloat16 for weight in found.values())
    settings = resolve_settings(method, {}, "weights")
    expected = plain_weights(model, method, HALF, settings)
    assert_same_weights({key: weight.double() for key, weight in found.items()}, expected)


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if "weights" in row.targets])
def test_ratio_0_changes_no_weight(method, tiny, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.zeros(shape))  # a draw that can come
    settings = {"draws": 1, "steps": 1} & METHODS[method].settings.keys()
    for sparsity in (Sparsity(0.0), Sparsity(0.0, 4, 4)):
        model = tiny("gpt2", 40)
        found = model.streamed(method, sparsity, **dict.fromkeys(settings, 1))
        assert_same_weights(found, model.dense())


@pytest.mark.parametrize("columns,ratio,gone", [(100, 0.29, 29), (50, 0.58, 29), (37, 0.5, 18), (3, 0.3333, 0)])
def test_a_row_loses_the_whole_number_below_its_share(columns, ratio, gone):
    # 100 · 0.29 is 28.999999999999996 in binary.
    found = []
    pruner = WeightPruner(Sparsity(ratio), lambda ref, stored, pruned: found.append(pruned))
    weight = torch.arange(1.0, 1 + 3 * columns).view(3, columns)
    pruner.add_norms(TensorRef(0, "x.weight", Geometry(1, 1, 1, 1), None), weight, None)
    assert found[0].count_nonzero(1).tolist() == [columns - gone] * 3
