"""Needs of methods: what they can ask for, the layers that are passed for it, what that costs; and what they keep.

A need is a row here and a function of `Statistics` that meets it. Nothing here imports torch: the sizes come with the
`Task` that a need is asked about.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamprune.config import Target
    from streamprune.streaming.costs import Cost, LayerSizes, Task

FACTORS_OF_H = 1  # FLOPs over width³: a Cholesky factor and its inverse
POLICY_BYTES = 300  # of a unit at most: a policy's space, its state, the masks' order, and what a step makes


@dataclass(frozen=True)
class Need:
    """Kind of statistics that a method asks for.

    Attributes:
        label: its name for people.
        passes: the layers of each pass over the model, in order.
        cost: bytes and FLOPs of all of them, with what the method makes of what it is given.
        reads_text: whether sequences go through the model.
    """

    label: str
    passes: Callable[[Task], list[Sequence[int]]]
    cost: Callable[[Task], Cost]
    reads_text: bool = True


@dataclass(frozen=True)
class KeptState:
    """State that a method keeps between its sweeps, for each scored matrix.

    Attributes:
        name: name of the store.
        kept: tells whether it is kept, with these settings and this target.
        without: the settings that do without it.
        numbers: how many are kept of a matrix, by its shape, and its input's width where units cut it, else 0.
        dtype: of its numbers; None for --state-dtype, float64 in float64 runs.
        brought, taken: times that all of it comes to where it is computed on, and goes from there, with given settings.
        both_ways: sweeps read it forwards too; where one turns, what passed last is still there.
    """

    name: str
    kept: Callable[[Mapping[str, Any], Target], bool]
    without: str
    numbers: Callable[[Sequence[int], int], int] = lambda shape, width: math.prod(shape)
    dtype: str | None = None
    brought: Callable[[Mapping[str, Any]], int] = lambda settings: 1
    taken: Callable[[Mapping[str, Any]], int] = lambda settings: 1
    both_ways: bool = True


def _weights(task: Task) -> Cost:
    """Cost of a sweep over weights as they are stored.

    A GPU's kernels score without room. Where weights are pruned scores may be drawn, float32, and a mask made of them.
    """
    each = 5 * task.prunes if task.gpu else 3 * 4
    return task.cost(device={"a matrix and its scores": each * task.sizes.most(_largest, task.layers)})


def _there_and_back(task: Task) -> list[Sequence[int]]:
    """List the passes of forward and backward sweeps: from the lowest prunable layer up, the first from layer 0."""
    above = task.whole[task.layers[0] :]
    return [task.whole, above[::-1], *[above, above[::-1]] * (task.sweeps - 1)]


def _gradients(task: Task, *, moved: bool = False) -> Cost:
    """Cost of forward and backward sweeps; `moved`: at weights with δ and noise.

    The activations of one layer are counted as the inputs and outputs of the matrices that a token passes for one
    micro-batch, and their gradients as three of the widest (a gated MLP's product and its two factors exist together).
    With several micro-batches a layer's weight gradients are summed together, otherwise they come and go matrix by
    matrix. Hidden states pass every layer forwards and the head; backwards a layer takes its input and a gradient.
    """
    sizes, tokens, above = task.sizes, task.tokens_at_once, task.whole[task.layers[0] :]
    widest = sizes.most(lambda layer: layer.widest, task.whole)
    threads = task.sweeper.binder.threads if moved and task.apart else 0
    forward, forward_above = task.flops(task.whole), task.flops(above)
    passed = len(task.whole) + (task.sweeps - 1) * len(above)
    kept, unscored = above[max(0, len(above) - task.graphs) :], task.whole[-1] - task.layers[-1]
    # Those above the prunable layers have gone before there are weight gradients.
    each = _graph(task) if kept else 0
    graphs, scored = ({"graphs of layers": max(0, len(kept) - gone) * each} for gone in (0, unscored))
    backward = {"gradients of activations": 3 * widest * tokens * task.itemsize}
    summed = {"gradients, and what is made of them": sizes.most(partial(_weight_gradients, task, moved), task.layers)}
    again = {
        "activations": sizes.most(partial(_saved, task), task.whole) * tokens * task.itemsize
        + task.scores(backwards=True)
    }
    return task.cost(
        states=len(above) + 2,  # boundaries, and the gradient
        brought=passed + task.sweeps * (2 * len(above) + 1),
        taken=passed + task.sweeps * (len(above) + 1),
        own=moved,
        device=task.in_turn(
            graphs | {"logits": task.logits(backwards=True)},
            graphs | backward,
            scored | backward | summed,
            backward | summed | again,
        ),
        host={"δ on its way": threads * 4 * sizes.most(_largest, task.layers)},
        forward=forward + forward_above * (task.sweeps - 1) + task.sweeps * task.head_flops,
        backward=(3 * forward_above - task.flops(kept) + 2 * task.head_flops) * task.sweeps,
        # It is drawn again on the way back.
        noise=2 * task.sweeps * sizes.total(lambda layer: layer.weights, task.layers) if moved else 0,
    )


def _saved(task: Task, layer: LayerSizes) -> int:
    """Count the numbers that a layer saves of a token: inputs and outputs of the matrices that it passes.

    They stand for what two norms, rotations and attention save too. In half precision on a GPU further norms save what
    they are given in float32, and what a fused matrix puts out is copied.
    """
    ends, config = sum(sum(shape) for shape in layer.passed), task.sweeper.skeleton.config
    if not task.sums_halves:
        return ends
    norms, copies = max(0, layer.normed - 2 * config.hidden_size), max(0, 7 - len(layer.passed))
    steps = layer.widest if getattr(config, "activation_function", "") == "gelu_new" else 0  # one operation is many
    return ends + 2 * norms + copies * config.hidden_size + steps


def _graph(task: Task) -> int:
    """Count the bytes of a layer's graph over all sequences, with its output, and with weights of its own."""
    n = min(task.micro_batch, task.shape[0])
    saved = task.sizes.saved(n, task.shape[1])
    if saved is None:  # norms, rotations and activations save more than the ends of matrices

        def each(layer: LayerSizes) -> int:
            return _saved(task, layer) + layer.widest if task.sums_halves else int(1.4 * _saved(task, layer))

        numbers = task.sizes.most(each, task.whole) + 4 * task.attention_columns
        saved = numbers * n * task.shape[1] * task.itemsize
    return -(-task.shape[0] * saved // n) + task.hidden_bytes + task.sweeper.binder.buffer_bytes


def _weight_gradients(task: Task, moved: bool, layer: LayerSizes) -> int:
    """Count the bytes of a layer's weight gradients, or what is summed instead, and of what is made of the largest."""
    several = task.shape[0] > task.micro_batch
    if not task.sums_halves:  # the gradient of a micro-batch stands beside its sum
        return ((1 + task.sums) * layer.largest + (task.sums * layer.weights if several else 0)) * task.sum_itemsize
    summed = task.sums * (layer.weights if several else layer.largest) * task.sum_itemsize
    # What the method keeps comes as float32, where it does not lie there as that; what is pruned is a copy.
    return summed + layer.largest * (4 * (moved and task.apart) + task.itemsize * task.prunes)


def _up_to_the_last(task: Task) -> list[Sequence[int]]:
    return [task.whole[: task.layers[-1] + 1]]


def _inputs(task: Task, *, gram: bool) -> Cost:
    """Cost of a forward sweep that sums over inputs: moments, or with `gram` Gram matrices for SparseGPT.

    A layer that is pruned runs twice, first up to its last product.
    """
    sizes, (passed,) = task.sizes, _up_to_the_last(task)

    def squares(layer: LayerSizes) -> float:
        return task.gram_flops(layer.inputs) + sum(rows * width**2 for rows, width in layer.matrices)

    def factors(layer: LayerSizes) -> float:
        return sum(FACTORS_OF_H * width**3 for width in layer.inputs)

    # The last layer's output is not made; nor is that of a layer that is pruned, before it is.
    unfinished = task.layers if task.prunes else task.layers[-1:]
    again = task.layers[:-1] if task.prunes else ()
    last_products = sizes.total(lambda layer: 2 * layer.matrices[-1].numel(), unfinished)
    forward = task.flops(passed) - last_products * task.tokens + task.flops(again)
    return task.cost(
        states=2,
        brought=len(passed) + len(again),
        taken=len(passed),
        own=task.prunes,
        device=_held_for_grams(task) if gram else _held_for_moments(task),
        forward=forward + (sizes.total(squares, task.layers) if gram else 0),
        factors=sizes.total(factors, task.layers) if gram else 0,
        updates=sizes.total(lambda layer: layer.weights, task.layers) if gram else 0,
    )


def _held_for_moments(task: Task) -> Mapping[str, int]:
    """Count the bytes of a layer that runs, and then of scores, by purpose.

    A gated MLP's product and its two factors exist together. On a GPU two more of the product do after them, in
    float32: widened, and less its mean.
    """
    sizes, (passed,) = task.sizes, _up_to_the_last(task)
    wide = max(3, 1 + 8 // task.itemsize) if task.gpu else 3
    of_matrix = (4 + task.itemsize * task.prunes) if task.gpu else 3 * task.sum_itemsize
    return task.in_turn(
        {"activations": sizes.most(partial(_running, task, wide), passed)},
        {"a matrix, pruned and updated": of_matrix * sizes.most(_largest, task.layers)},
    )


def _held_for_grams(task: Task) -> Mapping[str, int]:
    """Count the bytes of a layer that runs, of a factor beside sums, of the matrix that it prunes, by purpose.

    A Gram matrix is factored beside two copies of its size, and cuSOLVER may take as much once more.
    """
    sizes, size, (passed,) = task.sizes, task.sum_itemsize, _up_to_the_last(task)

    def sums(layer: LayerSizes) -> int:
        return sum(width**2 for width in (layer.inputs if task.gpu else _inputs_of(layer))) * size

    def factored(layer: LayerSizes) -> int:
        *narrower, widest = sorted(_inputs_of(layer))
        # The widest input comes last, when the other sums are gone.
        beside = max((3 * width**2 for width in narrower), default=0) * size
        return max(4 * widest**2 * size, sums(layer) + beside)

    matrix = {"a matrix, pruned and updated": 3 * sizes.most(_largest, task.layers) * size}
    factors = {"factors": 2 * sizes.most(lambda layer: max(_inputs_of(layer)) ** 2, task.layers) * size}
    activations = {"activations": sizes.most(partial(_running, task, 3), passed)}
    summed = {"sums over inputs": sizes.most(sums, task.layers)}
    if not task.gpu:
        return activations | summed | factors | matrix
    return task.in_turn(activations | summed, {"sums over inputs, and factors": sizes.most(factored, task.layers)})


def _running(task: Task, wide: int, layer: LayerSizes) -> int:
    """Count the bytes of every input of a matrix for one micro-batch, and of as many of the widest."""
    # Of a GPU each input counts, also those of the same width, and what goes past them.
    inputs = 4 * task.sweeper.skeleton.config.hidden_size if task.gpu else sum(_inputs_of(layer))
    return (inputs + wide * layer.widest) * task.tokens_at_once * task.itemsize + task.scores(backwards=False)


def _from_what_is_left_out(task: Task) -> list[Sequence[int]]:
    return [task.whole[begin:] for begin, _ in task.left_out]


def _hidden(task: Task, *, left_out: bool = False) -> Cost:
    """Cost of a forward sweep that looks at hidden states; `left_out`: with those of layers left out carried along."""
    (passed,), forward = _up_to_the_last(task), task.flops(task.whole)
    streams = max(len(layers) for _, layers in task.left_out) if left_out else 0
    if left_out:
        # Each is carried from its layer up, half of all on average.
        forward += len(task.layers) * (forward / 2 + task.head_flops)
    carried = len(passed) + (sum(task.whole[-1] - layer for layer in task.layers) if left_out else 0)
    return task.cost(
        states=3 + streams,
        brought=carried + (len(task.layers) if left_out else 2 * len(task.layers)),  # the head, or whoever looks
        taken=carried,
        carries=1 + streams,
        device=task.in_turn(
            {"activations": task.forward_activations(task.whole)},
            {"logits": task.logits(backwards=False) if left_out else 0},
        ),
        forward=forward,
    )


def _for_trials(task: Task) -> list[Sequence[int]]:
    assert task.trials is not None, "whoever tries masks says how many"
    return [task.whole] * task.trials[0]


def _masked(task: Task) -> Cost:
    """Cost of forward sweeps that each carry the sequences of many masks, of which some at a time are computed.

    What a mask lets out is taken to be computed: how much that is, is learnt.
    """
    assert task.trials is not None
    passes, trials, batch = task.trials
    together = batch <= task.micro_batch and task.tries_together(batch * task.shape[1])
    at_once = batch * (trials if together else 1)
    carried = replace(task, shape=(trials * batch, task.shape[1]), micro_batch=min(task.micro_batch, at_once))
    activations = {"activations": carried.forward_activations(task.whole)}
    masked = dict[str, int]()
    if task.cuts:
        inputs = carried.micro_batch * task.shape[1] * task.sizes.most(_widest_cut, task.layers)
        masked = {"masked weights": task.mask_copies, "masked inputs": task.itemsize * inputs}
    filling, filled, factors = _fillings(carried) if task.fills else ({}, 0.0, 0.0)
    skeleton, units = task.sweeper.skeleton, len(task.layers)
    if task.cuts:
        units = sum(skeleton.geometries[layer].units(kind) for layer in task.layers for kind in skeleton.family.kinds)
    return carried.cost(
        states=2,
        brought=(len(task.whole) + 1) * passes,
        taken=(len(task.whole) + 1) * passes,
        device=task.in_turn({**activations, **masked, **filling}, {"logits": carried.logits(backwards=False)}),
        host={"masks": trials * units, "policy": POLICY_BYTES * units},
        forward=(carried.flops(task.whole) + carried.head_flops + filled) * passes,
        factors=trials * factors * passes,
        chosen=trials * units * passes,
    )


def _fillings(task: Task) -> tuple[Mapping[str, int], float, float]:
    """Count bytes of what fills in the inputs of a mask, and FLOPs of all of that, and of factors for each mask.

    Of an input's lines a third are taken to go; there is room for nine tenths: P's rows and a factor of each input, and
    what that takes on its way.
    """
    sizes, layers, most = task.sizes, task.layers, 0.9

    def held(layer: LayerSizes) -> int:
        squares = [width**2 for width in _cut_inputs(layer)]
        return int((most + most**2) * sum(squares) + most**2 * max(squares))

    products = sizes.total(lambda layer: sum(2 * width**2 / 3 for width in _cut_inputs(layer)), layers)
    factors = sizes.total(lambda layer: sum((width / 3) ** 3 / 3 for width in _cut_inputs(layer)), layers)
    return {"fillings": sizes.most(held, layers) * task.sum_itemsize}, products * task.tokens, factors


def _cut_grams(task: Task, *, inverted: bool = False, removes: bool = False) -> Cost:
    """Cost of a forward sweep that makes Gram matrices of the inputs that units cut: of o and down.

    `inverted`: and their inverses. `removes`: and those of the columns that the inputs meet, from which units go; of an
    inverse each that goes changes all of both.
    """
    sizes, (passed,), size = task.sizes, _up_to_the_last(task), task.sum_itemsize
    sums = {"sums over inputs": size * sizes.most(_cut_squares, task.layers)}
    widest = size * sizes.most(lambda layer: max(_cut_inputs(layer)) ** 2, task.layers)
    beside = {"factors": 2 * widest} if inverted else {"products of columns": widest}
    rows = task.tokens + (task.sweeper.skeleton.config.hidden_size if removes else 0)
    cubes = inverted * (1 + 6 * removes)
    return task.cost(
        states=2,
        brought=len(passed),
        taken=len(passed),
        device=task.in_turn({"activations": sizes.most(partial(_running, task, 3), passed)} | sums, sums | beside),
        forward=task.flops(passed) + 2 * rows * sizes.total(_cut_squares, task.layers),
        factors=cubes * sizes.total(lambda layer: sum(w**3 for w in _cut_inputs(layer)), task.layers),
    )


def _cut_inputs(layer: LayerSizes) -> tuple[int, ...]:
    """Widths of the inputs that units cut."""
    return layer.inputs[: len(layer.inputs) // 2]


def _widest_cut(layer: LayerSizes) -> int:
    return max(_cut_inputs(layer))


def _cut_squares(layer: LayerSizes) -> int:
    """Number of elements of their Gram matrices."""
    return sum(width**2 for width in _cut_inputs(layer))


def _inputs_of(layer: LayerSizes) -> set[int]:
    """Widths of the matrices' inputs, each once."""
    return {shape[1] for shape in layer.matrices}


def _largest(layer: LayerSizes) -> int:
    return layer.largest


STORED_WEIGHTS = Need("weights", lambda task: [task.layers], _weights, reads_text=False)
GRADIENTS = Need("gradients", _there_and_back, _gradients)
MOVED_GRADIENTS = Need("gradients", _there_and_back, partial(_gradients, moved=True))
# Over the samples' own gradients: a sum of powers takes the place of the gradient.
SAMPLE_POWERS = Need("gradients", _there_and_back, _gradients)
MOMENTS = Need("inputs", _up_to_the_last, partial(_inputs, gram=False))
GRAMS = Need("inputs", _up_to_the_last, partial(_inputs, gram=True))
HIDDEN = Need("hidden", _up_to_the_last, _hidden)
REMOVALS = Need("inputs", _up_to_the_last, partial(_cut_grams, removes=True))
REFITTED_REMOVALS = Need("inputs", _up_to_the_last, partial(_cut_grams, inverted=True, removes=True))
INVERSES = Need("inputs", _up_to_the_last, partial(_cut_grams, inverted=True))
MASKED = Need("losses", _for_trials, _masked)
LOSSES = Need("losses", _from_what_is_left_out, partial(_hidden, left_out=True))
