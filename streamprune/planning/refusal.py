"""The line that refuses a run which does not fit: what is lacking, the smallest that would do, and what would help."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from streamprune.config import PruneConfig
from streamprune.figures import human
from streamprune.methods.table import METHODS
from streamprune.planning.decision import Plan
from streamprune.planning.stage import Stage

WORTH_NAMING = 0.1  # of what is held: less of it would not make the run fit


def refusal(
    config: PruneConfig,
    plan: Plan,
    found: Sequence[Stage],
    smallest: tuple[int, int],
    limits: tuple[int, int],
    *,
    gpu: bool,
    on_device: bool,
) -> str:
    """Say in one line what budget is lacking, the smallest that would do, what it is made of, and what to try instead.

    Args:
        found: the stages of the run that needs least.
        smallest: bytes on the GPU and of memory that it would fit into. limits: what there are.
        on_device: it is the GPU that lacks them.
    """

    def held(stage: Stage) -> Mapping[str, int]:
        return {**stage.device, **stage.host} if not gpu else stage.device if on_device else stage.host

    lacking = []
    if smallest[0] > limits[0] > 0:
        others = " and not held by other processes" if (config.gpu_memory or 0) > limits[0] else ""
        lacking.append(f"{_mib(smallest[0])} of GPU memory (--gpu-memory), {_mib(limits[0])} are there{others}")
    if smallest[1] > limits[1]:
        lacking.append(f"{_mib(smallest[1])} of memory (--host-memory), {_mib(limits[1])} are there")
    largest = max(found, key=lambda stage: sum(held(stage).values()))
    parts = sorted(held(largest).items(), key=lambda part: -part[1])
    made_of = ", ".join(f"{human(size)} of {name}" for name, size in parts[:3] if size)
    remedies = ", or ".join(_remedies(config, plan, largest.name, held(largest), gpu=gpu) or ["raise it"])
    return f"{config.method} needs at least {', and '.join(lacking)} ({largest.name}: {made_of}); {remedies}"


def _remedies(config: PruneConfig, plan: Plan, stage: str, held: Mapping[str, int], *, gpu: bool) -> list[str]:
    """List what would make a stage smaller that holds this."""
    if stage.startswith("perplexity"):
        return ["pass --no-evaluate"]

    def much(*names: str) -> bool:
        size = sum(size for part, size in held.items() if any(name in part for name in names))
        return size > WORTH_NAMING * sum(held.values())

    method, remedies = METHODS[config.method], []
    if much("hidden states", "activations") and stage != "writing":
        remedies.append("lower --compensate-tokens" if stage == "repairing" else "lower --samples or --seq-len")
    if config.scratch is None and much("hidden states", "state of the method"):
        remedies.append("give --scratch DIR")
    # A journal wants the one that it was begun with.
    if (config.micro_batch or 1) > 1 and not config.resume and much("activations"):
        remedies.append("lower --micro-batch")
    if plan.state_bytes > WORTH_NAMING * sum(held.values()) and (gpu or not config.resume):
        without = " or ".join(dict.fromkeys(state.without for state in plan.state))
        remedies.append(
            f"for its {human(plan.state_bytes)} of state use --method {method.stateless}, or --set {without}"
        )
    return remedies


def _mib(nbytes: int) -> str:
    return f"{-(-nbytes // 2**20)}MiB"
