"""Decisions before any layer's weights are read: what goes, how the output is laid out, what it takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from streamprune.config import PruneConfig
from streamprune.errors import UsageError
from streamprune.figures import human
from streamprune.methods.needs import KeptState
from streamprune.methods.sinks import Sparsity, UnitScores
from streamprune.methods.table import METHODS, resolve_settings
from streamprune.model.families import unit_costs
from streamprune.model.masking import output_matrices
from streamprune.model.skeleton import Skeleton
from streamprune.model.units import KIND_NAMES, KeptUnits, Kind
from streamprune.output.form import OutputForm
from streamprune.output.mistral import MistralForm
from streamprune.output.ragged_form import RaggedForm
from streamprune.output.sparse24 import Sparse24Form
from streamprune.output.stock import StockForm
from streamprune.paging.device import state_dtype
from streamprune.planning import allocation
from streamprune.planning.allocation import GlobalRule, UnitCosts
from streamprune.planning.stage import calibration_shape
from streamprune.recovery.least_squares import RepairGoal, repair_goal
from streamprune.storage.journal import Key
from streamprune.streaming.statistics import Count, Goal, Keep, UnitValues
from streamprune.values import dtype_name


@dataclass(frozen=True)
class Plan:
    """Decisions of a run.

    Attributes:
        layers: the prunable ones.
        settings: the method's own numbers.
        costs: parameters of a unit, by layer and kind.
        choice: what goes, and how it is chosen.
        sparsity: the pattern of weights that go; None where units or layers go.
        form: the output's form, with the widths of `choice`: with a global allocation its bytes are right to a unit.
        repair: what o and down are fitted to afterwards, if they are.
        state: bytes of what the method keeps between its sweeps.
        state_dtype: its dtype where it is not the method's own.
    """

    layers: range
    settings: Mapping[str, Any]
    costs: UnitCosts
    choice: Choice
    sparsity: Sparsity | None
    form: OutputForm
    repair: RepairGoal | None
    state: Mapping[KeptState, int]
    state_dtype: str

    @property
    def state_bytes(self) -> int:
        """Bytes of all that the method keeps between its sweeps."""
        return sum(self.state.values())


@dataclass(frozen=True)
class Choice:
    """Choice of what goes.

    Attributes:
        widths: kept units of some choice of the same size, from which sizes are known before there are scores; of whole
            layers that go the lightest, since others may have other sizes.
        keep: gives the kept units by the values of scores, and the part of what is to go that does.
        what: the choice in words.
        count: of units, gives the numbers that go.
        allocation: that of units: "uniform" or "global".
        apart: whether each kind of units has a budget of its own.
    """

    widths: KeptUnits
    keep: Keep
    what: str
    count: Count | None = None
    allocation: str | None = None
    apart: bool = False


def make_plan(config: PruneConfig, skeleton: Skeleton, form: type[OutputForm] | None = None) -> Plan:
    """Decide what a run does to a model, and refuse what cannot be done.

    Args:
        form: class of the output's form, where it is another than the options say.

    Raises:
        UsageError: a ratio, range, layout or setting that does not fit the model.
        StreampruneError: too little memory for the method's state.
    """
    n_layers = len(skeleton.layers)
    settings = resolve_settings(config.method, config.settings, config.target, repairs=config.compensate)
    if config.target == "weights" and skeleton.family.fused:
        raise UsageError(
            f"--granularity {config.granularity}: most weights of {skeleton.family.model_type} are its experts', which "
            "cannot be pruned one by one; use --granularity layers or units"
        )
    costs = {
        layer: unit_costs(skeleton.family, geometry, skeleton.shapes(layer))
        for layer, geometry in enumerate(skeleton.geometries)
    }
    stock = config.stock and config.target == "units"
    layers = allocation.prunable_layers(config.layers, n_layers, whole=config.target == "weights", stock=stock)
    choose = {"weights": _choose_weights, "layers": _choose_layers, "units": _choose_units}[config.target]
    choice = choose(config, skeleton, costs, layers)
    repair: RepairGoal | None = None
    if config.compensate:
        # Whole layers leave nothing of their own to fit: the layer before them takes their place in the stream.
        repair = repair_goal(skeleton, "stream" if config.target == "layers" else config.compensate_target)
    something_goes = choice.widths != skeleton.all_units()
    biases = settings.get("bias") == "yes" and something_goes
    # By `keep`, which chooses the family's own class where it takes these widths.
    planned = form_class(config, form)(skeleton, choice.widths, layers, biases).keep(choice.widths)
    if planned.added_biases and (config.stock or not skeleton.family.ragged):
        raise UsageError("no stock class has biases on o and down alone; leave them out with --no-bias")
    planned.check()
    narrows = METHODS[config.method].narrows
    kept_in = state_dtype(config.state_dtype, skeleton.device, skeleton.dtype, narrows=narrows)
    plan = Plan(
        layers=layers,
        settings=settings,
        costs=costs,
        choice=choice,
        sparsity=_sparsity(config, skeleton, layers) if config.target == "weights" else None,
        form=planned,
        repair=repair,
        state=_state(config, skeleton, settings, layers, kept_in),
        state_dtype=kept_in,
    )
    samples, _ = calibration_shape(config, skeleton.positions)
    wanted = goal(config, skeleton, plan)
    METHODS[config.method].check_for(settings, skeleton, config.target, layers, wanted, samples)
    return plan


def form_class(config: PruneConfig, form: type[OutputForm] | None = None) -> type[OutputForm]:
    """Return the form of output that the options say, or the `form` that is given instead."""
    if form is not None:
        return form
    if config.compress:
        return Sparse24Form
    return MistralForm if config.emit == "mistral" else RaggedForm  # which is stock where it can be


def written_form(facts: Mapping[str, Any]) -> type[OutputForm]:
    """The form of an output, by the contents of its streamprune.json."""
    if facts["options"].get("compress"):
        return Sparse24Form
    return RaggedForm if facts["layout"] == "ragged" else StockForm


def _choose_weights(config: PruneConfig, skeleton: Skeleton, costs: UnitCosts, layers: range) -> Choice:
    """Choose for `weights` and N:M, where all units stay."""
    everything = skeleton.all_units()
    share = config.granularity if config.n_of_m else f"{1 - _ratio(config):.1%}"
    where = "in blocks of their columns" if config.method == "sparsegpt" and not config.n_of_m else "in every row"
    size = "" if config.compress else "; the files stay as large"
    return Choice(
        everything,
        lambda values, part=1.0: everything,
        f"keep {share} of the weights {where}, the rest become zeros{size}",
    )


def _choose_layers(config: PruneConfig, skeleton: Skeleton, costs: UnitCosts, layers: range) -> Choice:
    everything = skeleton.all_units()
    count = allocation.layers_to_remove(_ratio(config), layers, len(everything))

    def keep(values: Mapping[int, float], part: float = 1.0) -> KeptUnits:
        return allocation.select_layers(values, round(part * count), everything, contiguous=config.contiguous)

    # The lightest: where layers have different widths, no others leave more to write and to hold.
    widths = keep({layer: float(_layer_parameters(skeleton, layer)) for layer in layers})
    return Choice(widths, keep, f"lose {count} of {len(layers)} layers{' in one run' if config.contiguous else ''}")


def _choose_units(config: PruneConfig, skeleton: Skeleton, costs: UnitCosts, layers: range) -> Choice:
    if (config.allocation or METHODS[config.method].allocation) == "global":
        return _choose_globally(config, skeleton, costs, layers)
    for name in ("normalize", "min_keep"):
        if getattr(config, name) != PruneConfig.__dataclass_fields__[name].default:
            raise UsageError(f"--{name.replace('_', '-')} is of --allocation global; add that, or leave it out")
    if config.stock and "per_layer_config" in skeleton.checkpoint.config:
        raise UsageError("--stock: the layers of this model have different widths already; leave it out")
    ratios = allocation.Ratios(_ratio(config), config.attention_ratio, config.mlp_ratio, config.round_to)
    # One width for all layers goes to the stock class, asked for or not; a Mistral takes any head count.
    stock = len(layers) == len(skeleton.layers) and config.emit is None
    hidden_size, everything = skeleton.config.hidden_size, skeleton.all_units()
    removed = {
        layer: allocation.uniform(
            skeleton.family, skeleton.geometries[layer], costs[layer], ratios, hidden_size, stock=stock
        )
        for layer in layers
    }

    def count(ordered: UnitValues, part: float = 1.0) -> dict[int, dict[Kind, int]]:
        return {layer: {kind: round(part * units) for kind, units in kinds.items()} for layer, kinds in removed.items()}

    def keep(values: UnitValues, part: float = 1.0) -> KeptUnits:
        return allocation.select(values, count(values, part), everything)

    each = ", ".join(
        f"{_span(removed[layer][kind] for layer in layers)} of "
        f"{_span(len(everything[layer][kind]) for layer in layers)} {KIND_NAMES[kind]}"
        for kind in reversed(skeleton.family.kinds)
    )
    apart = config.attention_ratio is not None or config.mlp_ratio is not None
    widths = keep(UnitScores(skeleton.all_units(layers)).values)
    return Choice(widths, keep, f"lose {each} each", count, "uniform", apart)


def _span(counts: Iterable[int]) -> str:
    """Write the numbers of several layers as one, or as the least and the largest."""
    found = sorted(set(counts))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _choose_globally(config: PruneConfig, skeleton: Skeleton, costs: UnitCosts, layers: range) -> Choice:
    if not skeleton.family.ragged:
        raise UsageError(
            f"layers of {skeleton.family.model_type} can only have one width, a global allocation makes many; "
            "pass --allocation uniform --stock"
        )
    if config.stock:
        raise UsageError(
            "global allocation gives every layer its own widths: leave --stock out, or pass --allocation uniform"
        )
    own = METHODS[config.method].normalize
    if own is not None and config.normalize is not None:
        raise UsageError(
            f"--normalize {config.normalize}: {config.method} compares its probabilities as they are; leave it out"
        )
    apart = _kinds_apart(config, skeleton)
    rule = GlobalRule(_ratio(config), own or config.normalize or "zscore", config.min_keep, config.round_to, apart)
    everything = skeleton.all_units()
    allocation.check_global(rule, costs, skeleton.all_units(layers))

    def count(ordered: UnitValues, part: float = 1.0) -> dict[int, dict[Kind, int]]:
        return allocation.count_globally(ordered, rule.eased(part), costs)

    def keep(values: UnitValues, part: float = 1.0) -> KeptUnits:
        return allocation.allocate_globally(values, rule.eased(part), costs, everything)

    compared = "probabilities" if own is not None else f"{rule.normalize} scores"
    what = f"are compared by {compared} and lose the lowest units{', of each kind its own share' if apart else ''}"
    widths = keep(UnitScores(skeleton.all_units(layers)).values)
    return Choice(widths, keep, what, count, "global", bool(apart))


def _kinds_apart(config: PruneConfig, skeleton: Skeleton) -> dict[Kind, float]:
    """Return the fractions of kinds of unit that are set apart: with either of the two ratios that of KV groups."""
    given: dict[Kind, float | None] = {"kv_group": config.attention_ratio, "channel": config.mlp_ratio}
    for kind, share in given.items():
        if share and kind not in skeleton.family.kinds:
            flag = "--attention-ratio" if kind == "kv_group" else "--mlp-ratio"
            raise UsageError(f"{KIND_NAMES[kind]} of {skeleton.family.model_type} cannot be pruned; leave {flag} out")
    if given["channel"] is not None and given["kv_group"] is None:
        given["kv_group"] = _ratio(config)
    return {kind: share for kind, share in given.items() if share is not None and kind in skeleton.family.kinds}


def _ratio(config: PruneConfig) -> float:
    assert config.ratio is not None, "PruneConfig fills it in"
    return config.ratio


def _sparsity(config: PruneConfig, skeleton: Skeleton, layers: range) -> Sparsity:
    """Make the pattern of weights, which every matrix of the prunable layers must be able to have.

    Raises:
        UsageError: M does not divide the rows of a matrix.
    """
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


def _state(
    config: PruneConfig, skeleton: Skeleton, settings: Mapping[str, Any], layers: range, dtype: str
) -> dict[KeptState, int]:
    """Count the bytes of what the method keeps between its sweeps, by kind of state; `dtype` where it has none."""
    scored = {member.tensor for member in skeleton.family.members if member.scored}
    names = {
        layer: [name for name in skeleton.matrices(layer) if config.target != "units" or name in scored]
        for layer in layers
    }
    by_default = "float64" if skeleton.dtype.itemsize == 8 else dtype

    def nbytes(state: KeptState) -> int:
        numbers = sum(sum(state_numbers(state, skeleton, layer, of)) for layer, of in names.items())
        return getattr(torch, state.dtype or by_default).itemsize * numbers

    method = METHODS[config.method]
    return {state: nbytes(state) for state in method.states if state.kept(settings, config.target)}


def state_numbers(state: KeptState, skeleton: Skeleton, layer: int, names: Iterable[str]) -> list[int]:
    """Count the numbers of a kind of state that are kept of each of a layer's matrices."""
    shapes = skeleton.shapes(layer)
    widths = {each.tensor: shapes[each.tensor][each.dim] for each in output_matrices(skeleton, layer)}
    return [state.numbers(shapes[name], widths.get(name, 0)) for name in names]


def describe(config: PruneConfig, skeleton: Skeleton, plan: Plan) -> str:
    """Describe a plan in a few lines."""
    total, gone = skeleton.parameters, removed_parameters(skeleton, plan.costs, plan.choice.widths)
    what = plan.choice.what
    if config.target != "weights":
        prunable = prunable_parameters(skeleton, plan.costs, plan.layers)
        share = f"{gone / max(1, prunable):.1%} of what is prunable there, " if config.target == "units" else ""
        sizes = {_layer_parameters(skeleton, layer) for layer in plan.layers}
        least = "at least " if config.target == "layers" and len(sizes) > 1 else ""
        what += f": {least}{gone:,} parameters, {share}{gone / total:.1%} of the model"
    lines = [
        f"{config.model}: {skeleton.family.model_type}, {len(skeleton.layers)} layers, {total:,} parameters, "
        f"computed in {dtype_name(skeleton.dtype)}",
        f"layers {plan.layers.start}:{plan.layers.stop} {what}",
        *skeleton.notes,
    ]
    if plan.repair is not None:
        goal = "the dense model's residual stream" if plan.repair == "stream" else "the layer's own output"
        fitted = "o and down are" if "channel" in skeleton.family.kinds else "o is"
        lines.append(f"{fitted} then fitted anew to {goal}, by least squares")
    if plan.state_bytes:
        lines.append(f"{config.method} keeps {human(plan.state_bytes)} of {plan.state_dtype} state between its sweeps")
    if note := plan.form.note(plan.choice.allocation):
        lines.append(note)
    return "\n".join(lines)


def prunable_parameters(skeleton: Skeleton, costs: UnitCosts, layers: Iterable[int]) -> int:
    """Count the parameters of all units of these layers."""
    return sum(cost * skeleton.geometries[layer].units(kind) for layer in layers for kind, cost in costs[layer].items())


def goal(config: PruneConfig, skeleton: Skeleton, plan: Plan) -> Goal:
    """Return what a method may be told of what will stay."""
    choice, costs = plan.choice, plan.costs
    if config.target == "layers":
        gone = removed_parameters(skeleton, costs, choice.widths)
        total = sum(_layer_parameters(skeleton, layer) for layer in plan.layers)
        return Goal(choice.keep, {tuple((layer, "layer") for layer in plan.layers): float(total - gone)})
    together, stays = dict[object, list[Key]](), dict[object, float]()
    for layer in plan.layers:
        for kind in costs[layer]:
            # With a uniform allocation as many of each layer and kind stay, whichever they are.
            pool = (layer, kind) if choice.allocation == "uniform" else kind if choice.apart else None
            together.setdefault(pool, []).append((layer, kind))
            stays[pool] = stays.get(pool, 0.0) + costs[layer][kind] * len(choice.widths[layer][kind])
    return Goal(choice.keep, {tuple(keys): stays[pool] for pool, keys in together.items()}, choice.count)


def removed_parameters(skeleton: Skeleton, costs: UnitCosts, kept: KeptUnits) -> int:
    """Count the parameters that go when `kept` stay; added biases are not counted."""
    gone = 0
    for layer, everything in skeleton.all_units().items():
        if layer in kept:
            gone += sum(
                costs[layer][kind] * (len(units) - len(kept[layer][kind])) for kind, units in everything.items()
            )
        else:
            gone += _layer_parameters(skeleton, layer)
    return gone


def _layer_parameters(skeleton: Skeleton, layer: int) -> int:
    return sum(shape.numel() for shape in skeleton.shapes(layer).values())
