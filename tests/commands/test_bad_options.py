"""What the options may get wrong is refused in one line, and nothing is written."""

from __future__ import annotations

import pytest
import torch
from cli_runner import SHORT, Outcome, check_refusal, edit_tensors
from tiny_models import save_tiny

from streamprune.methods.table import METHODS


def check_usage_error(result: Outcome, *names: str) -> None:
    """click's own message for an option that cannot be parsed."""
    assert result.code == 2
    assert result.out == ""
    assert "Traceback" not in result.err
    assert result.err.startswith("Usage: streamprune")
    for name in names:
        assert name in result.err.splitlines()[-1]


@pytest.mark.parametrize("option", ["--ratio", "--attention-ratio", "--mlp-ratio"])
@pytest.mark.parametrize("value", ["-0.1", "1", "1.5", "nan", "inf"])
def test_ratio_outside_0_to_1_is_refused(option, value, refused, model):
    refused(model, option, value, code=2, names=(option, str(float(value))), remedy="at least 0 and below 1")


@pytest.mark.parametrize("options", [("--ratio", "0.99"), ("--mlp-ratio", "0.999"), ("--ratio", "0.9", "--stock")])
def test_ratio_that_leaves_a_layer_empty_is_refused(options, refused, model):
    option = next(each for each in options if each.endswith("ratio"))
    refused(model, *options, code=2, names=("37", "empty"), remedy=f"lower {option}|less")


def test_a_ratio_beside_both_of_its_parts_is_refused(refused, model):
    options = ("--ratio", "0.5", "--attention-ratio", "0", "--mlp-ratio", "0.1")
    refused(model, *options, code=2, names=("--ratio", "--attention-ratio and --mlp-ratio"), remedy="leave it out")


@pytest.mark.parametrize("name", ["", "inside/deeper"])
def test_what_goes_to_scratch_inside_the_output_is_refused(name, refused, model, output):
    names = (f"{output} is or holds",)
    refused(model, "--scratch", output / name, *SHORT, code=1, names=names, remedy="choose another --output")


def test_names_that_no_directory_beside_it_could_have_are_refused(streamprune, model, tmp_path):
    check_refusal(streamprune("--model", model, "--output", "/", "--resume"), 1, ("/ exists",), "choose another")
    check_refusal(streamprune("--model", model, "--output", tmp_path / ("n" * 240)), 1, ("230",), "choose another")


def test_a_repair_of_fewer_tokens_than_begin_a_sequence_names_its_own_option(refused, model):
    options = ("--compensate", "--compensate-tokens", "1", "--bos", "always", *SHORT)
    refused(model, *options, code=2, names=("--compensate-tokens 1",), remedy="raise it")


@pytest.mark.parametrize("layers", ["0:9", "4:9", "8:9", "6:4", "-1:3"])
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
    refused(model, "--method", "owl", code=2, names=("'owl'", *METHODS), remedy="known are")


@pytest.mark.parametrize(
    ("assignment", "names"),
    [
        ("rho", ("--set rho", "NAME=VALUE")),
        ("", ("--set", "NAME=VALUE")),
        ("width=3", ("'width'", "it has", "rho")),
        ("=3", ("''", "it has")),
        ("rho=wide", ("rho=wide", "not a finite number")),
        ("rho=", ("rho=", "not a finite number")),
        ("steps=2.5", ("steps=2.5", "not an integer")),
        ("rho=0", ("rho=0", "above 0")),
        ("rho=nan", ("rho=nan", "not a finite number")),
        ("steps=0", ("steps=0", "at least 1")),
        ("eta-quantile=1.5", ("eta_quantile=1.5", "at most 1")),
    ],
)
def test_bad_setting_is_refused(assignment, names, refused, model):
    refused(model, "--set", assignment, code=2, names=names, remedy=".")


def test_bad_choice_of_a_setting_is_refused(refused, model):
    refused(model, "--method", "taylor", "--set", "order=third", code=2, names=("order=third", "first", "mix"))


def test_step_sizes_that_diverge_are_refused(refused, model):
    options = ("--method", "moreau", "--set", "gamma=1e38", "--set", "steps=3", "--no-evaluate")
    refused(model, *options, code=1, names=("NaN or infinite",), remedy="gamma")


def test_weights_beyond_the_compute_dtype_are_not_called_damaged(refused, model):
    edit_tensors(model, lambda tensors: tensors["model.layers.5.mlp.up_proj.weight"][0, :1].fill_(1e6))
    names = ("layer 5", "mlp.up_proj.weight", "float16")
    refused(model, "--dtype", "float16", "--method", "taylor", code=2, names=names, remedy="--dtype")


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
        ("--max-shard-size", "5GX"),
        ("--max-shard-size", "nanGB"),
        ("--max-shard-size", "infGB"),
        ("--dtype", "int8"),
        ("--samples", "few"),
        ("--sampling", "last"),
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
