"""Files of texts, read from their start or from any place in them; several of them as one text."""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

from streamprune import records
from streamprune.documents import BLANK_LINE, Documents, Place
from streamprune.errors import CalibrationError
from streamprune.records import Kind, Render, text_of

LINE_BLOCK = 1 << 16  # bytes that are read at a time to find where a line begins
ROWS = 64  # of a parquet file that are in memory at a time


@dataclass(frozen=True)
class TextFile:
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


def from_files(files: Sequence[TextFile], where: str) -> Documents:
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
    separator = "" if prose else BLANK_LINE
    return Documents(where, separator, all_records, places if can_seek else None, prose, nbytes, sizes[-1])
