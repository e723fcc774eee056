"""Files without a name on a scratch disk, which go with the process."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from torch import Tensor

from streamprune.errors import OutputError
from streamprune.storage.checkpoint import byte_view


def scratch_file(directory: Path | None) -> int:
    """Make a file without a name in `directory`, and return its descriptor.

    Raises:
        OutputError: it cannot be made.
    """
    assert directory is not None, "the planner places nothing on scratch where there is none"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix="streamprune-", dir=directory)
        os.unlink(name)  # so that nothing is left behind, however the process ends
    except OSError as error:
        raise OutputError(f"--scratch {directory}: {error.strerror}; choose another") from error
    return descriptor


def write_at(descriptor: int, tensor: Tensor, offset: int, scratch: Path | None) -> None:
    """Write a tensor in host memory to a file on `scratch`, at `offset` bytes.

    Raises:
        OutputError: the disk is full, or fails.
    """
    view, done = byte_view(tensor), 0
    try:
        while done < len(view):
            done += os.pwrite(descriptor, view[done:], offset + done)
    except OSError as error:
        raise OutputError(f"--scratch {scratch}: {error.strerror}; free some space or choose another") from error


def read_at(descriptor: int, tensor: Tensor, offset: int, scratch: Path | None) -> None:
    """Fill a tensor in host memory from a file on `scratch`, at `offset` bytes.

    Raises:
        OutputError: the file is shorter than it was, or the disk fails.
    """
    view, done = byte_view(tensor), 0
    try:
        while done < len(view):
            count = os.preadv(descriptor, [view[done:]], offset + done)
            if count == 0:
                raise OutputError(f"--scratch {scratch}: its file was cut off; run again")
            done += count
    except OSError as error:
        raise OutputError(f"--scratch {scratch}: {error.strerror}; run again, or choose another") from error
