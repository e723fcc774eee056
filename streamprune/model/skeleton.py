"""Skeleton of a model: layers on meta, embeddings and head real, and one decoder layer as a pure function.

transformers itself says how each layer is called: its own forward runs once for one sequence with a port in
the place of every decoder layer, and the port keeps the arguments (masks, rotary embeddings, per-layer sliding
windows). Nothing about masks or positions is written here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from streamprune.errors import CheckpointError
from streamprune.model import contents
from streamprune.model.families import Family, Piece, family_of, geometry_of, layer_geometry
from streamprune.model.model_config import empty_model, load_config, naming_the_field
from streamprune.model.units import Geometry, KeptUnits, all_units
from streamprune.storage.checkpoint import INDEX_FILE, Checkpoint, TensorEntry

LOGITS_BYTES = 64 << 20  # float32 logits made at a time; a vocabulary of 128k words never exists for all tokens


@dataclass(frozen=True)
class LayerCall:
    """Arguments with which transformers calls one layer, apart from the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Port(nn.Module):
    """Module that stands where a decoder layer would be and hands its input to the skeleton."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.handler: Callable[[int, Tensor, LayerCall], Tensor] | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert self.handler is not None, "the skeleton sets a handler before it runs the model"
        return self.handler(self.index, hidden_states, LayerCall(args, kwargs))


class Skeleton:
    """Causal language model without its layers' weights.

    Args:
        checkpoint: read for embeddings, final norm and head.
        dtype: compute dtype of those and of the layers.
        device: where they live. attentions: whether an implementation of attention runs there, by its name.
        load: read embeddings, final norm and head; without, sizes are known and nothing can be run.

    Attributes:
        config: transformers' config. family: the row of the family table.
        untied: the config ties the head, but the checkpoint has another one; it counts, as in transformers.
        layers: the decoder layers, on meta, in order.
        entries: for each layer, its tensors in the checkpoint by their names inside the layer, the checkpoint's.
        places: for each layer, of tensors that are named otherwise in the model: the parameter's name inside the layer,
            and where in it the tensor lies; None for all of it.
        notes: what of the checkpoint is not taken as it is, a line each. From here on the checkpoint's `tensors` are
            those that the model uses, by the model's names, and its `config` says nothing of quantisation.

    Raises:
        CheckpointError: unknown family, a config that no model can be built from, quantised weights, a tensor that is
            missing or of another shape.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        *,
        attentions: Callable[[str], bool] = lambda name: name == "sdpa",
        trust_remote_code: bool = False,
        load: bool = True,
    ) -> None:
        self.family: Family = family_of(checkpoint.config, checkpoint.path)
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        self.config = load_config(checkpoint.path, checkpoint.config, trust_remote_code=trust_remote_code)
        self.model, self.notes = empty_model(
            self.config,
            checkpoint.path,
            checkpoint.config,
            dtype=dtype,
            attentions=attentions,
            trust_remote_code=trust_remote_code,
        )
        self.layers: list[nn.Module] = list(self.model.get_submodule(self.family.layers))
        self._shapes = [{name: each.shape for name, each in layer.named_parameters()} for layer in self.layers]
        self.places = [self._find_places(index) for index in range(len(self.layers))]
        self._ports = [_Port(index) for index in range(len(self.layers))]
        parent, _, attribute = self.family.layers.rpartition(".")
        # From here on the model's own parameters are those outside the layers.
        setattr(self.model.get_submodule(parent), attribute, nn.ModuleList(self._ports))
        self._strip, said = contents.settle(checkpoint, self._wanted(), f"{self.model.base_model_prefix}.")
        self.entries = [self._layer_entries(index) for index in range(len(self.layers))]
        self._rest = self._rest_entries()
        used = {entry.name for entries in (*self.entries, self._rest) for entry in entries.values()}
        self.notes += said + contents.leave_out(checkpoint, used)
        self.loaded, self.untied = load, False
        if load:
            self._load_rest()
            # Some configs fail only when a layer is called: better now than when work has begun.
            with naming_the_field(checkpoint.path, checkpoint.config, "call a layer"):
                self.record(torch.zeros(1, 2, dtype=torch.int64))
        elif self.config.tie_word_embeddings:
            self.model.tie_weights()  # so that its parameters are counted once

    @property
    def positions(self) -> int:
        """Length of the longest sequence that the model takes, in tokens."""
        return getattr(self.config, "max_position_embeddings", None) or 10**9

    def stored_name(self, name: str) -> str:
        """Return the checkpoint's name of a tensor of the model (base-model checkpoints lack the prefix)."""
        if name in self.checkpoint.tensors:
            return name
        return dict(self.family.stored_as).get(name, name.removeprefix(self._strip))

    def layer_prefix(self, index: int) -> str:
        """Return what the checkpoint's names of the tensors of layer `index` begin with."""
        return self.stored_name(f"{self.family.layers}.{index}.")

    def shapes(self, index: int) -> dict[str, torch.Size]:
        """Return the shapes of the parameters of layer `index`, by their names inside the layer."""
        return self._shapes[index]

    def matrices(self, index: int) -> dict[str, bool]:
        """Name the Linears' weights of layer `index`, and whether each is stored transposed, as [d_in, d_out].

        Experts and their router are none: what they are given cannot be watched, nor their gradients taken one by one.
        """
        return {
            f"{name}.weight": isinstance(module, Conv1D)
            for name, module in self.layers[index].named_modules()
            if isinstance(module, nn.Linear | Conv1D)
        }

    @cached_property
    def geometry(self) -> Geometry:
        """Sizes of a layer as the config has them; single layers may be narrower."""
        return geometry_of(self.family, self.config)

    @cached_property
    def geometries(self) -> list[Geometry]:
        """Sizes of each layer, by its tensors."""
        return [
            layer_geometry(self.family, self.geometry, self._layer_shapes(index)) for index in range(len(self.layers))
        ]

    def all_units(self, layers: Iterable[int] | None = None) -> KeptUnits:
        """List the units of these layers, by default of all."""
        layers = range(len(self.layers)) if layers is None else layers
        return {layer: all_units(self.geometries[layer], self.family.kinds) for layer in layers}

    @property
    def parameters(self) -> int:
        """Number of parameters of the whole model, tied ones once."""
        rest = sum(parameter.numel() for parameter in self.model.parameters())
        return rest + sum(parameter.numel() for layer in self.layers for parameter in layer.parameters())

    @property
    def resident_bytes(self) -> int:
        """Bytes of the embeddings, final norm and head that stay in memory."""
        return sum(parameter.nbytes for parameter in self.model.parameters())

    def record(self, input_ids: Tensor) -> list[LayerCall]:
        """Record how transformers calls each layer for sequences as long as `input_ids` [1, seq]: a call per layer."""
        # One sequence: there is no padding, so masks and positions are the same for every other.
        return self._record(lambda: self.model.base_model(input_ids[:1].to(self.device), use_cache=False))

    def record_without_weights(self, seq: int) -> list[LayerCall]:
        """Record the same for sequences of `seq` tokens; where nothing is loaded, on a CPU, with zeros in its place."""
        model = self.model.base_model
        empty = (each for each in (*model.named_parameters(), *model.named_buffers()) if each[1].is_meta)
        zeros = {name: torch.zeros((), dtype=each.dtype).expand(each.shape) for name, each in empty}
        where = self.device if self.loaded else torch.device("cpu")
        ids = torch.zeros(1, seq, dtype=torch.int64, device=where)
        return self._record(lambda: functional_call(model, zeros, (ids,), {"use_cache": False}))

    def _record(self, run: Callable[[], Any]) -> list[LayerCall]:
        calls: dict[int, LayerCall] = {}

        def keep(index: int, hidden_states: Tensor, call: LayerCall) -> Tensor:
            calls[index] = call
            return hidden_states

        with torch.no_grad(), self._through(keep):
            run()
        return [calls[index] for index in range(len(self.layers))]

    @torch.no_grad()
    def embed(self, input_ids: Tensor) -> Tensor:
        """Compute the hidden states before layer 0, [n, seq, d], of `input_ids` [n, seq]."""
        first: list[Tensor] = []

        def keep(index: int, hidden_states: Tensor, call: LayerCall) -> Tensor:
            if index == 0:
                first.append(hidden_states)
            return hidden_states

        with self._through(keep):
            self.model.base_model(input_ids.to(self.device), use_cache=False)
        return first[0]

    @property
    def head_width(self) -> int:
        """Number of floats that the head makes of a token at the most: logits, or the final norm's two copies of it."""
        return max(self.config.vocab_size, 2 * self.config.hidden_size)

    @property
    def head_tokens(self) -> int:
        """Number of tokens that go through the head together."""
        return max(1, LOGITS_BYTES // (4 * self.head_width))

    def head(self, hidden_states: Tensor) -> Tensor:
        """Compute logits [n, seq, vocabulary] from the last layer's output [n, seq, d]: norm, head, soft-capping.

        Differentiable with respect to `hidden_states`. The model's own forward runs on placeholder ids, and its
        last port puts `hidden_states` in.
        """
        last = len(self.layers) - 1

        def replace(index: int, placeholder: Tensor, call: LayerCall) -> Tensor:
            return hidden_states if index == last else placeholder

        ids = torch.zeros(hidden_states.shape[:2], dtype=torch.int64, device=self.device)
        with self._through(replace):
            return self.model(ids, use_cache=False).logits

    def run_layer(self, index: int, weights: Mapping[str, Tensor], call: LayerCall, hidden: Tensor) -> Tensor:
        """Run layer `index` as a function of its weights and of hidden states [n, seq, d]; return its output."""
        # No module is changed, so the weights can be views into a slot that the next layer will overwrite.
        output = functional_call(self.layers[index], dict(weights), (hidden, *call.args), call.kwargs)
        return output[0] if isinstance(output, tuple) else output

    @contextmanager
    def _through(self, handler: Callable[[int, Tensor, LayerCall], Tensor]) -> Iterator[None]:
        for port in self._ports:
            port.handler = handler
        try:
            yield
        finally:
            for port in self._ports:
                port.handler = None

    def _entry(self, name: str, shape: torch.Size) -> TensorEntry:
        path, stored = self.checkpoint.path, self.stored_name(name)
        entry = self.checkpoint.tensors.get(stored)
        if entry is None:
            if stored in self.checkpoint.misplaced:
                file = self.checkpoint.misplaced[stored]
                raise CheckpointError(
                    f"{path / INDEX_FILE} places {stored} in {file.name}, which does not hold it; download or export "
                    "the checkpoint again"
                )
            raise CheckpointError(
                f"{path} has no tensor {stored}, which its config.json calls for; download or export it again"
            )
        if entry.shape != tuple(shape):
            raise CheckpointError(
                f"{path}: {stored} is {list(entry.shape)}, its config.json calls for {list(shape)}; download or export "
                "it again"
            )
        assert entry.dtype.is_floating_point, "what is not has been called quantised"
        return entry

    def _find_places(self, index: int) -> dict[str, tuple[str, Piece | None]]:
        renamed, fused = dict(self.family.stored_as), {each.parameter: each for each in self.family.fused}
        places: dict[str, tuple[str, Piece | None]] = {}
        for name, shape in self.shapes(index).items():
            if name in fused:
                places |= {stored: (name, place) for stored, place in fused[name].places(shape)}
            elif name in renamed:
                places[renamed[name]] = (name, None)
        return places

    def _layer_shapes(self, index: int) -> dict[str, torch.Size]:
        """Return the shapes of the tensors that are stored of layer `index`, by their names inside the layer."""
        parameters = dict(self.layers[index].named_parameters())
        moved = {name for name, _ in self.places[index].values()}
        shapes = {name: parameter.shape for name, parameter in parameters.items() if name not in moved}
        for stored, (name, place) in self.places[index].items():
            shapes[stored] = (parameters[name] if place is None else parameters[name][place]).shape
        return shapes

    def _layer_entries(self, index: int) -> dict[str, TensorEntry]:
        prefix = f"{self.family.layers}.{index}."
        return {name: self._entry(prefix + name, shape) for name, shape in self._layer_shapes(index).items()}

    @property
    def _tied(self) -> dict[str, str]:
        """Names of parameters that the config ties, by each other's: a shared tensor is stored under either."""
        if not self.config.tie_word_embeddings:
            return {}
        tied: dict[str, str] = dict(getattr(self.model, "_tied_weights_keys", None) or {})
        return tied | {source: name for name, source in tied.items()}

    def _wanted(self) -> dict[tuple[str, ...], torch.Size]:
        """Shape of every tensor of the model, by the names that it may have in a file, the model's own first."""
        renamed = dict(self.family.stored_as)
        wanted: dict[tuple[str, ...], torch.Size] = {
            (f"{self.family.layers}.{index}.{name}",): shape
            for index in range(len(self.layers))
            for name, shape in self._layer_shapes(index).items()
        }
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names = (name, self._tied[name]) if name in self._tied else (name,)
            wanted[(*names, *(renamed[each] for each in names if each in renamed))] = parameter.shape
        return wanted

    def _rest_entries(self) -> dict[str, TensorEntry]:
        """Find the stored tensors of everything outside the layers, by the parameters' names."""
        entries = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            stored = name if self.stored_name(name) in self.checkpoint.tensors else self._tied.get(name, name)
            entries[name] = self._entry(stored, parameter.shape)
        return entries

    def _load_rest(self) -> None:
        """Fill in everything outside the layers, and tie the head where the config says so."""
        values = dict[str, Tensor]()
        for name, entry in self._rest.items():
            if entry.name not in values:  # a tied head is stored once
                values[entry.name] = torch.empty(entry.shape, dtype=self.dtype, device=self.device)
                self.checkpoint.fill(entry.name, values[entry.name])
            set_module_tensor_to_device(self.model, name, self.device, values[entry.name], dtype=self.dtype)
        self.untied = self._own_head()
        if not self.untied:
            self.model.tie_weights()
        for name, parameter in self.model.named_parameters():
            if parameter.is_meta:
                raise CheckpointError(
                    f"{self.checkpoint.path} has no tensor {self.stored_name(name)}; download or export it again"
                )
            parameter.requires_grad_(False)
        self.model.to(self.device)

    def release(self) -> None:
        """Give up what was loaded, whoever still refers to it: errors inside transformers' imports keep our frames."""
        self.model.to("meta")
        self.loaded = False
        if not self.untied and self.config.tie_word_embeddings:
            self.model.tie_weights()  # or its parameters are counted twice

    def _own_head(self) -> bool:
        """Tell whether both of a pair that the config ties are stored, and differ."""
        pairs = [(name, other) for name, other in self._tied.items() if name < other]
        own = [pair for pair in pairs if all(self.stored_name(n) in self.checkpoint.tensors for n in pair)]
        return any(not torch.equal(*map(self.model.get_parameter, pair)) for pair in own)
