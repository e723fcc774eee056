"""Kept units to a smaller checkpoint: sliced tensors, one layer at a time, and a config.json that fits them."""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from streamprune import ragged
from streamprune.allocation import KeptUnits
from streamprune.binding import check_finite
from streamprune.calibration import load_tokenizer
from streamprune.checkpoint import TensorEntry, byte_view, read_config, read_json
from streamprune.errors import UsageError
from streamprune.families import Family, Geometry, Kind, Member, kept_lines
from streamprune.paging import Pager
from streamprune.skeleton import Skeleton
from streamprune.writer import OWN_FILE, ShardedWriter, TensorSpec, write_json

# What is copied from the source: tokenizer, templates, generation config, terms of use. Never weights in any format.
COMPANION_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
COMPANION_NAMES = ("LICENSE", "NOTICE", "USE_POLICY")
NOT_COMPANIONS = (".index.json", "adapter_config.json")
OWN_FILES = ("config.json", "README.md", OWN_FILE)
# Where a Llama's config.json leaves these out, a Mistral would fill in other values.
LLAMA_DEFAULTS = ("vocab_size", "hidden_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")


def layout(geometry: Geometry, kept: KeptUnits) -> str:
    """How the layers come out: "same" as the source, "stock" (one new width for all), or "ragged"."""
    widths = {tuple(len(units) for units in layer.values()) for layer in kept.values()}
    dense = {tuple(geometry.units(kind) for kind in layer) for layer in kept.values()}
    if widths == dense:
        return "same"
    return "stock" if len(widths) == 1 else "ragged"


def check_emittable(skeleton: Skeleton, kept: KeptUnits, emit: str | None) -> None:
    """Refuse what no class can load, before any work: only the widths of `kept` matter.

    Raises:
        UsageError: ragged layers in a family that has none, `emit` where it does not fit, or a config that the
            class it is for does not accept.
    """
    family, source = skeleton.family, skeleton.checkpoint.config
    if layout(skeleton.geometry, kept) == "ragged" and not family.ragged:
        raise UsageError(
            f"{family.model_type} can only have layers of one width; pass --stock (all layers, channels only)"
        )
    if emit == "mistral":
        biased = [name for name in ("attention_bias", "mlp_bias") if source.get(name)]
        if family.model_type != "llama" or biased:
            what = f"this one has {biased[0]}" if biased else f"this is {family.model_type}"
            raise UsageError(f"--emit mistral is for bias-free llama models; {what}")
    config = patched_config(skeleton, kept, emit)
    ragged.register()
    try:
        AutoConfig.for_model(**config)
    except Exception as error:  # transformers' checks raise many kinds
        reason = " ".join(str(error).split())
        raise UsageError(
            f"transformers would not load these widths as {config['model_type']} ({reason}); "
            "keep the heads with --attention-ratio 0"
        ) from error


def patched_config(skeleton: Skeleton, kept: KeptUnits, emit: str | None = None) -> dict[str, Any]:
    """config.json of the pruned model: the source's JSON with the widths changed and nothing else.

    It never passes through transformers, which would lose what it does not know (rope_theta of older files).
    """
    family, geometry = skeleton.family, skeleton.geometry
    config = copy.deepcopy(skeleton.checkpoint.config)
    if skeleton.untied:
        config["tie_word_embeddings"] = False
    shape = layout(geometry, kept)
    if shape == "ragged":
        config.update(_width_fields(family, geometry, _all_units(family, geometry)))
        config["per_layer_config"] = _per_layer(family, geometry, kept)
        config.update(ragged.ragged_config_fields(family.model_type))
    elif shape == "stock" or emit:
        config.update(_width_fields(family, geometry, kept[0]))
    if (shape != "same" or emit) and family.stock_heads != "fixed":
        config["head_dim"] = geometry.head_dim
    if emit == "mistral":
        for name in LLAMA_DEFAULTS:
            config.setdefault(name, getattr(skeleton.config, name))
        config.update(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=None)
    return config


def _all_units(family: Family, geometry: Geometry) -> dict[Kind, list[int]]:
    return {kind: list(range(geometry.units(kind))) for kind in family.kinds}


def _width_fields(family: Family, geometry: Geometry, layer: Mapping[Kind, list[int]]) -> dict[str, int]:
    fields = {family.channels_key: len(layer["channel"])}
    if "kv_group" in layer:
        groups = len(layer["kv_group"])
        fields |= {"num_attention_heads": groups * geometry.n_rep, "num_key_value_heads": groups}
    return fields


def _per_layer(family: Family, geometry: Geometry, kept: KeptUnits) -> dict[str, dict[str, int]]:
    dense = _width_fields(family, geometry, _all_units(family, geometry))
    digits = len(str(len(kept) - 1))
    overrides = {}
    for layer, units in kept.items():
        fields = _width_fields(family, geometry, units)
        changed = {name: value for name, value in fields.items() if value != dense[name]}
        if changed:
            overrides[f"{layer:0{digits}d}"] = changed
    return overrides


class _Slicer:
    """Which lines of which stored tensor remain."""

    def __init__(self, skeleton: Skeleton, kept: KeptUnits) -> None:
        self.geometry, self.kept = skeleton.geometry, kept
        self._members: dict[str, tuple[int, Member]] = {}
        for layer in kept:
            for member in skeleton.family.members:
                if member.tensor in skeleton.entries[layer]:
                    self._members[skeleton.layer_prefix(layer) + member.tensor] = (layer, member)

    def _lines(self, name: str) -> tuple[int, Tensor] | None:
        """(dimension, indices that remain) of a stored tensor, None where nothing goes."""
        if name not in self._members:
            return None
        layer, member = self._members[name]
        units = self.kept[layer][member.kind]
        if len(units) == self.geometry.units(member.kind):
            return None
        return member.dim, kept_lines(member, self.geometry, units)

    def spec(self, entry: TensorEntry) -> TensorSpec:
        """Name, dtype and shape of `entry` in the output."""
        shape = list(entry.shape)
        if (lines := self._lines(entry.name)) is not None:
            shape[lines[0]] = len(lines[1])
        return TensorSpec(entry.name, entry.dtype, tuple(shape))

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """What remains of a stored tensor."""
        lines = self._lines(name)
        return tensor if lines is None else tensor.index_select(*lines)


def output_specs(skeleton: Skeleton, kept: KeptUnits) -> list[TensorSpec]:
    """All tensors of the output, with the source's names, in the source's order."""
    slicer = _Slicer(skeleton, kept)
    return [slicer.spec(entry) for entry in skeleton.checkpoint.tensors.values()]


def write_weights(skeleton: Skeleton, pager: Pager, kept: KeptUnits, directory: Path, max_shard_size: int) -> str:
    """Write the pruned tensors into `directory`, with one source layer in memory at a time.

    Returns:
        The SHA-256 of the source's tensors: of the lines "name sha256(bytes)", sorted.

    Raises:
        CheckpointError: NaN or infinite weights in the source.
        OutputError: the disk is full.
    """
    checkpoint, slicer = skeleton.checkpoint, _Slicer(skeleton, kept)
    digests: dict[str, str] = {}

    def write(name: str, tensor: Tensor) -> None:
        digests[name] = hashlib.sha256(byte_view(tensor.cpu())).hexdigest()
        writer.write(name, slicer.cut(name, tensor))

    with ShardedWriter(directory, output_specs(skeleton, kept), max_shard_size) as writer:
        with pager.pages(range(len(skeleton.layers))) as pages:
            for page in pages:
                prefix = skeleton.layer_prefix(page.layer)
                for name, tensor in page.tensors.items():
                    check_finite(checkpoint.path, page.layer, name, tensor)
                    write(prefix + name, tensor)
        for name in checkpoint.tensors:
            if name not in digests:
                write(name, checkpoint.read(name))
    return hashlib.sha256("\n".join(f"{name} {digests[name]}" for name in sorted(digests)).encode()).hexdigest()


def write_companions(skeleton: Skeleton, kept: KeptUnits, directory: Path, emit: str | None) -> None:
    """Everything beside the weights: config.json, the modelling file of ragged layers, tokenizer and so on."""
    source = skeleton.checkpoint.path
    for file in sorted(source.iterdir()):
        if file.is_file() and _is_companion(file.name):
            shutil.copyfile(file, directory / file.name)
    config = patched_config(skeleton, kept, emit)
    write_json(directory / "config.json", config)
    if "per_layer_config" in config:
        text = ragged.modeling_source(skeleton.family.model_type)
        (directory / f"modeling_{config['model_type']}.py").write_text(text, encoding="utf-8")
    keep_tokenizer_class(source, directory)


def _is_companion(name: str) -> bool:
    known = name.endswith(COMPANION_SUFFIXES) or name.startswith(COMPANION_NAMES)
    return known and not name.startswith(".") and not name.endswith(NOT_COMPANIONS) and name not in OWN_FILES


def keep_tokenizer_class(source: Path, directory: Path) -> None:
    """Name the tokenizer's class where the output's model_type would make AutoTokenizer choose another one.

    That choice goes by model_type for some families, and another class can split the same text differently.
    """
    file = directory / "tokenizer_config.json"
    if not file.is_file() or read_config(source).get("model_type") == read_config(directory).get("model_type"):
        return
    dense = type(load_tokenizer(source)).__name__
    if type(load_tokenizer(directory)).__name__ != dense:
        write_json(file, read_json(file) | {"tokenizer_class": dense})


def mask_layer(skeleton: Skeleton, kept: KeptUnits, layer: int, weights: dict[str, Tensor]) -> None:
    """Turn a layer's bound weights into the masked dense layer that the sliced one must equal, in place.

    The columns through which a removed unit reaches the residual stream become zero. Where a norm spans all
    heads (OLMo 2) the removed rows become zero too and its weight is scaled by √(kept/all), since the mean
    square is then taken over fewer elements.
    """
    for member in skeleton.family.members:
        if member.tensor not in weights:
            continue
        units = kept[layer][member.kind]
        lines = kept_lines(member, skeleton.geometry, units)
        weight = weights[member.tensor]
        removed = torch.ones(weight.shape[member.dim], dtype=torch.bool)
        removed[lines] = False
        weight.index_fill_(member.dim, removed.nonzero().flatten().to(weight.device), 0)
        if member.tensor.endswith("norm.weight"):
            weight.mul_((len(units) / skeleton.geometry.units(member.kind)) ** 0.5)
