"""The identities of the formulas hold on streamed gradients of saved models."""

from types import SimpleNamespace

import pytest
import torch
from plain_methods import FAMILIES_TESTED, LAYERS, SEED, SIZES, assert_scores, line_dim, run
from tiny_models import make_sweeper, save_tokenizer, tiny_model, whole_model_gradients

from streamprune.streaming.statistics import Statistics


@pytest.fixture
def llama(cases):
    return cases("llama")


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
    case.statistics().gradients(lambda ref, weight, grad: products.update({ref.key: grad * weight}))
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
