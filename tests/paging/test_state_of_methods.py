"""Scores and outputs are the same wherever a method's state stays, and however it gets to the device."""

import io
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from fake_device import Immediate
from marks import slow
from safetensors.torch import load_file
from tiny_models import N_LAYERS, make_sweeper, save_tiny, token_ids

from streamprune import PruneConfig, prune
from streamprune.methods.sinks import UnitScores
from streamprune.methods.table import METHODS, resolve_settings
from streamprune.paging.device import HUGE_PAGE, CudaDevice, HostDevice
from streamprune.paging.state import StateStream, aligned
from streamprune.pipeline.progress import Progress
from streamprune.pipeline.source import STAGED
from streamprune.storage.tensor_store import make_store
from streamprune.streaming.statistics import Statistics

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
        ("bernoulli", "units", {"steps": 3, "repaired": "yes"}),
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
        monkeypatch.setattr("streamprune.planning.placement.places", lambda config, gpu: ["host"])
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
