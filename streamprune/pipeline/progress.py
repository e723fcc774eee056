"""Progress of a run while it works: a bar on a terminal, plain lines elsewhere, or JSON for machines."""

from __future__ import annotations

import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO

from tqdm import tqdm

from streamprune.errors import UsageError
from streamprune.figures import human, say_peaks
from streamprune.pipeline.timeline import Timeline

LINE_SECONDS = 15.0  # between lines for people
EVENT_SECONDS = 1.0  # between events for machines
BURSTS = 32  # of steps that are told at once, by whose seconds those to come are estimated
AT_ONCE = 0.1  # seconds within which they are: steps that shared a pass, or that an earlier run has made


class Progress:
    """Reporter of progress: give `advance` to what reads layers, and wrap each long step in `stage`.

    Args:
        stream: file to write to, by default stderr.
        quiet: say nothing.
        as_json: one JSON object per line, told apart by its "event", instead of bars and lines.
        bars: a class of bars, such as `tqdm.notebook.tqdm`; by default tqdm's own where the stream is a terminal.
        clock: seconds.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        quiet: bool = False,
        as_json: bool = False,
        bars: type[tqdm[Any]] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.stream, self.quiet, self.as_json, self._clock = stream or sys.stderr, quiet, as_json, clock
        self._bars = bars or tqdm
        self._shows_bars = not quiet and not as_json and (bars is not None or self.stream.isatty())
        self._stage: _Stage | None = None
        self._timeline = Timeline(clock())

    def begin_timeline(self) -> Timeline:
        """Return a timeline that records from now on, in the place of the last one: that of one run."""
        self._timeline = Timeline(self._clock())
        return self._timeline

    @classmethod
    def of(cls, given: Any) -> Progress:
        """Make a Progress of what `prune` may be given: one of these, True, a class of bars, or nothing for silence.

        Raises:
            UsageError: anything else.
        """
        if isinstance(given, Progress):
            return given
        if given is None or isinstance(given, bool):
            return cls(quiet=not given)
        if isinstance(given, type) and issubclass(given, tqdm):
            return cls(bars=given)
        raise UsageError(f"progress {given!r}: give True, a class of bars such as tqdm, or a Progress")

    def say(self, text: str) -> None:
        """Say a few lines about the run, unless quiet."""
        self._tell("message", {"text": text}, text)

    @contextmanager
    def stage(self, name: str, total: int, seconds: float | None = None) -> Iterator[None]:
        """Open a step that passes `total` bytes of layers, for which a plan predicted `seconds`."""
        self._tell("stage", {"stage": name, "total_bytes": total, "predicted_seconds": seconds}, None)
        bar = self._bars(
            total=total,
            desc=name,
            bar_format="{l_bar}{bar}|{postfix}",
            file=self.stream,
            leave=False,
            disable=not self._shows_bars,
        )
        start = self._clock()
        stage = self._stage = _Stage(name, total, seconds, bar, start=start, said=start)
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            error.add_note(name)
            raise
        finally:
            bar.close()
            self._stage = None
        now = self._clock()
        figures = stage.figures(now)
        self._timeline.end_stage(now, figures, seconds)
        self._tell("done", figures, _closing_line(figures))

    def advance(
        self, nbytes: int, *, read: int | None = None, layer: int | None = None, waited: float = 0.0, skipped: int = 0
    ) -> None:
        """Report that a layer of `nbytes` is done.

        Args:
            skipped: bytes that the stage passes less than was said, since an earlier run has passed them.
            read: bytes that were read for it, fewer than `nbytes` where it was in memory already; by default all.
            waited: seconds that computing stood still for them.
        """
        stage = self._stage
        if stage is None:
            return
        if skipped:
            stage.skip(skipped)
            return
        stage.done += nbytes
        stage.read += nbytes if read is None else read
        stage.layer, stage.waited = layer, stage.waited + waited
        now = self._clock()
        self._timeline.add(now, nbytes if read is None else read)
        if not stage.bar.disable:
            stage.bar.set_postfix_str(_so_far(stage.figures(now)), refresh=False)
            stage.bar.update(nbytes)
            return
        last = self.as_json and stage.done == stage.total
        if last or now - stage.said >= (EVENT_SECONDS if self.as_json else LINE_SECONDS):
            stage.said, figures = now, stage.figures(now)
            self._tell("progress", figures, f"{stage.name}: {stage.share:.0%}, {_so_far(figures)}")

    def note(self, step: int, steps: int, **figures: float) -> None:
        """Report figures of a step inside the stage, from 1 on, and when the last of its `steps` will be done."""
        stage, now = self._stage, self._clock()
        if stage is None:
            return
        stage.steps_done(step, now)
        if self.as_json or now - stage.noted >= LINE_SECONDS:
            stage.noted, eta = now, stage.eta_of_steps(steps)
            said = [f"step {step} of {steps}", *(f"{name} {value:,.4g}" for name, value in figures.items())]
            fields = {"stage": stage.name, "step": step, "steps": steps, **figures, "eta_seconds": eta}
            self._tell("step", fields, f"{stage.name}: {', '.join([*said, *_remaining(eta)])}")

    def _tell(self, event: str, fields: Mapping[str, Any], line: str | None) -> None:
        """Write the event with its fields for machines, or the line, if there is one, for people."""
        text = json.dumps({"event": event, **fields}) if self.as_json else line
        if text is not None and not self.quiet:
            # In one piece: threads have something to say too.
            print(f"{text}\n", end="", file=self.stream, flush=True)


@dataclass
class _Stage:
    """State of a stage so far.

    Attributes:
        total, done: bytes of layers, and those that were passed. read: bytes read for them.
        predicted: seconds of the whole stage by a plan.
        layer: the last one that was passed.
        waited: seconds that computing stood still for what was read.
        start, said, noted: when it began, was last spoken of, and its steps were.
        bursts: the last step of each, and when it began.
    """

    name: str
    total: int
    predicted: float | None
    bar: tqdm[Any]
    start: float
    said: float
    noted: float = -math.inf
    layer: int | None = None
    done: int = 0
    read: int = 0
    waited: float = 0.0
    bursts: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=BURSTS))

    def skip(self, nbytes: int) -> None:
        """Take off `total` so many bytes that will not be passed."""
        if self.predicted is not None and self.total:
            self.predicted *= (self.total - nbytes) / self.total
        self.total -= nbytes
        self.bar.total = self.total

    @property
    def share(self) -> float:
        return self.done / self.total if self.total else 1.0

    def figures(self, now: float) -> dict[str, Any]:
        """Gather the figures to report, by name; bytes/s and shares are over the stage so far."""
        from streamprune.paging.device import peaks  # torch: until there is a stage, nothing needs it

        elapsed = now - self.start
        return {
            "stage": self.name,
            "layer": self.layer,
            "bytes": self.done,
            "total_bytes": self.total,
            "bytes_read": self.read,
            "bytes_per_second": self.read / elapsed if elapsed else 0.0,
            "waiting_share": self.waited / elapsed if elapsed else 0.0,
            "eta_seconds": self._eta(elapsed),
            "elapsed_seconds": elapsed,
            **peaks(),
        }

    def _eta(self, elapsed: float) -> float | None:
        """Estimate the seconds to the end, after t seconds at the share f of the bytes; None where nothing is known.

        Without a plan t (1 − f) / f: what is left over the measured rate. A plan of P seconds has (1 − f) P left, which
        measuring corrects by the ratio r = t / (f P) of measured to predicted so far, weighted by the share done:
        (1 − f) P ((1 − f) + f r) = (1 − f) ((1 − f) P + t).
        """
        share = min(self.share, 1.0)
        if not share:
            return self.predicted
        if self.predicted is None:
            return elapsed * (1 - share) / share
        return (1 - share) * ((1 - share) * self.predicted + elapsed)

    def steps_done(self, step: int, now: float) -> None:
        """Take in that a step was done."""
        if self.bursts and now - self.bursts[-1][1] < AT_ONCE:
            self.bursts[-1] = step, self.bursts[-1][1]
        else:
            self.bursts.append((step, now))

    def eta_of_steps(self, steps: int) -> float | None:
        """Estimate the seconds to the last of `steps` by the bursts that are through; None where those are too few."""
        if len(self.bursts) < 3:
            return None
        (first, start), (last, end) = self.bursts[0], self.bursts[-2]
        return (steps - self.bursts[-1][0]) * (end - start) / (last - first)


def _so_far(figures: Mapping[str, Any]) -> str:
    """Say where a stage stands: layer 17, 1.2 GB/s, waiting for reads 12%, ETA 3:20, peak memory 2.3 GB."""
    parts = [
        *([f"layer {figures['layer']}"] if figures["layer"] is not None else []),
        *_reading(figures),
        *_remaining(figures["eta_seconds"]),
        f"peak memory {say_peaks(figures)}",
    ]
    return ", ".join(parts)


def _remaining(eta: float | None) -> list[str]:
    return [] if eta is None else [f"ETA {tqdm.format_interval(round(eta)).removeprefix('0')}"]


def _closing_line(figures: Mapping[str, Any]) -> str:
    parts = [
        f"{figures['elapsed_seconds']:.1f} s",
        f"{human(figures['bytes_read'])} read",
        *(_reading(figures) if figures["bytes_read"] else []),
        f"peak memory {say_peaks(figures)}",
    ]
    return f"{figures['stage']}: {', '.join(parts)}"


def _reading(figures: Mapping[str, Any]) -> list[str]:
    return [f"{human(figures['bytes_per_second'])}/s", f"waiting for reads {figures['waiting_share']:.0%}"]
