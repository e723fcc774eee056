"""A GPU that is not there, with a clock: the real paging code runs a sweep of any shape, and is told what it takes.

Tensors of the device are on `meta`, those of the host are memory that nobody touches, so that shapes of 70 billion
parameters fit into a small machine. A dispatch mode answers what the code asks of numbers ("is it finite?": yes), turns
copies between the two into time on the link, and adds each operation's time to the compute stream: FLOPs over the
card's rate or bytes over its memory's, whichever takes longer. Threads run in virtual time (virtual_time.py).
"""

from __future__ import annotations

import mmap
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from clock_costs import NO_KERNEL, kernel_seconds, operation_seconds
from clock_rates import Machine
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from virtual_time import Engine, World, replaced, virtual_threads

from streamprune import kernels
from streamprune.kernels.add_product import HALVES, sums_halves
from streamprune.kernels.launch import Launch, use_triton
from streamprune.paging import device as devices
from streamprune.paging.device import GPU_READ_THREADS
from streamprune.storage.checkpoint import Checkpoint

META = torch.device("meta")
aten = torch.ops.aten
BACKWARD_OF_ATTENTION = 2.5  # FLOPs of FlashAttention's backward over its forward pass (2307.08691, §4.1)
MAP_NORESERVE = 0x4000 | mmap.MAP_ANONYMOUS  # Linux; Python has no name for it before 3.13
SMALL = 1 << 20  # bytes; smaller tensors of the host are real
FRESH = 32 << 20  # larger ones the C library takes from the system each time (M_MMAP_THRESHOLD's limit)


@dataclass
class Busy:
    """What a part of a run asked of each resource, in seconds at the resource's own rate.

    Attributes:
        up, down: bytes over the link, at the rate of pinned memory. disk: bytes read. compute: operations, and
            launches: the host's work to start them. memory: the host's to take what the device copies from, which is
            done once in a process. elapsed: seconds that it took, until all was computed.
    """

    up: float = 0
    down: float = 0
    disk: float = 0
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
        return max(self.up, self.down, self.disk, self.compute, self.launches)


@dataclass
class Sweep:
    """A pass over layers: the layers, and what it asked for."""

    layers: int
    busy: Busy

    @property
    def one_layer(self) -> float:
        """Seconds of one layer, that nothing hides: read, brought, computed on, carried away."""
        parts = self.busy
        return (parts.up + parts.down + parts.disk + parts.compute) / max(1, self.layers)


@dataclass
class Clock:
    """Clock of a machine: a stream per name, both directions of the link, the disk, and the host's threads."""

    machine: Machine
    world: World = field(default_factory=World)
    streams: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # when each has done all its work
    up: Engine = field(default_factory=Engine)
    down: Engine = field(default_factory=Engine)
    disk: Engine = field(default_factory=Engine)
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

    def busy(self) -> Busy:
        """Return what was asked for so far."""
        computed = max(self.world.now, self.streams["compute"])
        work = (self.up.busy, self.down.busy, self.disk.busy, self.compute, self.launches)
        return Busy(*work, self.waits["memory"], computed)


class ClockDevice:
    """Device with a clock; an event is the time at which it comes."""

    direct, read_threads, registers = False, GPU_READ_THREADS, True

    def __init__(self, clock: Clock, stream: str = "copies") -> None:
        self.clock, self.stream = clock, stream

    def another(self) -> ClockDevice:
        self.clock.devices += 1
        return ClockDevice(self.clock, f"copies {self.clock.devices}")

    def buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=META)

    def chunk(self, nbytes: int) -> Tensor:
        memory = torch.empty(nbytes, dtype=torch.uint8)
        self.clock.pinned.add(memory.untyped_storage().data_ptr())
        self.clock.take((1 << (nbytes - 1).bit_length()) / self.clock.machine.pinning)
        return memory

    def arena(self, nbytes: int) -> tuple[Tensor, bool]:
        # Memory that the system never counts, so that there may be more than it has.
        memory = torch.frombuffer(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | MAP_NORESERVE), dtype=torch.uint8)
        self.clock.pinned.add(memory.untyped_storage().data_ptr())
        self.clock.take(nbytes / self.clock.machine.registering)
        return memory, True

    def release(self, arena: Tensor) -> None: ...

    def copy(self, target: Tensor, source: Tensor) -> float:
        return self.clock.copy(self.stream, target, source)

    def record_copied(self) -> float:
        return self.clock.streams[self.stream]

    def record_consumed(self) -> float:
        return max(self.clock.streams["compute"], self.clock.world.now)

    def compute_waits(self, copied: float | None) -> None:
        self._wait("compute", copied)

    def copy_waits(self, consumed: float | None) -> None:
        self._wait(self.stream, consumed)

    def chunk_free(self, event: float) -> None:
        self.clock.world.until(event)

    def _wait(self, stream: str, event: float | None) -> None:
        if event is not None:
            self.clock.streams[stream] = max(self.clock.streams[stream], event)


class _Attention(torch.autograd.Function):
    """FlashAttention's time: neither scores nor masks are in memory, and a causal one makes half of them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, clock: Clock, share: float) -> Tensor:
        ctx.clock, ctx.inputs = clock, (q, k, v)
        products = 4 * q.numel() * k.shape[-2] * share
        ctx.seconds = products / clock.machine.attention
        clock.run(ctx.seconds)
        return q.new_empty(*q.shape[:-1], v.shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.clock.run(ctx.seconds * BACKWARD_OF_ATTENTION)
        return *(torch.empty_like(each) for each in ctx.inputs), None, None


class CostMode(TorchDispatchMode):
    """Mode that adds the time of what torch does to a clock."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self._views: dict[Any, bool] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, op = kwargs or {}, func._overloadpacket
        if op is aten._local_scalar_dense and args[0].is_meta:
            self.clock.synchronize()
            return _answer(args[0].dtype)
        if op is aten.nonzero and args[0].is_meta:
            self.clock.synchronize()
            return torch.empty((0, args[0].ndim), dtype=torch.int64, device=META)
        if op is aten.copy_ and args[0].is_meta != args[1].is_meta:
            self.clock.copy("compute", args[0], args[1], waits=not (len(args) > 2 and args[2]))
            return args[0]
        if op is aten._to_copy:
            device = kwargs.get("device") or args[0].device
            if args[0].is_meta != (device.type == "meta"):
                like = {"dtype": kwargs.get("dtype") or args[0].dtype, "device": device}
                made = torch.empty(args[0].shape, **like)
                self.clock.copy("compute", made, args[0], waits=not kwargs.get("non_blocking"), new=True)
                return made
        if not _on_device(args, kwargs):
            return self._on_host(func, args, kwargs)
        if self._is_view(func):
            return func(*args, **kwargs)
        return self._operate(func, op, args, kwargs)

    def _operate(self, func: Any, op: Any, args: Any, kwargs: Any) -> Any:
        """Queue an operation; of one like it that was there before, torch is not asked again what it puts out."""
        key = func, _likeness(args), _likeness(tuple(kwargs.items()))
        if "out" in kwargs:  # which products summed in another dtype have, and nothing on `meta`
            self.clock.run(operation_seconds(op, args, kwargs, kwargs["out"], self.clock.machine))
            return kwargs["out"]
        if key not in self.clock.known:
            made = func(*args, **kwargs)
            seconds = None if op in NO_KERNEL else operation_seconds(op, args, kwargs, made, self.clock.machine)
            self.clock.known[key] = "itself" if args and made is args[0] else _likeness(made), seconds
        else:
            like, seconds = self.clock.known[key]
            made = args[0] if like == "itself" else _made_like(like)
        if seconds is not None:
            self.clock.run(seconds)
        return made

    def _on_host(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Large tensors of the host hold nothing: what is made of them is made of none, in the time of memory."""
        given = [each for each in args if isinstance(each, Tensor)]
        nbytes = sum(each.nbytes for each in given)
        if nbytes < SMALL or self._is_view(func):
            return func(*args, **kwargs)
        self.clock.world.spend(nbytes / self.clock.machine.host_memory)
        if func._schema.is_mutable:
            return args[0]
        shown = func(*(each.to(META) if isinstance(each, Tensor) else each for each in args), **kwargs)
        return torch.empty(shown.shape, dtype=shown.dtype) if isinstance(shown, Tensor) else shown

    def _is_view(self, func: Any) -> bool:
        if func not in self._views:
            results = [each.alias_info for each in func._schema.returns]
            self._views[func] = bool(results) and all(each is not None and not each.is_write for each in results)
        return self._views[func]


def _likeness(thing: Any) -> Any:
    """What of operands and results decides about an operation's result and time."""
    if isinstance(thing, Tensor):
        return Tensor, thing.shape, thing.stride(), thing.dtype
    return tuple(map(_likeness, thing)) if isinstance(thing, list | tuple) else thing


def _made_like(like: Any) -> Any:
    if isinstance(like, tuple):
        if like and like[0] is Tensor:
            return torch.empty_strided(like[1], like[2], dtype=like[3], device=META)
        return tuple(map(_made_like, like))
    return like


def _answer(dtype: torch.dtype) -> Any:
    """What a number is said to be: finite and true, and no error code."""
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 0


def _on_device(args: Any, kwargs: Any) -> bool:
    found = [each for each in args if isinstance(each, Tensor)]
    found += [each for arg in args if isinstance(arg, list | tuple) for each in arg if isinstance(each, Tensor)]
    if found:
        return any(each.is_meta for each in found)
    device = kwargs.get("device")
    return device is not None and device.type == "meta"


@contextmanager
def running(clock: Clock, *, halves: bool = True) -> Iterator[None]:
    """Let all paging in the block run on the clock's machine; `halves` are multiplied as they are, into float32."""
    world = clock.world
    world.inside = lambda: CostMode(clock)

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, *rest: Any, **named: Any) -> Tensor:
        return _Attention.apply(q, k, v, clock, 0.5 if named.get("is_causal") else 1.0)

    def read_into(self: Checkpoint, file: int, offset: int, buffer: memoryview, *, stays: bool = True) -> None:
        clock.read((file, offset), len(buffer))

    def is_gpu(device: torch.device) -> bool:
        return device.type in ("cuda", "meta")

    things = virtual_threads(world) | {
        "is_gpu": (devices.is_gpu, is_gpu),
        "paging_device": (devices.paging_device, lambda device, *, planned=False: ClockDevice(clock)),
        "use_triton": (use_triton, lambda tensor, backend: tensor.dtype != torch.float64),
        "sums_halves": (sums_halves, lambda tensor: halves and tensor.dtype in HALVES),
    }
    with ExitStack() as stack:
        stack.enter_context(replaced("streamprune.", **things))
        for owner, name, new in (
            (F, "scaled_dot_product_attention", attention),
            (Checkpoint, "read_into", read_into),
            (Launch, "run", lambda launch: clock.run(kernel_seconds(launch, clock.machine))),
        ):
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, new)
        stack.callback(world.close)
        stack.enter_context(CostMode(clock))
        yield


assert kernels, "they are imported before their switch is replaced"
