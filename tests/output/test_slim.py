"""The sliced model equals the masked dense one, loads in stock or ragged form, and its files are as promised."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import EXPERTS, FAMILY_NAMES, GROUPED, N_LAYERS, RAGGED, make_sweeper, save_tiny, token_ids
from transformers import AutoModelForCausalLM

from streamprune import PruneConfig, prune
from streamprune.verification.verify import verify

STOCK_ONLY = tuple(name for name in FAMILY_NAMES if name not in RAGGED)


def run(path, output, **options):
    """Prune with random scores, in float64."""
    defaults = {"method": "random", "ratio": 0.4, "evaluate": False, "dtype": "float64"}
    return prune(PruneConfig(model=str(path), output=output, **{**defaults, **options}))


def masked_logits(model, kept, ids):
    """Logits of the dense transformers model with removed units masked, by hand and for each family."""
    config = model.config
    stack = model.get_submodule(
        {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers", "opt": "model.decoder.layers"}.get(
            config.model_type, "model.layers"
        )
    )
    with torch.no_grad():
        for index, layer in enumerate(stack):
            if "channel" in kept[index]:
                out = {
                    "gpt2": lambda block: block.mlp.c_proj.weight,  # Conv1D: [channels, hidden]
                    "gpt_neox": lambda block: block.mlp.dense_4h_to_h.weight.T,
                    "opt": lambda block: block.fc2.weight.T,
                }.get(config.model_type, lambda block: block.mlp.down_proj.weight.T)(layer)
                gone = sorted(set(range(out.shape[0])) - set(kept[index]["channel"]))
                out[gone] = 0
            if "kv_group" in kept[index]:
                mask_attention(config, layer.self_attn, kept[index]["kv_group"])
        return model(ids).logits


def mask_attention(config, attention, groups):
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    n_rep = config.num_attention_heads // config.num_key_value_heads
    for group in range(config.num_key_value_heads):
        if group in groups:
            continue
        query = slice(group * n_rep * head, (group + 1) * n_rep * head)
        attention.o_proj.weight[:, query] = 0
        if config.model_type == "olmo2":
            attention.q_proj.weight[query] = 0
            attention.k_proj.weight[group * head : (group + 1) * head] = 0
    if config.model_type == "olmo2":
        # The mean square of the sliced norm is over fewer elements: of k out of n it is n/k times as large.
        share = len(groups) / config.num_key_value_heads
        for norm in (attention.q_norm, attention.k_norm):
            norm.weight.mul_(share**0.5)
            norm.variance_epsilon *= share


def assert_masked_equals_sliced(source, output, kept, **load):
    ids, load = token_ids(seq=20), {"dtype": torch.float64, **EXPERTS, **load}
    dense = AutoModelForCausalLM.from_pretrained(source, **load)
    expected = masked_logits(dense, kept, ids)
    sliced, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True, **load)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        logits = sliced(ids).logits
    # Many families' norms compute in float32 whatever the model's dtype.
    assert (logits - expected).abs().max() <= 2e-6 * expected.abs().max()
    return sliced


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", RAGGED)
def test_ragged_output_equals_the_masked_dense_model(family, tied, tmp_path):
    save_tiny(tmp_path / "in", family, tied=tied)
    result = run(tmp_path / "in", tmp_path / "out", layers=(1, 3))
    assert result.layout == "ragged"
    assert_masked_equals_sliced(tmp_path / "in", tmp_path / "out", result.kept)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_stock_output_equals_the_masked_dense_model(family, tmp_path):
    save_tiny(tmp_path / "in", family)
    result = run(tmp_path / "in", tmp_path / "out", stock=True)
    assert result.layout == "stock"
    sliced = assert_masked_equals_sliced(tmp_path / "in", tmp_path / "out", result.kept)
    assert type(sliced).__module__.startswith("transformers.")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "auto_map" not in config and "per_layer_config" not in config
    assert config["model_type"] == family


@pytest.mark.parametrize("family", GROUPED)
def test_one_width_for_all_layers_always_loads_in_the_stock_class(family, tmp_path):
    """Eight heads lose three, and five do not divide 48: not every family takes that, and the allocator knows which."""
    fields = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 6}
    save_tiny(tmp_path / "in", family, **fields)
    for name, options in {"stock": {"stock": True}, "all-layers": {"layers": (0, N_LAYERS)}}.items():
        result = run(tmp_path / "in", tmp_path / name, **options)
        divides = family in ("llama", "gemma2", "gemma3_text")
        assert len(result.kept[0]["kv_group"]) == (6 if divides else 5)
        assert_masked_equals_sliced(tmp_path / "in", tmp_path / name, result.kept)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_global_allocation_may_come_to_one_width(family, tmp_path):
    """Where every layer goes down to what it must keep: five heads of six, which a Llama's own class refuses."""
    fields = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 6, "intermediate_size": 40}
    save_tiny(tmp_path / "in", family, **fields)
    group, channel = 4 * 48 * 6, 3 * 48
    everything = (3 * group + 16 * channel) / (8 * group + 40 * channel)
    ratios = {"ratio": everything, "min_keep": 0.6, "layers": (0, N_LAYERS)}
    result = run(tmp_path / "in", tmp_path / "out", allocation="global", **ratios)
    assert {(len(kept["kv_group"]), len(kept["channel"])) for kept in result.kept.values()} == {(5, 24)}
    assert result.layout == ("ragged" if family == "llama" else "stock")
    assert_masked_equals_sliced(tmp_path / "in", tmp_path / "out", result.kept)


def test_widths_that_the_stock_class_would_refuse_are_refused_before_the_work(tmp_path):
    from streamprune.errors import UsageError

    factors = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope = {**factors, "original_max_position_embeddings": 32}
    save_tiny(tmp_path / "in", "phi3", rope_parameters=rope)
    with pytest.raises(UsageError, match="--attention-ratio 0"):
        run(tmp_path / "in", tmp_path / "out", stock=True)
    result = run(tmp_path / "in", tmp_path / "out", stock=True, attention_ratio=0.0)
    assert_masked_equals_sliced(tmp_path / "in", tmp_path / "out", result.kept)


@pytest.mark.parametrize("family", STOCK_ONLY)
def test_families_of_one_width_have_no_ragged_form(family, tmp_path):
    from streamprune.errors import UsageError

    save_tiny(tmp_path / "in", family)
    with pytest.raises(UsageError, match="--stock"):
        run(tmp_path / "in", tmp_path / "out", layers=(1, 3))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_removed_parameters_are_counted_exactly(family, tmp_path):
    model = save_tiny(tmp_path / "in", family)
    result = run(tmp_path / "in", tmp_path / "out", stock=True)
    sliced = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    counts = {"before": model.num_parameters(), "after": sliced.num_parameters()}
    assert result.facts["parameters"] == counts
    assert counts["after"] < counts["before"]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_ratio_zero_gives_the_same_bytes(family, tmp_path):
    save_tiny(tmp_path / "in", family, dtype=torch.bfloat16)
    result = run(tmp_path / "in", tmp_path / "out", ratio=0.0, layers=(0, N_LAYERS))
    assert result.layout == "same"
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()
    source, output = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("in", "out"))
    assert source == output


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_head_of_its_own_counts_although_the_config_ties_it(family, tmp_path):
    source, output = tmp_path / "source", tmp_path / "output"
    save_tiny(source, family, tied=False)
    config = json.loads((source / "config.json").read_text())
    config.pop("tie_word_embeddings")
    if family == "llama":
        config["tie_word_embeddings"] = True  # gemma's own default
    (source / "config.json").write_text(json.dumps(config))
    result = run(source, output, ratio=0.5, layers=(1, 3))
    assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] is False
    assert_masked_equals_sliced(source, output, result.kept)
    model, ids = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64), token_ids()
    with torch.no_grad():
        hidden = make_sweeper(source).forward(ids)
        torch.testing.assert_close(make_sweeper(source).skeleton.head(hidden), model(ids).logits, atol=1e-9, rtol=0)


def test_emit_mistral_takes_any_head_count_and_has_the_llamas_logits(tmp_path):
    fields = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 6}
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    save_tiny(tmp_path / "in", "llama", rope_parameters=rope, **fields)
    result = run(tmp_path / "in", tmp_path / "out", stock=True, emit="mistral")
    assert len(result.kept[0]["kv_group"]) == 5  # 48 % 5 != 0: no stock Llama takes it
    sliced = assert_masked_equals_sliced(tmp_path / "in", tmp_path / "out", result.kept)
    assert type(sliced).__name__ == "MistralForCausalLM"
    same = run(tmp_path / "in", tmp_path / "same", ratio=0.0, stock=True, emit="mistral")
    ids = token_ids(seq=20)
    llama, mistral = (
        AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for p in (tmp_path / "in", same.output)
    )
    with torch.no_grad():
        assert torch.equal(llama(ids).logits, mistral(ids).logits)


def test_config_json_is_patched_and_never_round_tripped(tmp_path):
    save_tiny(tmp_path / "in", "llama", dtype=torch.float32)
    file = tmp_path / "in" / "config.json"
    config = json.loads(file.read_text())
    # As transformers 4 wrote it, and a field that nobody knows.
    config.pop("rope_parameters")
    config.update(rope_theta=123456.0, rope_scaling=None, torch_dtype=config.pop("dtype"), my_own_field={"a": [1]})
    file.write_text(json.dumps(config))
    run(tmp_path / "in", tmp_path / "out", layers=(1, 3))
    output = json.loads((tmp_path / "out" / "config.json").read_text())
    changed = {"model_type", "architectures", "auto_map", "per_layer_config"}
    assert {key: value for key, value in output.items() if key not in changed} == {
        key: value for key, value in config.items() if key not in changed
    }
    assert output["head_dim"] == 10 and output["num_attention_heads"] == 6 and output["intermediate_size"] == 37
    assert set(output["per_layer_config"]) == {"1", "2"}


def test_output_directory_holds_everything_that_was_promised(tmp_path):
    save_tiny(tmp_path / "in", "llama", dtype=torch.float32)
    (tmp_path / "in" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "in" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# x\n")
    (tmp_path / "in" / "pytorch_model.bin").write_bytes(b"stale")
    run(tmp_path / "in", tmp_path / "out", layers=(1, 3), evaluate=None, max_shard_size=30_000)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert {"README.md", "streamprune.json", "modeling_streamprune_llama.py"} <= names
    assert "pytorch_model.bin" not in names and "model.safetensors" not in names
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    total = 0
    for file in set(index["weight_map"].values()):
        with safe_open(tmp_path / "out" / file, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
        total += sum(tensor.nbytes for tensor in load_file(tmp_path / "out" / file).values())
    assert index["metadata"]["total_size"] == total
    card = (tmp_path / "out" / "README.md").read_text()
    for line in (
        "library_name: transformers",
        'base_model: "in"',
        'license: "apache-2.0"',
        "- custom_code",
        "perplexity",
    ):
        assert line in card
    facts = json.loads((tmp_path / "out" / "streamprune.json").read_text())
    for key in ("options", "versions", "source", "kept", "perplexity", "seconds", "parameters"):
        assert facts[key]
    assert facts["options"]["seed"] == 0 and len(facts["source"]["sha256_of_tensors"]) == 64


def test_tensors_keep_the_sources_names_and_order(tmp_path):
    save_tiny(tmp_path / "in", "qwen2", tied=True)
    run(tmp_path / "in", tmp_path / "out", layers=(1, 3))
    orders = []
    for name in ("in", "out"):
        raw = (tmp_path / name / "model.safetensors").read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        orders.append([key for key in header if key != "__metadata__"])
    assert orders[0] == orders[1]
    assert "lm_head.weight" not in orders[1]


def test_the_same_options_give_the_same_bytes(tmp_path):
    save_tiny(tmp_path / "in", "llama", dtype=torch.float32)
    options = {"method": "moreau-gs", "settings": {"steps": 2}, "layers": (1, 3), "samples": 3, "seq_len": 16}
    for name in ("a", "b"):
        run(tmp_path / "in", tmp_path / name, **options)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_loading_without_streamprune_needs_only_trust_remote_code(tmp_path):
    save_tiny(tmp_path / "in", "llama", dtype=torch.float32)
    run(tmp_path / "in", tmp_path / "out", layers=(1, 3))
    code = (
        "import sys, transformers; "
        f"path = {str(tmp_path / 'out')!r}; "
        "model = transformers.AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True); "
        "assert not any(name.split('.')[0] == 'streamprune' for name in sys.modules); "
        "print(sum(p.numel() for p in model.parameters()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    facts = json.loads((tmp_path / "out" / "streamprune.json").read_text())
    assert int(done.stdout) == facts["parameters"]["after"]


@pytest.mark.parametrize(("family", "options"), [("llama", {"layers": (1, 3)}), ("olmo2", {"stock": True})])
def test_verify_passes_what_was_written(family, options, tmp_path):
    save_tiny(tmp_path / "in", family, dtype=torch.float32)
    run(tmp_path / "in", tmp_path / "out", **options)
    checks = verify(tmp_path / "out")
    assert len(checks) == 5 and all(check.passed for check in checks), checks


@pytest.mark.parametrize(("family", "name"), [("olmo2", "GPT2Tokenizer"), ("qwen2", "LlamaTokenizerFast")])
def test_the_tokenizers_class_survives_the_new_model_type(family, name, tmp_path):
    from transformers import AutoTokenizer

    save_tiny(tmp_path / "in", family, dtype=torch.float32)
    file = tmp_path / "in" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": name}))
    run(tmp_path / "in", tmp_path / "out", layers=(1, 3))
    dense, pruned = (AutoTokenizer.from_pretrained(tmp_path / d) for d in ("in", "out"))
    assert type(dense) is type(pruned)
    text = "The  1234 harbours, café\n\n are quiet."
    assert dense(text)["input_ids"] == pruned(text)["input_ids"]


def test_verify_does_not_run_foreign_code_unasked(tmp_path):
    from streamprune.errors import CheckpointError

    save_tiny(tmp_path / "in", "llama", dtype=torch.float32)
    run(tmp_path / "in", tmp_path / "out", layers=(1, 3))
    with (tmp_path / "out" / "modeling_streamprune_llama.py").open("a") as file:
        file.write(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(CheckpointError, match="--trust-remote-code"):
        verify(tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "out" / "streamprune.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"streamprune\.json"):
        verify(tmp_path / "out")


def test_verify_finds_a_damaged_output(tmp_path):
    save_tiny(tmp_path / "in", "llama", dtype=torch.float32)
    run(tmp_path / "in", tmp_path / "out", stock=True)
    file = tmp_path / "out" / "streamprune.json"
    facts = json.loads(file.read_text())
    kept = facts["kept"]["2"]["channel"]
    unused = next(channel for channel in range(37) if channel not in kept)
    facts["kept"]["2"]["channel"] = sorted([*kept[1:], unused])
    file.write_text(json.dumps(facts))
    checks = {check.name: check.passed for check in verify(tmp_path / "out")}
    assert not checks["logits of the masked dense model"]
