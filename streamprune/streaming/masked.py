"""Losses of a model with some of its units or layers masked: one pass over the layers serves many masks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from streamprune.model.masking import mask_layer
from streamprune.model.skeleton import Skeleton
from streamprune.model.units import Kind, kept_lines, module_of
from streamprune.paging.hidden_states import States
from streamprune.storage.journal import Key
from streamprune.streaming.filling import fillings
from streamprune.streaming.sweeper import LOGITS_BYTES, Sweeper, blocks_of_tokens
from streamprune.streaming.walk import Visit, walk
from streamprune.streaming.watch import watch_inputs


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
            # Listed as they are needed: of all layers and trials a list takes 40 times a mask's memory.
            kept = {kind: mask.nonzero().flatten().tolist() for kind, mask in trial.kept.get(each.layer, {}).items()}
            filled = fillings(skeleton, each.layer, kept, inverses)
            weights = masked_weights(skeleton, each.layer, each.weights, kept, turned, filled)
            for part in sweeper.micro_batches(trial.sequences.stop - trial.sequences.start):
                hidden = each.hidden[begin + part.start : begin + part.stop]
                if each.layer not in trial.gone:
                    with watch_inputs(skeleton.layers[each.layer], filled):
                        hidden = skeleton.run_layer(each.layer, weights, each.call, hidden)
                output[end + part.start : end + part.stop] = hidden
            del weights, filled  # before there are the next trial's
        return output

    hidden = walk(sweeper, input_ids, visit, change=False, then="again")
    losses = sequence_losses(sweeper, hidden, ids)
    return [float(losses[start : start + len(each)].mean()) for start, each in zip(starts, rows, strict=True)]


def sequence_losses(sweeper: Sweeper, hidden: States, input_ids: Tensor) -> Tensor:
    """Compute the mean next-token loss (nats) of each sequence from the last layer's output: float64 [n]."""
    n, seq, _ = hidden.shape
    targets = input_ids.to(sweeper.skeleton.device)
    losses = torch.zeros(n, dtype=torch.float64, device=targets.device)
    tokens = max(1, LOGITS_BYTES // (4 * sweeper.skeleton.config.vocab_size))
    for rows, blocks in blocks_of_tokens(n, seq - 1, tokens):
        states = hidden[rows]
        for columns in blocks:
            logits = sweeper.skeleton.head(states[:, columns])
            logits = logits if logits.dtype == torch.float64 else logits.float()
            following = targets[rows, columns.start + 1 : columns.stop + 1]
            loss = F.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="none")
            losses[rows] += loss.view_as(following).double().sum(dim=1)
    return losses / (seq - 1)


def masked_weights(
    skeleton: Skeleton,
    layer: int,
    weights: Mapping[str, Tensor],
    kept: Mapping[Kind, Sequence[int]],
    turned: dict[str, Tensor],
    filled: Collection[str] = (),
) -> dict[str, Tensor]:
    """Return a layer's weights with which it computes what it does without the units that are not `kept`.

    Channels are cut out where the layer's modules take their widths from the weights: what goes is not computed.
    Elsewhere, and of KV groups, the columns through which a unit reaches the residual stream become zero, in copies.

    Args:
        turned: takes the transposed matrices that columns are cut from, for the layer's next mask: single columns are
            thirty times as slow to gather as rows.
        filled: matrices whose inputs are filled in: they stay whole.
    """
    masked, geometry = dict(weights), skeleton.geometries[layer]
    for kind, units in kept.items():
        if len(units) == geometry.units(kind):
            continue
        members = [
            each
            for each in skeleton.family.members
            if each.kind == kind and each.tensor in weights and each.tensor not in filled
        ]
        if kind == "channel" and all(_is_linear(skeleton.layers[layer], each.tensor) for each in members):
            for member in members:
                weight = weights[member.tensor]
                lines = kept_lines(member, geometry, units).to(weight.device)
                if member.dim == 0:
                    masked[member.tensor] = weight.index_select(0, lines)
                else:
                    if member.tensor not in turned:
                        turned[member.tensor] = weight.T.contiguous()
                    masked[member.tensor] = turned[member.tensor].index_select(0, lines).T
        else:
            copies = {each.tensor: weights[each.tensor].clone() for each in members}
            mask_layer(skeleton, {layer: {kind: list(units)}}, layer, copies, kind)
            masked |= copies
    return masked


def _is_linear(layer: nn.Module, tensor: str) -> bool:
    return isinstance(layer.get_submodule(module_of(tensor)), nn.Linear)
