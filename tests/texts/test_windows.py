"""Sequences of texts too long to be tokenised: where they lie, what they cost, and that they are what the text says."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import random
import re
from collections import Counter

import pytest
import torch

from streamprune.errors import CalibrationError, UsageError
from streamprune.texts.corpus import Corpus
from streamprune.texts.sources import open_documents

# A text of numbered words, whose tokens are the numbers: a window shows where it lies.
WORDS = 60_000
PER_RECORD = 40


class Numbers:
    """A tokenizer of numbered words that counts what it is given."""

    bos_token = None
    all_special_ids = (0,)

    def __init__(self) -> None:
        self.characters = 0

    def __call__(self, text, add_special_tokens, verbose):
        self.characters += len(text)
        return {"input_ids": [int(word) for word in re.findall(r"\d+", text)]}

    def convert_ids_to_tokens(self, ids):
        return [f"<{number}>" for number in ids]


def numbered(start, stop):
    return " ".join(f"w{number:06d}" for number in range(start, stop))


RECORDS = [numbered(start, start + PER_RECORD) for start in range(0, WORDS, PER_RECORD)]


def write(name, tmp_path):
    file = tmp_path / name
    if name.endswith(".parquet"):
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet")
        table = pyarrow.table({"text": RECORDS})
        pyarrow.parquet.write_table(table, file, row_group_size=100)
        return file
    text = {
        "a.txt": lambda: " ".join(RECORDS),
        "a.jsonl": lambda: "".join(json.dumps({"text": record}) + "\n" for record in RECORDS),
        "a.json": lambda: json.dumps([{"text": record} for record in RECORDS]),
        "a.csv": lambda: "text\n" + "".join(f'"{record}"\n' for record in RECORDS),
    }[name.removesuffix(".gz")]()
    file.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return file


ANYWHERE = ("a.txt", "a.jsonl")
PASSING = ("a.txt.gz", "a.jsonl.gz", "a.json", "a.csv", "a.parquet")


@pytest.fixture
def long(tmp_path, monkeypatch):
    """Opens a file of the text as one that is too long to be tokenised as a whole."""
    monkeypatch.setattr("streamprune.texts.corpus.WHOLE_CHARACTERS", 1000)

    def corpus(name, **options):
        return Corpus(open_documents(write(name, tmp_path)), Numbers(), **options)

    return corpus


@pytest.mark.parametrize("name", ANYWHERE + PASSING)
def test_windows_are_consecutive_tokens_of_the_text(name, long):
    windows = long(name).sequences(20, 96, "random", seed=3)
    assert windows.shape == (20, 96)
    assert windows.dtype == torch.int64
    assert torch.equal(windows - windows[:, :1], torch.arange(96).expand(20, 96))
    assert len(set(windows[:, 0].tolist())) == 20
    assert torch.equal(windows, long(name).sequences(20, 96, "random", seed=3))
    assert not torch.equal(windows, long(name).sequences(20, 96, "random", seed=4))


@pytest.mark.parametrize("name", ANYWHERE + PASSING)
def test_every_part_of_the_text_is_as_likely(name, long):
    """χ² of 400 windows over eight parts of the text: below 24.3 in 999 of 1000 fair draws (7 degrees of freedom)."""
    starts = long(name).sequences(400, 8, "random", seed=0)[:, 0]
    counts = Counter((starts * 8 // WORDS).tolist())
    assert sum((counts[part] - 50) ** 2 / 50 for part in range(8)) < 24.3
    # A window may begin in the middle of a record, too.
    assert len(set((starts % PER_RECORD).tolist())) > PER_RECORD / 2


@pytest.mark.parametrize("name", ANYWHERE)
def test_what_is_tokenised_goes_with_the_sequences_not_with_the_text(name, long):
    corpus = long(name)
    corpus.sequences(4, 16, "random", seed=0)
    assert corpus.tokenizer.characters <= 4 * 16 * 8 * 2


@pytest.mark.parametrize("name", ANYWHERE + PASSING)
def test_first_stops_when_it_has_enough(name, long, monkeypatch):
    monkeypatch.setattr("streamprune.texts.tokenizer.BLOCK_CHARACTERS", 500)
    corpus = long(name)
    windows = corpus.sequences(5, 16, "first", seed=0)
    assert torch.equal(windows, torch.arange(80).view(5, 16))
    assert corpus.tokenizer.characters < 2000
    assert torch.equal(corpus.segments(16, None, most=3), torch.arange(48).view(3, 16))
    assert corpus.count(1000) >= 1000


@pytest.mark.parametrize("name", ANYWHERE + PASSING)
def test_a_long_text_that_is_too_short_all_the_same_is_refused(name, long):
    with pytest.raises(
        CalibrationError, match=r"the text has about [56]\d,\d\d\d tokens, 700 samples of 100 need 70,000"
    ):
        long(name).sequences(700, 100, "random", seed=0)
    with pytest.raises(CalibrationError, match=r"the text has 60,000 tokens, 700 samples of 100 need 70,000"):
        long(name).sequences(700, 100, "first", seed=0)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "long"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.jsonl.gz", "a.json", "a.csv"])
def test_sampling_records_takes_their_starts_each_once(name, whole, long, monkeypatch):
    if whole:
        monkeypatch.setattr("streamprune.texts.corpus.WHOLE_CHARACTERS", 1 << 30)
    windows = long(name, beginning=(7,)).sequences(30, PER_RECORD, "records", seed=0)
    assert windows.shape == (30, PER_RECORD)
    assert set(windows[:, 0].tolist()) == {7}
    assert set((windows[:, 1] % PER_RECORD).tolist()) == {0}
    assert len(set(windows[:, 1].tolist())) == 30
    with pytest.raises(CalibrationError, match=rf"0 records with {PER_RECORD + 1} tokens .*--seq-len"):
        long(name).sequences(2, PER_RECORD + 1, "records", seed=0)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_prose_has_no_records_to_sample(name, long):
    with pytest.raises(UsageError, match=r"--sampling records: .* is prose"):
        long(name).sequences(2, 8, "records", seed=0)


def test_texts_of_many_characters_to_a_token_are_read_as_far_as_it_takes(tmp_path, monkeypatch):
    monkeypatch.setattr("streamprune.texts.corpus.WHOLE_CHARACTERS", 1000)
    text = "".join(f"w{number:06d}" + " " * 40 for number in range(5000))
    for name, data in (("a.txt", text.encode()), ("a.txt.gz", gzip.compress(text.encode()))):
        (tmp_path / name).write_bytes(data)
        windows = Corpus(open_documents(tmp_path / name), Numbers()).sequences(5, 64, "random", seed=0)
        assert torch.equal(windows - windows[:, :1], torch.arange(64).expand(5, 64))


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_places_within_characters_of_several_bytes_are_places_in_the_text(suffix, tmp_path):
    text = "☂é語 " * 500
    (tmp_path / f"a.{suffix}").write_text(
        text if suffix == "txt" else json.dumps({"text": text}, ensure_ascii=False), encoding="utf-8"
    )
    places = open_documents(tmp_path / f"a.{suffix}").places(random.Random(0))
    for _ in range(200):
        share, rest = next(places)
        piece = next(rest)
        assert piece[int(share * len(piece)) :].lstrip("☂é語 ") == ""


def uneven(name, tmp_path):
    """A file whose first record has half of all words; each second one of the others carries much that is no text."""
    texts = [numbered(0, 20_000), *(numbered(start, start + 40) for start in range(20_000, 40_000, 40))]
    rows = [{"text": text, "meta": "x" * 2000 * (number % 2)} for number, text in enumerate(texts)]
    file = tmp_path / name
    if name.endswith(".parquet"):
        pyarrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        writer.write_table(pyarrow.Table.from_pylist(rows), file)
    elif name.endswith(".csv"):
        file.write_text("text,meta\n" + "".join(f"{row['text']},{row['meta']}\n" for row in rows))
    elif name.endswith(".json"):
        file.write_text(json.dumps(rows))
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_records_count_by_the_length_of_their_text_alone(name, tmp_path, monkeypatch):
    monkeypatch.setattr("streamprune.texts.corpus.WHOLE_CHARACTERS", 1000)
    corpus = Corpus(open_documents(uneven(name, tmp_path)), Numbers())
    starts = corpus.sequences(400, 8, "random", seed=1)[:, 0]
    within = 4 * math.sqrt(0.25 / 400)
    assert abs(float((starts < 20_000).double().mean()) - 0.5) < within
    small = starts[starts >= 20_000]
    with_meta = ((small - 20_000) // 40) % 2 == 0
    assert abs(float(with_meta.double().mean()) - 0.5) < 4 * math.sqrt(0.25 / len(small))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=repr)
def test_every_record_is_found_whatever_lines_end_with(end, tmp_path, monkeypatch):
    monkeypatch.setattr("streamprune.texts.corpus.WHOLE_CHARACTERS", 1000)
    records = [
        json.dumps({"text": " ".join(str(number) for number in range(at, at + 50))}) for at in range(0, 2000, 50)
    ]
    (tmp_path / "a.jsonl").write_bytes(end.join([*records, ""]).encode())
    corpus = Corpus(open_documents(tmp_path / "a.jsonl"), Numbers())
    starts = corpus.sequences(100, 8, "random", seed=1)[:, 0]
    assert len({int(start) // 50 for start in starts}) > 30


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "long"])
def test_each_record_that_is_long_enough_is_as_likely(whole, tmp_path, monkeypatch):
    """χ² over eight records of very different length, each of 200 seeds drawing two of them."""
    monkeypatch.setattr("streamprune.texts.corpus.WHOLE_CHARACTERS", 1 << 30 if whole else 100)
    file = tmp_path / "a.jsonl"
    texts = [numbered(1000 * n, 1000 * n + 10 + 90 * n) for n in range(8)] + ["w999999"]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus, counts = Corpus(open_documents(file), Numbers()), Counter()
    for seed in range(200):
        drawn = corpus.sequences(2, 10, "records", seed)[:, 0].tolist()
        assert len(set(drawn)) == 2
        counts.update(start // 1000 for start in drawn)
    assert set(counts) == set(range(8))
    assert sum((count - 50) ** 2 / 50 for count in counts.values()) < 24.3


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_windows_begin_with_words_not_within_them(name, tmp_path, monkeypatch):
    monkeypatch.setattr("streamprune.texts.corpus.WHOLE_CHARACTERS", 1000)
    texts = [f"{first:03d}{second:03d}" for first in range(100, 200) for second in range(100, 140)]
    text = lambda record: json.dumps({"text": record}) + "\n" if name == "a.jsonl" else record + "\n"  # noqa: E731
    (tmp_path / name).write_text(("" if name == "a.jsonl" else "text\n") + "".join(map(text, texts)))
    windows = Corpus(open_documents(tmp_path / name), Numbers()).sequences(200, 4, "random", seed=0)
    assert set(windows.flatten().tolist()) <= set(map(int, texts))


def test_a_directory_is_sampled_by_the_bytes_of_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr("streamprune.texts.corpus.WHOLE_CHARACTERS", 1000)
    for number, (start, stop) in enumerate([(0, 10_000), (10_000, 20_000), (20_000, 80_000)]):
        (tmp_path / f"{number}.txt").write_text(numbered(start, stop) + " ")
    starts = Corpus(open_documents(tmp_path), Numbers()).sequences(400, 8, "random", seed=0)[:, 0]
    share = float((starts >= 20_000).double().mean())
    assert abs(share - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 400)


def test_a_line_says_how_much_was_read_after_a_second_and_then_now_and_again(long):
    said, seconds = [], []

    def clock():
        seconds.append(0.2 * len(seconds))
        return seconds[-1]

    def say(line):
        said.append((line, seconds[-1]))

    long("a.csv", say=say, clock=clock).sequences(3, 8, "random", seed=0)
    assert re.fullmatch(r"reading .*a\.csv: [\d,]+ million characters so far", said[0][0])
    times = [second for _, second in said]
    assert 1.0 <= times[0] <= 1.4
    assert all(later - sooner >= 15 - 1e-6 for sooner, later in itertools.pairwise(times))
    assert len(times) >= seconds[-1] / 15.3


def test_nothing_is_said_of_a_text_that_is_read_at_once(long):
    said = []
    long("a.csv", say=said.append, clock=lambda: 0.0).sequences(3, 8, "random", seed=0)
    assert not said
