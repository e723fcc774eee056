"""Sums over inputs, and identities of Wanda, GBLM-Pruner and FLAP that hold exactly or to rounding in float64."""

import pytest
import torch
from plain_methods import LAYERS, assert_scores, run
from plain_weights import FAMILIES, TinyWeights, assert_same_weights, input_squares, set_matrix

from streamprune.methods.sinks import Sparsity, UnitScores
from streamprune.methods.table import METHODS, resolve_settings
from streamprune.output.slicing import mean_biases
from streamprune.streaming.inputs import Gram, Moments

HALF = Sparsity(0.5)
# How many Linears of a layer are given the same tensor: q, k, v; gate, up.
SHARED = {"phi3": [1, 1, 1, 1], "gpt2": [1, 1, 1, 1], "gpt_neox": [1, 1, 1, 1], "opt": [1, 1, 1, 3]}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}

    def make(family):
        if family not in made:
            made[family] = TinyWeights(family, tmp_path_factory.mktemp(family))
        return made[family]

    return make


@pytest.fixture(params=FAMILIES)
def tiny(request, models):
    return models(request.param)


def close(actual, expected, rtol=1e-10):
    scale = float(torch.as_tensor(expected).abs().max())
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * scale)


def sums_of(statistics, kind):
    """{(layer, name): (W, sums)} as a sweep hands them over."""
    found = {}

    def consume(ref, weight, sums):
        assert ref.key not in found
        found[ref.key] = (ref.matrix(weight).clone(), sums)

    statistics.inputs(kind, consume)
    return found


def powers_of(statistics):
    """{(layer, name): {p: Σ_n |g_n|^p, 0: mean gradient}} as [d_out, d_in]."""
    found = {}

    def consume(ref, weight, sums):
        found[ref.key] = {power: ref.matrix(value).clone() for power, value in sums.items()}

    statistics.gradient_powers(consume, (0, 1, 2))
    return found


class Elements:
    """A sink that keeps each matrix's importances |W|(‖x‖ + α‖g‖) [d_out, d_in]."""

    def __init__(self):
        self.found = {}

    def add_norms(self, ref, weight, x_norm, grad_norm=None, alpha=0.0):
        factor = 0 if x_norm is None else x_norm
        if grad_norm is not None:
            factor = factor + alpha * ref.matrix(grad_norm)
        self.found[ref.key] = ref.matrix(weight).abs() * factor


def elements(method, statistics, **settings):
    sink = Elements()
    METHODS[method].score(statistics, resolve_settings(method, settings), sink)
    return sink.found


# Sums over inputs.


@pytest.mark.parametrize("parts", [(1, 7, 2, 13, 1), (24,), (1,) * 24])
def test_moments_equal_torch_over_uneven_parts(parts):
    x = torch.randn(24, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 100
    moments = Moments(9, x)
    for part in x.split(parts):
        moments.add(part)
    assert moments.count == 24
    torch.testing.assert_close(moments.mean, x.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(moments.variance, torch.var(x, dim=0, correction=1), rtol=1e-11, atol=0)
    torch.testing.assert_close(moments.squares, (x * x).sum(0), rtol=1e-13, atol=0)


def test_variances_far_from_zero_survive_float32():
    # Σx² − n·mean² would lose all digits: it is 1 in 10⁸ of Σx².
    x = (torch.randn(4096, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e4).float()
    moments = Moments(5, x)
    for part in x.split(100):
        moments.add(part)
    torch.testing.assert_close(moments.variance.double(), torch.var(x.double(), dim=0), rtol=1e-3, atol=0)


def test_one_token_has_no_variance():
    moments = Moments(3, torch.ones(1, 3))
    moments.add(torch.tensor([[1.0, 2.0, 3.0]]))
    assert moments.variance.tolist() == [0, 0, 0] and moments.mean.tolist() == [1, 2, 3]


@pytest.mark.parametrize("micro_batch", [64, 3, 1])
def test_streamed_sums_equal_torch_on_all_tokens(micro_batch, tiny):
    statistics = tiny.statistics(micro_batch=micro_batch)
    moments, grams = sums_of(statistics, Moments), sums_of(statistics, Gram)
    # Batches of another size, and Llama's norms compute in float32.
    rtol = 1e-12 if micro_batch == 64 else 1e-5
    for layer in LAYERS:
        inputs = tiny.inputs(layer)
        for name, given in inputs.items():
            x, (weight, found) = given.flatten(0, 1), moments[layer, name]
            assert torch.equal(weight, tiny.dense()[layer, name])
            assert found.count == grams[layer, name][1].count == len(x)
            close(found.mean, x.mean(0), rtol)
            close(found.variance, torch.var(x, dim=0, correction=1), rtol)
            close(found.squares / len(given), input_squares(given), rtol)
            close(grams[layer, name][1].total, sum(torch.outer(token, token) for token in x), rtol)


@pytest.mark.parametrize("prunes", [True, False])
def test_products_that_nothing_is_made_of_are_not_computed(prunes, models):
    statistics, calls = models("llama").statistics(micro_batch=2), []
    sweeper, last = statistics.sweeper, statistics.layers[-1]
    handles = [
        layer.get_submodule("mlp.down_proj").register_forward_hook(lambda *_, index=index: calls.append(index))
        for index, layer in enumerate(sweeper.skeleton.layers)
    ]
    statistics.inputs(Moments, lambda ref, weight, sums: weight if prunes else None, prunes=prunes)
    for handle in handles:
        handle.remove()
    parts = len(list(sweeper.micro_batches(statistics.samples)))
    # A layer that is pruned runs again for its output; that of the last layer is not asked for.
    assert calls == [layer for layer in range(last) for _ in range(parts)]


@pytest.mark.parametrize("kind", [Moments, Gram])
def test_linears_with_one_input_share_their_sums(kind, tiny):
    found = sums_of(tiny.statistics(micro_batch=3), kind)
    for layer in LAYERS:
        mine = {name: id(sums) for (at, name), (_, sums) in found.items() if at == layer}
        groups = {one: [name for name in mine if mine[name] == one] for one in mine.values()}
        assert sorted(map(len, groups.values())) == SHARED.get(tiny.family, [1, 1, 2, 3])
        inputs = tiny.inputs(layer)
        for names in groups.values():
            assert all(torch.equal(inputs[name], inputs[names[0]]) for name in names)


# Identities; the numbers are those of the method notes.


def test_12_one_sample_has_one_gradient_norm(models):
    tiny = models("qwen2")
    statistics = tiny.statistics()
    statistics.input_ids, statistics.samples = tiny.ids[:1], 1
    for key, sums in powers_of(statistics).items():
        close(sums[1], tiny.gradients(tiny.ids[:1])[key].abs())
        close(sums[2].sqrt(), sums[1])
        close(sums[0].abs(), sums[1])
    # So p has no effect, but on what the published α stands for.
    one, two = (elements("gblm", statistics, norm="published", p=p) for p in (1, 2))
    for key, values in one.items():
        close(two[key], values)


def test_12_the_norms_over_samples_are_ordered(tiny):
    for key, sums in powers_of(tiny.statistics()).items():
        count, slack = len(tiny.ids), 1e-12 * float(sums[1].max())
        l1, l2 = sums[1], sums[2].sqrt()
        assert (count * sums[0].abs() <= l1 + slack).all(), key
        assert (l2 <= l1 + slack).all() and (l1 <= count**0.5 * l2 + slack).all(), key
        assert (l1 > 1.05 * l2).any() and (l1 > 1.05 * count * sums[0].abs()).any(), "they are not all equal"


@pytest.mark.parametrize("p", [1, 2])
def test_12_doubled_data_doubles_l1_and_leaves_the_mean_norms(p, models):
    tiny = models("phi3")
    once, twice = tiny.statistics(), tiny.statistics()
    twice.input_ids, twice.samples = tiny.ids.repeat(2, 1), 2 * len(tiny.ids)
    single, double = powers_of(once), powers_of(twice)
    for key in single:
        close(double[key][1], 2 * single[key][1], 1e-5)
        close(double[key][2].sqrt(), 2**0.5 * single[key][2].sqrt(), 1e-5)
    wanda = elements("wanda", once)
    for key, values in elements("wanda", twice).items():
        close(values, wanda[key], 1e-6)
    mean = elements("gblm", once, p=p)
    for key, values in elements("gblm", twice, p=p).items():
        close(values, mean[key], 1e-5)
    published, doubled = (elements("gblm", each, p=p, norm="published") for each in (once, twice))
    for key, values in doubled.items():
        close(values - wanda[key], 2 ** (1 / p) * (published[key] - wanda[key]), 1e-5)


@pytest.mark.parametrize("p", [1, 2])
def test_128_samples_are_where_both_norms_of_gblm_agree(p, tmp_path):
    statistics = TinyWeights("llama", tmp_path, samples=128, seq=3).statistics()
    mean, published = (elements("gblm", statistics, p=p, norm=norm) for norm in ("mean", "published"))
    for key, values in mean.items():
        close(values, published[key])


@pytest.mark.parametrize("p", [1, 2])
def test_13_without_alpha_gblm_is_wanda(p, tiny):
    masks = (tiny.streamed("wanda", HALF), tiny.streamed("gblm", HALF, alpha=0.0, p=p))
    assert_same_weights(*masks)
    units = tiny.statistics(scope="units")
    assert_scores(run("gblm", units, alpha=0.0, p=p), run("wanda", units), rtol=1e-14)


def test_14_signed_column_scores_are_the_inputs_times_their_gradients(tiny):
    """Σ_i W_ij G_ij = Σ_t x_tj ∂L/∂x_tj, x being this Linear's own input."""
    grads, seen, handles = {}, {}, []
    tiny.statistics().gradients(lambda ref, weight, grad: grads.update({ref.key: ref.matrix(weight * grad).clone()}))

    def own_input(key):
        def hook(module, arguments):
            seen[key] = arguments[0].clone()
            seen[key].retain_grad()
            return (seen[key],)

        return hook

    for layer in LAYERS:
        for name, module in tiny.modules(layer).items():
            handles.append(module.register_forward_pre_hook(own_input((layer, name))))
    logits = tiny.model(tiny.ids).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tiny.ids[:, 1:].flatten()).backward()
    for handle in handles:
        handle.remove()
    assert set(grads) == set(seen)
    for key, x in seen.items():
        expected = (x * x.grad).detach().flatten(0, -2).sum(0)
        assert expected.abs().max() > 0
        close(grads[key].sum(0), expected, 1e-8)


def test_15_wanda_squared_is_sparsegpts_diagonal(tiny):
    """Wanda² = W²·diag(H)/2 for H = (2/N) Σ X Xᵀ."""
    statistics = tiny.statistics()
    wanda = elements("wanda", statistics)
    for key, (weight, gram) in sums_of(statistics, Gram).items():
        hessian = 2 / len(tiny.ids) * gram.total
        close(wanda[key] ** 2, weight**2 * hessian.diagonal() / 2)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "granite", "gpt2", "opt"])
def test_29_flaps_biases_keep_the_mean_output_of_the_linear(family, models):
    tiny = models(family)
    statistics = tiny.statistics(scope="units")
    skeleton, sink = statistics.sweeper.skeleton, UnitScores(statistics.sweeper.skeleton.all_units(statistics.layers))
    METHODS["flap"].score(statistics, resolve_settings("flap", {}), sink)
    kinds = skeleton.family.kinds
    kept = {layer: {kind: [0, 2] if kind == "kv_group" else [*range(3, 30, 2)] for kind in kinds} for layer in range(4)}
    with statistics.sweeper.pager.pages([0, *LAYERS]) as pages:
        for page in pages:
            biases = mean_biases(skeleton, kept, sink.means, page)
            assert len(biases) == len(kinds), "o and down"
            for name, bias in biases.items():
                check_bias(tiny, page.layer, name, bias, kept[page.layer])


def check_bias(tiny, layer, name, bias, kept):
    weight_name = name.replace(".bias", ".weight")
    module = tiny.modules(layer)[weight_name]
    if layer not in LAYERS:  # no means were taken there
        assert torch.equal(bias, torch.zeros_like(bias) if module.bias is None else module.bias)
        return
    x = tiny.inputs(layer)[weight_name].flatten(0, 1)
    with torch.no_grad():
        dense = module(x).mean(0)
        weight = tiny.dense()[layer, weight_name]
        stays = torch.zeros(x.shape[1], dtype=torch.bool)
        if "attn" in name:
            stays.view(3, -1)[kept["kv_group"]] = True  # the columns of a group lie together
        else:
            stays[kept["channel"]] = True
        assert 0 < stays.sum() < len(stays)
        without = x[:, stays] @ weight[:, stays].T
        close((without + bias).mean(0), dense, 1e-12)
        assert (without.mean(0) - dense).abs().max() > 0.05 * dense.abs().max(), "the bias has something to do"


def test_without_biases_flap_keeps_no_means(models):
    statistics = models("llama").statistics(scope="units")
    sink = UnitScores(statistics.sweeper.skeleton.all_units(statistics.layers))
    METHODS["flap"].score(statistics, resolve_settings("flap", {"bias": "no"}), sink)
    assert sink.means == {}


def test_flap_is_blind_to_a_constant_input(tmp_path):
    """A channel whose input of down never varies scores 0, whatever its weights: its mean can stand for it."""
    tiny = TinyWeights("opt", tmp_path)
    modules = tiny.modules(LAYERS[0])
    with torch.no_grad():
        weight = modules["fc1.weight"].weight.clone()
        weight[5] = 0
        set_matrix(modules["fc1.weight"], weight)
        modules["fc1.weight"].bias[5] = 3.0
    tiny.model.save_pretrained(tmp_path)
    statistics = tiny.statistics(scope="units")
    flap, wanda = run("flap", statistics), run("wanda-sp", statistics)
    channels = flap[LAYERS[0], "channel"]
    assert channels[5] < 1e-20 and (channels.topk(36).values > 1e-4).all()
    assert wanda[LAYERS[0], "channel"][5] > 0.1
