"""Two slots are enough, and each of the three waits is needed: a fake device whose streams run as late as they may."""

import threading

import pytest
import torch
from conftest import make_sweeper, save_tiny

from streamprune import paging
from streamprune.checkpoint import Checkpoint
from streamprune.paging import HostDevice, Pager


class FakeDevice:
    """Streams of queued work that runs only when somebody waits for it, then in the order least expected.

    An event is a (stream, length of its queue); finishing it runs that stream up to there, and what the queued
    waits ask of the other stream first. `without` names a wait that the device forgets.
    """

    direct = False

    def __init__(self, without: str | None = None, late: str = "copy") -> None:
        self.without, self.late = without, late
        self.queues = {"copy": [], "compute": []}
        self.done = {"copy": 0, "compute": 0}
        self.lock = threading.RLock()

    def buffer(self, nbytes):
        return torch.full((nbytes,), 0xFF, dtype=torch.uint8)

    chunk = buffer

    def queue(self, stream, work):
        with self.lock:
            self.queues[stream].append(work)
            return stream, len(self.queues[stream])

    def event(self, stream):
        with self.lock:
            return stream, len(self.queues[stream])

    def finish(self, event):
        stream, length = event
        with self.lock:
            while self.done[stream] < length:
                work = self.queues[stream][self.done[stream]]
                self.done[stream] += 1
                work()

    def finish_all(self):
        for stream in ("compute", "copy") if self.late == "copy" else ("copy", "compute"):
            self.finish(self.event(stream))

    def copy(self, target, source):
        return self.queue("copy", lambda: target.copy_(source))

    def record_copied(self):
        return self.event("copy")

    def record_consumed(self):
        return self.event("compute")

    def compute_waits(self, copied):
        if self.without != "copied":
            self.queue("compute", lambda: self.finish(copied))

    def copy_waits(self, consumed):
        if self.without != "consumed":
            self.queue("copy", lambda: self.finish(consumed))

    def chunk_free(self, event):
        if self.without != "chunk":
            self.finish(event)


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """Eight layers, read in chunks so small that each takes many turns of the ring."""
    save_tiny(tmp_path, "llama", num_hidden_layers=8)
    monkeypatch.setattr(paging, "CHUNK_BYTES", 4096)
    return make_sweeper(tmp_path).skeleton


def sums_seen(skeleton, device, sweeps=2):
    """What queued compute reads of each page, when it finally runs, and what it should have read."""
    seen, expected = [], []
    pager = Pager(skeleton.checkpoint, skeleton.entries, device)
    for sweep in range(sweeps):
        order = range(8) if sweep % 2 == 0 else range(7, -1, -1)
        with pager.pages(order) as pages:
            for page in pages:
                tensors = page.tensors
                device.queue("compute", lambda tensors=tensors: seen.append({n: t.sum() for n, t in tensors.items()}))
                prefix = skeleton.layer_prefix(page.layer)
                expected.append({n: skeleton.checkpoint.read(prefix + n).sum() for n in tensors})
    device.finish_all()
    return seen, expected


@pytest.mark.parametrize("late", ["copy", "compute"])
def test_the_waits_are_sufficient_when_copies_and_compute_finish_late(checkpoint, late):
    seen, expected = sums_seen(checkpoint, FakeDevice(late=late))
    assert seen == expected


@pytest.mark.parametrize(("without", "late"), [("copied", "copy"), ("consumed", "compute"), ("chunk", "copy")])
def test_each_wait_is_needed(checkpoint, without, late):
    seen, expected = sums_seen(checkpoint, FakeDevice(without=without, late=late))
    assert seen != expected


def test_a_released_slot_is_poisoned_and_the_held_one_is_not(checkpoint):
    pager = Pager(checkpoint.checkpoint, checkpoint.entries, HostDevice(), poison=True)
    with pager.pages(range(4)) as pages:
        first = next(pages)
        assert all(torch.isfinite(tensor).all() for tensor in first.tensors.values())
        second = next(pages)
        assert all(torch.isfinite(tensor).all() for tensor in second.tensors.values())
    pager = Pager(checkpoint.checkpoint, checkpoint.entries, HostDevice(), poison=True)
    with pager.pages([0]) as pages:
        page = next(pages)
        assert next(pages, None) is None
        assert all(torch.isnan(tensor).all() for tensor in page.tensors.values())


def test_pages_hold_the_stored_bytes_in_the_order_asked_for(checkpoint):
    pager = Pager(checkpoint.checkpoint, checkpoint.entries, HostDevice())
    order = [3, 3, 0, 7, 5, 5, 5, 1]
    with pager.pages(order) as pages:
        for layer, page in zip(order, pages, strict=True):
            assert page.layer == layer
            for name, tensor in page.tensors.items():
                assert torch.equal(tensor, checkpoint.checkpoint.read(checkpoint.layer_prefix(layer) + name))
                assert tensor.data_ptr() % paging.ALIGNMENT == page.tensors["mlp.up_proj.weight"].data_ptr() % 64


def test_leaving_early_or_with_an_error_stops_the_threads(checkpoint):
    pager = Pager(checkpoint.checkpoint, checkpoint.entries, HostDevice())
    before = threading.active_count()
    with pager.pages(range(8)) as pages:
        next(pages)
    with pytest.raises(ZeroDivisionError), pager.pages(range(8)) as pages:
        next(pages)
        raise ZeroDivisionError
    assert threading.active_count() == before


def test_an_error_of_a_reader_reaches_the_consumer(checkpoint, monkeypatch):
    def broken(self, *arguments, **options):
        raise OSError("disk gone")

    monkeypatch.setattr(Checkpoint, "read_into", broken)
    pager = Pager(checkpoint.checkpoint, checkpoint.entries, HostDevice())
    with pytest.raises(OSError, match="disk gone"), pager.pages(range(8)) as pages:
        next(pages)


def test_resident_bytes_do_not_depend_on_the_number_of_layers(tmp_path):
    sizes = []
    for layers in (2, 6):
        save_tiny(tmp_path / str(layers), "llama", num_hidden_layers=layers)
        sizes.append(make_sweeper(tmp_path / str(layers)).resident_bytes)
    assert sizes[0] == sizes[1]
