"""Shards are read as safetensors itself reads them, and what is malformed is refused by name."""

from __future__ import annotations

import errno
import json
import math
import os
import struct
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_inputs import largest_allocation
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stored_tensors import EVERY_DTYPE, random_tensor, same_bytes, save
from tiny_models import need_direct, save_tiny, tiny_model
from transformers import AutoModelForCausalLM

from streamprune.errors import CheckpointError
from streamprune.pipeline.source import Source
from streamprune.storage import checkpoint as module
from streamprune.storage.checkpoint import OTHER_DTYPES, STORED_DTYPES, Checkpoint, OtherEntry, byte_view, is_finite
from streamprune.storage.reader import PAUSES, retried


def test_every_dtype_and_shape_is_read_as_safetensors_reads_it(tmp_path):
    path = save(tmp_path / "model", EVERY_DTYPE)
    expected = load_file(path / "model.safetensors")
    assert {tensor.dtype for tensor in expected.values()} == set(STORED_DTYPES.values())
    with Checkpoint(path) as checkpoint:
        assert set(checkpoint.tensors) == set(expected)
        assert all(same_bytes(checkpoint.read(name), tensor) for name, tensor in expected.items())


def test_several_shards_are_one_checkpoint(tmp_path):
    names = sorted(EVERY_DTYPE)
    parts = [{name: EVERY_DTYPE[name] for name in names[start::3]} for start in range(3)]
    with Checkpoint(save(tmp_path / "model", *parts)) as checkpoint:
        assert len(checkpoint.files) == 3
        assert sorted(checkpoint.tensors) == names
        assert all(same_bytes(checkpoint.read(name), EVERY_DTYPE[name]) for name in names)


def test_an_entry_gives_the_bytes_of_its_tensor_in_the_file(tmp_path):
    path = save(tmp_path / "model", EVERY_DTYPE)
    raw = (path / "model.safetensors").read_bytes()
    for entry in Checkpoint(path).tensors.values():
        tensor = EVERY_DTYPE[entry.name]
        expected = bytes(byte_view(tensor)) if tensor.numel() else b""
        assert raw[entry.offset : entry.offset + entry.nbytes] == expected


def test_entries_keep_the_order_of_the_header(tmp_path):
    path = save(tmp_path / "model", EVERY_DTYPE)
    with safe_open(path / "model.safetensors", "pt") as file:
        assert list(Checkpoint(path).tensors) == list(file.offset_keys())


def test_what_is_read_is_memory_of_its_own(tmp_path):
    path = save(tmp_path / "model", {"a": torch.arange(6.0)})
    with Checkpoint(path) as checkpoint:
        checkpoint.read("a").fill_(0)
        assert torch.equal(checkpoint.read("a"), torch.arange(6.0))
        assert str(path) not in Path("/proc/self/maps").read_text(), "shards are never mapped"


@pytest.mark.parametrize("reader", ["buffered", "direct"])
@pytest.mark.parametrize("piece", [1, 5, 7, 64])
def test_a_tensor_is_filled_in_by_pieces_in_any_dtype(piece, reader, tmp_path, monkeypatch):
    if reader == "direct":
        need_direct(tmp_path)
    monkeypatch.setattr(module, "FILL_PIECE", piece)
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.zeros(0), "d": torch.tensor(2.5)}
    with Checkpoint(save(tmp_path / "model", tensors), reader) as checkpoint:
        for name, tensor in tensors.items():
            for dtype in (torch.float64, torch.float32, torch.bfloat16):
                target = torch.full(tensor.shape, math.nan, dtype=dtype)
                checkpoint.fill(name, target)
                assert torch.equal(target, tensor.to(dtype))


def test_a_tensor_with_nan_does_not_fill_another(tmp_path):
    save(tmp_path / "model", {"a": torch.tensor([1.0, math.nan])})
    with Checkpoint(tmp_path / "model") as checkpoint, pytest.raises(CheckpointError, match="a holds NaN or infinite"):
        checkpoint.fill("a", torch.zeros(2))


def test_a_tied_head_is_read_once_and_what_was_loaded_is_given_up_at_the_end(tmp_path):
    save_tiny(tmp_path, "llama", tie_word_embeddings=True)
    with Source(str(tmp_path), dtype="float64").open() as sweeper:
        model = sweeper.skeleton.model
        head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        assert head is embeddings and not head.is_meta
        resident = sweeper.skeleton.resident_bytes
        assert sweeper.skeleton.checkpoint.bytes_read == resident
    assert sweeper.skeleton.resident_bytes == resident and not sweeper.skeleton.loaded
    assert all(parameter.is_meta for parameter in model.parameters())


def test_bytes_read_counts_what_was_asked_for(tmp_path):
    tensors = {"a": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.bfloat16), "c": torch.zeros(0)}
    with Checkpoint(save(tmp_path / "model", tensors)) as checkpoint:
        assert checkpoint.bytes_read == 0
        checkpoint.read("a")
        assert checkpoint.bytes_read == 60
        checkpoint.read("b")
        checkpoint.read("c")
        assert checkpoint.bytes_read == 74 == checkpoint.nbytes
        checkpoint.read("a")
        assert checkpoint.bytes_read == 134


@pytest.mark.parametrize("most", [1, 3, 64])
def test_short_reads_are_completed(most, tmp_path, monkeypatch):
    original, sizes = os.preadv, []

    def preadv(descriptor, buffers, offset):
        sizes.append(original(descriptor, [buffers[0][:most]], offset))
        return sizes[-1]

    tensor = random_tensor(torch.float32, 11, 13)
    monkeypatch.setattr(os, "preadv", preadv)
    with Checkpoint(save(tmp_path / "model", {"a": torch.zeros(5), "b": tensor})) as checkpoint:
        assert same_bytes(checkpoint.read("b"), tensor)
        assert checkpoint.bytes_read == tensor.nbytes
    assert len(sizes) == -(-tensor.nbytes // most)


def test_a_file_that_ends_after_it_was_opened_is_an_error_with_the_place(tmp_path):
    path = save(tmp_path / "model", {"a": torch.zeros(1000)})
    with Checkpoint(path) as checkpoint:
        file = path / "model.safetensors"
        os.truncate(file, file.stat().st_size - 10)
        with pytest.raises(CheckpointError, match=rf"{file} ended at byte {file.stat().st_size}, 10 bytes too early"):
            checkpoint.read("a")
        assert checkpoint.bytes_read == 0


def test_a_read_error_names_the_file(tmp_path, monkeypatch):
    path = save(tmp_path / "model", {"a": torch.zeros(5)})

    def preadv(*arguments):
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(os, "preadv", preadv)
    with (
        Checkpoint(path) as checkpoint,
        pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read: Permission denied"),
    ):
        checkpoint.read("a")


def test_reading_around_the_page_cache_changes_no_byte(tmp_path):
    path = save(tmp_path / "model", {"a": random_tensor(torch.float32, 300)})
    with Checkpoint(path) as checkpoint:
        entry, buffer = checkpoint.tensors["a"], torch.empty(1200, dtype=torch.uint8)
        for _ in range(2):
            checkpoint.read_into(entry.file, entry.offset, byte_view(buffer), stays=False)
        assert same_bytes(buffer.view(torch.float32), random_tensor(torch.float32, 300))


def test_a_shard_is_opened_once_and_closed(tmp_path):
    path = save(tmp_path / "model", {"a": torch.zeros(5)}, {"b": torch.zeros(5)})
    before = set(os.listdir("/proc/self/fd"))
    with Checkpoint(path) as checkpoint:
        for _ in range(3):
            checkpoint.read("a")
            checkpoint.read("b")
        assert len(set(os.listdir("/proc/self/fd")) - before) <= 3  # two shards, and listdir's own
    after = set(os.listdir("/proc/self/fd"))
    assert len(after) == len(before)
    assert checkpoint.read("a").shape == (5,)  # readable again after closing
    checkpoint.close()


@pytest.mark.parametrize("meant", [1, 2])
def test_of_a_tensor_in_two_shards_the_index_decides(meant, tmp_path):
    path = save(tmp_path / "model", {"a": torch.full((5,), 1.0)}, {"a": torch.full((5,), 2.0), "b": torch.zeros(1)})
    index = path / "model.safetensors.index.json"
    places = {"a": f"model-0000{meant}-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index.write_text(json.dumps({"weight_map": places | {"c": "model-00001-of-00002.safetensors"}}))
    with Checkpoint(path) as checkpoint:
        assert torch.equal(checkpoint.read("a"), torch.full((5,), float(meant)))
        assert list(checkpoint.misplaced) == ["c"], "which no shard holds"


def test_of_a_tensor_in_two_shards_that_the_index_leaves_out_the_last_counts_as_in_transformers(tmp_path):
    tiny_model("llama", tied=True).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    tensors = tiny_model("llama", tied=True, seed=1).state_dict()
    norms = [{"model.norm.weight": torch.full((48,), value, dtype=torch.float64)} for value in (3.0, 4.0)]
    del tensors["model.norm.weight"], tensors["lm_head.weight"]
    save_file(tensors | norms[0], tmp_path / "a.safetensors", metadata={"format": "pt"})
    save_file(norms[1] | {"x": torch.zeros(1)}, tmp_path / "b.safetensors", metadata={"format": "pt"})
    places = dict.fromkeys(tensors, "a.safetensors") | {"x": "b.safetensors"}
    content = {"metadata": {}, "weight_map": places}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with Checkpoint(tmp_path) as checkpoint:
        assert torch.equal(checkpoint.read("model.norm.weight"), loaded.model.norm.weight)


@pytest.mark.parametrize("name", sorted(OTHER_DTYPES))
def test_a_dtype_that_is_not_read_is_known_by_its_bytes(name, tmp_path):
    path = save(tmp_path / "model", {"a": torch.zeros(24, dtype=torch.uint8)})
    nbytes = 24 * OTHER_DTYPES[name] // 8
    header = {"a": {"dtype": name, "shape": [4, 6], "data_offsets": [0, nbytes]}}
    encoded = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(nbytes))
    with Checkpoint(path) as checkpoint:
        assert not checkpoint.tensors
        assert checkpoint.others == {"a": OtherEntry("a", name, 0, nbytes)}
        assert checkpoint.keep(()) == [OtherEntry("a", name, 0, nbytes)]


def test_renamed_tensors_are_read_by_their_new_names(tmp_path):
    with Checkpoint(save(tmp_path / "model", {"x.a": torch.arange(3), "b": torch.zeros(1)})) as checkpoint:
        checkpoint.rename({"x.a": "a"})
        assert torch.equal(checkpoint.read("a"), torch.arange(3)) and list(checkpoint.tensors) == ["a", "b"]
        assert [entry.name for entry in checkpoint.keep({"a"})] == ["b"]
        assert checkpoint.nbytes == 24


def test_shards_may_be_links_to_files_elsewhere(tmp_path):
    """The hub's cache is made of them."""
    path = save(tmp_path / "model", {"a": torch.arange(5)})
    (path / "model.safetensors").rename(tmp_path / "blob")
    (path / "model.safetensors").symlink_to(tmp_path / "blob")
    with Checkpoint(path) as checkpoint:
        assert torch.equal(checkpoint.read("a"), torch.arange(5))


def entry(**fields: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | fields}


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"not json",
        b"\xff\xfe",
        b"[1, 2]",
        {"a": 5},
        {"a": {}},
        entry(dtype="F8_E5M2"),
        entry(dtype=None),
        entry(dtype=["F32"]),
        entry(shape=None),
        entry(shape=["x"]),
        entry(shape=[3]),
        entry(shape=[-2]),
        entry(shape=[-2, -1]),
        entry(shape=[float("inf")]),
        entry(data_offsets=[0]),
        entry(data_offsets=[0, 4]),
        entry(data_offsets=[8, 0]),
        entry(data_offsets=[-8, 0]),
        entry(data_offsets=[8, 16]),
        entry(data_offsets=[2**62, 2**62 + 8]),
        entry() | {"__metadata__": "pt"},
        entry() | {"__metadata__": 5},
        entry() | {"__metadata__": ["format"]},
        b'{"a":' + b"[" * 100_000,
    ],
    ids=lambda header: (header if isinstance(header, bytes) else json.dumps(header).encode())[:60].decode("latin-1"),
)
def test_malformed_header_is_an_error_that_names_the_file(header, tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(8))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Checkpoint(path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_finiteness_is_seen_wherever_it_is_lost_and_takes_no_copy(dtype):
    tensor = torch.ones(3000, 1000, dtype=dtype)
    assert largest_allocation(lambda: is_finite(tensor)) <= 4 << 20 < tensor.nbytes
    assert is_finite(tensor) and is_finite(tensor[:0]) and is_finite(torch.full((9,), 6e4, dtype=dtype))
    for value in (math.nan, math.inf, -math.inf):
        for place in ((0, 0), (2999, 999), (1500, 3)):
            broken = tensor.clone()
            broken[place] = value
            assert not is_finite(broken)


@pytest.mark.parametrize("name", ["read_json", "read_header"])
def test_headers_are_waited_for_too(name, tmp_path, monkeypatch):
    file, pauses, opened = tmp_path / "file", [], []
    text = b'{"__metadata__": {}}'
    file.write_bytes(text if name == "read_json" else len(text).to_bytes(8, "little") + text)
    original = Path.open

    def failing(self, *arguments, **options):
        opened.append(self)
        if len(opened) <= failures:
            raise OSError(errno.EIO, "Input/output error")
        return original(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", failing)
    monkeypatch.setattr(module, "retried", partial(retried, sleep=pauses.append))
    failures = 3
    assert getattr(module, name)(file) == ({"__metadata__": {}} if name == "read_json" else [])
    assert pauses == list(PAUSES[:3])
    opened.clear()
    failures = 100
    with pytest.raises(CheckpointError, match="Input/output error"):
        getattr(module, name)(file)
    assert len(opened) == len(PAUSES) + 1
