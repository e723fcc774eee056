"""Data sets of the hub and of the disk are named, streamed and refused; the package `datasets` is stood in for."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from streamprune.errors import CalibrationError
from streamprune.sources import open_documents


def opened(source, **options):
    return list(open_documents(source, **options).records())


class Rows(list):
    """What the package `datasets` gives, as far as it is used."""

    column_names = ("text",)

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
    assert next(open_documents(tmp_path).places(random.Random(0)))[1].__next__() == "a"


def test_a_split_of_a_directory_of_files_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(CalibrationError, match="leave :test out"):
        opened(Path(f"{tmp_path}:test"))
