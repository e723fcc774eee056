"""Quantised weights are called by their method's name with what to use instead; a leftover of it on floats goes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import Streamprune, edit_tensors
from safetensors.torch import load_file
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

Tensors = dict[str, torch.Tensor]
Parts = Callable[[str, torch.Tensor], Tensors]
ints = torch.zeros(4, 4, dtype=torch.int32)
ones = torch.ones(4)


def quantise(model: Path, parts: Parts, config: dict[str, Any] | None = None) -> None:
    """Put `parts` (module, weight) in the place of every projection's weight."""

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("proj.weight")]:
            weight = tensors.pop(name)
            made = parts(name.removesuffix(".weight"), weight)
            tensors |= {part: tensor.clone() for part, tensor in made.items()}

    edit_tensors(model, change)
    write(model, **(config or {}))


def write(model: Path, **fields: Any) -> None:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def under(**suffixes: torch.Tensor) -> Parts:
    return lambda module, weight: {f"{module}.{name.replace('__', '.')}": t for name, t in suffixes.items()}


def stored_as(dtype: torch.dtype, **more: torch.Tensor) -> Parts:
    return lambda module, weight: {f"{module}.weight": weight.to(dtype)} | under(**more)(module, weight)


gptq = under(qweight=ints, qzeros=ints, scales=ones.half(), g_idx=ints[0])
awq = under(qweight=ints, qzeros=ints, scales=ones.half())
four_bits = under(weight=ints.byte(), weight__absmax=ones, weight__quant_map=ones)
eight_bits = stored_as(torch.int8, SCB=ones)
packed = under(weight_packed=ints, weight_scale=ones, weight_shape=ints[0])
F8 = torch.float8_e4m3fn

METHODS: list[tuple[str, Parts, dict[str, Any], tuple[str, ...]]] = [
    ("gptq", gptq, {"quant_method": "gptq", "bits": 4}, ("GPTQ, 4 bits", "int32")),
    ("awq", awq, {"quant_method": "awq", "bits": 4}, ("AWQ, 4 bits",)),
    (
        "bnb-4",
        four_bits,
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        ("bitsandbytes, 4 bits", "dequantize()"),
    ),
    ("bnb-8", eight_bits, {"load_in_8bit": True}, ("bitsandbytes, 8 bits", "dequantize()")),
    (
        "compressed",
        packed,
        {"quant_method": "compressed-tensors"},
        ("compressed-tensors", "CompressedTensorsConfig(deq"),
    ),
    (
        "fp8",
        stored_as(F8, weight_scale_inv=ones),
        {"quant_method": "fp8"},
        ("by FP8", "FineGrainedFP8Config(dequantize=True"),
    ),
    ("fbgemm", stored_as(F8, weight_scale=ones), {"quant_method": "fbgemm_fp8"}, ("FBGEMM FP8",)),
    (
        "mxfp4",
        lambda m, w: {f"{m}_blocks": ints.byte(), f"{m}_scales": ints.byte()},
        {"quant_method": "mxfp4"},
        ("MXFP4", "Mxfp4C"),
    ),
    ("hqq", under(W_q=ints, meta=ones), {"quant_method": "hqq"}, ("HQQ",)),
    ("eetq", stored_as(torch.int8, weight_scales=ones), {"quant_method": "eetq"}, ("EETQ",)),
    ("torchao", under(weight_qdata=ints, weight_scale=ones), {"quant_method": "torchao"}, ("torchao",)),
    ("new", under(codes=ones), {"quant_method": "brand-new"}, ("brand-new", "codes")),
]


@pytest.mark.parametrize("method, parts, config, told", METHODS, ids=[row[0] for row in METHODS])
def test_a_method_of_the_config_is_named_before_tensors_are_missed(method, parts, config, told, refused, model):
    quantise(model, parts, {"quantization_config": config})
    refused(model, code=1, names=(str(model), "quantised", *told))


SIGNS = {
    "gptq": "by GPTQ",
    "awq": "by GPTQ or AWQ",
    "bnb-4": "by bitsandbytes",
    "bnb-8": "by bitsandbytes",
    "compressed": "by compressed-tensors",
    "fp8": "by FP8",
    "fbgemm": "quantised weights",
    "mxfp4": "by MXFP4",
    "hqq": "by HQQ",
    "eetq": "by EETQ",
    "torchao": "by torchao",
}


@pytest.mark.parametrize("method, parts", [row[:2] for row in METHODS if row[0] in SIGNS], ids=SIGNS)
def test_a_method_is_known_by_its_tensors_where_the_config_says_nothing(method, parts, refused, model):
    quantise(model, parts)
    refused(model, code=1, names=(str(model), SIGNS[method]))


def test_mlx_is_named(refused, model):
    quantise(model, under(weight=ints, scales=ones, biases=ones), {"quantization": {"group_size": 64, "bits": 4}})
    refused(model, code=1, names=("MLX, 4 bits",))


def test_modelopt_is_named_by_its_own_file(refused, model):
    quantise(model, stored_as(F8, weight_scale=ones, input_scale=ones))
    (model / "hf_quant_config.json").write_text("{}")
    refused(model, code=1, names=("ModelOpt",))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_plain_eight_bit_floats_are_refused_with_what_widens_them_and_that_does(
    dtype, refused, streamprune: Streamprune, model, output
):
    quantise(model, stored_as(dtype))
    refused(model, code=1, names=("quantised", "F8_E", "dtype=torch.bfloat16"))
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(model)
    assert all(tensor.dtype == torch.bfloat16 for tensor in load_file(model / "model.safetensors").values())
    assert streamprune("--model", model, "--output", output, "--method", "random", "--no-evaluate").code == 0


def test_the_remedy_for_fp8_gives_floats_that_are_pruned(refused, streamprune: Streamprune, tmp_path, output):
    model = tmp_path / "model"
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    save_tiny(model, "llama", dtype=torch.bfloat16, head_dim=32, **sizes)
    one = torch.ones(1, 1)
    fields = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    quantise(model, stored_as(F8, weight_scale_inv=one), {"quantization_config": fields})
    told = ("FineGrainedFP8Config(dequantize=True)", "save_original_format=False")
    refused(model, code=1, names=told)
    loaded = AutoModelForCausalLM.from_pretrained(model, quantization_config=FineGrainedFP8Config(dequantize=True))
    loaded.save_pretrained(model, save_original_format=False)
    done = streamprune("--model", model, "--output", output, "--method", "magnitude", "--no-evaluate", "--stock")
    assert done.code == 0 and "left out" not in done.err


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool])
def test_integers_are_called_quantised(dtype, refused, model):
    quantise(model, stored_as(dtype))
    refused(model, code=1, names=("quantised weights", str(dtype).removeprefix("torch.")))


@pytest.mark.parametrize("where", ["card", "card-list", "config"])
def test_the_float_original_is_named_where_the_card_or_the_config_has_it(where, refused, model):
    quantise(model, gptq, {"quantization_config": {"quant_method": "gptq"}})
    if where == "config":
        write(model, _name_or_path="org/base-7b")
    else:
        base = "[org/base-7b]" if where == "card-list" else "org/base-7b"
        (model / "README.md").write_text(f"---\nbase_model: {base}\n---\n# A model\n")
    refused(model, code=1, names=("made from, org/base-7b",))


@pytest.mark.parametrize(
    "card", ["---\nbase_model: [\n---\n", "---\n- 5\n---\n", "\xff", "---\nbase_model: {a: 1}\n---\n"]
)
def test_a_card_that_says_nothing_is_no_matter(card, refused, model):
    quantise(model, gptq, {"quantization_config": {"quant_method": "gptq"}, "_name_or_path": "/home/me/model"})
    (model / "README.md").write_text(card, encoding="latin-1")
    assert "/home/me" not in refused(model, code=1, names=("GPTQ", "the float checkpoint that they were made from"))


@pytest.mark.parametrize("command", ["plan", "eval"])
def test_a_plan_and_an_evaluation_name_it_too(command, streamprune: Streamprune, model):
    quantise(model, gptq, {"quantization_config": {"quant_method": "gptq"}})
    options = ("--method", "random") if command == "plan" else ()
    done = streamprune(command, "--model", model, *options)
    assert done.code == 1 and "GPTQ" in done.err and len(done.err.splitlines()) == 1


def test_a_wrapped_quantised_model_is_named_too(refused, model):
    quantise(model, gptq)
    edit_tensors(model, lambda tensors: [tensors.update({f"module.{n}": tensors.pop(n)}) for n in [*tensors]])
    refused(model, code=1, names=("GPTQ",))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize(
    "field, value",
    [
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ("quantization_config", {"quant_method": "fp8"}),
        ("quantization", {"group_size": 64, "bits": 4}),
        ("compression_config", {"format": "dense"}),
    ],
)
def test_a_leftover_on_float_weights_goes_with_a_line_and_the_output_loads(
    field, value, family, streamprune: Streamprune, tmp_path
):
    model, output = tmp_path / "model", tmp_path / "out"
    save_tiny(model, family, dtype=torch.float32)
    options = ("--method", "magnitude", "--no-evaluate", "--stock", "--overwrite")
    assert streamprune("--model", model, "--output", output, *options).code == 0
    expected = [(output / name).read_bytes() for name in ("model.safetensors", "config.json")]
    write(model, **{field: value})
    done = streamprune("--model", model, "--output", output, *options)
    assert done.code == 0
    line = f"{field} of its config.json is left out: the weights are floats"
    assert done.err.splitlines().count(line) == 1
    assert (output / "model.safetensors").read_bytes() == expected[0]
    assert json.loads((output / "config.json").read_text()) == json.loads(expected[1])
    AutoModelForCausalLM.from_pretrained(output)


def test_a_quantised_part_that_the_model_does_not_use_is_left_out(streamprune: Streamprune, model, output):
    tower = {"vision_tower.q_proj.weight": ints.byte(), "vision_tower.q_proj.weight.absmax": ones.clone()}
    edit_tensors(model, lambda tensors: tensors.update(tower))
    done = streamprune("--model", model, "--output", output, "--method", "magnitude", "--no-evaluate")
    assert done.code == 0 and "2 tensors, 32 B (vision_tower.q_proj.weight" in done.err


def test_a_tensor_of_another_shape_beside_a_leftover_is_not_called_quantised(refused, model):
    edit_tensors(model, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(9)}))
    write(model, quantization_config={"quant_method": "gptq"})
    message = refused(model, code=1, names=("model.norm.weight", "[9]", "[48]"))
    assert "quantised" not in message
