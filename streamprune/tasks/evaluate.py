"""Scores of a model of any size, dense or pruned, on lm-eval's tasks."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamprune.config import as_options
from streamprune.errors import TaskError, UsageError
from streamprune.tasks.suites import tasks_of
from streamprune.values import AUTO, dtype_name, source, whole_number

# Of a task's metrics the one that stands for it in the mean: the first that it has. Others are no shares.
SHARES = ("acc_norm", "acc", "exact_match", "em", "f1")
# What lm-eval and its templates raise where a question is not as its task expects.
MISFITS = (LookupError, TypeError, ValueError, AttributeError)


@dataclass(frozen=True)
class TaskScore:
    """Metric of a task: `value` with its standard error, from `n` questions; `stderr` is None where there is none.

    `main` says that it stands for the task in the mean.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int
    main: bool


@dataclass(frozen=True)
class TaskScores:
    """Scores on tasks, and what was computed in: a `dtype`."""

    scores: tuple[TaskScore, ...]
    dtype: str = ""

    @property
    def mean(self) -> float | None:
        """Mean over the tasks, of the metric that stands for each; None where none does."""
        values = [each.value for each in self.scores if each.main]
        return sum(values) / len(values) if values else None

    @property
    def mean_stderr(self) -> float | None:
        """Standard error of the mean; None where a task has none."""
        errors = [each.stderr for each in self.scores if each.main]
        if not errors or any(error is None for error in errors):
            return None
        return sum(error**2 for error in errors if error is not None) ** 0.5 / len(errors)


def evaluate_tasks(
    model: str | os.PathLike[str],
    tasks: str | Sequence[str],
    *,
    task_data: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    device: str | None = None,
    dtype: str = AUTO,
    bos: str = "auto",
    micro_batch: int | None = None,
    trust_remote_code: bool = False,
    progress: Any = None,
) -> TaskScores:
    """Score a model on lm-eval's tasks by streamed sweeps, as `streamprune eval --tasks` does.

        print(evaluate_tasks("pruned", "moreau").mean)

    Args:
        model: directory, dense or pruned, or hub id.
        tasks: lm-eval's names, or a suite's: moreau, gblm, bernoulli.
        task_data: directory of the tasks' data; by default the hub's.
        limit: questions of each task, from the first; None for all.
        num_fewshot: examples before each question; None for the task's own number.
        device, dtype, bos, micro_batch, trust_remote_code: as of `PruneConfig`.
        progress: as of `prune`.

    Raises:
        StreampruneError: as `prune`, of the model; a task that is not known or has no data.
    """
    limit, num_fewshot = _at_least("--limit", limit, 1), _at_least("--num-fewshot", num_fewshot, 0)
    device, dtype, bos, micro_batch = as_options(device=device, dtype=dtype, bos=bos, micro_batch=micro_batch)
    names = tasks_of(tasks)
    # Only now, so that a command with a wrong number is answered at once.
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise UsageError("tasks are lm-eval's; pip install 'streamprune[tasks]'") from None
    from streamprune.pipeline.progress import Progress
    from streamprune.pipeline.source import Source
    from streamprune.storage.checkpoint import resolve_model
    from streamprune.tasks.loading import load_tasks
    from streamprune.tasks.streamed_lm import StreamedLM
    from streamprune.texts.tokenizer import load_tokenizer

    progress = Progress.of(progress)
    where = resolve_model(source("--model", model), trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(where, trust_remote_code=trust_remote_code)
    opened = Source(
        str(where),
        device=device,
        dtype=dtype,
        decompress=True,
        trust_remote_code=trust_remote_code,
    )
    data = None if task_data is None else Path(task_data)
    with redirect_stderr(io.StringIO()):  # bars and notes of lm-eval's own, of every task
        loaded = load_tasks(names, data, num_fewshot=num_fewshot, say=progress.say)
    with opened.open(progress) as sweeper:
        for note in sweeper.skeleton.notes:
            progress.say(note)
        lm = StreamedLM(sweeper, tokenizer, bos=bos, micro_batch=micro_batch, progress=progress)
        return TaskScores(tuple(_scores(_asked(lm, loaded, limit))), dtype_name(sweeper.skeleton.dtype))


def _at_least(flag: str, value: Any, least: int) -> int | None:
    if value is None:
        return None
    number = whole_number(flag, value)
    if number < least:
        raise UsageError(f"{flag} {value}: give at least {least}")
    return number


def _asked(lm: Any, tasks: Mapping[str, Any], limit: int | None) -> dict[str, Any]:
    """Ask the questions of tasks, and return what lm-eval gives.

    Raises:
        TaskError: a question is not as its task expects.
    """
    import lm_eval
    from jinja2 import TemplateError

    try:
        # Some metrics' standard errors are said on stdout as they are made, which is for the scores.
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            return lm_eval.evaluate(lm, {"tasks": tasks}, limit=limit, log_samples=False)
    except (*MISFITS, TemplateError) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise TaskError(f"lm-eval cannot ask {', '.join(tasks)} ({said}); look into the questions' data") from error


def _scores(found: dict[str, Any]) -> list[TaskScore]:
    """Take the scores of each task and metric out of what lm-eval gives."""
    scores = []
    for task, n in found["n-samples"].items():
        metrics = {}
        for key, value in found["results"][task].items():
            metric, _, filtered = key.partition(",")
            if filtered and not metric.endswith("_stderr") and isinstance(value, int | float):
                stderr = found["results"][task].get(f"{metric}_stderr,{filtered}")
                name = metric if filtered == "none" else f"{metric} ({filtered})"
                metrics[name] = float(value), float(stderr) if isinstance(stderr, int | float) else None
        main = next((each for name in SHARES for each in metrics if each.split(" ")[0] == name), None)
        scores += [TaskScore(task, each, *metrics[each], n["effective"], each == main) for each in metrics]
    return scores
