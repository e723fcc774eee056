"""FLAP's biases: where they go, what they hold, and that the output is the masked dense model with them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import N_LAYERS, RAGGED, save_tiny, token_ids
from transformers import AutoTokenizer
from whole_models import load, mask_unit_kind, matrix, out_name, run, stack

from streamprune import PruneConfig, prune
from streamprune.errors import UsageError
from streamprune.texts.documents import embedded_text

FIELDS = {"olmo2": {"rms_norm_eps": 1e-12}}
HEADS_FIXED = ("gpt2", "gpt_neox", "opt")


def flap(path, output, **options):
    defaults = {"method": "flap", "ratio": 0.4, "evaluate": False, "dtype": "float64"}
    defaults |= {} if options.get("allocation") == "uniform" else {"min_keep": 0.2}
    defaults |= {"sampling": "first", "samples": 4, "seq_len": 32, "layers": (1, N_LAYERS)}
    return prune(PruneConfig(model=str(path), output=output, **{**defaults, **options}))


def ids_of(path):
    text = AutoTokenizer.from_pretrained(path)(embedded_text("calibration"), add_special_tokens=False)
    return torch.tensor(text["input_ids"][:128]).view(4, 32)


def masked_with_biases(path, kept, layers, dtype=torch.float64):
    """The dense model with removed units masked and biases in their place, and {(layer, kind): (x̄, lines, bias)}."""
    dense, model, ids, made = load(path, dtype), load(path, dtype), ids_of(path), {}
    for layer, units in kept.items():
        for kind in units:
            name = out_name(model, kind)
            _, (x, _) = run(dense, ids, stack(dense)[layer].get_submodule(name))
            module, mean = stack(model)[layer].get_submodule(name), x.double().mean(0)
            whole = matrix(module).double().clone()
            lines = mask_unit_kind(model, layer, kind, units[kind])
            gone = [line for line in range(len(mean)) if line not in set(lines)]
            bias = whole[:, gone] @ mean[gone] if layer in layers else torch.zeros(len(whole), dtype=torch.float64)
            made[layer, kind] = mean, lines, bias
            if module.bias is None:
                module.bias = torch.nn.Parameter(bias.to(dtype))
            else:
                module.bias.data += bias.to(dtype)
    return model, made


def assert_is_masked_with_biases(source, output, kept, layers=range(1, N_LAYERS)):
    expected, made = masked_with_biases(source, kept, layers)
    pruned, dense, ids = load(output), load(source), token_ids(seq=20)
    with torch.no_grad():
        logits, wanted = pruned(ids).logits, expected(ids).logits
    assert (logits - wanted).abs().max() <= 2e-6 * wanted.abs().max()
    for (layer, kind), (mean, lines, bias) in made.items():
        name = out_name(dense, kind)
        before, after = (stack(model)[layer].get_submodule(name) for model in (dense, pruned))
        had = torch.zeros_like(bias) if before.bias is None else before.bias.data
        torch.testing.assert_close(after.bias.data, had + bias, rtol=1e-6, atol=1e-9)
        # Identity: the mean output of this very Linear on the calibration tokens is what it was.
        torch.testing.assert_close(
            matrix(after) @ mean[lines] + after.bias.data, matrix(before) @ mean + had, rtol=1e-6, atol=1e-9
        )
    return pruned


@pytest.mark.parametrize("family", RAGGED)
def test_a_ragged_output_is_the_masked_dense_model_plus_biases(family, tmp_path):
    save_tiny(tmp_path / "in", family, **FIELDS.get(family, {}))
    result = flap(tmp_path / "in", tmp_path / "out")
    assert result.layout == "ragged"
    pruned = assert_is_masked_with_biases(tmp_path / "in", tmp_path / "out", result.kept)
    assert len({len(units["channel"]) for units in result.kept.values()}) > 2
    counted = sum(parameter.numel() for parameter in pruned.parameters())
    assert result.facts["parameters"]["after"] == counted
    # Granite has biases there already, and its own config says so.
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("output_biases", False) is (family != "granite")


@pytest.mark.parametrize("fields", [{"attention_bias": True}, {"mlp_bias": True}], ids=["o", "down"])
def test_a_llama_with_a_bias_on_one_of_the_two_gets_the_other(fields, tmp_path):
    save_tiny(tmp_path / "in", "llama", **fields)
    result = flap(tmp_path / "in", tmp_path / "out")
    assert_is_masked_with_biases(tmp_path / "in", tmp_path / "out", result.kept)


@pytest.mark.parametrize("family", HEADS_FIXED)
def test_families_of_one_width_take_the_biases_that_they_have(family, tmp_path):
    save_tiny(tmp_path / "in", family)
    options = {"stock": True, "allocation": "uniform", "layers": None}
    result = flap(tmp_path / "in", tmp_path / "out", **options)
    assert result.layout == "stock"
    pruned = assert_is_masked_with_biases(tmp_path / "in", tmp_path / "out", result.kept, range(N_LAYERS))
    assert type(pruned).__module__.startswith("transformers.")
    assert (
        load_file(tmp_path / "in" / "model.safetensors").keys()
        == load_file(tmp_path / "out" / "model.safetensors").keys()
    )
    with pytest.raises(UsageError, match="can only have one width"):
        flap(tmp_path / "in", tmp_path / "other")


def test_without_biases_only_the_units_go(tmp_path):
    save_tiny(tmp_path / "in", "granite")
    biased = flap(tmp_path / "in", tmp_path / "biased")
    bare = flap(tmp_path / "in", tmp_path / "bare", settings={"bias": "no"})
    assert bare.kept == biased.kept
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "bare"))
    assert before.keys() == after.keys()
    for name in before:
        if name.endswith(("o_proj.bias", "down_proj.bias")):
            assert torch.equal(before[name], after[name])


def test_a_repair_takes_the_place_of_the_biases(tmp_path):
    save_tiny(tmp_path / "in", "llama")
    result = flap(tmp_path / "in", tmp_path / "out", compensate=True, compensate_tokens=640)
    assert result.layout == "ragged" and result.facts["output_biases"] is False
    assert not [name for name in load_file(tmp_path / "out" / "model.safetensors") if name.endswith("bias")]


@pytest.mark.parametrize("weights,biases", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_biases_keep_the_dtype_in_which_they_are_stored(weights, biases, tmp_path):
    save_tiny(tmp_path / "in", "granite", dtype=weights)
    file = tmp_path / "in" / "model.safetensors"
    tensors = {name: t.to(biases) if name.endswith("bias") else t for name, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    flap(tmp_path / "in", tmp_path / "out", dtype="float32")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in written.items()} == {
        name: tensor.dtype for name, tensor in tensors.items()
    }
    name = "model.layers.2.mlp.down_proj.bias"
    assert not torch.equal(written[name], tensors[name])


def test_new_biases_are_stored_as_the_weights_beside_them(tmp_path):
    save_tiny(tmp_path / "in", "llama", dtype=torch.bfloat16)
    flap(tmp_path / "in", tmp_path / "out", dtype="float32")
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
