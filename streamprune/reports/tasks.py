"""Scores on tasks in a report, as `streamprune eval --tasks --json` writes them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamprune.errors import UsageError
from streamprune.reports import page
from streamprune.storage.checkpoint import read_json

Given = str | os.PathLike[str] | None


@dataclass(frozen=True)
class TaskTable:
    """Table of tasks: a row each, with the metric and the scores that were given, in the order dense and pruned."""

    rows: tuple[tuple[str, ...], ...] = ()

    @classmethod
    def read(cls, pruned: Given, dense: Given) -> TaskTable:
        """Read the files of the pruned and of the dense model; each may be None.

        Raises:
            CheckpointError: a file that is no JSON. UsageError: one that has other contents.
        """
        named = {name: Path(file) for name, file in (("dense", dense), ("pruned", pruned)) if file is not None}
        if not named:
            return cls()
        scores = {name: _scores(file) for name, file in named.items()}
        keys = dict.fromkeys(key for each in scores.values() for key in each)
        rows = [(task, metric, *(each.get((task, metric), "-") for each in scores.values())) for task, metric in keys]
        return cls((("task", "metric", *scores), *rows))


def _scores(file: Path) -> dict[tuple[str, str], str]:
    """Read a file's scores with their standard errors, by task and metric, and their mean."""
    found = read_json(file)
    try:
        scores = {
            (str(each["task"]), str(each["metric"])): _said(each["value"], each["stderr"]) for each in found["scores"]
        }
        mean = {} if found["mean"] is None else {("mean", ""): _said(found["mean"], found["mean_stderr"])}
        return scores | mean  # perplexities have none
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise UsageError(
            f"{file} is not as streamprune eval --tasks --json writes it ({error!r}); give such a file"
        ) from error


def _said(value: Any, stderr: Any) -> str:
    return f"{float(value):.4f}" + ("" if stderr is None else f" ± {float(stderr):.4f}")


def task_section(tasks: TaskTable) -> Sequence[str]:
    """Say the scores on tasks, where they were given."""
    if not tasks.rows:
        return []
    return [page.heading("Tasks"), page.cells(tasks.rows, "scores on tasks, with standard errors")]
