"""Statistics that a method can ask for. A method sees tensors and scores, never files, paging or devices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from streamprune.model.units import KeptUnits, Kind, TensorRef
from streamprune.paging.device import at_once
from streamprune.paging.hidden_states import States, pieces
from streamprune.storage.checkpoint import check_finite
from streamprune.storage.journal import END, Journal, Key, Point
from streamprune.storage.tensor_store import MakeStore, make_store
from streamprune.streaming.binder import Perturbation
from streamprune.streaming.gradients import Consumer, GradientCollector, MakeCollector, PowerCollector, PowersConsumer
from streamprune.streaming.inputs import Inputs, Sums
from streamprune.streaming.masked import Trial, masked_losses
from streamprune.streaming.sweeper import Sweeper
from streamprune.streaming.walk import Visit, Visitor, journalled_walk, walk

UnitValues = Mapping[int, Mapping[Kind, Tensor]]  # of scores, by layer and kind
# Hidden states of left-out layers that are carried through the layers together.
STREAM_BYTES = 2 << 30


def passes_without(layers: Sequence[int], hidden_bytes: int) -> list[tuple[int, Sequence[int]]]:
    """List the passes of `Statistics.losses_without`: the layer where each begins, and the layers left out in it.

    Every pass but the first begins above the layers of the one before. `hidden_bytes` are those of all sequences.
    """
    size = max(1, STREAM_BYTES // hidden_bytes)
    groups = [layers[first : first + size] for first in range(0, len(layers), size)]
    return list(zip([0, *(group[-1] + 1 for group in groups[:-1])], groups, strict=True))


class Keep(Protocol):
    """Rule by which units or layers stay."""

    def __call__(self, values: Any, part: float = 1.0) -> KeptUnits:
        """Return what stays by the values of scores, when that part of what is to go does."""


class Count(Protocol):
    """Rule by which a number of units of each layer and kind go, the lowest."""

    def __call__(self, ordered: UnitValues, part: float = 1.0) -> Mapping[int, Mapping[Kind, int]]:
        """Return the numbers by scores from the lowest up, when that part of what is to go does."""


@dataclass(frozen=True)
class Goal:
    """Goal of a run: what will stay.

    Attributes:
        keep: the rule.
        budgets: parameters that stay, of units of some layers and kinds together, or of layers, by their keys.
        count: the rule in numbers, where units go.
    """

    keep: Keep
    budgets: Mapping[tuple[Key, ...], float]
    count: Count | None = None


class Statistics:
    """Source of statistics: each method here makes sweeps over one model and one calibration batch.

    Attributes:
        layers: the prunable layers.
        samples: calibration sequences.
        seed: the run's seed.
        store: gives what a method keeps between sweeps, by name: tensors by (layer, tensor).
        backend: to be handed to operations of `streamprune.kernels`.
        goal: what will stay, where a method may learn for it. note: takes in figures of a step, by name.
    """

    def __init__(
        self,
        sweeper: Sweeper,
        input_ids: Tensor | None,
        layers: Sequence[int],
        seed: int,
        journal: Journal | None = None,
        store: MakeStore = make_store,
        *,
        goal: Goal | None = None,
        note: Callable[..., None] = lambda **figures: None,
    ) -> None:
        self.sweeper, self.input_ids, self.layers, self.seed = sweeper, input_ids, layers, seed
        self._journal = journal
        self.store, self.backend = store, sweeper.backend
        self.goal, self.note = goal, note
        self._again = False  # the sweeper has kept the lowest prunable layer's input
        self._swept = False  # a gradient sweep was asked for, though an earlier run may have made it
        self.samples = 0 if input_ids is None else len(input_ids)

    @property
    def _ids(self) -> Tensor:
        assert self.input_ids is not None, "run.py reads the calibration text for every method that needs it"
        return self.input_ids

    def _begin(self) -> Point | None:
        """Begin the next sweep; return where an earlier run left it, None if nowhere."""
        return None if self._journal is None else self._journal.begin()

    def _commit(self, layer: int, carry: Mapping[str, States] | None = None, loss: float | None = None) -> None:
        if self._journal is not None:
            self._journal.commit(layer, {name: pieces(states) for name, states in (carry or {}).items()}, loss)

    def _carried(self, point: Point, name: str = "hidden") -> States:
        """Bring back the hidden states that an earlier run's sweep handed on."""
        return self.sweeper.states(point.carry[name], self.samples)

    def weights(self, consume: Callable[[TensorRef, Tensor], object]) -> None:
        """Hand over the scored matrices of the prunable layers as they are stored, in one sweep."""
        point, pager = self._begin(), self.sweeper.pager
        if point is not None and point.layer == END:
            pager.skip(self.layers)
            return
        left = [layer for layer in self.layers if point is None or layer > point.layer]
        pager.skip(self.layers, left)
        with self.sweeper.pages(left) as pages:
            for page in pages:
                for name, ref in self.sweeper.scored[page.layer].items():
                    weight = page.tensors[name]
                    check_finite(
                        self.sweeper.skeleton.checkpoint.path, f"layer {page.layer}, {name}", weight, at_once(weight)
                    )
                    consume(ref, weight)
                self._commit(page.layer)
        self._commit(END)

    def gradients(self, consume: Consumer, perturbation: Perturbation | None = None) -> float:
        """Hand over gradients by one forward and one backward sweep; return the mean loss in nats."""
        return self._sweep(partial(GradientCollector, consume), perturbation)

    def gradient_powers(self, consume: PowersConsumer, powers: Sequence[int]) -> float:
        """Hand over Σ_n |g_n|^p over the samples' own gradients, for p = 0 the mean gradient; else as `gradients`."""
        shape = (self.samples, self._ids.shape[1])
        return self._sweep(partial(PowerCollector, consume, powers, shape, self.backend), None)

    def inputs(
        self,
        kind: type[Sums],
        consume: Callable[[TensorRef, Tensor, Sums], Tensor | None],
        of: Callable[[TensorRef], bool] = lambda ref: True,
        *,
        prunes: bool = False,
    ) -> None:
        """Hand over sums over the inputs of each scored matrix, in one forward sweep.

        Args:
            kind: `Moments` or `Gram`; matrices with the same input are given the same object, one after another.
            consume: is given (matrix, its weight as stored, sums).
            of: tells whether a matrix is wanted.
            prunes: what `consume` returns, if anything, takes the place of the weight. Once a layer's matrices are
                through, the layer runs with the new ones, and that output goes on.
        """
        last = self.layers[-1]

        def collect(visit: Visit) -> States:
            if visit.layer not in self.layers:
                return visit.run()
            refs = {name: ref for name, ref in self.sweeper.scored[visit.layer].items() if of(ref)}
            inputs, output = Inputs(kind, list(refs), self.backend), visit.hidden
            if prunes or visit.layer == last:
                visit.give(inputs)
            else:
                output = visit.run(inputs=inputs)
            for name, ref in refs.items():
                weight = consume(ref, visit.page.tensors[name], inputs.sums.pop(name))
                if prunes and weight is not None:
                    visit.weights[name].copy_(weight)
                del weight  # it would stand beside what the next one is made of
            return visit.run() if prunes and visit.layer != last else output

        self._walk(collect, change=prunes)

    def hidden(self, consume: Callable[[int, Iterator[tuple[Tensor, Tensor]]], None]) -> None:
        """Hand over (layer, its inputs and outputs [., seq, d]) for each prunable layer, in one forward sweep."""

        def show(visit: Visit) -> States:
            output = visit.run()
            if visit.layer in self.layers:
                consume(visit.layer, ((visit.hidden[part], output[part]) for part in visit.parts()))
            return output

        self._walk(show, change=False)

    def _walk(self, visit: Visitor, *, change: bool = True) -> None:
        """Walk forwards up to the last prunable layer."""
        self._again, stop = False, self.layers[-1] + 1  # the boundaries go

        def carry(each: Visit) -> dict[str, States]:
            return {"hidden": visit(each)}

        journalled_walk(self.sweeper, self._journal, self._ids, carry, stop, change=change)

    def losses_without(self) -> dict[int, float]:
        """Return the mean loss in nats with each prunable layer left out, by layer.

        All of them are carried through one pass over the layers, as far as their hidden states fit into STREAM_BYTES.
        """
        skeleton, dense = self.sweeper.skeleton, list[States]()  # the whole model's: one, or none at first
        nbytes = self._ids.numel() * skeleton.config.hidden_size * skeleton.dtype.itemsize
        losses: MutableMapping[Key, Tensor] = {} if self._journal is None else self._journal.store("losses")
        for begin, layers in passes_without(self.layers, nbytes):
            point = self._begin()
            if point is not None and point.layer == END:
                self.sweeper.pager.skip(range(begin, self.sweeper.n_layers))
                # Of the last pass that is through: the next one begins there.
                dense = [self._carried(point, "dense")] if point.carry else []
                continue
            streams = self._without(layers, begin, dense, point)
            for layer in layers:
                loss, _ = self.sweeper.head_loss(streams.pop(layer), self._ids, with_grad=False)
                losses[layer, "loss"] = torch.tensor(loss, dtype=torch.float64)
            self._commit(END, {"dense": dense[0]})
        return {layer: float(losses[layer, "loss"]) for layer in self.layers}

    def begin_pass(self) -> bool:
        """Tell whether a sweep of `losses_of` is still to come: an earlier run may have made it."""
        point = self._begin()
        if point is None or point.layer != END:
            return True
        self.sweeper.pager.skip(range(self.sweeper.n_layers))
        return False

    def losses_of(
        self, rows: Sequence[int], trials: Sequence[Trial], inverses: Mapping[Key, Tensor] = MappingProxyType({})
    ) -> list[float]:
        """Return the mean loss in nats of each trial, in one forward sweep, which `begin_pass` has said is to come.

        Whoever asks says `finish_pass` when what was learnt from the losses is in a store. `trials` are on the
        calibration sequences `rows`; `inverses` are of matrices whose lost lines are filled in (filling.py).
        """
        return masked_losses(self.sweeper, self._ids[list(rows)], trials, self.layers[0], inverses)

    def finish_pass(self) -> None:
        """Record that the sweep of `losses_of` is through, with what is in stores."""
        self._commit(END)

    def _without(
        self, layers: Sequence[int], begin: int, dense: list[States], point: Point | None
    ) -> dict[int, States]:
        """Compute the hidden states [n, seq, d] after the last layer without each of `layers`, by layer.

        `dense` holds the input of layer `begin` in the whole model, and in the end that of the layer above `layers`.
        """
        streams: dict[int, States] = {}
        if point is not None:
            self.sweeper.pager.skip(range(begin, point.layer + 1))
            streams = {int(name): self._carried(point, name) for name in point.carry if name != "dense"}
            begin, dense[:] = point.layer + 1, [self._carried(point, "dense")]

        def carry(visit: Visit) -> States:
            for layer, hidden in streams.items():
                streams[layer] = visit.run(hidden)
            if visit.layer in layers:
                streams[visit.layer] = visit.hidden
            if visit.layer <= layers[-1]:  # above them the whole model is not needed any more
                dense[:] = [visit.run()]
            self._commit(visit.layer, {"dense": dense[0]} | {str(layer): hidden for layer, hidden in streams.items()})
            return dense[0]

        given = dense if begin <= layers[-1] else list(dense)  # above them it stays
        walk(self.sweeper, self._ids, carry, start=(begin, given) if given else None, change=False)
        return streams

    def _sweep_layers(self, again: bool, stop: int | None = None) -> list[int]:
        """List the layers of a sweep: forwards to layer `stop`, `again` from the lowest prunable one, and back."""
        layers = range(self.sweeper.n_layers if stop is None else stop)
        return [*layers[self.layers[0] if again else 0 :], *layers[self.layers[0] :]]

    def _sweep(self, collector: MakeCollector, perturbation: Perturbation | None) -> float:
        sweeper, lowest, ids = self.sweeper, self.layers[0], self._ids
        point, planned = self._begin(), self._sweep_layers(self._swept)
        self._swept = True
        if point is not None and point.layer in (END, lowest):
            sweeper.pager.skip(planned)
            return math.nan if point.loss is None else point.loss  # no method asks for an earlier sweep's
        # Below the first prunable layer nothing ever moves: later sweeps start from its input.
        sweeper.pager.skip(planned, self._sweep_layers(self._again, None if point is None else point.layer))
        hidden = sweeper.forward_keeping(
            ids,
            lowest,
            again=self._again,
            prunable=self.layers,
            perturbation=perturbation,
            collector=collector,
            stop=None if point is None else point.layer,
        )
        self._again = True
        if point is None:
            loss, grad = sweeper.head_loss(hidden, ids, with_grad=True)
        else:
            # What was forwards of the layers above is through; of those below, the inputs are made again.
            assert point.loss is not None, "the forward half was through"
            loss, grad = point.loss, self._carried(point)
        assert grad is not None
        sweeper.backward(
            ids,
            grad,
            self.layers,
            collector,
            perturbation=perturbation,
            below=None if point is None else point.layer,
            done=lambda layer, grad: self._commit(layer, {"hidden": grad}, loss),
        )
        self._commit(END, loss=loss)
        return loss
