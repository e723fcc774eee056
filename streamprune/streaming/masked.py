"""Losses of a model with some of its units or layers masked: one pass over the layers serves many masks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from streamprune.model.masking import mask_layer, output_matrices
from streamprune.model.skeleton import Skeleton
from streamprune.model.units import Kind, Member, kept_lines, module_of
from streamprune.paging.device import is_gpu
from streamprune.paging.hidden_states import States
from streamprune.storage.journal import Key
from streamprune.streaming.filling import Filling, fillings
from streamprune.streaming.sweeper import Sweeper, blocks_of_tokens
from streamprune.streaming.walk import Visit, walk
from streamprune.streaming.watch import SeeInput, watch_inputs

CUT_TOKENS = 512  # of a mask, from which on a GPU cuts its weights
# Widths of cut weights are multiples of it: on a CPU oneDNN compiles a product in half precision for each new shape,
# and keeps a thousand of them, in up to a gigabyte.
WIDTH_STEP = 16


@dataclass(frozen=True)
class Trial:
    """Mask that is tried on some sequences.

    Attributes:
        kept: which units stay, bool [units], by layer and kind; layers that are not in it are whole.
        gone: layers whose residual branches are left out.
        sequences: the first of its sequences among those of the pass, and the one behind the last.
    """

    kept: Mapping[int, Mapping[Kind, Tensor]]
    gone: frozenset[int]
    sequences: slice

    @property
    def count(self) -> int:
        """Number of its sequences."""
        return self.sequences.stop - self.sequences.start


@torch.no_grad()
def masked_losses(
    sweeper: Sweeper,
    input_ids: Tensor,
    trials: Sequence[Trial],
    first: int,
    inverses: Mapping[Key, Tensor] = MappingProxyType({}),
) -> list[float]:
    """Compute the mean next-token loss (nats) of each trial, in one forward sweep.

    Up to layer `first`, the lowest that a mask changes, trials on the same sequences are one.

    Args:
        input_ids: [n, seq].
        inverses: P of matrices whose lost lines are filled in (filling.py), by layer and tensor.
    """
    skeleton, count = sweeper.skeleton, max(trial.count for trial in trials)
    starts = [sum(each.count for each in trials[:number]) for number in range(len(trials))]
    ids = torch.cat([input_ids[trial.sequences] for trial in trials])
    cuts = cuts_weights(skeleton.device, count * input_ids.shape[1])

    def visit(each: Visit) -> States:
        """Compute a layer's output for every trial."""
        if each.layer < first:
            return each.run()
        # The first layer with masks is given what trials share, and puts out what each has for itself.
        given = [trial.sequences.start for trial in trials] if each.layer == first else starts
        output, turned = sweeper.states_like(each.hidden, count=len(ids)), dict[str, Tensor]()
        if count <= sweeper.micro_batch and _leaves_weights(skeleton, each.layer, cuts=cuts):
            _run_together(sweeper, each, trials, given, output, inverses)
            return output
        for trial, begin, end in zip(trials, given, starts, strict=True):
            kept = _kept(trial, each.layer)
            filled = fillings(skeleton, each.layer, kept, inverses)
            weights, inputs = masked_layer(skeleton, each.layer, each.weights, kept, filled, turned if cuts else None)
            for part in sweeper.micro_batches(trial.count):
                hidden = each.hidden[begin + part.start : begin + part.stop]
                if each.layer not in trial.gone:
                    with watch_inputs(skeleton.layers[each.layer], inputs):
                        hidden = skeleton.run_layer(each.layer, weights, each.call, hidden)
                output[end + part.start : end + part.stop] = hidden
            del weights, inputs, filled  # before there are the next trial's
        return output

    hidden = walk(sweeper, input_ids, visit, change=False, then="again")
    losses = sequence_losses(sweeper, hidden, ids)
    return [float(losses[start : start + each.count].mean()) for start, each in zip(starts, trials, strict=True)]


def _kept(trial: Trial, layer: int) -> dict[Kind, Tensor]:
    """Find the units of a layer that stay, int64: as needed, since they take eight times a mask's memory."""
    return {kind: mask.nonzero().flatten() for kind, mask in trial.kept.get(layer, {}).items()}


def _run_together(
    sweeper: Sweeper,
    visit: Visit,
    trials: Sequence[Trial],
    given: Sequence[int],
    output: States,
    inverses: Mapping[Key, Tensor],
) -> None:
    """Compute a layer's output for every trial, up to a micro-batch of sequences at once, whatever masks they have.

    Args:
        given: where each trial's sequences begin in the layer's input; each has a micro-batch or less.
    """
    skeleton, layer = sweeper.skeleton, visit.layer
    batch: list[Trial] = []
    parts: list[Tensor] = []
    places: list[slice] = []

    def run() -> None:
        """Compute the trials that are together, and begin anew."""
        hidden = torch.cat(parts)
        parts.clear()
        with watch_inputs(skeleton.layers[layer], _inputs_of(skeleton, layer, batch, inverses)):
            hidden = skeleton.run_layer(layer, visit.weights, visit.call, hidden)
        for place, part in zip(places, hidden.split([each.count for each in batch]), strict=True):
            output[place] = part
        batch.clear()
        places.clear()

    end = 0
    for trial, begin in zip(trials, given, strict=True):
        place, end = slice(end, end + trial.count), end + trial.count
        if layer in trial.gone:
            output[place] = visit.hidden[begin : begin + trial.count]  # in its turn: what follows is read ahead
            continue
        if sum(each.count for each in batch) + trial.count > sweeper.micro_batch:
            run()
        batch.append(trial)
        parts.append(visit.hidden[begin : begin + trial.count])
        places.append(place)
    if batch:
        run()


def _leaves_weights(skeleton: Skeleton, layer: int, *, cuts: bool) -> bool:
    """Tell whether masks change a layer's inputs alone."""
    return not cuts and all(_way(skeleton, layer, kind, cut=False) == "zeroed" for kind in skeleton.family.kinds)


def tried_together(skeleton: Skeleton, layers: Sequence[int], tokens: int) -> bool:
    """Tell whether in some layer sequences of several masks, each of so many tokens, are computed at once.

    A hundred tokens are too few for a GPU: it would wait for its memory, and for kernels to be launched.
    """
    cuts = cuts_weights(skeleton.device, tokens)
    return any(_leaves_weights(skeleton, layer, cuts=cuts) for layer in layers)


def _inputs_of(
    skeleton: Skeleton, layer: int, trials: Sequence[Trial], inverses: Mapping[Key, Tensor]
) -> dict[str, SeeInput]:
    """Return what is made of the inputs of o and down, where sequences of several masks are computed at once."""
    geometry, inputs = skeleton.geometries[layer], dict[str, SeeInput]()
    kept, counts = [_kept(trial, layer) for trial in trials], [trial.count for trial in trials]
    for member in output_matrices(skeleton, layer):
        whole = torch.arange(geometry.units(member.kind))
        lines = [kept_lines(member, geometry, each.get(member.kind, whole)) for each in kept]
        width = skeleton.shapes(layer)[member.tensor][member.dim]
        if all(len(each) == width for each in lines):
            continue
        inverse = inverses.get((layer, member.tensor))
        if inverse is None:
            inputs[member.tensor] = Zeroed(width, lines, counts, skeleton.device)
        else:
            inputs[member.tensor] = _Filled(inverse, lines, counts)
    return inputs


def sequence_losses(sweeper: Sweeper, hidden: States, input_ids: Tensor) -> Tensor:
    """Compute the mean next-token loss (nats) of each sequence from the last layer's output: float64 [n]."""
    n, seq, _ = hidden.shape
    targets = input_ids.to(sweeper.skeleton.device)
    losses = torch.zeros(n, dtype=torch.float64, device=targets.device)
    for rows, blocks in blocks_of_tokens(n, seq - 1, sweeper.skeleton.head_tokens):
        states = hidden[rows]
        for columns in blocks:
            logits = sweeper.skeleton.head(states[:, columns])
            logits = logits if logits.dtype == torch.float64 else logits.float()
            following = targets[rows, columns.start + 1 : columns.stop + 1]
            loss = F.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="none")
            losses[rows] += loss.view_as(following).double().sum(dim=1)
    return losses / (seq - 1)


def cuts_weights(device: torch.device, tokens: int) -> bool:
    """Tell whether masks of so many tokens cut their channels out of the weights.

    What stays is read and written once more for it, and what goes is not computed. By their data sheets GPUs compute a
    hundred FLOPs or so in the time of a byte: four fifths of a matrix in bfloat16 are copied in the time that the rest
    takes for 500 to 1,000 tokens. A CPU computes a tenth of that.
    """
    return not is_gpu(device) or tokens >= CUT_TOKENS


def copied_weights(skeleton: Skeleton, layers: Sequence[int], tokens: int, *, filled: bool) -> int:
    """Count the elements of weights that a mask of so many tokens copies of a layer at most.

    `filled`: the inputs of o and down are filled in.
    """
    cut = cuts_weights(skeleton.device, tokens)
    return max(
        sum(_copied(skeleton, layer, kind, cut=cut, filled=filled) for kind in skeleton.family.kinds)
        for layer in layers
    )


def _copied(skeleton: Skeleton, layer: int, kind: Kind, *, cut: bool, filled: bool) -> int:
    """Count the elements that a mask copies of one layer and kind."""
    way = _way(skeleton, layer, kind, cut=cut)
    if way == "zeroed":
        return 0
    shapes = skeleton.shapes(layer)
    ends = {each.tensor for each in output_matrices(skeleton, layer)} if filled else set()
    sizes = [shapes[each.tensor].numel() for each in _members(skeleton, kind, shapes) if each.tensor not in ends]
    turned = way == "cut" and not filled  # the matrix whose columns are cut is beside them
    return sum(sizes) + (max(sizes, default=0) if turned else 0)


class Zeroed:
    """Input of one matrix without the lines that masks take from it.

    Args:
        width: lines of the input. kept: of each mask those that stay, int64.
        counts: sequences of each mask; a single mask is of all that there are.
    """

    def __init__(self, width: int, kept: Sequence[Tensor], counts: Sequence[int], device: torch.device) -> None:
        gone = torch.ones(len(kept), 1, width, dtype=torch.bool)
        for row, lines in zip(gone, kept, strict=True):
            row[:, lines] = False
        self.gone = gone.repeat_interleave(torch.tensor(counts), dim=0).to(device)

    def __call__(self, x: Tensor) -> Tensor:
        """Return an input [..., width] of some sequences one after another, with zeros where its lines go."""
        return x.reshape(len(self.gone), -1, x.shape[-1]).masked_fill(self.gone, 0).view_as(x)


class _Filled:
    """Input of one matrix whose lines that masks take are filled in; each mask's factor is there when it is used."""

    def __init__(self, inverse: Tensor, kept: Sequence[Tensor], counts: Sequence[int]) -> None:
        self.inverse, self.kept, self.counts = inverse, kept, counts

    def __call__(self, x: Tensor) -> Tensor:
        """Fill in an input [..., width] of some sequences one after another."""
        made = x.clone(memory_format=torch.contiguous_format)
        parts = made.view(sum(self.counts), -1, x.shape[-1]).split(list(self.counts))
        for part, lines in zip(parts, self.kept, strict=True):
            if len(lines) < x.shape[-1]:
                part.copy_(Filling(self.inverse, lines)(part))
        return made


def masked_layer(
    skeleton: Skeleton,
    layer: int,
    weights: Mapping[str, Tensor],
    kept: Mapping[Kind, Tensor],
    filled: Mapping[str, SeeInput],
    cut: dict[str, Tensor] | None,
) -> tuple[dict[str, Tensor], dict[str, SeeInput]]:
    """Return the weights, and what is made of inputs, with which a layer does without the units that are not `kept`.

    With `cut`, channels are cut out where the layer's modules take their widths from the weights: what goes is not
    computed. Up to a multiple of WIDTH_STEP some that stay are computed twice, and lead nowhere. Elsewhere, and of KV
    groups, the inputs of o and down have zeros where a unit goes; and where a norm spans all heads, weights have, in
    copies.

    Args:
        kept: int64, ascending.
        filled: fillings of inputs, by matrix: they take the place of zeros.
        cut: takes the transposed matrices that columns are cut from, for the layer's next mask: single columns are
            thirty times as slow to gather as rows.
    """
    masked, inputs, geometry = dict(weights), dict(filled), skeleton.geometries[layer]
    for kind, units in kept.items():
        if len(units) == geometry.units(kind):
            continue
        members = [each for each in _members(skeleton, kind, weights) if each.tensor not in filled]
        way = _way(skeleton, layer, kind, cut=cut is not None)
        computed = _padded(units)
        if way == "cut" and len(computed) >= geometry.units(kind):
            way = "zeroed"
        if way == "copied":
            copies = {each.tensor: weights[each.tensor].clone() for each in members}
            mask_layer(skeleton, {layer: {kind: units}}, layer, copies, kind)
            masked |= copies
        elif way == "cut":
            assert cut is not None
            for member in members:
                lines = kept_lines(member, geometry, computed)
                masked[member.tensor] = _cut(weights[member.tensor], member, lines, cut)
                if member.dim == 1:
                    masked[member.tensor][:, len(kept_lines(member, geometry, units)) :] = 0
        else:
            for member in output_matrices(skeleton, layer):
                if member.kind == kind and member.tensor not in filled:
                    lines, width = kept_lines(member, geometry, units), weights[member.tensor].shape[member.dim]
                    inputs[member.tensor] = Zeroed(width, [lines], [1], skeleton.device)
    return masked, inputs


def _padded(units: Tensor) -> Tensor:
    """Return `units` with some of them again behind them, so that they are a multiple of WIDTH_STEP, or none.

    Units that go may not be computed instead: what overflows is not made zero by a weight of zero.
    """
    return torch.cat([units, units[torch.arange(-len(units) % WIDTH_STEP) % max(1, len(units))]])


def _way(skeleton: Skeleton, layer: int, kind: Kind, *, cut: bool) -> Literal["cut", "zeroed", "copied"]:
    """Tell how masks take units of a kind from a layer."""
    members, module = _members(skeleton, kind, skeleton.shapes(layer)), skeleton.layers[layer]
    if kind == "channel" and cut and all(_is_linear(module, each) for each in members):
        return "cut"
    return "copied" if any(each.is_norm for each in members) else "zeroed"


def _members(skeleton: Skeleton, kind: Kind, tensors: Collection[str]) -> list[Member]:
    return [each for each in skeleton.family.members if each.kind == kind and each.tensor in tensors]


def _cut(weight: Tensor, member: Member, lines: Tensor, turned: dict[str, Tensor]) -> Tensor:
    lines = lines.to(weight.device)
    if member.dim == 0:
        return weight.index_select(0, lines)
    if member.tensor not in turned:
        turned[member.tensor] = weight.T.contiguous()
    return turned[member.tensor].index_select(0, lines).T


def _is_linear(layer: nn.Module, member: Member) -> bool:
    return isinstance(layer.get_submodule(module_of(member.tensor)), nn.Linear)
