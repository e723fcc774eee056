"""An output that exists, cannot be made or does not fit is refused, and nothing is lost or left behind."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
from collections import namedtuple
from pathlib import Path

import pytest
from cli_runner import COMMAND, SHORT, check_refusal, edit_tensors, environment, snapshot
from safetensors import SafetensorError


def test_output_that_exists_is_refused(refused, model, earlier):
    refused(model, code=1, names=(str(earlier), "exists"), remedy="--overwrite")


def test_output_that_is_an_empty_directory_is_refused(refused, model, output):
    output.mkdir()
    refused(model, code=1, names=(str(output), "exists"), remedy="--overwrite")


def test_overwrite_replaces_the_whole_output(streamprune, model, earlier):
    options = ("--method", "magnitude", "--no-evaluate", "--quiet", "--overwrite")
    assert streamprune("--model", model, "--output", earlier, *options).code == 0
    assert json.loads((earlier / "streamprune.json").read_text())["options"]["method"] == "magnitude"
    assert not (earlier / "notes.txt").exists()
    assert [path.name for path in earlier.parent.iterdir()] == [earlier.name]


def test_overwrite_of_nothing_is_an_ordinary_run(streamprune, model, output):
    options = ("--method", "random", "--no-evaluate", "--quiet", "--overwrite")
    assert streamprune("--model", model, "--output", output, *options).code == 0
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_a_failed_overwrite_keeps_the_earlier_output(refused, model, earlier):
    edit_tensors(model, lambda tensors: tensors["model.layers.7.mlp.up_proj.weight"].fill_(float("nan")))
    refused(model, "--overwrite", "--method", "random", "--no-evaluate", code=1, names=("layer 7",))


def test_overwrite_does_not_remove_what_is_no_model(refused, model, output):
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    refused(model, "--overwrite", code=1, names=(str(output),), remedy="will not remove it")


@pytest.mark.parametrize("options", [(), ("--overwrite",)], ids=["plain", "overwrite"])
def test_output_that_is_a_file_is_refused(options, refused, model, output):
    output.write_text("a file")
    refused(model, *options, code=1, names=(str(output),), remedy="choose another --output")


def test_output_below_a_file_is_refused(streamprune, model, tmp_path):
    file = tmp_path / "file"
    file.write_text("a file")
    result = streamprune("--model", model, "--output", file / "pruned", "--quiet", *SHORT)
    check_refusal(result, 1, (str(file),), "choose another --output")


@pytest.mark.parametrize("linked", [False, True], ids=["itself", "a-link-to-it"])
def test_output_that_is_the_model_itself_is_refused(linked, streamprune, model, tmp_path):
    target = tmp_path / "link" if linked else model
    (model / "streamprune.json").write_text("{}")  # without it --overwrite refuses for another reason
    if linked:
        target.symlink_to(model)
    before = snapshot(tmp_path)
    result = streamprune("--model", model, "--output", target, "--overwrite", "--quiet", *SHORT)
    check_refusal(result, 1, (str(target), "the model itself"))
    assert snapshot(tmp_path) == before


def test_overwriting_what_holds_the_calibration_text_is_refused(streamprune, model, earlier, tmp_path):
    text = earlier / "text.txt"
    text.write_text("words " * 500)
    before = snapshot(tmp_path)
    options = ("--calibration", text, "--overwrite", "--quiet", *SHORT)
    result = streamprune("--model", model, "--output", earlier, *options)
    check_refusal(result, 1, (str(text),), "choose another --output")
    assert snapshot(tmp_path) == before


def test_overwriting_a_directory_that_holds_the_model_is_refused(streamprune, model, tmp_path):
    outer = Path(shutil.copytree(model, tmp_path / "outer"))
    inner = Path(shutil.copytree(model, outer / "inner"))
    (outer / "streamprune.json").write_text("{}")
    before = snapshot(tmp_path)
    options = ("--method", "random", "--no-evaluate", "--overwrite", "--quiet")
    result = streamprune("--model", inner, "--output", outer, *options)
    assert snapshot(tmp_path) == before, "the source model was removed with the output it lay in"
    check_refusal(result, 1, (str(outer),), "choose another --output")


def full(*arguments: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_disk_that_is_full_when_room_is_taken_leaves_nothing(refused, model, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", full)
    refused(model, "--method", "random", code=1, names=("No space left on device",), remedy="make room")


@pytest.mark.parametrize("writes", [0, 1, 20])
def test_disk_that_is_full_in_the_middle_leaves_nothing(writes, refused, model, monkeypatch):
    original, done = os.pwrite, []

    def pwrite(*arguments):
        if len(done) == writes:
            full()
        done.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(os, "pwrite", pwrite)
    refused(model, "--method", "random", code=1, names=("No space left on device",), remedy="make room")
    assert len(done) == writes


def test_disk_that_is_full_when_the_tokenizer_is_copied_leaves_nothing(refused, model, monkeypatch):
    monkeypatch.setattr(shutil, "copyfile", full)
    refused(model, "--method", "random", code=1, names=("No space left on device",), remedy="make room")


def test_disk_that_is_full_when_safetensors_writes_leaves_nothing(refused, model, monkeypatch):
    def save(*arguments, **options):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("streamprune.storage.scores.save_file", save)
    refused(model, "--method", "random", code=1, names=("No space left on device",), remedy="make room")


def test_an_output_where_a_disk_is_mounted_is_refused_before_any_work(refused, model, output, monkeypatch):
    output.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == output)
    refused(model, "--overwrite", code=1, names=(str(output), "mounted"), remedy="choose a directory inside it")


@pytest.mark.parametrize("target", ["loop", "gone"])
def test_a_link_to_nothing_above_the_output_is_refused_before_any_work(target, streamprune, model, tmp_path):
    (tmp_path / "loop").symlink_to(target)
    result = streamprune("--model", model, "--output", tmp_path / "loop" / "x", "--method", "random", "--quiet")
    check_refusal(result, 1, ("loop", "a link to nothing"), "choose another place")


def test_a_path_that_is_no_text_can_be_printed(streamprune, model, output):
    """As bash gives it from a disk in another encoding; the run is done by then."""
    command = [*COMMAND, "--model", str(model), "--output", os.fsdecode(bytes(output) + b"caf\xe9")]
    options = ("--method", "random", "--no-evaluate", "--quiet")
    done = subprocess.run([*command, *options], capture_output=True, env=environment() | {"PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 0, done.stderr
    assert b"caf\\udce9" in done.stdout


def test_a_real_limit_on_file_sizes_leaves_nothing(refused, model):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        refused(model, "--method", "random", code=1, names=("File too large",), remedy="make room")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_overwrite_on_a_full_disk_keeps_the_earlier_output(refused, model, earlier, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", full)
    refused(model, "--method", "random", "--overwrite", code=1, names=("No space left",), remedy="make room")


def small_disk(path: object) -> object:
    return namedtuple("usage", "total used free")(10**6, 10**6 - 1000, 1000)


def test_disk_that_is_too_small_is_refused_with_both_sizes(refused, model, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", small_disk)
    refused(model, "--method", "random", code=1, names=("1,000 bytes free", "528,192"), remedy="make room")


def test_disk_that_is_too_small_is_refused_before_the_work(refused, model, monkeypatch):
    def no_sweep(*arguments, **options):
        raise AssertionError("layers were read before the disk was found too small")

    monkeypatch.setattr(shutil, "disk_usage", small_disk)
    monkeypatch.setattr("streamprune.paging.pager.Pager.pages", no_sweep)
    refused(model, code=1, names=("1,000 bytes free", "528,192"), remedy="make room")


def test_a_refused_run_leaves_no_parent_directories(streamprune, model, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", small_disk)
    before = snapshot(tmp_path)
    result = streamprune(
        "--model", model, "--output", tmp_path / "new" / "er" / "pruned", "--method", "random", "--quiet"
    )
    check_refusal(result, 1, ("bytes free",), "make room")
    assert snapshot(tmp_path) == before


def test_a_failed_run_closes_what_it_opened(refused, model, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", full)
    before = len(os.listdir("/proc/self/fd"))
    refused(model, "--method", "random", "--no-evaluate", code=1, names=("No space left on device",))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_new_output_is_made_with_its_parents(streamprune, model, tmp_path):
    output = tmp_path / "new" / "er" / "pruned"
    done = streamprune("--model", model, "--output", output, "--method", "random", "--no-evaluate", "--quiet")
    assert done.code == 0
    assert (output / "model.safetensors").is_file()
