"""Data sets of the hub and of the disk are named, streamed and refused; the package `datasets` is stood in for."""

from __future__ import annotations

import logging
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from streamprune.errors import CalibrationError
from streamprune.logs import quiet
from streamprune.texts.sources import open_documents


def opened(source, **options):
    return list(open_documents(source, **options).records())


class Rows(list):
    """What the package `datasets` gives, as far as it is used."""

    column_names = ("text",)

    def select_columns(self, names):
        return Rows({name: row[name] for name in names} for row in self)

    def iter(self, size):
        for start in range(0, len(self), size):
            part = self[start : start + size]
            yield {name: [row[name] for row in part] for name in part[0]}

    def shuffle(self, seed, buffer_size):
        return Rows(random.Random(seed).sample(self, len(self)))


@pytest.fixture
def hub(monkeypatch):
    """A hub with three data sets; records what it was asked for."""
    there = {("org/corpus", None), ("org/corpus", "en"), ("wikitext", "wikitext-2-raw-v1")}
    asked = []

    def load_dataset(name, configuration=None, *, split, streaming):
        assert streaming, "no more is fetched than is read"
        asked.append((name, configuration, split))
        if (name, configuration) not in there:
            raise FileNotFoundError(f"no data set {name}")
        return Rows({"text": text} for text in ["a", "", "b"])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("org/corpus", ("org/corpus", None, "train")),
        ("org/corpus:validation", ("org/corpus", None, "validation")),
        ("org/corpus/en:train", ("org/corpus", "en", "train")),
        ("org/corpus/en", ("org/corpus", "en", "train")),
        ("wikitext/wikitext-2-raw-v1:test", ("wikitext", "wikitext-2-raw-v1", "test")),
        ("org/corpus:train[:10%]", ("org/corpus", None, "train[:10%]")),
    ],
)
def test_a_data_set_is_named_with_configuration_and_split(source, asked, hub):
    assert opened(source) == ["a", "b"]
    assert hub[-1] == asked


def test_a_data_set_that_is_not_there_is_refused_with_every_reason(hub):
    with pytest.raises(CalibrationError, match=r"no data set org/gone; no data set org; give a file"):
        opened("org/gone")
    with pytest.raises(CalibrationError, match=r"columns text; name one with --field"):
        opened("org/corpus", field="body")


def test_a_name_that_is_no_file_needs_the_datasets_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match=r"pip install 'streamprune\[datasets\]'"):
        opened("wikitext")


def test_a_data_set_saved_to_disk_is_read_by_its_split(tmp_path, monkeypatch):
    (tmp_path / "dataset_dict.json").write_text("{}")
    splits = {"train": Rows([{"text": "a"}]), "test": Rows([{"text": "b"}])}
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_from_disk=lambda path: splits))
    assert opened(tmp_path) == ["a"]
    assert opened(f"{tmp_path}:test") == ["b"]
    with pytest.raises(CalibrationError, match=r"has the splits train, test; name one as .*:SPLIT"):
        opened(f"{tmp_path}:validation")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_from_disk=lambda path: splits["test"]))
    assert opened(tmp_path) == ["b"]
    with pytest.raises(CalibrationError, match=r"has no splits; leave :test out"):
        opened(f"{tmp_path}:test")


def test_rows_of_a_stream_are_drawn_by_their_length(hub, monkeypatch):
    rows = Rows([{"text": "a" * 10}] * 50 + [{"text": "b" * 90}] * 50)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *names, **options: rows))
    places = open_documents("org/corpus").places(random.Random(0))
    drawn = [next(next(places)[1])[0] for _ in range(400)]
    assert abs(drawn.count("b") / 400 - 0.9) < 0.07
    shuffled = list(open_documents("org/corpus").shuffled(random.Random(0)))
    assert sorted(shuffled) == sorted(row["text"] for row in rows)
    assert shuffled != [row["text"] for row in rows]


def test_a_stream_that_breaks_off_is_refused(monkeypatch):
    class Broken(Rows):
        def __iter__(self):
            yield {"text": "a"}
            raise ConnectionError("gone")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *names, **options: Broken()))
    with pytest.raises(CalibrationError, match=r"cannot be read to its end: gone; give a file"):
        opened("org/corpus")


def test_a_directory_s_name_may_have_colons(tmp_path):
    directory = tmp_path / "a:b"
    directory.mkdir()
    (directory / "a.txt").write_text("words")
    assert "".join(opened(directory)) == "words"
    with pytest.raises(CalibrationError, match=r"leave :c out"):
        opened(f"{directory}:c")


def test_a_split_of_a_directory_of_files_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(CalibrationError, match="leave :test out"):
        opened(Path(f"{tmp_path}:test"))


def test_a_log_is_quiet_inside_the_block_alone(caplog):
    log = logging.getLogger("some_library.part")
    with pytest.raises(RuntimeError), quiet("some_library", logging.ERROR):
        log.warning("inside")
        log.error("told")
        raise RuntimeError
    log.warning("outside")
    assert caplog.messages == ["told", "outside"]
