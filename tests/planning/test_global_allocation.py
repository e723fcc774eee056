"""Comparing all layers: budget, limits, multiples and ties against a plain reference; runs with Taylor and FLAP."""

import itertools
import json
import math
import random
import statistics

import pytest
import torch
from cli_runner import check_refusal
from marks import slow
from plain_methods import SIZES, unit_totals
from safetensors.torch import load_file
from tiny_models import whole_model_gradients
from transformers import AutoTokenizer
from whole_models import load, matrix, out_name, run, stack

from streamprune.errors import StreampruneError, UsageError
from streamprune.model.units import Geometry, all_units
from streamprune.planning import allocation
from streamprune.planning.allocation import GlobalRule, allocate_globally, check_global
from streamprune.texts.documents import embedded_text

GEOMETRY = Geometry(kv_groups=4, n_rep=2, head_dim=3, channels=37)
COSTS = {"kv_group": 6 * 3 * 20, "channel": 3 * 20}
KINDS = ("kv_group", "channel")


def alike(costs, n_layers):
    """The same in every layer."""
    return dict.fromkeys(range(n_layers), costs)


def units(geometry, n_layers):
    return alike(all_units(geometry, KINDS), n_layers)


def random_scores(seed, layers, geometry=GEOMETRY):
    """Scores whose scale and spread differ from layer to layer and from kind to kind."""
    rng = random.Random(seed)
    return {
        layer: {
            kind: torch.tensor(
                [rng.uniform(0, 1) ** 2 * spread + offset for _ in range(geometry.units(kind))], dtype=torch.float64
            )
            for kind, spread, offset in [(k, 10 ** rng.uniform(-2, 2), rng.uniform(0, 3)) for k in KINDS]
        }
        for layer in layers
    }


def plainly(scores, ratio, costs, normalize="zscore", min_keep=0.1, round_to=1):
    """{(layer, kind): removed units}: time and again the lowest block that may go and fits."""
    budget = ratio * sum(costs[kind] * len(values) for kinds in scores.values() for kind, values in kinds.items())
    steps = {kind: round_to if kind == "channel" else 1 for kind in costs}
    slack = min(costs[kind] * steps[kind] for kind in costs) / 2
    left, least = {}, {}
    for layer, kinds in scores.items():
        for kind, values in kinds.items():
            values = [float(value) for value in values]
            if normalize == "raw":
                compared = [value / costs[kind] for value in values]
            else:
                mean, deviation = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0
                compared = [(value - mean) / (deviation or 1) for value in values]
            left[layer, kind] = sorted((value, unit) for unit, value in enumerate(compared))
            least[layer, kind] = max(1, math.ceil(min_keep * len(values) - 1e-9))
    removed, gone, open_ones = {key: [] for key in left}, 0, dict.fromkeys(left)
    while open_ones and budget > 0:
        blocks = {}
        for layer, kind in list(open_ones):
            size = len(left[layer, kind]) % steps[kind] or steps[kind]
            if len(left[layer, kind]) - size < least[layer, kind]:
                del open_ones[layer, kind]
                continue
            block = left[layer, kind][:size]
            blocks[layer, kind] = sum(value for value, _ in block) / size, block
        if not blocks:
            break
        key = min(blocks, key=lambda key: blocks[key][0])
        block = blocks[key][1]
        if gone + len(block) * costs[key[1]] > budget + slack:
            del open_ones[key]
            continue
        gone += len(block) * costs[key[1]]
        removed[key] += [unit for _, unit in block]
        left[key] = left[key][len(block) :]
    return {key: sorted(units) for key, units in removed.items()}


def removed_of(kept, scores):
    return {
        (layer, kind): sorted(set(range(len(values))) - set(kept[layer][kind]))
        for layer, kinds in scores.items()
        for kind, values in kinds.items()
    }


def gone_parameters(removed, costs=COSTS):
    return sum(len(units) * costs[kind] for (_, kind), units in removed.items())


@pytest.mark.parametrize("round_to", [1, 4, 8])
@pytest.mark.parametrize("min_keep", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("normalize", ["zscore", "raw"])
@pytest.mark.parametrize("at_once", [allocation.SORTED_AT_ONCE, 1])
def test_allocation_equals_the_plain_reference(at_once, normalize, min_keep, round_to, monkeypatch):
    monkeypatch.setattr(allocation, "SORTED_AT_ONCE", at_once)
    for seed, ratio in itertools.product(range(4), (0.0, 0.05, 0.2, 0.33, 0.45)):
        scores = random_scores(seed, range(2, 7))
        rule = GlobalRule(ratio, normalize, min_keep, round_to)
        kept = allocate_globally(scores, rule, alike(COSTS, 9), units(GEOMETRY, 9))
        expected = plainly(scores, ratio, COSTS, normalize, min_keep, round_to)
        assert removed_of(kept, scores) == expected
        assert list(kept) == list(range(9))
        for layer in (0, 1, 7, 8):  # no scores there
            assert kept[layer] == {"kv_group": [0, 1, 2, 3], "channel": list(range(37))}


@pytest.mark.parametrize("apart", [{"kv_group": 0.25, "channel": 0.4}, {"kv_group": 0.5}, {"channel": 0.1}], ids=str)
def test_kinds_that_are_set_apart_lose_their_share_and_the_others_what_is_left_of_the_ratio(apart):
    ratio, size = 0.3, {"kv_group": 4 * COSTS["kv_group"], "channel": 37 * COSTS["channel"]}
    left = ratio * sum(size.values()) - sum(share * size[kind] for kind, share in apart.items())
    for seed in range(4):
        scores, expected = random_scores(seed, range(2, 7)), {}
        for kind in KINDS:
            own = {layer: {kind: kinds[kind]} for layer, kinds in scores.items()}
            expected |= plainly(own, apart.get(kind, left / size[kind]), {kind: COSTS[kind]})
        kept = allocate_globally(scores, GlobalRule(ratio, apart=apart), alike(COSTS, 9), units(GEOMETRY, 9))
        assert removed_of(kept, scores) == expected


def test_blocks_of_equal_scores_go_the_small_first_one_first_and_of_nothing_goes_nothing():
    geometry = Geometry(kv_groups=4, n_rep=1, head_dim=1, channels=35)
    for value in (0.1, 0.3, 0.7, 0.8):
        alike_scores = {"kv_group": torch.ones(4, dtype=torch.float64)}
        scores = {
            layer: alike_scores | {"channel": torch.full((35,), value, dtype=torch.float64)} for layer in range(3)
        }
        rule = GlobalRule(0.3, "none", round_to=8, apart={"kv_group": 0.0})
        kept = allocate_globally(scores, rule, alike({"kv_group": 50, "channel": 5}, 3), units(geometry, 3))
        assert all(len(kept[layer]["channel"]) in (35, 32, 24, 16, 8) for layer in range(3))
    rule = GlobalRule(0.2, round_to=8, apart={"kv_group": 0.25, "channel": 0.0})
    kept = allocate_globally(random_scores(1, range(2)), rule, alike(COSTS, 2), units(GEOMETRY, 2))
    assert [len(kept[layer]["channel"]) for layer in range(2)] == [37, 37]


def test_a_kind_that_is_set_apart_is_refused_by_its_name_where_it_has_no_room():
    with pytest.raises(UsageError, match=r"of the KV groups a ratio of 0.8 is more than .* leaves room for, 0.750"):
        check_global(GlobalRule(0.2, apart={"kv_group": 0.8}), alike(COSTS, 3), units(GEOMETRY, 3))


@pytest.mark.parametrize("count", range(7))
def test_of_units_that_cost_the_same_those_with_the_lowest_sum_go(count):
    """All subsets tried out: 10 units of two layers, one unit at least stays of each kind."""
    geometry, costs = Geometry(kv_groups=2, n_rep=1, head_dim=1, channels=3), {"kv_group": 12, "channel": 12}
    scores = random_scores(count, range(2), geometry)
    every = [(layer, kind, unit) for layer in scores for kind in KINDS for unit in range(geometry.units(kind))]
    allowed = [
        choice
        for choice in itertools.combinations(every, count)
        if all(
            sum((layer, kind) == unit[:2] for unit in choice) < geometry.units(kind)
            for layer in scores
            for kind in KINDS
        )
    ]
    best = min(allowed, key=lambda choice: sum(float(scores[a][b][c]) for a, b, c in choice))
    kept = allocate_globally(scores, GlobalRule(count / 10, "raw", 0.0), alike(costs, 2), units(geometry, 2))
    removed = removed_of(kept, scores)
    assert {(layer, kind, unit) for (layer, kind), gone in removed.items() for unit in gone} == set(best)


@pytest.mark.parametrize("round_to", [1, 4, 8])
@pytest.mark.parametrize("normalize", ["zscore", "raw"])
def test_the_budget_is_met_to_half_the_smallest_block_and_the_limits_are_kept(normalize, round_to):
    rng, exact = random.Random(1), 0
    for seed in range(60):
        scores, min_keep = random_scores(seed, range(1, 6)), rng.choice([0.0, 0.1, 0.3])
        ratio = rng.uniform(0, 0.6)
        kept = allocate_globally(
            scores, GlobalRule(ratio, normalize, min_keep, round_to), alike(COSTS, 6), units(GEOMETRY, 6)
        )
        budget = ratio * 5 * (4 * COSTS["kv_group"] + 37 * COSTS["channel"])
        least = {"kv_group": max(1, math.ceil(min_keep * 4)), "channel": max(1, math.ceil(min_keep * 37))}
        smallest = min(KINDS, key=lambda kind: COSTS[kind] * (round_to if kind == "channel" else 1))
        step = round_to if smallest == "channel" else 1
        off, half = gone_parameters(removed_of(kept, scores)) - budget, COSTS[smallest] * step / 2
        assert off <= half
        # As long as such a block is left anywhere.
        if any(len(kept[layer][smallest]) - step >= least[smallest] for layer in scores):
            assert off >= -half
            exact += 1
        for layer in scores:
            groups, channels = (len(kept[layer][kind]) for kind in KINDS)
            assert groups >= least["kv_group"] and channels >= least["channel"]
            assert channels % round_to == 0 or channels == 37
    assert exact > 30


def test_raw_compares_what_a_parameter_is_worth_and_zscore_what_stands_out_in_its_layer():
    geometry, costs = Geometry(kv_groups=2, n_rep=1, head_dim=1, channels=4), {"kv_group": 40, "channel": 10}
    scores = {
        0: {"kv_group": torch.tensor([3.0, 5.0]), "channel": torch.tensor([1.0, 1.1, 1.2, 1.3])},
        1: {"kv_group": torch.tensor([60.0, 80.0]), "channel": torch.tensor([10.0, 200.0, 210.0, 220.0])},
    }
    # Per parameter: the group of score 3 is worth 0.075, the cheapest channel 0.1. Two blocks of 50 of 240 go.
    raw = allocate_globally(scores, GlobalRule(50 / 240, "raw"), alike(costs, 2), units(geometry, 2))
    assert removed_of(raw, scores) == {
        (0, "kv_group"): [0],
        (0, "channel"): [0],
        (1, "kv_group"): [],
        (1, "channel"): [],
    }
    # Channel 0 of layer 1 lies 1.5 deviations below its mean, nothing else as far.
    one = allocate_globally(scores, GlobalRule(10 / 240, "zscore"), alike(costs, 2), units(geometry, 2))
    assert removed_of(one, scores)[1, "channel"] == [0] and gone_parameters(removed_of(one, scores), costs) == 10


def test_the_scale_of_a_layers_scores_does_not_count_with_zscore_but_does_with_raw():
    scores = random_scores(0, range(3))
    larger = {
        layer: {kind: values * 10**layer + layer for kind, values in kinds.items()} for layer, kinds in scores.items()
    }
    for normalize, same in (("zscore", True), ("raw", False)):
        kept = [
            allocate_globally(s, GlobalRule(0.3, normalize), alike(COSTS, 3), units(GEOMETRY, 3))
            for s in (scores, larger)
        ]
        assert (kept[0] == kept[1]) is same


@pytest.mark.parametrize("at_once", [allocation.SORTED_AT_ONCE, 1])
@pytest.mark.parametrize("normalize", ["zscore", "raw"])
@pytest.mark.parametrize("value", [1.0, 0.3, 0.0])
def test_of_equal_scores_the_first_layers_and_units_go(value, normalize, at_once, monkeypatch):
    monkeypatch.setattr(allocation, "SORTED_AT_ONCE", at_once)
    scores = {
        layer: {"kv_group": torch.full((4,), 6 * value), "channel": torch.full((37,), value)} for layer in range(3)
    }
    kept = [
        allocate_globally(scores, GlobalRule(0.2, normalize), alike(COSTS, 3), units(GEOMETRY, 3)) for _ in range(2)
    ]
    assert kept[0] == kept[1]
    removed = removed_of(kept[0], scores)
    assert removed[0, "kv_group"] == [0, 1, 2]
    channels = [len(removed[layer, "channel"]) for layer in range(3)]
    assert channels == sorted(channels, reverse=True)
    assert all(units == list(range(len(units))) for units in removed.values())


# Of 4 groups and 37 channels: 2 and 18 may go, 2 and 25, none and 3.
@pytest.mark.parametrize("min_keep,groups,channels", [(0.5, 2, 18), (0.3, 2, 25), (0.9, 0, 3)])
def test_a_ratio_that_min_keep_leaves_no_room_for_is_refused(min_keep, groups, channels):
    most = (groups * COSTS["kv_group"] + channels * COSTS["channel"]) / (4 * COSTS["kv_group"] + 37 * COSTS["channel"])
    check_global(GlobalRule(most - 1e-9, min_keep=min_keep), alike(COSTS, 3), units(GEOMETRY, 3))
    with pytest.raises(UsageError, match="--min-keep"):
        check_global(GlobalRule(most + 1e-9, min_keep=min_keep), alike(COSTS, 3), units(GEOMETRY, 3))
    scores = random_scores(0, range(3))
    kept = allocate_globally(scores, GlobalRule(most, min_keep=min_keep), alike(COSTS, 3), units(GEOMETRY, 3))
    assert all([len(u) for u in kinds.values()] == [4 - groups, 37 - channels] for kinds in kept.values())


def test_scores_that_are_not_finite_are_an_error():
    scores = random_scores(0, range(2))
    scores[1]["channel"][5] = float("nan")
    with pytest.raises(StreampruneError, match="NaN"):
        allocate_globally(scores, GlobalRule(0.2), alike(COSTS, 2), units(GEOMETRY, 2))


# Whole runs.

SHORT = ("--samples", "4", "--seq-len", "32", "--sampling", "first")


def ids_of(path):
    text = AutoTokenizer.from_pretrained(path)(embedded_text("calibration"), add_special_tokens=False)
    return torch.tensor(text["input_ids"][:128]).view(4, 32)


def check_run(streamprune, model, output, *options):
    """Prune layers 1:7 of the tiny Llama by 30 %, in float64, and verify it; returns {(layer, kind): removed}."""
    options = ("--layers", "1:7", "--ratio", "0.3", "--dtype", "float64", "--no-evaluate", "--quiet", *SHORT, *options)
    result = streamprune("--model", model, "--output", output, *options)
    assert result.code == 0, result.err
    assert "(ragged)" in result.out
    checked = streamprune("verify", output)
    assert checked.code == 0 and "FAILED" not in checked.out, checked
    kept = json.loads((output / "streamprune.json").read_text())["kept"]
    assert len({tuple(len(units) for units in kinds.values()) for kinds in kept.values()}) > 2
    return removed_of({int(layer): kinds for layer, kinds in kept.items()}, random_scores(0, range(1, 7), TINY))


TINY = Geometry(kv_groups=3, n_rep=2, head_dim=10, channels=37)
TINY_COSTS = {"kv_group": 6 * 10 * 48, "channel": 3 * 48}


@pytest.mark.parametrize("normalize", ["zscore", slow("raw")])
def test_taylor_compared_over_all_layers(normalize, streamprune, tiny_llama, output):
    options = ("--method", "taylor", "--allocation", "global", "--normalize", normalize)
    removed = check_run(streamprune, tiny_llama, output, *options)
    model, ids = load(tiny_llama), ids_of(tiny_llama)
    grads, elements = whole_model_gradients(model, ids), {}
    for layer in range(1, 7):
        for name, weight in stack(model)[layer].named_parameters():
            elements[layer, name] = (weight.detach() * grads[f"model.layers.{layer}.{name}"]).abs()
    totals = unit_totals(SIZES["llama"], KINDS, range(1, 7), elements)
    scores = {layer: {kind: totals[layer, kind] for kind in KINDS} for layer in range(1, 7)}
    assert removed == plainly(scores, 0.3, TINY_COSTS, normalize)


def flap_scores(model, ids, layer, kind):
    """Per input of o or down of the dense model: its sample variance times the square sum of its column."""
    module = stack(model)[layer].get_submodule(out_name(model, kind))
    _, (x, _) = run(model, ids, module)
    return ((x - x.mean(0)) ** 2).sum(0) / (len(x) - 1) * matrix(module).square().sum(0)


@pytest.mark.parametrize("bias", [True, slow(False)], ids=["bias", "no-bias"])
def test_flap_compares_all_layers_by_itself(bias, streamprune, tiny_llama, output):
    removed = check_run(streamprune, tiny_llama, output, "--method", "flap", *(() if bias else ("--no-bias",)))
    model, ids, scores = load(tiny_llama), ids_of(tiny_llama), {}
    for layer in range(1, 7):
        groups, channels = (flap_scores(model, ids, layer, kind) for kind in KINDS)
        scores[layer] = {"kv_group": groups.view(3, 20).sum(1), "channel": channels}
    assert removed == plainly(scores, 0.3, TINY_COSTS)
    tensors, config = load_file(output / "model.safetensors"), json.loads((output / "config.json").read_text())
    assert len([name for name in tensors if name.endswith("bias")]) == (16 if bias else 0)
    assert config.get("output_biases", False) is bias


def test_a_ratio_that_min_keep_cannot_meet_is_refused_before_the_calibration_text_is_read(
    streamprune, tiny_llama, output
):
    options = ("--method", "taylor", "--allocation", "global", "--min-keep", "0.8", "--ratio", "0.3", "--quiet")
    result = streamprune("--model", tiny_llama, "--output", output, *options, "--calibration", "missing.txt")
    check_refusal(result, 2, ("0.3", "--min-keep 0.8"), "lower one of them")
    assert not output.exists()
