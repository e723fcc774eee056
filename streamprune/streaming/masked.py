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
from streamprune.streaming.filling import fillings
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
    skeleton, rows = sweeper.skeleton, [range(trial.sequences.start, trial.sequences.stop) for trial in trials]
    starts = [sum(map(len, rows[:number])) for number in range(len(rows))]
    ids = input_ids[[row for each in rows for row in each]]

    def visit(each: Visit) -> States:
        """Compute a layer's output for every trial, one after another."""
        if each.layer < first:
            return each.run()
        # The first layer with masks is given what trials share, and puts out what each has for itself.
        given = [trial.sequences.start for trial in trials] if each.layer == first else starts
        output, turned = sweeper.states_like(each.hidden, count=len(ids)), dict[str, Tensor]()
        for trial, begin, end in zip(trials, given, starts, strict=True):
            count = trial.sequences.stop - trial.sequences.start
            # Found as they are needed: of all layers and trials the units take eight times a mask's memory.
            kept = {kind: mask.nonzero().flatten() for kind, mask in trial.kept.get(each.layer, {}).items()}
            filled = fillings(skeleton, each.layer, kept, inverses)
            cut = turned if cuts_weights(skeleton.device, count * input_ids.shape[1]) else None
            weights, inputs = masked_layer(skeleton, each.layer, each.weights, kept, filled, cut)
            for part in sweeper.micro_batches(count):
                hidden = each.hidden[begin + part.start : begin + part.stop]
                if each.layer not in trial.gone:
                    with watch_inputs(skeleton.layers[each.layer], inputs):
                        hidden = skeleton.run_layer(each.layer, weights, each.call, hidden)
                output[end + part.start : end + part.stop] = hidden
            del weights, inputs, filled  # before there are the next trial's
        return output

    hidden = walk(sweeper, input_ids, visit, change=False, then="again")
    losses = sequence_losses(sweeper, hidden, ids)
    return [float(losses[start : start + len(each)].mean()) for start, each in zip(starts, rows, strict=True)]


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
    """Input of one matrix without the lines that a mask takes from it.

    Args:
        width: lines of the input. kept: those that stay, int64.
    """

    def __init__(self, width: int, kept: Tensor, device: torch.device) -> None:
        gone = torch.ones(width, dtype=torch.bool)
        gone[kept] = False
        self.gone = gone.to(device)

    def __call__(self, x: Tensor) -> Tensor:
        """Return an input [..., width] with zeros where its lines go."""
        return x.masked_fill(self.gone, 0)


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
                    inputs[member.tensor] = Zeroed(width, lines, skeleton.device)
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
