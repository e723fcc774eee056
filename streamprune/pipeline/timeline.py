"""Record of a run over time, for streamprune.json: its stages, and a few dozen samples of memory and traffic."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

SAMPLES_KEPT = 64  # samples: with more, every second one goes, and half as many are taken from then on
FIRST_SECONDS = 0.05  # between the first samples
_STAGE = ("total_bytes", "bytes_read", "waiting_share", "elapsed_seconds")


class Timeline:
    """Recorder of one run, which begins at `start` seconds of the clock that all times are given by."""

    def __init__(self, start: float) -> None:
        self._start, self._interval, self._next = start, FIRST_SECONDS, start
        self._read = 0
        self._stages: list[dict[str, Any]] = []
        self._samples: list[dict[str, float]] = []

    def add(self, now: float, nbytes: int) -> None:
        """Count `nbytes` of layers as read, and take a sample if one is due."""
        self._read += nbytes
        if now >= self._next:
            self._sample(now)

    def end_stage(self, now: float, figures: Mapping[str, Any], predicted: float | None) -> None:
        """Keep the closing figures of a stage, and take a sample at its end."""
        began = now - figures["elapsed_seconds"] - self._start
        kept = {name: figures[name] for name in _STAGE}
        self._stages.append({"name": figures["stage"], "start": began, **kept, "predicted_seconds": predicted})
        self._sample(now)

    def facts(self) -> dict[str, Any]:
        """Return the stages, and the samples as columns: seconds since the start, and bytes.

        "bytes_read" is what was read of layers so far, on a GPU what went over the link for them; "disk" what came
        from a disk and no page cache, where the system says that; "rss" and "gpu" are what is held at that moment.
        """
        names = self._samples[0] if self._samples else ()
        samples = {name: [each.get(name) for each in self._samples] for name in names}
        return {"stages": self._stages, "timeline": samples}

    def _sample(self, now: float) -> None:
        from streamprune.paging.device import held  # torch: until there is a stage, nothing needs it

        seconds = round(now - self._start, 3)
        self._samples.append({"seconds": seconds, "bytes_read": self._read, **_from_disk(), **held()})
        if len(self._samples) > SAMPLES_KEPT:
            del self._samples[1::2]  # the first one and the last one stay
            self._interval *= 2
        self._next = now + self._interval


def _from_disk() -> dict[str, int]:
    """Return the bytes that the process has had from disks; nothing where the system does not count them."""
    try:
        counted = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    except OSError:
        return {}
    return {"disk": int(counted["read_bytes"])} if "read_bytes" in counted else {}
