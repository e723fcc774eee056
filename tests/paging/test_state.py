"""A method's state passes the device with its layers: each of three waits is needed, and values are those of a dict."""

import errno
import io
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from fake_device import FakeDevice, Immediate, LatePool
from marks import slow
from safetensors.torch import load_file
from tiny_models import N_LAYERS, make_sweeper, save_tiny, token_ids

from streamprune import PruneConfig, prune
from streamprune.errors import OutputError
from streamprune.methods.sinks import UnitScores
from streamprune.methods.table import METHODS, resolve_settings
from streamprune.paging import blocks
from streamprune.paging.device import HUGE_PAGE, CudaDevice, HostDevice
from streamprune.paging.pager import Page, schedule
from streamprune.paging.state import StateStream, aligned
from streamprune.pipeline.progress import Progress
from streamprune.pipeline.source import STAGED
from streamprune.storage.reader import DISK_BLOCK
from streamprune.storage.tensor_store import make_store
from streamprune.streaming.statistics import Statistics

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


@pytest.mark.parametrize("forgets", [False, True])
def test_on_a_cpu_slots_are_read_and_written_themselves(forgets, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "ThreadPoolExecutor", LatePool)
    assert (run(AtOnce(), scratch=tmp_path, forgets=forgets) == expected()) is not forgets
    assert not list(tmp_path.iterdir())


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


def saved_in_turn(device, without_saving=()):
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


# Methods.


class AtOnce(HostDevice):
    """A CPU, on which queued compute is done at once."""

    def queue(self, stream, work):
        work()

    def finish_all(self): ...


KEEPING = [
    ("moreau", {"steps": 3}),
    ("moreau-gs", {"steps": 3, "eta_quantile": 0.2}),
    ("moreau-gs", {"steps": 2, "draws": 2}),
    ("smoothgrad", {"draws": 3}),
    ("gblm", {}),
]


def scores_of(path, method, settings, layers, stream=None, dtype="float32"):
    """The scores of a method that keeps its state in memory, or lets it pass with the layers."""
    sweeper = make_sweeper(path, dtype=torch.float32)
    sweeper.state, memory = stream, partial(make_store, dtype=dtype)
    streamed = {state.name for state in METHODS[method].states}
    store = memory if stream is None else lambda name: stream.store(name) if name in streamed else memory(name)
    statistics = Statistics(sweeper, token_ids(n=3, seq=12), layers, 0, store=store)
    sink = UnitScores(sweeper.skeleton.all_units(layers))
    METHODS[method].score(statistics, resolve_settings(method, settings), sink)
    return {(layer, kind): value for layer, kinds in sink.values.items() for kind, value in kinds.items()}


@pytest.mark.parametrize("slots", [2, slow(3), 8])
@pytest.mark.parametrize("where", ["arena", "staged", "scratch", "cpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("method", "settings"), KEEPING, ids=str)
def test_scores_are_those_of_state_in_memory(method, settings, dtype, where, slots, tmp_path):
    save_tiny(tmp_path, "llama", dtype=torch.float32)
    layers, device = range(1, N_LAYERS), HostDevice() if where == "cpu" else Immediate(registers=where != "staged")
    sweeper = make_sweeper(tmp_path)
    nbytes = sum(aligned(4 * sweeper.skeleton.shapes(1)[name].numel()) for name in sweeper.scored[1])
    stream = StateStream(
        dict.fromkeys(layers, 2 * nbytes + aligned(8) * len(sweeper.scored[1])),
        device.another(),
        device.another(),
        dtype=getattr(torch, dtype),
        scratch=tmp_path / "scratch" if where in ("scratch", "cpu") else None,
        poison=True,
    )
    stream.slots = slots
    found = scores_of(tmp_path, method, settings, layers, stream, dtype)
    expected = scores_of(tmp_path, method, settings, layers, dtype=dtype)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    assert not stream.held, "the last sweep takes what was kept"


@pytest.mark.parametrize(
    ("method", "granularity", "settings"),
    [
        ("moreau-gs", "units", {"steps": 3, "eta_quantile": 0.2}),
        ("moreau", "layers", {"steps": 2, "draws": 2}),
        ("smoothgrad", "weights", {"draws": 3}),
        ("gblm", "2:4", {}),
    ],
)
@pytest.mark.parametrize(("state_dtype", "registers"), [("float32", True), ("bfloat16", True), ("float32", False)])
def test_a_run_gives_the_same_bytes(method, granularity, settings, state_dtype, registers, tmp_path, monkeypatch):
    save_tiny(tmp_path / "model", "llama", dtype=torch.float32, head_dim=8, intermediate_size=40)
    found, device = [], Immediate(registers=registers)
    for name in ("memory", "passing"):
        config = PruneConfig(
            str(tmp_path / "model"),
            tmp_path / name,
            method,
            settings,
            granularity,
            layers=(1, 4),
            samples=3,
            seq_len=16,
            state_dtype=state_dtype,
            evaluate=False,
        )
        found.append(load_file(prune(config).output / "model.safetensors"))
        monkeypatch.setattr("streamprune.paging.device.paging_device", lambda *given, **options: device)
    assert len(device.queues) == 4, "copies to the device and from it have streams of their own"
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("registers", [True, False])
def test_it_is_said_once_that_copies_are_staged(registers, tmp_path, monkeypatch):
    """Of hidden states, of what the method keeps, in the scoring and the repair."""
    save_tiny(tmp_path / "model", "llama", dtype=torch.float32)
    given = {"layers": (1, 4), "samples": 3, "seq_len": 16, "evaluate": False, "micro_batch": 1}
    given |= {"compensate": True, "compensate_tokens": 64}
    model, outputs, said = str(tmp_path / "model"), [], io.StringIO()
    for name in ("memory", "staged"):
        config = PruneConfig(model, tmp_path / name, "moreau", {"steps": 2}, **given)
        outputs.append(load_file(prune(config, Progress(said)).output / "model.safetensors"))
        monkeypatch.setattr("streamprune.planning.placement._places", lambda config, gpu: ["host"])
        for where in ("streamprune.paging.device", "streamprune.streaming.sweeper"):
            monkeypatch.setattr(f"{where}.paging_device", lambda *a, **b: Immediate(registers=registers))
    assert said.getvalue().count(STAGED) == (0 if registers else 1)
    assert all(torch.equal(outputs[0][name], outputs[1][name]) for name in outputs[0])


def test_an_arena_is_registered_with_the_gpu_and_given_back(monkeypatch):
    """The calls of CUDA's runtime that this makes, without a GPU."""
    called, error = [], [0]
    runtime = SimpleNamespace(
        cudaHostRegister=lambda pointer, nbytes, flags: called.append((pointer, nbytes, flags)) or error[0],
        cudaHostUnregister=lambda pointer: called.append(pointer),
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    stream = SimpleNamespace(synchronize=lambda: called.append("through"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    device = CudaDevice(torch.device("cuda"))
    memory, registered = device.arena(3 << 20)
    assert registered and len(memory) == 3 << 20 and memory.data_ptr() % HUGE_PAGE == 0
    device.release(memory)
    assert called == [(memory.data_ptr(), 3 << 20, 0), "through", "through", memory.data_ptr()]
    assert device.registers

    def launch(*given, **options):
        called.append("launched")
        raise RuntimeError("what the call before left behind")

    monkeypatch.setattr(torch, "ones", launch)
    called.clear()
    error[0] = 2  # out of memory: a limit on what may be locked
    memory, registered = device.arena(4096)
    device.release(memory)
    assert not registered and called == [(memory.data_ptr(), 4096, 0), "launched"], "it is no error of what comes next"
    assert not CudaDevice(torch.device("cuda")).registers
