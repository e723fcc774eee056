"""Repair after units or layers are gone: o and down are fitted anew, by ridge least squares on calibration activations.

The layers are walked in one forward sweep on the already pruned and repaired prefix. With x the input of o (or down)
there, x_S what is left of it, H_S = Σ x_S x_Sᵀ and λ given relative to the mean of H_S's diagonal:

    own      W' = W (Σ x x_Sᵀ) (H_S + λI)⁻¹            the layer's own output before pruning, from the same input
    stream   W' = W_S + (Σ e x_Sᵀ) (H_S + λI)⁻¹        e: the dense model's hidden states after the layer, less ours

`own` is W·H[:,S]·(H[S,S] + λI)⁻¹ with H = Σ x xᵀ. `stream` takes in what pruning below has changed; it fits `down`
only, and is what mends the layer before layers that are gone: its goal is then what those would have put out. With r
the layer's output without down's part, and g the goal, e is g − r − W_S x_S, and so

    stream   W' = (Σ (g − r) x_Sᵀ + λ W_S) (H_S + λI)⁻¹

in which nothing cancels. The repaired layer's output is r + W' x_S: the layer is not run again for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from streamprune.errors import StreampruneError, UsageError
from streamprune.kernels import add_product, gram, sums_halves
from streamprune.model.masking import mask_layer, output_matrices
from streamprune.model.skeleton import Skeleton
from streamprune.model.units import KeptUnits, Member, kept_lines
from streamprune.paging.hidden_states import Spilled, States, pieces
from streamprune.paging.pager import Page
from streamprune.recovery.panels import solve_in_place
from streamprune.storage.journal import Journal, Key
from streamprune.streaming.sweeper import Sweeper
from streamprune.streaming.walk import Visit, journalled_walk
from streamprune.streaming.watch import SeenEnough, watch_inputs

RepairGoal = Literal["own", "stream"]
# Measured on SmolLM2-135M at 8k to 131k tokens (bench/quality.py compensate): bench/README.md has the table.
OWN_RIDGE = 0.001
STREAM_RIDGE = 0.1
# A layer as it is written: (its page, tensors that were fitted, by their names inside the layer).
Write = Callable[[Page, Mapping[str, Tensor]], None]
Goals = MutableMapping[Key, Any]  # hidden states, or pieces of them, by (layer, number of the piece)


def repair_goal(skeleton: Skeleton, wanted: RepairGoal | None) -> RepairGoal:
    """Choose what to fit to: as `wanted`, else `stream` where the family allows it.

    `stream` needs a layer's output to be its residual plus `down`'s output times a constant.

    Raises:
        UsageError: `stream` is wanted, and there are experts in the place of `down`, or a norm stands between them.
    """
    family, layer = skeleton.family, skeleton.layers[0]
    if family.fused:
        if wanted == "stream":
            raise UsageError(
                f"layers of {family.model_type} have experts in the place of down, which cannot be fitted to the "
                "residual stream; leave --compensate out, or with units use --compensate-target own"
            )
        return "own"
    normed = any(hasattr(layer, name) for name in ("post_feedforward_layernorm", "post_mlp_layernorm"))
    if not normed and getattr(skeleton.config, "do_layer_norm_before", True):
        return wanted or "stream"
    if wanted == "stream":
        raise UsageError(
            f"layers of {family.model_type} have a norm after their MLP, so its output cannot be fitted to "
            "the residual stream; leave --compensate out, or with units use --compensate-target own"
        )
    return "own"


def compensate(
    sweeper: Sweeper,
    input_ids: Tensor,
    kept: KeptUnits,
    *,
    ridge: float | None,
    goal: RepairGoal,
    micro_batch: int,
    write: Write,
    journal: Journal | None = None,
) -> None:
    """Repair what is left of a model and write it, layer by layer as far as anything goes.

    Args:
        input_ids: calibration tokens [n, seq].
        kept: kept units; for layers that go, the layer before them is fitted.
        ridge: λ relative to the mean of H_S's diagonal; None for OWN_RIDGE or, with `stream`, STREAM_RIDGE,
            and more where there are few tokens: inputs per token.
        micro_batch: sequences per layer call.
        journal: the journal of a run that can be resumed.

    Raises:
        StreampruneError: H_S is singular, with λ = 0 or too few tokens.
    """
    skeleton, n_layers = sweeper.skeleton, sweeper.n_layers
    gone, goals = _gone(sweeper, kept), {} if journal is None else journal.store("goal")
    repair = _Repair(sweeper, kept, ridge, input_ids.numel(), write, goals, _widest(skeleton))
    if gone:
        _find_goals(sweeper, input_ids, gone, micro_batch, goals, journal)
    cut = _cut(skeleton, kept)
    if goal == "stream" and not gone:
        repair.first = min(cut, default=n_layers)

    def visit(each: Visit) -> dict[str, States]:
        carry = {"hidden": repair.visit(each)}
        return carry if repair.dense is None else carry | {"dense": repair.dense}

    def resume(carry: dict[str, States]) -> None:
        repair.dense = carry.pop("dense", None)

    stop = len(passes(sweeper, kept)[-1])
    journalled_walk(sweeper, journal, input_ids, visit, stop, resume=resume, micro_batch=micro_batch)


def repair_micro_batch(micro_batch: int, seq_len: int | None, repair_len: int) -> int:
    """Count the sequences of `repair_len` tokens that are computed at once: as many tokens as while scoring.

    Args:
        micro_batch, seq_len: of scoring; without a text the micro-batch is of sequences of 128 tokens.
    """
    return max(1, micro_batch * (seq_len or 128) // repair_len)


def passes(sweeper: Sweeper, kept: KeptUnits) -> list[range]:
    """List the passes of `compensate`: up to the last gap, then up to the last layer that is fitted."""
    gone = _gone(sweeper, kept)
    fitted = [*_cut(sweeper.skeleton, kept), *(_before(layer, gone) for layer in gone)]
    return [*([range(max(gone) + 1)] if gone else []), range(max(fitted, default=-1) + 1)]


def _gone(sweeper: Sweeper, kept: KeptUnits) -> list[int]:
    return [layer for layer in range(sweeper.n_layers) if layer not in kept]


def _cut(skeleton: Skeleton, kept: KeptUnits) -> list[int]:
    """List the layers that lose units."""
    everything = skeleton.all_units()
    return [layer for layer, kinds in kept.items() if kinds != everything[layer]]


def _widest(skeleton: Skeleton) -> int:
    """Find the most inputs that a layer's last matrix has."""
    last = {layer: output_matrices(skeleton, layer)[-1] for layer in range(len(skeleton.layers))}
    return max(skeleton.shapes(layer)[member.tensor][member.dim] for layer, member in last.items())


def _find_goals(
    sweeper: Sweeper, input_ids: Tensor, gone: list[int], micro_batch: int, goals: Goals, journal: Journal | None
) -> None:
    """Keep the dense model's hidden states after each run of layers that go, in `goals` by the layer before it."""
    ends = {end: _before(end, gone) for end in gone if end + 1 not in gone}

    def keep(visit: Visit) -> dict[str, States]:
        output = visit.run()
        if ends.get(visit.layer, -1) >= 0:
            # One for each gap: more than a GPU may hold.
            here = [output if isinstance(output, Spilled) else output.detach().cpu()]
            for index, piece in enumerate(here if journal is None else pieces(output)):
                goals[ends[visit.layer], str(index)] = piece
        return {"hidden": output}

    journalled_walk(sweeper, journal, input_ids, keep, max(ends) + 1, change=False, micro_batch=micro_batch)


def _before(layer: int, gone: list[int]) -> int:
    """Return the layer before the run of layers that ends with `layer`; −1 if the run begins the model."""
    while layer in gone:
        layer -= 1
    return layer


@dataclass
class _Repair:
    """Visitor that fits each layer and writes it."""

    sweeper: Sweeper
    kept: KeptUnits
    ridge: float | None
    tokens: int
    write: Write
    goals: Goals  # hidden states wanted after some layers
    widest: int  # input of the layers' last matrices
    first: int | None = None  # the layer from which all follow the dense model's hidden states
    dense: States | None = None  # these

    def visit(self, visit: Visit) -> States:
        if visit.layer not in self.kept:
            self.write(visit.page, {})
            return visit.hidden
        goal = self._goal(visit.layer)
        if self.first is not None and visit.layer >= self.first:
            # Up to there the two models are the same.
            goal = self.dense = visit.run(visit.hidden if self.dense is None else self.dense)
        fitted: dict[str, Tensor] = {}
        rest: _Rest | None = None
        skeleton, units = self.sweeper.skeleton, self.kept[visit.layer]
        members = output_matrices(skeleton, visit.layer)
        geometry = skeleton.geometries[visit.layer]
        for member in members:
            kind = member.kind
            whole = len(units[kind]) == geometry.units(kind)
            wanted = goal if member is members[-1] else None
            if whole and wanted is None:
                continue
            weight = visit.weights[member.tensor]
            lines = kept_lines(member, geometry, units[kind]).to(weight.device)
            # The own output is that of the unpruned layer, so it is masked after the fit; the error against a goal is
            # that of the pruned layer, so it is masked before.
            if wanted is not None:
                mask_layer(skeleton, self.kept, visit.layer, visit.weights, kind)
                matrix, rest = self._to_goal(visit, member, lines, wanted)
            else:
                matrix = self._to_own_output(visit, member, lines)
                mask_layer(skeleton, self.kept, visit.layer, visit.weights, kind)
            made = (matrix if member.dim == 1 else matrix.T).to(visit.page.tensors[member.tensor].dtype)
            if not torch.isfinite(made.sum(dtype=torch.float32)):
                raise StreampruneError(
                    f"layer {visit.layer}, {member.tensor} became NaN or infinite when fitted; try --dtype float32"
                )
            weight.index_copy_(member.dim, lines, made.to(weight.dtype))
            fitted[member.tensor] = made
        self.write(visit.page, fitted)
        return visit.run() if rest is None else rest.add(visit, _matrix(visit, members[-1])[:, lines])

    def _goal(self, layer: int) -> States | None:
        found = [self.goals.pop(key) for key in sorted(self.goals, key=lambda key: int(key[1])) if key[0] == layer]
        if len(found) > 1:
            return self.sweeper.states(found, sum(map(len, found)))
        return found[0] if found else None

    def _to_own_output(self, visit: Visit, member: Member, lines: Tensor) -> Tensor:
        """Fit W' [d_out, kept] that puts out from x_S what W does from x; the units' other matrices are still whole."""
        skeleton = self.sweeper.skeleton
        weights, pruned = visit.weights, None
        if any(m.kind == member.kind and m.is_norm for m in skeleton.family.members):
            # A norm over all heads: what is left of x changes when some of it goes.
            pruned = {name: weight.clone() for name, weight in weights.items()}
            mask_layer(skeleton, self.kept, visit.layer, pruned, member.kind)
        matrix = _matrix(visit, member)
        cross = _zeros(matrix, matrix.shape[1], len(lines))
        h_s = None if pruned is None else _zeros(matrix, len(lines), len(lines))
        for part in visit.parts():
            x = self._input(visit, member, weights, part)
            left = x[:, lines] if pruned is None else self._input(visit, member, pruned, part)[:, lines]
            add_product(cross, x, left)
            if h_s is not None:
                gram(h_s, left, backend=self.sweeper.backend)
        right = matrix.to(cross.dtype) @ cross
        ridge = OWN_RIDGE if self.ridge is None else self.ridge
        h_s = cross[lines] if h_s is None else h_s
        del cross  # the largest of the three, and needed no more
        return self._solve(right, h_s, ridge * h_s.diagonal().mean(), visit.layer, matrix, lines)

    def _to_goal(self, visit: Visit, member: Member, lines: Tensor, goal: States) -> tuple[Tensor, _Rest]:
        """Fit W' [d_out, kept] that brings the layer's output nearest to `goal` [n, seq, d]; return what it adds to."""
        matrix, skeleton = _matrix(visit, member), self.sweeper.skeleton
        cross, h_s = _zeros(matrix, matrix.shape[0], len(lines)), _zeros(matrix, len(lines), len(lines))
        rest = _Rest.empty(visit, self.widest, getattr(skeleton.config, "residual_multiplier", 1.0))
        # Instead of its own the module multiplies one input, with zeros: what it would put out is not wanted.
        nothing = torch.zeros_like(visit.weights[member.tensor].narrow(member.dim, 0, 1))
        weights = visit.weights | self._narrowed(visit, member) | {member.tensor: nothing}
        for part in visit.parts():
            with _given(visit, member, replace=True) as seen:
                output = skeleton.run_layer(visit.layer, weights, visit.call, visit.hidden[part])
            (x,) = seen
            left = x if len(lines) == x.shape[1] else x[:, lines]
            rest.keep(part, output, left)
            # Those after gaps stay on the host.
            _add_errors(cross, goal[part].to(output.device), output, left, 1 / rest.scale)
            gram(h_s, left, backend=self.sweeper.backend)
        del weights  # the narrowed ones are as large as the right side
        # The fewer the tokens, the less of e is more than chance: then W' stays nearer to W_S.
        ridge = max(STREAM_RIDGE, len(lines) / self.tokens) if self.ridge is None else self.ridge
        damping = ridge * h_s.diagonal().mean()
        right = cross.add_(matrix[:, lines].to(cross.dtype).mul_(damping))
        return self._solve(right, h_s, damping, visit.layer, matrix, lines), rest

    def _narrowed(self, visit: Visit, member: Member) -> dict[str, Tensor]:
        """Cut the weights that make `member`'s input to the units that are kept, where the module runs with them.

        Heads cannot go without another config, and a Conv1D knows its width: they compute what is not looked at.
        """
        skeleton, transposed = self.sweeper.skeleton, self.sweeper.skeleton.matrices(visit.layer)
        geometry, units = skeleton.geometries[visit.layer], self.kept[visit.layer][member.kind]
        if member.kind != "channel" or len(units) == geometry.channels or any(transposed.values()):
            return {}
        made = [each for each in skeleton.family.members if each.kind == member.kind and each is not member]
        return {
            each.tensor: weight.index_select(each.dim, kept_lines(each, geometry, units).to(weight.device))
            for each in made
            if (weight := visit.weights.get(each.tensor)) is not None
        }

    def _input(self, visit: Visit, member: Member, weights: dict[str, Tensor], part: slice) -> Tensor:
        """Compute the input [tokens, d_in] of `member`'s module for some sequences, and no more of the layer."""
        with _given(visit, member, enough=True) as seen:
            self.sweeper.skeleton.run_layer(visit.layer, weights, visit.call, visit.hidden[part])
        return seen[0]

    def _solve(self, right: Tensor, h_s: Tensor, damping: Tensor, layer: int, matrix: Tensor, lines: Tensor) -> Tensor:
        """Return right (H_S + λI)⁻¹ [d_out, kept], λ = `damping`, in the place of `right`.

        `h_s` is overwritten, its lower triangle counts. Of inputs that are all 0, W_S stays, as good as any other.

        Raises:
            StreampruneError: H_S + λI is singular.
        """
        if not h_s.diagonal().any():
            return right.copy_(matrix[:, lines])
        h_s.diagonal().add_(damping)
        solution = solve_in_place(right, h_s)
        if solution is None:
            raise StreampruneError(
                f"layer {layer}: the inputs' Gram matrix is singular; raise --compensate-ridge or --compensate-tokens"
            )
        return solution


@dataclass
class _Rest:
    """A layer's output without down's part, [n, seq, d], and down's input, [n, seq, widest of all layers].

    Attributes:
        scale: what the layer multiplies down's output with; granite's h + 0.22 · mlp(h).
    """

    output: States
    inputs: States
    scale: float

    @classmethod
    def empty(cls, visit: Visit, widest: int, scale: float) -> _Rest:
        """Make room for them, of one size for all layers: room on the host or on scratch is used again by its size."""
        sweeper = visit.sweeper
        return cls(sweeper.states_like(visit.hidden), sweeper.states_like(visit.hidden, widest), scale)

    def keep(self, part: slice, output: Tensor, x: Tensor) -> None:
        """Keep them for some sequences, from x [tokens, d_in]."""
        missing = self.inputs.shape[-1] - x.shape[-1]
        self.output[part] = output
        self.inputs[part] = (F.pad(x, (0, missing)) if missing else x).view(*output.shape[:-1], -1)

    def add(self, visit: Visit, matrix: Tensor) -> States:
        """Return the output with the part of down, W [d, d_in]."""
        for part in visit.parts():
            added = F.linear(self.inputs[part][..., : matrix.shape[1]], matrix)
            self.output[part] = torch.add(self.output[part], added, alpha=self.scale)
        return self.output


@contextmanager
def _given(visit: Visit, member: Member, *, enough: bool = False, replace: bool = False) -> Iterator[list[Tensor]]:
    """Collect the inputs [tokens, d_in] of `member`'s module in the block.

    With `enough` a pass ends at the first; with `replace` the module is given only the first column.
    """
    seen: list[Tensor] = []

    def see(given: Tensor) -> Tensor | None:
        seen.append(given.reshape(-1, given.shape[-1]))
        if enough:
            raise SeenEnough
        return given[..., :1] if replace else None

    with watch_inputs(visit.sweeper.skeleton.layers[visit.layer], {member.tensor: see}):
        yield seen


def _add_errors(cross: Tensor, goal: Tensor, output: Tensor, x: Tensor, scale: float) -> None:
    """Add `scale` times Σ e xᵀ to `cross` [d, kept], for e = goal − output [., seq, d] and x [tokens, kept]."""
    goal, output = goal.flatten(0, -2), output.flatten(0, -2)
    if sums_halves(x):
        # Of the error's digits more are left in a difference of float32 sums than in an error rounded to half.
        add_product(cross, goal, x, alpha=scale)
        add_product(cross, output, x, alpha=-scale)
    else:
        add_product(cross, goal.to(cross) - output.to(cross), x.to(cross), alpha=scale)


def _matrix(visit: Visit, member: Member) -> Tensor:
    """View a weight as [d_out, d_in]."""
    weight = visit.weights[member.tensor]
    return weight if member.dim == 1 else weight.T


def _zeros(like: Tensor, rows: int, columns: int) -> Tensor:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.zeros(rows, columns, dtype=dtype, device=like.device)
