"""Every kind of text is read as what it is, or refused; the reference is the list of records that was written."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from cli_runner import parquet

from streamprune.errors import CalibrationError
from streamprune.texts import records
from streamprune.texts.corpus import joined
from streamprune.texts.sources import open_documents

TEXTS = ["First, with a comma.\nAnd a line.", 'Second: "quoted" — ☂', "  third  ", "brackets ] } , [ { in it"]


def lines(texts, **dump):
    return "".join(json.dumps({"n": n, "text": text}, **dump) + "\n" for n, text in enumerate(texts))


def table(texts, delimiter):
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows([["n", "text"], *enumerate(texts)])
    return out.getvalue()


def rows(texts):
    return [{"n": n, "text": text} for n, text in enumerate(texts)]


FORMATS: dict[str, Callable[[list[str]], str]] = {
    "a.jsonl": lines,
    "a.ndjson": lines,
    "lines.json": lines,
    "array.json": lambda texts: json.dumps(rows(texts)),
    "pretty.json": lambda texts: json.dumps(rows(texts), indent=2),
    "values.json": lambda texts: "\n".join(json.dumps(row, indent=2) for row in rows(texts)),
    "strings.json": json.dumps,
    "two-arrays.json": lambda texts: json.dumps(rows(texts)[:1]) + "\n" + json.dumps(rows(texts)[1:]),
    "a.csv": lambda texts: table(texts, ","),
    "a.tsv": lambda texts: table(texts, "\t"),
    "lines.txt": lines,  # records are not prose, whatever the file is called
    "array": lambda texts: json.dumps(rows(texts)),
}


def opened(path, **options):
    return list(open_documents(path, **options).records())


@pytest.mark.parametrize("name", FORMATS)
def test_records_of_every_format_are_those_that_were_written(name, tmp_path):
    (tmp_path / name).write_text(FORMATS[name](TEXTS), encoding="utf-8")
    assert opened(tmp_path / name) == TEXTS
    assert "".join(joined(open_documents(tmp_path / name))) == "\n\n".join(TEXTS)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("name", FORMATS)
def test_where_a_read_ends_changes_nothing(name, chunk, tmp_path, monkeypatch):
    (tmp_path / name).write_text(FORMATS[name](TEXTS), encoding="utf-8")
    monkeypatch.setattr(records, "TEXT_CHUNK", chunk)
    assert opened(tmp_path / name) == TEXTS


@pytest.mark.parametrize("name", FORMATS)
def test_suffixes_may_be_in_capitals(name, tmp_path):
    (tmp_path / name.upper()).write_text(FORMATS[name](TEXTS), encoding="utf-8")
    assert opened(tmp_path / name.upper()) == TEXTS


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["a.jsonl", "array.json", "a.csv", "a.txt"])
def test_compressed_files_are_read_as_what_is_in_them(name, suffix, tmp_path):
    data = FORMATS.get(name, "\n".join)(TEXTS).encode()
    file = tmp_path / (name + suffix)
    file.write_bytes(COMPRESS[suffix](data[:50]) + COMPRESS[suffix](data[50:]))  # as tools append to them
    expected = ("\n\n" if name in FORMATS else "\n").join(TEXTS)
    assert "".join(joined(open_documents(file))) == expected
    renamed = file.rename(tmp_path / name)  # what it is, not what it is called
    assert "".join(joined(open_documents(renamed))) == expected


def test_zst_is_read_through_pyarrow(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    file = tmp_path / "a.jsonl.zst"
    with pyarrow.output_stream(str(file), compression="zstd") as stream:
        stream.write(lines(TEXTS).encode())
    assert opened(file) == TEXTS


def test_zst_without_pyarrow_is_refused_with_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd rest")
    with pytest.raises(CalibrationError, match=r"pip install 'streamprune\[parquet\]'"):
        opened(tmp_path / "a.jsonl.zst")


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_compressed_file_that_was_cut_short_is_refused(suffix, tmp_path):
    file = tmp_path / f"a.jsonl{suffix}"
    file.write_bytes(COMPRESS[suffix](os.urandom(4000).hex().encode())[:-300])
    with pytest.raises(CalibrationError, match=r"a\.jsonl\.\w+ is damaged or cut short .*download it again"):
        opened(file)


# Prose.


@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.md", "a", "wiki.test.raw", "wiki.train.tokens"])
def test_prose_is_the_file_as_it_is(name, tmp_path):
    text = "a\n\n# b ☂\n[Chapter 1]\n"
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert "".join(opened(tmp_path / name)) == text
    assert open_documents(str(tmp_path / name)).prose


@pytest.mark.parametrize(
    "text", ["[Chapter 1] It was", "{x} is a set", "1, 2, 3\n4", "null and void", '"Quoted," he said']
)
def test_prose_that_begins_like_syntax_is_prose(text, tmp_path):
    (tmp_path / "a.txt").write_text(text)
    assert "".join(opened(tmp_path / "a.txt")) == text


def test_a_byte_order_mark_and_carriage_returns_go(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert "".join(opened(tmp_path / "a.txt")) == "one\ntwo\nthree\n"
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two\\r\\n"}\r\n')
    assert opened(tmp_path / "a.jsonl") == ["one", "two\r\n"]
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext\r\none\r\n")
    assert opened(tmp_path / "a.csv") == ["one"]


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ("naïve".encode("latin-1"), r"byte 0xef at 2.*Latin-1"),
        (b"x" * (1 << 20) + b"\xe9t\xe9", r"byte 0xe9 at 1,048,576"),
        ("text".encode("utf-16"), r"UTF-16 \(byte 0xff at 0\)"),
        ("text".encode("utf-32"), r"UTF-32"),
        ("text".encode("utf-16-le"), r"byte 0x00 at 1"),
        (b"PAR1\x15\x00\x15", r"byte 0x00 at 5"),
        (b"x" * (1 << 20) + b"\0", r"byte 0x00 at 1,048,576"),
        ("☂".encode()[:2], r"ends within a UTF-8 character"),
    ],
    ids=["latin", "late", "utf-16", "utf-32", "utf-16-no-mark", "binary", "late-nul", "cut"],
)
def test_other_encodings_are_refused_with_the_byte(data, named, tmp_path):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(CalibrationError, match=named):
        opened(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("a.html", "words", r"\.html is no format"),
        ("a.pdf", "words", r"\.pdf is no format of texts; give .*\.jsonl"),
        ("a.html.gz", "words", r"\.html is no format"),
        ("a.txt", "<!DOCTYPE html><p>words", r"is a web page, not the file itself; download it again"),
        ("a.txt", "\n<?xml version='1.0'?>", r"is a web page, not the file itself; download it again"),
        ("a.txt", "version https://git-lfs.github.com/spec/v1\noid", r"Git LFS pointer.*git lfs pull"),
        ("a.jsonl", "version https://git-lfs.github.com/spec/v1\noid", r"Git LFS pointer"),
        ("a.csv.gz", "<html>", r"is a web page"),
        ("a.parquet", "version https://git-lfs.github.com/spec/v1\noid", r"Git LFS pointer"),
        ("a.json", '[{"text": "a"}] and more', r"record 2 is not JSON"),
        ("a.json", "words", r"a\.json is not JSON, it begins with 'words'"),
        ("a.json", "", r"is not JSON"),
        (
            "a.json",
            '[{"text": "a"}, {"text": "b"}',
            r"record 2 is not JSON \(it ends within its array\); download it again",
        ),
        ("a.json", '[{"text": "a"}, {"text": "b', r"record 2 is not JSON"),
        ("a.json", '[{"text": "a"}, {"text": nul}]', r"record 2 is not JSON"),
        ("a.json", '{"data": [1]}', r"has no text under 'text'; it has data: name one with --field"),
        ("a.txt", '{"body": "a"}\n', r"a\.txt:1 has no text under 'text'; it has body"),
        ("a.jsonl", '{"text": "a"}\n{"text": ["b"]}\n', r"a\.jsonl:2: 'text' holds no text"),
        ("a.jsonl", '{"text": "a"}\n17\n', r"a\.jsonl:2: 'text' holds no text"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": "wor\n', r"a\.jsonl:3 is not JSON"),
        ("a.csv", "n,text\n1,a,b\n", r"a\.csv:2 has not the 2 columns"),
        ("a.csv", "n,text\n1\n", r"a\.csv:2 has not the 2 columns"),
        ("a.csv", 'n,text\n1,"a\n', r"a\.csv:\d is not a row of a table"),
        ("a.csv", "n,body\n1,a\n", r"it has n, body: name one with --field"),
    ],
)
def test_what_is_not_understood_is_refused(name, text, named, tmp_path):
    file = tmp_path / name
    file.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    with pytest.raises(CalibrationError, match=named):
        opened(file)


def test_deep_nesting_is_refused(tmp_path):
    (tmp_path / "a.json").write_text("[{" + '"a":{' * 100_000)
    with pytest.raises(CalibrationError, match="record 1 is not JSON"):
        opened(tmp_path / "a.json")


# Records.


def test_empty_records_and_nulls_are_passed_over(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": ""}\nnull\n\n{"text": "words"}\n{"text": []}\n')
    assert opened(tmp_path / "a.jsonl") == ["words"]


def test_halves_of_surrogate_pairs_are_replaced_and_whole_pairs_kept(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a \\ud83d b"}\n{"text": "\\ud83d\\ude00"}\n')
    assert opened(tmp_path / "a.jsonl") == ["a � b", "😀"]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"], ids=["line", "paragraph", "next-line"])
def test_line_separators_of_unicode_do_not_end_a_json_line(separator, tmp_path):
    """JSON strings may hold them as they are, and common text does."""
    text = f"before{separator}after"
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert opened(tmp_path / "data.jsonl") == [text]


def test_a_cell_may_be_a_book(tmp_path):
    book = "words, " * 40_000
    (tmp_path / "a.csv").write_text(table([book], ","))
    limit = csv.field_size_limit()
    assert opened(tmp_path / "a.csv") == [book]
    assert csv.field_size_limit() == limit


def test_parquet_rows_without_text_are_left_out(tmp_path):
    file = parquet(tmp_path / "data.parquet", text=["a", None, "", "b ☂"], n=[1, 2, 3, 4])
    assert opened(file) == ["a", "b ☂"]
    with pytest.raises(CalibrationError, match=r"columns text, n; name one with --field"):
        opened(file, field="body")


CHATS = {
    "messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}],
    "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}, {"role": "assistant", "content": "Hi"}],
}


def render(messages):
    return "".join(f"<{message['role']}>{message['content']}" for message in messages)


@pytest.mark.parametrize("field", CHATS)
def test_conversations_go_through_the_template(field, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": 1, field: CHATS[field]}) + "\n")
    assert opened(tmp_path / "a.jsonl", field=field, render=render) == ["<user>Hello<assistant>Hi"]
    with pytest.raises(CalibrationError, match=rf"it has id, {field}: name one with --field"):
        opened(tmp_path / "a.jsonl", render=render)


def test_conversations_in_parquet_go_through_the_template(tmp_path):
    file = parquet(tmp_path / "a.parquet", messages=[CHATS["messages"]] * 2)
    assert opened(file, field="messages", render=render) == ["<user>Hello<assistant>Hi"] * 2


def test_other_roles_and_calls_of_tools_are_the_template_s_matter(tmp_path):
    messages = [{"role": "developer", "content": None, "tool_calls": [{"name": "f"}]}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
    seen = []
    opened(tmp_path / "a.jsonl", field="messages", render=lambda given: seen.append(given) or "text")
    assert seen == [[{"role": "developer", "content": "", "tool_calls": [{"name": "f"}]}]]


@pytest.mark.parametrize(
    "message", [{"speaker": "A"}, {"role": ["user"], "content": "x"}, {"role": "user", "content": 3}]
)
def test_messages_without_a_role_or_content_are_refused(message, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [message]}))
    with pytest.raises(CalibrationError, match=r"'messages' holds no messages with a role and a content"):
        opened(tmp_path / "a.jsonl", field="messages", render=render)


# Other places.


def test_a_directory_is_its_files_in_order(tmp_path):
    for name in ("b/2.jsonl", "b/1.jsonl.gz", "a.jsonl", ".cache/3.jsonl"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        data = lines([name]).encode()
        file.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    (tmp_path / "README.md").write_text("about the records")
    (tmp_path / "LICENSE").write_text("words")
    assert opened(tmp_path) == ["a.jsonl", "b/1.jsonl.gz", "b/2.jsonl"]


def test_a_directory_of_prose_is_its_texts(tmp_path):
    (tmp_path / "a.txt").write_text("one ")
    (tmp_path / "b.md").write_text("two")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert "".join(opened(tmp_path)) == "one \n\ntwo"


def test_a_directory_without_texts_is_refused(tmp_path):
    with pytest.raises(CalibrationError, match="is a directory without texts"):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["gone.txt", "gone.JSONL", "gone.txt.gz", "./gone", "/nowhere/at/all"])
def test_a_missing_file_is_refused(name):
    with pytest.raises(CalibrationError, match="does not exist"):
        opened(name)


def test_standard_input_is_read_once_and_told_by_its_contents(monkeypatch, tmp_path):
    file = tmp_path / "given"
    file.write_text(lines(TEXTS))
    with file.open() as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        found = open_documents("-")
    assert list(found.records()) == TEXTS
    assert list(found.records()) == TEXTS, "it is kept as long as it is used"
    assert found.where == "standard input"


def test_a_pipe_is_read_as_a_file_is(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(gzip.compress(lines(TEXTS).encode()),))
    writer.start()
    assert list(open_documents(pipe).records()) == TEXTS
    writer.join()


@pytest.mark.parametrize(("delimiter", "header"), [(",", True), ("\t", True), (",", False)])
def test_a_table_from_a_pipe_is_told_by_its_columns(delimiter, header, tmp_path):
    (tmp_path / "given").write_text(table(TEXTS, delimiter) if header else "text\n" + '"one, two"\n')
    assert opened(tmp_path / "given") == (TEXTS if header else ["one, two"])


def test_files_of_other_marks_may_have_been_put_together(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + "\ufeff".encode() + b'{"text": "b"}\n')
    assert opened(tmp_path / "a.jsonl") == ["a", "b"]
    (tmp_path / "a.txt").write_text("prose")
    (tmp_path / "b.txt").write_text('{"text": "c"}\n')
    assert opened(tmp_path) == ["a", "b", "c"], "prose beside records is about them"


def test_a_line_of_many_pieces_is_put_together_once():
    """Not piece by piece, which takes the square of its length."""

    class Piece(str):
        def __radd__(self, other):
            raise AssertionError("a piece was added to what there was")

    assert list(records.lines_of(map(Piece, ["a", "b", "c\nd", "e\n", "\nf"]))) == ["abc", "de", "", "f"]


def test_closed_input_and_names_that_cannot_be_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(CalibrationError, match="terminal or closed"):
        opened("-")
    with pytest.raises(CalibrationError, match="cannot be read"):
        opened("a" * 300)


def test_a_terminal_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    with pytest.raises(CalibrationError, match="standard input is a terminal or closed"):
        opened("-")
