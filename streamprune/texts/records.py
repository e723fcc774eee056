"""Formats of texts: from the bytes of a file to its records, one at a time. Nothing here knows of tokens.

Prose has one record. JSON records and the rows of tables have a field that holds the text, or a conversation.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal, Protocol

from streamprune.errors import CalibrationError
from streamprune.storage.file_kinds import FIRST_BYTES, placeholder_of

RecordKind = Literal["prose", "lines", "values", "csv", "tsv", "parquet"]
Messages = list[dict[str, Any]]
Render = Callable[[Messages], str]

KIND_OF_SUFFIX: Mapping[str, RecordKind] = {
    **dict.fromkeys(("", ".txt", ".text", ".md", ".markdown", ".rst", ".raw", ".tokens"), "prose"),
    **dict.fromkeys((".jsonl", ".ndjson"), "lines"),
    ".json": "values",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
SUFFIXES = ", ".join(suffix for suffix in KIND_OF_SUFFIX if suffix)
TEXT_CHUNK = 1 << 20
HEAD_CHARACTERS = 1 << 16  # that show what a file is
LONGEST_COLUMN = 64  # characters of the name of one
MOST_FIELDS = 12  # that a message names
BETWEEN_VALUES = re.compile(r"[\s,\ufeff]*")
LONGEST_WORD = 16  # of JSON outside of strings: what may be cut off where the text read so far ends
INSTRUCTION = "instruction"  # the field that records of instructions have
# What other tools call the parties of a conversation.
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
ROLES |= {"observation": "tool", "function": "tool"}


class Readable(Protocol):
    """Interface of what bytes are read from."""

    def read(self, count: int, /) -> bytes:
        """Read the next bytes, `count` at the most; none at the end."""
        ...


def suffix_of(path: Path) -> str:
    """Return the suffix of a file's format, in lower case, whatever suffix of a compression follows."""
    name = path.name.lower()
    return Path(name.removesuffix(next((each for each in COMPRESSIONS if name.endswith(each)), ""))).suffix


def compression_of(path: Path) -> str:
    """Tell how a file is compressed, as one of COMPRESSIONS, or "": by its first bytes, whatever it is called."""
    marks = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\x00": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}
    with path.open("rb") as stream:
        head = stream.read(max(map(len, marks)))
    if head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50:  # a frame to be skipped, as pzstd begins with
        return ".zst"
    return next((name for mark, name in marks.items() if head.startswith(mark)), "")


@contextmanager
def opened(path: Path, where: object) -> Iterator[IO[bytes]]:
    """Open a file for its uncompressed bytes, as long as the block runs.

    Raises:
        CalibrationError: it cannot be opened, or is found to be damaged while it is read.
    """
    try:
        with _stream(path, where) as stream:
            yield stream
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise CalibrationError(f"{where} is damaged or cut short ({error}); download it again") from error
    except OSError as error:
        if error.errno is None:  # pyarrow's own, of what cannot be decompressed
            raise CalibrationError(f"{where} is damaged or cut short ({error}); download it again") from error
        raise CalibrationError(f"{where} cannot be read ({error.strerror}); give a readable file") from error


def _stream(path: Path, where: object) -> Any:
    compression = compression_of(path)
    if compression == ".zst":
        try:
            import pyarrow
        except ImportError:
            raise CalibrationError(f"{where}: reading .zst needs pyarrow; pip install 'streamprune[parquet]'") from None
        return pyarrow.input_stream(str(path), compression="zstd")
    openers: Mapping[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers[compression](path) if compression else path.open("rb")


def decoded(stream: Readable, where: object, at: int = 0) -> Iterator[str]:
    """Decode a stream, of which byte `at` is the next, piece by piece; lines end with "\\n", a byte order mark goes.

    Raises:
        CalibrationError: bytes that are not UTF-8, with the first of them.
    """
    codec = "utf-8" if at else "utf-8-sig"
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(codec)(), translate=True)
    while chunk := stream.read(TEXT_CHUNK):
        _refuse_other_encodings(chunk, where, at)
        try:
            yield decoder.decode(chunk)
        except UnicodeDecodeError as error:
            # The decoder may have kept the beginning of a character from the chunk before.
            position = at + len(chunk) - len(error.object) + error.start
            raise CalibrationError(
                f"{where} is not UTF-8: byte {error.object[error.start]:#04x} at {position:,}, as in Latin-1 or "
                "Windows-1252; convert it, such as with iconv -f WINDOWS-1252 -t UTF-8"
            ) from error
        at += len(chunk)
    try:
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{where} ends within a UTF-8 character; download it again") from error


def _refuse_other_encodings(chunk: bytes, where: object, at: int) -> None:
    """Refuse UTF-16 and UTF-32, told by the mark that a file begins with and by bytes that no text in UTF-8 has."""
    marks = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32"}
    marks |= {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
    for mark, name in marks.items() if at == 0 else ():
        if chunk.startswith(mark):
            raise CalibrationError(f"{where} is {name} (byte {chunk[0]:#04x} at 0); convert it with iconv -t UTF-8")
    if (position := chunk.find(0)) >= 0:
        raise CalibrationError(
            f"{where} holds the byte 0x00 at {at + position:,}: UTF-16, or no text; give a text in UTF-8, or convert it"
        )


def kind_of(path: Path, where: object, field: str) -> RecordKind:
    """Tell the format of a file, by its suffix and by what it begins with: syntax is never taken for prose.

    Args:
        field: name of the text's field; a first line of columns that has it makes a table.

    Raises:
        CalibrationError: a format that is not read, or what is no text at all.
    """
    suffix = suffix_of(path)
    kind = KIND_OF_SUFFIX.get(suffix)
    if kind is None:
        raise CalibrationError(f"{where}: {suffix} is no format of texts; give {SUFFIXES}, or .txt where it is prose")
    with opened(path, where) as stream:
        start = stream.read(FIRST_BYTES)
        if (placeholder := placeholder_of(start)) is not None:
            raise CalibrationError(f"{where} {placeholder}")
        if kind not in ("prose", "values"):
            return kind
        # Not from its start again: what is compressed has no way back.
        head = _gathered(decoded(_Again(start, stream), where), HEAD_CHARACTERS)
    found = _kind_of_json(head, sure=kind == "values") or _kind_of_table(head, field)
    if kind == "values" and found is None:
        raise CalibrationError(f"{where} is not JSON, it begins with {head[:20]!r}; give .txt where it is prose")
    return found or kind


class _Again:
    """Stream whose start was read already, put together again."""

    def __init__(self, start: bytes, stream: IO[bytes]) -> None:
        self._start, self._stream = start, stream

    def read(self, count: int) -> bytes:
        """Return the start, then read on."""
        start, self._start = self._start, b""
        return start or self._stream.read(count)


def _kind_of_json(head: str, *, sure: bool) -> RecordKind | None:
    """Tell the format of a text that begins as JSON records do: "lines" with a record in each, or "values" over many
    lines or in an array; None for any other text.

    Args:
        sure: its name says that it is JSON; else prose may begin with brackets too.
    """
    head = head.lstrip()
    if head.startswith("{"):
        if _parsed(head.partition("\n")[0]) is not None:
            return "lines"
        # Not the braces of a template: the first thing in an object is a name.
        return "values" if sure or head[1:].lstrip()[:1] in ('"', "}") else None
    if not head.startswith("["):
        return None
    inner = head[1:].lstrip()
    if sure or inner.startswith("{"):
        return "values"
    try:
        _, end = json.JSONDecoder().raw_decode(inner)
    except (ValueError, RecursionError):
        return None
    return "values" if inner[end:].lstrip()[:1] in (",", "]") and inner[:1] in ('"', "[") else None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _kind_of_table(head: str, field: str) -> RecordKind | None:
    """Tell the format of a text whose first line names columns, the text's field among them: "csv", "tsv" or None."""
    line = head.partition("\n")[0].rstrip("\r")
    for delimiter, kind in ((",", "csv"), ("\t", "tsv")):
        columns = [column.strip().strip('"') for column in line.split(delimiter)]
        if field in columns and all(0 < len(column) <= LONGEST_COLUMN for column in columns):
            return "csv" if kind == "csv" else "tsv"
    return None


def text_of(record: Any, field: str, where: str, render: Render) -> str:
    """Return the text of a record, "" where it has none: a string, or the string or conversation under `field`.

    Raises:
        CalibrationError: no such field, or one of numbers.
    """
    if isinstance(record, Mapping):
        if field not in record:
            there = ", ".join(map(str, list(record)[:MOST_FIELDS])) or "no fields"
            raise CalibrationError(f"{where} has no text under {field!r}; it has {there}: name one with --field")
        record = record[field]
    if isinstance(record, list) and record and all(isinstance(message, Mapping) for message in record):
        return repaired(rendered(render, messages_of(record, field, where), where))
    if record is None or record == []:
        return ""
    if not isinstance(record, str):
        raise CalibrationError(f"{where}: {field!r} holds no text; name the field of the text with --field")
    return repaired(record)


def rendered(render: Render, messages: Messages, where: str) -> str:
    """Return the text of a conversation; what refuses it is told where it stands."""
    try:
        return render(messages)
    except CalibrationError as error:
        raise CalibrationError(f"{where}: {error}") from error


def messages_of(record: Any, field: str, where: str) -> Messages:
    """Return the conversation of a record: the record itself, or what it has under `field`.

    Raises:
        CalibrationError: it has none.
    """
    value = record.get(field) if isinstance(record, Mapping) else record
    if not isinstance(value, list) or not value or not all(isinstance(message, Mapping) for message in value):
        raise CalibrationError(f"{where} has no messages under {field!r}; use the same fields in every record")
    return [_message(message, field, where) for message in value]


def _message(message: Mapping[str, Any], field: str, where: str) -> dict[str, Any]:
    """Return a message with a "role" and a "content", whichever names a data set has for them."""
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        content = "".join(str(part.get("text") or "") for part in content)
    if not isinstance(role, str) or not isinstance(content, str | None):
        raise CalibrationError(
            f"{where}: {field!r} holds no messages with a role and a content; name the field of the text with --field"
        )
    others = {name: value for name, value in message.items() if name not in ("from", "value") and value is not None}
    return others | {"role": ROLES.get(role, role), "content": content or ""}


def repaired(text: str) -> str:
    """Replace lone halves of surrogate pairs, which JSON can hold and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def lines_of(pieces: Iterable[str]) -> Iterator[str]:
    """Yield the lines of a text that comes in pieces: not split at U+2028, as by str.splitlines: JSON may hold it."""
    rest: list[str] = []  # joined at the line's end: a line may be longer than all pieces
    for piece in pieces:
        first, *others = piece.split("\n")
        rest.append(first)
        if others:
            yield "".join(rest)
            yield from others[:-1]
            rest = [others[-1]]
    yield "".join(rest)


def json_line(line: str, where: str) -> Any:
    """Parse the value in a line, None in an empty one."""
    line = line.strip("\ufeff \t\r")  # files with marks of their own may have been put together
    if not line:
        return None
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{where} is not JSON ({error}); give a JSON object in every line") from error


def json_lines(pieces: Iterable[str], where: object) -> Iterator[tuple[str, Any]]:
    """Yield (where it stands, value) for each line."""
    for number, line in enumerate(lines_of(pieces), 1):
        if (value := json_line(line, f"{where}:{number}")) is not None:
            yield f"{where}:{number}", value


def json_values(pieces: Iterable[str], where: object) -> Iterator[tuple[str, Any]]:
    """Yield (where it stands, value) for each item of arrays, or each of several values, one in memory at a time."""
    decoder, source, text, position, number = json.JSONDecoder(), iter(pieces), "", 0, 0
    in_array, arrays, wanted = False, 0, TEXT_CHUNK
    while True:
        position = BETWEEN_VALUES.match(text, position).end()  # type: ignore[union-attr]
        if text.startswith("]" if in_array else "[", position):
            position, in_array, arrays = position + 1, not in_array, arrays + 1
            continue
        error: Exception | None = None
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as raised:
            error = raised
        # A number that ends where the text read so far ends may go on in the next piece.
        if error is None and end < len(text):
            position, number, wanted = end, number + 1, TEXT_CHUNK
            yield f"{where}, record {number}", value
            continue
        # The rest of it may not have been read. Twice as much each time: it is parsed from its start again.
        more = "" if error is not None and _is_final(error, text) else _gathered(source, wanted)
        text, position, wanted = text[position:] + more, 0, max(TEXT_CHUNK, 2 * len(more))
        if more:
            continue
        if error is None and not in_array:
            yield f"{where}, record {number + 1}", value
        elif text or in_array or not (number or arrays):
            reason = error or "it ends within its array"
            raise CalibrationError(f"{where}, record {number + 1} is not JSON ({reason}); download it again") from error
        return


def _is_final(error: Exception, text: str) -> bool:
    """Tell whether no further text could mend an error of parsing: nested too deeply, or wrong before the end."""
    if not isinstance(error, json.JSONDecodeError):
        return True
    return error.pos < len(text) - LONGEST_WORD and not error.msg.startswith("Unterminated string")


def _gathered(source: Iterator[str], characters: int) -> str:
    """Join pieces until there are as many characters, or no more pieces."""
    parts, length = [], 0
    for piece in source:
        parts.append(piece)
        length += len(piece)
        if length >= characters:
            break
    return "".join(parts)


def table_rows(pieces: Iterable[str], delimiter: str, where: object) -> Iterator[tuple[str, Any]]:
    """Yield (where it stands, row by column) for each row of a table whose first line names the columns."""
    limit = csv.field_size_limit(2**31 - 1)  # of 128 KiB; a book in a cell is longer
    try:
        reader = csv.DictReader((line + "\n" for line in lines_of(pieces)), delimiter=delimiter, strict=True)
        for row in reader:
            if None in row or None in row.values():
                raise CalibrationError(
                    f"{where}:{reader.line_num} has not the {len(reader.fieldnames or ())} columns of the first line; "
                    "use quotes around texts that hold the separator"
                )
            yield f"{where}:{reader.line_num}", row
    except csv.Error as error:
        raise CalibrationError(f"{where}:{reader.line_num} is not a row of a table ({error}); use quotes") from error
    finally:
        csv.field_size_limit(limit)
