"""Recognition of quantised weights, by config.json and the tensors' names and dtypes; and what to use instead."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import metadata_load

from streamprune.storage.checkpoint import Checkpoint, OtherEntry, TensorEntry

CONFIG_FIELDS = ("quantization_config", "compression_config", "quantization")
# By `quant_method` of config.json: what people call it, where that is another word.
NAMES = {
    **{"gptq": "GPTQ", "awq": "AWQ", "hqq": "HQQ", "eetq": "EETQ", "quanto": "Quanto", "aqlm": "AQLM", "vptq": "VPTQ"},
    **{"fp8": "FP8", "fbgemm_fp8": "FBGEMM FP8", "mxfp4": "MXFP4", "exl2": "EXL2", "exl3": "EXL3", "mlx": "MLX"},
    **{"modelopt": "ModelOpt", "gptq or awq": "GPTQ or AWQ"},
}
# How the names end of what stands beside or in the place of a weight, and whose sign it is. The first that is found
# decides: what several methods have comes last.
SIGNS = (
    ("g_idx", "gptq"),
    ("absmax", "bitsandbytes"),
    ("SCB", "bitsandbytes"),
    ("weight_packed", "compressed-tensors"),
    ("weight_scale_inv", "fp8"),
    ("W_q", "hqq"),
    ("weight_scales", "eetq"),
    ("weight._data", "quanto"),
    ("weight_qdata", "torchao"),
    ("codebooks", "aqlm"),
    ("centroids.weight", "vptq"),
    ("q_weight", "exl2"),
    ("trellis", "exl3"),
    ("_blocks", "mxfp4"),
    ("qweight", "gptq or awq"),
    ("weight_scale", ""),
    ("scales", ""),
)
_WRITTEN = "call save_pretrained(...) and give the directory that it writes"
_LOAD = "load it with transformers' from_pretrained"
# By default the weights are quantised again as they are saved.
_WRITTEN_AS_THEY_ARE = "call save_pretrained(..., save_original_format=False) and give the directory that it writes"
# What makes float weights of them again.
REMEDIES = {"bitsandbytes": f"{_LOAD}(...), call dequantize() on the model, then {_WRITTEN}"} | {
    method: f"{_LOAD}(..., quantization_config={kind}(dequantize=True)), {_WRITTEN_AS_THEY_ARE}"
    for method, kind in (
        ("compressed-tensors", "CompressedTensorsConfig"),
        ("fp8", "FineGrainedFP8Config"),
        ("mxfp4", "Mxfp4Config"),
    )
}
LOOKED_AT = 10  # of the model's tensors, whose modules are looked at
Entry = TensorEntry | OtherEntry


def declared(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a config.json by which its weights are quantised."""
    return {name: config[name] for name in CONFIG_FIELDS if config.get(name) is not None}


def quantised(checkpoint: Checkpoint, unusable: Sequence[str]) -> str | None:
    """Say that a checkpoint's weights are quantised, and the remedy; None if nothing shows that they are.

    Args:
        unusable: the model's names of tensors that are missing, of another shape or no floats.
    """
    method, bits = _method(checkpoint)
    found = _evidence(checkpoint, unusable, bool(method))
    if found is None:
        return None
    entry, sign = found
    method = method or sign
    dtype = str(entry.dtype).removeprefix("torch.")
    by = f"weights quantised by {NAMES.get(method, method)}" if method else "quantised weights"
    original = _original(checkpoint)
    remedy = "use the float checkpoint that they were made from" + (f", {original}" if original else "")
    if method in REMEDIES:
        remedy += f", or {REMEDIES[method]}"
    elif not method and dtype.startswith("F8"):
        remedy += f", or {_LOAD}(..., dtype=torch.bfloat16), {_WRITTEN}"
    return (
        f"{checkpoint.path} holds {by}{f', {bits} bits' if bits else ''} ({entry.name} is {dtype}), which cannot be "
        f"pruned; {remedy}"
    )


def _method(checkpoint: Checkpoint) -> tuple[str, object]:
    """Return the method that the checkpoint names, and the bits of a weight; "" and None where it names none."""
    said = declared(checkpoint.config)
    for name, fields in said.items():
        if not isinstance(fields, dict):
            continue
        by_field = {"quantization": "mlx", "compression_config": "compressed-tensors"}
        bits = fields.get("bits") or fields.get("w_bit")
        for width in (4, 8):
            bits = bits or (width if fields.get(f"load_in_{width}bit") else None)
        other = "bitsandbytes" if "load_in_4bit" in fields or "load_in_8bit" in fields else by_field.get(name, "")
        return str(fields.get("quant_method") or other), bits
    return ("modelopt" if (checkpoint.path / "hf_quant_config.json").is_file() else ""), None


def _evidence(checkpoint: Checkpoint, unusable: Sequence[str], named: bool) -> tuple[Entry, str] | None:
    """Find a tensor that shows that weights are quantised, and the method whose sign it is, or "".

    The search is beside the model's tensors: a tower or head of another kind may be quantised, and is left out.
    """
    entries: dict[str, Entry] = {**checkpoint.tensors, **checkpoint.others}
    modules = {name.rpartition(".")[0] for name in unusable[:LOOKED_AT]}
    near = {name: entry for name, entry in entries.items() if any(module in name for module in modules)}
    for sign, method in SIGNS:
        for name, entry in near.items():
            if name.endswith(sign):
                return entry, method
    for entry in near.values():
        if isinstance(entry, OtherEntry) or not entry.dtype.is_floating_point:
            return entry, ""
    in_place = [entry for name, entry in near.items() if name not in unusable and not name.endswith("bias")]
    return (in_place[0], "") if named and in_place else None


def _original(checkpoint: Checkpoint) -> str | None:
    """Find the hub id that the card or config.json names as the model that this one was made from."""
    names: list[object] = []
    try:
        base = (metadata_load(checkpoint.path / "README.md") or {}).get("base_model")
        names += base if isinstance(base, list) else [base]
    except Exception:  # a card may hold anything; it is only asked for a name
        pass
    names.append(checkpoint.config.get("_name_or_path"))
    return next((name for name in names if isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name)), None)
