"""A method's state passes the device with its layers: each of three waits is needed, and values are those of a dict."""

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial, partialmethod
from pathlib import Path

import pytest
import torch
from fake_device import FakeDevice, LatePool

from streamprune.errors import OutputError
from streamprune.paging import blocks
from streamprune.paging.device import HostDevice
from streamprune.paging.pager import Page, schedule
from streamprune.paging.state import StateStream, aligned
from streamprune.storage.reader import DISK_BLOCK
from streamprune.storage.scratch import BlockFile

LAYERS, SHAPE = range(6), (5, 7)
BLOCK = 2 * aligned(5 * 7 * 4)


def sweep(stream, order, then, stores, work):
    """Pass the layers; `work(layer)` is compute that is queued."""
    for page in stream.along((Page(layer, {}) for layer in order), order, then, stores):
        work(page.layer)


class Forgetful(StateStream):
    """A stream that may forget what has still to leave a slot."""

    forgets = False

    def _carry(self, slot):
        super()._carry(slot)
        if self.forgets:
            slot.carried = None


def run(device, slots=3, rounds=3, forgets=False, scratch=None):
    """Count each layer's visits in the store "count", and sum what queued compute reads of it when it finally runs."""
    stream = Forgetful(dict.fromkeys(LAYERS, BLOCK), device.another(), device.another(), scratch=scratch)
    stream.slots, stream.forgets = slots, forgets
    counts, fixed, seen = stream.store("count"), stream.store("fixed"), []

    def begin(layer):
        counts[layer, "q"] = fixed[layer, "q"] = torch.full(SHAPE, float(layer))
        device.finish_all()  # what a store takes in is copied at once here

    def look(layer):
        here = counts[layer, "q"]
        device.queue("compute", lambda: seen.append((layer, here.sum().item())))

    def add(layer):
        count, other = counts.pop((layer, "q")), fixed[layer, "q"]
        device.queue("compute", lambda: count.add_(1))
        device.queue("compute", lambda: seen.append((layer, count.sum().item(), other.sum().item())))
        counts[layer, "q"] = count

    sweep(stream, LAYERS, "back", None, begin)
    for _ in range(rounds):
        sweep(stream, LAYERS[::-1], "back", None, add)
        sweep(stream, LAYERS, "again", ["count"], look)
        sweep(stream, LAYERS, "back", ["count"], look)
        assert len(counts) == len(fixed) == len(LAYERS)
    device.finish_all()
    stream.close()
    return seen


def expected(rounds=3):
    found, size = [], 35.0
    for number in range(1, rounds + 1):
        found += [(layer, size * (layer + number), size * layer) for layer in LAYERS[::-1]]
        found += 2 * [(layer, size * (layer + number)) for layer in LAYERS]
    return found


@pytest.mark.parametrize("slots", [2, 3, 4, 6, 9])
@pytest.mark.parametrize("late", ["compute", "copy 1", "copy 2"])
@pytest.mark.parametrize(
    ("piece", "pool"), [(blocks.CHUNK_BYTES, ThreadPoolExecutor), (DISK_BLOCK // 4, LatePool)], ids=["whole", "pieces"]
)
def test_the_waits_are_sufficient_whatever_finishes_late(piece, pool, late, slots, monkeypatch):
    monkeypatch.setattr(blocks, "CHUNK_BYTES", piece)
    monkeypatch.setattr(blocks, "ThreadPoolExecutor", pool)
    assert run(FakeDevice(late=late), slots) == expected()


@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize(("without", "late"), [("copied", "copy 1"), ("consumed", "compute")])
def test_compute_waits_for_its_state_and_copies_for_compute(without, late, slots):
    assert run(FakeDevice(without=without, late=late), slots) != expected()


@pytest.mark.parametrize("slots", [2, 3, 4])
def test_fetching_waits_for_what_leaves_the_slot(slots):
    assert run(FakeDevice(late="copy 2"), slots, forgets=True) != expected()


class Measured(FakeDevice):
    """A device that notes, of each copy, its bytes and how many of its stream's were not through when it was queued."""

    def __init__(self):
        super().__init__()
        self.noted = {}

    def copy(self, target, source):
        queued = self.noted.setdefault(self.stream, [])
        queued.append((len(target), sum(not through() for _, _, through in queued)))
        event = super().copy(target, source)
        queued[-1] += ((lambda: self.done[event[0]] >= event[1]),)
        return event


def test_a_layer_is_fetched_in_pieces_of_which_few_are_on_their_way(monkeypatch):
    """What waits for the link beside state waits for these, and not for a layer of it."""
    monkeypatch.setattr(blocks, "CHUNK_BYTES", DISK_BLOCK // 4)
    device = Measured()
    assert run(device, 3) == expected()
    sizes, before, _ = zip(*device.noted["copy 1"], strict=True)
    assert set(sizes) == {DISK_BLOCK // 4} and len(sizes) % 4 == 0
    # Those of a layer, and those of the layer before that nobody waited for yet.
    assert max(before) < 2 * blocks.CHUNKS


@pytest.mark.parametrize("then", ["back", "again"])
@pytest.mark.parametrize("slots", [2, 3, 4, 6])
def test_a_slot_whose_state_is_leaving_is_not_the_next_to_be_filled(slots, then):
    held = [None] * slots
    for _ in range(4):
        steps = schedule(range(9), held, then, busy=2)
        for number, step in enumerate(steps):
            before = [each.slot for each in steps[max(0, number - min(2, slots - 1)) : number]]
            assert not step.read or step.slot not in before
            held[step.slot] = step.layer


# Staged: what the device cannot copy from itself, by threads that are as late as they may, a block of the disk at once.


@pytest.fixture(params=["memory", "scratch"])
def staged(request, tmp_path, monkeypatch):
    """What `run` is given for state that is staged, on a device that refuses to register memory."""
    monkeypatch.setattr(blocks, "ThreadPoolExecutor", LatePool)
    monkeypatch.setattr(blocks, "CHUNK_BYTES", DISK_BLOCK)

    def given(**device):
        scratch = {"scratch": tmp_path} if request.param == "scratch" else {}
        return {"device": FakeDevice(registers=False, **device), **scratch}

    return given


@pytest.mark.parametrize("slots", [2, 3, 4, 6, 9])
@pytest.mark.parametrize("late", ["compute", "copy 1", "copy 2"])
def test_the_waits_are_sufficient_where_copies_are_staged(late, slots, staged):
    assert run(**staged(late=late), slots=slots) == expected()


@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize(
    ("without", "late"), [("copied", "copy 1"), ("consumed", "compute"), ("chunk", "copy 1"), ("chunk", "copy 2")]
)
def test_each_wait_is_needed_where_copies_are_staged(without, late, slots, staged):
    assert run(**staged(without=without, late=late), slots=slots) != expected()


@pytest.mark.parametrize("slots", [2, 3, 4])
def test_reading_waits_for_what_is_written_out_of_the_slot(slots, staged):
    assert run(**staged(late="copy 2"), slots=slots, forgets=True) != expected()


class Refusing(FakeDevice):
    """A device that has no pinned memory for chunks left."""

    def chunk(self, nbytes):
        raise MemoryError("pinned")


def test_a_stream_without_chunks_lets_go_of_its_file(tmp_path):
    device = Refusing(registers=False)
    stream = StateStream(dict.fromkeys(LAYERS, BLOCK), device.another(), device.another(), scratch=tmp_path)
    with pytest.raises(MemoryError, match="pinned"):
        stream._opening.result()
    opened = [os.readlink(each) for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]
    assert not [name for name in opened if name.startswith(str(tmp_path))]
    stream.close()


class AtOnce(HostDevice):
    """A CPU, on which queued compute is done at once."""

    def queue(self, stream, work):
        work()

    def finish_all(self): ...


@pytest.mark.parametrize("forgets", [False, True])
def test_on_a_cpu_slots_are_read_and_written_themselves(forgets, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "ThreadPoolExecutor", LatePool)
    assert (run(AtOnce(), scratch=tmp_path, forgets=forgets) == expected()) is not forgets
    assert not list(tmp_path.iterdir())


def test_what_is_read_and_written_can_go_around_the_page_cache(tmp_path, monkeypatch):
    moved = []

    def noted(self, tensor, offset, move):
        moved.append((move, offset % DISK_BLOCK, tensor.nbytes % DISK_BLOCK, tensor.data_ptr() % DISK_BLOCK))
        getattr(BlockFile, f"{move}_")(self, tensor, offset)

    for move in ("read", "write"):
        monkeypatch.setattr(BlockFile, f"{move}_", getattr(BlockFile, move), raising=False)
        monkeypatch.setattr(BlockFile, move, partialmethod(noted, move=move))
    assert run(AtOnce(), scratch=tmp_path) == expected()
    assert set(moved) == {("read", 0, 0, 0), ("write", 0, 0, 0)}


@pytest.mark.parametrize("slots", [2, 3])
def test_a_sweep_that_reads_no_state_leaves_all_as_it_is(slots):
    device, passed = FakeDevice(), []
    stream = StateStream(dict.fromkeys(LAYERS, BLOCK), device.another(), device.another())
    stream.slots, store = slots, stream.store("count")

    def begin(layer):
        store[layer, "q"] = torch.full(SHAPE, float(layer))
        device.finish_all()

    sweep(stream, LAYERS, "back", [], passed.append)
    assert not stream._slots and passed == list(LAYERS), "nothing is kept yet, so no memory is taken"
    sweep(stream, LAYERS, "back", None, begin)
    device.finish_all()
    queued, held = {name: len(queue) for name, queue in device.queues.items()}, [s.layer for s in stream._slots]
    for stores in ([], ["other"]):
        sweep(stream, LAYERS, "back", stores, passed.append)
    assert {name: len(queue) for name, queue in device.queues.items()} == queued
    assert [slot.layer for slot in stream._slots] == held and passed == 3 * list(LAYERS)


def test_memory_is_registered_beside_a_sweep_that_keeps_nothing():
    through = threading.Event()

    class Slow(FakeDevice):
        def arena(self, nbytes):
            assert through.wait(60), "the sweep waits for it"
            return super().arena(nbytes)

    device, passed = Slow(), []
    stream = StateStream(dict.fromkeys(LAYERS, BLOCK), device.another(), device.another())
    sweep(stream, LAYERS, "back", [], passed.append)
    assert passed == list(LAYERS)
    through.set()
    sweep(stream, LAYERS[::-1], "back", None, lambda layer: stream.store("count").update({(layer, "q"): torch.ones(3)}))
    assert len(stream.held) == len(LAYERS)
    stream.close()


@pytest.mark.parametrize("when", ["pwrite", "preadv"])
def test_a_scratch_disk_that_fails_in_a_sweep_is_named(when, tmp_path, monkeypatch):
    def fail(*given):
        raise OSError(errno.EIO, "Input/output error")

    stream = StateStream(dict.fromkeys(LAYERS, BLOCK), HostDevice(), HostDevice(), scratch=tmp_path)
    stream.slots, store = 2, stream.store("count")
    monkeypatch.setattr(os, when, fail)
    with pytest.raises(OutputError, match=f"--scratch {tmp_path}: Input/output error; "):
        for _ in range(2):
            sweep(stream, LAYERS, "again", None, lambda layer: store.update({(layer, "q"): torch.ones(SHAPE)}))
    stream.close()
    assert not [thread for thread in threading.enumerate() if "streamprune-state" in thread.name]


# In a journal.


def saved_in_turn(device):
    """What a journal's stores hold after each layer of some sweeps, and what they should."""
    stores = {"count": {}, "sum": {}}
    stream = StateStream(dict.fromkeys(LAYERS, BLOCK), device.another(), device.another(), saved=stores)
    counts, sums = stream.store("count"), stream.store("sum")
    found, wanted, now = [], [], {"count": {}, "sum": {}}

    def visit(number, layer):
        if number:
            count = counts.pop((layer, "q"))
            device.queue("compute", lambda: count.add_(1))
        else:
            count = torch.full(SHAPE, float(layer))
        counts[layer, "q"] = count
        if number % 2:
            del sums[layer, "q"]
            del now["sum"][layer, "q"]
        else:
            sums[layer, "q"] = now["sum"][layer, "q"] = torch.full(SHAPE, float(number))
        now["count"][layer, "q"] = torch.full(SHAPE, float(layer + number))
        if not number:
            device.finish_all()
        stream.save()
        found.append({name: dict(held) for name, held in stores.items()})
        wanted.append({name: dict(held) for name, held in now.items()})

    for number in range(4):
        sweep(stream, LAYERS[:: 1 - 2 * (number % 2)], "back", None, partial(visit, number))
    return found, wanted


def alike(one, other):
    return [(set(a), [float(t.sum()) for t in a.values()]) for each in one for a in each.values()] == [
        (set(a), [float(t.sum()) for t in a.values()]) for each in other for a in each.values()
    ]


@pytest.mark.parametrize("late", ["compute", "copy 1", "copy 2"])
def test_a_journal_is_given_what_has_arrived(late):
    assert alike(*saved_in_turn(FakeDevice(late=late)))
    assert not alike(*saved_in_turn(FakeDevice(late=late, without="chunk")))
