"""What no model can be built from is refused by the field of config.json, before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import Streamprune, check_refusal
from tiny_models import FAMILY_FIELDS, save_tiny, tiny_model, token_ids

from streamprune.errors import CheckpointError
from streamprune.model import model_config
from streamprune.model.skeleton import Skeleton
from streamprune.storage.checkpoint import Checkpoint

CPU = torch.device("cpu")


def change(model: Path, **fields: Any) -> None:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def rope(**fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 1e4} | fields}


FIELDS: list[dict[str, Any]] = [
    {"pad_token_id": 260},
    {"pad_token_id": -261},
    {"hidden_act": "swishy"},
    {"hidden_act": 7},
    rope(rope_type="mrope"),
    rope(rope_type="yarn"),
    rope(rope_type="linear", factor="two"),
    {"rope_parameters": None, "rope_scaling": {"type": "mrope"}},
    {"rope_parameters": None, "rope_theta": "large"},
    {"rope_parameters": 5},
    {"layer_types": ["full_attention"] * 3},
    {"layer_types": ["odd"] * 8},
    {"num_hidden_layers": 0},
    {"num_hidden_layers": -1},
    {"num_hidden_layers": "8"},
    {"hidden_size": 0},
    {"vocab_size": -5},
    {"intermediate_size": 0},
    {"num_attention_heads": 0},
    {"num_key_value_heads": 0},
    {"num_key_value_heads": 4},
    {"head_dim": 0},
    {"head_dim": 7},
    {"rms_norm_eps": None},
    {"dtype": "floaty"},
    {"id2label": 5},
    {"quantization_config": 5},
]


@pytest.mark.parametrize("fields", FIELDS, ids=json.dumps)
def test_a_field_that_no_model_can_be_built_from_is_refused_by_name_and_value(fields, refused, model):
    change(model, **fields)
    name, value = list(fields.items())[-1]
    refused(model, code=1, names=(str(model / "config.json"), name, repr(value)[:60]))


@pytest.mark.parametrize(
    "family, fields",
    [
        ("gpt2", {"n_layer": 0}),
        ("gpt2", {"n_head": 5}),
        ("gpt2", {"activation_function": "swishy"}),
        ("opt", {"ffn_dim": 0}),
        ("opt", {"num_attention_heads": 5}),
        ("gpt_neox", {"hidden_act": "swishy"}),
        ("gemma2", {"hidden_activation": "swishy"}),
        ("gemma2", {"query_pre_attn_scalar": 0}),
        ("gemma3_text", {"sliding_window": None}),
        ("gemma3_text", {"rope_parameters": {"full_attention": {"rope_type": "mrope"}}}),
        ("mixtral", {"num_local_experts": 0}),
        ("mixtral", {"num_experts_per_tok": 9}),
        ("smollm3", {"no_rope_layers": [1]}),
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 0}),
    ],
    ids=str,
)
def test_other_families_fields_are_named_as_their_config_has_them(family, fields, tmp_path):
    save_tiny(tmp_path, family, dtype=torch.float32)
    change(tmp_path, **fields)
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(CheckpointError, match=list(fields)[-1]):
        Skeleton(checkpoint, torch.float32, CPU)


def test_a_plan_and_an_evaluation_name_the_field_too(streamprune: Streamprune, model):
    change(model, hidden_act="swishy")
    for command in (("plan", "--method", "random"), ("eval",)):
        check_refusal(streamprune(*command, "--model", model), 1, ("config.json", "hidden_act", "swishy"))


def test_machines_are_told_of_the_field_in_an_event(streamprune: Streamprune, model, output):
    change(model, num_key_value_heads=0)
    done = streamprune("--model", model, "--output", output, "--method", "random", "--json-progress")
    assert done.code == 1
    event = json.loads(done.err.splitlines()[-1])
    assert event["event"] == "error" and "num_key_value_heads" in event["message"]


def test_what_transformers_throws_at_the_first_call_of_a_layer_names_the_field(model, monkeypatch):
    """A call is tried with two tokens before anything is computed."""

    def fail(self, *arguments, **options):
        raise ValueError("Could not find a `sliding_window`")

    change(model, sliding_window=None)
    monkeypatch.setattr(Skeleton, "record", fail)
    with Checkpoint(model) as checkpoint, pytest.raises(CheckpointError, match="call a layer with sliding_window None"):
        Skeleton(checkpoint, torch.float32, CPU)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate")], ids=repr)
def test_lack_of_memory_is_not_blamed_on_a_field(error, tmp_path):
    with pytest.raises(type(error)) as raised, model_config.naming_the_field(tmp_path, {"a": 1}, "build a model"):
        raise error
    assert raised.value is error


def test_fields_that_are_tried_are_left_as_they_are(tmp_path):
    save_tiny(tmp_path, "llama", dtype=torch.float32)
    change(tmp_path, rope_parameters=None, rope_scaling={"type": "mrope"})
    with Checkpoint(tmp_path) as checkpoint:
        before = json.dumps(checkpoint.config)
        with pytest.raises(CheckpointError, match=r"rope_scaling \{'type': 'mrope'\}"):
            Skeleton(checkpoint, torch.float32, CPU)
        assert json.dumps(checkpoint.config) == before


ATTENTION = ("flash_attention_2", "flash_attention_3", "flex_attention", "kernels-community/flash-attn", "nonsense")


@pytest.mark.parametrize("asked", ATTENTION)
def test_attention_that_cannot_run_here_gives_way_to_sdpa_and_the_output_has_the_same_bytes(
    asked, streamprune: Streamprune, model, output
):
    options = ("--method", "taylor", "--seq-len", "16", "--samples", "2", "--no-evaluate")
    assert streamprune("--model", model, "--output", output, *options).code == 0
    expected = (output / "model.safetensors").read_bytes()
    change(model, attn_implementation=asked)
    done = streamprune("--model", model, "--output", output, *options, "--overwrite")
    assert done.code == 0
    assert [line for line in done.err.splitlines() if "sdpa" in line] == [
        f"attention {asked!r} of its config.json cannot run here; sdpa computes it"
    ]
    assert (output / "model.safetensors").read_bytes() == expected


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_attention_in_its_place_computes_what_transformers_computes(family, tmp_path):
    model = save_tiny(tmp_path, family)
    change(tmp_path, attn_implementation="flash_attention_2")
    with Checkpoint(tmp_path) as checkpoint:
        skeleton = Skeleton(checkpoint, torch.float64, CPU)
        assert skeleton.model.config._attn_implementation == model.config._attn_implementation
        ids = token_ids()
        hidden, calls = skeleton.embed(ids), skeleton.record(ids)
        for index, call in enumerate(calls):
            weights = {name: checkpoint.read(entry.name) for name, entry in skeleton.entries[index].items()}
            hidden = skeleton.run_layer(index, weights, call, hidden)
        with torch.no_grad():
            torch.testing.assert_close(skeleton.head(hidden), model(ids).logits)


def test_attention_that_torch_has_stays(tmp_path):
    save_tiny(tmp_path, "llama", dtype=torch.float32)
    change(tmp_path, attn_implementation="eager")
    with Checkpoint(tmp_path) as checkpoint:
        skeleton = Skeleton(checkpoint, torch.float32, CPU)
        assert skeleton.model.config._attn_implementation == "eager" and skeleton.notes == []


@pytest.mark.parametrize("family", FAMILY_FIELDS)
def test_a_good_config_has_nothing_to_say(family, tmp_path):
    tiny_model(family, dtype=torch.float32).save_pretrained(tmp_path)
    with Checkpoint(tmp_path) as checkpoint:
        assert Skeleton(checkpoint, torch.float32, CPU).notes == []
