"""A method's state passes the device with its layers: each of three waits is needed, and values are those of a dict."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from fake_device import FakeDevice
from safetensors.torch import load_file
from tiny_models import N_LAYERS, make_sweeper, save_tiny, token_ids

from streamprune import PruneConfig, prune
from streamprune.methods.sinks import UnitScores
from streamprune.methods.table import METHODS, resolve_settings
from streamprune.paging import state
from streamprune.paging.device import HUGE_PAGE, CudaDevice
from streamprune.paging.pager import Page, schedule
from streamprune.paging.state import STATE_PIECES, StateStream, aligned
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


def run(device, slots=3, rounds=3, forgets=False):
    """Count each layer's visits in the store "count", and sum what queued compute reads of it when it finally runs."""
    stream = Forgetful(dict.fromkeys(LAYERS, BLOCK), device.another(), device.another())
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
    return seen


def expected(rounds=3):
    found, size = [], 35.0
    for number in range(1, rounds + 1):
        found += [(layer, size * (layer + number), size * layer) for layer in LAYERS[::-1]]
        found += 2 * [(layer, size * (layer + number)) for layer in LAYERS]
    return found


@pytest.mark.parametrize("slots", [2, 3, 4, 6, 9])
@pytest.mark.parametrize("late", ["compute", "copy 1", "copy 2"])
@pytest.mark.parametrize("piece", [state.STATE_PIECE_BYTES, 64])
def test_the_waits_are_sufficient_whatever_finishes_late(piece, late, slots, monkeypatch):
    monkeypatch.setattr(state, "STATE_PIECE_BYTES", piece)
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
    monkeypatch.setattr(state, "STATE_PIECE_BYTES", 64)
    device = Measured()
    assert run(device, 3) == expected()
    sizes, before, _ = zip(*device.noted["copy 1"], strict=True)
    assert max(sizes) == 64 and len(sizes) >= 3 * 3 * len(LAYERS), "140 bytes are three pieces"
    # Those of a layer, and those of the layer before that nobody waited for yet.
    assert max(before) < 2 * STATE_PIECES


def test_a_sweep_that_reads_no_state_moves_none():
    device = Measured()
    stream = StateStream(dict.fromkeys(LAYERS, BLOCK), device.another(), device.another())
    counts = stream.store("count")

    def add(layer):
        counts[layer, "q"] = torch.full(SHAPE, float(layer))
        device.finish_all()

    sweep(stream, LAYERS[::-1], "back", None, add)
    moved, held = len(device.noted["copy 2"]), [slot.layer for slot in stream._slots]
    sweep(stream, LAYERS, "back", [], lambda layer: None)
    assert len(device.noted["copy 2"]) == moved == len(LAYERS) - 3 and "copy 1" not in device.noted
    assert [slot.layer for slot in stream._slots] == held and sorted(held) == [0, 1, 2]


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


# Methods.


class Immediate(FakeDevice):
    """A device that computes at once, and copies when compute waits for it."""

    def compute_waits(self, copied):
        self.finish(copied)


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


@pytest.mark.parametrize("slots", [2, 3, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("method", "settings"), KEEPING, ids=str)
def test_scores_are_those_of_state_in_memory(method, settings, dtype, slots, tmp_path):
    save_tiny(tmp_path, "llama", dtype=torch.float32)
    layers, device = range(1, N_LAYERS), Immediate()
    sweeper = make_sweeper(tmp_path)
    elements = sum(sweeper.skeleton.shapes(1)[name].numel() + 16 for name in sweeper.scored[1])
    blocks = dict.fromkeys(layers, 2 * 4 * elements)
    stream = StateStream(blocks, device.another(), device.another(), dtype=getattr(torch, dtype), poison=True)
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
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_a_run_gives_the_same_bytes(method, granularity, settings, state_dtype, tmp_path, monkeypatch):
    save_tiny(tmp_path / "model", "llama", dtype=torch.float32, head_dim=8, intermediate_size=40)
    found, device = [], Immediate()
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


def test_an_arena_is_registered_with_the_gpu_and_given_back(monkeypatch):
    """The calls of CUDA's runtime that this makes, without a GPU."""
    called, error = [], [0]
    runtime = SimpleNamespace(
        cudaHostRegister=lambda pointer, nbytes, flags: called.append((pointer, nbytes, flags)) or error[0],
        cudaHostUnregister=lambda pointer: called.append(pointer),
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    device = CudaDevice.__new__(CudaDevice)
    device.device, stream = torch.device("cuda"), SimpleNamespace(synchronize=lambda: called.append("through"))
    device.compute = device.copies = stream
    memory, registered = device.arena(3 << 20)
    assert registered and len(memory) == 3 << 20 and memory.data_ptr() % HUGE_PAGE == 0
    device.release(memory)
    assert called == [(memory.data_ptr(), 3 << 20, 0), "through", "through", memory.data_ptr()]
    error[0] = 2  # out of memory: a limit on what may be locked
    assert device.arena(4096)[1] is False
