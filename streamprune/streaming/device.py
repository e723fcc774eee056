"""What paging asks of a device: memory, copies beside the computing, events."""

from __future__ import annotations

import mmap
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor

from streamprune.figures import peak_rss

HUGE_PAGE = 2 << 20


class Device(Protocol):
    """What paging asks of a device. Events are opaque; recording and waiting only queue work."""

    direct: bool  # readers may write the slot's memory themselves

    def buffer(self, nbytes: int) -> Tensor:
        """Device memory, uint8 [nbytes]; where it is direct, from a page's boundary."""

    def chunk(self, nbytes: int) -> Tensor:
        """Host memory that the device can copy from, uint8 [nbytes], from a page's boundary."""

    def copy(self, target: Tensor, source: Tensor) -> Any:
        """Queue a copy of a chunk on the copy stream; the event of its completion."""

    def record_copied(self) -> Any:
        """An event after all copies queued so far."""

    def record_consumed(self) -> Any:
        """An event after all compute queued so far."""

    def compute_waits(self, copied: Any) -> None:
        """Compute queued from now on starts after the event."""

    def copy_waits(self, consumed: Any) -> None:
        """Copies queued from now on start after the event."""

    def chunk_free(self, event: Any) -> None:
        """Block the calling reader until its chunk has been copied out."""


class HostDevice:
    """A CPU: memory is memory, everything is finished when it returns."""

    direct = True

    def buffer(self, nbytes: int) -> Tensor:
        try:
            memory = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"{nbytes} bytes for layers") from error
        raw = torch.frombuffer(memory, dtype=torch.uint8)
        start = -raw.data_ptr() % HUGE_PAGE
        # A request to a disk has a limited number of pages, whatever their size: large ones make direct reads faster.
        # Not of the last ones, of which a part would never be used.
        with suppress(OSError):  # a kernel without large pages
            memory.madvise(mmap.MADV_HUGEPAGE, start, nbytes // HUGE_PAGE * HUGE_PAGE)
        return raw[start : start + nbytes]

    chunk = buffer

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def record_copied(self) -> None: ...

    def record_consumed(self) -> None: ...

    def compute_waits(self, copied: None) -> None: ...

    def copy_waits(self, consumed: None) -> None: ...

    def chunk_free(self, event: None) -> None: ...


class CudaDevice:
    """One GPU: pinned chunks, a copy stream beside the current one, CUDA events."""

    direct = False

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.compute = torch.cuda.current_stream(device)
        self.copies = torch.cuda.Stream(device)

    def buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def chunk(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)  # whole pages

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
    """A device that is planned for and need not be there: sizes are as on it, nothing is run."""

    def __init__(self, device: torch.device) -> None:
        self.direct = device.type == "cpu"


def paging_device(device: torch.device) -> Device:
    """The paging side of a torch device."""
    return CudaDevice(device) if device.type == "cuda" else HostDevice()


def peaks() -> dict[str, int]:
    """Bytes: "peak_rss", and "peak_gpu" of tensors where a GPU was used."""
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
    return {"peak_rss": peak_rss()} | ({"peak_gpu": gpu} if gpu else {})
