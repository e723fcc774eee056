"""Sources of texts by their names: a file, a directory, a pipe, or a data set."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import IO

from streamprune.errors import CalibrationError
from streamprune.texts import data_sets, records
from streamprune.texts.documents import Documents, no_messages
from streamprune.texts.records import INSTRUCTION, Render
from streamprune.texts.text_files import TextFile, from_files
from streamprune.values import STANDARD_INPUT


def open_documents(source: str | Path, field: str | None = "text", render: Render = no_messages) -> Documents:
    """Open the text of a file, a directory, standard input ("-"), or a hub data set "name[/configuration][:split]".

    Args:
        field: name of the text's field in records; None where their `rows` are wanted, whatever fields these have.
        render: makes the text of a conversation.

    Raises:
        CalibrationError: it is not there, or not of a kind that is read.
    """
    path, name = Path(source), str(source)
    try:
        if name == "-" or (path.exists() and not path.is_file() and not path.is_dir()):
            return _from_pipe(name, field, render)
        if path.is_file():
            return _open_file(path, field, render)
        directory, split = _directory_of(name)
    except OSError as error:  # such as of a name that is too long
        raise CalibrationError(f"{name[:100]} cannot be read ({error.strerror}); give a text file") from error
    if directory is not None:
        return _from_directory(directory, split, field, render)
    known = path.suffix.lower() in (*filter(None, records.KIND_OF_SUFFIX), *records.COMPRESSIONS)
    # A data set of the hub is ORGANISATION/NAME.
    if name.startswith((".", "/", "~")) or known or (path.suffix and "/" not in name):
        raise CalibrationError(f"{path} does not exist; give a text file, or a data set of the hub")
    return data_sets.from_hub(name, field, render)


def shown(source: str) -> str:
    """Name a text for a model card: a file by its last name, a data set as it is."""
    if source in STANDARD_INPUT or source.startswith("/dev/fd/"):
        return "standard input" if source in STANDARD_INPUT else "a pipe"
    return Path(source).name if Path(source).exists() else source


def _directory_of(name: str) -> tuple[Path | None, str]:
    """Split "DIRECTORY[:SPLIT]" into the two; None and "" if it is no directory's name."""
    if Path(name).is_dir():
        return Path(name), ""
    # A directory's own name may have colons, so the last one after a directory counts.
    ends = [at for at, letter in enumerate(name) if at and letter == ":" and Path(name[:at]).is_dir()]
    return (Path(name[: ends[-1]]), name[ends[-1] + 1 :]) if ends else (None, "")


def _open_file(path: Path, field: str | None, render: Render) -> Documents:
    return from_files([_text_file(path, path, field, render)], str(path))


def _text_file(path: Path, where: object, field: str | None, render: Render, kept: object = None) -> TextFile:
    field = field or INSTRUCTION  # by which a table is told from prose
    return TextFile(path, str(where), records.kind_of(path, where, field), field, render, kept)


class _Kept:
    """Contents of a pipe, in a file without a name that goes with this object."""

    descriptor = -1

    def __init__(self, pipe: IO[bytes]) -> None:
        with tempfile.TemporaryFile(prefix="streamprune-text-") as file:
            shutil.copyfileobj(pipe, file)
            file.flush()
            self.descriptor = os.dup(file.fileno())

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def _from_pipe(source: str, field: str | None, render: Render) -> Documents:
    """Open standard input, or what a shell passes as /dev/fd/N."""
    if source == "-" and (sys.stdin is None or sys.stdin.isatty()):
        raise CalibrationError("-: standard input is a terminal or closed; pass a text through a pipe, or give a file")
    where = "standard input" if source == "-" else source
    # A pipe can be read once, and its text is begun more than once: to tell its format, to count, to draw from it.
    try:
        with open(sys.stdin.fileno() if source == "-" else source, "rb", closefd=source != "-") as pipe:
            kept = _Kept(pipe)
    except OSError as error:
        raise CalibrationError(f"{where} cannot be read ({error.strerror or error}); give a file") from error
    path = Path(f"/proc/self/fd/{kept.descriptor}")
    return from_files([_text_file(path, where, field, render, kept)], where)


def _from_directory(path: Path, split: str, field: str | None, render: Render) -> Documents:
    """Open a data set that was saved to disk, or the files below a directory: those of records, else those of prose."""
    saved = (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    if saved or (path / "dataset_dict.json").is_file():
        return data_sets.saved_to_disk(path, split, field, render)
    if split:
        raise CalibrationError(f"{path} is no data set that was saved to disk; leave :{split} out")
    found = [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file()
        and records.suffix_of(file) in records.KIND_OF_SUFFIX
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    # Without a suffix are licences, and the parts of a text where there is nothing else.
    named = [file for file in found if records.suffix_of(file)] or found
    files = [_text_file(file, file, field, render) for file in named]
    files = [file for file in files if file.kind != "prose"] or files
    if not files:
        raise CalibrationError(f"{path} is a directory without texts; give one of {records.SUFFIXES} files")
    return from_files(files, str(path))
