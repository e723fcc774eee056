"""Scores of layers equal the whole model's, and what is written without some layers is the dense model without them."""

import itertools
import json
import math

import pytest
import torch
from marks import slow
from safetensors.torch import load_file
from tiny_models import FAMILY_NAMES, N_LAYERS, make_sweeper, save_tiny, token_ids, whole_model_gradients
from whole_models import STACKS, load, mean_loss, run, skip_layers, stack

from streamprune import PruneConfig, prune
from streamprune.errors import UsageError
from streamprune.methods.sinks import LayerScores
from streamprune.methods.table import METHODS, resolve_settings
from streamprune.model.units import Geometry, all_units
from streamprune.planning.allocation import layers_to_remove, select_layers
from streamprune.streaming.statistics import Statistics

SCORED = ("llama", "gemma2", "gemma3_text", "phi3", "smollm3", "granite", "gpt_neox", "opt", "gpt2")
GEOMETRY, KINDS = Geometry(kv_groups=3, n_rep=2, head_dim=10, channels=37), ("kv_group", "channel")


def scores_of(path, method, ids, layers, seed=0, micro_batch=64, **settings):
    """{layer: score} of a method, for layers as they are scored in a run."""
    sweeper = make_sweeper(path, micro_batch=micro_batch)
    sweeper.scope = "matrices"
    sink = LayerScores(layers)
    METHODS[method].score(Statistics(sweeper, ids, layers, seed), resolve_settings(method, settings, "layers"), sink)
    return sink.values


def cut(path, output, gone, **options):
    """Remove exactly the layers `gone`, which follow one another."""
    layers = (min(gone), max(gone) + 1)
    assert len(gone) == layers[1] - layers[0]
    defaults = {"method": "random", "granularity": "layers", "ratio": 0.99, "evaluate": False}
    result = prune(PruneConfig(model=str(path), output=output, layers=layers, **{**defaults, **options}))
    assert set(result.kept).isdisjoint(gone)
    return result


# Scores.


@pytest.mark.parametrize("layers", [range(N_LAYERS), range(1, 3)], ids=["all", "1:3"])
@pytest.mark.parametrize("family", SCORED)
def test_layer_ppl_is_the_perplexity_of_the_model_without_the_layer(family, layers, tmp_path):
    save_tiny(tmp_path, family)
    ids = token_ids(n=3, seq=12)
    scores = scores_of(tmp_path, "layer-ppl", ids, layers)
    expected = {layer: math.exp(mean_loss(skip_layers(load(tmp_path), [layer]), ids)) for layer in layers}
    assert scores == pytest.approx(expected, rel=1e-7)
    assert len(set(scores.values())) == len(layers)


@pytest.mark.parametrize("streams", [1, 2, 3])
@pytest.mark.parametrize("layers", [range(5), range(1, 5), range(2, 4)], ids=["0:5", "1:5", "2:4"])
def test_layer_ppl_takes_several_passes_where_memory_holds_few_of_its_streams(streams, layers, tmp_path, monkeypatch):
    save_tiny(tmp_path, "gpt2", n_layer=5)
    ids = token_ids(n=3, seq=12)
    at_once = scores_of(tmp_path, "layer-ppl", ids, layers)
    monkeypatch.setattr("streamprune.streaming.statistics.STREAM_BYTES", streams * ids.numel() * 48 * 8 + 7)
    passes, original = [], Statistics._without

    def recorded(self, part, begin, dense, point):
        passes.append((list(part), begin if dense else None))
        return original(self, part, begin, dense, point)

    monkeypatch.setattr(Statistics, "_without", recorded)
    scores = scores_of(tmp_path, "layer-ppl", ids, layers)
    expected = {layer: math.exp(mean_loss(skip_layers(load(tmp_path), [layer]), ids)) for layer in layers}
    assert scores == pytest.approx(expected, rel=1e-9)
    assert scores == at_once
    assert list(itertools.chain(*(part for part, _ in passes))) == list(layers)
    assert max(len(part) for part, _ in passes) <= streams
    # The whole model below a pass's first layer is not run again.
    assert [start for _, start in passes] == [None, *(part[0] for part, _ in passes[1:])]
    monkeypatch.setattr("streamprune.streaming.statistics.STREAM_BYTES", 1)
    assert scores_of(tmp_path, "layer-ppl", ids, layers) == at_once, "one stream is always there"


def test_layer_ppl_that_overflows_is_a_number(tmp_path):
    model = save_tiny(tmp_path, "llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    model.save_pretrained(tmp_path)
    scores = scores_of(tmp_path, "layer-ppl", token_ids(), range(N_LAYERS))
    assert all(math.isfinite(score) for score in scores.values())


@pytest.mark.parametrize("family", SCORED)
def test_block_influence_is_one_minus_the_mean_cosine(family, tmp_path):
    model, ids = save_tiny(tmp_path, family), token_ids(n=3, seq=12)
    scores = scores_of(tmp_path, "block-influence", ids, range(1, N_LAYERS))
    for layer, score in scores.items():
        _, (before, after) = run(model, ids, stack(model)[layer])
        cosines = (before * after).sum(1) / (before.square().sum(1) * after.square().sum(1)).sqrt()
        assert score == pytest.approx(1 - float(cosines.mean()), rel=1e-9)
    assert set(scores) == set(range(1, N_LAYERS))


@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize("method", ["layer-ppl", "block-influence"])
def test_micro_batches_do_not_change_the_scores(method, micro_batch, tmp_path):
    save_tiny(tmp_path, "gpt_neox")
    arguments = (tmp_path, method, token_ids(n=5, seq=9), range(N_LAYERS))
    assert scores_of(*arguments, micro_batch=micro_batch) == pytest.approx(scores_of(*arguments), rel=1e-9)


def test_block_influence_is_0_for_a_layer_that_does_nothing_and_2_for_one_that_turns_its_input_round(tmp_path):
    # Sequences of one token: attention gives v of that token. Inputs of mean square 1: the norm leaves them alone.
    model = save_tiny(tmp_path, "llama", num_attention_heads=6, num_key_value_heads=6, head_dim=8, num_hidden_layers=3)
    with torch.no_grad():
        model.model.embed_tokens.weight.sign_()
        for layer, factor in zip(stack(model), (0, -2, -1), strict=True):
            layer.input_layernorm.weight.fill_(1)
            layer.self_attn.v_proj.weight.copy_(torch.eye(48))
            layer.self_attn.o_proj.weight.copy_(factor * torch.eye(48))
            layer.mlp.down_proj.weight.zero_()
    model.save_pretrained(tmp_path)
    scores = scores_of(tmp_path, "block-influence", token_ids(n=20, seq=1), range(2))
    assert scores == pytest.approx({0: 0.0, 1: 2.0}, abs=1e-9)


def matrices(model):
    """{layer: {name: weight}}: the weight matrices of every layer, Linear or Conv1D."""
    return {
        index: {name: weight.detach() for name, weight in layer.named_parameters() if weight.ndim == 2}
        for index, layer in enumerate(stack(model))
    }


@pytest.mark.parametrize("family", ["llama", "phi3", "opt", "gpt2", "gpt_neox"])
def test_taylor_and_magnitude_are_sums_over_all_matrices_of_the_layer(family, tmp_path):
    model, ids = save_tiny(tmp_path, family), token_ids(n=3, seq=12)
    grads, prefix = whole_model_gradients(model, ids), STACKS.get(family, "model.layers")
    taylor, magnitude = {}, {}
    for layer, weights in matrices(model).items():
        pairs = [(weight, grads[f"{prefix}.{layer}.{name}"]) for name, weight in weights.items()]
        taylor[layer] = sum(float((weight * grad).abs().sum()) for weight, grad in pairs)
        magnitude[layer] = math.sqrt(sum(float(weight.square().sum()) for weight in weights.values()))
    layers = range(1, N_LAYERS)
    for method, expected in (("taylor", taylor), ("magnitude", magnitude)):
        scores = scores_of(tmp_path, method, ids, layers)
        assert scores == pytest.approx({layer: expected[layer] for layer in layers}, rel=1e-9)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_run_scores_attention_too_where_no_unit_cuts_it(family, tmp_path):
    """The layer with the smallest MLP has the largest attention, and stays."""
    model = save_tiny(tmp_path / "in", family)
    with torch.no_grad():
        for name, weight in matrices(model)[2].items():
            weight.mul_(4 if "attn" in name else 0.8)
    model.save_pretrained(tmp_path / "in")
    options = {"method": "magnitude", "granularity": "layers", "layers": (0, N_LAYERS), "ratio": 0.75}
    result = prune(PruneConfig(model=str(tmp_path / "in"), output=tmp_path / "out", evaluate=False, **options))
    assert list(result.kept) == [2]


def test_random_scores_repeat_with_the_seed_and_differ_by_layer(tmp_path):
    save_tiny(tmp_path, "llama")
    one, again, other = (scores_of(tmp_path, "random", None, range(N_LAYERS), seed=seed) for seed in (3, 3, 4))
    assert one == again and not set(one.values()) & set(other.values())
    assert len(set(one.values())) == N_LAYERS and all(0 <= score < 1 for score in one.values())


# The choice.


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 6])
def test_the_lowest_layers_go_or_the_lowest_run_of_them(count):
    scores = {2: 3.0, 3: 0.5, 4: 9.0, 5: 1.0, 6: 2.0, 7: 2.5}
    for contiguous in (False, True):
        kept = select_layers(scores, count, dict.fromkeys(range(9), all_units(GEOMETRY, KINDS)), contiguous=contiguous)
        gone = set(range(9)) - set(kept)
        choices = itertools.combinations(scores, count)
        if contiguous:
            choices = [c for c in choices if list(c) == list(range(c[0], c[0] + count))] if count else [()]
        best = min(choices, key=lambda choice: sum(scores[layer] for layer in choice))
        assert gone == set(best)
        assert all(units == {"kv_group": [0, 1, 2], "channel": list(range(37))} for units in kept.values())


def test_of_equal_scores_the_first_layers_go():
    scores = dict.fromkeys(range(1, 6), 1.0)
    for contiguous in (False, True):
        assert list(
            select_layers(scores, 2, dict.fromkeys(range(6), all_units(GEOMETRY, KINDS)), contiguous=contiguous)
        ) == [0, 3, 4, 5]


@pytest.mark.parametrize(("ratio", "count"), [(0.0, 0), (0.1, 1), (0.24, 1), (0.26, 2), (0.5, 3), (0.7, 4), (0.99, 6)])
def test_the_number_of_layers_is_nearest_to_the_ratio(ratio, count):
    assert layers_to_remove(ratio, range(1, 7), 8) == count


@pytest.mark.parametrize(
    ("ratio", "layers", "message"), [(0.1, (0, N_LAYERS), "raise it"), (0.9, (0, N_LAYERS), "takes all 4 layers")]
)
def test_a_ratio_of_no_layer_or_of_all_is_refused(ratio, layers, message, tmp_path):
    save_tiny(tmp_path / "in", "llama")
    options = {"method": "random", "granularity": "layers", "layers": layers, "ratio": ratio, "evaluate": False}
    with pytest.raises(UsageError, match=message):
        prune(PruneConfig(model=str(tmp_path / "in"), output=tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


# What is written.


def assert_is_the_dense_model_without(source, output, gone):
    """Config, names and bytes of the tensors, and the logits."""
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, output))
    count = "n_layer" if before["model_type"] == "gpt2" else "num_hidden_layers"
    stay = [layer for layer in range(before[count]) if layer not in gone]
    assert after["model_type"] == before["model_type"] and "auto_map" not in after and "per_layer_config" not in after
    assert after[count] == len(stay)
    tensors, prefix = load_file(source / "model.safetensors"), STACKS.get(before["model_type"], "model.layers")
    expected = {}
    for name, tensor in tensors.items():
        if not name.startswith(f"{prefix}."):
            expected[name] = tensor
        elif (layer := int(name.removeprefix(f"{prefix}.").split(".")[0])) in stay:
            expected[name.replace(f".{layer}.", f".{stay.index(layer)}.", 1)] = tensor
    written = load_file(output / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    sliced, dense, ids = load(output, torch.float32), load(source, torch.float32), token_ids(seq=20)
    assert type(sliced).__module__.startswith("transformers.") and len(stack(sliced)) == len(stay)
    lists = [key for key, value in dense.config.to_dict().items() if isinstance(value, list) and "layer" in key]
    for key in lists:
        assert after[key] == [getattr(dense.config, key)[layer] for layer in stay]
    skip_layers(dense, gone)
    with torch.no_grad():
        expected_logits = dense(ids, use_cache=False).logits
        for use_cache in (False, True):
            logits = sliced(ids, use_cache=use_cache).logits
            assert (logits - expected_logits).abs().max() <= 1e-6 * expected_logits.abs().max()
    return lists


@pytest.mark.parametrize("gone", [{0}, {1, 2}, {0, 1, 2}], ids=str)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_output_is_the_dense_model_with_the_layers_deleted(family, gone, tmp_path):
    save_tiny(tmp_path / "in", family, dtype=torch.float32)
    result = cut(tmp_path / "in", tmp_path / "out", gone)
    assert result.layout == "stock"
    assert_is_the_dense_model_without(tmp_path / "in", tmp_path / "out", gone)


def test_layers_that_are_apart_go_too(tmp_path):
    save_tiny(tmp_path / "in", "smollm3", dtype=torch.float32)
    options = {"method": "random", "granularity": "layers", "ratio": 0.5, "layers": (0, N_LAYERS), "evaluate": False}
    for seed in range(20):
        config = PruneConfig(model=str(tmp_path / "in"), output=tmp_path / "out", seed=seed, overwrite=True, **options)
        gone = set(range(N_LAYERS)) - set(prune(config).kept)
        if gone in ({0, 2}, {1, 3}):
            break
    assert_is_the_dense_model_without(tmp_path / "in", tmp_path / "out", gone)


# Each of these derives lists from its number of layers; the sliced ones are not what it would derive.
DERIVED = {
    "gemma2": ({}, ["layer_types"]),
    "gemma3_text": ({"sliding_window_pattern": 3}, ["layer_types"]),
    "smollm3": (
        {"no_rope_layer_interval": 3, "use_sliding_window": True, "sliding_window": 7},
        ["no_rope_layers", "layer_types"],
    ),
    "qwen2": ({"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}, ["layer_types"]),
    "qwen3": ({"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}, ["layer_types"]),
}


@pytest.mark.parametrize("gone", [{0}, {1, 2}], ids=str)
@pytest.mark.parametrize("family", DERIVED)
def test_lists_that_transformers_derives_are_written_for_the_layers_that_stay(family, gone, tmp_path):
    fields, names = DERIVED[family]
    save_tiny(tmp_path / "in", family, dtype=torch.float32)
    file = tmp_path / "in" / "config.json"
    config = {key: value for key, value in json.loads(file.read_text()).items() if key not in names}
    file.write_text(json.dumps(config | fields))
    assert len({tuple([getattr(load(tmp_path / "in").config, name)[i] for name in names]) for i in range(4)}) == 2
    cut(tmp_path / "in", tmp_path / "out", gone)
    assert set(assert_is_the_dense_model_without(tmp_path / "in", tmp_path / "out", gone)) == set(names)


def test_attention_that_is_scaled_by_the_layers_number_is_refused(tmp_path):
    save_tiny(tmp_path / "in", "gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(UsageError, match="prune units instead"):
        cut(tmp_path / "in", tmp_path / "out", {1})


@pytest.mark.parametrize("method", ["random", "block-influence"])
def test_ratio_zero_gives_the_same_bytes(method, tmp_path):
    save_tiny(tmp_path / "in", "llama", dtype=torch.bfloat16)
    options = {"method": method, "granularity": "layers", "layers": (0, N_LAYERS), "ratio": 0.0, "evaluate": False}
    options |= {"seq_len": 16, "dtype": "float32"}
    result = prune(PruneConfig(model=str(tmp_path / "in"), output=tmp_path / "out", **options))
    assert result.layout == "same"
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (tmp_path / "in" / "config.json").read_text()
    )


@pytest.mark.parametrize(("family", "method"), [("gemma2", "block-influence"), slow("opt", "layer-ppl")])
def test_the_command_line_removes_layers_and_verify_passes(family, method, streamprune, tmp_path, output):
    save_tiny(tmp_path / "in", family, dtype=torch.float32)
    options = ("--granularity", "layers", "--method", method, "--layers", "0:4", "--ratio", "0.5", "--contiguous")
    result = streamprune("--model", tmp_path / "in", "--output", output, *options, "--seq-len", "32", "--quiet")
    assert result.code == 0, result.err
    facts = json.loads((output / "streamprune.json").read_text())
    kept = [int(layer) for layer in facts["kept"]]
    assert kept in ([0, 1], [0, 3], [2, 3])
    assert facts["parameters"]["after"] == sum(t.numel() for t in load_file(output / "model.safetensors").values())
    assert_is_the_dense_model_without(tmp_path / "in", output, set(range(4)) - set(kept))
    checked = streamprune("verify", output)
    assert checked.code == 0 and "FAILED" not in checked.out, checked
