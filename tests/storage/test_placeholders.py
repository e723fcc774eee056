"""What stands where weights or JSON should be is called what it is, with the remedy for that."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model

from streamprune.errors import CheckpointError
from streamprune.storage.checkpoint import Checkpoint

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1347840\n"
PAGE = b"<!DOCTYPE html>\n<html><body>Sign in</body></html>\n"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    path = tmp_path / "sharded"
    tiny_model("llama", dtype=torch.float32).save_pretrained(path, max_shard_size="100KB")
    return path


def pickled(tmp_path: Path) -> bytes:
    """The beginning of what torch.save writes: a zip file."""
    with zipfile.ZipFile(tmp_path / "archive", "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    return (tmp_path / "archive").read_bytes()


@pytest.mark.parametrize(
    "content, told",
    [
        (POINTER, "is a Git LFS pointer"),
        (PAGE, "is a web page"),
        (b"\xef\xbb\xbf\n <HTML>" + bytes(20), "is a web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is a web page"),
        (b"Entry not found\n", "'Entry not found'"),
        (b"GGUF" + bytes(range(1, 200)), "is a GGUF file"),
        (bytes(5000), "begins with zeros"),
        (b"\x80\x02}q\x00.", "is a pickle"),
        (None, "is a pickle"),
    ],
    ids=["pointer", "page", "page-bom", "xml", "text", "gguf", "zeros", "pickle", "zip"],
)
def test_a_file_in_the_place_of_weights_is_called_what_it_is(content, told, refused, model, tmp_path):
    (model / "model.safetensors").write_bytes(pickled(tmp_path) if content is None else content)
    refused(model, code=1, names=(str(model / "model.safetensors"), told))


@pytest.mark.parametrize("content, told", [(POINTER, "Git LFS pointer"), (PAGE, "web page")], ids=["pointer", "page"])
def test_one_of_several_shards_is_named(content, told, refused, sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.write_bytes(content)
    refused(sharded, code=1, names=(str(shard), told))


@pytest.mark.parametrize("content, told", [(POINTER, "Git LFS pointer"), (PAGE, "web page")], ids=["pointer", "page"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"])
def test_json_and_tokenizers_are_looked_at_before_weights(name, content, told, refused, model):
    (model / name).write_bytes(content)
    (model / "model.safetensors").write_bytes(b"not looked at")
    refused(model, code=1, names=(str(model / name), told))


@pytest.mark.parametrize("content, told", [(POINTER, "Git LFS pointer"), (PAGE, "web page")], ids=["pointer", "page"])
def test_an_index_is_called_what_it_is(content, told, refused, sharded):
    index = sharded / "model.safetensors.index.json"
    index.write_bytes(content)
    refused(sharded, code=1, names=(str(index), told))


@pytest.mark.parametrize("suffix", [".incomplete", ".part", ".crdownload", ".aria2"])
def test_a_download_that_is_not_finished_is_called_one(suffix, refused, model):
    (model / "model.safetensors").rename(model / f"model.safetensors{suffix}")
    refused(model, code=1, names=(str(model), f"unfinished download (model.safetensors{suffix})"))


@pytest.mark.parametrize("suffix", [".incomplete", ".part", ".crdownload", ".aria2"])
def test_a_shard_that_is_not_finished_is_called_one(suffix, refused, sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[0]
    shard.rename(sharded / f"{shard.name}{suffix}")
    refused(sharded, code=1, names=(shard.name, f"an unfinished download ({shard.name}{suffix})"))


def test_what_the_hub_client_has_not_finished_is_seen_in_its_own_directory(refused, sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[0]
    parts = sharded / ".cache" / "huggingface" / "download"
    parts.mkdir(parents=True)
    shard.rename(parts / "abc.def.incomplete")
    refused(sharded, code=1, names=(shard.name, "unfinished download (abc.def.incomplete)"))


def test_a_truncated_shard_with_a_part_beside_it_says_both(refused, model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    (model / "model.safetensors.part").write_bytes(b"")
    refused(model, code=1, names=(str(file), "is truncated", "model.safetensors.part lies beside it"))


def test_a_file_of_full_size_that_aria2_has_not_filled_is_refused(refused, model):
    (model / "model.safetensors.aria2").write_bytes(b"")
    refused(model, code=1, names=(str(model / "model.safetensors"), "model.safetensors.aria2"))


def test_a_stale_part_beside_whole_weights_is_no_matter(model):
    (model / "model.safetensors.part").write_bytes(b"")
    with Checkpoint(model) as checkpoint:
        assert checkpoint.tensors


@pytest.mark.parametrize(
    "name, told",
    [
        ("model-q4.gguf", "GGUF"),
        ("consolidated.safetensors", "consolidated.safetensors, which transformers does not read"),
        ("pytorch_model.bin", "pickled weights only"),
    ],
)
def test_weights_of_another_kind_are_named(name, told, refused, model):
    (model / "model.safetensors").rename(model / name)
    refused(model, code=1, names=(name, told))


@pytest.mark.parametrize("below", ["checkpoint-500", "snapshots/0a1b"])
def test_the_directory_above_the_one_that_is_meant_is_told_apart(below, tmp_path):
    (tmp_path / below).mkdir(parents=True)
    (tmp_path / below / "config.json").write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match=f"give {tmp_path / below}"):
        Checkpoint(tmp_path)
