"""Files of texts, read from their start or from any place in them; several of them as one text."""

from __future__ import annotations

import json
import random
from bisect import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

from streamprune.errors import CalibrationError
from streamprune.texts import records
from streamprune.texts.documents import BLANK_LINE, Beginning, Documents
from streamprune.texts.records import RecordKind, Render, text_of

LINE_ENDS = (b"\n", b"\r")
LINE_BLOCK = 1 << 16  # bytes that are read at a time to find where a line begins
PARQUET_ROWS = 256  # of a parquet file that are in memory at a time


@dataclass(frozen=True)
class TextFile:
    """File of texts.

    Attributes:
        where: what messages call it.
        kept: what must live as long: a file without a name.
    """

    path: Path
    where: str
    kind: RecordKind
    field: str
    render: Render
    kept: object = None

    def records(self) -> Iterator[str]:
        """Yield the texts of all records from the start of the file."""
        if self.kind == "prose":
            with records.opened(self.path, self.where) as stream:
                yield from records.decoded(stream, self.where)
            return
        yield from self._texts(self.rows(self.field))

    def rows(self, column: str | None = None) -> Iterator[tuple[str, Any]]:
        """Yield (where it stands, record) from the start of a file that is no prose; of a parquet file this column."""
        if self.kind == "parquet":
            yield from self._parquet_rows(column)
            return
        with records.opened(self.path, self.where) as stream:
            pieces = records.decoded(stream, self.where)
            if self.kind == "lines":
                yield from records.json_lines(pieces, self.where)
            elif self.kind == "values":
                yield from records.json_values(pieces, self.where)
            else:
                yield from records.table_rows(pieces, "," if self.kind == "csv" else "\t", self.where)

    @property
    def can_seek(self) -> bool:
        """Tell whether reading can begin anywhere in the file."""
        return self.kind in ("prose", "lines") and not records.compression_of(self.path)

    def at(self, part: float) -> tuple[float, Beginning]:
        """Find the place before which this part of the file lies, in [0, 1), and the share of text in what is there.

        Returns:
            (probability with which the place is to be taken, the place).
        """
        size = self.path.stat().st_size
        offset = int(part * size)
        if self.kind == "prose":
            return 1.0, (0.0, self._pieces(offset))
        start, stop = self._line_around(offset, size)
        lines = records.lines_of(self._pieces(start))
        line, where = next(lines), f"{self.where}, byte {start:,} or after"
        first = self._text(records.json_line(line, where), where)
        # A line has names, marks and other fields beside the text: by this share a place is taken, so that every
        # character of the texts is as likely as any other.
        share = len(json.dumps(first, ensure_ascii=line.isascii())) / max(1, len(line))
        rest = (self._text(records.json_line(line, where), where) for line in lines)
        texts = chain([first], (text for text in rest if text))
        return (min(1.0, share) if first else 0.0), ((offset - start) / max(1, stop - start), texts)

    def _text(self, value: Any, where: str) -> str:
        return text_of(value, self.field, where, self.render)

    def _texts(self, values: Iterable[tuple[str, Any]]) -> Iterator[str]:
        """Yield the texts of values that are not empty."""
        return (text for where, value in values if (text := self._text(value, where)))

    def _pieces(self, offset: int) -> Iterator[str]:
        """Yield the text from the first character that begins at byte `offset` or after."""
        with records.opened(self.path, self.where) as stream:
            stream.seek(offset)
            skipped = next((n for n, byte in enumerate(stream.read(4)) if byte & 0xC0 != 0x80), 0)
            stream.seek(offset + skipped)
            yield from records.decoded(stream, self.where, offset + skipped)

    def _line_around(self, offset: int, size: int) -> tuple[int, int]:
        """Find the offsets at which the line begins that holds the byte at `offset`, and at which it ends."""
        with records.opened(self.path, self.where) as stream:
            start, stop = offset, offset
            while start > 0:
                begin = max(0, start - LINE_BLOCK)
                stream.seek(begin)
                block = stream.read(start - begin)
                newline = max(block.rfind(end) for end in LINE_ENDS)
                start = begin if newline < 0 else begin + newline + 1
                if newline >= 0:
                    break
            while stop < size:
                stream.seek(stop)
                block = stream.read(LINE_BLOCK)
                newline = min((at for end in LINE_ENDS if (at := block.find(end)) >= 0), default=-1)
                stop = min(size, stop + LINE_BLOCK) if newline < 0 else stop + newline
                if newline >= 0:
                    break
        return start, stop

    def _parquet(self, column: str | None) -> Any:
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
        if column is not None and column not in columns:
            raise CalibrationError(f"{self.where} has the columns {', '.join(columns)}; name one with --field")
        return file

    def _parquet_rows(self, column: str | None) -> Iterator[tuple[str, Any]]:
        """Yield (where it stands, row by column) for each row, a batch of rows in memory at a time."""
        file, row = self._parquet(column), 0
        import pyarrow

        try:
            for batch in file.iter_batches(PARQUET_ROWS, columns=None if column is None else [column]):
                for value in batch.to_pylist():
                    row += 1
                    yield f"{self.where}, row {row}", value
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise CalibrationError(f"{self.where} is not a readable parquet file ({error})") from error


def from_files(files: Sequence[TextFile], where: str) -> Documents:
    """Join files into one text, in this order."""
    prose = all(file.kind == "prose" for file in files)
    sizes = list(accumulate(file.path.stat().st_size for file in files))

    def from_file(number: int) -> Iterator[str]:
        for file in files[number:]:
            if prose and file is not files[0]:
                yield BLANK_LINE
            yield from file.records()

    def places(draw: random.Random) -> Iterator[Beginning]:
        while True:
            position = draw.random() * sizes[-1]
            number = bisect(sizes, position)
            before = sizes[number - 1] if number else 0
            likely, (share, first) = files[number].at((position - before) / max(1, sizes[number] - before))
            if draw.random() < likely:
                yield share, chain(first, from_file(number + 1))

    def rows() -> Iterator[tuple[str, Any]]:
        return chain.from_iterable(file.rows() for file in files)

    can_seek = sizes[-1] > 0 and all(file.can_seek for file in files)
    return Documents(
        where,
        "" if prose else BLANK_LINE,
        lambda: from_file(0),
        places if can_seek else None,
        prose=prose,
        nbytes=sizes[-1] if can_seek else None,
        stored=sizes[-1],
        rows=None if any(file.kind == "prose" for file in files) else rows,
    )
