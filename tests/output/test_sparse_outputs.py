"""Pruned weights: zeros exactly where they were promised, everything else as in the source."""

import json

import pytest
import torch
from cli_runner import SHORT
from marks import slow
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import N_LAYERS, save_tiny
from transformers import AutoModelForCausalLM
from whole_models import STACKS, load

METHODS = ("random", "magnitude", "taylor", "wanda", "sparsegpt")
# Rows of 48 and 72 weights, which 2, 3, 4 and 8 divide.
FIELDS = {"head_dim": 8, "intermediate_size": 72}
FAMILY_FIELDS = {"llama": FIELDS, "phi3": {"intermediate_size": 72}, "gpt2": {"n_inner": 72}}
PATTERNS = {"weights": None, "2:4": (2, 4), "4:8": (4, 8), "1:3": (1, 3)}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    made = {}

    def source(family="llama", dtype=torch.float32):
        if (family, dtype) not in made:
            made[family, dtype] = tmp_path_factory.mktemp(family) / "in"
            save_tiny(made[family, dtype], family, dtype=dtype, **FAMILY_FIELDS[family])
        return made[family, dtype]

    return source


def prune(streamprune, source, output, *options):
    same = ("--dtype", "float32", "--no-evaluate", "--quiet", *SHORT)  # whatever the processor is fast in
    result = streamprune("--model", source, "--output", output, *same, *options)
    assert result.code == 0, result.err
    return result


def rows(family, tensor):
    """[d_out, d_in] of a stored matrix."""
    return tensor.T if family == "gpt2" else tensor


def pruned_matrices(family, tensors, layers):
    """Names of the Linears' and Conv1Ds' weights of layers: all that is two-dimensional there."""
    prefixes = tuple(f"{STACKS.get(family, 'model.layers')}.{layer}." for layer in layers)
    return {name for name, tensor in tensors.items() if name.startswith(prefixes) and tensor.ndim == 2}


def check_zeros(zero, pattern, ratio, exact_rows):
    """zero: where a matrix [d_out, d_in] is zero."""
    if pattern is not None:
        n, m = pattern
        assert (zero.unflatten(1, (-1, m)).sum(-1) == m - n).all()
    elif exact_rows:
        assert (zero.sum(1) == int(ratio * zero.shape[1] + 1e-9)).all()
    else:
        assert int(zero.sum()) == int(ratio * zero.numel() + 1e-9)


def check_output(family, source, output, layers, pattern, ratio, method):
    """Everything that is promised of an output with sparse weights."""
    assert json.loads((output / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    before, after = (load_file(path / "model.safetensors") for path in (source, output))
    with safe_open(source / "model.safetensors", "pt") as a, safe_open(output / "model.safetensors", "pt") as b:
        assert list(a.keys()) == list(b.keys()) and b.metadata() == {"format": "pt"}
    assert {name: (t.shape, t.dtype) for name, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    sparse = pruned_matrices(family, before, layers)
    zeros = 0
    for name, tensor in before.items():
        if name not in sparse:
            assert torch.equal(after[name], tensor), name
            continue
        zero = rows(family, after[name]) == 0
        check_zeros(zero, pattern, ratio, exact_rows=method != "sparsegpt")
        zeros += int(zero.sum())
        if method != "sparsegpt":
            assert torch.equal(after[name][after[name] != 0], tensor[after[name] != 0]), name
    facts = json.loads((output / "streamprune.json").read_text())
    assert facts["zeros"] == {"weights": zeros, "of": sum(before[name].numel() for name in sparse)}
    assert facts["layout"] == "same" and "kept" not in facts
    assert facts["bytes"]["before"] == facts["bytes"]["after"] == sum(tensor.nbytes for tensor in before.values())


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", METHODS)
def test_exactly_the_promised_zeros_and_the_rest_as_it_was(method, pattern, sources, streamprune, output):
    source = sources()
    options = ("--method", method, "--granularity", pattern, "--layers", "1:3")
    options += ("--ratio", "0.3") if pattern == "weights" else ()
    prune(streamprune, source, output, *options)
    check_output("llama", source, output, (1, 2), PATTERNS[pattern], 0.3, method)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("pattern", ["weights", "2:4"])
@pytest.mark.parametrize("method", METHODS)
def test_weights_in_the_dtype_in_which_they_are_stored(method, pattern, dtype, sources, streamprune, output):
    source = sources(dtype=dtype)
    prune(streamprune, source, output, "--method", method, "--granularity", pattern)
    check_output("llama", source, output, range(N_LAYERS), PATTERNS[pattern], 0.5, method)


@pytest.mark.parametrize("pattern", ["weights", "2:4", "1:3"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "phi3"])
def test_rows_are_output_rows_in_fused_and_transposed_matrices(family, method, pattern, sources, streamprune, output):
    source = sources(family)
    prune(streamprune, source, output, "--method", method, "--granularity", pattern)
    kept = (1 / 3) if pattern == "1:3" else 0.5
    check_output(family, source, output, range(N_LAYERS), PATTERNS[pattern], 1 - kept, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ratio_zero_gives_the_same_bytes(method, dtype, sources, streamprune, output):
    source = sources(dtype=dtype)
    prune(streamprune, source, output, "--method", method, "--granularity", "weights", "--ratio", "0")
    for name in ("model.safetensors", "tokenizer.json"):
        assert (output / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((output / "config.json").read_text()) == json.loads((source / "config.json").read_text())


def test_ratio_zero_leaves_weights_of_inputs_that_are_always_zero(streamprune, tmp_path, output):
    """SparseGPT zeroes such weights wherever anything goes."""
    model = save_tiny(tmp_path / "in", "llama", dtype=torch.float32, **FIELDS)
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[7] = 0
    model.save_pretrained(tmp_path / "in")
    options = ("--method", "sparsegpt", "--granularity", "weights", "--ratio")
    prune(streamprune, tmp_path / "in", output, *options, "0")
    assert (output / "model.safetensors").read_bytes() == (tmp_path / "in" / "model.safetensors").read_bytes()
    prune(streamprune, tmp_path / "in", tmp_path / "some", *options, "0.3")
    assert not load_file(tmp_path / "some" / "model.safetensors")["model.layers.1.mlp.down_proj.weight"][:, 7].any()


def test_magnitude_zeroes_the_smallest_weights_of_each_row(sources, streamprune, tmp_path):
    source = sources()
    before = load_file(source / "model.safetensors")
    for pattern in ("weights", "2:4"):
        prune(streamprune, source, tmp_path / pattern[0], "--method", "magnitude", "--granularity", pattern)
        after = load_file(tmp_path / pattern[0] / "model.safetensors")
        for name in pruned_matrices("llama", before, range(N_LAYERS)):
            groups = before[name].abs() if pattern == "weights" else before[name].abs().unflatten(1, (-1, 4))
            middle = groups.sort(-1).values[..., groups.shape[-1] // 2 - 1 :][..., :2].mean(-1, keepdim=True)
            wanted = (groups > middle).reshape(before[name].shape)
            assert torch.equal(after[name] != 0, wanted)


def test_random_scores_of_zero_do_not_take_more_than_was_asked(sources, streamprune, output, monkeypatch):
    """torch.rand gives 0 once in 2^24 times: in a large model more than once."""
    original = torch.rand

    def with_zeros(*shape, **options):
        made = original(*shape, **options)
        if made.ndim == 2:
            made[:, ::3] = 0
        return made

    monkeypatch.setattr(torch, "rand", with_zeros)
    source = sources()
    prune(streamprune, source, output, "--method", "random", "--granularity", "weights", "--ratio", "0.1")
    check_output("llama", source, output, range(N_LAYERS), None, 0.1, "random")


def test_methods_and_seeds_choose_different_weights(sources, streamprune, tmp_path):
    chosen = []
    for number, method in enumerate((*METHODS, "random")):
        options = ("--method", method, "--granularity", "weights", "--seed", number // len(METHODS))
        prune(streamprune, sources(), tmp_path / str(number), *options)
        tensors = load_file(tmp_path / str(number) / "model.safetensors")
        chosen.append((tensors["model.layers.2.mlp.up_proj.weight"] == 0).numpy().tobytes())
    assert len(set(chosen)) == len(METHODS) + 1


@pytest.mark.parametrize("method,pattern", [slow("wanda", "2:4"), slow("sparsegpt", "weights")])
def test_verify_passes_and_the_card_says_that_the_files_are_not_smaller(method, pattern, sources, streamprune, output):
    result = prune(streamprune, sources(), output, "--method", method, "--granularity", pattern)
    assert "(same)" in result.out
    checked = streamprune("verify", output)
    assert checked.code == 0 and "FAILED" not in checked.out, checked
    assert ("weights that are not zero" in checked.out) is (method != "sparsegpt")
    card = (output / "README.md").read_text()
    facts = json.loads((output / "streamprune.json").read_text())
    assert "The files are not smaller" in card and f"`{pattern}`" in card
    assert f"{facts['zeros']['weights']:,} of {facts['zeros']['of']:,}" in card and "custom_code" not in card
    model = AutoModelForCausalLM.from_pretrained(output)
    assert type(model).__module__.startswith("transformers.")
    total = sum(parameter.numel() for parameter in load(sources()).parameters())
    assert facts["parameters"] == {"before": total, "after": total}


def test_verify_finds_a_weight_that_was_changed(sources, streamprune, output):
    from safetensors.torch import save_file

    prune(streamprune, sources(), output, "--method", "magnitude", "--granularity", "weights")
    tensors = load_file(output / "model.safetensors")
    weight = tensors["model.layers.1.mlp.up_proj.weight"]
    row, column = weight.nonzero()[5].tolist()
    weight[row, column] *= 1.0001
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    checked = streamprune("verify", output)
    assert checked.code == 1
    (line,) = (line for line in checked.out.splitlines() if line.startswith("weights that are not zero"))
    assert "FAILED" in line and "1 differ" in line
