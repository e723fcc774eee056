"""Options of what is removed, and how, that do not fit each other: one line, exit code 2, nothing written."""

import pytest
import torch
from cli_runner import SHORT
from tiny_models import save_tiny

from streamprune import PruneConfig
from streamprune.errors import UsageError


@pytest.mark.parametrize(
    "granularity", ["5:4", "0:4", "4:4", "-1:4", "2:0", "2:", ":4", "2:4:8", "2.5:4", "neurons", "", "Units"]
)
def test_a_granularity_that_is_none_is_refused(granularity, refused, model):
    names = (f"--granularity {granularity}", "units, layers, weights", "2:4")
    refused(model, "--granularity", granularity, "--method", "magnitude", code=2, names=names, remedy="choose")


# Where a value is its default it is not refused; each of these differs.
UNFIT = {
    "--ratio": ("2:4", ("0.3",), "--granularity 2:4, which sets it"),
    "--compensate": ("weights", (), "only with units and layers"),
    "--contiguous": ("units", (), "only with layers"),
    "--contiguous ": ("weights", (), "only with layers"),
    "--stock": ("weights", (), "only with units and layers"),
    "--attention-ratio": ("layers", ("0.3",), "only with units"),
    "--mlp-ratio": ("weights", ("0.3",), "only with units"),
    "--allocation": ("layers", ("global",), "only with units"),
    "--allocation ": ("2:4", ("uniform",), "only with units"),
    "--normalize": ("layers", ("raw",), "only with units"),
    "--min-keep": ("weights", ("0.3",), "only with units"),
    "--round-to": ("layers", ("8",), "only with units"),
}


@pytest.mark.parametrize("option", UNFIT)
def test_an_option_of_another_granularity_is_refused(option, refused, model):
    granularity, value, message = UNFIT[option]
    flag = option.strip()
    options = ("--granularity", granularity, "--method", "magnitude", flag, *value)
    refused(model, *options, code=2, names=(flag, f"--granularity {granularity}", message), remedy="leave it out")


def test_emit_needs_units(refused, model):
    options = ("--granularity", "layers", "--method", "magnitude", "--stock", "--emit", "mistral")
    refused(model, *options, code=2, names=("--emit", "--granularity layers"), remedy="leave it out")


@pytest.mark.parametrize(
    ("method", "granularity", "able"),
    [
        ("wanda-sp", "weights", "wanda"),
        ("wanda-sp", "layers", "magnitude"),
        ("flap", "2:4", "wanda"),
        ("flap", "layers", "block-influence"),
        ("layer-ppl", "units", "moreau-gs"),
        ("block-influence", "weights", "sparsegpt"),
        ("sparsegpt", "units", "flap"),
        ("sparsegpt", "layers", "layer-ppl"),
    ],
)
def test_a_method_without_scores_for_it_is_refused_and_those_with_some_are_named(
    method, granularity, able, refused, model
):
    options = ("--method", method, "--granularity", granularity)
    refused(model, *options, code=2, names=(f"{method} has no scores for", f"{able}"), remedy="use one of")


@pytest.mark.parametrize("granularity", ["weights", "4:8"])
def test_scores_of_whole_lines_have_none_for_weights(granularity, refused, model):
    options = ("--method", "taylor", "--set", "order=vectorize", "--granularity", granularity)
    refused(model, *options, code=2, names=("order=vectorize",), remedy="use first")


@pytest.mark.parametrize("granularity", ["2:4", "4:8", "3:7"])
def test_rows_that_m_does_not_divide_are_refused(granularity, refused, model):
    # The tiny Llama's down_proj has rows of 37 weights, its o_proj of 60; 7 divides neither, nor 48.
    names = (f"--granularity {granularity}", "layer 0", "_proj.weight", f"{granularity[-1]} does not divide")
    refused(model, "--granularity", granularity, "--method", "magnitude", code=2, names=names, remedy="use")


@pytest.mark.parametrize("granularity", ["units", "layers", "weights", "4:8", "1:3"])
def test_compress_stores_nothing_but_2_of_4(granularity, tmp_path):
    with pytest.raises(UsageError, match=r"--compress .*leave it out"):
        PruneConfig(model="x", output=tmp_path / "out", granularity=granularity, compress=True)
    PruneConfig(model="x", output=tmp_path / "out", granularity="2:4", compress=True)


@pytest.mark.parametrize("method,asked", [("taylor", ("--allocation", "global")), ("flap", ())])
def test_global_allocation_gives_every_layer_its_own_widths(method, asked, refused, model):
    refused(model, "--method", method, *asked, "--stock", code=2, names=("--stock",), remedy="leave")


def test_the_ratio_that_min_keep_leaves_room_for_is_accepted(refused, streamprune, model, output):
    arguments = ("--allocation", "global", "--min-keep", "0.77", "--method", "random")
    said = refused(model, *arguments, "--ratio", "0.9", code=2, names=("--min-keep 0.77",), remedy="lower one of them")
    most = said.split("leaves room for, ")[1].split(";")[0]
    assert streamprune("--model", model, "--output", output, *arguments, *SHORT, "--ratio", most).code == 0


def test_global_allocation_is_refused_where_all_layers_have_one_width(refused, tmp_path):
    save_tiny(tmp_path / "in", "gpt2", dtype=torch.float32, n_layer=8)
    names = ("gpt2", "one width")
    options = ("--method", "taylor", "--allocation", "global")
    refused(tmp_path / "in", *options, code=2, names=names, remedy="--stock")


@pytest.mark.parametrize(
    ("option", "value", "remedy"),
    [
        ("--normalize", "foo", "choose zscore or raw"),
        ("--allocation", "foo", "choose uniform or global"),
        ("--compensate-target", "foo", "choose own or stream"),
        ("--min-keep", "1", "at least 0 and below 1"),
        ("--min-keep", "-0.1", "at least 0 and below 1"),
        ("--min-keep", "nan", "at least 0 and below 1"),
        ("--compensate-ridge", "-0.1", "at least 0 and finite"),
        ("--compensate-ridge", "inf", "at least 0 and finite"),
        ("--compensate-ridge", "nan", "at least 0 and finite"),
        ("--compensate-tokens", "0", "at least 1"),
        ("--compensate-tokens", "-5", "at least 1"),
    ],
)
def test_a_value_that_is_none_of_the_options_is_refused(option, value, remedy, refused, model):
    given = value if not value.lstrip("-").replace(".", "").isdigit() or "tokens" in option else str(float(value))
    options = ("--method", "taylor", "--compensate", option, value)
    refused(model, *options, code=2, names=(option, given), remedy=remedy)


def test_one_token_is_too_few_for_a_repair(refused, model):
    options = ("--method", "random", "--compensate", "--compensate-tokens", "1", "--compensate-ridge", "0")
    refused(model, *options, code=1, names=("singular",), remedy="raise --compensate")


@pytest.mark.parametrize("options", [("--no-bias",), ("--no-bias", "--granularity", "2:4")], ids=" ".join)
def test_no_bias_is_for_methods_that_add_some(options, refused, model):
    refused(model, "--method", "magnitude", *options, code=2, names=("magnitude", "bias"), remedy=".")


@pytest.mark.parametrize("ratio", ["0.01", "0.2"])
def test_a_share_of_the_layers_that_is_none_is_refused(ratio, refused, model):
    options = ("--granularity", "layers", "--method", "magnitude", "--ratio", ratio)  # of layers 4 and 5
    refused(model, *options, code=2, names=(f"{float(ratio)}", "2 layers"), remedy="raise it")


def test_all_layers_are_refused(refused, model):
    options = ("--granularity", "layers", "--method", "magnitude", "--ratio", "0.99", "--layers", "0:8")
    refused(model, *options, code=2, names=("0.99", "all 8 layers"), remedy="lower it")


def test_the_residual_stream_is_no_goal_behind_a_norm(refused, tmp_path):
    save_tiny(tmp_path / "in", "gemma2", dtype=torch.float32)
    options = ("--method", "random", "--layers", "1:3", "--compensate", "--compensate-target", "stream")
    refused(tmp_path / "in", *options, code=2, names=("gemma2", "norm"), remedy="--compensate-target own")
