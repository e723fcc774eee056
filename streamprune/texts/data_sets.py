"""Data sets that the package `datasets` reads: the hub's, as a stream, and those that were saved to disk."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from streamprune.errors import CalibrationError
from streamprune.logs import quiet
from streamprune.texts.documents import BLANK_LINE, Beginning, Documents
from streamprune.texts.records import Render, text_of

BATCH_ROWS = 256  # that are in memory at a time
SHUFFLED = 100  # rows that a stream of a data set draws from


def _datasets(source: object) -> Any:
    try:
        import datasets
    except ImportError:
        raise CalibrationError(
            f"{source} is no file; to read it as a data set, pip install 'streamprune[datasets]'"
        ) from None
    return datasets


def saved_to_disk(path: Path, split: str, field: str | None, render: Render) -> Documents:
    """Open a data set that `save_to_disk` has written, as texts; without a `field` as rows alone.

    Raises:
        CalibrationError: it cannot be loaded, or has no such split or column.
    """
    datasets = _datasets(path)
    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # it raises many kinds
        raise CalibrationError(f"{path} cannot be loaded as a data set: {_one_line(error)}") from error
    if isinstance(data, dict):
        if (split or "train") not in data:
            raise CalibrationError(f"{path} has the splits {', '.join(data)}; name one as {path}:SPLIT")
        data = data[split or "train"]
    elif split:
        raise CalibrationError(f"{path} has no splits; leave :{split} out")
    where = f"data set {path}"
    _check_column(data, field, where)

    def texts() -> Iterator[str]:
        assert field is not None, "texts have a field"
        rows = (value for batch in data.select_columns([field]).iter(BATCH_ROWS) for value in batch[field])
        return _texts(({field: value} for value in rows), field, where, render)

    return Documents(where, BLANK_LINE, texts, rows=lambda: _numbered(data, where))


def from_hub(source: str, field: str | None, render: Render) -> Documents:
    """Open a data set of the hub as a stream of texts, without a `field` of rows: no more is fetched than is read.

    Raises:
        CalibrationError: it cannot be loaded, or has no such column.
    """
    datasets = _datasets(source)
    name, _, split = source.partition(":")
    where, reasons = f"data set {source}", []
    for repository, configuration in _hub_names(name):
        try:
            arguments = [repository, *([configuration] if configuration else [])]
            with quiet("huggingface_hub", logging.ERROR):  # it warns of each attempt; what came of them is said
                data = datasets.load_dataset(*arguments, split=split or "train", streaming=True)
            break
        except Exception as error:  # the hub client raises many kinds
            reasons.append(_one_line(error))
    else:
        raise CalibrationError(f"{where} cannot be loaded: {'; '.join(reasons)}; give a file, or NAME/CONFIG:SPLIT")
    _check_column(data, field, where)
    if field is None:
        return Documents(where, BLANK_LINE, lambda: iter(()), rows=lambda: _numbered(data, where))

    def shuffled(draw: random.Random) -> Iterator[str]:
        rows = data.shuffle(seed=draw.randrange(2**32), buffer_size=SHUFFLED)
        return _texts(rows, field, where, render)

    def places(draw: random.Random) -> Iterator[Beginning]:
        longest = 0
        while True:
            rest = shuffled(draw)
            for text in rest:
                # By its length, as far as lengths are known: for those of all, all records would have to be fetched.
                longest = max(longest, len(text))
                if draw.random() * longest < len(text):
                    yield draw.random(), chain([text], rest)

    return Documents(where, BLANK_LINE, lambda: _texts(data, field, where, render), places, shuffled)


def _texts(rows: Iterable[Any], field: str, where: str, render: Render) -> Iterator[str]:
    """Yield the texts of rows that are not empty."""
    return (text for at, row in _numbered(rows, where) if (text := text_of(row, field, at, render)))


def _numbered(rows: Iterable[Any], where: str) -> Iterator[tuple[str, Any]]:
    """Yield (where it stands, row) for each row."""
    try:
        for number, row in enumerate(rows, 1):
            yield f"{where}, row {number}", row
    except (OSError, RuntimeError, ValueError) as error:  # what a fetch or a damaged file ends with
        raise CalibrationError(f"{where} cannot be read to its end: {_one_line(error)}; give a file") from error


def _hub_names(name: str) -> list[tuple[str, str]]:
    """List what NAME may mean: (repository, configuration), the likelier one first."""
    parts = name.split("/")
    if len(parts) == 3:
        return [("/".join(parts[:2]), parts[2])]
    return [(name, ""), *([(parts[0], parts[1])] if len(parts) == 2 else [])]


def _check_column(data: Any, field: str | None, where: str) -> None:
    columns = data.column_names
    if columns and field is not None and field not in columns:
        raise CalibrationError(f"{where} has the columns {', '.join(columns)}; name one with --field")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
