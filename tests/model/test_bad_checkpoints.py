"""What a checkpoint may get wrong is refused in one line, and nothing is written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import edit_tensors
from tiny_models import save_tiny, save_tokenizer, tiny_model
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from streamprune.model.families import FAMILIES


def edit_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A tiny Llama in several shards with an index."""
    path = tmp_path / "sharded"
    tiny_model("llama", dtype=torch.float32, num_hidden_layers=8).save_pretrained(path, max_shard_size="100KB")
    save_tokenizer(path)
    assert len(list(path.glob("model-*.safetensors"))) > 3
    return path


def test_model_that_is_no_directory_is_refused(refused, tmp_path):
    refused(tmp_path / "nowhere", code=1, names=("nowhere", "not a directory"))


def test_model_that_is_a_file_is_refused(refused, model):
    refused(model / "config.json", code=1, names=("config.json", "not a directory"))


def test_missing_config_is_refused(refused, model):
    (model / "config.json").unlink()
    refused(model, code=1, names=(str(model), "config.json"))


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff"], ids=["empty", "cut", "list", "latin-1"])
def test_config_that_is_no_json_object_is_refused(text, refused, model):
    (model / "config.json").write_text(text, encoding="latin-1")
    refused(model, code=1, names=(str(model / "config.json"),), remedy="download|expected")


def test_config_that_transformers_refuses_is_refused(refused, model):
    edit_json(model / "config.json", lambda config: config.update(hidden_size="wide"))
    refused(model, code=1, names=(str(model / "config.json"), "hidden_size"), remedy="expected int")


def test_missing_weights_are_refused(refused, model):
    (model / "model.safetensors").unlink()
    refused(model, code=1, names=(str(model), "model.safetensors"))


def test_index_that_names_a_missing_shard_is_refused(refused, sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    refused(sharded, code=1, names=(shard.name, "missing"))


@pytest.mark.parametrize("absolute", [False, True], ids=["relative", "absolute"])
def test_index_entry_outside_the_directory_is_refused_though_the_file_is_there(absolute, refused, sharded, tmp_path):
    shard = sorted(sharded.glob("model-*.safetensors"))[0]
    elsewhere = tmp_path / "elsewhere.safetensors"
    shard.rename(elsewhere)
    target = str(elsewhere) if absolute else "../elsewhere.safetensors"
    index = sharded / "model.safetensors.index.json"
    names = []

    def redirect(value):
        names.extend(name for name, file in value["weight_map"].items() if file == shard.name)
        value["weight_map"].update(dict.fromkeys(names, target))

    edit_json(index, redirect)
    message = refused(sharded, code=1, names=(index.name, "outside", target))
    assert any(name in message for name in names)


def test_index_that_places_a_tensor_in_the_wrong_shard_is_refused(refused, sharded):
    index = sharded / "model.safetensors.index.json"

    def swap(value):
        files = sorted(set(value["weight_map"].values()))
        value["weight_map"]["model.norm.weight"] = next(
            file for file in files if file != value["weight_map"]["model.norm.weight"]
        )

    edit_json(index, swap)
    refused(sharded, code=1, names=(index.name, "model.norm.weight"))


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": ["a"]}], ids=["none", "empty", "list"])
def test_index_without_a_weight_map_is_refused(content, refused, sharded):
    (sharded / "model.safetensors.index.json").write_text(json.dumps(content))
    refused(sharded, code=1, names=("model.safetensors.index.json", "weight_map"))


@pytest.mark.parametrize("gone", [1, 10_000, 540_000], ids=["a-byte", "a-tensor", "most"])
def test_truncated_shard_is_refused(gone, refused, model):
    file = model / "model.safetensors"
    os.truncate(file, file.stat().st_size - gone)
    refused(model, code=1, names=(str(file), "truncated"), remedy="download")


def test_truncated_shard_of_several_is_refused_by_its_own_name(refused, sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[2]
    os.truncate(shard, shard.stat().st_size - 1)
    refused(sharded, code=1, names=(shard.name, "truncated"), remedy="download")


@pytest.mark.parametrize("claimed", [10**6, 2**63, 2**64 - 1])
def test_header_longer_than_the_file_is_refused(claimed, refused, model):
    file = model / "model.safetensors"
    with file.open("r+b") as stream:
        stream.write(claimed.to_bytes(8, "little"))
    refused(model, code=1, names=(str(file), "header", str(claimed)), remedy="download")


@pytest.mark.parametrize("size", [0, 5, 8])
def test_file_too_short_for_a_header_is_refused(size, refused, model):
    file = model / "model.safetensors"
    os.truncate(file, size)
    refused(model, code=1, names=(str(file),), remedy="download")


@pytest.mark.parametrize("name", ["model.layers.5.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_tensor_of_a_wrong_shape_is_refused_with_both_shapes(name, refused, model):
    edit_tensors(model, lambda tensors: tensors.update({name: torch.zeros(11, 48)}))
    right = "[37, 48]" if "up_proj" in name else "[260, 48]"
    refused(model, code=1, names=(name, "[11, 48]", right))


@pytest.mark.parametrize("name", ["model.layers.7.self_attn.o_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_missing_tensor_is_refused(name, refused, model):
    edit_tensors(model, lambda tensors: tensors.pop(name))
    refused(model, code=1, names=(str(model), name))


def test_quantised_weights_are_refused(refused, model):
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(model, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    refused(model, code=1, names=(name, "int8"))


@pytest.mark.parametrize("measured", [True, False], ids=["evaluate", "no-evaluate"])
@pytest.mark.parametrize("layer", [1, 5], ids=["layer-kept", "layer-pruned"])
@pytest.mark.parametrize("method", ["random", "magnitude", "taylor"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_layer_and_tensor(value, method, layer, measured, refused, model):
    def damage(tensors):
        tensors[f"model.layers.{layer}.mlp.down_proj.weight"][3, 5] = value

    edit_tensors(model, damage)
    options = () if measured else ("--no-evaluate",)
    refused(
        model,
        "--method",
        method,
        *options,
        code=1,
        names=(str(model), f"layer {layer}", "mlp.down_proj.weight"),
    )


@pytest.mark.parametrize("method", ["random", "magnitude", "taylor"])
def test_a_norm_that_is_not_finite_is_refused_by_layer_and_tensor(method, refused, model):
    def damage(tensors):
        tensors["model.layers.5.input_layernorm.weight"][0] = float("nan")

    edit_tensors(model, damage)
    names = ("layer 5", "input_layernorm.weight")
    refused(model, "--method", method, "--no-evaluate", code=1, names=names)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_weights_outside_the_layers_that_are_not_finite_are_refused(name, refused, model):
    edit_tensors(model, lambda tensors: tensors[name].view(-1)[7:8].fill_(float("nan")))
    refused(model, "--method", "random", "--no-evaluate", code=1, names=(str(model), name))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_refused_unopened(name, refused, model):
    (model / "model.safetensors").rename(model / name)
    refused(model, code=1, names=(name, "pickle"), remedy="convert.*safetensors")


@pytest.mark.parametrize(
    "model_type, advice",
    [
        ("bloom", ""),
        ("qwen2_vl", "the nearest is qwen2"),
        ("gemma", "the nearest is gemma2"),
        ("gemma3", "the nearest is gemma3_text"),
        ("LLaMA", 'write "model_type": "llama"'),
        ("gpt-neox", 'write "model_type": "gpt_neox"'),
    ],
)
def test_unknown_family_is_refused_with_the_nearest_and_the_known_ones(model_type, advice, refused, model):
    edit_json(model / "config.json", lambda config: config.update(model_type=model_type))
    refused(model, code=1, names=(str(model), repr(model_type), advice, *FAMILIES), remedy="known are")


@pytest.mark.parametrize(
    "architectures, advice",
    [(None, "write its family there"), *((name, f'write "model_type": "{name}"') for name in FAMILIES)],
)
def test_a_config_without_a_family_is_refused_with_the_one_of_its_architecture(architectures, advice, refused, model):
    names = None if architectures is None else [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[architectures]]
    edit_json(model / "config.json", lambda config: config.pop("model_type"))
    edit_json(model / "config.json", lambda config: config.update(architectures=names))
    refused(model, code=1, names=(str(model), "has no model_type", advice))


@pytest.mark.parametrize("fields", [{"architectures": 5}, {"text_config": {"model_type": ["llama"]}}])
def test_a_config_without_a_family_whose_other_fields_are_no_names_is_refused(fields, refused, model):
    edit_json(model / "config.json", lambda config: config.pop("model_type"))
    edit_json(model / "config.json", lambda config: config.update(fields))
    refused(model, code=1, names=(str(model), "has no model_type"), remedy="known are")


def test_missing_tokenizer_is_refused(refused, model):
    for file in model.glob("tokenizer*"):
        file.unlink()
    refused(model, code=1, names=(str(model), "tokenizer"), remedy="copy the tokenizer")


def test_a_missing_tokenizer_is_no_matter_where_no_text_is_read(streamprune, model, output):
    for file in model.glob("tokenizer*"):
        file.unlink()
    options = ("--method", "magnitude", "--no-evaluate", "--quiet")
    assert streamprune("--model", model, "--output", output, *options).code == 0


def test_a_tokenizer_of_another_model_is_refused(refused, tmp_path):
    path = tmp_path / "narrow"
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    save_tiny(path, "llama", dtype=torch.float32, num_hidden_layers=8, vocab_size=60, **ids)
    refused(path, code=1, names=("tokenizer",))
