"""A GPU that is not there, with a clock: the real paging code runs a sweep of any shape, and is told what it takes.

Tensors of the device are on `meta`, those of the host are memory that nobody touches, so that shapes of 70 billion
parameters fit into a small machine. A dispatch mode answers what the code asks of numbers ("is it finite?": yes), turns
copies between the two into time on the link, and adds each operation's time to the compute stream: FLOPs over the
card's rate or bytes over its memory's, whichever takes longer. Threads run in virtual time (virtual_time.py).
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from clock import SMALL, Clock
from clock_costs import NO_KERNEL, kernel_seconds, operation_seconds
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from virtual_time import replaced, virtual_threads

from streamprune import kernels
from streamprune.kernels.add_product import HALVES, sums_halves
from streamprune.kernels.launch import Launch, use_triton
from streamprune.paging import device as devices
from streamprune.paging import hidden_states
from streamprune.paging.device import GPU_READ_THREADS
from streamprune.paging.hidden_states import Activations, Room
from streamprune.paging.state import StateStream
from streamprune.storage import scratch
from streamprune.storage.checkpoint import Checkpoint

META = torch.device("meta")
aten = torch.ops.aten
BACKWARD_OF_ATTENTION = 2.5  # FLOPs of FlashAttention's backward over its forward pass (2307.08691, §4.1)
MAP_NORESERVE = 0x4000 | mmap.MAP_ANONYMOUS  # Linux; Python has no name for it before 3.13


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


class ClockFile:
    """File on a scratch disk that holds nothing, for `BlockFile`."""

    def __init__(self, clock: Clock, directory: Path, nbytes: int) -> None:
        self._clock = clock

    def close(self) -> None: ...

    def read(self, tensor: Tensor, offset: int) -> None:
        self._clock.spill(tensor.nbytes)

    write = read


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
                made = torch.zeros(args[0].shape, **like)  # what a method reads decides what it does next
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
def running(clock: Clock, *, then: bool = False) -> Iterator[None]:
    """Let all paging in the block run on the clock's machine.

    Halves are multiplied as they are, into float32, and a thread takes hidden states' memory ahead of the sweep;
    neither was so `then`.
    """
    world, room, carrier = clock.world, Activations.room, StateStream.__dict__["_carrier"]
    world.inside = lambda: CostMode(clock)

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, *rest: Any, **named: Any) -> Tensor:
        return _Attention.apply(q, k, v, clock, 0.5 if named.get("is_causal") else 1.0)

    def read_into(self: Checkpoint, file: int, offset: int, buffer: memoryview, *, stays: bool = True) -> None:
        clock.read((file, offset), len(buffer))

    def is_gpu(device: torch.device) -> bool:
        return device.type in ("cuda", "meta")

    def spill(descriptor: int, tensor: Tensor, offset: int, scratch: Path | None) -> None:
        clock.spill(tensor.nbytes)

    def wait_for_room(self: Activations, nbytes: int) -> Room:
        place = room(self, nbytes)
        if then and not isinstance(place, int):
            place.result()
        return place

    def wait_for_memory(self: StateStream) -> Any:
        begun = world.now
        found = carrier.__get__(self)
        clock.waits["memory"] += (world.now - begun) * world.in_main
        return found

    # What hidden states ask of the system for their file.
    system = SimpleNamespace(posix_fallocate=lambda *given: None, close=lambda descriptor: None)
    things = virtual_threads(world) | {
        "BlockFile": (scratch.BlockFile, partial(ClockFile, clock)),
        "scratch_file": (scratch.scratch_file, lambda directory: 0),
        "read_at": (scratch.read_at, spill),
        "write_at": (scratch.write_at, spill),
        "is_gpu": (devices.is_gpu, is_gpu),
        "paging_device": (devices.paging_device, lambda device, *, planned=False: ClockDevice(clock)),
        "use_triton": (use_triton, lambda tensor, backend: tensor.dtype != torch.float64),
        "sums_halves": (sums_halves, lambda tensor: not then and tensor.dtype in HALVES),
    }
    with ExitStack() as stack:
        stack.enter_context(replaced("streamprune.", **things))
        stack.enter_context(replaced(hidden_states.__name__, os=(os, system)))
        for owner, name, new in (
            (F, "scaled_dot_product_attention", attention),
            (Checkpoint, "read_into", read_into),
            (Activations, "room", wait_for_room),
            (StateStream, "_carrier", property(wait_for_memory)),
            (Launch, "run", lambda launch: clock.run(kernel_seconds(launch, clock.machine))),
        ):
            stack.callback(setattr, owner, name, owner.__dict__[name])
            setattr(owner, name, new)
        stack.callback(world.close)
        stack.enter_context(CostMode(clock))
        yield


assert kernels, "they are imported before their switch is replaced"
