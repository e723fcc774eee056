"""Footprint of each step of a run: bytes held by purpose, layers passed in order, FLOPs.

Everything comes from config.json and the shard headers. Bytes are upper bounds of what tensors need at one time; holes
in the heap are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from streamprune.config import PruneConfig
from streamprune.methods.table import METHODS
from streamprune.model.masking import output_matrices
from streamprune.output.writer import WRITERS
from streamprune.paging.blocks import staging_bytes
from streamprune.paging.device import is_gpu
from streamprune.paging.hidden_states import PIECE_BYTES, Place
from streamprune.paging.state import aligned
from streamprune.planning.decision import Plan, state_numbers
from streamprune.planning.stage import Kept, Stage, Work
from streamprune.recovery import least_squares
from streamprune.recovery.panels import PANEL_COLUMNS
from streamprune.streaming.costs import Cost, LayerSizes, Shape, Sizes, Task, one_after_another
from streamprune.streaming.perplexity import default_micro_batch, most_together, sweeps_needed
from streamprune.streaming.sweeper import Sweeper


def stages(
    sizes: Sizes,
    config: PruneConfig,
    plan: Plan,
    work: Work,
    where: Place,
    state: Place,
    micro_batch: int,
    held: Kept = Kept(),  # noqa: B008  it is frozen
) -> list[Stage]:
    """List the steps of a run, with hidden states at `where`, the method's state on the host or on scratch, and `held`.

    Bytes read are not filled in yet, since they depend on how many layers stay on the device.
    """
    found, n_layers = list[Stage](), sizes.sweeper.n_layers
    if work.evaluation is not None:
        found.append(evaluation(sizes, work.evaluation, where))
    found.append(scoring(sizes, config, plan, work.calibration, where, state, micro_batch, held))
    fitted: Sequence[int] = ()
    if work.repair is not None:
        passes = least_squares.passes(sizes.sweeper, plan.choice.widths)
        fitted = passes[-1]
        seq_len = None if work.calibration is None else work.calibration[1]
        together = least_squares.repair_micro_batch(micro_batch, seq_len, work.repair[1])
        found.append(_repair(sizes, config, plan, work.repair, where, passes, together))
    written = set(plan.layers) if config.target == "weights" else set(fitted)
    found.append(writing(sizes, [layer for layer in range(n_layers) if layer not in written], plan.form.nbytes))
    return found


def evaluation(sizes: Sizes, shape: Shape, where: Place) -> Stage:
    """Return the stage of forward sweeps over groups of segments, as `perplexity` makes them."""
    count = sweeps_needed(sizes.sweeper, torch.empty(shape, device="meta"))
    whole = Task(sizes, shape)
    group = Task(
        sizes, (min(shape[0], most_together(sizes.sweeper, shape[1])), shape[1]), default_micro_batch(shape[1]), where
    )
    cost = group.cost(
        states=1,
        brought=len(whole.whole) * count,
        taken=len(whole.whole) * count,
        carries=0,
        device=group.in_turn(
            {"activations": group.forward_activations(whole.whole)}, {"logits": group.logits(backwards=False)}
        ),
        forward=whole.flops(whole.whole) + whole.head_flops,
    )
    return Stage(name="perplexity before", passes=[whole.whole] * count, **vars(cost))


def scoring(
    sizes: Sizes,
    config: PruneConfig,
    plan: Plan,
    shape: Shape | None,
    where: Place,
    state: Place,
    micro_batch: int,
    held: Kept = Kept(),  # noqa: B008
) -> Stage:
    """Stage in which the method works: of what its needs hold the largest counts, and of their work the sum.

    Args:
        shape: sequences, and tokens of each. where: hidden states stay there. state: what the method keeps between
            sweeps does. micro_batch: sequences per layer call. held: what stays beyond what has to.
    """
    method = METHODS[config.method]
    needs, sweeps = method.needs_for(config.target, plan.settings), method.sweeps(plan.settings)
    gpu = is_gpu(sizes.sweeper.skeleton.device)
    apart = plan.state_dtype != "float32" or (config.resume and not gpu)
    prunes = config.target == "weights"
    sums = method.sums(plan.settings)
    task = Task(
        sizes,
        shape or (0, 0),
        micro_batch,
        where,
        plan.layers,
        sweeps,
        sums,
        graphs=held.graphs,
        prunes=prunes,
        apart=apart,
        trials=None if method.trials is None else method.trials(plan.settings),
        cuts=config.target == "units",
        fills=method.trials is not None and bool(plan.state),
    )
    cost = one_after_another([need.cost(task) for need in needs] or [Cost(device=task.always)])
    kept = _state(sizes.sweeper, config, plan, state, held.state_slots)
    host = {
        "pinned chunks": sizes.sweeper.pager.chunk_bytes,
        "a piece for the journal": 2 * min(PIECE_BYTES, task.hidden_bytes) if config.resume else 0,
    }
    changed = {
        "device": {**cost.device, **kept.device},
        "host": {**cost.host, **kept.host, **host},
        "scratch": cost.scratch + kept.scratch,
        "moved": cost.moved + kept.moved,
        "up": cost.up + kept.up,
        "down": cost.down + kept.down,
        "staged": cost.staged + kept.staged,
        "carried": cost.carried if config.resume else 0,
    }
    passes = [order for need in needs for order in need.passes(task)]
    return Stage(name=f"scoring {method.name}", passes=passes, **vars(cost) | changed)


def _state(sweeper: Sweeper, config: PruneConfig, plan: Plan, place: Place, slots: int) -> Cost:
    """Cost of what the method keeps between its sweeps: where it stays, and how often it comes and goes."""
    if not plan.state:
        return Cost(host={"state of the method": 0})
    gpu, on_file = is_gpu(sweeper.skeleton.device), place == "scratch"
    if not gpu and not on_file:  # with --resume it is in the journal's files
        return Cost(host={"state of the method": 0 if config.resume else plan.state_bytes})
    brought, taken = (
        sum(getattr(kind, way)(plan.settings) * nbytes for kind, nbytes in plan.state.items())
        for way in ("brought", "taken")
    )
    blocks = state_blocks(plan, sweeper)
    again = sum(kind.brought(plan.settings) * nbytes for kind, nbytes in plan.state.items() if kind.both_ways)
    there, slot = min(slots, len(blocks)) / len(blocks), max(blocks.values())  # of the layers, where a sweep turns
    up = brought - int(again * there) if there < 1 else 0
    down = taken if there < 1 or config.resume else 0  # with all of it there, none goes but to a journal
    staged = on_file or not sweeper.pager.device.registers
    return Cost(
        device={"state of layers": min(slots, len(blocks)) * slot},
        host={
            "state of the method": 0 if on_file else sum(blocks.values()),
            "staging of state": staging_bytes(slot) if gpu and staged else 0,
        },
        scratch=sum(blocks.values()) if on_file else 0,
        moved=(up + down) if on_file else 0,
        up=up * gpu,
        down=down * gpu,
        staged=(up + down) if staged and not on_file else 0,
    )


def state_blocks(plan: Plan, sweeper: Sweeper) -> dict[int, int]:
    """Count the bytes of what the method keeps of each prunable layer, where it lies in blocks."""
    blocks = dict.fromkeys(plan.layers, 0)
    for state, nbytes in plan.state.items():
        numbers = {layer: state_numbers(state, sweeper.skeleton, layer, sweeper.scored[layer]) for layer in plan.layers}
        itemsize = nbytes // sum(map(sum, numbers.values()))
        for layer, each in numbers.items():
            blocks[layer] += sum(aligned(count * itemsize) for count in each)
    return blocks


def _repair(
    sizes: Sizes,
    config: PruneConfig,
    plan: Plan,
    shape: Shape,
    where: Place,
    passes: Sequence[Sequence[int]],
    micro_batch: int,
) -> Stage:
    """Stage of the repair: hidden states of both models before and after a layer and after gaps, least squares.

    With a goal in the residual stream down's inputs are kept too, for the repaired layer's output.
    """
    task, fitted = Task(sizes, shape, micro_batch, where), passes[-1]
    gaps, stream = sizes.sweeper.n_layers - len(plan.choice.widths), plan.repair == "stream"
    inputs, hidden_size = sizes.most(_widest_input, fitted), sizes.sweeper.skeleton.config.hidden_size
    apart = where == "device" and task.gpu  # those after gaps go to the host
    host = {"hidden states after gaps": gaps * task.hidden_bytes} if apart else {}
    host["a piece for the journal"] = 2 * min(PIECE_BYTES, task.hidden_bytes) if config.resume else 0

    def squares(layer: LayerSizes) -> float:
        return 2 * task.gram_flops([_widest_input(layer)])

    kept = -(-inputs // hidden_size) if stream else 0
    on_the_way = 2 * inputs * task.tokens_at_once * task.itemsize if stream and where != "device" else 0
    # A CPU widens what it multiplies.
    widened = 0 if task.sums_halves else 2 * inputs * task.tokens_at_once * task.sum_itemsize
    # A layer's input and output, or what down adds to; with a goal the dense model's, or those after gaps.
    states = (3 if stream and not gaps else 2) if task.gpu else 5
    cost = task.cost(
        states=states + kept + (0 if apart else gaps),
        # The dense model's layer; o, down's error and its goal, the pruned layer's output; with a goal down's inputs.
        brought=(5 + kept) * len(fitted),
        taken=(3 + kept) * len(fitted),
        carries=2 + gaps if config.resume else 0,
        own=True,
        device={
            "activations": task.forward_activations(fitted) + widened + on_the_way,
            "Gram matrices": _least_squares(inputs, hidden_size, _left(sizes, plan, inputs), stream=stream)
            * task.sum_itemsize,
        },
        host=host,
        # The dense model's layer, the pruned one but for its last product, that product for its output (without a goal
        # the whole layer again), and a quarter of it up to o; then H_S, and what it is solved for.
        forward=(2.25 if stream else 3.25) * task.flops(fitted) + sizes.total(squares, fitted),
        factors=sizes.total(lambda layer: _widest_input(layer) ** 3 / 3, fitted),
    )
    return Stage(name="repairing", passes=passes, **vars(cost))


def _left(sizes: Sizes, plan: Plan, inputs: int) -> int:
    """Return how many of the widest inputs stay at the most; all of them where scores decide on each layer's."""
    skeleton, shares = sizes.sweeper.skeleton, [0.0]
    for layer, units in plan.choice.widths.items():
        kind = output_matrices(skeleton, layer)[-1].kind
        shares.append(len(units[kind]) / skeleton.geometries[layer].units(kind) if layer in plan.layers else 0.0)
    return inputs if plan.choice.allocation != "uniform" else math.ceil(max(shares) * inputs)


def _least_squares(inputs: int, outputs: int, left: int, *, stream: bool) -> int:
    """Count the numbers of a fit of W [outputs, left]: its sums beside its right side, or then its solution in panels.

    To the own output the sums are [inputs, left]; H_S is taken out of them, after the right side is made with W. To the
    stream they are H_S and the right side, beside narrowed weights; then W is added to it.
    """
    squares, right = left**2, outputs * left
    beside = squares + 3 * right if stream else inputs * left + right + max(inputs * outputs, squares)
    panel = min(PANEL_COLUMNS, left)
    return max(beside, squares + right + panel * (left + panel))  # its factor, what that may take, and what is below


def _widest_input(layer: LayerSizes) -> int:
    return max(shape[1] for shape in layer.matrices)


def writing(sizes: Sizes, rest: Sequence[int], nbytes: int) -> Stage:
    """Return the stage that writes embeddings, head and the layers not yet written: `nbytes` with those that were."""
    # Embeddings and head are read once more and written as a whole, the tensors of a layer some at a time.
    largest = max(entry.nbytes for entry in sizes.sweeper.skeleton.checkpoint.tensors.values())
    together = sizes.most(lambda layer: sum(layer.stored[:WRITERS]), range(sizes.sweeper.n_layers))
    cost = Task(sizes, (0, 0)).cost(host={"tensors, cut": 2 * max(largest, together)})
    return Stage(name="writing", passes=[rest], written=nbytes, **vars(cost))
