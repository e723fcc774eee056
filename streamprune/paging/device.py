"""Devices as paging sees them: memory, copies beside the computing, events; and all that depends on their kind."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from streamprune.errors import UsageError
from streamprune.figures import peak_rss
from streamprune.storage.checkpoint import FINITE_BLOCK, Checkpoint
from streamprune.values import AUTO

HUGE_PAGE = 2 << 20
READ_THREADS, GPU_READ_THREADS = 2, 4  # beside a GPU the processor has nothing else to do


class Device(Protocol):
    """Interface of a device to paging. Events are opaque; recording and waiting only queue work."""

    direct: bool  # readers may write the slot's memory themselves
    read_threads: int  # how many read, where the user does not say

    @property
    def registers(self) -> bool:
        """Tell whether an `arena` can be memory that copies of go beside the computing."""

    def another(self) -> Device:
        """Return the same device with a copy stream of its own, for copies that go at the same time as this one's."""

    def buffer(self, nbytes: int) -> Tensor:
        """Take device memory, uint8 [nbytes]; where the device is direct, from a page's boundary."""

    def chunk(self, nbytes: int) -> Tensor:
        """Take host memory that the device can copy from, uint8 [nbytes], from a page's boundary."""

    def arena(self, nbytes: int) -> tuple[Tensor, bool]:
        """Take host memory of any size, uint8 [nbytes], to be released; tell whether copies go beside the computing."""

    def release(self, arena: Tensor) -> None:
        """Give back the memory of `arena`, once all copies to it and from it are through."""

    def copy(self, target: Tensor, source: Tensor) -> Any:
        """Queue a copy of a chunk on the copy stream, and return the event of its completion."""

    def record_copied(self) -> Any:
        """Record an event after all copies queued so far."""

    def record_consumed(self) -> Any:
        """Record an event after all compute queued so far."""

    def compute_waits(self, copied: Any) -> None:
        """Let compute that is queued from now on start after the event."""

    def copy_waits(self, consumed: Any) -> None:
        """Let copies that are queued from now on start after the event."""

    def chunk_free(self, event: Any) -> None:
        """Block the calling reader until its chunk has been copied out."""


def _large_pages(nbytes: int) -> Tensor:
    """Take memory from a page's boundary, in large pages where the system has them."""
    try:
        memory = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{nbytes} bytes for layers") from error
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % HUGE_PAGE
    # A request to a disk has a limited number of pages, whatever their size: large ones make direct reads faster. Not
    # of the last ones, of which a part would never be used.
    with suppress(OSError):  # a kernel without large pages
        memory.madvise(mmap.MADV_HUGEPAGE, start, nbytes // HUGE_PAGE * HUGE_PAGE)
    # Not a slice of the whole: torch asks where a tensor's storage begins whether it is pinned.
    return torch.frombuffer(memory, dtype=torch.uint8, count=nbytes, offset=start)


class HostDevice:
    """CPU: readers write the slots themselves, and everything is finished when it returns."""

    direct, read_threads, registers = True, READ_THREADS, True

    def another(self) -> HostDevice:
        return self

    def buffer(self, nbytes: int) -> Tensor:
        return _large_pages(nbytes)

    chunk = buffer

    def arena(self, nbytes: int) -> tuple[Tensor, bool]:
        return _large_pages(nbytes), True

    def release(self, arena: Tensor) -> None: ...

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def record_copied(self) -> None: ...

    def record_consumed(self) -> None: ...

    def compute_waits(self, copied: None) -> None: ...

    def copy_waits(self, consumed: None) -> None: ...

    def chunk_free(self, event: None) -> None: ...


class CudaDevice:
    """GPU: pinned chunks, a copy stream beside the current one, CUDA events."""

    direct, read_threads = False, GPU_READ_THREADS

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.compute = torch.cuda.current_stream(device)
        self.copies = torch.cuda.Stream(device)
        self._registered: set[int] = set()  # addresses

    @cached_property
    def registers(self) -> bool:
        """Tell it by a page."""
        memory, registered = self.arena(HUGE_PAGE)
        self.release(memory)
        return registered

    def another(self) -> CudaDevice:
        return CudaDevice(self.device)

    def buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def chunk(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)  # whole pages

    def arena(self, nbytes: int) -> tuple[Tensor, bool]:
        # torch pins at 1.6 GB/s, and rounds up to a power of two; large pages are registered at 5 GB/s, and at 14 once
        # torch's threads have touched them (H200).
        memory = _large_pages(nbytes).zero_()
        with torch.cuda.device(self.device):
            if int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), nbytes, 0)):
                self._forget_error()
                return memory, False
        self._registered.add(memory.data_ptr())
        return memory, True

    def _forget_error(self) -> None:
        """Take back the last error of CUDA's runtime: torch would find it after the next kernel, and raise it there."""
        with suppress(RuntimeError):
            torch.ones(1, device=self.device)

    def release(self, arena: Tensor) -> None:
        if arena.data_ptr() in self._registered:
            self.compute.synchronize()
            self.copies.synchronize()
            torch.cuda.cudart().cudaHostUnregister(arena.data_ptr())
            self._registered.remove(arena.data_ptr())

    def copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event:
        with torch.cuda.stream(self.copies):
            target.copy_(source, non_blocking=True)
        return self.copies.record_event()

    def record_copied(self) -> torch.cuda.Event:
        return self.copies.record_event()

    def record_consumed(self) -> torch.cuda.Event:
        return self.compute.record_event()

    def compute_waits(self, copied: torch.cuda.Event) -> None:
        self.compute.wait_event(copied)

    def copy_waits(self, consumed: torch.cuda.Event) -> None:
        self.copies.wait_event(consumed)

    def chunk_free(self, event: torch.cuda.Event) -> None:
        event.synchronize()


class PlannedDevice(HostDevice):
    """Device that is planned for and need not be there: sizes are as on it, nothing is run."""

    def __init__(self, device: torch.device) -> None:
        self.direct = not is_gpu(device)
        self.read_threads = GPU_READ_THREADS if is_gpu(device) else READ_THREADS


def paging_device(device: torch.device, *, planned: bool = False) -> Device:
    """Return the paging side of a torch device, or of one that is only planned for."""
    if planned:
        return PlannedDevice(device)
    return CudaDevice(device) if is_gpu(device) else HostDevice()


# What else depends on the kind of device. Nothing outside this file asks for it.


def is_gpu(device: torch.device) -> bool:
    """Tell whether a device has memory of its own."""
    return device.type == "cuda"


def card() -> torch.device:
    """Return a GPU to plan for, whether there is one or not."""
    return torch.device("cuda")


def compute_device(name: str | None) -> torch.device:
    """Return the torch device of `--device`; by default the first GPU, or the CPU.

    Raises:
        UsageError: no device's name, or a device that is not there.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: not a device; use cpu, cuda or cuda:N") from None
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= there):
        gpus = f", or cuda:0 to cuda:{there - 1}" if there > 1 else ", or cuda" if there else ""
        raise UsageError(f"--device {name} is not available here; use cpu{gpus}")
    return device


def compute_dtype(name: str, device: torch.device, checkpoint: Checkpoint) -> torch.dtype:
    """Choose the compute dtype: `name`; or with "auto" the stored one on a GPU, on a CPU bfloat16 or float32.

    On a CPU bfloat16 is chosen where it is stored and multiplied natively. float16 is widened: bfloat16 would round
    such weights, and what multiplies float16 itself has been measured nowhere.
    """
    if name != AUTO:
        return getattr(torch, name)
    sizes: dict[torch.dtype, int] = {}
    for entry in checkpoint.tensors.values():
        if entry.dtype.is_floating_point:
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
    # Most bytes: old exports keep a float32 rotary buffer beside float16 weights.
    stored = max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)
    as_stored = is_gpu(device) or (stored == torch.bfloat16 and multiplies_bfloat16())
    return stored if as_stored else torch.float32


def multiplies_bfloat16() -> bool:
    """Tell whether the processor multiplies bfloat16 itself, by AVX512-BF16 or AMX; others widen it, and are slower."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16"))


def state_dtype(name: str, device: torch.device, dtype: torch.dtype, *, narrows: bool) -> str:
    """Choose the dtype of what a method keeps between sweeps: `name`; or with "auto" bfloat16 or float32.

    bfloat16 is chosen where the method `narrows` its state, on a GPU that computes in half precision: there the state
    passes a link in every sweep.
    """
    if name != AUTO:
        return name
    return "bfloat16" if narrows and is_gpu(device) and dtype.itemsize == 2 else "float32"


def attentions(device: torch.device, dtype: torch.dtype) -> Callable[[str], bool]:
    """Make a function that tells, by its name, whether an attention of transformers takes this dtype on this device.

    On a CPU flex_attention has no backward, and the kernels of others take half precision only.
    """
    return lambda name: name == "sdpa" or (is_gpu(device) and (name == "flex_attention" or dtype.itemsize == 2))


def device_name(device: torch.device) -> str:
    """Name what the last bits of sums depend on: the GPU, or the CPU's number of threads."""
    return torch.cuda.get_device_name(device) if is_gpu(device) else f"cpu, {torch.get_num_threads()} threads"


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a GPU."""
    return torch.cuda.mem_get_info(device)[0]


def limit_memory(device: torch.device, nbytes: int | None) -> None:
    """Let tensors of this process take no more than `nbytes` of a GPU; None for all that there is."""
    if is_gpu(device):
        total = torch.cuda.get_device_properties(device).total_memory
        # Of its index: torch takes no device without one here.
        torch.cuda.set_per_process_memory_fraction(1.0 if nbytes is None else min(1.0, nbytes / total), device.index)


def synchronize(device: torch.device) -> None:
    """Wait for all that was queued on a GPU."""
    if is_gpu(device):
        torch.cuda.synchronize(device)


def draw_threads(device: torch.device) -> int:
    """Return how many tensors noise is drawn for together: on a CPU torch draws normals in one thread."""
    return 1 if is_gpu(device) else torch.get_num_threads()


def at_once(tensor: Tensor) -> int:
    """Return how many elements a sum in another dtype takes together: on a CPU it copies what it sums."""
    return max(1, tensor.numel()) if is_gpu(tensor.device) else FINITE_BLOCK


def peaks() -> dict[str, int]:
    """Return the peaks so far in bytes: "peak_rss", and "peak_gpu" of tensors where a GPU was used."""
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
    return {"peak_rss": peak_rss()} | ({"peak_gpu": gpu} if gpu else {})


def held() -> dict[str, int]:
    """Return what is held now in bytes: "rss" of the process, and "gpu" of tensors where a GPU was used."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    gpu = {"gpu": torch.cuda.memory_allocated()} if torch.cuda.is_initialized() else {}
    return {"rss": pages * mmap.PAGESIZE} | gpu
