"""Files without a name on a scratch disk, which go with the process."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor

from streamprune.errors import OutputError
from streamprune.storage.checkpoint import byte_view
from streamprune.storage.reader import DISK_BLOCK, REFUSALS

WRITE_REMEDY, READ_REMEDY = "free some space or choose another", "run again, or choose another"


class BlockFile:
    """File on a scratch disk that is read and written in blocks, around the page cache where that can be.

    It can where offset, length and address are multiples of DISK_BLOCK. Several threads may use it; close it when done.

    Args:
        directory: on the disk. nbytes: of the file, taken at once: what is full is full before the work.

    Raises:
        OutputError: the disk is full, or fails; reading and writing too.
    """

    def __init__(self, directory: Path, nbytes: int) -> None:
        self._directory, self._descriptor = directory, scratch_file(directory)
        self._direct: int | None = None
        with suppress(OSError):  # a filesystem without O_DIRECT
            self._direct = os.open(f"/proc/self/fd/{self._descriptor}", os.O_RDWR | os.O_DIRECT)
        try:
            os.posix_fallocate(self._descriptor, 0, max(1, nbytes))
        except OSError as error:
            self.close()
            raise OutputError(
                f"--scratch {directory}: {error.strerror}; {nbytes:,} bytes of state go there, choose another"
            ) from error

    def close(self) -> None:
        """Let go of the file."""
        for descriptor in (self._descriptor, self._direct):
            if descriptor is not None:
                os.close(descriptor)

    def read(self, tensor: Tensor, offset: int) -> None:
        """Fill a contiguous tensor in host memory with the bytes at `offset`."""
        with _told(self._directory, READ_REMEDY):
            self._move(_read, tensor, offset)

    def write(self, tensor: Tensor, offset: int) -> None:
        """Write a contiguous tensor in host memory to the bytes at `offset`."""
        with _told(self._directory, WRITE_REMEDY):
            self._move(_write, tensor, offset)

    def _move(self, move: Callable[[int, Tensor, int], None], tensor: Tensor, offset: int) -> None:
        direct = self._direct
        if direct is not None and not any(each % DISK_BLOCK for each in (offset, tensor.nbytes, tensor.data_ptr())):
            try:
                return move(direct, tensor, offset)
            except OSError as error:
                # EFAULT: from memory that a driver has mapped.
                if error.errno not in REFUSALS | {errno.EFAULT}:
                    raise
        move(self._descriptor, tensor, offset)


def scratch_file(directory: Path | None) -> int:
    """Make a file without a name in `directory`, and return its descriptor.

    Raises:
        OutputError: it cannot be made.
    """
    assert directory is not None, "the planner places nothing on scratch where there is none"
    with _told(directory, "choose another"):
        directory.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix="streamprune-", dir=directory)
        os.unlink(name)  # so that nothing is left behind, however the process ends
    return descriptor


def write_at(descriptor: int, tensor: Tensor, offset: int, scratch: Path | None) -> None:
    """Write a tensor in host memory to a file on `scratch`, at `offset` bytes.

    Raises:
        OutputError: the disk is full, or fails.
    """
    with _told(scratch, WRITE_REMEDY):
        _write(descriptor, tensor, offset)


def read_at(descriptor: int, tensor: Tensor, offset: int, scratch: Path | None) -> None:
    """Fill a tensor in host memory from a file on `scratch`, at `offset` bytes.

    Raises:
        OutputError: the file is shorter than it was, or the disk fails.
    """
    with _told(scratch, READ_REMEDY):
        _read(descriptor, tensor, offset)


def _write(descriptor: int, tensor: Tensor, offset: int) -> None:
    view, done = byte_view(tensor), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)


def _read(descriptor: int, tensor: Tensor, offset: int) -> None:
    view, done = byte_view(tensor), 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise EOFError
        done += count


@contextmanager
def _told(scratch: Path | None, remedy: str) -> Iterator[None]:
    """Turn errors of the disk inside the block into an OutputError that names its directory."""
    try:
        yield
    except EOFError:
        raise OutputError(f"--scratch {scratch}: its file was cut off; run again") from None
    except OSError as error:
        raise OutputError(f"--scratch {scratch}: {error.strerror}; {remedy}") from error
