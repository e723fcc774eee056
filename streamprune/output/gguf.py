"""GGUF files of checkpoints, for llama.cpp: pruned ones too, whose layers have widths of their own.

llama.cpp reads one width for all layers of most architectures. `deci` (its name for Nemotron's NAS models) has a list
of them, and computes what Llama does: layers of different widths are written as that.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamprune.errors import CheckpointError, OutputError, UsageError
from streamprune.storage.checkpoint import Checkpoint
from streamprune.storage.directory import check_directory, check_space
from streamprune.texts.gguf_vocabulary import read_vocabulary
from streamprune.values import AUTO

_STORED = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}  # llama.cpp's numbers
Q8_BLOCK = 32  # columns that share a scale
DECI = "deci"
# Model type -> architecture of layers of one width, and of different ones; None where llama.cpp has none.
ARCHITECTURES: Mapping[str, tuple[str, str | None]] = {
    "llama": ("llama", DECI),
    "mistral": ("llama", DECI),
    "qwen2": ("qwen2", DECI),
    "qwen3": ("qwen3", None),
}
INTERLEAVED = ("llama", DECI)  # rotate neighbours, where the checkpoints' classes rotate halves
PREFIX = "streamprune_"  # of the model types of ragged layouts
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OTHERS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
ROPE_FACTORS = "rope_freqs.weight"
_YARN = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
_NEEDED = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "rms_norm_eps"),
    "vocab_size",
)


@dataclass(frozen=True)
class GgufFile:
    """File that was written: its path, llama.cpp's architecture, the type of its matrices, and its bytes."""

    path: Path
    architecture: str
    type: str
    nbytes: int


@dataclass(frozen=True)
class _Outline:
    """Outline of a file: what each of its tensors is made of.

    Attributes:
        heads, kv_heads, channels: of each layer.
        sources: the file's tensors, in order, by the checkpoint's.
    """

    architecture: str
    head_dim: int
    heads: list[int]
    kv_heads: list[int]
    channels: list[int]
    sources: dict[str, str]


def write_gguf(
    source: Path, file: Path, type_name: str = AUTO, *, pre: str | None = None, overwrite: bool = False
) -> GgufFile:
    """Write a checkpoint as a GGUF file that appears when it is whole, one tensor at a time.

    Args:
        source: a model's directory, pruned by streamprune or not.
        type_name: of matrices, one of GGUF_TYPES; "auto" is the stored one. Norms and biases are float32.
        pre: see `read_vocabulary`.

    Raises:
        UsageError: a model that llama.cpp has no architecture for, with the reason.
        CheckpointError: no model there. OutputError: the file exists, or cannot be written.
    """
    try:
        import gguf
    except ImportError as error:
        raise UsageError("writing GGUF needs the package gguf: pip install streamprune[gguf]") from error
    if (file.exists() or file.is_symlink()) and not overwrite:
        raise OutputError(f"{file} exists; choose another --output, or pass --overwrite to replace it")
    if file.is_dir():
        raise OutputError(f"{file} is a directory; choose a file as --output")
    check_directory(file.absolute().parent, "--output")
    with Checkpoint(source) as checkpoint:
        config = checkpoint.config
        outline = _outline(checkpoint)
        if type_name == AUTO:
            type_name = _STORED.get(checkpoint.tensors["model.embed_tokens.weight"].dtype, "f32")
        vocabulary = read_vocabulary(source, config["vocab_size"], pre)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.partial-{os.getpid()}")
        try:
            writer = gguf.GGUFWriter(partial, outline.architecture)
            _add_config(writer, config, outline, type_name)
            vocabulary.add_to(writer)
            nbytes = _write_tensors(gguf, writer, checkpoint, outline, type_name, partial)
            os.replace(partial, file)
        except OSError as error:
            raise OutputError(f"{file}: {error.strerror or error}") from error
        finally:
            partial.unlink(missing_ok=True)
    return GgufFile(file, outline.architecture, type_name, nbytes)


def _outline(checkpoint: Checkpoint) -> _Outline:
    """Decide on the architecture, by the shapes that the tensors have."""
    config = checkpoint.config
    model_type = str(config.get("model_type")).removeprefix(PREFIX)
    _refuse(config, model_type)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    sources = {name: theirs for theirs, name in _OTHERS.items() if theirs in checkpoint.tensors}
    if config.get("tie_word_embeddings"):
        sources.pop("output.weight", None)
    heads, kv_heads, channels = list[int](), list[int](), list[int]()
    if missing := {"token_embd.weight", "output_norm.weight"} - sources.keys():
        raise UsageError(f"{checkpoint.path} has no {missing.pop()}, in llama.cpp's words; give a whole model")
    taken = {*_OTHERS}
    for layer in range(config["num_hidden_layers"]):
        rows = {}
        for theirs, ours in _LAYER.items():
            for end in ("weight", "bias"):
                name = f"model.layers.{layer}.{theirs}.{end}"
                if name in checkpoint.tensors:
                    sources[f"blk.{layer}.{ours}.{end}"] = name
                    taken.add(name)
                    rows[ours] = checkpoint.tensors[name].shape[0]
        if missing := {*_LAYER.values()} - {"attn_q_norm", "attn_k_norm"} - rows.keys():
            raise UsageError(
                f"{checkpoint.path}: layer {layer} has no {', '.join(sorted(missing))}, in llama.cpp's words; its "
                "architectures have none without"
            )
        heads.append(rows["attn_q"] // head_dim)
        kv_heads.append(rows["attn_k"] // head_dim)
        channels.append(rows["ffn_up"])
    if left := [name for name in checkpoint.tensors if name not in taken and "rotary_emb" not in name]:
        raise UsageError(f"{checkpoint.path}: llama.cpp has no place for {left[0]} in a {model_type}")
    added = any(name.endswith(("attn_output.bias", "ffn_down.bias")) for name in sources)
    same = all(len(set(widths)) == 1 for widths in (heads, kv_heads, channels))
    alike, apart = ARCHITECTURES[model_type]
    added = added and alike != "llama"
    architecture = apart if added or not same else alike
    if architecture is None and added:
        raise UsageError(f"{checkpoint.path}: llama.cpp's {alike} has no biases of o and down, and this model has")
    if architecture is None:
        raise UsageError(
            f"{checkpoint.path}: llama.cpp's {alike} has one width for all layers, and no other of its architectures "
            f"computes what {model_type} does; prune with --allocation uniform --stock"
        )
    return _Outline(architecture, head_dim, heads, kv_heads, channels, sources)


def _rotary(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the type of the rotary embeddings and their numbers, as configs of either age have them."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return str(rope.get("rope_type", rope.get("type", "default"))), rope


def _refuse(config: Mapping[str, Any], model_type: str) -> None:
    """Refuse what llama.cpp computes in another way, or not at all."""
    if model_type not in ARCHITECTURES:
        raise UsageError(
            f"{model_type} models are not written as GGUF here, but {', '.join(ARCHITECTURES)}; one that has its stock "
            "class convert_hf_to_gguf.py of llama.cpp converts"
        )
    if config.get("quantization_config"):
        raise UsageError("the checkpoint is compressed; prune again without --compress")
    if missing := [name for name in _NEEDED if config.get(name) is None]:
        raise CheckpointError(f"config.json has no {missing[0]}; add it")
    kind, rope = _rotary(config)
    # llama.cpp has its own of these, or others than transformers.
    if kind == "yarn" and (own := [name for name in _YARN if rope.get(name) is not None]):
        raise UsageError(f"rotary embeddings of type yarn are written with their factor alone; this one has {own[0]}")
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise UsageError(f"rotary embeddings of type {kind} have no place in a GGUF file of this kind")
    if config.get("hidden_act", "silu") != "silu" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UsageError(f"llama.cpp computes {model_type} with silu and whole rotary embeddings; this one has others")


def _add_config(writer: Any, config: Mapping[str, Any], outline: _Outline, type_name: str) -> None:
    """Add what is known of the model apart from its tensors."""
    from gguf import RopeScalingType

    def widths(of: list[int]) -> int | list[int]:
        return of if outline.architecture == DECI else of[0]

    writer.add_name(str(config.get("_name_or_path") or config.get("_model_name_or_path") or config["model_type"]))
    writer.add_file_type(_FILE_TYPES[type_name])
    writer.add_context_length(_context(config))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(len(outline.heads))
    writer.add_feed_forward_length(widths(outline.channels))
    writer.add_head_count(widths(outline.heads))
    writer.add_head_count_kv(widths(outline.kv_heads))
    writer.add_key_length(outline.head_dim)
    writer.add_value_length(outline.head_dim)
    writer.add_rope_dimension_count(outline.head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    kind, rope = _rotary(config)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType.LINEAR if kind == "linear" else RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn" and (original := rope.get("original_max_position_embeddings")):
        writer.add_rope_scaling_orig_ctx_len(original)


def _context(config: Mapping[str, Any]) -> int:
    """Return the tokens up to which llama.cpp computes the same: it has no sliding windows in these architectures."""
    slides = config.get("use_sliding_window", True) and config.get("sliding_window")
    return min(config["max_position_embeddings"], slides or config["max_position_embeddings"])


def _write_tensors(
    gguf: Any, writer: Any, checkpoint: Checkpoint, outline: _Outline, type_name: str, path: Path
) -> int:
    """Write all tensors, one after another; return the bytes of the file."""
    factors = _rope_factors(checkpoint.config, outline.head_dim)
    total = 0
    if factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
        total += factors.nbytes
    kinds = {}
    for name, theirs in outline.sources.items():
        shape = checkpoint.tensors[theirs].shape
        kinds[name] = kind = _kind(gguf, shape, type_name)
        if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            dtype = np.dtype(np.float32 if kind == gguf.GGMLQuantizationType.F32 else np.float16)
            nbytes, stored = math.prod(shape) * dtype.itemsize, tuple(shape)
        else:
            dtype, stored = np.dtype(np.uint8), gguf.quant_shape_to_byte_shape(tuple(shape), kind)
            nbytes = math.prod(stored)
        writer.add_tensor_info(name, stored, dtype, nbytes, kind)
        total += nbytes
    check_space(path.parent, total, "the file")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for name, theirs in outline.sources.items():
        values = checkpoint.read(theirs).float()
        if not bool(torch.isfinite(values).all()):
            raise CheckpointError(f"{checkpoint.path}: {theirs} has numbers that are NaN or infinite")
        if kinds[name] == gguf.GGMLQuantizationType.F16 and float(values.abs().max()) > torch.finfo(torch.float16).max:
            raise UsageError(f"{checkpoint.path}: {theirs} has numbers that float16 does not; take --type bf16 or f32")
        if outline.architecture in INTERLEAVED and name.split(".")[-2] in ("attn_q", "attn_k"):
            values = interleaved(values, outline.head_dim)
        writer.write_tensor_data(gguf.quants.quantize(values.contiguous().numpy(), kinds[name]))
    writer.close()
    return path.stat().st_size


def _kind(gguf: Any, shape: tuple[int, ...], type_name: str) -> Any:
    """Choose the type of a tensor: norms and biases are small, and columns that are no whole blocks have no scales."""
    kinds = gguf.GGMLQuantizationType
    if len(shape) == 1 or type_name == "f32":
        return kinds.F32
    if type_name == "q8_0":
        return kinds.Q8_0 if shape[-1] % Q8_BLOCK == 0 else kinds.F16
    return kinds.F16 if type_name == "f16" else kinds.BF16


def interleaved(rows: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of q or k, [heads * head_dim, ...], from halves that are rotated to neighbours that are."""
    halves = rows.unflatten(0, (-1, 2, head_dim // 2))
    return halves.transpose(1, 2).reshape(rows.shape)


def _rope_factors(config: Mapping[str, Any], head_dim: int) -> np.ndarray | None:
    """Compute what Llama 3 divides its rotary frequencies by, float32 [head_dim / 2]; None of other kinds.

    Source: `_compute_llama3_parameters` of transformers, as a factor of each frequency.
    """
    kind, rope = _rotary(config)
    if kind != "llama3":
        return None
    base = float(rope["rope_theta"])
    low, high, factor = (float(rope[name]) for name in ("low_freq_factor", "high_freq_factor", "factor"))
    context = float(rope["original_max_position_embeddings"])
    wavelengths = 2 * math.pi * base ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    smooth = ((context / wavelengths - low) / (high - low)).clip(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
