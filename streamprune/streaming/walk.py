"""Forward sweeps in which somebody looks at each layer, changes its weights or makes its output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from streamprune.model.skeleton import LayerCall
from streamprune.paging.hidden_states import States, pieces
from streamprune.paging.pager import Page, Turn
from streamprune.storage.journal import END, Journal
from streamprune.streaming.inputs import Inputs
from streamprune.streaming.sweeper import Sweeper


@dataclass
class Visit:
    """Visit of a layer in a forward sweep, before its output is made: Linears can be watched, weights changed.

    Attributes:
        page: the layer as it is stored.
        weights: weights in the compute dtype, by their names inside the layer; copies in a sweep that may change them:
            what is changed here takes effect.
        hidden: the layer's input [n, seq, d].
    """

    sweeper: Sweeper
    page: Page
    weights: dict[str, Tensor]
    hidden: States
    call: LayerCall
    micro_batch: int

    @property
    def layer(self) -> int:
        """Index of the layer."""
        return self.page.layer

    def parts(self) -> Iterator[slice]:
        """Yield the sequences in micro-batches, as slices."""
        return self.sweeper.micro_batches(len(self.hidden), self.micro_batch)

    def run(self, hidden: States | None = None, *, inputs: Inputs[Any] | None = None) -> States:
        """Compute the layer's output [n, seq, d] with the weights as they are now.

        Args:
            hidden: instead of the layer's own input.
            inputs: takes in what the Linears are given.
        """
        hidden = self.hidden if hidden is None else hidden
        output, skeleton = self.sweeper.states_like(hidden), self.sweeper.skeleton
        for part in self.parts():
            with inputs.watching(skeleton.layers[self.layer]) if inputs is not None else nullcontext():
                output[part] = skeleton.run_layer(self.layer, self.weights, self.call, hidden[part])
        return output

    def give(self, inputs: Inputs[Any]) -> None:
        """Let `inputs` take in what the Linears are given, without the layer's output: its last product is not made."""
        skeleton = self.sweeper.skeleton
        for part in self.parts():
            with inputs.watching(skeleton.layers[self.layer], enough=True):
                skeleton.run_layer(self.layer, self.weights, self.call, self.hidden[part])


Visitor = Callable[[Visit], States]  # returns the hidden states that go on


@torch.no_grad()
def walk(
    sweeper: Sweeper,
    input_ids: Tensor,
    visit: Visitor,
    *,
    start: tuple[int, list[States]] | None = None,
    stop: int | None = None,
    change: bool = True,
    micro_batch: int | None = None,
    then: Turn = "back",
) -> States:
    """Make a forward sweep in which `visit` makes each layer's output; return the last one [n, seq, d].

    Args:
        input_ids: [n, seq].
        start: (layer, [its input]) where an earlier sweep had the same weights below that layer. The input is taken
            out, and is gone with that layer if nobody else has it.
        stop: the first layer that is not visited.
        change: the visitor may change weights.
        micro_batch: sequences per layer call, where not the sweeper's.
        then: the next sweep comes "back", or goes the same way "again".
    """
    sweeper.forget_boundaries()
    size = micro_batch or sweeper.micro_batch
    first, given = start or (0, [])
    hidden, calls = given.pop() if given else sweeper.embed(input_ids, size), sweeper.recorded(input_ids)
    with sweeper.pages(range(first, sweeper.n_layers if stop is None else stop), then) as pages:
        for page in pages:
            weights = sweeper.binder.bind(page, own=change)
            hidden = visit(Visit(sweeper, page, weights, hidden, calls[page.layer], size))
    return hidden


def journalled_walk(
    sweeper: Sweeper,
    journal: Journal | None,
    input_ids: Tensor,
    visit: Callable[[Visit], dict[str, States]],
    stop: int,
    *,
    resume: Callable[[dict[str, States]], None] = lambda carry: None,
    change: bool = True,
    micro_batch: int | None = None,
) -> None:
    """Walk up to layer `stop`, commit behind every layer, and begin where the journal says.

    Args:
        visit: gives what the layer hands on, by name; "hidden" goes to the next layer.
        resume: is given what an earlier run's walk handed on beside that.
        change, micro_batch: as in `walk`.
    """
    point, start = None if journal is None else journal.begin(), None
    if point is not None:
        sweeper.pager.skip(range(stop if point.layer == END else point.layer + 1))
        if point.layer == END:
            return
        carried = {name: sweeper.states(found, len(input_ids)) for name, found in point.carry.items()}
        start = point.layer + 1, [carried.pop("hidden")]
        resume(carried)

    def journalled(each: Visit) -> States:
        carry = visit(each)
        if journal is not None:
            journal.commit(each.layer, {name: pieces(states) for name, states in carry.items()})
        return carry["hidden"]

    walk(sweeper, input_ids, journalled, start=start, stop=stop, change=change, micro_batch=micro_batch)
    if journal is not None:
        journal.commit(END)
