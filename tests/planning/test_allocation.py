"""Exact counts: the published ones, the removed-parameter formula, ties, and what is refused."""

import json

import pytest
import torch
from tiny_models import FAMILY_NAMES, tiny_model
from transformers import AutoConfig

from streamprune.errors import StreampruneError, UsageError
from streamprune.model.families import FAMILIES, geometry_of, unit_costs
from streamprune.model.model_config import meta_model
from streamprune.model.units import Geometry, all_units
from streamprune.planning.allocation import Ratios, keep_highest, prunable_layers, select, uniform

LLAMA_7B = {"model_type": "llama"}  # transformers' defaults are LLaMA-7B
LLAMA_3_8B = LLAMA_7B | {"num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256}
TINYLLAMA = LLAMA_7B | {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}


@pytest.mark.parametrize(
    ("fields", "layers", "before", "after"),
    [
        (LLAMA_7B, (4, 30), 6_738_415_616, 5_422_977_024),
        (LLAMA_3_8B, (4, 30), 8_030_261_248, 6_612_586_496),
        (TINYLLAMA, (4, 18), 1_100_048_384, 945_907_712),
    ],
    ids=["LLaMA-7B", "Llama-3-8B", "TinyLlama"],
)
def test_published_parameter_counts_from_configs_alone(fields, layers, before, after, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = AutoConfig.from_pretrained(tmp_path)
    family, geometry = FAMILIES["llama"], geometry_of(FAMILIES["llama"], config)
    model = meta_model(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == before
    shapes = {name: parameter.shape for name, parameter in model.model.layers[0].named_parameters()}
    costs = unit_costs(family, geometry, shapes)
    removed = uniform(family, geometry, costs, Ratios(0.25), config.hidden_size, stock=False)
    n_layers = config.num_hidden_layers
    zeros = {layer: {kind: torch.zeros(geometry.units(kind)) for kind in costs} for layer in range(*layers)}
    everything = dict.fromkeys(range(n_layers), all_units(geometry, family.kinds))
    kept = select(zeros, dict.fromkeys(range(*layers), removed), everything)
    gone = {kind: sum(geometry.units(kind) - len(kept[layer][kind]) for layer in kept) for kind in costs}
    assert before - sum(costs[kind] * count for kind, count in gone.items()) == after


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_unit_costs_are_the_formula_plus_biases_and_spanning_norms(family):
    row, model = FAMILIES[family], tiny_model(family, dtype=torch.float32)
    geometry = geometry_of(row, model.config)
    layer = model.get_submodule(row.layers)[0]
    shapes = {name: parameter.shape for name, parameter in layer.named_parameters()}
    hidden, head = model.config.hidden_size, geometry.head_dim
    costs = unit_costs(row, geometry, shapes)
    matrices = 3 if row.ragged else 2  # gate, up and down, or up and down
    bias = {"opt": 1, "gpt_neox": 1, "gpt2": 1, "granite": 2}.get(family, 0)  # granite: gate and up
    assert ("channel" in costs) is (family != "mixtral")  # it has experts
    if "channel" in costs:
        assert costs["channel"] == matrices * hidden + bias
    if "kv_group" in costs:
        biases = (geometry.n_rep + 2) * head
        extra = {"qwen2": biases, "qwen3": biases, "granite": biases, "olmo2": (geometry.n_rep + 1) * head}.get(
            family, 0
        )
        assert costs["kv_group"] == (2 * geometry.n_rep + 2) * head * hidden + extra


SMOLLM = Geometry(kv_groups=3, n_rep=3, head_dim=64, channels=1536)
SMOLLM_COSTS = {"kv_group": 8 * 64 * 576, "channel": 3 * 576}


def smollm(ratios, *, family="llama", stock=False):
    return uniform(FAMILIES[family], SMOLLM, SMOLLM_COSTS, ratios, 576, stock=stock)


def test_three_groups_lose_none_at_a_quarter_and_channels_pay():
    assert smollm(Ratios(0.25)) == {"kv_group": 0, "channel": 512}


def test_attention_and_mlp_ratios_set_the_two_apart():
    assert smollm(Ratios(0.25, attention=0.34, mlp=0.25)) == {"kv_group": 1, "channel": 384}
    # What is not set apart still fills the layer's budget.
    assert smollm(Ratios(0.25, attention=0.34)) == {"kv_group": 1, "channel": 341}  # (884736 − 294912)/1728
    assert smollm(Ratios(0.25, mlp=0.5)) == {"kv_group": 0, "channel": 768}


def test_ratio_zero_removes_nothing():
    assert smollm(Ratios(0.0)) == {"kv_group": 0, "channel": 0}


@pytest.mark.parametrize("ratio", [0.07, 0.29, 0.57, 0.58])
def test_a_product_just_below_a_whole_number_counts_as_that_number(ratio):
    geometry = Geometry(kv_groups=100, n_rep=1, head_dim=4, channels=100)
    costs = {"kv_group": 16 * 8, "channel": 3 * 8}
    removed = uniform(FAMILIES["mistral"], geometry, costs, Ratios(ratio), 8, stock=False)
    assert removed["kv_group"] == round(ratio * 100)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text"])
def test_stock_lands_on_a_head_count_that_divides_and_channels_take_the_rest(family):
    # 12 groups of 1 head, hidden 48: after removing 5, 7 heads do not divide 48; 4 are removed and 8 remain.
    geometry = Geometry(kv_groups=12, n_rep=1, head_dim=4, channels=64)
    costs = {"kv_group": 4 * 4 * 48, "channel": 3 * 48}
    removed = uniform(FAMILIES[family], geometry, costs, Ratios(0.42), 48, stock=True)
    assert removed["kv_group"] == 4
    prunable = 12 * costs["kv_group"] + 64 * costs["channel"]
    gone = sum(removed[kind] * costs[kind] for kind in costs)
    assert abs(gone - 0.42 * prunable) <= costs["channel"] / 2
    free = uniform(FAMILIES["mistral"], geometry, costs, Ratios(0.42), 48, stock=True)
    assert free["kv_group"] == 5


def test_rounding_does_not_hide_that_the_mlp_would_be_empty():
    with pytest.raises(UsageError, match="leaves the MLP empty"):
        smollm(Ratios(0.9, attention=0.0, round_to=64))


def test_kept_widths_are_multiples_of_round_to():
    removed = smollm(Ratios(0.23, round_to=64))
    assert (1536 - removed["channel"]) % 64 == 0
    assert abs(removed["channel"] - smollm(Ratios(0.23))["channel"]) <= 32
    assert smollm(Ratios(0.0, round_to=100))["channel"] == 0
    with pytest.raises(UsageError, match="--round-to 2048"):
        smollm(Ratios(0.2, round_to=2048))


@pytest.mark.parametrize("ratios", [Ratios(0.9, attention=0.0), Ratios(0.1, mlp=0.9999), Ratios(0.999)])
def test_a_layer_is_never_left_empty(ratios):
    with pytest.raises(UsageError, match=r"empty|leaves"):
        smollm(ratios)


def test_attention_of_a_family_with_fixed_heads_is_refused():
    with pytest.raises(UsageError, match="opt"):
        uniform(FAMILIES["opt"], SMOLLM, {"channel": 1153}, Ratios(0.2, attention=0.2), 576, stock=True)


MIXTRAL = Geometry(kv_groups=8, n_rep=4, head_dim=128, channels=14336)


def mixtral(ratios):
    costs = {"kv_group": 10 * 128 * 4096}
    return uniform(FAMILIES["mixtral"], MIXTRAL, costs, ratios, 4096, stock=True)


@pytest.mark.parametrize(("ratio", "groups"), [(0.0, 0), (0.07, 1), (0.18, 1), (0.19, 2), (0.5, 4), (0.9, 7)])
def test_where_only_attention_goes_it_is_the_nearest_number_of_groups(ratio, groups):
    assert mixtral(Ratios(ratio)) == mixtral(Ratios(0.3, attention=ratio)) == {"kv_group": groups}


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        (Ratios(0.06), "0.06 is less than half of one of 8 KV groups"),
        (Ratios(0.94), "0.94 leaves no KV group of 8"),
        (Ratios(0.25, mlp=0.1), "leave --mlp-ratio out"),
        (Ratios(0.25, round_to=64), "--round-to is of channels"),
    ],
)
def test_where_only_attention_goes_other_ratios_are_refused(ratios, message):
    with pytest.raises(UsageError, match=message):
        mixtral(ratios)


def test_exactly_k_go_and_of_equal_scores_the_lowest_index_first():
    scores = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.5, 2.0])
    assert keep_highest(scores, 0) == [0, 1, 2, 3, 4, 5]
    assert keep_highest(scores, 2) == [0, 2, 3, 5]
    assert keep_highest(torch.ones(5), 3) == [3, 4]


def test_a_score_that_is_not_finite_is_an_error():
    with pytest.raises(StreampruneError, match="NaN"):
        keep_highest(torch.tensor([1.0, float("nan")]), 1)


def test_default_layers_are_the_published_ones_and_all_for_stock():
    assert prunable_layers(None, 32, stock=False) == range(4, 30)
    assert prunable_layers(None, 32, stock=True) == range(32)
    assert prunable_layers((4, 28), 30, stock=False) == range(4, 28)


@pytest.mark.parametrize(
    ("given", "stock"),
    [((0, 33), False), ((5, 5), False), ((6, 3), False), ((-1, 3), False), ((4, 30), True)],
)
def test_layers_outside_the_model_are_refused(given, stock):
    with pytest.raises(UsageError, match="--layers"):
        prunable_layers(given, 32, stock=stock)
