"""The methods equal whole-model computations on tiny models, and the identities of their formulas hold.

Two kinds of test: streamed scores of saved models beside plain autograd of the whole model, and methods driven by
`FakeStatistics`, whose gradient is a known function of the perturbed weights, beside closed forms.
"""

import itertools
from types import SimpleNamespace

import pytest
import torch
from conftest import N_LAYERS, make_sweeper, save_tiny, save_tokenizer, tiny_model, token_ids, whole_model_gradients
from streamprune.kernels import noise_seed, perturb

from streamprune.errors import UsageError
from streamprune.families import FAMILIES, Geometry
from streamprune.methods import METHODS, resolve_settings
from streamprune.sweep import Statistics, TensorRef

LAYERS = (1, 2)  # a layer below and a layer above them stay as they are
SEED = 5


def run(name, statistics, **settings):
    """{(layer, kind): scores} of a method."""
    scores = METHODS[name].score(statistics, resolve_settings(name, settings)).values
    return {(layer, kind): values for layer, kinds in scores.items() for kind, values in kinds.items()}


def assert_scores(actual, expected, rtol=1e-9, atol=0.0):
    assert set(actual) == set(expected)
    for key in expected:
        assert actual[key].dtype == torch.float64
        torch.testing.assert_close(actual[key], expected[key], rtol=rtol, atol=atol, msg=lambda m, k=key: f"{k}: {m}")


# --- units, sliced by hand -------------------------------------------------------------------------------------


def unit_slices(sizes, kind, unit, tensors):
    """The slices of the weights of one layer that go with a unit: (name, slice, dimension that is cut).

    sizes: kv_groups, n_rep, head_dim, channels. Written out per layout, apart from the package's family table.
    """
    groups, rep, hd, channels = sizes.kv_groups, sizes.n_rep, sizes.head_dim, sizes.channels
    # The query heads of a KV group are neighbours, as in transformers' repeat_kv.
    query, kv = slice(unit * rep * hd, (unit + 1) * rep * hd), slice(unit * hd, (unit + 1) * hd)
    one = slice(unit, unit + 1)

    def shifted(part, by):
        return slice(part.start + by, part.stop + by)

    n_query, n_kv = groups * rep * hd, groups * hd
    table = {
        "self_attn.q_proj.weight": ("kv_group", 0, [query]),
        "self_attn.k_proj.weight": ("kv_group", 0, [kv]),
        "self_attn.v_proj.weight": ("kv_group", 0, [kv]),
        "self_attn.qkv_proj.weight": ("kv_group", 0, [query, shifted(kv, n_query), shifted(kv, n_query + n_kv)]),
        "self_attn.o_proj.weight": ("kv_group", 1, [query]),
        "mlp.gate_proj.weight": ("channel", 0, [one]),
        "mlp.up_proj.weight": ("channel", 0, [one]),
        "mlp.gate_up_proj.weight": ("channel", 0, [one, shifted(one, channels)]),
        "mlp.down_proj.weight": ("channel", 1, [one]),
        "mlp.c_fc.weight": ("channel", 1, [one]),  # Conv1D: [d_in, d_out]
        "mlp.c_proj.weight": ("channel", 0, [one]),
    }
    pieces = []
    for name, (belongs, dim, parts) in table.items():
        if belongs == kind and name in tensors:
            for part in parts:
                pieces.append((name, (part,) if dim == 0 else (slice(None), part), dim))
    return pieces


def line_dim(name):
    """The dimension that units cut."""
    return 1 if name in ("self_attn.o_proj.weight", "mlp.down_proj.weight", "mlp.c_fc.weight") else 0


def unit_totals(sizes, kinds, layers, elements, reduce=lambda piece, dim: piece.sum()):
    """Sum of element-wise importances over each unit: {(layer, kind): [units]}.

    elements: {(layer, name): [d_out, d_in]}.
    """
    totals = {}
    for layer, kind in itertools.product(layers, kinds):
        tensors = {name: value for (at, name), value in elements.items() if at == layer}
        count = sizes.kv_groups if kind == "kv_group" else sizes.channels
        totals[layer, kind] = torch.stack(
            [
                sum(reduce(tensors[name][where], dim) for name, where, dim in unit_slices(sizes, kind, unit, tensors))
                for unit in range(count)
            ]
        )
    return totals


def group_shrink(delta, dim, threshold):
    """Eq. 12 line by line."""
    lines = []
    for line in delta.unbind(dim):
        norm = float(line.square().sum().sqrt())
        lines.append(line * (1 - threshold / norm) if norm > threshold else torch.zeros_like(line))
    return torch.stack(lines, dim)


# --- a saved model and the same model as a whole ---------------------------------------------------------------

SIZES = {
    "llama": SimpleNamespace(kv_groups=3, n_rep=2, head_dim=10, channels=37),
    "mistral": SimpleNamespace(kv_groups=3, n_rep=2, head_dim=8, channels=37),
    "qwen2": SimpleNamespace(kv_groups=3, n_rep=2, head_dim=8, channels=37),
    "phi3": SimpleNamespace(kv_groups=3, n_rep=2, head_dim=8, channels=37),
    "gpt2": SimpleNamespace(kv_groups=0, n_rep=0, head_dim=0, channels=37),
}
FAMILIES_TESTED = tuple(SIZES)


class Case:
    """A tiny model: saved for the streamed side, in memory for the whole-model side."""

    def __init__(self, family, path):
        self.family, self.path, self.sizes = family, path, SIZES[family]
        self.model = save_tiny(path, family)
        self.ids = token_ids(n=3, seq=12)
        self.kinds = ("channel",) if family == "gpt2" else ("kv_group", "channel")
        self.layer_path = "transformer.h" if family == "gpt2" else "model.layers"
        self.sweeper = make_sweeper(path)
        self.parameters = dict(self.model.named_parameters())
        self.weights = {
            (layer, name): weight.detach().clone()
            for layer in LAYERS
            for name, weight in self.model.get_submodule(f"{self.layer_path}.{layer}").named_parameters()
            if any(unit_slices(self.sizes, kind, 0, {name}) for kind in self.kinds)
        }

    def statistics(self, seed=SEED):
        return Statistics(self.sweeper, self.ids, LAYERS, seed)

    def gradients(self, weights=None, ids=None):
        """Whole-model gradients of the scored weights, with those weights set to `weights`."""
        parameters = {key: self.parameters[f"{self.layer_path}.{key[0]}.{key[1]}"] for key in self.weights}
        with torch.no_grad():
            for key, weight in (weights or {}).items():
                parameters[key].copy_(weight)
        grads = whole_model_gradients(self.model, self.ids if ids is None else ids)
        with torch.no_grad():
            for key, weight in self.weights.items():
                parameters[key].copy_(weight)
        return {key: grads[f"{self.layer_path}.{key[0]}.{key[1]}"] for key in self.weights}

    def noisy(self, sigma, step, draw, delta=None, seed=SEED):
        """w + δ + noise of every scored weight."""
        moved = {}
        for (layer, name), weight in self.weights.items():
            at = noise_seed(seed, step, draw, layer, name)
            shift = None if delta is None else delta[layer, name]
            moved[layer, name] = perturb(torch.empty_like(weight), weight, shift, sigma, at)
        return moved

    def totals(self, elements, **options):
        return unit_totals(self.sizes, self.kinds, LAYERS, elements, **options)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    made = {}

    def case(family):
        if family not in made:
            made[family] = Case(family, tmp_path_factory.mktemp(family))
        return made[family]

    return case


@pytest.fixture(params=FAMILIES_TESTED)
def case(request, cases):
    return cases(request.param)


@pytest.fixture
def llama(cases):
    return cases("llama")


def averaged(gradients):
    return {key: sum(grads[key] for grads in gradients) / len(gradients) for key in gradients[0]}


def whole_moreau(case, *, steps, rho, gamma, sigma, draws, eta=None, quantile=None):
    """MoreauPruner(-GS) on the whole model in float64: δ after T updates, and how many lines are zero."""
    delta = {key: torch.zeros_like(weight) for key, weight in case.weights.items()}
    etas = {}
    for step in range(steps):
        grads = averaged([case.gradients(case.noisy(sigma, step, draw, delta)) for draw in range(draws)])
        for key, grad in grads.items():
            dim = line_dim(key[1])
            if quantile is not None and step == 0:
                etas[key] = float(grad.square().sum(1 - dim).sqrt().quantile(quantile))
            delta[key] = (1 - gamma / rho) * delta[key] - gamma * grad
            if eta is not None or quantile is not None:
                delta[key] = group_shrink(delta[key], dim, gamma * etas.get(key, eta))
    return delta


# --- methods beside the whole model ----------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["first", "second", "mix", "vectorize"])
def test_taylor_equals_the_whole_model(order, case):
    grads, weights = case.gradients(), case.weights
    reduce = {}
    if order == "first":
        elements = {key: (grads[key] * weight).abs() for key, weight in weights.items()}
    elif order == "vectorize":
        elements = {key: grads[key] * weight for key, weight in weights.items()}
        # The absolute value is taken per row or column, before matrices are added.
        reduce = {"reduce": lambda piece, dim: piece.sum(1 - dim).abs().sum()}
    else:
        samples = [case.gradients(ids=case.ids[n : n + 1]) for n in range(len(case.ids))]
        fisher = {key: sum(sample[key] ** 2 for sample in samples) / len(samples) for key in weights}
        elements = {key: weight**2 * fisher[key] for key, weight in weights.items()}
        if order == "mix":
            elements = {key: (grads[key] * w - elements[key] / 2).abs() for key, w in weights.items()}
    # Per-sample gradients go through other batch sizes, and Llama's norms compute in float32.
    rtol = 1e-9 if order in ("first", "vectorize") else 1e-5
    assert_scores(run("taylor", case.statistics(), order=order), case.totals(elements, **reduce), rtol)


@pytest.mark.parametrize("mean", ["gradient", "score"])
def test_smoothgrad_equals_the_whole_model_with_the_same_noise(mean, case):
    draws, sigma = 3, 0.1
    noisy = [case.gradients(case.noisy(sigma, 0, draw)) for draw in range(draws)]
    if mean == "gradient":
        elements = {key: (grad * case.weights[key]).abs() for key, grad in averaged(noisy).items()}
    else:
        elements = averaged([{key: (g * case.weights[key]).abs() for key, g in grads.items()} for grads in noisy])
    scores = run("smoothgrad", case.statistics(), draws=draws, sigma=sigma, mean=mean)
    assert_scores(scores, case.totals(elements))
    plain = run("taylor", case.statistics())
    assert all((scores[key] / plain[key] - 1).abs().max() > 1e-3 for key in scores)  # the noise does something


@pytest.mark.parametrize("steps,draws", [(1, 1), (4, 1), (3, 2)])
def test_moreau_equals_the_whole_model(steps, draws, case):
    # γ so large that the gradient changes on the way: a method that never moved w would be seen.
    settings = {"steps": steps, "draws": draws, "rho": 0.3, "gamma": 0.1, "sigma": 0.05}
    delta = whole_moreau(case, **settings)
    expected = case.totals({key: (delta[key] * w).abs() / settings["rho"] for key, w in case.weights.items()})
    scores = run("moreau", case.statistics(), **settings)
    assert_scores(scores, expected, rtol=1e-6)
    if steps > 1:
        constant = run("smoothgrad", case.statistics(), draws=draws, sigma=settings["sigma"])
        factor = 1 - (1 - settings["gamma"] / settings["rho"]) ** steps
        assert any((scores[key] / (factor * constant[key]) - 1).abs().max() > 1e-2 for key in scores)


@pytest.mark.parametrize("choice", ["eta", "eta_quantile"])
@pytest.mark.parametrize("steps,draws", [(1, 1), (4, 1), (3, 2)])
def test_moreau_gs_equals_the_whole_model(steps, draws, choice, case):
    settings = {"steps": steps, "draws": draws, "rho": 0.3, "gamma": 0.1, "sigma": 0.05}
    if choice == "eta":
        grads = case.gradients()
        norms = torch.cat([grad.square().sum(1 - line_dim(key[1])).sqrt() for key, grad in grads.items()])
        eta = float(norms.quantile(0.4))
        expected, given = {"eta": eta}, {"eta": eta}
    else:
        # Between two norms: a norm that equals the threshold would be decided by the last bit.
        expected, given = {"quantile": 0.27}, {"eta_quantile": 0.27}
    delta = whole_moreau(case, **settings, **expected)
    zero = torch.cat([(value == 0).all(1 - line_dim(key[1])) for key, value in delta.items()]).double().mean()
    assert 0.05 < zero < 0.8, "the threshold must bite, and not everywhere"
    elements = {key: (delta[key] * w).abs() / settings["rho"] for key, w in case.weights.items()}
    scores = run("moreau-gs", case.statistics(), **settings, **given)
    largest = max(float(value.max()) for value in scores.values())
    assert_scores(scores, case.totals(elements), rtol=1e-5, atol=1e-9 * largest)


def test_magnitude_is_the_l2_norm_of_the_unit(case):
    squares = case.totals({key: weight**2 for key, weight in case.weights.items()})
    expected = {key: value.sqrt() for key, value in squares.items()}
    assert_scores(run("magnitude", case.statistics()), expected, rtol=1e-13)


def test_scores_cover_the_prunable_layers_and_kinds_only(case):
    for name, settings in (("random", {}), ("magnitude", {}), ("taylor", {}), ("moreau", {"steps": 1})):
        scores = run(name, case.statistics(), **settings)
        assert set(scores) == set(itertools.product(LAYERS, case.kinds)), name
        for (_, kind), values in scores.items():
            assert values.shape == (case.sizes.kv_groups if kind == "kv_group" else case.sizes.channels,)
            assert torch.isfinite(values).all() and (values >= 0).all()


def test_low_precision_checkpoints_score_their_stored_weights(tmp_path):
    # bf16 on disk, float64 compute: the weights are exact, so nothing may be lost.
    save_tiny(tmp_path, "llama", dtype=torch.bfloat16)
    ids = token_ids()
    stored = run("taylor", Statistics(make_sweeper(tmp_path), ids, LAYERS, 0))
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    grads = whole_model_gradients(model, ids)
    elements = {}
    for layer in LAYERS:
        for name, weight in model.model.layers[layer].named_parameters():
            if weight.ndim == 2:
                elements[layer, name] = (weight.detach() * grads[f"model.layers.{layer}.{name}"]).abs()
    # The product is made in float32 because the weight is not float64.
    assert_scores(stored, unit_totals(SIZES["llama"], ("kv_group", "channel"), LAYERS, elements), rtol=1e-5)


# --- identities on streamed gradients --------------------------------------------------------------------------


def test_identity_1_one_memoryless_step_without_noise_is_taylor_first(case):
    taylor = run("taylor", case.statistics(), order="first")
    memoryless = run("moreau", case.statistics(), steps=1, sigma=0, gamma=0.125, rho=0.125)
    # A power of two, so that γ and 1/ρ cancel exactly.
    assert all(torch.equal(memoryless[key], taylor[key]) for key in taylor)
    scaled = run("moreau", case.statistics(), steps=1, sigma=0, gamma=0.003, rho=0.05)
    assert_scores(scaled, {key: value * 0.003 / 0.05 for key, value in taylor.items()}, rtol=1e-12)


def test_identity_3_group_shrinking_at_zero_is_moreau(case):
    settings = {"steps": 3, "draws": 2, "rho": 0.3, "gamma": 0.1}
    plain = run("moreau", case.statistics(), **settings)
    shrunk = run("moreau-gs", case.statistics(), **settings, eta=0)
    assert all(torch.equal(shrunk[key], plain[key]) for key in plain)


def test_identity_3_units_whose_gradients_stay_below_eta_score_zero(case):
    grads = case.gradients()
    largest = max(float(g.square().sum(1 - line_dim(key[1])).sqrt().max()) for key, g in grads.items())
    none = run("moreau-gs", case.statistics(), steps=3, sigma=0, eta=largest * 1.01)
    assert all((value == 0).all() for value in none.values())
    some = run("moreau-gs", case.statistics(), steps=1, sigma=0, eta=largest * 0.99)
    assert sum(int((value > 0).sum()) for value in some.values()) == 1


def test_identity_6_moreau_with_one_memoryless_step_of_n_draws_is_smoothgrad(case):
    moreau = run("moreau", case.statistics(), steps=1, draws=4, sigma=0.1, gamma=0.25, rho=0.25)
    of_mean = run("smoothgrad", case.statistics(), draws=4, sigma=0.1, mean="gradient")
    mean_of = run("smoothgrad", case.statistics(), draws=4, sigma=0.1, mean="score")
    assert_scores(moreau, of_mean, rtol=1e-13)
    for key in of_mean:
        assert (of_mean[key] <= mean_of[key] * (1 + 1e-12)).all()
        assert (of_mean[key] < mean_of[key] * (1 - 1e-6)).any()


def test_smoothgrad_without_noise_is_taylor_first(case):
    taylor = run("taylor", case.statistics())
    for mean in ("gradient", "score"):
        assert_scores(run("smoothgrad", case.statistics(), draws=4, sigma=0, mean=mean), taylor, rtol=1e-13)


def test_noise_follows_the_seed_and_repeats(llama):
    settings = {"steps": 2, "draws": 2}
    once, again = (run("moreau", llama.statistics(seed=1), **settings) for _ in range(2))
    other = run("moreau", llama.statistics(seed=2), **settings)
    assert all(torch.equal(once[key], again[key]) for key in once)
    assert all(not torch.equal(once[key], other[key]) for key in once)


def streamed_products(case):
    """g ⊙ w of every scored tensor, as the sweep gives them."""
    products = {}
    case.statistics().gradients(lambda ref, weight, grad, fisher: products.update({ref.key: grad * weight}))
    return products


GATED = ("llama", "mistral", "qwen2", "phi3")


def parts(case, products, layer):
    """q, k, v, o, gate, up, down of a layer, fused tensors taken apart."""
    get = lambda name: products.get((layer, name))  # noqa: E731
    sizes = case.sizes
    if case.family == "phi3":
        n_query, n_kv = sizes.kv_groups * sizes.n_rep * sizes.head_dim, sizes.kv_groups * sizes.head_dim
        q, k, v = get("self_attn.qkv_proj.weight").split([n_query, n_kv, n_kv])
        gate, up = get("mlp.gate_up_proj.weight").split(sizes.channels)
    else:
        q, k, v = (get(f"self_attn.{letter}_proj.weight") for letter in "qkv")
        gate, up = get("mlp.gate_proj.weight"), get("mlp.up_proj.weight")
    o, down = get("self_attn.o_proj.weight"), get("mlp.down_proj.weight")
    return SimpleNamespace(q=q, k=k, v=v, o=o, gate=gate, up=up, down=down)


def bias_products(case, layer):
    """g · b of q, k and v [rows each] by whole-model autograd; 0 where the family has none."""
    grads = whole_model_gradients(case.model, case.ids)
    names = [f"{case.layer_path}.{layer}.self_attn.{letter}_proj.bias" for letter in "qkv"]
    return [grads[name] * case.parameters[name].detach() if name in grads else 0.0 for name in names]


def assert_gauge(one, other):
    assert one.shape == other.shape
    # The float32 norms inside the layers are not on these paths; what is left is float64 rounding.
    assert (one - other).abs().max() <= 1e-10 * one.abs().max()
    assert one.abs().max() > 0


@pytest.mark.parametrize("family", GATED)
def test_identity_7_swiglu_gauge_up_row_equals_down_column(family, cases):
    case = cases(family)
    products = streamed_products(case)
    for layer in LAYERS:
        p = parts(case, products, layer)
        assert_gauge(p.up.sum(1), p.down.sum(0))


@pytest.mark.parametrize("family", GATED)
def test_identity_8_attention_gauge_value_row_equals_its_output_columns(family, cases):
    case = cases(family)
    products, sizes = streamed_products(case), case.sizes
    for layer in LAYERS:
        p = parts(case, products, layer)
        # A scaled value row of group k is undone by its column in each of the group's query heads.
        values = (p.v.sum(1) + bias_products(case, layer)[2]).view(sizes.kv_groups, sizes.head_dim)
        columns = p.o.sum(0).view(sizes.kv_groups, sizes.n_rep, sizes.head_dim).sum(1)
        assert_gauge(values, columns)


@pytest.mark.parametrize("family", GATED)
def test_identity_8_attention_gauge_key_pairs_equal_their_query_pairs(family, cases):
    case = cases(family)
    products, sizes = streamed_products(case), case.sizes
    half = sizes.head_dim // 2
    for layer in LAYERS:
        p, bias = parts(case, products, layer), bias_products(case, layer)
        # RoPE turns dimensions c and c + head_dim/2 into each other, so only the pair can be scaled as one.
        keys = (p.k.sum(1) + bias[1]).view(sizes.kv_groups, 2, half).sum(1)
        queries = (p.q.sum(1) + bias[0]).view(sizes.kv_groups, sizes.n_rep, 2, half).sum((1, 2))
        assert_gauge(keys, queries)


@pytest.mark.parametrize("family", GATED)
def test_identity_9_rmsnorm_gauge_norm_equals_the_columns_it_feeds(family, cases):
    case = cases(family)
    products, grads = streamed_products(case), whole_model_gradients(case.model, case.ids)
    for layer in LAYERS:
        p = parts(case, products, layer)
        for norm, fed in (("input_layernorm", (p.q, p.k, p.v)), ("post_attention_layernorm", (p.gate, p.up))):
            name = f"{case.layer_path}.{layer}.{norm}.weight"
            assert_gauge(case.parameters[name].detach() * grads[name], sum(part.sum(0) for part in fed))


@pytest.mark.parametrize("family", FAMILIES_TESTED)
def test_identity_10_fisher_of_one_sample_is_the_squared_gradient(family, cases):
    case = cases(family)
    one = case.ids[:1]
    gw = {key: grad * case.weights[key] for key, grad in case.gradients(ids=one).items()}
    statistics = Statistics(case.sweeper, one, LAYERS, SEED)
    second, mix = run("taylor", statistics, order="second"), run("taylor", statistics, order="mix")
    assert_scores(second, case.totals({key: value**2 for key, value in gw.items()}), rtol=1e-9)
    assert_scores(mix, case.totals({key: (v - v**2 / 2).abs() for key, v in gw.items()}), rtol=1e-9)


def test_identity_10_vectorize_is_at_most_first(case):
    first, signed = run("taylor", case.statistics()), run("taylor", case.statistics(), order="vectorize")
    for key in first:
        assert (signed[key] <= first[key] * (1 + 1e-12)).all()
        assert (signed[key] < first[key] * 0.9).any()


def permuted_copy(family, path, channel_order, group_order):
    """The same function with the channels and KV groups of every layer in another order, saved to `path`."""
    sizes, model = SIZES[family], tiny_model(family)
    hd, rep = sizes.head_dim, sizes.n_rep
    kv = torch.cat([torch.arange(g * hd, (g + 1) * hd) for g in group_order])
    query = torch.cat([torch.arange(g * rep * hd, (g + 1) * rep * hd) for g in group_order])
    channels = torch.tensor(channel_order)
    fused_qkv = torch.cat([query, kv + len(query), kv + len(query) + len(kv)])
    rows = {"q_proj": query, "k_proj": kv, "v_proj": kv, "qkv_proj": fused_qkv, "gate_proj": channels}
    rows |= {"up_proj": channels, "gate_up_proj": torch.cat([channels, channels + sizes.channels]), "c_fc": channels}
    columns = {"o_proj": query, "down_proj": channels}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            kind = name.split(".")[-2]
            if family == "gpt2" and ".mlp." in name:  # Conv1D is [d_in, d_out]
                if kind == "c_fc":
                    parameter.copy_(parameter[..., channels].clone())
                elif name.endswith("c_proj.weight"):
                    parameter.copy_(parameter[channels].clone())
            elif kind in rows:
                parameter.copy_(parameter[rows[kind]].clone())
            elif kind in columns and parameter.ndim == 2:
                parameter.copy_(parameter[:, columns[kind]].clone())
    model.save_pretrained(path)
    save_tokenizer(path)
    return model


def test_identity_18_scores_follow_a_permutation_of_channels_and_groups(case, tmp_path):
    order = {
        "channel": torch.randperm(37, generator=torch.Generator().manual_seed(3)),
        "kv_group": torch.tensor([2, 0, 1]),
    }
    model = permuted_copy(case.family, tmp_path, order["channel"].tolist(), order["kv_group"].tolist())
    torch.testing.assert_close(model(case.ids).logits, case.model(case.ids).logits, rtol=1e-6, atol=1e-6)
    permuted = Statistics(make_sweeper(tmp_path), case.ids, LAYERS, SEED)
    methods = [("taylor", {"order": order}) for order in ("first", "second", "mix", "vectorize")]
    methods += [("magnitude", {}), ("moreau", {"sigma": 0, "steps": 3, "rho": 0.3, "gamma": 0.1})]
    methods += [("moreau-gs", {"sigma": 0, "steps": 2, "rho": 0.3, "gamma": 0.1, "eta_quantile": 0.27})]
    for name, settings in methods:
        before, after = run(name, case.statistics(), **settings), run(name, permuted, **settings)
        expected = {key: values[order[key[1]]] for key, values in before.items()}
        assert_scores(after, expected, rtol=1e-4, atol=1e-6 * max(float(v.max()) for v in before.values()))


# --- methods driven by a known gradient ------------------------------------------------------------------------

HIDDEN = 7
GEOMETRY = Geometry(kv_groups=2, n_rep=2, head_dim=3, channels=5)
SHAPES = {
    "self_attn.q_proj.weight": (12, HIDDEN),
    "self_attn.k_proj.weight": (6, HIDDEN),
    "self_attn.v_proj.weight": (6, HIDDEN),
    "self_attn.o_proj.weight": (HIDDEN, 12),
    "mlp.gate_proj.weight": (5, HIDDEN),
    "mlp.up_proj.weight": (5, HIDDEN),
    "mlp.down_proj.weight": (HIDDEN, 5),
}
KINDS = ("kv_group", "channel")
FAKE_LAYERS = (2, 3)


def random_tensors(seed, scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {
        (layer, name): (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)
        for layer in FAKE_LAYERS
        for name, shape in SHAPES.items()
    }


class FakeStatistics:
    """Statistics whose gradient is `gradient(key, perturbed weight)`; the noise is the package's own.

    compute: the dtype of perturbed weights. Records the weights and gradients of each sweep, and each perturbation.
    """

    def __init__(self, weights, gradient, seed=0, compute=torch.float64):
        self.layers, self.kinds, self.geometry, self.seed = FAKE_LAYERS, KINDS, GEOMETRY, seed
        self.stored, self.gradient, self.compute = weights, gradient, compute
        members = {member.tensor: member for member in FAMILIES["llama"].members}
        self.refs = {key: TensorRef(key[0], members[key[1]], GEOMETRY) for key in weights}
        self.seen, self.grads, self.perturbations = [], [], []

    def weights(self, consume):
        for key, weight in self.stored.items():
            consume(self.refs[key], weight.clone())

    def gradients(self, consume, perturbation=None, *, second_moment=False):
        moved = {}
        for key, weight in self.stored.items():
            if perturbation is None:
                moved[key] = weight.to(self.compute)
                continue
            seed = noise_seed(*perturbation.key, *key)
            out = torch.empty(weight.shape, dtype=self.compute)
            moved[key] = perturb(out, weight, perturbation.delta.get(key), perturbation.sigma, seed)
        grads = {key: self.gradient(key, weight) for key, weight in moved.items()}
        self.seen.append(moved)
        self.grads.append(grads)
        self.perturbations.append(perturbation)
        # Backwards, as a sweep comes; each consumer may overwrite what it is given.
        for key in reversed(self.stored):
            moment = grads[key].square() if second_moment else None
            consume(self.refs[key], self.stored[key].clone(), grads[key].clone(), moment)
        return 0.0


def fake_totals(elements):
    return unit_totals(GEOMETRY, KINDS, FAKE_LAYERS, elements)


W, G = random_tensors(1), random_tensors(2)


def constant(gradients=G):
    return FakeStatistics(W, lambda key, weight: gradients[key])


@pytest.mark.parametrize("steps", [1, 2, 10])
@pytest.mark.parametrize("rho,gamma", [(0.05, 1e-3), (0.2, 2e-4), (0.1, 0.1), (0.1, 0.15)])
def test_identity_2_constant_gradient_gives_a_geometric_factor(rho, gamma, steps):
    factor = 1 - (1 - gamma / rho) ** steps
    expected = fake_totals({key: factor * (G[key] * w).abs() for key, w in W.items()})
    assert_scores(run("moreau", constant(), steps=steps, rho=rho, gamma=gamma, draws=3), expected, rtol=1e-11)


@pytest.mark.parametrize("steps", [1, 2, 10])
@pytest.mark.parametrize("rho,gamma", [(0.05, 1e-3), (0.2, 2e-4), (0.1, 0.1)])
def test_identity_2_with_group_shrinking_the_same_factor_times_the_shrunk_gradient(rho, gamma, steps):
    eta, factor = 2.5, 1 - (1 - gamma / rho) ** steps
    shrunk = {key: group_shrink(g, line_dim(key[1]), eta) for key, g in G.items()}
    zero = torch.cat([(s == 0).all(1 - line_dim(key[1])) for key, s in shrunk.items()]).double().mean()
    assert 0.2 < zero < 0.8
    expected = fake_totals({key: factor * (shrunk[key] * w).abs() for key, w in W.items()})
    scores = run("moreau-gs", constant(), steps=steps, rho=rho, gamma=gamma, eta=eta)
    assert_scores(scores, expected, rtol=1e-10, atol=1e-14)


def test_identity_2_holds_for_bfloat16_weights_because_delta_is_kept_apart_in_float32():
    weights = {key: w.bfloat16() for key, w in W.items()}
    small = {key: (g * 1e-4).float() for key, g in G.items()}  # w + δ rounds to w in bf16
    fake = FakeStatistics(weights, lambda key, weight: small[key], compute=torch.bfloat16)
    scores = run("moreau", fake, steps=10, rho=0.05, gamma=1e-3)
    factor = 1 - (1 - 1e-3 / 0.05) ** 10
    expected = {key: factor * (small[key].double() * w.double()).abs() for key, w in weights.items()}
    assert_scores(scores, fake_totals(expected), rtol=3e-6)
    assert {value.dtype for p in fake.perturbations for value in p.delta.values()} <= {torch.float32}


@pytest.mark.parametrize("dim_of", [0, 1], ids=["rows", "columns"])
def test_identity_3_one_step_is_nonzero_exactly_where_the_gradient_norm_exceeds_eta(dim_of):
    # Only one tensor has gradients, so that its lines are the channels' scores.
    name = "mlp.up_proj.weight" if dim_of == 0 else "mlp.down_proj.weight"
    norms = torch.tensor([0.0, 1.0, 2.0, 2.5, 4.0], dtype=torch.float64)
    only = {key: torch.zeros_like(w) for key, w in W.items()}
    for layer in FAKE_LAYERS:
        line = torch.zeros(HIDDEN, dtype=torch.float64)
        line[0], line[3] = 0.6, -0.8
        grad = norms[:, None] * line
        only[layer, name] = grad if dim_of == 0 else grad.T.contiguous()
    for eta, expected in ((0, [0, 1, 1, 1, 1]), (1.5, [0, 0, 1, 1, 1]), (2.25, [0, 0, 0, 1, 1]), (5, [0] * 5)):
        scores = run("moreau-gs", constant(only), steps=1, eta=eta, gamma=0.125, rho=0.25)
        for layer in FAKE_LAYERS:
            assert (scores[layer, "channel"] > 0).tolist() == [bool(x) for x in expected], eta
            assert (scores[layer, "kv_group"] == 0).all()


def test_identity_3_a_one_element_group_is_scalar_soft_thresholded():
    # One nonzero element per row: the row's group shrink is that element's soft threshold.
    only = {key: torch.zeros_like(w) for key, w in W.items()}
    values = torch.tensor([-3.0, -0.5, 0.25, 1.0, 2.0], dtype=torch.float64)
    only[2, "mlp.gate_proj.weight"][:, 4] = values
    eta, gamma, rho = 0.75, 0.01, 0.05
    scores = run("moreau-gs", constant(only), steps=1, eta=eta, gamma=gamma, rho=rho)
    soft = (values.abs() - eta).clamp(min=0)
    expected = gamma / rho * soft * W[2, "mlp.gate_proj.weight"][:, 4].abs()
    torch.testing.assert_close(scores[2, "channel"], expected, rtol=1e-12, atol=0)


def nonlinear(key, weight):
    """A gradient that depends on every element, and on where it stands."""
    return torch.sin(3 * weight) + 0.2 * weight.flip(0)


def test_identity_4_delta_is_the_discounted_sum_of_the_gradients_seen():
    rho, gamma, steps, draws = 0.3, 0.1, 5, 2
    fake = FakeStatistics(W, nonlinear)
    scores = run("moreau", fake, steps=steps, draws=draws, rho=rho, gamma=gamma, sigma=0.05)
    assert len(fake.grads) == steps * draws
    delta = {}
    for key in W:
        means = [sum(g[key] for g in fake.grads[t * draws : (t + 1) * draws]) / draws for t in range(steps)]
        delta[key] = -gamma * sum((1 - gamma / rho) ** (steps - 1 - t) * g for t, g in enumerate(means))
    assert_scores(scores, fake_totals({key: (delta[key] * w).abs() / rho for key, w in W.items()}), rtol=1e-12)


def test_identity_4_the_gradient_is_taken_at_the_weight_plus_delta():
    rho, gamma = 0.3, 0.1
    fake = FakeStatistics(W, nonlinear)
    run("moreau", fake, steps=4, rho=rho, gamma=gamma, sigma=0)
    delta = {key: torch.zeros_like(w) for key, w in W.items()}
    for seen, grads in zip(fake.seen, fake.grads, strict=True):
        for key, w in W.items():
            torch.testing.assert_close(seen[key], w + delta[key], rtol=1e-13, atol=1e-14)
            delta[key] = (1 - gamma / rho) * delta[key] - gamma * grads[key]


def test_identity_4_gamma_equal_to_rho_is_memoryless():
    fake = FakeStatistics(W, nonlinear)
    scores = run("moreau", fake, steps=4, rho=0.25, gamma=0.25, sigma=0)
    last = fake.grads[-1]
    assert_scores(scores, fake_totals({key: (last[key] * w).abs() for key, w in W.items()}), rtol=1e-12)


H, C = {key: h.abs() + 0.1 for key, h in random_tensors(3).items()}, random_tensors(4)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_identity_5_quadratic_loss_has_a_closed_form(steps):
    rho, gamma = 0.2, 0.03
    fake = FakeStatistics(W, lambda key, weight: H[key] * (weight - C[key]))
    elements = {}
    for key, w in W.items():
        rate = H[key] + 1 / rho
        delta = -(1 - (1 - gamma * rate) ** steps) / rate * H[key] * (w - C[key])
        elements[key] = (delta * w).abs() / rho
    assert_scores(run("moreau", fake, steps=steps, rho=rho, gamma=gamma, sigma=0), fake_totals(elements), rtol=1e-11)


def test_identity_5_many_steps_reach_the_gradient_of_the_moreau_envelope():
    rho, gamma = 0.2, 0.05
    fake = FakeStatistics(W, lambda key, weight: H[key] * (weight - C[key]))
    elements = {key: (H[key] * (w - C[key]) * w).abs() / (1 + rho * H[key]) for key, w in W.items()}
    scores = run("moreau", fake, steps=150, rho=rho, gamma=gamma, sigma=0)
    assert_scores(scores, fake_totals(elements), rtol=1e-9)


@pytest.mark.parametrize(
    "name,settings",
    [("smoothgrad", {"draws": 3}), ("moreau", {"draws": 2}), ("moreau-gs", {"draws": 2, "eta": 1.0})],
)
def test_identity_6_a_linear_loss_does_not_feel_noise(name, settings):
    quiet, noisy = run(name, constant(), **settings, sigma=0), run(name, constant(), **settings, sigma=0.7)
    assert all(torch.equal(noisy[key], quiet[key]) for key in quiet)


def test_identity_6_zero_weights_get_no_noise_and_score_zero():
    weights = {key: w.clone() for key, w in W.items()}
    for layer in FAKE_LAYERS:
        weights[layer, "mlp.gate_proj.weight"][2] = 0
        weights[layer, "mlp.up_proj.weight"][2] = 0
        weights[layer, "mlp.down_proj.weight"][:, 2] = 0
    fake = FakeStatistics(weights, nonlinear)
    for name, settings in (("smoothgrad", {"draws": 3}), ("moreau", {"steps": 1, "draws": 3}), ("moreau", {})):
        scores = run(name, fake, sigma=0.5, **settings)
        for layer in FAKE_LAYERS:
            assert scores[layer, "channel"][2] == 0
            assert (scores[layer, "channel"][[0, 1, 3, 4]] > 0).all()
    for seen, perturbation in zip(fake.seen, fake.perturbations, strict=True):
        if not perturbation.delta:
            assert (seen[2, "mlp.up_proj.weight"][2] == 0).all()


@pytest.mark.parametrize("name,settings", [("smoothgrad", {"draws": 4}), ("moreau", {"draws": 2, "steps": 3})])
def test_every_step_and_draw_sees_other_noise(name, settings):
    fake = FakeStatistics(W, lambda key, weight: G[key], seed=9)
    run(name, fake, sigma=0.05, **settings)
    keys = [perturbation.key for perturbation in fake.perturbations]
    steps, draws = settings.get("steps", 1), settings["draws"]
    assert keys == [(9, step, draw) for step in range(steps) for draw in range(draws)]
    assert all(perturbation.sigma == 0.05 for perturbation in fake.perturbations)


def test_smoothgrad_forms_agree_only_where_gradients_do_not_change_sign():
    flips = itertools.cycle([1.0, -1.0])
    sign = {}

    def alternating(key, weight):
        if key == (2, "self_attn.q_proj.weight"):
            sign["now"] = next(flips)
        return sign["now"] * G[key]

    of_mean = run("smoothgrad", FakeStatistics(W, alternating), draws=2)
    mean_of = run("smoothgrad", FakeStatistics(W, alternating), draws=2, mean="score")
    assert all((value == 0).all() for value in of_mean.values())
    assert_scores(mean_of, fake_totals({key: (G[key] * w).abs() for key, w in W.items()}), rtol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("quantile", [0, 0.25, 0.3, 0.5, 0.9, 1])
def test_eta_quantile_zeroes_the_lines_up_to_that_quantile_of_each_matrix(quantile, dtype):
    # Rows of norms 1..5 in `up` alone; matrices of other layers are a thousand times larger and decide nothing.
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(5, HIDDEN, generator=generator, dtype=torch.float64), dim=1)
    rows = rows * torch.tensor([3.0, 1.0, 5.0, 2.0, 4.0])[:, None]
    only = {key: torch.zeros_like(w, dtype=dtype) for key, w in W.items()}
    only[2, "mlp.up_proj.weight"], only[3, "mlp.up_proj.weight"] = rows.to(dtype), (1000 * rows).to(dtype)
    weights = {key: w.to(dtype) for key, w in W.items()}
    fake = FakeStatistics(weights, lambda key, weight: only[key], compute=dtype)
    scores = run("moreau-gs", fake, steps=1, eta_quantile=quantile)
    eta = 1 + 4 * quantile  # of 1, 2, 3, 4, 5 with linear interpolation
    for layer in FAKE_LAYERS:
        positive = (scores[layer, "channel"] > 0).tolist()
        assert positive == [norm > eta + 1e-9 for norm in (3, 1, 5, 2, 4)]
        assert torch.isfinite(scores[layer, "kv_group"]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eta_quantile_of_one_zeroes_every_unit(dtype):
    # The largest line's norm equals γη, and a line goes when its norm is at most γη.
    for seed in range(20):
        grads = random_tensors(seed, dtype=dtype)
        fake = FakeStatistics(grads, lambda key, weight, grads=grads: grads[key], compute=dtype)
        scores = run("moreau-gs", fake, steps=1, eta_quantile=1)
        assert all((values == 0).all() for values in scores.values()), seed


def test_eta_quantile_is_fixed_at_step_zero():
    # Gradients shrink tenfold after the first sweep: with η from step 0, later steps are shrunk to nothing.
    def fading(key, weight):
        return G[key] * (1.0 if len(fake.grads) == 0 else 0.1)

    fake = FakeStatistics(W, fading)
    scores = run("moreau-gs", fake, steps=2, eta_quantile=0.47, gamma=0.25, rho=0.25)
    # γ = ρ forgets δ₁, so δ₂ = GST(−0.1γg), which is 0 wherever 0.1‖g_S‖ ≤ η.
    elements = {}
    for key, w in W.items():
        dim = line_dim(key[1])
        eta = float(G[key].square().sum(1 - dim).sqrt().quantile(0.47))
        elements[key] = (group_shrink(0.1 * G[key], dim, eta) * w).abs()
    expected = fake_totals(elements)
    assert all((value == 0).all() for value in expected.values())
    assert_scores(scores, expected)


def test_eta_quantile_does_not_depend_on_the_scale_of_the_gradient():
    scaled = {key: 1e-6 * g for key, g in G.items()}
    settings = {"steps": 3, "eta_quantile": 0.47}
    plain, small = run("moreau-gs", constant(), **settings), run("moreau-gs", constant(scaled), **settings)
    assert_scores(small, {key: 1e-6 * value for key, value in plain.items()}, rtol=1e-10)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.needs == "gradients"])
def test_the_table_announces_as_many_sweeps_as_a_method_makes(name):
    given = {"draws": 3, "steps": 2}
    settings = resolve_settings(name, {key: value for key, value in given.items() if key in METHODS[name].settings})
    fake = constant()
    METHODS[name].score(fake, settings)
    assert len(fake.seen) == METHODS[name].sweeps(settings)


@pytest.mark.parametrize("name", METHODS)
def test_scoring_leaves_the_weights_alone(name):
    fake = FakeStatistics({key: w.clone() for key, w in W.items()}, nonlinear)
    METHODS[name].score(fake, resolve_settings(name, {"draws": 2} if "draws" in METHODS[name].settings else {}))
    assert all(torch.equal(fake.stored[key], w) for key, w in W.items())


# --- random ----------------------------------------------------------------------------------------------------


def test_random_is_uniform_seeded_and_different_in_every_layer_and_kind():
    many = Geometry(kv_groups=4000, n_rep=1, head_dim=2, channels=4000)

    def scores(seed, layers=FAKE_LAYERS):
        return run("random", SimpleNamespace(layers=layers, kinds=KINDS, geometry=many, seed=seed))

    first, again, other = scores(1), scores(1), scores(2)
    assert all(torch.equal(first[key], again[key]) for key in first)
    everything = [*first.values(), *other.values()]
    assert len({tuple(values[:20].tolist()) for values in everything}) == len(everything)
    for values in everything:
        assert values.min() >= 0 and values.max() < 1
        assert (values.sort().values - torch.linspace(0, 1, 4000)).abs().max() < 2.23 / 4000**0.5
    correlations = torch.corrcoef(torch.stack(everything)) - torch.eye(len(everything))
    assert correlations.abs().max() < 5 / 4000**0.5
    # A layer's scores do not depend on which other layers are prunable.
    assert torch.equal(scores(1, (3,))[3, "channel"], first[3, "channel"])


# --- settings --------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_papers():
    assert resolve_settings("smoothgrad", {}) == {"draws": 100, "sigma": 0.05, "mean": "gradient"}
    common = {"steps": 10, "sigma": 0.05, "draws": 1}
    assert resolve_settings("moreau", {}) == {**common, "rho": 0.05, "gamma": 1e-3}
    gs = {**common, "rho": 0.2, "gamma": 2e-4, "eta": 5e-6, "eta_quantile": None}
    assert resolve_settings("moreau-gs", {}) == gs
    assert resolve_settings("taylor", {}) == {"order": "first"}
    assert resolve_settings("magnitude", {}) == resolve_settings("random", {}) == {}


def test_given_settings_win_and_text_becomes_numbers():
    settings = resolve_settings("moreau-gs", {"steps": "3", "rho": "0.1", "eta_quantile": "0.5", "gamma": 1e-3})
    assert settings["steps"] == 3 and isinstance(settings["steps"], int)
    assert (settings["rho"], settings["eta_quantile"], settings["gamma"]) == (0.1, 0.5, 1e-3)
    assert settings["eta"] == 5e-6
    assert resolve_settings("taylor", {"order": "mix"}) == {"order": "mix"}


@pytest.mark.parametrize(
    "method,given,fragments",
    [
        ("wanda2", {}, ["wanda2", *METHODS]),
        ("moreau", {"lambda": 1}, ["moreau", "lambda", "rho", "gamma", "steps"]),
        ("moreau", {"eta": 1e-6}, ["moreau", "eta"]),
        ("random", {"seed": 1}, ["random", "seed"]),
        ("moreau", {"rho": "small"}, ["rho", "small", "number"]),
        ("moreau", {"rho": ""}, ["rho", "number"]),
        ("moreau", {"steps": "2.5"}, ["steps", "2.5", "integer"]),
        ("moreau", {"steps": "ten"}, ["steps", "ten", "integer"]),
        ("moreau", {"steps": 0}, ["steps", "0", "1"]),
        ("moreau", {"draws": "-1"}, ["draws", "-1", "1"]),
        ("moreau", {"rho": 0}, ["rho", "0"]),
        ("moreau", {"gamma": "0"}, ["gamma", "0"]),
        ("moreau", {"gamma": -1e-3}, ["gamma", "0"]),
        ("smoothgrad", {"sigma": "-0.1"}, ["sigma", "-0.1", "0"]),
        ("moreau-gs", {"eta": "-1"}, ["eta", "-1", "0"]),
        ("moreau-gs", {"eta_quantile": 1.5}, ["eta_quantile", "1.5", "1"]),
        ("moreau-gs", {"eta_quantile": "-0.5"}, ["eta_quantile", "-0.5", "0"]),
        ("moreau", {"rho": "nan"}, ["rho", "nan"]),
        ("smoothgrad", {"sigma": float("nan")}, ["sigma", "nan"]),
        ("moreau-gs", {"eta_quantile": "nan"}, ["eta_quantile", "nan"]),
        ("moreau-gs", {"eta": "nan"}, ["eta", "nan"]),
        ("moreau", {"steps": "nan"}, ["steps", "nan"]),
        ("taylor", {"order": "third"}, ["order", "third", "first", "second", "mix", "vectorize"]),
        ("smoothgrad", {"mean": "median"}, ["mean", "median", "gradient", "score"]),
    ],
)
def test_a_setting_that_cannot_be_meant_is_refused_by_name_value_and_remedy(method, given, fragments):
    with pytest.raises(UsageError) as error:
        resolve_settings(method, given)
    message = str(error.value)
    assert all(fragment in message for fragment in fragments), message
    assert "\n" not in message


@pytest.mark.parametrize("name,value", [("sigma", "inf"), ("gamma", "inf"), ("rho", "inf"), ("steps", float("inf"))])
def test_an_infinite_setting_is_refused(name, value):
    # Infinite noise or steps make every score NaN, and NaN has no order.
    with pytest.raises(UsageError):
        resolve_settings("moreau", {name: value})


def test_a_fractional_count_is_refused_whatever_its_type():
    with pytest.raises(UsageError):
        resolve_settings("moreau", {"steps": 2.5})


def test_models_have_layers_outside_the_prunable_ones():
    assert min(LAYERS) > 0 and max(LAYERS) < N_LAYERS - 1
