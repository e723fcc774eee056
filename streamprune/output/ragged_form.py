"""Form of layers of different widths, or with biases of their own: a modelling file comes with them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from streamprune.errors import UsageError
from streamprune.model.families import stock_takes
from streamprune.model.skeleton import Skeleton
from streamprune.model.units import KIND_NAMES, KeptUnits, Kind
from streamprune.output.form import OutputForm, width_fields, widths_of
from streamprune.output.ragged import modeling_source, ragged_config_fields, register
from streamprune.output.stock import StockForm, check_loads

BLOCKS: Mapping[Kind, str] = {"kv_group": "attention", "channel": "mlp"}  # as `skip` names them
OLDER_ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_local_base_freq")  # all in rope_parameters now


class RaggedForm(OutputForm):
    """Layers of different widths: config.json has those before pruning, and `per_layer_config` those that differ."""

    own_code = True
    keeps_code = False
    loading = ("import streamprune  # or pass trust_remote_code=True instead",)

    @property
    def layout(self) -> str:
        return "ragged"

    def keep(self, kept: KeptUnits) -> OutputForm:
        """Return the form of the same output when these units stay: the family's own class if it takes them."""
        form = replace(self, kept=kept)
        return StockForm(self.skeleton, kept, self.layers, self.biases) if form.is_stock else form

    @property
    def is_stock(self) -> bool:
        """Tell whether the class of the source takes these layers, so that they need not be ragged."""
        source, everything = self.skeleton.checkpoint.config, self.skeleton.all_units()
        widths = {tuple(widths_of(units).items()) for units in self.kept.values()}
        if self.added_biases or len(widths) > 1 or "per_layer_config" in source:
            return False
        if all(units == everything[layer] for layer, units in self.kept.items()):
            return True
        family, hidden_size = self.skeleton.family, self.skeleton.config.hidden_size
        groups = dict(next(iter(widths))).get("kv_group")
        return groups is None or not family.ragged or stock_takes(family, self.skeleton.geometry, groups, hidden_size)

    def check(self) -> None:
        family = self.skeleton.family
        if not family.ragged:
            raise UsageError(
                f"{family.model_type} can only have layers of one width; pass --stock (all layers, "
                f"{' and '.join(KIND_NAMES[kind] for kind in family.kinds)} only)"
            )
        super().check()
        register()
        check_loads(self.config())

    def note(self, allocation: str | None) -> str:
        why, remedy = "no stock class has layers of these widths", "--stock prunes all layers alike and needs neither"
        if allocation == "global":
            remedy = "--allocation uniform --stock needs neither"
        if self.added_biases:
            why, remedy = "o and down get biases", "--no-bias leaves them out"
        return f"{why}: load with trust_remote_code=True or after `import streamprune`; {remedy}"

    def config(self, zeros: float = 0.0) -> dict[str, Any]:
        return super().config(zeros) | {"head_dim": self.skeleton.geometry.head_dim}

    def set_widths(self, fields: dict[str, Any]) -> None:
        skeleton = self.skeleton
        dense = width_fields(skeleton, {kind: skeleton.geometry.units(kind) for kind in skeleton.family.kinds})
        fields.update(dense)
        fields["per_layer_config"] = self._per_layer(dense)
        fields.update(ragged_config_fields(skeleton.family.model_type))
        _say_rope_in_full(fields, skeleton.config)
        if self.added_biases or fields.get("output_biases"):
            fields["output_biases"] = True

    def files(self) -> Mapping[str, str]:
        model_type = self.skeleton.family.model_type
        name = f"modeling_{ragged_config_fields(model_type)['model_type']}.py"
        return {name: modeling_source(model_type)}

    def _per_layer(self, dense: Mapping[str, int]) -> dict[str, dict[str, Any]]:
        digits, overrides = len(str(len(self.kept) - 1)), {}
        for number, (layer, units) in enumerate(self.kept.items()):
            geometry = self.skeleton.geometries[layer]
            # The source may lack a block, with its norm; a run leaves a unit of each that is there.
            skipped = [name for kind, name in BLOCKS.items() if not geometry.units(kind)]
            there = {kind: count for kind, count in widths_of(units).items() if geometry.units(kind)}
            fields = width_fields(self.skeleton, there)
            changed: dict[str, Any] = {name: value for name, value in fields.items() if value != dense[name]}
            if skipped:
                changed["skip"] = skipped
            if changed:
                overrides[f"{number:0{digits}d}"] = changed
        return overrides


class RaggedAgainForm(RaggedForm):
    """Layers of different widths that stay as they are: config.json says the same of them as the source's."""

    def set_widths(self, fields: dict[str, Any]) -> None:
        pass

    def config(self, zeros: float = 0.0) -> dict[str, Any]:
        return OutputForm.config(self, zeros)


def unchanged_form(skeleton: Skeleton) -> OutputForm:
    """Return the form of an output that has all of a source's tensors in its layout, with other values."""
    form = RaggedAgainForm if "per_layer_config" in skeleton.checkpoint.config else StockForm
    return form(skeleton, skeleton.all_units(), range(0))


def _say_rope_in_full(fields: dict[str, Any], config: Any) -> None:
    """Write scaled rope as transformers 5 wants it of model types that it does not know, in place; leave other rope.

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
