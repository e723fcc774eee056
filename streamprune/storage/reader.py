"""Reads of shards into memory: through the page cache or around it, and on disks that fail for a moment.

Network disks answer a read with an error now and then, and the same read works a second later: such reads are tried
again before a run that took hours is given up.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from streamprune.errors import CheckpointError

ReaderKind = Literal["buffered", "direct"]
T = TypeVar("T")

PASSING = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ECONNRESET})
PAUSES = (0.1, 0.4, 1.6, 6.4)  # seconds before each further try

# What a filesystem without O_DIRECT answers, and one whose blocks are larger than 4096 bytes: offset, length and
# address must be multiples of them.
REFUSALS = frozenset({errno.EINVAL, errno.EOPNOTSUPP})
DISK_BLOCK = 4096
BOUNCE_BYTES = (1 << 20) + DISK_BLOCK  # 1 MiB from any offset


class Reader:
    """Reader of shards, each opened when it is first read. Several threads may use it; close it when done.

    Args:
        files: the shards.
        kind: "buffered" reads through the page cache, but around it what is not to stay there, on filesystems that can;
            "direct" (O_DIRECT) reads everything around it.
        preadv: takes the place of `os.preadv` (tests).
        sleep: takes the place of `time.sleep` (tests).
    """

    def __init__(
        self,
        files: Sequence[Path],
        kind: ReaderKind = "buffered",
        *,
        preadv: Callable[[int, list[memoryview], int], int] | None = None,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.files = files
        self._kind = kind
        self._refused = False  # by a filesystem without O_DIRECT
        self._straight = True  # until memory refuses, as that which a driver has mapped may
        self._preadv = preadv or os.preadv
        self._sleep = sleep
        self._descriptors: dict[tuple[int, bool], int] = {}  # by file, and whether around the page cache
        # Shared by all shards, so that there are as many as there are threads that read at the same time.
        self._bounces: list[memoryview] = []
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the files and free the memory; both come back with the next read."""
        with self._lock:
            self._bounces.clear()
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def read_into(self, file: int, offset: int, buffer: memoryview, *, stays: bool = True) -> None:
        """Fill `buffer` with the bytes at `offset` of `files[file]`; not `stays`: leave no page of them in the cache.

        Raises:
            CheckpointError: the file ended first, could not be read, or not in this way.
        """
        path, size, done, failures = self.files[file], len(buffer), 0, 0
        while done < size:
            direct, straight = self._kind == "direct" or not (stays or self._refused), self._straight
            try:
                descriptor = self._descriptor(file, direct, reopen=failures > 0)
                read = self._read_blocks if direct else self._read
                count, reason = read(descriptor, offset + done, buffer[done:]), "no bytes came"
                if count == 0 and (end := os.fstat(descriptor).st_size) < offset + size:
                    raise CheckpointError(
                        f"{path} ended at byte {end}, {offset + size - end} bytes too early; download it again"
                    )
            except OSError as error:
                if direct and straight and error.errno == errno.EFAULT:
                    self._straight = False  # by way of a bounce buffer from now on
                    continue
                if direct and error.errno in REFUSALS:
                    if self._kind == "buffered":
                        self._refused = True
                        continue
                    raise CheckpointError(
                        f"{path}: its filesystem refuses reads around the page cache (O_DIRECT: {error.strerror}); "
                        "use --reader buffered"
                    ) from error
                if error.errno not in PASSING:
                    raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
                count, reason = 0, str(error.strerror)
            done += count
            failures = 0 if count else failures + 1
            if failures > len(PAUSES):
                raise CheckpointError(
                    f"{path}: byte {offset + done} could not be read in {failures} tries ({reason}); "
                    "check the disk or its network connection, then run again"
                )
            if failures:
                self._sleep(PAUSES[failures - 1])
        if self._kind == "buffered" and not stays and size:  # 0 bytes would mean all up to the end of the file
            # Also after a direct read, which some filesystems accept and then make through the page cache.
            os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_DONTNEED)

    def _descriptor(self, file: int, direct: bool, *, reopen: bool = False) -> int:
        with self._lock:
            known = self._descriptors.get((file, direct))
            if known is not None and not reopen:
                return known
            fresh = os.open(self.files[file], os.O_RDONLY | (os.O_DIRECT if direct else 0))
            if known is None:
                self._descriptors[file, direct] = fresh
                return fresh
            # A stale handle never heals, so the file is opened anew. The number stays as it is: other threads are
            # reading from it, and once closed it could be given to another file.
            os.dup2(fresh, known, inheritable=False)
            os.close(fresh)
            return known

    def _read(self, descriptor: int, offset: int, buffer: memoryview) -> int:
        """Fill the first bytes of `buffer`, as many as one read through the page cache gives; return their number."""
        return self._preadv(descriptor, [buffer], offset)

    def _read_blocks(self, descriptor: int, offset: int, buffer: memoryview) -> int:
        """Fill the first bytes of `buffer` around the page cache; return their number."""
        # Offset, length and address must be multiples of the block. Whole blocks go straight to their place where the
        # buffer lies in memory as in the file; what is left, or else everything, comes by way of a bounce buffer, as
        # much as it holds. Only the end of a file may lie inside a block: there the read is short.
        head, size, target = offset % DISK_BLOCK, len(buffer), np.asarray(buffer)
        start, stop = -offset % DISK_BLOCK, size - (offset + size) % DISK_BLOCK
        if not self._straight or start >= stop or target.ctypes.data % DISK_BLOCK != head:
            start = stop = size
        with self._lock:
            bounce = self._bounces.pop() if self._bounces else _bounce()
        try:
            before = bounce[: _whole_blocks(head + start)]
            after = bounce[len(before) :][: _whole_blocks(size - stop)]
            parts = [part for part in (before, buffer[start:stop], after) if part]
            count = max(0, min(self._preadv(descriptor, parts, offset - head) - head, size))
            # Through numpy, which lets other threads run meanwhile; an assignment of memoryviews does not.
            first, last = min(start, count), max(0, count - stop)
            np.copyto(target[:first], np.asarray(before)[head : head + first])
            np.copyto(target[stop : stop + last], np.asarray(after)[:last])
        finally:
            with self._lock:
                self._bounces.append(bounce)
        return count


def retried(read: Callable[[], T], sleep: Callable[[float], object] = time.sleep) -> T:
    """Call `read`, again where the disk fails for a moment, and return its result: for headers and other small files.

    Raises:
        OSError: the last one, or one that does not pass.
    """
    for pause in PAUSES:
        try:
            return read()
        except OSError as error:
            if error.errno not in PASSING:
                raise
        sleep(pause)
    return read()


def _whole_blocks(nbytes: int) -> int:
    return -(-nbytes // DISK_BLOCK) * DISK_BLOCK


def _bounce() -> memoryview:
    """Make a bounce buffer: memory that starts at a page, and so at a block."""
    return memoryview(mmap.mmap(-1, BOUNCE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
