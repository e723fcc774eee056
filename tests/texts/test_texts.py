"""What a plan says of the texts that its run will read."""

from __future__ import annotations

import gzip

import pytest

from streamprune.texts.documents import embedded_text

PROSE = embedded_text("calibration")


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("a.txt", (), "calibration reads 2 places in 24.1 kB of "),
        ("a.txt", ("--sampling", "first"), "calibration reads the beginning of "),
        ("a.txt", ("--compensate", "--compensate-tokens", "640"), "calibration reads 12 places in "),
        ("a.txt.gz", (), "calibration reads all "),
        ("small.txt", (), "calibration reads all of "),
    ],
)
def test_the_plan_says_what_is_read_of_a_text(name, options, said, streamprune, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("streamprune.pipeline.batches.WHOLE_CHARACTERS", 2000)
    text = (PROSE * 2)[:24_100] if name != "small.txt" else PROSE[:1900]
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    shape = ("--samples", 2, "--seq-len", 16, "--method", "taylor")
    result = streamprune("plan", "--model", tiny_llama, "--calibration", tmp_path / name, *shape, *options)
    assert result.code == 0, result.err
    (line,) = (line for line in result.out.splitlines() if line.startswith("calibration reads"))
    assert line.startswith(said)
    assert name in line
    evaluated = streamprune("plan", "--model", tiny_llama, "--evaluate", tmp_path / name, "--method", "random")
    assert f"evaluation reads the beginning of {tmp_path / name}" in evaluated.out


def test_a_plan_of_the_embedded_texts_says_nothing_of_them(streamprune, tiny_llama):
    assert " reads " not in streamprune("plan", "--model", tiny_llama, "--method", "taylor").out
