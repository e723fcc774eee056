"""streamprune prunes language models that do not fit in memory by paging their layers through one device.

    from streamprune import PruneConfig, evaluate, plan, prune, verify

    config = PruneConfig(model="SmolLM2-135M", output="pruned", method="taylor", ratio=0.2)
    print(plan(config).text)
    result = prune(config)
    print(evaluate(result.output).perplexity)
    assert all(check.passed for check in verify(result.output))

`METHODS` and `FAMILIES` are the tables of what there is:

    print([name for name, method in METHODS.items() if "layers" in method.targets])
    print([name for name, family in FAMILIES.items() if family.ragged])

All errors are a `StreampruneError`, whose text names the thing, the values and the remedy:

    try:
        prune(config)
    except StreampruneError as error:
        print(error)

Importing it also lets transformers load checkpoints whose layers have different widths (`AutoModelForCausalLM`).
torch and transformers are imported when something of theirs is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from streamprune.config import PruneConfig
from streamprune.errors import (
    CalibrationError,
    CheckpointError,
    JournalError,
    KernelError,
    OutputError,
    StreampruneError,
    TaskError,
    UsageError,
)
from streamprune.methods.table import METHODS
from streamprune.output import ragged
from streamprune.recovery.options import RecoverConfig

if TYPE_CHECKING:
    from streamprune.model.families import FAMILIES
    from streamprune.pipeline.evaluate import evaluate
    from streamprune.pipeline.progress import Progress
    from streamprune.pipeline.recover import RecoverResult, recover
    from streamprune.pipeline.run import Forecast, PruneResult, prune
    from streamprune.pipeline.run import foretell as plan
    from streamprune.reports.compare import Comparison, compare
    from streamprune.reports.report import report
    from streamprune.reports.speed import Speeds, speed
    from streamprune.streaming.perplexity import Perplexity
    from streamprune.tasks.evaluate import TaskScore, TaskScores, evaluate_tasks
    from streamprune.verification.comparison import Check
    from streamprune.verification.verify import verify

__all__ = [
    "FAMILIES",
    "METHODS",
    "CalibrationError",
    "Check",
    "CheckpointError",
    "Comparison",
    "Forecast",
    "JournalError",
    "KernelError",
    "OutputError",
    "Perplexity",
    "Progress",
    "PruneConfig",
    "PruneResult",
    "RecoverConfig",
    "RecoverResult",
    "Speeds",
    "StreampruneError",
    "TaskError",
    "TaskScore",
    "TaskScores",
    "UsageError",
    "compare",
    "evaluate",
    "evaluate_tasks",
    "plan",
    "prune",
    "recover",
    "report",
    "speed",
    "verify",
]

# Where the rest is; what is asked for is imported then.
_HOMES = {
    "Check": "verification.comparison:Check",
    "Comparison": "reports.compare:Comparison",
    "FAMILIES": "model.families:FAMILIES",
    "Forecast": "pipeline.run:Forecast",
    "Perplexity": "streaming.perplexity:Perplexity",
    "Progress": "pipeline.progress:Progress",
    "PruneResult": "pipeline.run:PruneResult",
    "RecoverResult": "pipeline.recover:RecoverResult",
    "TaskScore": "tasks.evaluate:TaskScore",
    "TaskScores": "tasks.evaluate:TaskScores",
    "compare": "reports.compare:compare",
    "evaluate": "pipeline.evaluate:evaluate",
    "evaluate_tasks": "tasks.evaluate:evaluate_tasks",
    "plan": "pipeline.run:foretell",
    "prune": "pipeline.run:prune",
    "recover": "pipeline.recover:recover",
    "Speeds": "reports.speed:Speeds",
    "report": "reports.report:report",
    "speed": "reports.speed:speed",
    "verify": "verification.verify:verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


ragged.announce()
