"""GGUF files of checkpoints, for llama.cpp: pruned ones too, whose layers have widths of their own.

llama.cpp reads one width for all layers of most architectures. Two have a list of them, as which layers of different
widths are written: `deci` (its name for Nemotron's NAS models), which computes what Llama does, and `openelm`, which
computes what Qwen3 does where the embeddings are its head.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamprune.errors import CheckpointError, OutputError, UsageError
from streamprune.storage.checkpoint import Checkpoint
from streamprune.storage.directory import check_directory, check_space, sync_path, temporary_sibling
from streamprune.texts.gguf_vocabulary import read_vocabulary
from streamprune.values import AUTO

_STORED = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}  # llama.cpp's numbers
Q8_BLOCK = 32  # columns that share a scale
DECI, OPENELM = "deci", "openelm"
BY_LAYER = (DECI, OPENELM)
# Model type -> architecture of layers of one width, and of different ones.
ARCHITECTURES: Mapping[str, tuple[str, str]] = {
    "llama": ("llama", DECI),
    "mistral": ("llama", DECI),
    "qwen2": ("qwen2", DECI),
    "qwen3": ("qwen3", OPENELM),
}
INTERLEAVED = ("llama", DECI)  # rotate neighbours, where the checkpoints' classes rotate halves
PREFIX = "streamprune_"  # of the model types of ragged layouts
_NORMS = {"attn_q_norm", "attn_k_norm"}
_PARTS = (
    {"attn_norm", "attn_q", "attn_k", "attn_v", "attn_output"} | _NORMS,
    {"ffn_norm", "ffn_gate", "ffn_up", "ffn_down"},
)
NO_CHANNELS = 32  # of an MLP of zeros
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
        sources: of each of the file's tensors, in order, those of the checkpoint that it has below each other; none
            where it is zeros.
        zeros: shapes of these.
    """

    architecture: str
    head_dim: int
    heads: list[int]
    kv_heads: list[int]
    channels: list[int]
    sources: dict[str, tuple[str, ...]]
    zeros: dict[str, tuple[int, ...]]

    def shape(self, name: str, checkpoint: Checkpoint) -> tuple[int, ...]:
        """Return the shape of one of the file's tensors."""
        shapes = [tuple(checkpoint.tensors[theirs].shape) for theirs in self.sources[name]] or [self.zeros[name]]
        return (sum(rows for rows, *_ in shapes), *shapes[0][1:])


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
    read = (each for each in source.rglob("*") if each.is_file() and each.suffix != ".gguf")
    if file.exists() and any(file.samefile(each) for each in read):
        raise OutputError(f"{file} is a file of the model itself; choose another --output")
    check_directory(file.absolute().parent, "--output")
    with Checkpoint(source) as checkpoint:
        config = checkpoint.config
        outline = _outline(checkpoint)
        if type_name == AUTO:
            type_name = _STORED.get(checkpoint.tensors["model.embed_tokens.weight"].dtype, "f32")
        vocabulary = read_vocabulary(source, config["vocab_size"], pre)
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary_sibling(file) as beside:
                partial = beside / file.name
                writer = gguf.GGUFWriter(partial, outline.architecture)
                _add_config(writer, config, outline, type_name)
                vocabulary.add_to(writer)
                _write_tensors(gguf, writer, checkpoint, outline, type_name, file.parent)
                nbytes = partial.stat().st_size
                sync_path(partial)  # before it has the name, which can outlive a power cut that the contents did not
                os.replace(partial, file)
                sync_path(file.absolute().parent)
        except OSError as error:
            raise OutputError(f"{file}: {error.strerror or error}") from error
    return GgufFile(file, outline.architecture, type_name, nbytes)


def _outline(checkpoint: Checkpoint) -> _Outline:
    """Decide on the architecture, by the shapes that the tensors have."""
    config = checkpoint.config
    model_type = str(config.get("model_type")).removeprefix(PREFIX)
    _refuse(config, model_type)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    sources = dict[str, tuple[str, ...]]()
    sources |= {name: (theirs,) for theirs, name in _OTHERS.items() if theirs in checkpoint.tensors}
    tied = config.get("tie_word_embeddings") and "output.weight" in sources
    if tied and torch.equal(
        *(checkpoint.read(name).float() for name in ("model.embed_tokens.weight", "lm_head.weight"))
    ):
        del sources["output.weight"]
    heads, kv_heads, channels = list[int](), list[int](), list[int]()
    if missing := {"token_embd.weight", "output_norm.weight"} - sources.keys():
        raise UsageError(f"{checkpoint.path} has no {missing.pop()}, in llama.cpp's words; give a whole model")
    taken, zeros = {*_OTHERS}, dict[str, tuple[int, ...]]()
    needed = {*_LAYER.values()} - (set() if ARCHITECTURES[model_type][1] == OPENELM else _NORMS)
    for layer in range(config["num_hidden_layers"]):
        rows = {}
        for theirs, ours in _LAYER.items():
            for end in ("weight", "bias"):
                name = f"model.layers.{layer}.{theirs}.{end}"
                if name in checkpoint.tensors:
                    sources[f"blk.{layer}.{ours}.{end}"] = (name,)
                    taken.add(name)
                    rows[ours] = checkpoint.tensors[name].shape[0]
        missing = needed - rows.keys()
        if missing in [needed & part for part in _PARTS]:
            made = _zeros(missing, config["hidden_size"], head_dim)
            zeros |= {f"blk.{layer}.{name}.weight": shape for name, shape in made.items()}
            rows |= {name: shape[0] for name, shape in made.items()}
        elif missing:
            raise UsageError(
                f"{checkpoint.path}: layer {layer} has no {', '.join(sorted(missing))}, in llama.cpp's words; its "
                "architectures have none without"
            )
        heads.append(rows["attn_q"] // head_dim)
        kv_heads.append(rows["attn_k"] // head_dim)
        channels.append(rows["ffn_up"])
    if left := [name for name in checkpoint.tensors if name not in taken and "rotary_emb" not in name]:
        raise UsageError(f"{checkpoint.path}: llama.cpp has no place for {left[0]} in a {model_type}")
    same = not zeros and all(len(set(widths)) == 1 for widths in (heads, kv_heads, channels))
    architecture = _architecture(checkpoint.path, model_type, sources, same)
    sources |= dict.fromkeys(zeros, ())
    for layer in range(len(heads)) if architecture == OPENELM else ():
        _fuse(layer, sources, zeros)
    return _Outline(architecture, head_dim, heads, kv_heads, channels, sources, zeros)


def _architecture(path: Path, model_type: str, names: Iterable[str], same: bool) -> str:
    """Choose the architecture that has a place for these tensors, of layers of the `same` widths or of others.

    Raises:
        UsageError: there is none.
    """
    alike, apart = ARCHITECTURES[model_type]
    added = any(name.endswith(("attn_output.bias", "ffn_down.bias")) for name in names)
    if same and not (added and alike != "llama"):
        return alike
    if apart == OPENELM and (biases := [name for name in names if name.endswith(".bias")]):
        raise UsageError(
            f"{path}: llama.cpp's {alike} has no biases of o and down, and its {apart} none at all; this model has "
            f"{biases[0]}"
        )
    if apart == OPENELM and "output.weight" in names:
        raise UsageError(
            f"{path}: llama.cpp's {alike} has one width for all layers, and its {apart}, which has one for each, no "
            "head beside the embeddings; prune with --allocation uniform --stock"
        )
    return apart


def _fuse(layer: int, sources: dict[str, tuple[str, ...]], zeros: dict[str, tuple[int, ...]]) -> None:
    """Put q, k and v below each other, as `openelm` has them."""
    parts, fused = [f"blk.{layer}.attn_{part}.weight" for part in "qkv"], f"blk.{layer}.attn_qkv.weight"
    sources[fused] = tuple(name for part in parts for name in sources.pop(part))
    if not sources[fused]:
        rows, columns = zip(*(zeros.pop(part) for part in parts), strict=True)
        zeros[fused] = sum(rows), columns[0]


def _zeros(part: set[str], hidden: int, head_dim: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a small attention or MLP of zeros, whose output is 0, in the place of one that is gone.

    deci can have layers without heads and without channels, but not the first without heads, and one without channels
    leaves the attention's output out too.
    """
    inner = head_dim if "attn_q" in part else NO_CHANNELS
    vectors = {"attn_norm": hidden, "ffn_norm": hidden} | dict.fromkeys(_NORMS, head_dim)
    shapes: dict[str, tuple[int, ...]] = {name: (length,) for name, length in vectors.items()}
    shapes |= {"attn_output": (hidden, inner), "ffn_down": (hidden, inner)}
    return {name: shapes.get(name, (inner, hidden)) for name in _LAYER.values() if name in part}


def _rotary(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the type of the rotary embeddings and their numbers, as configs of either age have them."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return str(rope.get("rope_type", rope.get("type", "default"))), rope


def _refuse(config: Mapping[str, Any], model_type: str) -> None:
    """Refuse what llama.cpp computes in another way, or not at all."""
    if model_type not in ARCHITECTURES:
        raise UsageError(
            f"{model_type} models are not written as GGUF, only {', '.join(ARCHITECTURES)}; where all layers have one "
            "width (--stock), use llama.cpp's convert_hf_to_gguf.py"
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
        return of if outline.architecture in BY_LAYER else of[0]

    name = str(config.get("_name_or_path") or config.get("_model_name_or_path") or config["model_type"])
    writer.add_name(name.rstrip("/").rpartition("/")[2])  # where a directory lay is nobody else's business
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
    model_type = str(config["model_type"]).removeprefix(PREFIX)
    # What transformers does where config.json does not say.
    slides = model_type == "mistral" or (model_type in ("qwen2", "qwen3") and config.get("use_sliding_window", False))
    window = config.get("sliding_window", 4096) if slides else None
    return min(config["max_position_embeddings"], window or config["max_position_embeddings"])


def _write_tensors(
    gguf: Any, writer: Any, checkpoint: Checkpoint, outline: _Outline, type_name: str, directory: Path
) -> None:
    """Write all tensors, one after another, if there is room in the directory."""
    factors = _rope_factors(checkpoint.config, outline.head_dim)
    total = 0
    if factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
        total += factors.nbytes
    kinds, shapes = {}, {name: outline.shape(name, checkpoint) for name in outline.sources}
    for name, shape in shapes.items():
        kinds[name] = kind = _kind(gguf, shape, type_name)
        if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            dtype = np.dtype(np.float32 if kind == gguf.GGMLQuantizationType.F32 else np.float16)
            nbytes, stored = math.prod(shape) * dtype.itemsize, shape
        else:
            dtype, stored = np.dtype(np.uint8), gguf.quant_shape_to_byte_shape(shape, kind)
            nbytes = math.prod(stored)
        writer.add_tensor_info(name, stored, dtype, nbytes, kind)
        total += nbytes
    check_space(directory, total, "the file")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for name, shape in shapes.items():
        theirs = outline.sources[name]
        values = torch.cat([checkpoint.read(each).float() for each in theirs]) if theirs else torch.zeros(shape)
        if not bool(torch.isfinite(values).all()):
            raise CheckpointError(f"{checkpoint.path}: {' or '.join(theirs)} has numbers that are NaN or infinite")
        if kinds[name] == gguf.GGMLQuantizationType.F16 and float(values.abs().max()) > torch.finfo(torch.float16).max:
            raise UsageError(
                f"{checkpoint.path}: {theirs[0]} has numbers that float16 does not; take --type bf16 or f32"
            )
        if outline.architecture in INTERLEAVED and name.split(".")[-2] in ("attn_q", "attn_k"):
            values = interleaved(values, outline.head_dim)
        writer.write_tensor_data(gguf.quants.quantize(values.contiguous().numpy(), kinds[name]))
    writer.close()


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
