"""Only tensors that the model uses are judged, hashed, counted and written; a line says which others there were."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_runner import Streamprune, edit_tensors
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM

INFINITE = torch.full((3, 2), -math.inf)
OPTIONS = ("--method", "magnitude", "--no-evaluate", "--stock")
Tensors = dict[str, torch.Tensor]


def prune(streamprune: Streamprune, model: Path, output: Path, *options: str) -> tuple[Tensors, list[str]]:
    """The output's tensors, and the lines that were said."""
    done = streamprune("--model", model, "--output", output, "--overwrite", *(options or OPTIONS))
    assert done.code == 0, done.err
    return load_file(output / "model.safetensors"), done.err.splitlines()


def same(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


UNUSED: list[tuple[str, str]] = [
    ("gpt_neox", "gpt_neox.layers.1.attention.masked_bias"),
    ("gpt_neox", "gpt_neox.layers.0.attention.rotary_emb.inv_freq"),
    ("gpt2", "transformer.h.3.attn.bias"),
    ("gpt2", "transformer.h.0.attn.masked_bias"),
    ("gpt2", "v_head.summary.weight"),
    ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
    ("llama", "model.rotary_emb.inv_freq"),
    ("llama", "v_head.weight"),
    ("llama", "score.weight"),
    ("qwen2", "mtp.layers.0.mlp.up_proj.weight"),
    ("qwen2", "model.layers.4.mlp.up_proj.weight"),
    ("qwen2", "model.layers.40.mlp.up_proj.weight"),
    ("gemma3_text", "vision_tower.encoder.layers.0.self_attn.q_proj.weight"),
    ("gemma3_text", "model.multi_modal_projector.weight"),
    ("mixtral", "model.layers.4.block_sparse_moe.experts.0.w1.weight"),
]


@pytest.mark.parametrize("family, name", UNUSED)
def test_an_infinite_tensor_that_transformers_ignores_changes_nothing_but_a_line(
    family, name, streamprune: Streamprune, tmp_path
):
    model, output = tmp_path / "model", tmp_path / "out"
    save_tiny(model, family, dtype=torch.float32)
    expected, lines = prune(streamprune, model, output)
    assert not any("left out" in line for line in lines)
    facts = json.loads((output / "streamprune.json").read_text())
    edit_tensors(model, lambda tensors: tensors.update({name: INFINITE}))
    AutoModelForCausalLM.from_pretrained(model)
    made, lines = prune(streamprune, model, output)
    assert same(made, expected)
    assert [line for line in lines if "left out" in line] == [
        f"left out, as the model does not use them: 1 tensors, 24 B ({name})"
    ]
    again = json.loads((output / "streamprune.json").read_text())
    assert again["bytes"] == facts["bytes"]
    assert again["source"]["sha256_of_tensors"] == facts["source"]["sha256_of_tensors"]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "options",
    [
        ("--granularity", "layers", "--layers", "1:3", "--ratio", "0.5"),
        ("--granularity", "weights"),
        ("--layers", "1:3"),
    ],
)
def test_other_granularities_leave_them_out_too(options, tied, streamprune: Streamprune, tmp_path):
    model, output = tmp_path / "model", tmp_path / "out"
    save_tiny(model, "llama", dtype=torch.float32, tied=tied)
    options = (*options, "--method", "random", "--no-evaluate", "--seq-len", "16")
    expected, _ = prune(streamprune, model, output, *options)
    edit_tensors(model, lambda tensors: tensors.update({"model.layers.4.mlp.up_proj.weight": INFINITE}))
    assert same(prune(streamprune, model, output, *options)[0], expected)


@pytest.mark.parametrize("command", ["plan", "eval"])
def test_a_plan_and_an_evaluation_say_it(command, streamprune: Streamprune, model):
    names = [f"v_head.{number}" for number in range(5)]
    edit_tensors(model, lambda tensors: tensors.update({name: INFINITE.clone() for name in names}))
    options = ("--method", "random") if command == "plan" else ("--seq-len", "16", "--samples", "2")
    done = streamprune(command, "--model", model, *options)
    assert done.code == 0
    said = done.out if command == "plan" else done.err
    assert "5 tensors, 120 B (v_head.0, v_head.1, v_head.2, ...)" in said


def with_dtype(file: Path, name: str, dtype: str) -> None:
    """Put a tensor of a dtype that torch may not have in front of the file's others."""
    raw = file.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    header[name] = {"dtype": dtype, "shape": [4, 2], "data_offsets": [len(data), len(data) + 8]}
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data + bytes(8))


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0"])
def test_a_dtype_that_is_not_read_is_no_matter_where_the_model_does_not_use_it(
    dtype, streamprune: Streamprune, model, output
):
    expected, _ = prune(streamprune, model, output)
    with_dtype(model / "model.safetensors", "scales", dtype)
    made, lines = prune(streamprune, model, output)
    assert same(made, expected)
    assert any(line.endswith("1 tensors, 8 B (scales)") for line in lines)


def sharded(model: Path) -> tuple[Path, Callable[[dict[str, str]], None]]:
    """The model in two shards; the index, and what writes other places into it."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names, places = sorted(tensors), {}
    for number in (1, 2):
        part = {name: tensors[name] for name in names[number - 1 :: 2]}
        save_file(part, model / f"{number}.safetensors", metadata={"format": "pt"})
        places |= dict.fromkeys(part, f"{number}.safetensors")
    index = model / "model.safetensors.index.json"

    def write(more: dict[str, str]) -> None:
        index.write_text(json.dumps({"metadata": {}, "weight_map": places | more}))

    write({})
    return index, write


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.9.mlp.up_proj.weight"])
def test_an_index_may_name_what_no_shard_holds_and_the_model_does_not_use(
    name, streamprune: Streamprune, model, output
):
    expected, _ = prune(streamprune, model, output)
    _, write = sharded(model)
    write({name: "1.safetensors"})
    AutoModelForCausalLM.from_pretrained(model)
    assert same(prune(streamprune, model, output)[0], expected)


def test_an_index_that_names_what_the_model_uses_and_no_shard_holds_is_refused(refused, model):
    edit_tensors(model, lambda tensors: tensors.pop("model.norm.weight"))
    index, write = sharded(model)
    write({"model.norm.weight": "2.safetensors"})
    refused(model, code=1, names=(str(index), "model.norm.weight", "2.safetensors"))


@pytest.mark.parametrize("meant", ["1.safetensors", "2.safetensors"])
def test_of_two_copies_the_one_that_the_index_means_is_pruned(meant, streamprune: Streamprune, model, output):
    expected, _ = prune(streamprune, model, output)
    _, write = sharded(model)
    norm = expected["model.norm.weight"]
    for file in ("1.safetensors", "2.safetensors"):
        tensors = load_file(model / file)
        tensors["model.norm.weight"] = norm if file == meant else norm * math.nan
        save_file(tensors, model / file, metadata={"format": "pt"})
    write({"model.norm.weight": meant})
    assert same(prune(streamprune, model, output)[0], expected)


def test_shards_without_their_index_are_refused_as_transformers_refuses_them(refused, model):
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(model)
    refused(model, code=1, names=(str(model), "model-00001-of-00002.safetensors", "model.safetensors.index.json"))


def test_weights_by_the_name_that_the_config_gives_are_read_as_in_transformers(streamprune: Streamprune, model, output):
    expected, _ = prune(streamprune, model, output)
    (model / "model.safetensors").rename(model / "mine.safetensors")
    fields = json.loads((model / "config.json").read_text()) | {"transformers_weights": "mine.safetensors"}
    (model / "config.json").write_text(json.dumps(fields))
    AutoModelForCausalLM.from_pretrained(model)
    assert same(prune(streamprune, model, output)[0], expected)
    assert "transformers_weights" not in json.loads((output / "config.json").read_text())
    AutoModelForCausalLM.from_pretrained(output)
