"""Form that the family's own class loads: one width for all layers, or fewer layers."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from streamprune.errors import UsageError
from streamprune.model.units import KIND_NAMES
from streamprune.output.form import OutputForm, width_fields, widths_of


class StockForm(OutputForm):
    """Layers of one width, which the class of the source's family takes."""

    @property
    def layout(self) -> str:
        dense = self.skeleton.all_units()
        if all(widths_of(units) == widths_of(dense[layer]) for layer, units in self.kept.items()):
            return "same" if len(self.kept) == len(self.skeleton.layers) else "stock"
        return "stock"

    def check(self) -> None:
        super().check()
        family = self.skeleton.family
        if len({tuple(widths_of(units).items()) for units in self.kept.values()}) > 1:
            raise UsageError(
                f"{family.model_type} can only have layers of one width; pass --stock (all layers, "
                f"{' and '.join(KIND_NAMES[kind] for kind in family.kinds)} only)"
            )
        check_loads(self.config())

    def config(self, zeros: float = 0.0) -> dict[str, Any]:
        fields = super().config(zeros)
        if self.layout != "same" and self.skeleton.family.stock_heads != "fixed":
            # Left out, it would be the hidden size over the new number of heads.
            fields["head_dim"] = self.skeleton.geometry.head_dim
        return fields

    def set_widths(self, fields: dict[str, Any]) -> None:
        if self.layout == "stock":
            fields.update(width_fields(self.skeleton, widths_of(next(iter(self.kept.values())))))


def check_loads(config: dict[str, Any]) -> None:
    """Refuse a config that its class does not accept.

    Raises:
        UsageError: with transformers' reason.
    """
    try:
        AutoConfig.for_model(**config)
    except Exception as error:  # transformers' checks raise many kinds
        reason = " ".join(str(error).split())
        raise UsageError(
            f"transformers would not load these widths as {config['model_type']} ({reason}); "
            "with units, keep the heads with --attention-ratio 0"
        ) from error
