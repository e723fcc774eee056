"""Both readers give the bytes of the file, whatever the extent, the threads and the moods of the disk."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from stored_tensors import EVERY_DTYPE, same_bytes, save
from tiny_models import need_direct

from streamprune.errors import CheckpointError
from streamprune.storage.checkpoint import Checkpoint
from streamprune.storage.reader import BOUNCE_BYTES, DISK_BLOCK, PASSING, PAUSES, Reader, ReaderKind

SIZE = BOUNCE_BYTES + 5001  # no multiple of any block
SMALL = 20_003


@pytest.fixture(params=["buffered", "direct"])
def kind(request, tmp_path) -> ReaderKind:
    if request.param == "direct":
        need_direct(tmp_path)
    return request.param


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A file that is larger than the bounce buffer."""
    path = tmp_path_factory.mktemp("readers") / "large"
    path.write_bytes(random.Random(0).randbytes(SIZE))
    return path


@pytest.fixture
def small(tmp_path) -> Path:
    path = tmp_path / "small"
    path.write_bytes(random.Random(1).randbytes(SMALL))
    return path


def read(reader: Reader, offset: int, nbytes: int, file: int = 0, *, as_in_file: bool = False) -> bytes:
    """What the reader gives, and nothing beside it, in memory that starts in a page as its bytes in a block, or not."""
    memory = mmap.mmap(-1, nbytes + 3 * DISK_BLOCK)
    memory[:] = b"\xa5" * len(memory)
    start = DISK_BLOCK + offset % DISK_BLOCK + (0 if as_in_file else 9)
    reader.read_into(file, offset, memoryview(memory)[start : start + nbytes])
    beside = memory[:start] + memory[start + nbytes :]
    assert beside == b"\xa5" * len(beside)
    return memory[start : start + nbytes]


def extents(size: int, count: int, seed: int = 0) -> list[tuple[int, int]]:
    """Random (offset, length) of a file, most of them short."""
    generator = random.Random(seed)
    offsets = [generator.randrange(size) for _ in range(count)]
    return [(offset, min(size - offset, int(2 ** generator.uniform(0, 20)))) for offset in offsets]


class Disk:
    """`os.preadv` with a mind of its own, and the pauses that were made meanwhile.

    Args:
        answers: to the first calls: an error number, None for no bytes, 0 for what is there. All others are 0.
        most: bytes that a call gives at most.
    """

    def __init__(self, *answers: int | None, most: int = SIZE) -> None:
        self.answers, self.most = list(answers), most
        self.calls, self.pauses = 0, list[float]()

    def preadv(self, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        self.calls += 1
        answer = self.answers.pop(0) if self.answers else 0
        if answer:
            raise OSError(answer, os.strerror(answer))
        count = 0 if answer is None else min(os.preadv(descriptor, buffers, offset), self.most)
        known = count
        for buffer in buffers:
            buffer[known:] = b"?" * (len(buffer) - known)
            known = max(0, known - len(buffer))
        return count

    def reader(self, file: Path, kind: ReaderKind) -> Reader:
        return Reader([file], kind, preadv=self.preadv, sleep=self.pauses.append)


@pytest.mark.parametrize("as_in_file", [False, True])
def test_every_extent_holds_the_bytes_of_a_plain_read(as_in_file, kind, large):
    expected = large.read_bytes()
    fixed = [
        (0, 0),
        (SIZE, 0),
        (5, 0),
        (0, 1),
        (SIZE - 1, 1),
        (DISK_BLOCK - 1, 1),
        (DISK_BLOCK, 1),
        (DISK_BLOCK, DISK_BLOCK),
    ]
    fixed += [
        (DISK_BLOCK - 1, 2),
        (511, 2),
        (3 * DISK_BLOCK - 7, 2 * DISK_BLOCK + 14),
        (SIZE - 600, 600),
        (SIZE - 5000, 5000),
    ]
    fixed += [
        (0, BOUNCE_BYTES),
        (1, BOUNCE_BYTES - DISK_BLOCK),
        (4095, BOUNCE_BYTES - DISK_BLOCK),
        (0, SIZE),
        (3, SIZE - 3),
    ]
    reader = Reader([large], kind)
    for offset, nbytes in [*fixed, *extents(SIZE, 100)]:
        given = read(reader, offset, nbytes, as_in_file=as_in_file)
        assert given == expected[offset : offset + nbytes], (offset, nbytes)
    reader.close()


def test_whole_blocks_go_straight_to_their_place_in_one_read(large):
    need_direct(large.parent)
    sizes = list[list[int]]()

    def preadv(descriptor, buffers, offset):
        sizes.append([len(buffer) for buffer in buffers])
        return os.preadv(descriptor, buffers, offset)

    reader = Reader([large], "direct", preadv=preadv)
    for offset, nbytes, parts in [
        (0, 3 * DISK_BLOCK, [3 * DISK_BLOCK]),
        (7, 3 * DISK_BLOCK, [DISK_BLOCK, 2 * DISK_BLOCK, DISK_BLOCK]),
        (7, 3 * DISK_BLOCK - 7, [DISK_BLOCK, 2 * DISK_BLOCK]),
        (DISK_BLOCK, 2 * DISK_BLOCK + 1, [2 * DISK_BLOCK, DISK_BLOCK]),
        (DISK_BLOCK - 1, 2, [2 * DISK_BLOCK]),  # no whole block
        (0, SIZE, [SIZE // DISK_BLOCK * DISK_BLOCK, DISK_BLOCK]),
    ]:
        sizes.clear()
        read(reader, offset, nbytes, as_in_file=True)
        assert sizes == [parts]
    reader.close()


@pytest.mark.parametrize("failing", [False, True], ids=["calm", "stale-now-and-then"])
def test_eight_threads_read_at_once(failing, kind, large, small):
    """Also while one of them opens the file anew."""
    expected, stale = [large.read_bytes(), small.read_bytes()], threading.local()

    def preadv(descriptor, buffers, offset):
        stale.now = failing and not getattr(stale, "now", False)
        if stale.now:
            raise OSError(errno.ESTALE, "Stale file handle")
        return os.preadv(descriptor, buffers, offset)

    reader = Reader([large, small], kind, preadv=preadv, sleep=lambda seconds: None)
    start = threading.Barrier(8)

    def work(number: int) -> None:
        file, size = number % 2, (SIZE, SMALL)[number % 2]
        start.wait()
        for offset, nbytes in extents(size, 60, seed=number):
            given = read(reader, offset, nbytes, file, as_in_file=number < 4)
            assert given == expected[file][offset : offset + nbytes]

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    reader.close()


def resident_pages(file: Path) -> int:
    """How many pages of a file are in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    size = file.stat().st_size
    flags = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        address = np.frombuffer(mapping, np.uint8).ctypes.data
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), flags) == 0, os.strerror(
            ctypes.get_errno()
        )
    return sum(flag & 1 for flag in flags)


@pytest.fixture
def uncached(small) -> Path:
    """A file of which no page is in the page cache."""
    with small.open("rb") as stream:
        os.fsync(stream.fileno())  # a page that is not yet on the disk cannot be dropped
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident_pages(small):
        pytest.skip(f"{small.parent} keeps its files in memory; use --basetemp on a disk")
    return small


def test_a_direct_read_leaves_no_page_in_the_cache_and_a_buffered_one_does(uncached):
    need_direct(uncached.parent)
    for kind, pages in (("direct", 0), ("buffered", -(-SMALL // mmap.PAGESIZE))):
        reader = Reader([uncached], kind)
        read(reader, 0, SMALL)
        reader.close()
        assert resident_pages(uncached) == pages


def test_memory_that_refuses_direct_reads_is_copied_into(large):
    """As what a driver has mapped may, such as pinned memory."""
    need_direct(large.parent)
    expected, asked = large.read_bytes(), []

    def preadv(descriptor, buffers, offset):
        asked.append(sum(map(len, buffers)))
        if asked[-1] > BOUNCE_BYTES:
            raise OSError(errno.EFAULT, "Bad address")
        return os.preadv(descriptor, buffers, offset)

    reader = Reader([large], "direct", preadv=preadv)
    for _ in range(2):
        assert read(reader, 0, SIZE, as_in_file=True) == expected
    assert [nbytes > BOUNCE_BYTES for nbytes in asked] == [True, False, False, False, False]
    broken = Disk(errno.EFAULT, errno.EFAULT).reader(large, "direct")
    with pytest.raises(CheckpointError, match="cannot be read: Bad address"):
        read(broken, 0, 9000, as_in_file=True)


@pytest.mark.parametrize("refuses", [0, errno.EINVAL, errno.EOPNOTSUPP], ids=["direct", "EINVAL", "EOPNOTSUPP"])
def test_what_is_not_to_stay_leaves_no_page_in_the_cache(refuses, uncached):
    need_direct(uncached.parent)
    asked = []

    def preadv(descriptor, buffers, offset):
        asked.append(bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT))
        if refuses and asked[-1]:
            raise OSError(refuses, os.strerror(refuses))
        return os.preadv(descriptor, buffers, offset)

    reader, memories = Reader([uncached], preadv=preadv), [memoryview(bytearray(SMALL)) for _ in range(2)]
    for memory in memories:
        reader.read_into(0, 0, memory, stays=False)
        assert resident_pages(uncached) == 0
    assert [bytes(memory) for memory in memories] == [uncached.read_bytes()] * 2
    assert asked == ([True, False, False] if refuses else [True, True])
    reader.close()


def test_where_direct_reads_are_refused_no_other_pages_are_dropped(uncached):
    reader, memory = Reader([uncached]), memoryview(bytearray(SMALL))
    reader._refused = True
    reader.read_into(0, 0, memory)
    reader.read_into(0, 0, memory[:0], stays=False)
    assert resident_pages(uncached) == -(-SMALL // mmap.PAGESIZE)
    reader.read_into(0, 0, memory, stays=False)
    assert resident_pages(uncached) == 0
    reader.close()


@pytest.mark.parametrize("number", sorted(PASSING), ids=errno.errorcode.get)
def test_an_error_that_passes_is_waited_for(number, kind, small):
    disk = Disk(number, number, number)
    assert read(disk.reader(small, kind), 4001, 9000) == small.read_bytes()[4001:13001]
    assert disk.pauses == list(PAUSES[:3])


def test_no_bytes_before_the_end_are_waited_for(kind, small):
    disk = Disk(None, errno.EIO, None)
    assert read(disk.reader(small, kind), SMALL - 7, 7) == small.read_bytes()[-7:]
    assert disk.pauses == list(PAUSES[:3])


def test_every_byte_has_tries_of_its_own(small):
    disk = Disk(*[errno.EIO, errno.EIO, errno.EIO, errno.EIO, 0] * 7, most=3000)
    assert read(disk.reader(small, "buffered"), 0, SMALL) == small.read_bytes()
    assert disk.pauses == list(PAUSES) * 7


@pytest.mark.parametrize("number", [errno.EIO, None], ids=["EIO", "no-bytes"])
def test_an_error_that_stays_names_the_file_the_byte_the_tries_and_the_reason(number, kind, small):
    disk = Disk(*[number] * 99)
    reason = "Input/output error" if number else "no bytes came"
    expected = rf"{small}: byte 4001 could not be read in 5 tries \({reason}\); check the disk or its network"
    with pytest.raises(CheckpointError, match=expected):
        read(disk.reader(small, kind), 4001, 9000)
    assert disk.pauses == list(PAUSES)
    assert disk.calls == 5


def test_the_byte_that_is_named_is_the_first_that_is_missing(small):
    disk = Disk(0, 0, *[errno.EIO] * 99, most=3000)
    with pytest.raises(CheckpointError, match="byte 6100 could not be read in 5 tries"):
        read(disk.reader(small, "buffered"), 100, 9000)


def test_a_stale_handle_is_replaced(kind, small):
    """A handle goes stale when the server replaces the file: only opening it anew helps."""
    stale = set[int]()

    def preadv(descriptor, buffers, offset):
        if os.fstat(descriptor).st_ino in stale:
            raise OSError(errno.ESTALE, "Stale file handle")
        assert not os.get_inheritable(descriptor)
        return os.preadv(descriptor, buffers, offset)

    reader = Reader([small], kind, preadv=preadv, sleep=lambda seconds: None)
    for _ in range(2):
        assert read(reader, 1, 9000) == small.read_bytes()[1:9001]
        stale.add(small.stat().st_ino)
        shutil.copy(small, small.with_suffix(".new"))
        os.replace(small.with_suffix(".new"), small)
    reader.close()


@pytest.mark.parametrize("as_in_file", [False, True])
@pytest.mark.parametrize("most", range(1, 8))
def test_short_reads_go_on_where_they_stopped(most, as_in_file, kind, small):
    disk = Disk(most=most if kind == "buffered" else DISK_BLOCK + most)
    assert read(disk.reader(small, kind), 4001, 9000, as_in_file=as_in_file) == small.read_bytes()[4001:13001]
    assert disk.calls == (-(-9000 // most) if kind == "buffered" else 4)
    assert disk.pauses == []


@pytest.mark.parametrize("as_in_file", [False, True])
@pytest.mark.parametrize(
    "size", [0, 17, DISK_BLOCK, 2 * DISK_BLOCK, 2 * DISK_BLOCK + 512, 2 * DISK_BLOCK + 513, SMALL - 1]
)
def test_a_file_that_ends_too_early_is_refused_at_once(size, as_in_file, kind, small):
    os.truncate(small, size)
    disk = Disk()
    missing = SMALL - size
    with pytest.raises(CheckpointError, match=rf"{small} ended at byte {size}, {missing} bytes too early; download"):
        read(disk.reader(small, kind), 4001, SMALL - 4001, as_in_file=as_in_file)
    assert disk.pauses == []
    assert disk.calls <= 2


@pytest.mark.parametrize("number", [errno.EACCES, errno.EBADF, errno.ENOMEM], ids=errno.errorcode.get)
def test_other_errors_are_raised_at_once(number, kind, small):
    disk = Disk(number)
    with pytest.raises(CheckpointError, match=rf"{small}: cannot be read: {os.strerror(number)}"):
        read(disk.reader(small, kind), 0, 5)
    assert (disk.calls, disk.pauses) == (1, [])


def test_a_file_that_is_gone_is_an_error_that_names_it(kind, tmp_path):
    with pytest.raises(CheckpointError, match=rf"{tmp_path / 'gone'}: cannot be read: No such file"):
        read(Reader([tmp_path / "gone"], kind), 0, 5)


def test_a_filesystem_without_direct_reads_is_refused_with_the_other_reader(small):
    remedy = "O_DIRECT: Invalid argument.; use --reader buffered"
    with pytest.raises(CheckpointError, match=rf"{small}: .*{remedy}"):
        read(Disk(errno.EINVAL).reader(small, "direct"), 0, 5)
    with pytest.raises(CheckpointError, match=rf"/proc/version: .*{remedy}"):
        read(Reader([Path("/proc/version")], "direct"), 0, 5)


def test_no_descriptor_outlives_close(kind, small, large):
    before = len(os.listdir("/proc/self/fd"))
    disk = Disk(errno.EIO, errno.ESTALE, None)
    reader = Reader([small, large], kind, preadv=disk.preadv, sleep=disk.pauses.append)
    for _ in range(2):
        for file in (0, 1):
            read(reader, 0, 5, file)
        assert len(os.listdir("/proc/self/fd")) == before + 2
        reader.close()
        assert len(os.listdir("/proc/self/fd")) == before


def test_direct_reads_need_one_buffer_for_all_shards_and_close_frees_it(large):
    need_direct(large.parent)
    reader = Reader([large] * 8, "direct")
    for file in range(8):
        read(reader, 0, SIZE, file)
    assert [len(bounce) for bounce in reader._bounces] == [BOUNCE_BYTES]
    reader.close()
    assert not reader._bounces


def test_a_checkpoint_reads_with_either_and_counts_what_was_asked_for(kind, tmp_path):
    path = save(tmp_path / "model", EVERY_DTYPE)
    with Checkpoint(path, kind) as checkpoint:
        for name, tensor in load_file(path / "model.safetensors").items():
            before = checkpoint.bytes_read
            assert same_bytes(checkpoint.read(name), tensor)
            assert checkpoint.bytes_read - before == tensor.nbytes
        assert checkpoint.bytes_read == checkpoint.nbytes
        os.truncate(path / "model.safetensors", 0)
        with pytest.raises(CheckpointError, match="ended at byte 0"):
            checkpoint.read(max(checkpoint.tensors, key=lambda name: checkpoint.tensors[name].nbytes))
        assert checkpoint.bytes_read == checkpoint.nbytes
