"""Kept units to a smaller checkpoint: sliced tensors, one layer at a time, and a config.json that fits them."""

from __future__ import annotations

import copy
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from streamprune.errors import UsageError
from streamprune.model.families import Family, stock_takes
from streamprune.model.masking import bias_of, output_matrices
from streamprune.model.skeleton import Skeleton
from streamprune.model.units import KIND_NAMES, Geometry, KeptUnits, Kind, Member, all_units, kept_lines
from streamprune.output import ragged, sparse24
from streamprune.storage.checkpoint import TensorEntry
from streamprune.storage.shards import TensorSpec
from streamprune.streaming.pager import Page

# Where a Llama's config.json leaves these out, a Mistral would fill in other values.
LLAMA_DEFAULTS = ("vocab_size", "hidden_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")
OLDER_ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_local_base_freq")  # all in rope_parameters now
Means = Mapping[tuple[int, str], Tensor]  # x̄ [d_in] of the inputs of (layer, tensor)


def layout(skeleton: Skeleton, kept: KeptUnits, emit: str | None = None, *, biases: bool = False) -> str:
    """How the layers come out: "same" as the source, "stock" (one width for all, or fewer layers), or "ragged".

    `biases` are on o and down where the family has none: only the ragged form can have them. It also takes one width
    that the family's own class refuses, which a global allocation may come to.
    """
    if biases:
        return "ragged"
    family, geometry = skeleton.family, skeleton.geometry
    widths = {tuple(len(units) for units in layer.values()) for layer in kept.values()}
    dense = {tuple(geometry.units(kind) for kind in layer) for layer in kept.values()}
    if widths == dense:
        return "same" if len(kept) == len(skeleton.layers) else "stock"
    if len(widths) > 1:
        return "ragged"
    first, hidden_size = next(iter(kept.values())), skeleton.config.hidden_size
    if emit is None and family.ragged and "kv_group" in first:
        return "stock" if stock_takes(family, geometry, len(first["kv_group"]), hidden_size) else "ragged"
    return "stock"


def check_emittable(skeleton: Skeleton, kept: KeptUnits, emit: str | None, *, biases: bool = False) -> None:
    """Refuse what no class can load, before any work: only the widths of `kept` matter.

    Raises:
        UsageError: ragged layers in a family that has none, `emit` where it does not fit, or a config that the
            class it is for does not accept.
    """
    family, source = skeleton.family, skeleton.checkpoint.config
    if layout(skeleton, kept, emit, biases=biases) == "ragged" and not family.ragged:
        raise UsageError(
            f"{family.model_type} can only have layers of one width; pass --stock (all layers, "
            f"{' and '.join(KIND_NAMES[kind] for kind in family.kinds)} only)"
        )
    if emit == "mistral":
        biased = [name for name in ("attention_bias", "mlp_bias") if source.get(name)]
        if family.model_type != "llama" or biased:
            what = f"this one has {biased[0]}" if biased else f"this is {family.model_type}"
            raise UsageError(f"--emit mistral is for bias-free llama models; {what}")
    if len(kept) < len(skeleton.layers) and source.get("scale_attn_by_inverse_layer_idx"):
        raise UsageError("attention of this model is scaled by the layer's number, which changes; prune units instead")
    config = patched_config(skeleton, kept, emit, biases=biases)
    ragged.register()
    try:
        AutoConfig.for_model(**config)
    except Exception as error:  # transformers' checks raise many kinds
        reason = " ".join(str(error).split())
        raise UsageError(
            f"transformers would not load these widths as {config['model_type']} ({reason}); "
            "with units, keep the heads with --attention-ratio 0"
        ) from error


def patched_config(
    skeleton: Skeleton, kept: KeptUnits, emit: str | None = None, *, biases: bool = False
) -> dict[str, Any]:
    """config.json of the pruned model: the source's JSON with the widths changed and nothing else.

    It never passes through transformers, which would lose what it does not know (rope_theta of older files).
    """
    family, geometry = skeleton.family, skeleton.geometry
    config = copy.deepcopy(skeleton.checkpoint.config)
    if skeleton.untied:
        config["tie_word_embeddings"] = False
    shape = layout(skeleton, kept, emit, biases=biases)
    if shape == "ragged":
        config.update(_width_fields(family, geometry, all_units(geometry, family.kinds)))
        config["per_layer_config"] = _per_layer(family, geometry, kept)
        config.update(ragged.ragged_config_fields(family.model_type))
        _say_rope_in_full(config, skeleton.config)
        if biases:
            config["output_biases"] = True
    elif shape == "stock" or emit:
        config.update(_width_fields(family, geometry, next(iter(kept.values()))))
    if len(kept) < len(skeleton.layers):
        config.update(_layer_fields(skeleton, kept))
    if (shape != "same" or emit) and family.stock_heads != "fixed":
        config["head_dim"] = geometry.head_dim
    if emit == "mistral":
        for name in LLAMA_DEFAULTS:
            config.setdefault(name, getattr(skeleton.config, name))
        config.update(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=None)
    return config


def _say_rope_in_full(fields: dict[str, Any], config: Any) -> None:
    """Scaled rope as transformers 5 wants it of model types that it does not know, in place; others stay as they are.

    AutoTokenizer reads the config without the modelling file: it then fills in nothing and knows no older spelling.
    """
    if not (fields.get("rope_scaling") or fields.get("rope_parameters")):
        return
    for name in OLDER_ROPE_FIELDS:
        fields.pop(name, None)
    rope = copy.deepcopy(config.rope_parameters)
    by_layer_type = [value for value in rope.values() if isinstance(value, dict)]
    for parameters in by_layer_type or [rope]:
        parameters.pop("type", None)
    fields["rope_parameters"] = rope
    # What scaled rope is checked against; of longrope also the number of heads, which differs by layer.
    fields.setdefault("max_position_embeddings", config.max_position_embeddings)
    if any(parameters.get("rope_type") == "longrope" for parameters in by_layer_type or [rope]):
        fields["allow_global_per_layer_attribute_access"] = True
    if by_layer_type:
        fields.setdefault("layer_types", list(config.layer_types))


def _layer_fields(skeleton: Skeleton, kept: KeptUnits) -> dict[str, Any]:
    """The number of layers, and every list with an entry per layer, also those that transformers fills in."""
    n_layers = len(skeleton.layers)
    names = skeleton.config.attribute_map
    fields: dict[str, Any] = {names.get("num_hidden_layers", "num_hidden_layers"): len(kept)}
    for name, value in skeleton.config.to_dict().items():
        if "layer" in name and isinstance(value, list) and len(value) == n_layers:
            fields[name] = [value[layer] for layer in kept]
    return fields


def _width_fields(family: Family, geometry: Geometry, layer: Mapping[Kind, list[int]]) -> dict[str, int]:
    fields = {family.channels_key: len(layer["channel"])} if "channel" in layer else {}
    if "kv_group" in layer:
        groups = len(layer["kv_group"])
        fields |= {"num_attention_heads": groups * geometry.n_rep, "num_key_value_heads": groups}
    return fields


def _per_layer(family: Family, geometry: Geometry, kept: KeptUnits) -> dict[str, dict[str, int]]:
    dense = _width_fields(family, geometry, all_units(geometry, family.kinds))
    digits = len(str(len(kept) - 1))
    overrides = {}
    for layer, units in enumerate(kept.values()):
        fields = _width_fields(family, geometry, units)
        changed = {name: value for name, value in fields.items() if value != dense[name]}
        if changed:
            overrides[f"{layer:0{digits}d}"] = changed
    return overrides


class Slicer:
    """What remains of which stored tensor, and under which name."""

    def __init__(self, skeleton: Skeleton, kept: KeptUnits) -> None:
        self.geometry, self.kept = skeleton.geometry, kept
        self._members: dict[str, tuple[int, Member]] = {}
        for layer in kept:
            for member in skeleton.family.members:
                if member.tensor in skeleton.entries[layer]:
                    self._members[skeleton.layer_prefix(layer) + member.tensor] = (layer, member)
        self._layers = {skeleton.layer_prefix(layer): layer for layer in range(len(skeleton.layers))}
        self._prefixes = {layer: skeleton.layer_prefix(number) for number, layer in enumerate(kept)}

    def name(self, name: str) -> str | None:
        """The name in the output: layers are numbered anew. None if the tensor's layer goes."""
        for prefix, layer in self._layers.items():
            if name.startswith(prefix):
                return self._prefixes[layer] + name.removeprefix(prefix) if layer in self.kept else None
        return name

    def _lines(self, name: str) -> tuple[int, Tensor] | None:
        """(dimension, indices that remain) of a stored tensor, None where nothing goes."""
        if name not in self._members:
            return None
        layer, member = self._members[name]
        units = self.kept[layer][member.kind]
        if len(units) == self.geometry.units(member.kind):
            return None
        return member.dim, kept_lines(member, self.geometry, units)

    def spec(self, entry: TensorEntry) -> TensorSpec | None:
        """Name, dtype and shape of `entry` in the output; None if it goes."""
        name, shape = self.name(entry.name), list(entry.shape)
        if name is None:
            return None
        if (lines := self._lines(entry.name)) is not None:
            shape[lines[0]] = len(lines[1])
        return TensorSpec(name, entry.dtype, tuple(shape))

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """What remains of a stored tensor."""
        lines = self._lines(name)
        return tensor if lines is None else tensor.index_select(lines[0], lines[1].to(tensor.device))


def output_specs(
    skeleton: Skeleton, kept: KeptUnits, *, biases: bool = False, packed: Container[str] = ()
) -> list[TensorSpec]:
    """All tensors of the output, with the source's names but for the layers' numbers, in the source's order.

    With `biases`, each o and down is followed by one where it has none. The matrices `packed` are compressed.
    """
    slicer, added = Slicer(skeleton, kept), {}
    for layer in kept if biases else ():
        for member in output_matrices(skeleton, layer):
            if bias_of(member.tensor) not in skeleton.entries[layer]:
                prefix = skeleton.layer_prefix(layer)
                added[prefix + member.tensor] = prefix + bias_of(member.tensor)
    specs = []
    for entry in skeleton.checkpoint.tensors.values():
        spec = slicer.spec(entry)
        if spec is not None:
            specs.extend(sparse24.specs(spec) if entry.name in packed else [spec])
            if entry.name in added:
                bias = slicer.name(added[entry.name])
                assert bias is not None, "its layer stays"
                specs.append(TensorSpec(bias, entry.dtype, (skeleton.config.hidden_size,)))
    return specs


def mean_biases(skeleton: Skeleton, kept: KeptUnits, means: Means, page: Page) -> dict[str, Tensor]:
    """Biases of o and down that keep the calibration-mean output: W(x̄ ⊙ removed), added to those there are.

    arXiv 2312.11983, §3.4. Layers without `means` get biases of zero.
    """
    biases = {}
    for member in output_matrices(skeleton, page.layer) if page.layer in kept else ():
        weight, name = page.tensors[member.tensor], bias_of(member.tensor)
        mean = means.get((page.layer, member.tensor))
        removed = torch.zeros(weight.shape[member.dim], dtype=torch.float64)
        if mean is not None:
            removed.copy_(mean)
            removed[kept_lines(member, skeleton.geometry, kept[page.layer][member.kind])] = 0
        matrix = (weight if member.dim == 1 else weight.T).cpu().double()
        bias = matrix @ removed
        if name in page.tensors:
            bias += page.tensors[name].cpu().double()
        biases[name] = bias.to(page.tensors[name].dtype if name in page.tensors else weight.dtype)
    return biases
