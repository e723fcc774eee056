"""Where texts come from: files of every format, directories of them, standard input, data sets.

Whatever a text comes from, it is opened as `Documents`: records from its start, and, where that needs no pass through
all of it, records from a random place on.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

from streamprune import records
from streamprune.errors import CalibrationError
from streamprune.records import Kind, Render, text_of

Place = tuple[float, Iterator[str]]  # the part of the first record that lies before, and the records from that one on
LINE_BLOCK = 1 << 16  # bytes that are read at a time to find where a line begins
WORD = 64  # characters within which a place moves to the beginning of a word
ROWS = 64  # of a parquet file that are in memory at a time
SHUFFLED = 100  # rows that a stream of a data set draws from
BLANK_LINE = "\n\n"


@dataclass(frozen=True)
class Documents:
    """A text as records.

    Attributes:
        where: its name, for messages.
        separator: what stands between two records of the text that they are joined to.
        records: all of them, from the start.
        places: endless random places; None where only a pass through the whole text would find one.
        prose: whether there is no telling one record from the next.
        nbytes: of the text, where they are known.
    """

    where: str
    separator: str
    records: Callable[[], Iterator[str]]
    places: Callable[[random.Random], Iterator[Place]] | None = None
    prose: bool = False
    nbytes: int | None = None


def embedded_text(name: str) -> str:
    """Prose in the package: "calibration" (about 4,000 words) or "heldout" (about 2,400 others)."""
    return resources.files("streamprune").joinpath("data", f"{name}.txt").read_text(encoding="utf-8")


def embedded(name: str) -> Documents:
    """That prose as documents."""
    return Documents(f"the embedded {name} text", "", lambda: iter([embedded_text(name)]), prose=True)


def no_messages(messages: records.Messages) -> str:
    """In the place of a chat template where there is no tokenizer."""
    raise CalibrationError("conversations need a tokenizer with a chat template; give texts")


def open_documents(source: str | Path, field: str = "text", render: Render = no_messages) -> Documents:
    """The text of a file, a directory, standard input ("-"), or a hub data set "name[/configuration][:split]".

    Args:
        field: of the text in records.
        render: the text of a conversation.

    Raises:
        CalibrationError: it is not there, or not of a kind that is read.
    """
    path, name = Path(source), str(source)
    if name == "-" or (path.exists() and not path.is_file() and not path.is_dir()):
        return _from_pipe(name, field, render)
    if path.is_file():
        return _open_file(path, field, render)
    directory, _, split = (name, "", "") if path.is_dir() else name.rpartition(":")
    if directory and Path(directory).is_dir():
        return _from_directory(Path(directory), split, field, render)
    if name.startswith((".", "/", "~")) or path.suffix.lower() in (*filter(None, records.KINDS), *records.COMPRESSIONS):
        raise CalibrationError(f"{path} does not exist; give a text file, or leave the option out")
    return _from_hub(name, field, render)


# Files.


@dataclass(frozen=True)
class _File:
    """A file of texts.

    Attributes:
        where: what messages call it.
        kept: what must live as long: a file without a name.
    """

    path: Path
    where: str
    kind: Kind
    field: str
    render: Render
    kept: object = None

    def records(self) -> Iterator[str]:
        """All records."""
        if self.kind == "parquet":
            yield from self._texts(self._rows(0))
            return
        with records.opened(self.path, self.where) as stream:
            pieces = records.decoded(stream, self.where)
            if self.kind == "prose":
                yield from pieces
            elif self.kind == "lines":
                yield from self._texts(records.json_lines(pieces, self.where))
            elif self.kind == "values":
                yield from self._texts(records.json_values(pieces, self.where))
            else:
                yield from self._texts(records.table_rows(pieces, "," if self.kind == "csv" else "\t", self.where))

    @property
    def can_seek(self) -> bool:
        """Whether reading can begin anywhere."""
        return self.kind == "parquet" or (self.kind in ("prose", "lines") and not records.compression_of(self.path))

    def at(self, part: float) -> Place:
        """The place before which this part of the file lies, in [0, 1)."""
        if self.kind == "parquet":
            row = part * self._parquet().metadata.num_rows
            return row - int(row), self._texts(self._rows(int(row)))
        size = self.path.stat().st_size
        offset = int(part * size)
        if self.kind == "prose":
            return 0.0, self._pieces(offset)
        start, stop = self._line_around(offset, size)
        lines = records.lines_of(self._pieces(start))
        named = ((f"{self.where}, byte {start:,} or after", line) for line in lines)
        values = ((where, records.json_line(line, where)) for where, line in named)
        return (offset - start) / max(1, stop - start), self._texts(pair for pair in values if pair[1] is not None)

    def _texts(self, values: Iterable[tuple[str, Any]]) -> Iterator[str]:
        """The texts that are not empty."""
        return (text for where, value in values if (text := text_of(value, self.field, where, self.render)))

    def _pieces(self, offset: int) -> Iterator[str]:
        """The text from the first character that begins at `offset` or after."""
        with records.opened(self.path, self.where) as stream:
            stream.seek(offset)
            skipped = next((n for n, byte in enumerate(stream.read(4)) if byte & 0xC0 != 0x80), 0)
            stream.seek(offset + skipped)
            yield from records.decoded(stream, self.where, offset + skipped)

    def _line_around(self, offset: int, size: int) -> tuple[int, int]:
        """Where the line begins that holds the byte at `offset`, and where it ends."""
        with records.opened(self.path, self.where) as stream:
            start, stop = offset, offset
            while start > 0:
                begin = max(0, start - LINE_BLOCK)
                stream.seek(begin)
                newline = stream.read(start - begin).rfind(b"\n")
                start = begin if newline < 0 else begin + newline + 1
                if newline >= 0:
                    break
            while stop < size:
                stream.seek(stop)
                newline = stream.read(LINE_BLOCK).find(b"\n")
                stop = min(size, stop + LINE_BLOCK) if newline < 0 else stop + newline
                if newline >= 0:
                    break
        return start, stop

    def _parquet(self) -> Any:
        try:
            import pyarrow.parquet
        except ImportError:
            raise CalibrationError(
                f"{self.where}: reading parquet needs pyarrow; pip install 'streamprune[parquet]'"
            ) from None
        try:
            file = pyarrow.parquet.ParquetFile(self.path)
        except (pyarrow.ArrowException, OSError) as error:
            raise CalibrationError(f"{self.where} is not a readable parquet file ({error})") from error
        columns = file.schema_arrow.names
        if self.field not in columns:
            raise CalibrationError(f"{self.where} has the columns {', '.join(columns)}; name one with --field")
        return file

    def _rows(self, first: int) -> Iterator[tuple[str, Any]]:
        """(where it stands, value of the field) of the rows from `first` on, a batch of them in memory at a time."""
        file = self._parquet()
        import pyarrow

        ends = list(accumulate(file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)))
        group = bisect(ends, first)
        row = ends[group - 1] if group else 0
        groups = list(range(group, file.num_row_groups))
        try:
            for batch in file.iter_batches(ROWS, row_groups=groups, columns=[self.field]):
                skipped = min(max(0, first - row), len(batch))
                for number, value in enumerate(batch.column(0)[skipped:].to_pylist(), row + skipped + 1):
                    yield f"{self.where}, row {number}", value
                row += len(batch)
        except (pyarrow.ArrowException, OSError) as error:
            raise CalibrationError(f"{self.where} is not a readable parquet file ({error})") from error


def from_word(text: str) -> str:
    """A text from the first word that begins in it, where there is one near."""
    gap = next((n for n, letter in enumerate(text[:WORD]) if letter.isspace()), None)
    return text if gap is None else text[gap:].lstrip()


def _from_files(files: Sequence[_File], where: str) -> Documents:
    """One text out of all files, in this order."""
    prose = all(file.kind == "prose" for file in files)
    sizes = list(accumulate(file.path.stat().st_size for file in files))

    def all_records() -> Iterator[str]:
        return chain.from_iterable(file.records() for file in files)

    def at(part: float) -> Place:
        position = part * sizes[-1]
        number = bisect(sizes, position)
        before = sizes[number - 1] if number else 0
        share, first = files[number].at((position - before) / max(1, sizes[number] - before))
        return share, chain(first, chain.from_iterable(file.records() for file in files[number + 1 :]))

    def places(draw: random.Random) -> Iterator[Place]:
        while True:
            yield at(draw.random())

    can_seek = sizes[-1] > 0 and all(file.can_seek for file in files)
    nbytes = sizes[-1] if can_seek and not any(file.kind == "parquet" for file in files) else None
    return Documents(where, "" if prose else BLANK_LINE, all_records, places if can_seek else None, prose, nbytes)


def _open_file(path: Path, field: str, render: Render) -> Documents:
    return _from_files([_File(path, str(path), records.kind_of(path, path), field, render)], str(path))


def _from_pipe(source: str, field: str, render: Render) -> Documents:
    """Standard input, or what a shell passes as /dev/fd/N: kept in a file without a name as long as it is used."""
    if source == "-" and sys.stdin.isatty():
        raise CalibrationError("-: standard input is a terminal; pass a text through a pipe, or give a file")
    where = "standard input" if source == "-" else source
    kept = tempfile.TemporaryFile(prefix="streamprune-text-")  # noqa: SIM115 (it outlives this function)
    try:
        with open(sys.stdin.fileno() if source == "-" else source, "rb", closefd=source != "-") as pipe:
            shutil.copyfileobj(pipe, kept)
        kept.flush()
    except OSError as error:
        raise CalibrationError(f"{where} cannot be read ({error.strerror or error}); give a file") from error
    path = Path(f"/proc/self/fd/{kept.fileno()}")
    return _from_files([_File(path, where, records.kind_of(path, where), field, render, kept)], where)


def _from_directory(path: Path, split: str, field: str, render: Render) -> Documents:
    """A data set that was saved to disk, or all files of records below the directory, or else all prose."""
    if any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json", "state.json")):
        return _saved_dataset(path, split, field, render)
    if split:
        raise CalibrationError(f"{path} is no data set that was saved to disk; leave :{split} out")
    found = [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file()
        and records.suffix_of(file) in records.KINDS
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    of_records = [file for file in found if records.KINDS[records.suffix_of(file)] != "prose"]
    files = [
        _File(file, str(file), records.kind_of(file, file), field, render)
        for file in of_records or [file for file in found if file.suffix]
    ]
    if not files:
        raise CalibrationError(f"{path} is a directory without texts; give one of {records.SUFFIXES} files")
    return _from_files(files, str(path))


# Data sets.


def _datasets(source: object) -> Any:
    try:
        import datasets
    except ImportError:
        raise CalibrationError(
            f"{source} is no file; to read it as a data set, pip install 'streamprune[datasets]'"
        ) from None
    return datasets


def _saved_dataset(path: Path, split: str, field: str, render: Render) -> Documents:
    """What `save_to_disk` has written."""
    datasets = _datasets(path)
    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # it raises many kinds
        raise CalibrationError(f"{path} cannot be loaded as a data set: {_one_line(error)}") from error
    if isinstance(data, dict):
        if (split or "train") not in data:
            raise CalibrationError(f"{path} has the splits {', '.join(data)}; name one as {path}:SPLIT")
        data = data[split or "train"]
    where = f"data set {path}"
    _check_column(data, field, where)

    def rows(first: int) -> Iterator[str]:
        for number in range(first, len(data)):
            if text := text_of(data[number], field, f"{where}, row {number + 1}", render):
                yield text

    def places(draw: random.Random) -> Iterator[Place]:
        while True:
            row = draw.random() * len(data)
            yield row - int(row), rows(int(row))

    return Documents(where, BLANK_LINE, lambda: rows(0), places)


def _from_hub(source: str, field: str, render: Render) -> Documents:
    """A data set of the hub as a stream: no more is fetched than is read."""
    datasets = _datasets(source)
    name, _, split = source.partition(":")
    where, reasons = f"data set {source}", []
    for repository, configuration in _hub_names(name):
        try:
            arguments = [repository, *([configuration] if configuration else [])]
            data = datasets.load_dataset(*arguments, split=split or "train", streaming=True)
            break
        except Exception as error:  # the hub client raises many kinds
            reasons.append(_one_line(error))
    else:
        raise CalibrationError(f"{where} cannot be loaded: {'; '.join(reasons)}; give a file, or NAME/CONFIG:SPLIT")
    _check_column(data, field, where)

    def texts(rows: Iterable[Any]) -> Iterator[str]:
        return (text for row in rows if (text := text_of(row, field, where, render)))

    def places(draw: random.Random) -> Iterator[Place]:
        shuffled = data.shuffle(seed=draw.randrange(2**32), buffer_size=SHUFFLED)
        while True:
            rest = texts(shuffled)
            for text in rest:
                yield draw.random(), chain([text], rest)

    return Documents(where, BLANK_LINE, lambda: texts(data), places)


def _hub_names(name: str) -> list[tuple[str, str]]:
    """What NAME may mean: (repository, configuration), the likelier one first."""
    parts = name.split("/")
    if len(parts) == 3:
        return [("/".join(parts[:2]), parts[2])]
    return [(name, ""), *([(parts[0], parts[1])] if len(parts) == 2 else [])]


def _check_column(data: Any, field: str, where: str) -> None:
    columns = data.column_names
    if columns and field not in columns:
        raise CalibrationError(f"{where} has the columns {', '.join(columns)}; name one with --field")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
