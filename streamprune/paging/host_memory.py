"""Memory of the host that this process may have: what is free, as far as a control group lets it have that."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

MEMBERSHIP, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# Of the hierarchies' versions 1 and 2: limit and use in bytes, and what of that use is page cache, by memory.stat.
LIMIT, USED = ("memory.limit_in_bytes", "memory.max"), ("memory.usage_in_bytes", "memory.current")
CACHED = (("total_inactive_file", "total_active_file"), ("inactive_file", "active_file"))


def available_memory() -> int:
    """Return the bytes that the process may take beside what it has.

    Batch systems and containers end a job that takes more than its control group may have, however much is free on the
    machine. The group's page cache counts as used there, and is given back when memory is asked for.
    """
    return max(0, min([psutil.virtual_memory().available, *_left_in_groups()]))


def _left_in_groups() -> Iterator[int]:
    """Yield the bytes that are left in the process's group and in each that it lies in."""
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except OSError:  # not on Linux
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        version = 1 if not controllers else 0 if "memory" in controllers.split(",") else None
        if version is None:
            continue
        root = GROUPS if version else GROUPS / "memory"
        lowest = root / group.lstrip("/")
        for each in (lowest, *lowest.parents):
            if root in (each, *each.parents) and (left := _left(each, version)) is not None:
                yield left


def _left(group: Path, version: int) -> int | None:
    """Return what is left in a group; None where it has no limit, or none that can be read (as in a namespace)."""
    try:
        limit, used = (int((group / name[version]).read_text()) for name in (LIMIT, USED))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return limit - used + sum(int(stat[name]) for name in CACHED[version])
    except (OSError, ValueError, KeyError):  # "max" is no number
        return None
