"""What is decided before any layer's weights are read: what goes, how the output is laid out, what it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from streamprune.config import PruneConfig
from streamprune.errors import UsageError
from streamprune.figures import human
from streamprune.methods.sinks import LayerScores, Sparsity, UnitScores
from streamprune.methods.table import METHODS
from streamprune.model.families import unit_costs
from streamprune.model.skeleton import Skeleton
from streamprune.model.units import KIND_NAMES, KeptUnits, Kind
from streamprune.output import sparse24
from streamprune.output.layers import check_emittable, layout, output_specs
from streamprune.planning import allocation
from streamprune.planning.allocation import GlobalRule
from streamprune.recovery.least_squares import RepairGoal, repair_goal


@dataclass(frozen=True)
class Plan:
    """Decisions of a run.

    Attributes:
        layers: the prunable ones.
        costs: parameters of a unit of each kind.
        choice: what goes, and how it is chosen.
        sparsity: of weights.
        packed: the matrices that are compressed, by their stored names, and their modules.
        biases: o and down get what keeps their mean output; new_biases: some had none.
        repair: what o and down are fitted to afterwards, if they are.
        layout: "same", "stock" or "ragged".
        output_bytes: of all tensors that are written; with a global allocation to the nearest unit.
        state_bytes: of the method, between sweeps.
    """

    layers: range
    costs: dict[Kind, int]
    choice: Choice
    sparsity: Sparsity | None
    packed: dict[str, str]
    biases: bool
    new_biases: bool
    repair: RepairGoal | None
    layout: str
    output_bytes: int
    state_bytes: int


@dataclass(frozen=True)
class Choice:
    """What goes.

    Attributes:
        widths: kept units of some choice of the same size: what is to be known before there are scores.
        keep: kept units by the scores.
        what: in words.
        allocation: of units: "uniform" or "global".
    """

    widths: KeptUnits
    keep: Callable[[Any], KeptUnits]
    what: str
    allocation: str | None = None


def make_plan(config: PruneConfig, skeleton: Skeleton, settings: Mapping[str, Any]) -> Plan:
    """Decide, and refuse what cannot be done.

    Raises:
        UsageError: a ratio, range or layout that does not fit the model.
        StreampruneError: too little memory for the method's state.
    """
    geometry, n_layers = skeleton.geometry, len(skeleton.layers)
    if config.target == "weights" and skeleton.family.fused:
        raise UsageError(
            f"--granularity {config.granularity}: most weights of {skeleton.family.model_type} are its experts', which "
            "cannot be pruned one by one; use --granularity layers or units"
        )
    costs = unit_costs(skeleton.family, geometry, skeleton.shapes(0))
    stock = config.stock and config.target == "units"
    layers = allocation.prunable_layers(config.layers, n_layers, whole=config.target == "weights", stock=stock)
    choose = {"weights": _choose_weights, "layers": _choose_layers, "units": _choose_units}[config.target]
    choice = choose(config, skeleton, costs, layers)
    repair: RepairGoal | None = None
    if config.compensate:
        # Whole layers leave nothing of their own to fit: the layer before them takes their place in the stream.
        repair = repair_goal(skeleton, "stream" if config.target == "layers" else config.compensate_target)
    something_goes = choice.widths != _everything(skeleton)
    biases = settings.get("bias") == "yes" and repair is None and something_goes
    packed = sparse24.matrices(skeleton, layers) if config.compress else {}
    specs = output_specs(skeleton, choice.widths, biases=biases, packed=packed)
    new_biases = biases and len(specs) > len(skeleton.checkpoint.tensors)
    if new_biases and (config.stock or not skeleton.family.ragged):
        raise UsageError("no stock class has biases on o and down alone; leave them out with --no-bias")
    check_emittable(skeleton, choice.widths, config.emit, biases=new_biases)
    output_bytes = sum(spec.nbytes for spec in specs)
    assert not packed or output_bytes < skeleton.checkpoint.nbytes, "compressed weights take less"
    return Plan(
        layers=layers,
        costs=costs,
        choice=choice,
        sparsity=_sparsity(config, skeleton, layers) if config.target == "weights" else None,
        packed=packed,
        biases=biases,
        new_biases=new_biases,
        repair=repair,
        layout=layout(skeleton, choice.widths, config.emit, biases=new_biases),
        output_bytes=output_bytes,
        state_bytes=_state_bytes(config, skeleton, settings, costs, layers),
    )


def _everything(skeleton: Skeleton) -> KeptUnits:
    return {
        layer: allocation.all_units(skeleton.geometry, skeleton.family.kinds) for layer in range(len(skeleton.layers))
    }


def _choose_weights(config: PruneConfig, skeleton: Skeleton, costs: dict[Kind, int], layers: range) -> Choice:
    """All units stay."""
    everything = _everything(skeleton)
    share = config.granularity if config.n_of_m else f"{1 - _ratio(config):.1%}"
    where = "in blocks of their columns" if config.method == "sparsegpt" and not config.n_of_m else "in every row"
    size = "" if config.compress else "; the files stay as large"
    return Choice(
        everything, lambda scores: everything, f"keep {share} of the weights {where}, the rest become zeros{size}"
    )


def _choose_layers(config: PruneConfig, skeleton: Skeleton, costs: dict[Kind, int], layers: range) -> Choice:
    n_layers, kinds = len(skeleton.layers), skeleton.family.kinds
    count = allocation.layers_to_remove(_ratio(config), layers, n_layers)

    def keep(scores: LayerScores) -> KeptUnits:
        return allocation.select_layers(
            scores.values, count, skeleton.geometry, kinds, n_layers, contiguous=config.contiguous
        )

    widths = {layer: units for layer, units in _everything(skeleton).items() if layer not in layers[:count]}
    return Choice(widths, keep, f"lose {count} of {len(layers)} layers{' in one run' if config.contiguous else ''}")


def _choose_units(config: PruneConfig, skeleton: Skeleton, costs: dict[Kind, int], layers: range) -> Choice:
    if (config.allocation or METHODS[config.method].allocation) == "global":
        return _choose_globally(config, skeleton, costs, layers)
    for name in ("normalize", "min_keep"):
        if getattr(config, name) != PruneConfig.__dataclass_fields__[name].default:
            raise UsageError(f"--{name.replace('_', '-')} is of --allocation global; add that, or leave it out")
    geometry, n_layers = skeleton.geometry, len(skeleton.layers)
    ratios = allocation.Ratios(_ratio(config), config.attention_ratio, config.mlp_ratio, config.round_to)
    # One width for all layers goes to the stock class, asked for or not; a Mistral takes any head count.
    stock = len(layers) == n_layers and config.emit is None
    hidden_size = skeleton.config.hidden_size
    removed = allocation.uniform(skeleton.family, geometry, costs, ratios, hidden_size, stock=stock)

    def keep(scores: UnitScores) -> KeptUnits:
        return allocation.select(scores.values, removed, geometry, n_layers)

    each = ", ".join(f"{count} of {geometry.units(kind)} {KIND_NAMES[kind]}" for kind, count in removed.items())
    return Choice(keep(_no_scores(skeleton, layers)), keep, f"lose {each} each", "uniform")


def _choose_globally(config: PruneConfig, skeleton: Skeleton, costs: dict[Kind, int], layers: range) -> Choice:
    if config.stock or config.attention_ratio is not None or config.mlp_ratio is not None or not skeleton.family.ragged:
        if not skeleton.family.ragged:
            raise UsageError(
                f"layers of {skeleton.family.model_type} can only have one width, a global allocation makes many; "
                "pass --allocation uniform --stock"
            )
        raise UsageError(
            "global allocation gives every layer its own widths: leave --stock, --attention-ratio and --mlp-ratio out, "
            "or pass --allocation uniform"
        )
    rule = GlobalRule(_ratio(config), config.normalize, config.min_keep, config.round_to)
    allocation.check_global(rule, costs, skeleton.geometry)

    def keep(scores: UnitScores) -> KeptUnits:
        return allocation.allocate_globally(scores.values, rule, costs, skeleton.geometry, len(skeleton.layers))

    what = f"are compared by {rule.normalize} scores and lose the lowest units"
    return Choice(keep(_no_scores(skeleton, layers)), keep, what, "global")


def _no_scores(skeleton: Skeleton, layers: range) -> UnitScores:
    return UnitScores(layers, skeleton.family.kinds, skeleton.geometry)


def _ratio(config: PruneConfig) -> float:
    assert config.ratio is not None, "PruneConfig fills it in"
    return config.ratio


def _sparsity(config: PruneConfig, skeleton: Skeleton, layers: range) -> Sparsity:
    """The pattern, which every matrix of the prunable layers must be able to have."""
    n, m = config.n_of_m or (0, 0)
    for layer in layers if m else ():
        for name, transposed in skeleton.matrices(layer).items():
            columns = skeleton.entries[layer][name].shape[0 if transposed else 1]
            if columns % m:
                raise UsageError(
                    f"--granularity {n}:{m}: layer {layer}, {name} has rows of {columns} weights, which {m} does not "
                    "divide; use --granularity weights"
                )
    return Sparsity(_ratio(config), n, m)


def _state_bytes(
    config: PruneConfig, skeleton: Skeleton, settings: Mapping[str, Any], costs: Mapping[Kind, int], layers: range
) -> int:
    """Bytes of state that the method keeps between its sweeps."""
    if config.target != "units":
        scored = sum(
            torch.Size(skeleton.entries[layer][name].shape).numel()
            for layer in layers
            for name in skeleton.matrices(layer)
        )
    else:
        scored = sum(costs[kind] * skeleton.geometry.units(kind) for kind in costs) * len(layers)
    copies = METHODS[config.method].state_copies(settings, config.target)
    size = 8 if skeleton.dtype.itemsize == 8 else getattr(torch, config.state_dtype).itemsize
    return size * copies * scored


def describe(config: PruneConfig, skeleton: Skeleton, plan: Plan) -> str:
    """The plan in a few lines."""
    total, gone = skeleton.parameters, removed_parameters(skeleton, plan, plan.choice.widths)
    what = plan.choice.what
    if config.target != "weights":
        prunable = sum(plan.costs[kind] * skeleton.geometry.units(kind) for kind in plan.costs) * len(plan.layers)
        share = f"{gone / max(1, prunable):.1%} of what is prunable there, " if config.target == "units" else ""
        what += f": {gone:,} parameters, {share}{gone / total:.1%} of the model"
    lines = [
        f"{config.model}: {skeleton.family.model_type}, {len(skeleton.layers)} layers, {total:,} parameters",
        f"layers {plan.layers.start}:{plan.layers.stop} {what}",
        *skeleton.notes,
    ]
    if plan.repair is not None:
        goal = "the dense model's residual stream" if plan.repair == "stream" else "the layer's own output"
        fitted = "o and down are" if "channel" in skeleton.family.kinds else "o is"
        lines.append(f"{fitted} then fitted anew to {goal}, by least squares")
    if plan.state_bytes:
        lines.append(
            f"{config.method} keeps {human(plan.state_bytes)} of {config.state_dtype} state between its sweeps"
        )
    if plan.layout == "ragged":
        why, remedy = "no stock class has layers of these widths", "--stock prunes all layers alike and needs neither"
        if plan.choice.allocation == "global":
            remedy = "--allocation uniform --stock needs neither"
        if plan.new_biases:
            why, remedy = "o and down get biases", "--no-bias leaves them out"
        lines.append(f"{why}: load with trust_remote_code=True or after `import streamprune`; {remedy}")
    return "\n".join(lines)


def removed_parameters(skeleton: Skeleton, plan: Plan, kept: KeptUnits) -> int:
    """Parameters that go; added biases are not counted."""
    sizes = [sum(shape.numel() for shape in skeleton.shapes(layer).values()) for layer in range(len(skeleton.layers))]
    return allocation.removed_parameters(kept, plan.costs, skeleton.geometry, sizes)
