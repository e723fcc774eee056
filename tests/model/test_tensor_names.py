"""Wrapped names become the model's own where that gives all of them; else the message says what they begin with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_runner import Streamprune, edit_tensors
from safetensors.torch import load_file
from tiny_models import FAMILY_FIELDS, save_tiny, save_tokenizer, token_ids
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from streamprune.model.skeleton import Skeleton
from streamprune.storage.checkpoint import Checkpoint

Rename = Callable[[str], str]
WRAPPERS: dict[str, Rename] = {
    "module.": lambda name: f"module.{name}",
    "_orig_mod.": lambda name: f"_orig_mod.{name}",
    "base_model.model.": lambda name: f"base_model.model.{name}",
    "language_model.": lambda name: f"language_model.{name}",
    "model.language_model.": lambda name: f"model.language_model.{name}",
    "module._orig_mod.": lambda name: f"module._orig_mod.{name}",
    "module.module.": lambda name: f"module.module.{name}",
    "policy.": lambda name: f"policy.{name}",
}


def rename(model: Path, change: Rename) -> None:
    edit_tensors(model, lambda tensors: [tensors.update({change(name): tensors.pop(name)}) for name in [*tensors]])


def prune(streamprune: Streamprune, model: Path, output: Path) -> tuple[bytes, list[str]]:
    """The bytes of the output's tensors, and the lines that were said."""
    options = ("--method", "magnitude", "--no-evaluate", "--stock", "--overwrite")
    done = streamprune("--model", model, "--output", output, *options)
    assert done.code == 0, done.err
    return (output / "model.safetensors").read_bytes(), done.err.splitlines()


def tensors_of(output: Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(output / "model.safetensors").items()}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_wrappers_names_give_the_same_output_and_a_line(wrapper, tied, streamprune: Streamprune, tmp_path):
    model, output = tmp_path / "model", tmp_path / "out"
    save_tiny(model, "llama", dtype=torch.float32, tied=tied)
    prune(streamprune, model, output)
    expected = tensors_of(output)
    rename(model, WRAPPERS[wrapper])
    _, lines = prune(streamprune, model, output)
    assert tensors_of(output) == expected
    (line,) = (line for line in lines if "names lose" in line)
    assert line.endswith("; the output has the model's own")
    assert all(part in line for part in wrapper.split("."))
    AutoModelForCausalLM.from_pretrained(output)


@pytest.mark.parametrize("family", FAMILY_FIELDS)
def test_every_familys_tensors_are_known_behind_wrappers(family, tmp_path):
    model = save_tiny(tmp_path, family)
    rename(tmp_path, lambda name: f"module.{name.replace('.0.', '.0._orig_mod.', 1)}")
    with Checkpoint(tmp_path) as checkpoint:
        skeleton = Skeleton(checkpoint, torch.float64, torch.device("cpu"))
        assert skeleton.notes == ["its tensors' names lose 'module.' and '_orig_mod.'; the output has the model's own"]
        ids = token_ids()
        hidden, calls = skeleton.embed(ids), skeleton.record(ids)
        for index, call in enumerate(calls):
            stored = {name: checkpoint.read(entry.name) for name, entry in skeleton.entries[index].items()}
            if not skeleton.places:
                hidden = skeleton.run_layer(index, stored, call, hidden)
        if not skeleton.places:
            torch.testing.assert_close(skeleton.head(hidden), model(ids).logits)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, by torch.compile
def test_what_torch_itself_wraps_is_known(tmp_path):
    """Compiled as a whole and layer by layer, inside a data-parallel wrapper."""
    model = save_tiny(tmp_path, "llama", dtype=torch.float32)
    clean = dict(model.state_dict())
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(layer)
    wrapped = nn.DataParallel(torch.compile(model)).state_dict()
    assert not wrapped.keys() & clean.keys()
    edit_tensors(tmp_path, lambda tensors: (tensors.clear(), tensors.update(wrapped)))
    with Checkpoint(tmp_path) as checkpoint:
        Skeleton(checkpoint, torch.float32, torch.device("cpu"))
        assert checkpoint.tensors.keys() == clean.keys()
        assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in clean.items())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt"])
def test_a_base_models_names_stay_as_they_are_beside_unused_tensors(family, streamprune: Streamprune, tmp_path):
    """transformers saves a base model's tensors without the prefix."""
    model, bare, output = tmp_path / "model", tmp_path / "bare", tmp_path / "out"
    whole = save_tiny(model, family, dtype=torch.float32, tied=True)
    prune(streamprune, model, output)
    expected = tensors_of(output)
    whole.base_model.save_pretrained(bare)
    save_tokenizer(bare)
    (bare / "config.json").write_bytes((model / "config.json").read_bytes())
    prefix = f"{whole.base_model_prefix}."
    edit_tensors(bare, lambda tensors: tensors.update({f"{prefix}vision.weight": torch.zeros(3)}))
    _, lines = prune(streamprune, bare, output)
    assert any("1 tensors, 12 B" in line for line in lines) and not any("names lose" in line for line in lines)
    assert tensors_of(output) == {name.removeprefix(prefix): value for name, value in expected.items()}


def multimodal(path: Path) -> Gemma3ForConditionalGeneration:
    text = FAMILY_FIELDS["gemma3_text"] | {"tie_word_embeddings": True}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(path)
    save_tokenizer(path)
    return model


def test_a_multimodal_models_message_says_how_to_get_its_text_model_and_that_gives_the_same_logits(refused, tmp_path):
    path = tmp_path / "model"
    whole = multimodal(path)
    refused(path, code=1, names=("gemma3", "text_config", '"model_type": "gemma3_text"'))
    config = json.loads((path / "config.json").read_text())["text_config"]
    (path / "config.json").write_text(json.dumps(config | {"model_type": "gemma3_text"}))
    with Checkpoint(path) as checkpoint:
        skeleton = Skeleton(checkpoint, torch.float32, torch.device("cpu"))
        assert [line.split(",")[0] for line in skeleton.notes][-1].startswith("left out")
        ids = token_ids()
        hidden = skeleton.embed(ids)
        for index, call in enumerate(skeleton.record(ids)):
            weights = {name: checkpoint.read(entry.name) for name, entry in skeleton.entries[index].items()}
            hidden = skeleton.run_layer(index, weights, call, hidden)
        torch.testing.assert_close(skeleton.head(hidden), whole(input_ids=ids).logits)


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda name: name.replace("layers", "blocks"), "'model.blocks.' (72)"),
        (
            lambda name: name.replace("model.layers", "transformer.h").replace("self_attn", "attn"),
            "'transformer.h.' (72)",
        ),
        (lambda name: name.replace(".", "/"), "model/layers/0"),
    ],
)
def test_names_of_another_model_are_quoted_with_what_was_expected(change, told, refused, model):
    rename(model, change)
    refused(model, code=1, names=(str(model), told, "'model.layers.0.self_attn.q_proj.weight'"), remedy="export")


def test_two_models_in_one_file_are_not_guessed_between(refused, model):
    def double(tensors):
        for name in [*tensors]:
            tensor = tensors.pop(name)
            tensors |= {f"actor.{name}": tensor, f"critic.{name}": tensor.clone()}

    edit_tensors(model, double)
    refused(model, code=1, names=("'actor.model.layers.' (72)", "'critic.model.layers.' (72)"), remedy="export")


def test_a_wrapped_model_that_lacks_a_tensor_is_not_half_renamed(refused, model):
    edit_tensors(model, lambda tensors: tensors.pop("model.norm.weight"))
    rename(model, WRAPPERS["module."])
    refused(model, code=1, names=("'module.model.layers.' (72)",), remedy="export")


def test_clean_and_wrapped_names_of_one_tensor_are_not_guessed_between(refused, model):
    rename(model, WRAPPERS["module."])
    edit_tensors(model, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(48)}))
    refused(model, code=1, names=("'module.model.layers.' (72)",), remedy="export")


def adapter(model: Path) -> None:
    edit_tensors(model, lambda tensors: tensors.clear())
    names = [
        f"base_model.model.model.layers.{n}.self_attn.q_proj.lora_{side}.weight" for n in range(8) for side in "AB"
    ]
    edit_tensors(model, lambda tensors: tensors.update({name: torch.zeros(2, 2) for name in names}))


def test_an_adapter_is_called_one(refused, model):
    adapter(model)
    refused(model, code=1, names=("PEFT adapter", "lora_A", "merge_and_unload()"))


def test_a_model_with_its_adapter_in_it_is_told_to_merge(refused, model):
    def put_in(tensors):
        for name in [*tensors]:
            tensor = tensors.pop(name)
            if "q_proj" in name:
                for side in "AB":
                    tensors[f"base_model.model.{name.replace('.weight', f'.lora_{side}.default.weight')}"] = (
                        torch.zeros(2)
                    )
                name = name.replace(".weight", ".base_layer.weight")
            tensors[f"base_model.model.{name}"] = tensor

    edit_tensors(model, put_in)
    refused(model, code=1, names=("PEFT adapter", "merge_and_unload()"))


@pytest.mark.parametrize("config", [True, False], ids=["with-config", "without"])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_a_directory_of_an_adapter_alone_names_the_base_model(name, config, refused, model):
    (model / "model.safetensors").rename(model / name)
    if not config:
        (model / "config.json").unlink()
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    refused(model, code=1, names=(str(model), name, "org/base", "merge_and_unload()"))
