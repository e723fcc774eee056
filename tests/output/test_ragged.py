"""Ragged checkpoints compute what the dense model with the removed units masked computes, however loaded."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from peft import LoraConfig, get_peft_model
from ragged_models import (
    BASE,
    EAGER_ONLY,
    EXTRA,
    FAMILIES,
    GROUPS,
    HEADS,
    Cut,
    dense_model,
    left_padded,
    load,
    mask_dense,
    random_cuts,
    tokens,
    write_checkpoint,
)
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from streamprune.errors import UsageError
from streamprune.output.ragged import RAGGED_FAMILIES, TASKS, modeling_source, ragged_config_fields, register


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    """The classes registered, and one thread: on tensors this small, more of them wait for each other."""
    register()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Pruned:
    """A ragged checkpoint and the masked dense model that it must equal."""

    path: Path
    masked: PreTrainedModel


Prune = Callable[..., Pruned]


@pytest.fixture(scope="module")
def prune(tmp_path_factory: pytest.TempPathFactory) -> Prune:
    """Makes the ragged checkpoint of a family, once unless it is asked for with other cuts or fields."""
    made: dict[str, Pruned] = {}

    def make(model_type: str, cuts: list[Cut] | None = None, **overrides: Any) -> Pruned:
        plain = cuts is None and not overrides
        if plain and model_type in made:
            return made[model_type]
        cuts = random_cuts(model_type) if cuts is None else cuts
        model = dense_model(model_type, **overrides)
        path = tmp_path_factory.mktemp(model_type) / "ragged"
        write_checkpoint(path, model, model_type, cuts)
        pruned = Pruned(path, mask_dense(model, model_type, cuts))
        if plain:
            made[model_type] = pruned
        return pruned

    return make


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=5e-5, rtol=1e-4)


@torch.no_grad()
def logits(model: Any, *args: Any) -> torch.Tensor:
    return model(*args).logits


@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_are_those_of_the_masked_dense_model(model_type: str, prune: Prune) -> None:
    pruned = prune(model_type)
    input_ids, attention_mask = left_padded()
    expected = logits(pruned.masked, tokens())
    expected_padded = logits(pruned.masked, input_ids, attention_mask)
    assert expected.std() > 0.05
    for implementation in ("eager",) if model_type in EAGER_ONLY else ("eager", "sdpa"):
        model = load(pruned.path, attn_implementation=implementation)
        assert_close(logits(model, tokens()), expected)
        assert_close(logits(model.train(), tokens()), expected)
        padded = logits(model.eval(), input_ids, attention_mask)
        assert_close(padded[attention_mask.bool()], expected_padded[attention_mask.bool()])


def generate(model: Any, **kwargs: Any) -> torch.Tensor:
    """[batch, 3 * WINDOW + 6], greedily, one row left-padded."""
    input_ids, attention_mask = left_padded()
    return model.generate(
        input_ids, attention_mask=attention_mask, max_new_tokens=6, do_sample=False, pad_token_id=0, **kwargs
    )


@pytest.mark.parametrize("model_type", FAMILIES)
def test_generation_is_the_same_with_dynamic_static_and_no_cache(model_type: str, prune: Prune) -> None:
    pruned = prune(model_type)
    model = load(pruned.path)
    expected = generate(pruned.masked, use_cache=False)
    for kwargs in ({"use_cache": False}, {}, {"cache_implementation": "static"}):
        assert torch.equal(generate(model, **kwargs), expected), kwargs


def test_trap_attention_skipped_in_layer_0_does_not_lose_the_sequence_length(prune: Prune) -> None:
    model = load(prune("llama").path)
    with torch.no_grad():
        cache = model(tokens()[:, :-1], use_cache=True).past_key_values
        assert cache.get_seq_length() == tokens().shape[1] - 1
        last = model(tokens()[:, -1:], past_key_values=cache).logits
    assert_close(last, logits(model, tokens())[:, -1:])


def looks_ahead(model: PreTrainedModel) -> bool:
    """Whether the logits of the other tokens change with the last one."""
    changed = tokens()
    changed[:, -1] = (changed[:, -1] + 1) % BASE["vocab_size"]
    first = slice(None), slice(None, -1)
    return not torch.allclose(logits(model, tokens())[first], logits(model, changed)[first], atol=1e-6)


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gemma3_text"])
def test_trap_attention_stays_causal_when_its_implementation_changes(model_type: str, prune: Prune) -> None:
    pruned = prune(model_type)
    expected = logits(pruned.masked, tokens())
    model = load(pruned.path)
    assert model.config._attn_implementation == "sdpa"

    def by_assignment(implementation: str) -> None:
        model.config._attn_implementation = implementation

    for switch in (model.set_attn_implementation, model.model.set_attn_implementation, by_assignment):
        for implementation in ("eager", "sdpa"):
            switch(implementation)
            in_use = {layer.self_attn.config._attn_implementation for layer in model.model.layers[1:]}
            assert in_use == {implementation}
            assert not looks_ahead(model)
            assert_close(logits(model, tokens()), expected)


def test_trap_the_implementation_of_one_model_does_not_leak_into_another(prune: Prune) -> None:
    path = prune("llama").path
    config = AutoConfig.from_pretrained(path)
    eager = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    sdpa = load(path, config=config, attn_implementation="sdpa")
    assert eager.model.layers[1].self_attn.config._attn_implementation == "eager"
    assert sdpa.model.layers[1].self_attn.config._attn_implementation == "sdpa"


def test_trap_the_config_accepts_heads_that_do_not_divide_the_hidden_size(prune: Prune) -> None:
    config = AutoConfig.from_pretrained(prune("llama").path)
    assert config.hidden_size % config.per_layer_config[1].num_attention_heads
    config.validate()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_attention_heads": 5}, "5 heads do not share 4 KV heads"),
        ({"skip": ["attention", "mlp"]}, "skip is"),
        ({"skip": ["norm"]}, "skip is"),
    ],
)
def test_the_config_refuses_layers_that_cannot_be(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        AutoConfig.for_model("streamprune_llama", **BASE, per_layer_config={"1": overrides})


def test_trap_phi3_attention_reads_the_heads_of_its_own_layer(prune: Prune) -> None:
    layers = load(prune("phi3").path).model.layers
    assert [layer.self_attn.config.num_attention_heads for layer in layers[1:]] == [6, 4, 2]


def test_trap_long_rope_is_checked_against_the_heads_of_the_dense_model(prune: Prune) -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64, **factors}
    # The check of phi3 takes the head size to be hidden_size / heads.
    fields = {"head_dim": 8, "hidden_size": 8 * HEADS, "rope_parameters": rope}
    cuts = [Cut(groups=(0, 2)), Cut(groups=(1,)), Cut(), Cut()]
    pruned = prune("phi3", cuts, **fields)
    assert_close(logits(load(pruned.path), tokens()), logits(pruned.masked, tokens()))


def test_trap_a_head_size_left_unsaid_is_that_of_the_dense_model() -> None:
    fields = {key: value for key, value in BASE.items() if key != "head_dim"}
    per_layer = {"1": {"num_attention_heads": 4, "num_key_value_heads": 2}}
    config = AutoConfig.for_model("streamprune_qwen2", **fields, per_layer_config=per_layer)
    model = AutoModelForCausalLM.from_config(config)
    assert [layer.self_attn.head_dim for layer in model.model.layers] == [8] * 4


def test_trap_the_auto_map_names_all_auto_classes() -> None:
    for model_type in FAMILIES:
        fields = ragged_config_fields(model_type)
        config = AutoConfig.for_model(fields["model_type"], **(BASE | EXTRA[model_type]))
        assert config.auto_map == fields["auto_map"]
        heads = {f"AutoModelFor{task}" for task in TASKS}
        assert fields["auto_map"].keys() == {"AutoConfig", "AutoModel"} | heads and len(heads) == 4
        assert fields["auto_map"]["AutoModelForCausalLM"].split(".")[1] == fields["architectures"][0]
    assert ragged_config_fields("llama")["architectures"] == ["StreampruneLlamaForCausalLM"]


def test_the_config_survives_saving(prune: Prune, tmp_path: Path) -> None:
    for model_type in FAMILIES:
        config = AutoConfig.from_pretrained(prune(model_type).path)
        config.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        written = {int(i): fields for i, fields in saved["per_layer_config"].items()}
        assert written == {i: cut.overrides() for i, cut in enumerate(random_cuts(model_type))}
        assert (saved["num_attention_heads"], saved["num_key_value_heads"]) == (HEADS, GROUPS)
        assert "_shared_with_copies" not in saved
        again = AutoConfig.from_pretrained(tmp_path)
        again.name_or_path = config.name_or_path
        assert again == config
        assert again != config.dense()


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_and_sharded_model_loads_again(tied: bool, prune: Prune, tmp_path: Path) -> None:
    pruned = prune("llama", tie_word_embeddings=tied)
    model = load(pruned.path)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert (tmp_path / "modeling_streamprune_llama.py").read_text() == modeling_source("llama")
    again = load(tmp_path)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert_close(logits(again, tokens()), logits(pruned.masked, tokens()))


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_loads_with_a_device_map(device_map: str, prune: Prune) -> None:
    pruned = prune("gemma2")
    model = load(pruned.path, device_map=device_map)
    assert_close(logits(model, tokens()), logits(pruned.masked, tokens()))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_base_model_loads_and_has_the_hidden_states_of_the_dense_one(model_type: str, prune: Prune) -> None:
    pruned = prune(model_type)
    model = load(pruned.path, AutoModel)
    assert type(model).__name__ == ragged_config_fields(model_type)["auto_map"]["AutoModel"].split(".")[1]
    with torch.no_grad():
        ragged = model(tokens(), output_hidden_states=True).hidden_states
        dense = pruned.masked.model(tokens(), output_hidden_states=True).hidden_states
    assert len(ragged) == BASE["num_hidden_layers"] + 1
    for actual, expected in zip(ragged, dense, strict=True):
        assert_close(actual, expected)


# transformers 5.23 renames these methods; peft, and users of 5.15, have the old names.
RENAMED = pytest.mark.filterwarnings(
    "ignore:`(is_gradient_checkpointing|gradient_checkpointing_enable)` is deprecated:FutureWarning"
)


@RENAMED
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "phi3"])
def test_gradient_checkpointing_gives_the_gradients_of_the_dense_model(model_type: str, prune: Prune) -> None:
    pruned = prune(model_type)
    model = load(pruned.path).train()
    model.gradient_checkpointing_enable()
    for each in (model, pruned.masked):
        each.zero_grad()
        each(tokens(), labels=tokens(), use_cache=False).loss.backward()
    assert_close(model.model.embed_tokens.weight.grad, pruned.masked.model.embed_tokens.weight.grad)
    assert all(parameter.grad is not None for parameter in model.parameters())


@RENAMED
@pytest.mark.parametrize("model_type", ["qwen2", "phi3", "olmo2"])
def test_lora_on_all_linear_layers_attaches_and_merges(model_type: str, prune: Prune) -> None:
    pruned = prune(model_type)
    config = LoraConfig(target_modules="all-linear", r=2, task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)
    adapted = get_peft_model(load(pruned.path), config).eval()
    with_adapter = logits(adapted, tokens())
    assert not torch.allclose(with_adapter, logits(pruned.masked, tokens()), atol=1e-2)
    merged = adapted.merge_and_unload()
    assert type(merged).__name__ == ragged_config_fields(model_type)["architectures"][0]
    assert_close(logits(merged, tokens()), with_adapter)


def test_the_modelling_file_names_its_own_family_only() -> None:
    for model_type in FAMILIES:
        source = modeling_source(model_type)
        assert source.startswith(f'"""streamprune_{model_type}: ')
        assert "import streamprune" not in source
        assert "Apache-2.0" in source
        if model_type != "llama":
            assert "llama" not in source.lower()


def test_a_family_without_a_ragged_form_is_refused() -> None:
    assert list(RAGGED_FAMILIES) == FAMILIES
    for function in (modeling_source, ragged_config_fields):
        with pytest.raises(UsageError, match="gpt2 cannot have layers of different widths"):
            function("gpt2")


def test_registering_twice_keeps_the_classes(prune: Prune) -> None:
    before = type(load(prune("llama").path))
    register()
    assert type(load(prune("llama").path)) is before
    assert type(load(prune("llama").path, trust_remote_code=True)) is before


FRESH_PROCESS = """
import sys
from pathlib import Path
sys.modules["streamprune"] = None  # an import of it fails
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

def load(path, auto=AutoModelForCausalLM):
    model, info = auto.from_pretrained(
        path, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    assert auto is AutoModel or not info["unexpected_keys"], info
    return model

root = Path(sys.argv[1])
inputs = load_file(root / "inputs.safetensors")
outputs = {}
for directory in sorted(root.glob("from_*")):
    with torch.no_grad():
        model = load(directory)
        # transformers wraps a class of its own around one that it does not see to be generative.
        assert type(model) is getattr(sys.modules[type(model).__module__], type(model).__name__)
        outputs[directory.name] = model(inputs["input_ids"]).logits
        outputs[directory.name + "_tokens"] = model.generate(
            inputs["padded_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=6, do_sample=False
        )
        base = load(directory, AutoModel)(inputs["input_ids"]).last_hidden_state
        assert torch.equal(base, model.model(inputs["input_ids"]).last_hidden_state)
        model.save_pretrained(root / ("resaved_" + directory.name), max_shard_size="40KB")
        again = load(root / ("resaved_" + directory.name))
        assert type(again) is not type(model)
        assert torch.equal(again(inputs["input_ids"]).logits, outputs[directory.name])
save_file(outputs, root / "outputs.safetensors")
"""


def test_loads_without_streamprune_where_remote_code_is_trusted(prune: Prune, tmp_path: Path) -> None:
    expected: dict[str, torch.Tensor] = {}
    for model_type in FAMILIES:
        pruned = prune(model_type)
        name = f"from_{model_type}"
        os.symlink(pruned.path, tmp_path / name)
        expected[name] = logits(pruned.masked, tokens())
        expected[f"{name}_tokens"] = generate(pruned.masked)
    # What a registered class has saved is as self-contained as what streamprune emits.
    load(prune("llama").path).save_pretrained(tmp_path / "from_registered")
    expected["from_registered"] = expected["from_llama"]
    expected["from_registered_tokens"] = expected["from_llama_tokens"]
    padded_ids, attention_mask = left_padded()
    inputs = {"input_ids": tokens(), "padded_ids": padded_ids, "attention_mask": attention_mask}
    save_file(inputs, tmp_path / "inputs.safetensors")
    environment = os.environ | {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", FRESH_PROCESS, str(tmp_path)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    outputs = load_file(tmp_path / "outputs.safetensors")
    assert sorted(outputs) == sorted(expected)
    for name, tensor in expected.items():
        assert_close(outputs[name], tensor)
