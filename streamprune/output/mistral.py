"""Form of a bias-free Llama that is written as a Mistral, whose class takes any number of heads."""

from __future__ import annotations

from typing import Any

from streamprune.errors import UsageError
from streamprune.output.form import width_fields, widths_of
from streamprune.output.stock import StockForm

# Where a Llama's config.json leaves these out, a Mistral would fill in other values.
LLAMA_DEFAULTS = ("vocab_size", "hidden_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")


class MistralForm(StockForm):
    """Layers of one width under another family's name."""

    keeps_code = False

    def check(self) -> None:
        family, source = self.skeleton.family, self.skeleton.checkpoint.config
        biased = [name for name in ("attention_bias", "mlp_bias") if source.get(name)]
        if family.model_type != "llama" or biased:
            what = f"this one has {biased[0]}" if biased else f"this is {family.model_type}"
            raise UsageError(f"--emit mistral is for bias-free llama models; {what}")
        super().check()

    def config(self, zeros: float = 0.0) -> dict[str, Any]:
        fields = super().config(zeros) | {"head_dim": self.skeleton.geometry.head_dim}
        for name in LLAMA_DEFAULTS:
            fields.setdefault(name, getattr(self.skeleton.config, name))
        # Without a word of it a Mistral has a sliding window.
        return fields | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}

    def set_widths(self, fields: dict[str, Any]) -> None:
        super().set_widths(fields)
        fields.update(width_fields(self.skeleton, widths_of(next(iter(self.kept.values())))))
