"""What methods keep between sweeps comes back as it was, or as near as a narrower dtype has it."""

import errno
import os

import pytest
import torch

from streamprune import PruneConfig
from streamprune.errors import OutputError, UsageError
from streamprune.paging.device import HostDevice
from streamprune.storage.journal import Journal
from streamprune.storage.reader import DISK_BLOCK
from streamprune.storage.scratch import BlockFile
from streamprune.storage.tensor_store import Memory, Narrow, make_store


@pytest.mark.parametrize("kind", ["memory", "journal"])
def test_a_store_is_a_mapping(kind, tmp_path):
    journal = Journal(tmp_path, {}) if kind == "journal" else None
    store, expected = make_store("delta", journal=journal), {}
    generator = torch.Generator().manual_seed(0)
    for step in range(200):
        key = (int(torch.randint(0, 5, (), generator=generator)), "abc"[step % 3])
        if key in expected and step % 4 == 0:
            assert torch.equal(store.pop(key), expected.pop(key))
        else:
            size = 1 + int(torch.randint(0, 3, (), generator=generator))
            expected[key] = torch.randn((size, 4), generator=generator, dtype=torch.float64)
            store[key] = expected[key].T if step % 2 else expected[key]
            expected[key] = expected[key].T.contiguous() if step % 2 else expected[key]
        assert sorted(store) == sorted(expected) and len(store) == len(expected)
        assert all(torch.equal(store[key], value) for key, value in expected.items())
    with pytest.raises(KeyError):
        store[9, "none"]


def test_memory_uses_its_room_again():
    store = Memory()
    store[0, "a"] = torch.zeros(100)
    place = store.pop((0, "a")).data_ptr()
    store[0, "a"] = torch.ones(100)
    assert store[0, "a"].data_ptr() == place


BLOCKS = 5


def whole_blocks(count, value):
    memory = HostDevice().buffer(count * DISK_BLOCK)
    return memory.fill_(value)


@pytest.fixture(params=["direct", "refused when opened", "refused when read", "misplaced in memory"])
def block_file(request, tmp_path, monkeypatch):
    """A file of blocks, and its directory: around the page cache, or where disk, driver or caller are against it."""
    around, opened = [], os.open

    def refuse(path, flags, *mode):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *mode)

    if request.param == "refused when opened":
        monkeypatch.setattr(os, "open", refuse)
    file = BlockFile(tmp_path, BLOCKS * DISK_BLOCK)
    for name, error in (("preadv", errno.EFAULT), ("pwrite", errno.EINVAL)):
        original = getattr(os, name)

        def moved(descriptor, *given, original=original, error=error):
            if descriptor == file._direct and request.param == "refused when read":
                raise OSError(error, "refused")
            around.append(descriptor == file._direct)
            return original(descriptor, *given)

        monkeypatch.setattr(os, name, moved)
    yield file, request.param
    file.close()
    assert all(around) if request.param == "direct" and file._direct is not None else not any(around)


def test_a_file_of_blocks_holds_what_was_written_last(block_file, tmp_path):
    file, how = block_file
    shift = 8 if how == "misplaced in memory" else 0
    for round_ in range(2):
        for number in range(BLOCKS):
            given = whole_blocks(2, number + round_)[shift : shift + DISK_BLOCK]
            file.write(given, number * DISK_BLOCK)
        for first in range(BLOCKS - 1):
            found = whole_blocks(3, 99)[shift : shift + 2 * DISK_BLOCK]
            file.read(found, first * DISK_BLOCK)
            assert found.view(2, -1).unique(dim=1).flatten().tolist() == [first + round_, first + 1 + round_]
    assert os.listdir(tmp_path) == [] and os.fstat(file._descriptor).st_size == BLOCKS * DISK_BLOCK


def test_a_file_of_blocks_goes_when_it_is_closed(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    BlockFile(tmp_path, DISK_BLOCK).close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("when", ["posix_fallocate", "pwrite", "preadv"])
def test_a_scratch_disk_that_is_full_or_fails_is_named(when, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, when, full)
    with pytest.raises(OutputError, match=f"--scratch {tmp_path}.*No space left"):
        file = BlockFile(tmp_path, DISK_BLOCK)
        try:
            file.write(whole_blocks(1, 0), 0)
            file.read(whole_blocks(1, 0), 0)
        finally:
            file.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_scratch_file_that_was_cut_off_is_an_error(tmp_path):
    file = BlockFile(tmp_path, 2 * DISK_BLOCK)
    os.ftruncate(file._descriptor, DISK_BLOCK)
    with pytest.raises(OutputError, match=f"--scratch {tmp_path}: its file was cut off"):
        file.read(whole_blocks(2, 0), 0)
    file.close()


def test_a_narrow_store_rounds_float32_and_nothing_else():
    store, value = make_store("delta", dtype="bfloat16"), torch.randn(50, 20)
    assert isinstance(store, Narrow)
    store[0, "a"], store[0, "b"] = value, torch.tensor(1.0 + 1e-12, dtype=torch.float64)
    assert store[0, "a"].dtype == torch.bfloat16 and torch.equal(store[0, "a"], value.bfloat16())
    assert float(store[0, "b"]) == 1.0 + 1e-12


def test_only_what_was_measured_is_offered(tmp_path):
    with pytest.raises(UsageError, match="--state-dtype int8: choose auto or float32 or bfloat16"):
        PruneConfig("model", tmp_path, state_dtype="int8")


def test_what_is_kept_in_memory_is_copied_and_reuses_its_place():
    memory, value = Memory(), torch.ones(5)
    memory[1, "q"] = value
    value.zero_()
    assert torch.equal(memory[1, "q"], torch.ones(5)) and len(memory) == 1
    taken = memory.pop((1, "q"))
    assert (1, "q") not in memory and not len(memory)
    taken.mul_(3)
    memory[1, "q"] = taken
    assert memory[1, "q"].data_ptr() == taken.data_ptr() and float(memory[1, "q"].sum()) == 15
    memory[2, "k"] = torch.full((3, 2), 7.0, dtype=torch.float64)
    memory[1, "q"] = torch.zeros(2, 2)
    assert memory[2, "k"].dtype == torch.float64 and float(memory[2, "k"].sum()) == 42
    assert memory[1, "q"].shape == (2, 2) and sorted(memory) == [(1, "q"), (2, "k")]
