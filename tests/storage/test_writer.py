"""Shards load as safetensors' own do, and an output appears whole or not at all."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from stored_tensors import EVERY_DTYPE, random_tensor, same_bytes, save

from streamprune.errors import OutputError
from streamprune.storage.checkpoint import STORED_DTYPES, Checkpoint, read_header
from streamprune.storage.directory import atomic_directory, check_space, write_whole
from streamprune.storage.shards import ShardedWriter, TensorSpec


def specs_of(tensors: Mapping[str, torch.Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def write(directory: Path, tensors: Mapping[str, torch.Tensor], size: int, order: list[str] | None = None) -> None:
    with ShardedWriter(directory, specs_of(tensors), size) as writer:
        for name in order or list(tensors):
            writer.write(name, tensors[name])


def test_a_file_loads_with_safetensors_and_equals(tmp_path):
    write(tmp_path, EVERY_DTYPE, 10**9)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    loaded = load_file(tmp_path / "model.safetensors")
    assert set(loaded) == set(EVERY_DTYPE)
    assert all(same_bytes(loaded[name], tensor) for name, tensor in EVERY_DTYPE.items())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_data_begins_at_a_multiple_of_eight_bytes(tmp_path):
    for number in range(9):
        directory = tmp_path / str(number)
        directory.mkdir()
        write(directory, {"x" * (number + 1): torch.zeros(3)}, 10**9)
        raw = (directory / "model.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        assert length % 8 == 0
        assert len(raw) == 8 + length + 12


@pytest.mark.parametrize("size", [1, 64, 200, 1000])
def test_shards_load_as_one_and_keep_to_the_size_unless_a_tensor_is_larger(size, tmp_path):
    write(tmp_path, EVERY_DTYPE, size)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in EVERY_DTYPE.values())
    assert list(index["weight_map"]) == list(EVERY_DTYPE), "the order is kept"
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert len(files) > 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [*files, "model.safetensors.index.json"]
    for file in files:
        tensors = load_file(tmp_path / file)
        assert set(tensors) == {name for name, place in index["weight_map"].items() if place == file}
        assert all(same_bytes(tensor, EVERY_DTYPE[name]) for name, tensor in tensors.items())
        nbytes = [tensor.nbytes for tensor in tensors.values()]
        assert sum(nbytes) <= size or sum(n > 0 for n in nbytes) == 1
    # The reader takes what the writer made.
    (tmp_path / "config.json").write_text("{}")
    with Checkpoint(tmp_path) as checkpoint:
        assert all(same_bytes(checkpoint.read(name), tensor) for name, tensor in EVERY_DTYPE.items())


def test_tensors_larger_than_a_shard_have_one_of_their_own(tmp_path):
    tensors = {
        "small": torch.zeros(2),
        "large": torch.zeros(100),
        "after": torch.zeros(2),
        "last": torch.zeros(2),
    }
    write(tmp_path, tensors, 16)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    places = [int(file.split("-")[1]) for file in index["weight_map"].values()]
    assert places == [1, 2, 3, 3]


def test_a_total_of_exactly_the_size_is_one_file(tmp_path):
    write(tmp_path, {"a": torch.zeros(2), "b": torch.zeros(2)}, 16)
    assert (tmp_path / "model.safetensors").is_file()
    assert not (tmp_path / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("size", [10**9, 100])
def test_tensors_may_come_in_any_order_and_the_bytes_are_the_same(size, tmp_path):
    names = list(EVERY_DTYPE)
    orders = [names, names[::-1], names[1::2] + names[::2]]
    written = []
    for number, order in enumerate(orders):
        directory = tmp_path / str(number)
        directory.mkdir()
        write(directory, EVERY_DTYPE, size, order)
        written.append({file.name: file.read_bytes() for file in directory.iterdir()})
    assert written[0] == written[1] == written[2]


def test_a_header_lists_the_tensors_in_the_order_given(tmp_path):
    tensors = {name: torch.zeros(1, dtype=dtype) for name, dtype in zip("zqam", STORED_DTYPES.values(), strict=False)}
    write(tmp_path, tensors, 10**9)
    assert [e.name for e in read_header(tmp_path / "model.safetensors")] == list("zqam")


def test_views_that_are_not_contiguous_are_written_as_they_look(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    tensors = {"transposed": base.T, "strided": base[:, ::2], "expanded": torch.ones(1).expand(5)}
    write(tmp_path, tensors, 10**9)
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_tensors_that_a_mixed_file_leaves_unaligned_still_load(tmp_path):
    tensors = {
        "half": random_tensor(torch.float16, 3),
        "float": random_tensor(torch.float32, 5),
        "byte": random_tensor(torch.int8, 3),
        "double": random_tensor(torch.float64, 5),
    }
    write(tmp_path, tensors, 10**9)
    loaded = load_file(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with Checkpoint(tmp_path) as checkpoint:
        for name, tensor in tensors.items():
            assert same_bytes(loaded[name], tensor)
            assert same_bytes(checkpoint.read(name), tensor)


def test_names_outside_ascii_survive(tmp_path):
    tensors = {'γ."quoted"\\': torch.ones(2), "日本": torch.zeros(3)}
    write(tmp_path, tensors, 10**9)
    assert set(load_file(tmp_path / "model.safetensors")) == set(tensors)


@pytest.mark.parametrize("tensors", [EVERY_DTYPE, {"b": torch.ones(3, 5), "a": torch.ones(7)}], ids=["all", "few"])
def test_a_file_of_safetensors_own_is_rewritten_to_the_byte(tensors, tmp_path):
    path = save(tmp_path / "model", tensors)
    (tmp_path / "again").mkdir()
    with Checkpoint(path) as checkpoint:
        specs = [TensorSpec(e.name, e.dtype, e.shape) for e in checkpoint.tensors.values()]
        with ShardedWriter(tmp_path / "again", specs, 10**9) as writer:
            for name in checkpoint.tensors:
                writer.write(name, checkpoint.read(name))
    again = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert again == (path / "model.safetensors").read_bytes()


def test_a_tensor_that_never_came_is_an_error(tmp_path):
    with (
        pytest.raises(OutputError, match=r"never written: b"),
        ShardedWriter(tmp_path, specs_of({"a": torch.ones(1), "b": torch.ones(1)}), 10**9) as writer,
    ):
        writer.write("a", torch.ones(1))


@pytest.mark.parametrize(
    "tensor", [torch.ones(3, 2), torch.ones(6), torch.ones(2, 3).half()], ids=["transposed", "flat", "half"]
)
def test_a_tensor_that_is_not_as_announced_is_an_error_with_both(tensor, tmp_path):
    with (
        pytest.raises(OutputError, match=r"^a came as .*, announced as \[2, 3\] torch.float32"),
        ShardedWriter(tmp_path, specs_of({"a": torch.ones(2, 3)}), 10**9) as writer,
    ):
        writer.write("a", tensor)


def test_a_tensor_that_was_not_announced_is_an_error(tmp_path):
    with (
        pytest.raises(OutputError, match="b"),
        ShardedWriter(tmp_path, specs_of({"a": torch.ones(1)}), 10**9) as writer,
    ):
        writer.write("b", torch.ones(1))


def test_an_exception_in_the_block_is_not_hidden_by_tensors_that_never_came(tmp_path):
    with (
        pytest.raises(ZeroDivisionError),
        ShardedWriter(tmp_path, specs_of({"a": torch.ones(1)}), 10**9),
    ):
        raise ZeroDivisionError


@pytest.mark.parametrize("most", [1, 7, 100])
def test_short_writes_are_completed(most, tmp_path, monkeypatch):
    original = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: original(fd, bytes(data)[:most], offset))
    tensors = {"a": random_tensor(torch.float32, 9, 3), "b": random_tensor(torch.int64, 4)}
    write(tmp_path, tensors, 10**9)
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(same_bytes(loaded[name], tensor) for name, tensor in tensors.items())


def test_the_room_of_every_shard_is_taken_before_the_first_tensor(tmp_path):
    tensors = {"a": torch.ones(1000), "b": torch.ones(2000)}
    with ShardedWriter(tmp_path, specs_of(tensors), 4000) as writer:
        sizes = [file.stat().st_blocks * 512 for file in sorted(tmp_path.glob("*.safetensors"))]
        assert [size >= wanted for size, wanted in zip(sizes, (4000, 8000), strict=True)] == [True, True]
        for name, tensor in tensors.items():
            writer.write(name, tensor)


# The output directory.


def test_a_directory_appears_only_when_it_is_whole(tmp_path):
    output = tmp_path / "out"
    with atomic_directory(output, overwrite=False) as directory:
        (directory / "file").write_text("x")
        assert not output.exists()
        assert directory.parent == output.parent, "a sibling: a rename within one file system"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (output / "file").read_text() == "x"
    assert output.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, OSError(28, "full"), OSError(5, "io")])
def test_nothing_remains_after_an_exception(error, tmp_path):
    with pytest.raises(BaseException), atomic_directory(tmp_path / "out", overwrite=False) as directory:  # noqa: B017
        (directory / "file").write_text("x")
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [28, 122, 27], ids=["ENOSPC", "EDQUOT", "EFBIG"])
def test_a_full_disk_is_an_output_error_that_says_so(number, tmp_path):
    with pytest.raises(OutputError, match=r"make room"), atomic_directory(tmp_path / "out", overwrite=False):
        raise OSError(number, os.strerror(number))


def test_other_errors_pass_unchanged(tmp_path):
    with pytest.raises(PermissionError), atomic_directory(tmp_path / "out", overwrite=False):
        raise PermissionError(13, "Permission denied")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """An output of an earlier run."""
    path = tmp_path / "out"
    path.mkdir()
    (path / "config.json").write_text("old")
    (path / "streamprune.json").write_text("{}")
    return path


def test_an_existing_output_is_refused_before_the_block(old):
    with pytest.raises(OutputError, match="exists"), atomic_directory(old, overwrite=False):
        pytest.fail("the block ran")
    assert (old / "config.json").read_text() == "old"


def test_overwriting_replaces_the_old_directory_as_a_whole(old, tmp_path):
    with atomic_directory(old, overwrite=True) as directory:
        (directory / "file").write_text("new")
        assert (old / "config.json").read_text() == "old", "the old one stays until the new one is whole"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in old.iterdir()] == ["file"]


def test_what_a_killed_run_left_goes_and_what_another_run_writes_stays(tmp_path):
    dead, other = tmp_path / ".out.partial-0123abcd", tmp_path / ".out2.partial-0123abcd"
    for directory in (dead, other):
        directory.mkdir()
        (directory / "file").write_text("half")
    with atomic_directory(tmp_path / "out", overwrite=False) as living:
        assert not dead.exists() and other.exists()
        with pytest.raises(ZeroDivisionError), atomic_directory(tmp_path / "out", overwrite=False):
            assert living.exists()
            raise ZeroDivisionError
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "out"]


def test_a_run_that_begins_at_the_same_moment_is_not_taken_for_a_dead_one(tmp_path, monkeypatch):
    original = Path.mkdir

    def mkdir(self, *arguments, **options):
        original(self, *arguments, **options)
        if self.parent == tmp_path:  # made and not yet locked: now the other one looks for the dead
            monkeypatch.setattr(Path, "mkdir", original)
            with pytest.raises(ZeroDivisionError), atomic_directory(tmp_path / "out", overwrite=False):
                raise ZeroDivisionError

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with atomic_directory(tmp_path / "out", overwrite=False) as directory:
        (directory / "file").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_run_had_replaced_goes_where_the_new_one_has_its_name(old, tmp_path):
    replaced = tmp_path / ".out.replaced-0123abcd"
    replaced.mkdir()
    with atomic_directory(old, overwrite=True):
        assert not replaced.exists()
    old.rename(tmp_path / "elsewhere")
    replaced.mkdir()  # and where there is none, it is all that is left
    with atomic_directory(tmp_path / "out", overwrite=False):
        assert replaced.exists()


@pytest.mark.parametrize("name", ["x" * 240, "file/x"])
def test_a_file_that_cannot_be_written_is_named(name, tmp_path):
    (tmp_path / "file").write_text("a file")
    with pytest.raises(OutputError, match="choose another place"):
        write_whole(tmp_path / name, b"content")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError(28, "full")])
def test_overwriting_keeps_the_old_directory_if_the_block_fails(error, old, tmp_path):
    with pytest.raises(BaseException), atomic_directory(old, overwrite=True):  # noqa: B017
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (old / "config.json").read_text() == "old"


def test_overwriting_puts_the_old_directory_back_if_the_new_one_cannot_take_its_name(old, tmp_path, monkeypatch):
    original = Path.rename

    def rename(self, target):
        if self.name.startswith(".out.partial-"):
            raise OSError(28, "No space left on device")
        return original(self, target)

    with pytest.raises(OutputError), atomic_directory(old, overwrite=True):
        monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (old / "config.json").read_text() == "old"


def test_overwriting_a_link_leaves_what_it_points_to(old, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(old)
    with atomic_directory(link, overwrite=True) as directory:
        (directory / "file").write_text("new")
    assert (old / "config.json").read_text() == "old"
    assert (link / "file").read_text() == "new"


@pytest.mark.parametrize("after", [1, 2])
def test_an_interrupt_at_any_step_of_replacing_loses_neither_directory(after, old, monkeypatch):
    """Ctrl-C right after the first or the second rename: one of the two has the name, whole."""
    rename, calls = Path.rename, []

    def interrupted(self, target):
        result = rename(self, target)
        calls.append(target)
        if len(calls) == after:
            raise KeyboardInterrupt
        return result

    with pytest.raises(KeyboardInterrupt), atomic_directory(old, overwrite=True) as directory:
        monkeypatch.setattr(Path, "rename", interrupted)
        (directory / "config.json").write_text("new")
    assert (old / "config.json").read_text() == ("old" if after == 1 else "new")


def test_more_shards_than_open_files_are_written(tmp_path):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir()))
    tensors = {f"t{index}": torch.full((4,), float(index)) for index in range(50)}
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, hard))
    try:
        write(tmp_path, tensors, 16)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(list(tmp_path.glob("model-*.safetensors"))) == 50


def test_a_dangling_link_is_refused_before_the_work(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError), atomic_directory(link, overwrite=True):
        pytest.fail("the block ran")


def test_a_directory_that_someone_made_meanwhile_is_not_replaced(tmp_path):
    output = tmp_path / "out"
    with pytest.raises((OutputError, OSError)), atomic_directory(output, overwrite=False) as directory:
        (directory / "file").write_text("mine")
        output.mkdir()
        (output / "file").write_text("theirs")
    assert (output / "file").read_text() == "theirs"


def test_a_disk_that_is_too_small_is_refused(tmp_path):
    check_space(tmp_path / "not" / "yet" / "there", needs=1)
    with pytest.raises(OutputError, match="bytes free"):
        check_space(tmp_path, needs=10**18)
    assert list(tmp_path.iterdir()) == []
