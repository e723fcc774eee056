"""What is decided before any layer's weights are read: what goes, how the output is laid out, what it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from streamprune import allocation, compressed, report, slim
from streamprune.allocation import GlobalRule, KeptUnits
from streamprune.compensate import Target, repair_target
from streamprune.config import PruneConfig
from streamprune.errors import StreampruneError, UsageError
from streamprune.families import Kind, unit_costs
from streamprune.methods import METHODS, LayerScores, Sparsity, UnitScores
from streamprune.skeleton import Skeleton

NAMES: Mapping[Kind, str] = {"kv_group": "KV groups", "channel": "channels"}


@dataclass(frozen=True)
class Plan:
    """Decisions of a run.

    Attributes:
        layers: the prunable ones.
        costs: parameters of a unit of each kind.
        widths: kept units as far as they are known before the scores: how many, not which.
        removed: units that go from every layer, with a uniform allocation.
        rule: of a global allocation.
        gone_layers: how many layers go.
        sparsity: of weights.
        packed: the matrices that are compressed, and their modules.
        biases: o and down get biases.
        repair: what o and down are fitted to afterwards, if they are.
        layout: "same", "stock" or "ragged".
        output_bytes: of all tensors that are written, at most.
        state_bytes: of the method, between sweeps.
    """

    layers: range
    costs: dict[Kind, int]
    widths: KeptUnits
    removed: dict[Kind, int] | None
    rule: GlobalRule | None
    gone_layers: int
    sparsity: Sparsity | None
    packed: dict[str, str]
    biases: bool
    repair: Target | None
    layout: str
    output_bytes: int
    state_bytes: int

    def keep(self, scores: UnitScores | LayerScores, skeleton: Skeleton, contiguous: bool) -> KeptUnits:
        """What stays, by the scores."""
        geometry, n_layers = skeleton.geometry, len(skeleton.layers)
        if isinstance(scores, LayerScores):
            kinds, count = skeleton.family.kinds, self.gone_layers
            return allocation.select_layers(scores.values, count, geometry, kinds, n_layers, contiguous=contiguous)
        if self.rule is not None:
            return allocation.allocate_globally(scores.values, self.rule, self.costs, geometry, n_layers)
        assert self.removed is not None
        return allocation.select(scores.values, self.removed, geometry, n_layers)


def make_plan(config: PruneConfig, skeleton: Skeleton, settings: Mapping[str, Any]) -> Plan:
    """Decide, and refuse what cannot be done.

    Raises:
        UsageError: a ratio, range or layout that does not fit the model.
        StreampruneError: too little memory for the method's state.
    """
    family, geometry, n_layers = skeleton.family, skeleton.geometry, len(skeleton.layers)
    assert config.ratio is not None, "PruneConfig fills it in"
    costs = unit_costs(family, geometry, skeleton.shapes(0))
    layers = allocation.prunable_layers(
        config.layers, n_layers, whole=config.target == "weights", stock=config.stock and config.target == "units"
    )
    whole = {layer: allocation.all_units(geometry, family.kinds) for layer in range(n_layers)}
    removed, rule, gone, sparsity, widths = None, None, 0, None, whole
    if config.target == "weights":
        sparsity = _sparsity(config, skeleton, layers)
    elif config.target == "layers":
        gone = allocation.layers_to_remove(config.ratio, layers, n_layers)
        widths = {layer: units for layer, units in whole.items() if layer not in layers[:gone]}
    elif (config.allocation or METHODS[config.method].allocation) == "global":
        rule = _global_rule(config)
        allocation.check_global(rule, costs, geometry)
        zeros = {layer: {kind: torch.zeros(geometry.units(kind)) for kind in costs} for layer in layers}
        widths = allocation.allocate_globally(zeros, rule, costs, geometry, n_layers)
    else:
        removed = _uniform(config, skeleton, costs, layers)
        zeros = {layer: {kind: torch.zeros(geometry.units(kind)) for kind in removed} for layer in layers}
        widths = allocation.select(zeros, removed, geometry, n_layers)
    repair: Target | None = None
    if config.compensate:
        # Whole layers leave nothing of their own to fit: the layer before them takes their place in the stream.
        repair = repair_target(skeleton, "stream" if config.target == "layers" else config.compensate_target)
    biases = settings.get("bias") == "yes" and not config.compensate
    packed = compressed.matrices(skeleton, layers) if config.compress else {}
    specs = slim.output_specs(skeleton, widths, biases=biases, packed=packed)
    new_biases = biases and len(specs) > len(skeleton.checkpoint.tensors)
    slim.check_emittable(skeleton, widths, config.emit, biases=new_biases)
    state_bytes = _state_bytes(config, skeleton, settings, costs, layers)
    shape = slim.layout(geometry, widths, n_layers, biases=new_biases)
    output_bytes = sum(spec.nbytes for spec in specs)
    assert not packed or output_bytes < skeleton.checkpoint.nbytes, "compressed weights take less"
    return Plan(
        layers,
        costs,
        widths,
        removed,
        rule,
        gone,
        sparsity,
        packed,
        biases,
        repair,
        shape,
        output_bytes,
        state_bytes,
    )


def _uniform(config: PruneConfig, skeleton: Skeleton, costs: dict[Kind, int], layers: range) -> dict[Kind, int]:
    assert config.ratio is not None
    ratios = allocation.Ratios(config.ratio, config.attention_ratio, config.mlp_ratio, config.round_to)
    # One width for all layers goes to the stock class, asked for or not; a Mistral takes any head count.
    stock = len(layers) == len(skeleton.layers) and config.emit is None
    hidden_size = skeleton.config.hidden_size
    return allocation.uniform(skeleton.family, skeleton.geometry, costs, ratios, hidden_size, stock=stock)


def _global_rule(config: PruneConfig) -> GlobalRule:
    if config.stock or config.attention_ratio is not None or config.mlp_ratio is not None:
        raise UsageError(
            f"{config.method} compares all layers and kinds of unit: leave --stock, --attention-ratio and --mlp-ratio "
            "out, or pass --allocation uniform"
        )
    assert config.ratio is not None
    return GlobalRule(config.ratio, config.normalize, config.min_keep, config.round_to)


def _sparsity(config: PruneConfig, skeleton: Skeleton, layers: range) -> Sparsity:
    """The pattern, which every matrix of the prunable layers must be able to have."""
    assert config.ratio is not None
    if config.n_of_m is None:
        return Sparsity(config.ratio)
    n, m = config.n_of_m
    for layer in layers:
        for name, transposed in skeleton.matrices(layer).items():
            columns = skeleton.entries[layer][name].shape[0 if transposed else 1]
            if columns % m:
                raise UsageError(
                    f"--granularity {n}:{m}: layer {layer}, {name} has rows of {columns} weights, which {m} does not "
                    "divide; use --granularity weights"
                )
    return Sparsity(config.ratio, n, m)


def _state_bytes(
    config: PruneConfig, skeleton: Skeleton, settings: Mapping[str, Any], costs: Mapping[Kind, int], layers: range
) -> int:
    """Bytes of float32 state that the method keeps between its sweeps; refused where they do not fit."""
    if config.target == "weights":
        scored = sum(
            torch.Size(skeleton.entries[layer][name].shape).numel()
            for layer in layers
            for name in skeleton.matrices(layer)
        )
    else:
        scored = sum(costs[kind] * skeleton.geometry.units(kind) for kind in costs) * len(layers)
    state_bytes = 4 * METHODS[config.method].state_copies(settings, config.target) * scored
    available = psutil.virtual_memory().available
    if state_bytes > available:
        raise StreampruneError(
            f"{config.method} keeps {report.human(state_bytes)} of state for {scored:,} parameters, "
            f"{report.human(available)} of memory are free; "
            "use --method taylor, --set steps=1 or draws=1, or fewer --layers"
        )
    return state_bytes


def describe(config: PruneConfig, skeleton: Skeleton, plan: Plan) -> str:
    """The plan in a few lines."""
    total = skeleton.parameters
    lines = [f"{config.model}: {skeleton.family.model_type}, {len(skeleton.layers)} layers, {total:,} parameters"]
    lines.append(f"layers {plan.layers.start}:{plan.layers.stop} {_what_goes(config, skeleton, plan)}")
    if plan.repair is not None:
        what = "the dense model's residual stream" if plan.repair == "stream" else "the layer's own output"
        lines.append(f"o and down are then fitted anew to {what}, by least squares")
    if plan.state_bytes:
        lines.append(
            f"{config.method} keeps {report.human(plan.state_bytes)} of float32 state in memory between its sweeps"
        )
    if plan.layout == "ragged":
        why = "o and down get biases" if plan.biases else "the layers come out with different widths"
        lines.append(
            f"{why}: load with trust_remote_code=True or after `import streamprune`; "
            + ("--no-bias leaves them out" if plan.biases else "--stock prunes all layers alike and needs neither")
        )
    return "\n".join(lines)


def _what_goes(config: PruneConfig, skeleton: Skeleton, plan: Plan) -> str:
    if plan.sparsity is not None:
        pattern = config.granularity if plan.sparsity.m else f"{1 - plan.sparsity.ratio:.1%}"
        size = f", stored as {compressed.FORMAT}" if config.compress else "; the files stay as large"
        return f"keep {pattern} of the weights in every row, the rest become zeros{size}"
    if config.target == "layers":
        run = "in one run " if config.contiguous else ""
        return f"lose {plan.gone_layers} of {len(plan.layers)} layers {run}({_share(skeleton, plan)})"
    if plan.rule is not None:
        return f"are compared by {plan.rule.normalize} scores, {_share(skeleton, plan)} go"
    assert plan.removed is not None
    units = skeleton.geometry.units
    each = ", ".join(f"{count} of {units(kind)} {NAMES[kind]}" for kind, count in plan.removed.items())
    return f"lose {each} each: {_share(skeleton, plan)}"


def _share(skeleton: Skeleton, plan: Plan) -> str:
    gone, total = removed_parameters(skeleton, plan, plan.widths), skeleton.parameters
    prunable = sum(plan.costs[kind] * skeleton.geometry.units(kind) for kind in plan.costs) * len(plan.layers)
    of_units = "" if plan.gone_layers else f"{gone / max(1, prunable):.1%} of what is prunable there, "
    return f"{gone:,} parameters, {of_units}{gone / total:.1%} of the model"


def removed_parameters(skeleton: Skeleton, plan: Plan, kept: KeptUnits) -> int:
    """Parameters that go; added biases are not counted."""
    sizes = [sum(shape.numel() for shape in skeleton.shapes(layer).values()) for layer in range(len(skeleton.layers))]
    return allocation.removed_parameters(kept, plan.costs, skeleton.geometry, sizes)
