"""What a calibration or evaluation text may get wrong is refused in one line, and nothing is written."""

from __future__ import annotations

import json
import os

import pytest
from cli_runner import SHORT, parquet


@pytest.mark.parametrize("sampling", ["random", "first"])
def test_text_too_short_is_refused_with_both_counts(sampling, refused, model, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("x" * 31)
    refused(model, "--calibration", text, "--sampling", sampling, code=1, names=("31", "32", "16"), remedy="lower")


def test_text_that_just_suffices_is_taken(streamprune, model, output, tmp_path):
    text = tmp_path / "enough.txt"
    text.write_text("x" * 32)
    options = ("--method", "taylor", "--calibration", text, "--no-evaluate", "--quiet", *SHORT)
    assert streamprune("--model", model, "--output", output, *options).code == 0


def test_evaluation_text_too_short_is_refused(refused, model, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("x" * 63)
    refused(model, "--evaluate", text, code=1, names=("63", "64"))


@pytest.mark.parametrize("name", ["gone.txt", "gone.jsonl", "gone.parquet", "gone", "gone.json.gz"])
def test_missing_calibration_is_refused(name, refused, model, tmp_path):
    refused(model, "--calibration", tmp_path / name, code=1, names=(name, "does not exist"))


def test_a_directory_without_texts_is_refused(refused, model, tmp_path):
    (tmp_path / "texts").mkdir()
    refused(model, "--calibration", tmp_path / "texts", code=1, names=(str(tmp_path / "texts"), "directory"))


@pytest.mark.parametrize("name", ["latin.txt", "latin.jsonl"])
def test_text_that_is_not_utf8_is_refused(name, refused, model, tmp_path):
    (tmp_path / name).write_bytes(b'{"text": "caf\xe9"}\n')
    refused(model, "--calibration", tmp_path / name, code=1, names=(name,), remedy="UTF-8")


@pytest.mark.parametrize(
    "record", ['{"body": "words"}', '{"text": 7}', '["words"]'], ids=["no-field", "number", "list"]
)
def test_jsonl_without_the_field_is_refused_by_line(record, refused, model, tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "words"}\n' + record + "\n")
    refused(model, "--calibration", file, code=1, names=(f"{file}:2", "'text'"), remedy="--field")


def test_bad_json_line_is_refused_by_line(refused, model, tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "words"}\n\n{"text": "wor\n')
    refused(model, "--calibration", file, code=1, names=(f"{file}:3",), remedy="JSON")


def test_parquet_without_the_column_is_refused_with_its_columns(refused, model, tmp_path):
    file = parquet(tmp_path / "data.parquet", body=["words"], title=["t"])
    refused(model, "--calibration", file, code=1, names=(str(file), "body", "title"), remedy="--field")


def test_parquet_column_that_is_no_text_is_refused(refused, model, tmp_path):
    file = parquet(tmp_path / "data.parquet", text=[1, 2, 3])
    refused(model, "--calibration", file, code=1, names=(str(file), "text"))


def test_damaged_parquet_is_refused(refused, model, tmp_path):
    file = parquet(tmp_path / "data.parquet", text=["words"])
    os.truncate(file, file.stat().st_size - 6)
    refused(model, "--calibration", file, code=1, names=(str(file),), remedy="not a readable parquet file")


def test_sequences_longer_than_the_positions_of_the_model_are_refused(refused, model):
    refused(model, "--seq-len", 65, code=2, names=("--seq-len 65",), remedy="at most 64")


def test_standard_input_for_both_texts_is_refused(refused, model):
    refused(model, "--calibration", "-", "--evaluate", "-", code=2, names=("standard input",))


BAD_TEXTS = {
    "page.html": "<html>",
    "page.txt": "<!doctype html>",
    "pointer.txt": "version https://git-lfs.github.com/spec/v1\n",
    "other.jsonl": '{"body": "words"}\n',
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_plan_and_eval_refuse_texts_as_a_run_does(name, refused, streamprune, model, tmp_path):
    file = tmp_path / name
    file.write_text(BAD_TEXTS[name])
    message = refused(model, "--method", "taylor", "--calibration", file, code=1, names=(name,))
    for command in (
        ("plan", "--method", "taylor", "--calibration"),
        ("plan", "--evaluate"),
        ("eval", "--seq-len", 16, "--text"),
    ):
        result = streamprune(*command, file, "--model", model)
        assert (result.code, result.err) == (1, message), command


def test_plan_and_eval_refuse_a_tokenizer_that_cannot_be_loaded(refused, streamprune, model):
    for file in model.glob("tokenizer*"):
        file.unlink()
    message = refused(model, "--method", "taylor", code=1, names=(str(model), "tokenizer"))
    for command in ("plan", "eval"):
        assert streamprune(command, "--model", model).err == message
    assert streamprune("plan", "--model", model, "--method", "random", "--no-evaluate").code == 0


def test_plan_leaves_a_pipe_to_the_run(streamprune, model, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for source in ("-", tmp_path / "pipe"):
        assert streamprune("plan", "--model", model, "--method", "taylor", "--calibration", source).code == 0


def test_names_that_are_no_utf8_cost_nothing(streamprune, model, output, tmp_path):
    name = os.fsdecode(b"caf\xe9.txt")
    (tmp_path / name).write_text("x" * 200)
    options = ("--method", "taylor", "--calibration", tmp_path / name, "--evaluate", tmp_path / name, "--quiet", *SHORT)
    result = streamprune("--model", model, "--output", output, *options)
    assert result.code == 0, result.err
    assert "caf\\udce9.txt" in (output / "README.md").read_text()
    assert json.loads((output / "streamprune.json").read_text())["options"]["calibration"].endswith(name)


@pytest.mark.parametrize("command", [("eval", "--text"), ("plan", "--evaluate"), ("plan", "--calibration")])
def test_an_empty_name_is_refused(command, streamprune, model):
    result = streamprune(*command, "", "--model", model)
    assert result.code == 2
    assert f"{command[1]} '': give a path or a name" in result.err


def test_a_missing_text_beside_the_working_directory_is_no_data_set(streamprune, model):
    for command in (("eval", "--text"), ("plan", "--evaluate")):
        assert "gone does not exist" in streamprune(*command, "./gone", "--model", model).err
