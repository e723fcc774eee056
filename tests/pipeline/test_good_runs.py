"""Good runs: the summary, the files and the kept units of every method, layout and option."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import SHORT, cells, parquet
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from streamprune.texts.documents import embedded_text

QUICK = {
    "random": (),
    "magnitude": (),
    "taylor": (),
    "smoothgrad": ("--set", "draws=2"),
    "moreau": ("--set", "steps=2"),
    "moreau-gs": ("--set", "steps=2"),
}


def stored(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory's safetensors files."""
    tensors: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def kept_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "streamprune.json").read_text())["kept"]


def test_the_summary_of_a_run_with_defaults_matches_the_files(streamprune, tiny_llama, output):
    result = streamprune("--model", tiny_llama, "--output", output, "--quiet", "--seq-len", "16")
    assert result.code == 0
    assert result.err == ""
    before, after = stored(tiny_llama), stored(output)
    count = [str(sum(tensor.numel() for tensor in tensors.values())) for tensors in (before, after)]
    assert cells(result.out, "parameters") == count
    nbytes = [str(sum(tensor.nbytes for tensor in tensors.values())) for tensors in (before, after)]
    assert cells(result.out, "bytes") == nbytes
    assert f"wrote {output} (ragged)" in result.out
    assert list(before) == list(after) or set(before) == set(after)
    facts = json.loads((output / "streamprune.json").read_text())
    assert [str(facts["parameters"][when]) for when in ("before", "after")] == count
    assert [f"{facts['perplexity'][when]:.2f}" for when in ("before", "after")] == cells(result.out, "perplexity")
    loaded = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=False)
    assert sum(parameter.numel() for parameter in loaded.parameters()) == int(count[1])
    # 19 of 37 channels are nearest to 20 % of attention and MLP together; a fifth of three KV groups is none.
    kept = {layer: [len(kinds["kv_group"]), len(kinds["channel"])] for layer, kinds in facts["kept"].items()}
    assert kept == {str(layer): [3, 18] if layer in (4, 5) else [3, 37] for layer in range(8)}


def test_kept_tensors_are_the_source_s_own_bytes_in_its_order(streamprune, tiny_llama, output):
    done = streamprune("--model", tiny_llama, "--output", output, "--quiet", "--method", "magnitude", "--no-evaluate")
    assert done.code == 0
    with (
        safe_open(tiny_llama / "model.safetensors", "pt") as source,
        safe_open(output / "model.safetensors", "pt") as new,
    ):
        assert list(source.keys()) == list(new.keys())
        assert new.metadata() == {"format": "pt"}
    before, after = stored(tiny_llama), stored(output)
    channels = kept_of(output)["4"]["channel"]
    name = "model.layers.4.mlp.{}.weight"
    assert torch.equal(after[name.format("up_proj")], before[name.format("up_proj")][channels])
    assert torch.equal(after[name.format("gate_proj")], before[name.format("gate_proj")][channels])
    assert torch.equal(after[name.format("down_proj")], before[name.format("down_proj")][:, channels])
    untouched = [key for key in before if before[key].shape == after[key].shape]
    assert len(untouched) == len(before) - 6
    assert all(torch.equal(before[key], after[key]) for key in untouched)
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (output / file).read_bytes() == (tiny_llama / file).read_bytes()


@pytest.mark.parametrize("method", QUICK)
def test_each_method_prunes_in_both_layouts_and_repeats_to_the_byte(method, streamprune, tiny_llama, tmp_path):
    options = ("--quiet", "--method", method, *QUICK[method], *SHORT, "--no-evaluate")
    for layout, extra in (("ragged", ()), ("stock", ("--stock",))):
        outputs = [tmp_path / f"{layout}-{run}" for run in range(2)]
        for output in outputs:
            result = streamprune("--model", tiny_llama, "--output", output, *options, *extra)
            assert result.code == 0, result.err
            assert f"({layout})" in result.out
        assert len({(output / "model.safetensors").read_bytes() for output in outputs}) == 1
    assert json.loads((outputs[0] / "config.json").read_text())["model_type"] == "llama"


def test_methods_and_seeds_choose_different_units(streamprune, tiny_llama, tmp_path):
    kept = []
    for number, options in enumerate((("random",), ("random", "--seed", "1"), ("magnitude",), ("taylor",))):
        output = tmp_path / str(number)
        done = streamprune(
            "--model",
            tiny_llama,
            "--output",
            output,
            "--quiet",
            "--no-evaluate",
            *SHORT,
            "--method",
            *options,
        )
        assert done.code == 0
        kept.append(json.dumps(kept_of(output)))
    assert len(set(kept)) == 4


def test_the_same_text_in_each_format_prunes_the_same_units(streamprune, tiny_llama, tmp_path):
    text = embedded_text("heldout")
    paragraphs = [part for part in text.split("\n\n") if part.strip()]
    text = "\n\n".join(paragraphs)
    files = {
        "text": tmp_path / "text.txt",
        "jsonl": tmp_path / "text.jsonl",
        "parquet": parquet(tmp_path / "text.parquet", body=paragraphs),
    }
    files["text"].write_text(text, encoding="utf-8")
    files["jsonl"].write_text("".join(json.dumps({"body": part}) + "\n" for part in paragraphs))
    kept = set()
    for name, file in files.items():
        output = tmp_path / name
        options = (
            "--calibration",
            file,
            "--field",
            "body",
            "--method",
            "taylor",
            "--quiet",
            "--no-evaluate",
            *SHORT,
        )
        result = streamprune("--model", tiny_llama, "--output", output, *options)
        assert result.code == 0, result.err
        kept.add((output / "model.safetensors").read_bytes())
    assert len(kept) == 1


def test_the_field_names_the_column_of_the_evaluation_text_too(streamprune, tiny_llama, output, tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text(json.dumps({"body": embedded_text("heldout")}))
    options = ("--evaluate", file, "--field", "body", "--method", "random", "--quiet")
    result = streamprune("--model", tiny_llama, "--output", output, *options)
    assert result.code == 0, result.err


def test_relative_paths_are_taken_from_the_working_directory(streamprune, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("--method", "random", "--no-evaluate", "--quiet")
    assert streamprune("--model", "model", "--output", "pruned", *options).code == 0
    facts = json.loads((tmp_path / "pruned" / "streamprune.json").read_text())
    assert facts["source"]["model"] == str(model), "verify finds the source from anywhere"


@pytest.mark.parametrize(("multiple", "kept"), [(8, 16), (5, 20)])
def test_round_to_keeps_multiples(multiple, kept, streamprune, tiny_llama, output):
    options = ("--method", "random", "--no-evaluate", "--quiet", "--round-to", multiple)
    assert streamprune("--model", tiny_llama, "--output", output, *options).code == 0
    assert {len(kinds["channel"]) for layer, kinds in kept_of(output).items() if layer in "45"} == {kept}


def test_attention_and_mlp_ratios_are_set_apart(streamprune, tiny_llama, output):
    options = (
        "--attention-ratio",
        "0.34",
        "--mlp-ratio",
        "0.25",
        "--method",
        "random",
        "--no-evaluate",
        "--quiet",
    )
    result = streamprune("--model", tiny_llama, "--output", output, *options)
    assert result.code == 0
    for layer, kinds in kept_of(output).items():
        # floor(0.34 · 3) = 1 group, and 0.25 · 37 = 9.25 channels.
        assert [len(kinds["kv_group"]), len(kinds["channel"])] == ([2, 28] if layer in "45" else [3, 37])
    after = stored(output)
    assert after["model.layers.4.self_attn.q_proj.weight"].shape == (2 * 2 * 10, 48)
    assert after["model.layers.4.self_attn.k_proj.weight"].shape == (2 * 10, 48)
    assert after["model.layers.4.self_attn.o_proj.weight"].shape == (48, 2 * 2 * 10)
    assert cells(result.out, "parameters")[1] == str(sum(tensor.numel() for tensor in after.values()))


def test_a_ratio_of_zero_copies_the_model(streamprune, tiny_llama, output):
    options = ("--ratio", "0", "--method", "random", "--no-evaluate", "--quiet")
    assert streamprune("--model", tiny_llama, "--output", output, *options).code == 0
    before, after = stored(tiny_llama), stored(output)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert (output / "config.json").exists()


def test_sharded_output_loads_and_keeps_to_the_size(streamprune, tiny_llama, output):
    options = ("--method", "random", "--no-evaluate", "--quiet", "--max-shard-size", "0.1MB")
    assert streamprune("--model", tiny_llama, "--output", output, *options).code == 0
    shards = sorted(output.glob("model-*.safetensors"))
    assert len(shards) > 3
    assert all(sum(tensor.nbytes for tensor in load_file(shard).values()) <= 100_000 for shard in shards)
    loaded = AutoModelForCausalLM.from_pretrained(output).state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in stored(output).items())


def test_emit_mistral_writes_a_stock_mistral(streamprune, tiny_llama, output):
    options = ("--stock", "--emit", "mistral", "--attention-ratio", "0.34", "--method", "random", "--quiet")
    result = streamprune("--model", tiny_llama, "--output", output, *options)
    assert result.code == 0, result.err
    loaded = AutoModelForCausalLM.from_pretrained(output)
    assert loaded.config.model_type == "mistral"
    assert loaded.config.num_key_value_heads == 2
