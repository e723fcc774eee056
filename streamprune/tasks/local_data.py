"""Data of tasks on the disk: where a task's splits lie below a directory, and how they are read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets

from streamprune.errors import TaskError


def _json_lines(path: Path) -> datasets.Dataset:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise TaskError(f"{path}, line {number} is no JSON ({error}); write a JSON object per line") from error
    # `from_list` takes the columns of the first row alone.
    columns = dict.fromkeys(name for row in rows for name in row)
    return datasets.Dataset.from_dict({name: [row.get(name) for row in rows] for name in columns})


def _parquet(path: Path) -> datasets.Dataset:
    import pyarrow.parquet

    return datasets.Dataset(pyarrow.parquet.read_table(path))


def _saved(path: Path) -> datasets.Dataset:
    # In memory: what lm-eval makes of a file it would write beside it.
    return datasets.load_from_disk(str(path), keep_in_memory=True)


# What a file's name ends with -> its reader.
READERS: Mapping[str, Callable[[Path], datasets.Dataset]] = {".jsonl": _json_lines, ".parquet": _parquet}
# Columns that a task's data have under another name where they are published by themselves: google/boolq.
OTHERWISE_NAMED = {"boolq": {"label": "answer"}}
SPLIT = re.compile(r"(?P<split>[a-z]+(_[a-z]+)*)(-\d.*)?(\.\w+)?")  # train.jsonl, train-00000-of-00002.parquet


def find_splits(data: Path, task: str, path: str, name: str | None) -> dict[str, list[Path]]:
    """Find the files of a task's splits below `data`, by the split.

    They lie in a directory that is named as the task, as its data set (`path`, or the end of that), or as the set's
    configuration (`name`); those of a set in one of `name`.

    Raises:
        TaskError: there are none.
    """
    for folder in _folders(data, task, path, name):
        splits: dict[str, list[Path]] = {}
        for each in sorted(folder.iterdir()):
            found = SPLIT.fullmatch(each.name)
            if found and (each.suffix in READERS or (each / "state.json").exists()):
                splits.setdefault(found["split"], []).append(each)
        for split, files in splits.items():
            if len({each.suffix for each in files}) > 1:
                names = " and ".join(each.name for each in files)
                raise TaskError(f"{folder} holds {split} in several formats, {names}; leave one of them there")
        if splits:
            return splits
    there = sorted(each.name for each in data.iterdir() if each.is_dir())
    looked = f"{task}/ or {path}/{name}/" if name else f"{task}/ or {path}/"
    raise TaskError(
        f"--task-data {data} holds no data of {task}; it has {', '.join(there) or 'no directories'}. Put a split into "
        f"{looked}: validation.jsonl or .parquet, or validation/ as save_to_disk writes it"
    )


def _folders(data: Path, task: str, path: str, name: str | None) -> Iterator[Path]:
    for place in dict.fromkeys(
        each for each in (task, path, path.rpartition("/")[2], name) if each not in (None, "", "main", "default")
    ):
        base = data / place
        if not base.is_dir():
            continue
        if name and (base / name).is_dir():
            yield base / name
        if not name or place in (task, name):  # of a set with configurations it could be another one's
            yield base
        only = [each for each in base.iterdir() if each.is_dir()]
        if len(only) == 1 and (not name or place in (task, name)):
            yield only[0]


def read_split(files: list[Path]) -> datasets.Dataset:
    """Read a split.

    Raises:
        TaskError: a file is damaged, or there is nothing in it.
    """
    parts = []
    for file in files:
        try:
            parts.append(READERS.get(file.suffix, _saved)(file))
        except TaskError:
            raise
        except Exception as error:  # the package and pyarrow raise many kinds
            raise TaskError(f"{file} cannot be read: {one_line(error)}; fetch or write it again") from error
    split = datasets.concatenate_datasets(parts)
    if not len(split):
        raise TaskError(f"{files[0]} holds no questions; fetch or write it again")
    return split


def one_line(error: Exception) -> str:
    """Return the beginning of what an exception says, on one line."""
    return " ".join(f"{error}".split())[:200] or type(error).__name__


def local_dataset(
    data: Path, config: Any, num_fewshot: int | None, say: Callable[[str], None]
) -> dict[str, datasets.Dataset]:
    """Read the splits that a task uses, and let its config name those alone that are there.

    Args:
        data: directory of the data of all tasks.
        config: lm-eval's of the task; a test split that is not there gives its place to the validation split.
        num_fewshot: examples before each question; None for the task's own number.
        say: is told of what is measured on another split.

    Raises:
        TaskError: there is none of the task's data, or not what it needs, or it is damaged.
    """
    if config.dataset_path is None:
        raise TaskError(f"{config.task} makes its data itself; leave --task-data out")
    splits = find_splits(data, config.task, config.dataset_path, config.dataset_name)
    folder = next(iter(splits.values()))[0].parent
    measured, examples = config.test_split or config.validation_split, config.fewshot_config.split
    examples = examples or (None if config.fewshot_config.samples else config.training_split)
    own = config.num_fewshot  # a task with 0 stays at it
    if (own if num_fewshot is None or own == 0 else num_fewshot) and examples and examples not in splits:
        raise TaskError(
            f"{folder} holds {', '.join(splits)}; the examples of {config.task} come from {examples}: put that there, "
            "or ask for none with --num-fewshot 0"
        )
    for key in ("training_split", "validation_split", "test_split"):
        if getattr(config, key) not in splits:
            setattr(config, key, None)
    if config.fewshot_config.split not in splits:
        config.fewshot_config.split = None
    found = config.test_split or config.validation_split
    if found is None:
        raise TaskError(f"{folder} holds {', '.join(splits)}; {config.task} is measured on {measured}: put that there")
    if found != measured:
        say(f"{config.task}: measured on {found}; {folder} holds no {measured}")
    used = {config.training_split, config.fewshot_config.split, config.validation_split, config.test_split} - {None}
    return {split: _fitting(read_split(splits[split]), config, splits[split][0]) for split in sorted(used)}


def _fitting(split: datasets.Dataset, config: Any, file: Path) -> datasets.Dataset:
    """Return a split with the columns that the task asks for by their names alone: others it would take for a text."""
    # What a task makes of the rows has columns of its own.
    for wanted in () if config.process_docs else (config.doc_to_text, config.doc_to_target):
        if isinstance(wanted, str) and wanted.isidentifier() and wanted not in split.column_names:
            other = OTHERWISE_NAMED.get(config.task, {}).get(wanted)
            if other not in split.column_names:
                columns = ", ".join(split.column_names)
                raise TaskError(f"{file} has the columns {columns}; {config.task} asks for {wanted}: name it so")
            split = split.add_column(wanted, [int(value) for value in split[other]])
    return split
