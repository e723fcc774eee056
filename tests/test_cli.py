"""The command line: what bad input gets, what is left behind, and what good runs print and write."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from conftest import save_tiny, save_tokenizer, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from streamprune.calibration import embedded_text
from streamprune.cli import cli as root_command
from streamprune.cli import main
from streamprune.families import FAMILIES
from streamprune.methods import METHODS

COMMAND = [sys.executable, "-c", "from streamprune.cli import main; main()"]
SHORT = ("--seq-len", "16", "--samples", "2")
QUICK = {
    "random": (),
    "magnitude": (),
    "taylor": (),
    "smoothgrad": ("--set", "draws=2"),
    "moreau": ("--set", "steps=2"),
    "moreau-gs": ("--set", "steps=2"),
}
REMEDY = r"\b(download|export|give|use|pass|choose|lower|make room|leave|copy|convert|prune|write|name)\b"
Outcome = namedtuple("Outcome", "code out err")
Streamprune = Callable[..., Outcome]


@pytest.fixture
def streamprune(capsys: pytest.CaptureFixture[str]) -> Streamprune:
    """Runs the command in this process: exit code, stdout, stderr."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        return Outcome(stopped.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama that a test may damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A free name in a directory of its own."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "pruned"


def snapshot(directory: Path) -> dict[str, Any]:
    """Everything below `directory`: kinds of entries and contents of files."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else path.is_dir()
        for path in sorted(directory.rglob("*"))
    }


@pytest.fixture
def refused(streamprune: Streamprune, tmp_path: Path, output: Path) -> Callable[..., str]:
    """Runs a prune that must be refused, checks all that every refusal promises, and returns the message."""

    def run(
        model: object, *arguments: object, code: int, names: tuple[str, ...], remedy: str = REMEDY
    ) -> str:
        before = snapshot(tmp_path)
        result = streamprune("--model", model, "--output", output, "--quiet", *SHORT, *arguments)
        assert snapshot(tmp_path) == before, "something was written or removed"
        check_refusal(result, code, names, remedy)
        return result.err

    return run


LEFT: set[threading.Thread] = set()


def running_threads() -> list[str]:
    """The package's threads that run still and were not blamed on an earlier test."""
    left = {thread for thread in threading.enumerate() if thread.name.startswith("streamprune")} - LEFT
    LEFT.update(left)
    return [thread.name for thread in left]


def check_refusal(result: Outcome, code: int, names: tuple[str, ...], remedy: str = REMEDY) -> None:
    """One line on stderr that names the things and the remedy, the exit code, no thread left."""
    assert result.code == code, result
    assert result.out == ""
    assert result.err.endswith("\n")
    (line,) = result.err.splitlines()
    assert line.startswith("streamprune: ")
    for name in names:
        assert name in line
    assert re.search(remedy, line), f"no remedy in: {line}"
    assert not running_threads()


def check_usage_error(result: Outcome, *names: str) -> None:
    """click's own message for an option that cannot be parsed."""
    assert result.code == 2
    assert result.out == ""
    assert "Traceback" not in result.err
    assert result.err.startswith("Usage: streamprune")
    for name in names:
        assert name in result.err.splitlines()[-1]


def edit_tensors(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Load the single-file model, let `change` damage it, and save it in place."""
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def edit_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A tiny Llama in several shards with an index."""
    path = tmp_path / "sharded"
    tiny_model("llama", dtype=torch.float32, num_hidden_layers=8).save_pretrained(
        path, max_shard_size="100KB"
    )
    save_tokenizer(path)
    assert len(list(path.glob("model-*.safetensors"))) > 3
    return path


# What the checkpoint may get wrong.


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
def test_index_entry_outside_the_directory_is_refused_though_the_file_is_there(
    absolute, refused, sharded, tmp_path
):
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


@pytest.mark.parametrize(
    "content", [{}, {"weight_map": {}}, {"weight_map": ["a"]}], ids=["none", "empty", "list"]
)
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


@pytest.mark.parametrize(
    "name", ["model.layers.7.self_attn.o_proj.weight", "model.norm.weight", "lm_head.weight"]
)
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
def test_weights_that_are_not_finite_are_refused_by_layer_and_tensor(
    value, method, layer, measured, refused, model
):
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


@pytest.mark.parametrize("model_type", ["mamba", None])
def test_unknown_family_is_refused_and_the_known_ones_listed(model_type, refused, model):
    edit_json(model / "config.json", lambda config: config.update(model_type=model_type))
    refused(model, code=1, names=(str(model), str(model_type), *FAMILIES), remedy="known are")


def test_a_model_with_layers_of_different_widths_is_refused(streamprune, refused, model, tmp_path):
    ragged = tmp_path / "ragged"
    done = streamprune("--model", model, "--output", ragged, "--method", "random", "--no-evaluate", "--quiet")
    assert done.code == 0
    refused(ragged, code=1, names=(str(ragged), "different widths"), remedy="prune the dense model")


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


# What the text may get wrong.


@pytest.mark.parametrize("sampling", ["random", "first"])
def test_text_too_short_is_refused_with_both_counts(sampling, refused, model, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("x" * 31)
    refused(
        model, "--calibration", text, "--sampling", sampling, code=1, names=("31", "32", "16"), remedy="lower"
    )


def test_text_that_just_suffices_is_taken(streamprune, model, output, tmp_path):
    text = tmp_path / "enough.txt"
    text.write_text("x" * 32)
    options = ("--method", "taylor", "--calibration", text, "--no-evaluate", "--quiet", *SHORT)
    assert streamprune("--model", model, "--output", output, *options).code == 0


def test_evaluation_text_too_short_is_refused(refused, model, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("x" * 63)
    refused(model, "--evaluate", text, code=1, names=("63", "64"))


@pytest.mark.parametrize("name", ["gone.txt", "gone.jsonl", "gone.parquet", "gone"])
def test_missing_calibration_is_refused(name, refused, model, tmp_path):
    refused(model, "--calibration", tmp_path / name, code=1, names=(name, "does not exist"))


def test_calibration_that_is_a_directory_is_refused(refused, model, tmp_path):
    refused(model, "--calibration", tmp_path, code=1, names=(str(tmp_path), "directory"))


@pytest.mark.parametrize("name", ["latin.txt", "latin.jsonl"])
def test_text_that_is_not_utf8_is_refused(name, refused, model, tmp_path):
    (tmp_path / name).write_bytes(b'{"text": "caf\xe9"}\n')
    refused(model, "--calibration", tmp_path / name, code=1, names=(name,), remedy="UTF-8")


@pytest.mark.parametrize(
    "record", ['{"body": "words"}', '{"text": 7}', '["words"]'], ids=["no-field", "number", "list"]
)
def test_jsonl_without_the_field_is_refused_by_line(record, refused, model, tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "words"}\n' + record + "\n")
    refused(model, "--calibration", file, code=1, names=(f"{file}:2", "'text'"), remedy="--field")


def test_bad_json_line_is_refused_by_line(refused, model, tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "words"}\n\n{"text": "wor\n')
    refused(model, "--calibration", file, code=1, names=(f"{file}:3",), remedy="JSON")


def parquet(file: Path, **columns: list[Any]) -> Path:
    pyarrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    writer.write_table(pyarrow.table(columns), file)
    return file


def test_parquet_without_the_column_is_refused_with_its_columns(refused, model, tmp_path):
    file = parquet(tmp_path / "data.parquet", body=["words"], title=["t"])
    refused(model, "--calibration", file, code=1, names=(str(file), "body", "title"), remedy="--field")


def test_parquet_column_that_is_no_text_is_refused(refused, model, tmp_path):
    file = parquet(tmp_path / "data.parquet", text=[1, 2, 3])
    refused(model, "--calibration", file, code=1, names=(str(file), "text"))


def test_damaged_parquet_is_refused(refused, model, tmp_path):
    file = parquet(tmp_path / "data.parquet", text=["words"])
    os.truncate(file, file.stat().st_size - 6)
    refused(model, "--calibration", file, code=1, names=(str(file),), remedy="not a readable parquet file")


def test_sequences_longer_than_the_positions_of_the_model_are_refused(refused, model):
    refused(model, "--seq-len", 65, code=2, names=("--seq-len 65",), remedy="at most 64")


# What the options may get wrong.


@pytest.mark.parametrize("option", ["--ratio", "--attention-ratio", "--mlp-ratio"])
@pytest.mark.parametrize("value", ["-0.1", "1", "1.5", "nan", "inf"])
def test_ratio_outside_0_to_1_is_refused(option, value, refused, model):
    refused(model, option, value, code=2, names=(option, str(float(value))), remedy="at least 0 and below 1")


@pytest.mark.parametrize(
    "options", [("--ratio", "0.99"), ("--mlp-ratio", "0.999"), ("--ratio", "0.9", "--stock")]
)
def test_ratio_that_leaves_a_layer_empty_is_refused(options, refused, model):
    refused(model, *options, code=2, names=("37", "empty"), remedy="lower|less")


@pytest.mark.parametrize("layers", ["0:9", "4:9", "8:9", "6:4", "4:4", "-1:3"])
def test_layers_outside_the_model_are_refused(layers, refused, model):
    refused(model, "--layers", layers, code=2, names=(f"--layers {layers}",), remedy="within the model's 0:8")


@pytest.mark.parametrize("layers", ["4", "a:b", "4:6:8", ":", "4:", "", "4-6", "1.5:3"])
def test_malformed_layers_are_a_usage_error(layers, streamprune, model, output):
    result = streamprune("--model", model, "--output", output, "--layers", layers)
    check_usage_error(result, "--layers", "A:B")
    assert not output.exists()


def test_default_layers_of_a_shallow_model_are_refused(refused, tmp_path):
    save_tiny(tmp_path / "shallow", "llama", dtype=torch.float32)
    refused(tmp_path / "shallow", code=2, names=("--layers 4:2", "4 layers"))


def test_stock_with_a_part_of_the_layers_is_refused(refused, model):
    refused(model, "--stock", "--layers", "4:6", code=2, names=("--stock",), remedy="use --layers 0:8")


def test_emit_mistral_of_another_family_is_refused(refused, tmp_path):
    save_tiny(tmp_path / "qwen", "qwen2", dtype=torch.float32)
    message = refused(
        tmp_path / "qwen", "--stock", "--emit", "mistral", code=2, names=("--emit mistral",), remedy="llama"
    )
    assert "qwen2" in message


def test_emit_mistral_of_a_llama_with_biases_is_refused(refused, tmp_path):
    save_tiny(tmp_path / "biased", "llama", dtype=torch.float32, attention_bias=True)
    refused(
        tmp_path / "biased",
        "--stock",
        "--emit",
        "mistral",
        code=2,
        names=("attention_bias",),
        remedy="bias-free",
    )


def test_emit_without_stock_is_refused(refused, model):
    refused(model, "--emit", "mistral", code=2, names=("--emit mistral",), remedy="pass --stock")


def test_unknown_method_is_refused_and_the_known_ones_listed(refused, model):
    refused(model, "--method", "wanda", code=2, names=("'wanda'", *METHODS), remedy="known are")


@pytest.mark.parametrize(
    ("assignment", "names"),
    [
        ("rho", ("--set rho", "NAME=VALUE")),
        ("", ("--set", "NAME=VALUE")),
        ("width=3", ("'width'", "it has", "rho")),
        ("=3", ("''", "it has")),
        ("rho=wide", ("rho=wide", "not a number")),
        ("rho=", ("rho=", "not a number")),
        ("steps=2.5", ("steps=2.5", "not an integer")),
        ("rho=0", ("rho=0", "above 0")),
        ("rho=nan", ("rho=nan", "above 0")),
        ("steps=0", ("steps=0", "at least 1")),
        ("eta-quantile=1.5", ("eta_quantile=1.5", "at most 1")),
    ],
)
def test_bad_setting_is_refused(assignment, names, refused, model):
    refused(model, "--set", assignment, code=2, names=names, remedy=".")


def test_bad_choice_of_a_setting_is_refused(refused, model):
    refused(
        model, "--method", "taylor", "--set", "order=third", code=2, names=("order=third", "first", "mix")
    )


def test_step_sizes_that_diverge_are_refused(refused, model):
    options = ("--method", "moreau", "--set", "gamma=1e38", "--set", "steps=3", "--no-evaluate")
    refused(model, *options, code=1, names=("NaN or infinite",), remedy="gamma")


def test_weights_beyond_the_compute_dtype_are_not_called_damaged(refused, model):
    edit_tensors(model, lambda tensors: tensors["model.layers.5.mlp.up_proj.weight"][0, :1].fill_(1e6))
    names = ("layer 5", "mlp.up_proj.weight", "float16")
    refused(model, "--dtype", "float16", "--method", "taylor", code=1, names=names, remedy="--dtype")


@pytest.mark.parametrize("option", ["--samples", "--round-to", "--micro-batch", "--max-shard-size"])
@pytest.mark.parametrize("value", ["0", "-3"])
def test_counts_below_one_are_refused(option, value, refused, model):
    refused(model, option, value, code=2, names=(f"{option} {value}",), remedy="at least 1")


def test_sequences_of_one_token_are_refused(refused, model):
    refused(model, "--seq-len", "1", code=2, names=("--seq-len 1",), remedy="at least 2")


@pytest.mark.parametrize(
    "options",
    [
        ("--max-shard-size", "big"),
        ("--max-shard-size", "5GiB"),
        ("--max-shard-size", "nanGB"),
        ("--max-shard-size", "infGB"),
        ("--dtype", "int8"),
        ("--samples", "few"),
        ("--sampling", "last"),
        ("--granularity", "weights"),
        ("--seed", "x"),
        ("--ratio", "x"),
    ],
    ids=" ".join,
)
def test_malformed_option_is_a_usage_error(options, streamprune, model, output):
    check_usage_error(streamprune("--model", model, "--output", output, *options), options[0])
    assert not output.exists()


@pytest.mark.parametrize("seed", ["-1", str(2**64), str(2**80)])
def test_any_integer_is_a_seed_or_refused(seed, streamprune, model, output):
    options = ("--method", "taylor", "--seed", seed, "--no-evaluate", "--quiet", *SHORT)
    result = streamprune("--model", model, "--output", output, *options)
    if result.code != 0:
        check_refusal(result, 2, ("--seed",), ".")


@pytest.mark.parametrize("device", ["warp", "", "cuda:x", "mps", "meta", "cuda:99"])
def test_unknown_device_is_refused(device, refused, model):
    refused(model, "--device", device, code=2, names=("--device", device), remedy="use cpu")


@pytest.mark.parametrize("missing", ["--model", "--output"])
def test_model_and_output_are_both_needed(missing, streamprune, model, output):
    given = {"--model": model, "--output": output}
    del given[missing]
    (option, value), *_ = given.items()
    check_refusal(streamprune(option, value), 2, (missing,), "see streamprune --help")


def test_evaluate_and_no_evaluate_exclude_each_other(refused, model, tmp_path):
    refused(
        model,
        "--evaluate",
        tmp_path / "x.txt",
        "--no-evaluate",
        code=2,
        names=("--evaluate",),
        remedy="exclude",
    )


def test_unknown_command_and_option_are_usage_errors(streamprune):
    check_usage_error(streamprune("prune"), "prune")
    check_usage_error(streamprune("--sparsity", "3"), "--sparsity")
    check_usage_error(streamprune("eval"), "--model")


# What may be wrong with the output.


@pytest.fixture
def earlier(streamprune: Streamprune, model: Path, output: Path) -> Path:
    """An output that an earlier run left, with a file that no run writes."""
    done = streamprune("--model", model, "--output", output, "--method", "random", "--no-evaluate", "--quiet")
    assert done.code == 0
    (output / "notes.txt").write_text("mine")
    return output


def test_output_that_exists_is_refused(refused, model, earlier):
    refused(model, code=1, names=(str(earlier), "exists"), remedy="--overwrite")


def test_output_that_is_an_empty_directory_is_refused(refused, model, output):
    output.mkdir()
    refused(model, code=1, names=(str(output), "exists"), remedy="--overwrite")


def test_overwrite_replaces_the_whole_output(streamprune, model, earlier):
    options = ("--method", "magnitude", "--no-evaluate", "--quiet", "--overwrite")
    assert streamprune("--model", model, "--output", earlier, *options).code == 0
    assert json.loads((earlier / "streamprune.json").read_text())["options"]["method"] == "magnitude"
    assert not (earlier / "notes.txt").exists()
    assert [path.name for path in earlier.parent.iterdir()] == [earlier.name]


def test_overwrite_of_nothing_is_an_ordinary_run(streamprune, model, output):
    options = ("--method", "random", "--no-evaluate", "--quiet", "--overwrite")
    assert streamprune("--model", model, "--output", output, *options).code == 0
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_a_failed_overwrite_keeps_the_earlier_output(refused, model, earlier):
    edit_tensors(model, lambda tensors: tensors["model.layers.7.mlp.up_proj.weight"].fill_(float("nan")))
    refused(model, "--overwrite", "--method", "random", "--no-evaluate", code=1, names=("layer 7",))


def test_overwrite_does_not_remove_what_is_no_model(refused, model, output):
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    refused(model, "--overwrite", code=1, names=(str(output),), remedy="will not remove it")


@pytest.mark.parametrize("options", [(), ("--overwrite",)], ids=["plain", "overwrite"])
def test_output_that_is_a_file_is_refused(options, refused, model, output):
    output.write_text("a file")
    refused(model, *options, code=1, names=(str(output),), remedy="choose another --output")


def test_output_below_a_file_is_refused(streamprune, model, tmp_path):
    file = tmp_path / "file"
    file.write_text("a file")
    result = streamprune("--model", model, "--output", file / "pruned", "--quiet", *SHORT)
    check_refusal(result, 1, (str(file),), "choose another --output")


@pytest.mark.parametrize("linked", [False, True], ids=["itself", "a-link-to-it"])
def test_output_that_is_the_model_itself_is_refused(linked, streamprune, model, tmp_path):
    target = tmp_path / "link" if linked else model
    if linked:
        target.symlink_to(model)
    before = snapshot(tmp_path)
    result = streamprune("--model", model, "--output", target, "--overwrite", "--quiet", *SHORT)
    check_refusal(result, 1, (str(target), "the model itself"))
    assert snapshot(tmp_path) == before


def test_overwriting_a_directory_that_holds_the_model_is_refused(streamprune, model, tmp_path):
    outer = Path(shutil.copytree(model, tmp_path / "outer"))
    inner = Path(shutil.copytree(model, outer / "inner"))
    before = snapshot(tmp_path)
    options = ("--method", "random", "--no-evaluate", "--overwrite", "--quiet")
    result = streamprune("--model", inner, "--output", outer, *options)
    assert snapshot(tmp_path) == before, "the source model was removed with the output it lay in"
    check_refusal(result, 1, (str(outer),), "choose another --output")


def full(*arguments: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_disk_that_is_full_when_room_is_taken_leaves_nothing(refused, model, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", full)
    refused(model, "--method", "random", code=1, names=("No space left on device",), remedy="make room")


@pytest.mark.parametrize("writes", [0, 1, 20])
def test_disk_that_is_full_in_the_middle_leaves_nothing(writes, refused, model, monkeypatch):
    original, done = os.pwrite, []

    def pwrite(*arguments):
        if len(done) == writes:
            full()
        done.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(os, "pwrite", pwrite)
    refused(model, "--method", "random", code=1, names=("No space left on device",), remedy="make room")
    assert len(done) == writes


def test_disk_that_is_full_when_the_tokenizer_is_copied_leaves_nothing(refused, model, monkeypatch):
    monkeypatch.setattr(shutil, "copyfile", full)
    refused(model, "--method", "random", code=1, names=("No space left on device",), remedy="make room")


def test_a_real_limit_on_file_sizes_leaves_nothing(refused, model):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        refused(model, "--method", "random", code=1, names=("File too large",), remedy="make room")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_overwrite_on_a_full_disk_keeps_the_earlier_output(refused, model, earlier, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", full)
    refused(model, "--method", "random", "--overwrite", code=1, names=("No space left",), remedy="make room")


def small_disk(path: object) -> object:
    return namedtuple("usage", "total used free")(10**6, 10**6 - 1000, 1000)


def test_disk_that_is_too_small_is_refused_with_both_sizes(refused, model, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", small_disk)
    refused(model, "--method", "random", code=1, names=("1,000 bytes free", "528,192"), remedy="make room")


def test_disk_that_is_too_small_is_refused_before_the_work(refused, model, monkeypatch):
    def no_sweep(*arguments, **options):
        raise AssertionError("layers were read before the disk was found too small")

    monkeypatch.setattr(shutil, "disk_usage", small_disk)
    monkeypatch.setattr("streamprune.paging.Pager.pages", no_sweep)
    refused(model, code=1, names=("1,000 bytes free", "528,192"), remedy="make room")


def test_a_refused_run_leaves_no_parent_directories(streamprune, model, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", small_disk)
    before = snapshot(tmp_path)
    result = streamprune(
        "--model", model, "--output", tmp_path / "new" / "er" / "pruned", "--method", "random", "--quiet"
    )
    check_refusal(result, 1, ("bytes free",), "make room")
    assert snapshot(tmp_path) == before


def test_a_failed_run_closes_what_it_opened(refused, model, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", full)
    before = len(os.listdir("/proc/self/fd"))
    refused(model, "--method", "random", "--no-evaluate", code=1, names=("No space left on device",))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_new_output_is_made_with_its_parents(streamprune, model, tmp_path):
    output = tmp_path / "new" / "er" / "pruned"
    done = streamprune("--model", model, "--output", output, "--method", "random", "--no-evaluate", "--quiet")
    assert done.code == 0
    assert (output / "model.safetensors").is_file()


# Interruptions.


def check_interrupted(result: Outcome) -> None:
    """A clean line; the empty one before it ends the terminal's "^C"."""
    assert result.code == 1
    assert result.out == ""
    assert result.err.strip() == "streamprune: interrupted; nothing was written"
    assert not running_threads()


@pytest.mark.parametrize("writes", [0, 3, 70])
def test_ctrl_c_while_writing_leaves_nothing(writes, streamprune, model, output, tmp_path, monkeypatch):
    from streamprune.writer import ShardedWriter

    original, done, seen = ShardedWriter.write, [], []

    def write(self, name, tensor):
        if len(done) == writes:
            seen.extend(output.parent.iterdir())
            signal.raise_signal(signal.SIGINT)
        done.append(name)
        original(self, name, tensor)

    monkeypatch.setattr(ShardedWriter, "write", write)
    before = snapshot(tmp_path)
    check_interrupted(streamprune("--model", model, "--output", output, "--method", "random", "--quiet"))
    assert len(done) == writes
    assert len(seen) == 1, "there was a temporary directory to remove"
    assert snapshot(tmp_path) == before


def test_ctrl_c_while_the_reader_is_waited_for_leaves_nothing(
    streamprune, model, output, tmp_path, monkeypatch
):
    original, reads = os.preadv, []

    def preadv(descriptor, buffers, offset):
        if threading.current_thread() is not threading.main_thread():
            reads.append(offset)
            if len(reads) == 20:  # of the third layer, so that the main thread has taken the first
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.2)
        return original(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    before = snapshot(tmp_path)
    check_interrupted(streamprune("--model", model, "--output", output, "--quiet", *SHORT))
    assert len(reads) >= 20
    assert snapshot(tmp_path) == before


def test_ctrl_c_while_the_filling_thread_starts_leaves_no_thread(streamprune, model, output, monkeypatch):
    """A thread that is left waits for ever, and the process with it."""
    original = threading.Thread.start

    def start(self):
        if self.name != "streamprune-pager":
            return original(self)
        self.daemon = True  # so that a failure of this test cannot keep pytest from ending
        original(self)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(threading.Thread, "start", start)
    check_interrupted(streamprune("--model", model, "--output", output, "--quiet", *SHORT))


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def test_ctrl_c_in_the_middle_of_scoring_ends_a_real_process_cleanly(model, output, tmp_path):
    before = snapshot(tmp_path)
    options = ["--method", "moreau", "--set", "steps=1000000", *SHORT]
    process = subprocess.Popen(
        [*COMMAND, "--model", str(model), "--output", str(output), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:  # the stage before scoring says when it is done
            lines.append(line)
            if line.startswith("perplexity before:"):
                break
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        start = time.perf_counter()
        out, rest = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    assert lines[-1].startswith("perplexity before:"), "".join(lines)
    assert time.perf_counter() - start < 5
    assert process.returncode == 1
    assert out == ""
    assert rest.strip() == "streamprune: interrupted; nothing was written"
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"
        ),
    ],
    ids=["python", "cuda", "cpu"],
)
def test_memory_that_runs_out_is_one_line(error, refused, model, monkeypatch):
    def exhausted(*arguments, **options):
        raise error

    monkeypatch.setattr("streamprune.sweep.Sweeper.forward", exhausted)
    refused(model, code=1, names=("memory",), remedy="lower --micro-batch")


@pytest.mark.parametrize("position", ["first", "last"])
def test_debug_shows_the_traceback_and_still_ends_with_the_line(position, streamprune, model, output):
    (model / "config.json").unlink()
    arguments = ["--model", model, "--output", output]
    arguments.insert(0 if position == "first" else 4, "--debug")
    result = streamprune(*arguments)
    assert result.code == 1
    assert "Traceback (most recent call last)" in result.err
    assert "CheckpointError" in result.err
    assert result.err.splitlines()[-1].startswith("streamprune: ")


# Help and the small commands.


def commands() -> list[tuple[str, click.Command]]:
    return [("streamprune", root_command), *root_command.commands.items()]


@pytest.mark.parametrize(("name", "command"), commands(), ids=[name for name, _ in commands()])
def test_every_command_and_option_has_help(name, command, streamprune):
    assert command.help
    undocumented = [
        p.name for p in command.params if isinstance(p, click.Option) and not p.help and not p.hidden
    ]
    assert not undocumented
    result = streamprune(*([] if name == "streamprune" else [name]), "--help")
    assert result.code == 0
    assert result.err == ""
    for parameter in command.params:
        for option in parameter.opts if isinstance(parameter, click.Option) else ():
            assert option in result.out


def test_help_of_the_group_lists_every_command(streamprune):
    for result in (streamprune("--help"), streamprune("-h"), streamprune()):
        assert result.code == 0
        assert {"eval", "verify", "methods", "demo"} <= set(re.findall(r"^  (\w+)", result.out, re.MULTILINE))


def test_version_is_that_of_the_package(streamprune):
    import importlib.metadata

    result = streamprune("--version")
    assert result.code == 0
    assert importlib.metadata.version("streamprune") in result.out


def test_methods_lists_each_with_its_settings_and_paper(streamprune):
    result = streamprune("methods")
    assert result.code == 0
    for name, method in METHODS.items():
        (row,) = (line for line in result.out.splitlines() if line.startswith(f"{name} "))
        assert method.paper in row
        assert method.needs in row
        assert all(f"{setting}=" in row for setting in method.settings)


# Good runs.


def stored(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory's safetensors files."""
    tensors: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def kept_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "streamprune.json").read_text())["kept"]


def cells(out: str, row: str) -> list[str]:
    """The numbers of a row of a printed table."""
    (line,) = (line for line in out.splitlines() if line.startswith(f"{row} "))
    return [cell.replace(",", "") for cell in line.split()[1:]]


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
    assert [f"{facts['perplexity'][when]:.2f}" for when in ("before", "after")] == cells(
        result.out, "perplexity"
    )
    loaded = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=False)
    assert sum(parameter.numel() for parameter in loaded.parameters()) == int(count[1])
    # 19 of 37 channels are nearest to 20 % of attention and MLP together; a fifth of three KV groups is none.
    kept = {layer: [len(kinds["kv_group"]), len(kinds["channel"])] for layer, kinds in facts["kept"].items()}
    assert kept == {str(layer): [3, 18] if layer in (4, 5) else [3, 37] for layer in range(8)}


def test_kept_tensors_are_the_source_s_own_bytes_in_its_order(streamprune, tiny_llama, output):
    done = streamprune(
        "--model", tiny_llama, "--output", output, "--quiet", "--method", "magnitude", "--no-evaluate"
    )
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
def test_each_method_prunes_in_both_layouts_and_repeats_to_the_byte(
    method, streamprune, tiny_llama, tmp_path
):
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


@pytest.mark.parametrize(("multiple", "kept"), [(8, 16), (5, 20), (64, 37)])
def test_round_to_keeps_multiples_or_all(multiple, kept, streamprune, tiny_llama, output):
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


def printed_perplexity(result: Outcome) -> float:
    assert result.code == 0, result.err
    match = re.match(r"perplexity ([\d.]+) \(loss ([\d.]+) nats, (\d+) x (\d+) tokens\)", result.out)
    assert match
    return float(match[1])


def test_eval_of_dense_and_pruned_gives_the_numbers_of_the_run(streamprune, tiny_llama, output):
    options = ("--method", "taylor", *SHORT, "--quiet")
    assert streamprune("--model", tiny_llama, "--output", output, *options).code == 0
    facts = json.loads((output / "streamprune.json").read_text())["perplexity"]
    segments, length = facts["segments"]
    for model, when in ((tiny_llama, "before"), (output, "after")):
        result = streamprune("eval", "--model", model, "--seq-len", length, "--samples", segments, "--quiet")
        assert printed_perplexity(result) == pytest.approx(facts[when], rel=1e-5)
        assert result.err == ""


def test_eval_equals_transformers_on_a_given_text(streamprune, tiny_llama, tmp_path):
    text = "Rain fell on the roof of the long house, and nobody went out before noon. " * 4
    (tmp_path / "text.txt").write_text(text)
    ids = torch.tensor(tokenizer_ids(tiny_llama, text)[: 9 * 32]).view(9, 32)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        logits = model(ids).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).exp().item()
    result = streamprune(
        "eval", "--model", tiny_llama, "--text", tmp_path / "text.txt", "--seq-len", 32, "--quiet"
    )
    assert printed_perplexity(result) == pytest.approx(expected, rel=1e-5)
    assert "9 x 32" in result.out


def tokenizer_ids(path: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)(text, verbose=False)["input_ids"]


@pytest.mark.parametrize(
    ("options", "code", "names"),
    [
        (("--text", "/nowhere/x.txt"), 1, ("/nowhere/x.txt", "does not exist")),
        (("--samples", "100000"), 1, ("100000 segments",)),
        (("--samples", "0"), 2, ("--samples",)),
        (("--seq-len", "1"), 2, ("--seq-len",)),
        (("--micro-batch", "0"), 2, ("--micro-batch",)),
        (("--device", "warp"), 2, ("--device warp",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_eval_refuses_bad_input_in_one_line(options, code, names, streamprune, tiny_llama):
    result = streamprune("eval", "--model", tiny_llama, "--quiet", *options)
    check_refusal(result, code, names, rf"{REMEDY}|at least")


def test_eval_of_longer_segments_than_the_model_has_positions_is_refused(streamprune, tmp_path):
    save_tiny(tmp_path / "gpt2", "gpt2", dtype=torch.float32)
    result = streamprune("eval", "--model", tmp_path / "gpt2", "--seq-len", "65", "--quiet")
    check_refusal(result, 2, ("--seq-len 65", "64"), ".")


def test_verify_of_what_streamprune_did_not_write_is_refused(streamprune, tiny_llama):
    check_refusal(streamprune("verify", tiny_llama), 1, (str(tiny_llama), "streamprune.json"))


def test_verify_without_its_source_is_refused(streamprune, model, earlier):
    shutil.rmtree(model)
    check_refusal(streamprune("verify", earlier), 1, (str(model),), "--source")


# What a run says while it works.


def test_quiet_prints_no_progress(streamprune, tiny_llama, output):
    result = streamprune("--model", tiny_llama, "--output", output, "--method", "taylor", *SHORT, "--quiet")
    assert result.code == 0
    assert result.err == ""


STAGES = ("perplexity before:", "scoring taylor:", "writing:", "perplexity after:")


def check_plain_progress(err: str) -> None:
    """A line per stage with the bytes read and the peak memory, and no control characters."""
    assert "\r" not in err
    assert "\x1b" not in err
    lines = err.splitlines()
    stages = [line for line in lines if line.startswith(STAGES)]
    assert [stage.split(":")[0] + ":" for stage in stages] == list(STAGES)
    assert all("read" in stage and "peak memory" in stage for stage in stages)
    assert any("137,520 parameters" in line for line in lines)
    assert any("layers 4:6 lose 19 of 37 channels" in line for line in lines)
    assert any("--stock" in line for line in lines), "says what loading ragged layers takes"


def test_progress_goes_to_the_present_stderr_as_plain_lines(streamprune, tiny_llama, output):
    result = streamprune("--model", tiny_llama, "--output", output, "--method", "taylor", *SHORT)
    assert result.code == 0
    check_plain_progress(result.err)


def test_a_real_process_without_a_terminal_prints_plain_lines(tiny_llama, output):
    options = ["--method", "taylor", *SHORT]
    done = subprocess.run(
        [*COMMAND, "--model", str(tiny_llama), "--output", str(output), *options],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    check_plain_progress(done.stderr)
    assert cells(done.stdout, "parameters") == ["137520", "132048"]
    assert f"wrote {output} (ragged)" in done.stdout
