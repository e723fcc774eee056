"""Forms of output: how the layers are laid out and stored, the config that says so, what loads it.

`OutputForm` is all that the rest of the package asks, and one object of it goes through a run: the decision makes it
for widths that are known before there are scores, `keep` gives the same form with the units that stay. A format is a
subclass in a file of its own that changes what differs: `stock.py`, `mistral.py`, `ragged_form.py`, `sparse24.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from streamprune.errors import UsageError
from streamprune.model.masking import bias_of, output_matrices
from streamprune.model.skeleton import Skeleton
from streamprune.model.units import KeptUnits, Kind
from streamprune.output.slicing import Slicer
from streamprune.storage.shards import TensorSpec


@dataclass(frozen=True)
class OutputForm:
    """Form of output, for what stays of one model.

    Attributes:
        skeleton: skeleton of the source.
        kept: units per layer and kind; layers that are not in it go.
        layers: the prunable ones.
        biases: o and down get biases in the place of their pruned inputs, added to those there are.
        own_code: a modelling file comes with the output, and is needed to load it.
        keeps_code: modelling code that the source brings knows these layers too.
        stored_as: name of a storage format that is not whole matrices, which `readable` makes of it.
        read_by: what has to be known of those that can read it, if not everything can.
        loading: lines of Python that come before it is loaded.
    """

    skeleton: Skeleton
    kept: KeptUnits
    layers: range
    biases: bool = False

    own_code: ClassVar[bool] = False
    keeps_code: ClassVar[bool] = True
    stored_as: ClassVar[str] = ""
    read_by: ClassVar[str] = ""
    loading: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def check_machine(cls) -> None:
        """Refuse to begin where something is not installed that writing takes.

        Raises:
            UsageError: with the remedy.
        """

    @classmethod
    @contextmanager
    def readable(cls, directory: Path) -> Iterator[Path]:
        """Give an output of this form as whole matrices, for as long as the block runs: itself, or a copy."""
        yield directory

    def keep(self, kept: KeptUnits) -> OutputForm:
        """Return the form of the same output when these units stay."""
        return replace(self, kept=kept)

    def check(self) -> None:
        """Refuse what nothing can load; only the widths of `kept` matter.

        Raises:
            UsageError: with the remedy.
        """
        source = self.skeleton.checkpoint.config
        if len(self.kept) < len(self.skeleton.layers) and source.get("scale_attn_by_inverse_layer_idx"):
            raise UsageError(
                "attention of this model is scaled by the layer's number, which changes; prune units instead"
            )

    @property
    def layout(self) -> str:
        """Layout of the layers: "same" as in the source, "stock" (one width for all, or fewer), or "ragged"."""
        raise NotImplementedError

    def note(self, allocation: str | None) -> str:
        """Say before a run with this `allocation` what is special about loading its output; mostly nothing."""
        return ""

    def config(self, zeros: float = 0.0) -> dict[str, Any]:
        """Make config.json of the output: the source's JSON with the widths changed and nothing else.

        The JSON never passes through transformers, which would lose what it does not know (rope_theta of older files).

        Args:
            zeros: share of zeros that pruning made, among all parameters.
        """
        fields = copy.deepcopy(self.skeleton.checkpoint.config)
        if self.skeleton.untied:
            fields["tie_word_embeddings"] = False
        self.set_widths(fields)
        if len(self.kept) < len(self.skeleton.layers):
            fields.update(_layer_fields(self.skeleton, self.kept))
        return fields

    def set_widths(self, fields: dict[str, Any]) -> None:
        """Change the widths in the contents of config.json, in place."""

    @classmethod
    def versions(cls) -> dict[str, str]:
        """Return the versions of the packages that writing takes beside the usual ones, by name."""
        return {}

    def files(self) -> Mapping[str, str]:
        """Return the texts of further files of the output, by name."""
        return {}

    @cached_property
    def slicer(self) -> Slicer:
        """Slicer that says what remains of each tensor."""
        return Slicer(self.skeleton, self.kept)

    @cached_property
    def added_biases(self) -> dict[str, str]:
        """Biases that the source has not, by the stored names of the weights that they follow."""
        added = {}
        for layer in self.kept if self.biases else ():
            for member in output_matrices(self.skeleton, layer):
                if bias_of(member.tensor) not in self.skeleton.entries[layer]:
                    prefix = self.skeleton.layer_prefix(layer)
                    added[prefix + member.tensor] = prefix + bias_of(member.tensor)
        return added

    @cached_property
    def specs(self) -> list[TensorSpec]:
        """Specs of all tensors of the output, by the source's names but for the layers' numbers, in its order."""
        return [spec for name in self.skeleton.checkpoint.tensors for spec in self.specs_of(name)]

    def specs_of(self, name: str) -> list[TensorSpec]:
        """List what comes of the source's tensor `name`: nothing if its layer goes; behind a weight its added bias."""
        entry = self.skeleton.checkpoint.tensors[name]
        spec = self.slicer.spec(entry)
        if spec is None:
            return []
        specs = self.store_specs(name, spec)
        if name in self.added_biases:
            bias = self.slicer.name(self.added_biases[name])
            assert bias is not None, "its layer stays"
            specs = [*specs, TensorSpec(bias, entry.dtype, (self.skeleton.config.hidden_size,))]
        return specs

    @property
    def added_parameters(self) -> int:
        """Number of parameters of the biases that the source has not."""
        return len(self.added_biases) * self.skeleton.config.hidden_size

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the output."""
        return sum(spec.nbytes for spec in self.specs)

    def store_specs(self, name: str, spec: TensorSpec) -> list[TensorSpec]:
        """List what is stored in the place of `spec`, which is what remains of the source's tensor `name`."""
        return [spec]

    def store(self, name: str, target: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return the tensors of `store_specs`, by name, made of the remaining `tensor`: `target` in the output."""
        return {target: tensor}


def _layer_fields(skeleton: Skeleton, kept: Iterable[int]) -> dict[str, Any]:
    """Cut the fields of config.json that go by layer: their number, and each list with an entry per layer."""
    layers, n_layers = list(kept), len(skeleton.layers)
    names = skeleton.config.attribute_map
    fields: dict[str, Any] = {names.get("num_hidden_layers", "num_hidden_layers"): len(layers)}
    # From transformers' config, which has the lists that config.json leaves out too: filled in anew for fewer layers,
    # they would no longer say of each layer what it was.
    for name, value in skeleton.config.to_dict().items():
        if "layer" in name and isinstance(value, list) and len(value) == n_layers:
            fields[name] = [value[layer] for layer in layers]
    return fields


def width_fields(skeleton: Skeleton, counts: Mapping[Kind, int]) -> dict[str, int]:
    """Make the fields of config.json for a layer with so many units of each kind."""
    fields = {skeleton.family.channels_key: counts["channel"]} if "channel" in counts else {}
    if "kv_group" in counts:
        groups = counts["kv_group"]
        fields |= {"num_attention_heads": groups * skeleton.geometry.n_rep, "num_key_value_heads": groups}
    return fields


def widths_of(layer: Mapping[Kind, list[int]]) -> dict[Kind, int]:
    """Count the units of each kind that stay in a layer."""
    return {kind: len(units) for kind, units in layer.items()}
