"""Clock of a machine that is not there: when its streams, its link, its disks and its host's threads are through."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from clock_rates import Machine
from torch import Tensor
from virtual_time import Engine, World

from streamprune.paging.device import GPU_READ_THREADS

SMALL = 1 << 20  # bytes; smaller tensors of the host are real
FRESH = 32 << 20  # larger ones the C library takes from the system each time (M_MMAP_THRESHOLD's limit)


@dataclass
class Busy:
    """What a part of a run asked of each resource, in seconds at the resource's own rate.

    Attributes:
        up, down: bytes over the link, at the rate of pinned memory. disk: bytes read. scratch: bytes read and written
            on another. compute: operations, and launches: the host's work to start them. memory: the host's to take
            what the device copies from, which is done once in a process. elapsed: seconds that it took, until all was
            computed.
    """

    up: float = 0
    down: float = 0
    disk: float = 0
    scratch: float = 0
    compute: float = 0
    launches: float = 0
    memory: float = 0
    elapsed: float = 0

    def since(self, before: Busy) -> Busy:
        """Return what was added since `before`."""
        return Busy(*(getattr(self, name) - getattr(before, name) for name in vars(self)))

    @property
    def bound(self) -> float:
        """Seconds below which nothing can bring it: the busiest resource's."""
        return max(self.up, self.down, self.disk, self.scratch, self.compute, self.launches)


@dataclass
class Sweep:
    """A pass over layers: the layers, and what it asked for."""

    layers: int
    busy: Busy

    @property
    def one_layer(self) -> float:
        """Seconds of one layer, that nothing hides: read, brought, computed on, carried away."""
        parts = self.busy
        return (parts.up + parts.down + parts.disk + parts.scratch + parts.compute) / max(1, self.layers)


@dataclass
class Clock:
    """Clock of a machine: a stream per name, both directions of the link, the disk, and the host's threads."""

    machine: Machine
    world: World = field(default_factory=World)
    streams: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # when each has done all its work
    up: Engine = field(default_factory=Engine)
    down: Engine = field(default_factory=Engine)
    disk: Engine = field(default_factory=Engine)
    scratch: Engine = field(default_factory=Engine)  # a drive of its own
    compute: float = 0  # seconds of work
    launches: float = 0  # seconds of the host
    waits: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # of the main thread, by what for
    sweeps: list[Sweep] = field(default_factory=list)
    pinned: set[int] = field(default_factory=set)
    touched: set[int] = field(default_factory=set)
    cached: set[tuple[int, int]] = field(default_factory=set)
    known: dict[Any, Any] = field(default_factory=dict)  # what operations put out, and their seconds
    devices: int = 0
    warm: bool = False  # the page cache holds the checkpoint
    linked: dict[str, float] = field(default_factory=lambda: {"up": 0, "down": 0})  # bytes

    def run(self, seconds: float) -> None:
        """Queue an operation of the compute stream."""
        self.world.spend(self.machine.launch)
        self.launches += self.machine.launch
        self.streams["compute"] = max(self.streams["compute"], self.world.now) + seconds
        self.compute += seconds

    def take(self, seconds: float) -> None:
        """Let the host take memory that the device copies from; behind the work, nobody waits for it."""
        if self.world.in_main:
            self.waits["memory"] += seconds
        self.world.spend(seconds)

    def synchronize(self, stream: str = "compute") -> None:
        """Let the host wait for a stream."""
        self.wait_for(self.streams[stream], stream)

    def wait_for(self, time: float, what: str) -> None:
        """Let the host wait for a time."""
        self.waits[what] += max(0.0, time - self.world.now)
        self.world.until(time)

    def copy(self, stream: str, target: Tensor, source: Tensor, *, waits: bool = False, new: bool = False) -> float:
        """Queue a copy over the link on a stream, and return when it is through; a copy that `waits` blocks the host.

        Of pageable memory, the driver copies through a buffer of its own, and the host waits. `new` memory, if it is
        large, and what was never written before is given out by the system on the way.
        """
        up = source.device.type == "cpu"
        host, nbytes = (source, target.nbytes) if up else (target, source.nbytes)
        pinned = host.untyped_storage().data_ptr() in self.pinned
        link, ideal = (self.up, self.machine.link_up) if up else (self.down, self.machine.link_down)
        self.linked["up" if up else "down"] += nbytes
        rate = ideal if pinned else min(ideal, self.machine.pageable_up if up else self.machine.pageable_down)
        if not pinned and not up and (host.nbytes > FRESH if new else self._first(host)):
            rate = self.machine.fresh
        self.world.turn()
        if waits or not pinned:
            self.wait_for(self.streams[stream], stream)
        start = max(self.streams[stream], self.world.now)
        ended = self.streams[stream] = link.take(start, nbytes / rate)
        link.busy += nbytes / ideal - nbytes / rate  # what it would be of pinned memory
        if waits or not pinned:
            self.wait_for(ended, "link")
        return ended

    def _first(self, host: Tensor) -> bool:
        """Tell whether memory that stays, and is no part of the heap, is written for the first time."""
        if host.nbytes < SMALL or host.data_ptr() in self.touched:
            return False
        self.touched.add(host.data_ptr())
        return True

    def read(self, place: tuple[int, int], nbytes: int) -> None:
        """Let the calling reader read from the disk, or again from the page cache."""
        if self.warm or place in self.cached:
            self.world.spend(nbytes / self.machine.page_cache)
            self.disk.busy += nbytes / (self.machine.page_cache * GPU_READ_THREADS)
            return
        self.world.turn()
        self.world.until(self.disk.take(self.world.now, nbytes / self.machine.disk))
        self.cached.add(place)

    def spill(self, nbytes: int) -> None:
        """Let the calling thread read from the scratch disk, or write to it."""
        self.world.turn()
        self.world.until(self.scratch.take(self.world.now, nbytes / self.machine.disk))

    def busy(self) -> Busy:
        """Return what was asked for so far."""
        computed = max(self.world.now, self.streams["compute"])
        work = (self.up.busy, self.down.busy, self.disk.busy, self.scratch.busy, self.compute, self.launches)
        return Busy(*work, self.waits["memory"], computed)
