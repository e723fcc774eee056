"""What each step of a run holds, passes and computes: bytes by purpose, layers in order, FLOPs.

Everything comes from config.json and the shard headers. Bytes are upper bounds of what tensors need at one time; holes
in the heap are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from streamprune.config import PruneConfig
from streamprune.methods.table import METHODS
from streamprune.model.masking import output_matrices
from streamprune.output.writer import WRITERS
from streamprune.planning.decision import Plan
from streamprune.planning.stage import Shape, Stage, Work
from streamprune.recovery import least_squares
from streamprune.streaming.device import is_gpu
from streamprune.streaming.hidden_states import PARTS, PIECE_BYTES, Place
from streamprune.streaming.perplexity import default_micro_batch, sweeps_needed
from streamprune.streaming.statistics import Statistics
from streamprune.streaming.sweeper import LOGITS_BYTES, Sweeper

FACTORS_OF_H = 4 / 3  # FLOPs over width³: two Cholesky factors and an inverse


def stages(
    sweeper: Sweeper,
    config: PruneConfig,
    settings: Mapping[str, Any],
    plan: Plan,
    work: Work,
    where: Place,
    state: Place,
    micro_batch: int,
) -> list[Stage]:
    """The steps of a run, with hidden states at `where` and the method's state on the host or on scratch.

    Reading is not filled in yet.
    """
    whole = range(sweeper.n_layers)
    found = []
    if work.evaluation is not None:
        found.append(_evaluation(sweeper, work.evaluation, where))
    found.append(scoring(sweeper, config, settings, plan, work.calibration, where, state, micro_batch))
    fitted: Sequence[int] = ()
    if work.repair is not None:
        passes = least_squares.passes(sweeper, plan.choice.widths)
        fitted = passes[-1]
        gone = sweeper.n_layers - len(plan.choice.widths)
        found.append(_repair(sweeper, config, work.repair, where, passes, gone))
    written = set(plan.layers) if config.target == "weights" else set(fitted)
    # Embeddings and head are read once more and written as a whole, the tensors of a layer some at a time.
    largest = max(entry.nbytes for entry in sweeper.skeleton.checkpoint.tensors.values())
    of_layer = sorted(entry.nbytes for entry in sweeper.skeleton.entries[0].values())
    rest = [layer for layer in whole if layer not in written]
    base = _base(sweeper)
    cut = {"tensors, cut": 2 * max(largest, sum(of_layer[-WRITERS:]))}
    found.append(Stage("writing", base, cut, passes=[rest], written=plan.form.nbytes))
    return found


def _base(sweeper: Sweeper, *, own: bool = False) -> dict[str, int]:
    """What is there in every stage; `own`: weights are copied to be moved or changed."""
    pager, binder = sweeper.pager, sweeper.binder
    return {
        "slots": 2 * pager.slot_bytes,
        "bound layer": binder.buffer_bytes if own or binder.copies else 0,
        "embeddings and head": sweeper.skeleton.resident_bytes,
    }


def _hidden(sweeper: Sweeper, shape: Shape) -> int:
    """Bytes of hidden states [n, seq, d]."""
    skeleton = sweeper.skeleton
    return shape[0] * shape[1] * skeleton.config.hidden_size * skeleton.dtype.itemsize


def input_widths(sweeper: Sweeper) -> list[int]:
    """Of the inputs that a layer's matrices have: one for the matrices that begin a kind of unit, one for its last."""
    skeleton = sweeper.skeleton
    last = [skeleton.shapes(0)[member.tensor][member.dim] for member in output_matrices(skeleton, 0)]
    return last + [skeleton.config.hidden_size] * len(last)


def _gram_flops(shape: Shape, widths: Sequence[int]) -> float:
    """Of Σ x xᵀ over all tokens."""
    return float(sum(2 * shape[0] * shape[1] * width**2 for width in widths))


def _states(
    sweeper: Sweeper, count: int, shape: Shape, where: Place, micro_batch: int
) -> tuple[dict[str, int], dict[str, int], int]:
    """Bytes of `count` times all hidden states: on the device, on the host, on scratch."""
    nbytes = _hidden(sweeper, shape)
    if where == "device":
        return {"hidden states": count * nbytes}, {}, 0
    part = _hidden(sweeper, (min(micro_batch, shape[0]), shape[1]))
    host = {}
    if is_gpu(sweeper.skeleton.device):
        host["hidden states"] = count * _pinned(nbytes) if where == "host" else _pinned(part)
    return {"hidden states": PARTS * part}, host, count * nbytes if where == "scratch" else 0


def _pinned(nbytes: int) -> int:
    """torch rounds pinned memory up to a power of two."""
    return 1 << (nbytes - 1).bit_length()


def _matrices(sweeper: Sweeper) -> list[torch.Size]:
    """Shapes of the matrices that are watched and scored."""
    skeleton = sweeper.skeleton
    return [skeleton.shapes(0)[name] for name in skeleton.matrices(0)]


def _passed(sweeper: Sweeper) -> list[torch.Size]:
    """Shapes of the matrices that a token passes: of [experts, d_out, d_in], as many as its router takes."""
    skeleton, passed = sweeper.skeleton, []
    for shape in skeleton.shapes(0).values():
        if len(shape) == 3:
            passed += [torch.Size(shape[1:])] * skeleton.config.num_experts_per_tok
        elif len(shape) == 2:
            passed.append(shape)
    return passed


def _evaluation(sweeper: Sweeper, shape: Shape, where: Place) -> Stage:
    count = sweeps_needed(sweeper, torch.empty(shape, device="meta"))
    group = (-(-shape[0] // count), shape[1])
    micro_batch = default_micro_batch(shape[1])
    held, host, scratch = _states(sweeper, 1, group, where, micro_batch)
    device = _base(sweeper) | held
    device |= {
        "activations": _forward_activations(sweeper, min(group[0], micro_batch) * shape[1]),
        "logits": _logits(sweeper, group),
    }
    forward = layer_flops(sweeper, shape, sweeper.n_layers) + _head_flops(sweeper, shape)
    passes = [range(sweeper.n_layers)] * count
    moved = 2 * scratch * sweeper.n_layers * count
    return Stage("perplexity before", device, host, scratch, moved, passes, forward=forward)


def _logits(sweeper: Sweeper, shape: Shape) -> int:
    """Logits, their softmax and its gradient for the tokens that go through the head together."""
    return 3 * min(LOGITS_BYTES, shape[0] * shape[1] * sweeper.skeleton.config.vocab_size * 4)


def _forward_activations(sweeper: Sweeper, tokens: int) -> int:
    """Of one micro-batch without gradients: an MLP's product beside its factors, and attention's inputs."""
    widest = max(max(shape) for shape in _passed(sweeper))
    return (3 * widest + 4 * sweeper.skeleton.config.hidden_size) * tokens * sweeper.skeleton.dtype.itemsize


def scoring(
    sweeper: Sweeper,
    config: PruneConfig,
    settings: Mapping[str, Any],
    plan: Plan,
    shape: Shape | None,
    where: Place,
    state: Place,
    micro_batch: int,
) -> Stage:
    """The stage in which the method works: of what it needs, the largest counts, and all the work.

    Args:
        shape: sequences, and tokens of each. where: hidden states stay there. state: what the method keeps between
            sweeps does. micro_batch: sequences per layer call.
    """
    method = METHODS[config.method]
    needs = method.needs or (("weights",) if config.target == "weights" else ())
    ids = None if shape is None else torch.empty(shape, device="meta")
    statistics, count = Statistics(sweeper, ids, plan.layers, 0), method.sweeps(settings)
    # A run that can be resumed keeps the state in its journal.
    state_bytes = 0 if config.resume else plan.state_bytes
    host = {"pinned chunks": sweeper.pager.chunk_bytes, "state of the method": state_bytes if state == "host" else 0}
    spilled = state_bytes if state == "scratch" else 0
    largest = max(matrix.numel() for matrix in _matrices(sweeper))
    if "sigma" in settings and (state == "scratch" or config.resume or config.state_dtype != "float32"):
        host["δ on its way"] = sweeper.binder.threads * 4 * largest
    carried = _hidden(sweeper, shape) if shape is not None and config.resume else 0
    host["a piece for the journal"] = 2 * min(PIECE_BYTES, carried)
    parts, sweeps = [], count if "gradients" in needs else 1
    if shape is None:
        parts.append(Stage("", _base(sweeper) | {"a matrix and its scores": 3 * 4 * largest}))
    elif "gradients" in needs:
        parts.append(_gradients(sweeper, plan, shape, where, micro_batch, count, moved="sigma" in settings))
    if shape is not None and "inputs" in needs:
        parts.append(_inputs(sweeper, config, plan, shape, where, micro_batch))
    if shape is not None and ("hidden" in needs or "losses" in needs):
        streams = min(statistics.streams_at_once, len(plan.layers)) if "losses" in needs else 0
        carried *= 1 + streams
        parts.append(_streams(sweeper, plan, shape, where, micro_batch, streams))

    def most(held: Iterable[Mapping[str, int]]) -> Mapping[str, int]:
        return max(held, key=lambda each: sum(each.values()))

    return Stage(
        f"scoring {method.name}",
        most(part.device for part in parts),
        {**most(part.host for part in parts), **host},
        scratch=max(part.scratch for part in parts) + spilled,
        # Each sweep takes the state up forwards, where weights move by it, and changes it backwards.
        moved=sum(part.moved for part in parts) + 3 * sweeps * spilled,
        passes=statistics.passes(needs, count),
        forward=sum(part.forward for part in parts),
        backward=sum(part.backward for part in parts),
        noise=sum(part.noise for part in parts),
        factors=sum(part.factors for part in parts),
        updates=sum(part.updates for part in parts),
        carried=carried,
    )


def _gradients(
    sweeper: Sweeper, plan: Plan, shape: Shape, where: Place, micro_batch: int, count: int, *, moved: bool
) -> Stage:
    """`count` sweeps of gradients; `moved`: at perturbed weights."""
    tokens = min(micro_batch, shape[0]) * shape[1]
    # Boundaries, and the gradient.
    held, host, scratch = _states(sweeper, sweeper.n_layers - plan.layers[0] + 2, shape, where, micro_batch)
    device = _base(sweeper, own=moved) | held | {"logits": _logits(sweeper, shape)}
    device |= gradient_bytes(sweeper, tokens, several=shape[0] > micro_batch)
    forward, head = layer_flops(sweeper, shape, sweeper.n_layers), _head_flops(sweeper, shape)
    above = (sweeper.n_layers - plan.layers[0]) / sweeper.n_layers
    parameters = len(plan.layers) * sum(map(torch.Size.numel, _matrices(sweeper)))
    return Stage(
        "",
        device,
        host,
        scratch,
        2 * count * scratch,
        forward=forward * (1 + above * (count - 1)) + count * head,
        backward=(3 * forward * above + 2 * head) * count,
        noise=2 * count * parameters if moved else 0,  # it is drawn again on the way back
    )


def _inputs(sweeper: Sweeper, config: PruneConfig, plan: Plan, shape: Shape, where: Place, micro_batch: int) -> Stage:
    """A forward sweep that sums over inputs; a layer that is pruned runs twice, first up to its last product."""
    pruned, matrices = config.target == "weights", _matrices(sweeper)
    tokens = min(micro_batch, shape[0]) * shape[1]
    held, host, scratch = _states(sweeper, 2, shape, where, micro_batch)
    device = _base(sweeper, own=pruned) | held
    device |= input_bytes(sweeper, tokens, gram=config.method == "sparsegpt")
    forward = layer_flops(sweeper, shape, plan.layers[-1] + 1)
    if pruned:
        forward = 2 * forward - len(plan.layers) * 2 * matrices[-1].numel() * shape[0] * shape[1]
    moved = scratch * (plan.layers[-1] + 1)  # of the two that are there, each layer reads one and writes one
    if config.method != "sparsegpt":
        return Stage("", device, host, scratch, moved, forward=forward)
    layers, widths = len(plan.layers), input_widths(sweeper)
    return Stage(
        "",
        device,
        host,
        scratch,
        moved,
        forward=forward + layers * (_gram_flops(shape, widths) + sum(rows * width**2 for rows, width in matrices)),
        factors=layers * sum(FACTORS_OF_H * width**3 for width in widths),
        updates=layers * sum(map(torch.Size.numel, matrices)),
    )


def _streams(sweeper: Sweeper, plan: Plan, shape: Shape, where: Place, micro_batch: int, streams: int) -> Stage:
    """A forward sweep that looks at hidden states, with `streams` of layers left out carried along."""
    tokens = min(micro_batch, shape[0]) * shape[1]
    held, host, scratch = _states(sweeper, 3 + streams, shape, where, micro_batch)
    device = _base(sweeper) | held
    device |= {
        "activations": _forward_activations(sweeper, tokens),
        "logits": _logits(sweeper, shape) if streams else 0,
    }
    forward = layer_flops(sweeper, shape, sweeper.n_layers)
    if streams:
        # Each is carried from its layer up, half of all on average.
        forward += len(plan.layers) * (forward / 2 + _head_flops(sweeper, shape))
    moved = scratch * (plan.layers[-1] + 1)
    return Stage("", device, host, scratch, moved, forward=forward)


def _head_flops(sweeper: Sweeper, shape: Shape) -> float:
    """Of the head, forwards."""
    config = sweeper.skeleton.config
    return 2.0 * config.vocab_size * config.hidden_size * shape[0] * shape[1]


def gradient_bytes(sweeper: Sweeper, tokens: int, *, several: bool, sums: int = 1) -> dict[str, int]:
    """Bytes that a gradient sweep holds beside slots and boundaries, by purpose.

    The activations of one layer are counted as the inputs and outputs of the matrices that a token passes for one
    micro-batch of `tokens`, and their gradients as three of the widest (a gated MLP's product and its two factors exist
    together). With `several` micro-batches a layer's weight gradients are summed together, otherwise they come and go
    matrix by matrix.
    `sums` is how many are kept of each: more than one for `gradient_powers` with several powers.
    """
    size, matrices, passed = sweeper.skeleton.dtype.itemsize, _matrices(sweeper), _passed(sweeper)
    largest, all_of_them = max(map(torch.Size.numel, matrices)), sum(map(torch.Size.numel, matrices))
    gradients = (1 + sums) * largest + (sums * all_of_them if several else 0)
    return {
        "activations": sum(sum(shape) for shape in passed) * tokens * size,
        "gradients of activations": 3 * max(max(shape) for shape in passed) * tokens * size,
        "gradients, and what is made of them": gradients * max(size, 4),
    }


def input_bytes(sweeper: Sweeper, tokens: int, *, gram: bool) -> dict[str, int]:
    """Bytes that `Statistics.inputs` and its method hold beside slots and hidden states: moments, or Gram matrices.

    Of the activations, every input of a matrix is held for one micro-batch, and an MLP's product beside its factors. A
    Gram matrix is factored beside two copies of its size.
    """
    size, matrices = sweeper.skeleton.dtype.itemsize, _matrices(sweeper)
    inputs, widest = {shape[1] for shape in matrices}, max(max(shape) for shape in _passed(sweeper))
    return {
        "activations": (sum(inputs) + 3 * widest) * tokens * size,
        "sums over inputs": sum(width * (width if gram else 3) for width in inputs) * max(size, 4),
        "factors": 2 * max(inputs) ** 2 * max(size, 4) if gram else 0,
        "a matrix, pruned and updated": 3 * max(map(torch.Size.numel, matrices)) * max(size, 4),
    }


def _repair(
    sweeper: Sweeper, config: PruneConfig, shape: Shape, where: Place, passes: Sequence[Sequence[int]], gaps: int
) -> Stage:
    """Hidden states of both models before and after a layer and after gaps, and a layer's least squares."""
    size, carried = max(4, sweeper.skeleton.dtype.itemsize), _hidden(sweeper, shape) if config.resume else 0
    micro_batch = config.micro_batch or default_micro_batch(shape[1])
    inputs, tokens = max(each[1] for each in _matrices(sweeper)), min(shape[0], micro_batch) * shape[1]
    apart = where == "device" and is_gpu(sweeper.skeleton.device)  # those after gaps go to the host
    held, host, scratch = _states(sweeper, 5 + (0 if apart else gaps), shape, where, micro_batch)
    host |= {"hidden states after gaps": gaps * _hidden(sweeper, shape)} if apart else {}
    host["a piece for the journal"] = 2 * min(PIECE_BYTES, carried)
    device = _base(sweeper, own=True) | held
    device |= {
        "activations": _forward_activations(sweeper, tokens) + 2 * inputs * tokens * size,
        "Gram matrices": 3 * inputs**2 * size,
    }
    layers = len(passes[-1])
    # The dense model's layer, the pruned one for its error and for its output, and a quarter of it up to o; then H_S,
    # and what it is solved for.
    forward = 3.25 * layer_flops(sweeper, shape, layers) + 2 * layers * _gram_flops(shape, [inputs])
    moved, factors = scratch * layers, layers * inputs**3 / 3
    carried *= 2 + gaps
    return Stage("repairing", device, host, scratch, moved, passes, forward, factors=factors, carried=carried)


def layer_flops(sweeper: Sweeper, shape: Shape, layers: int) -> float:
    """Multiplications and additions of a forward pass through so many layers: matrices, scores and mixing."""
    parameters = sum(map(torch.Size.numel, _passed(sweeper)))
    attention = 4 * shape[1] * sweeper.skeleton.config.hidden_size
    return float(layers * shape[0] * shape[1] * (2 * parameters + attention))
