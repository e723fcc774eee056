"""Two slots are enough, and each of the three waits is needed: a fake device whose streams run as late as they may."""

import os
import threading

import numpy as np
import psutil
import pytest
import torch
from fake_device import FakeDevice
from tiny_models import make_sweeper, need_direct, save_tiny

from streamprune.paging import pager
from streamprune.paging.device import HUGE_PAGE, HostDevice
from streamprune.paging.pager import Pager
from streamprune.storage.checkpoint import Checkpoint
from streamprune.storage.reader import DISK_BLOCK
from streamprune.streaming.costs import Sizes, Task


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """Eight layers, read in chunks so small that each takes many turns of the ring."""
    save_tiny(tmp_path, "llama", num_hidden_layers=8)
    monkeypatch.setattr(pager, "CHUNK_BYTES", 4096)
    return make_sweeper(tmp_path).skeleton


def sums_seen(skeleton, device, sweeps=2):
    """What queued compute reads of each page, when it finally runs, and what it should have read."""
    return sums_of(Pager(skeleton.checkpoint, skeleton.entries, device), skeleton, device, sweeps)


def sums_of(pager, skeleton, device, sweeps):
    seen, expected = [], []
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


def test_a_released_slot_is_poisoned_unless_it_keeps_its_layer(checkpoint, monkeypatch):
    allowed, read_into = threading.Event(), Checkpoint.read_into
    last = [(entry.offset, entry.offset + entry.nbytes) for entry in checkpoint.entries[2].values()]

    def waiting(self, file, offset, *arguments, **options):
        if any(start <= offset < stop for start, stop in last):
            allowed.wait()  # layer 2 goes where layer 0 was
        read_into(self, file, offset, *arguments, **options)

    monkeypatch.setattr(Checkpoint, "read_into", waiting)
    pager = Pager(checkpoint.checkpoint, checkpoint.entries, HostDevice(), poison=True)
    with pager.pages(range(3)) as pages:
        first = next(pages)
        assert all(torch.isfinite(tensor).all() for tensor in first.tensors.values())
        second = next(pages)
        assert all(torch.isnan(tensor).all() for tensor in first.tensors.values())
        allowed.set()
        third = next(pages)
        assert next(pages, None) is None
    for page in (second, third):
        assert all(torch.isfinite(tensor).all() for tensor in page.tensors.values())


def best_possible(orders, slots):
    """Layers read by the best choice of what each slot keeps, by trying all of them; a slot is busy for two steps."""
    future = [layer for order in orders for layer in order]
    states = {(frozenset(), None): 0}
    for layer in future:
        following = {}
        for (held, busy), reads in states.items():
            if layer in held:
                options = [(held, reads)]
            elif len(held) < slots:
                options = [(held | {layer}, reads + 1)]
            else:
                options = [(held - {gone} | {layer}, reads + 1) for gone in held if gone != busy]
            for kept, count in options:
                key = (kept, layer)
                following[key] = min(count, following.get(key, count))
        states = following
    return min(states.values())


@pytest.mark.parametrize("slots", [2, 3, 5, 8, 20])
@pytest.mark.parametrize("then", ["back", "again"])
def test_no_other_choice_of_slots_reads_less(slots, then):
    n, sweeps = 7, 4
    orders = [range(n) if then == "again" or sweep % 2 == 0 else range(n)[::-1] for sweep in range(sweeps)]
    held, reads = [None] * slots, 0
    for order in orders:
        for step in pager.schedule(order, held, then):
            assert step.read == (step.layer not in held)
            held[step.slot] = step.layer
            reads += step.read
    assert reads == best_possible(orders, slots)
    assert slots < n or reads == n


@pytest.mark.parametrize("slots", [2, 3, 5, 8])
@pytest.mark.parametrize("late", ["copy", "compute"])
def test_kept_layers_are_not_read_again_and_hold_their_bytes(checkpoint, slots, late):
    device = FakeDevice(late=late)
    pager = Pager(checkpoint.checkpoint, checkpoint.entries, device)
    pager.slots = slots
    seen, expected = sums_of(pager, checkpoint, device, sweeps=4)
    assert seen == expected


def test_bytes_read_are_those_foretold(checkpoint):
    for slots in (2, 3, 6, 8):
        pager = Pager(checkpoint.checkpoint, checkpoint.entries, HostDevice(), poison=True)
        pager.slots = slots
        sweeps = [(range(8), "back"), (range(2, 8)[::-1], "back"), (range(2, 8), "again"), (range(2, 8), "again")]
        before, foretold = (
            checkpoint.checkpoint.bytes_read,
            sum(pager.bytes_of(layer) for read in pager.to_read(sweeps) for layer in read),
        )
        facts = []
        pager._progress = lambda nbytes, facts=facts, **more: facts.append((nbytes, more))
        for order, then in sweeps:
            with pager.pages(order, then) as pages:
                for _ in pages:
                    pass
        assert checkpoint.checkpoint.bytes_read - before == foretold == sum(more["read"] for _, more in facts)
        assert [more["layer"] for _, more in facts] == [layer for order, _ in sweeps for layer in order]
        assert all(more["waited"] >= 0 for _, more in facts)


def test_pages_hold_the_stored_bytes_in_the_order_asked_for(checkpoint):
    pager = Pager(checkpoint.checkpoint, checkpoint.entries, HostDevice())
    order = [3, 3, 0, 7, 5, 5, 5, 1]
    with pager.pages(order) as pages:
        for layer, page in zip(order, pages, strict=True):
            assert page.layer == layer
            for name, tensor in page.tensors.items():
                assert torch.equal(tensor, checkpoint.checkpoint.read(checkpoint.layer_prefix(layer) + name))


class Remembering(HostDevice):
    """A CPU that knows the memory it gave away."""

    def __init__(self, direct):
        self.direct, self.given = direct, []

    def buffer(self, nbytes):
        self.given.append(super().buffer(nbytes))
        return self.given[-1]

    chunk = buffer

    def holds(self, part):
        address = np.asarray(part).ctypes.data
        return any(0 <= address - each.data_ptr() < len(each) for each in self.given)


@pytest.mark.parametrize("into_slots", [True, False], ids=["into-slots", "into-chunks"])
def test_direct_reads_put_whole_blocks_in_their_place(into_slots, tmp_path, monkeypatch):
    device = Remembering(into_slots)
    save_tiny(tmp_path, "llama", intermediate_size=2048)
    need_direct(tmp_path)
    monkeypatch.setattr(pager, "CHUNK_BYTES", 4 * DISK_BLOCK)
    skeleton, original, parts = make_sweeper(tmp_path).skeleton, os.preadv, []
    monkeypatch.setattr(os, "preadv", lambda *given: parts.extend(given[1]) or original(*given))
    with (
        Checkpoint(tmp_path, "direct") as checkpoint,
        Pager(checkpoint, skeleton.entries, device).pages([2]) as pages,
    ):
        tensors = next(pages).tensors
    entries = skeleton.entries[2]
    assert all(torch.equal(tensors[name], skeleton.checkpoint.read(entry.name)) for name, entry in entries.items())
    whole = [(e.offset + e.nbytes) // DISK_BLOCK - -(-e.offset // DISK_BLOCK) for e in entries.values()]
    straight = sum(len(part) for part in parts if device.holds(part))
    assert straight == DISK_BLOCK * sum(count for count in whole if count > 0) > 100 * DISK_BLOCK
    assert sum(map(len, parts)) <= straight + 2 * DISK_BLOCK * len(entries)


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


def test_memory_that_is_not_there_is_an_error_of_its_own():
    with pytest.raises(MemoryError, match="bytes for layers"):
        HostDevice().buffer(1 << 60)


def test_a_slot_is_no_larger_than_what_it_holds():
    """Large pages are for what is filled, and not for a last one that is not."""
    before, made = psutil.Process().memory_info().rss, []
    for nbytes in [300_000] * 40 + [HUGE_PAGE + 300_000] * 10:
        made.append(HostDevice().buffer(nbytes).fill_(1))
    taken = psutil.Process().memory_info().rss - before
    assert taken < 1.1 * sum(map(len, made))


def test_what_every_stage_holds_does_not_depend_on_the_number_of_layers(tmp_path):
    sizes = []
    for layers in (2, 6):
        save_tiny(tmp_path / str(layers), "llama", num_hidden_layers=layers)
        sizes.append(sum(Task(Sizes(make_sweeper(tmp_path / str(layers))), (0, 0)).cost(own=True).device.values()))
    # Tensors lie in their blocks as in the file, so what lies between them differs.
    assert abs(sizes[0] - sizes[1]) < 2 * DISK_BLOCK * len(make_sweeper(tmp_path / "2").skeleton.entries[0])


def test_where_memory_is_short_the_same_layers_stay_in_the_page_cache(checkpoint, monkeypatch):
    skeleton, read = checkpoint, []
    pager = Pager(skeleton.checkpoint, skeleton.entries, HostDevice())
    pager.page_cache = sum(map(pager.bytes_of, range(3)))
    original = Checkpoint.read_into

    def read_into(self, file, offset, buffer, *, stays):
        read.append((file, offset, stays))
        original(self, file, offset, buffer, stays=stays)

    monkeypatch.setattr(Checkpoint, "read_into", read_into)
    with pager.pages(range(8)) as pages:
        for _ in pages:
            pass
    begin = {layer: {(e.file, e.offset) for e in entries.values()} for layer, entries in enumerate(skeleton.entries)}
    first = {(file, offset): stays for file, offset, stays in read}
    assert [{first[entry] for entry in begin[layer]} for layer in range(8)] == [{True}] * 3 + [{False}] * 5


def test_a_sweep_after_one_that_had_no_memory_does_not_wait_for_it(checkpoint):
    class Short(FakeDevice):
        left = 1

        def chunk(self, nbytes):
            Short.left -= 1
            if Short.left < 0:
                raise RuntimeError("out of memory")
            return super().chunk(nbytes)

    again = Pager(checkpoint.checkpoint, checkpoint.entries, Short())
    with pytest.raises(RuntimeError, match="out of memory"):
        sums_of(again, checkpoint, again.device, 1)
    Short.left = 1000
    seen, expected = sums_of(again, checkpoint, again.device, 1)
    assert seen == expected
