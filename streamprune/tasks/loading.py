"""Tasks of lm-eval by their names, with data from the hub or from the disk."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lm_eval.tasks
from huggingface_hub import constants, get_session
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Kind

from streamprune.errors import StreampruneError, TaskError, UsageError
from streamprune.tasks.local_data import local_dataset, one_line
from streamprune.tasks.suites import SUITES

# Where lm-eval keeps the tasks of the suites, if not in a folder of their name: to look through all its thousands takes
# ten seconds.
FOLDERS = {
    "boolq": "super_glue/boolq",
    "rte": "glue/rte",
}
HUB_SECONDS = 10.0  # that the hub may take to answer at all
FEWSHOT_SEED = 1234  # lm-eval's own


def load_tasks(
    names: Sequence[str],
    data: Path | None = None,
    *,
    num_fewshot: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Task]:
    """Load tasks with their data, by their own names; those of a group or tag of lm-eval each by itself.

    Args:
        data: directory of their data; None for the hub.
        num_fewshot: examples before each question; None for the task's own number. A task that is for none keeps none.
        say: is told what is not as the task has it.

    Raises:
        UsageError: lm-eval has no task of that name.
        TaskError: there are no data, or they do not fit.
    """
    index = _index(names, say)
    if data is not None and not data.is_dir():
        raise UsageError(f"--task-data {data} is no directory; give the one that holds the tasks' data")
    if data is None:
        _need_hub()
    tasks: dict[str, Task] = {}
    for name in names:
        if data is not None and index[name].kind is Kind.PY_TASK:
            raise UsageError(f"--tasks {name} reads its data by code of its own; leave --task-data out")
        overrides = None if data is None else {"class": _local_task(data, num_fewshot, say)}
        try:
            built = TaskFactory().build(index[name], overrides=overrides, registry=index)
        except StreampruneError:
            raise
        except Exception as error:  # lm-eval, datasets and the hub raise many kinds
            whose = "the hub's data" if data is None else f"the data in {data}"
            remedy = "give them with --task-data DIR" if data is None else "fetch or write them again"
            raise TaskError(f"{name} cannot be made of {whose}: {one_line(error)}; {remedy}") from error
        for task in _leaves(built):
            tasks[task.task_name] = task
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise UsageError(f"--tasks {name} runs code that the model writes, or shows pictures; leave it out")
        _set_examples(task, num_fewshot)
    return tasks


def _folder(root: Path, name: str) -> Path | None:
    """Find where a task is likely to be: of mmlu_abstract_algebra in mmlu, of arc_easy in arc; None where nowhere."""
    if name in FOLDERS:
        return root / FOLDERS[name]
    parts, inside = name.split("_"), set(os.listdir(root))  # what is typed must not lead elsewhere
    likely = ("_".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((root / each for each in likely if each in inside), None)


def _index(names: Sequence[str], say: Callable[[str], None]) -> dict[str, Any]:
    """Return lm-eval's index of tasks, or as much of it as holds these."""
    root = Path(lm_eval.tasks.__file__).parent
    folders = [_folder(root, name) for name in names]
    if all(folder is not None for folder in folders):
        some = TaskManager(include_defaults=False, include_path=sorted({str(folder) for folder in folders}))
        # Groups may have members that lie elsewhere.
        if all(name in some.task_index and some.task_index[name].kind is Kind.TASK for name in names):
            return some.task_index
    say("looking through all tasks of lm-eval")
    manager = TaskManager()
    for name in names:
        if name not in manager.task_index:
            near = ", ".join(difflib.get_close_matches(name, [*SUITES, *manager.all_tasks], n=3))
            raise UsageError(
                f"--tasks {name}: lm-eval has no such task{f'; near it are {near}' if near else ''}; write the name of "
                f"one, or of a suite: {', '.join(SUITES)}"
            )
    return manager.task_index


def _need_hub() -> None:
    """Ask the hub for an answer, unless data come from its cache: the package `datasets` would ask for half a minute.

    Raises:
        TaskError: there is none.
    """
    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception as error:  # of the hub's client, which has changed its kinds before
        raise TaskError(
            f"the hub does not answer ({one_line(error)}); give the tasks' data with --task-data DIR, or set "
            "HF_HUB_OFFLINE=1 if they were fetched before"
        ) from error


def _local_task(data: Path, num_fewshot: int | None, say: Callable[[str], None]) -> type[ConfigurableTask]:
    class LocalTask(ConfigurableTask):
        """Task of lm-eval whose data lie in a directory."""

        def __init__(self, config: dict[str, Any]) -> None:
            super().__init__(config={key: value for key, value in config.items() if key != "class"})

        def download(self, dataset_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
            """Read the data, as it would be fetched."""
            self.dataset = local_dataset(data, self.config, num_fewshot, say)

    return LocalTask


def _leaves(built: Task | Group | list[Task]) -> list[Task]:
    if isinstance(built, Group):
        return built.get_all_tasks()
    return built if isinstance(built, list) else [built]


def _set_examples(task: Task, num_fewshot: int | None) -> None:
    """Set the number of examples, as lm-eval's command does."""
    own = task.get_config("num_fewshot")
    task.set_config("num_fewshot", (own or 0) if num_fewshot is None or own == 0 else num_fewshot)
    task.set_fewshot_seed(FEWSHOT_SEED)
