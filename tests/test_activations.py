"""Boundaries come back as they were, wherever they stay, and however late the device's copies finish."""

import os

import pytest
import torch
from conftest import N_LAYERS, make_sweeper, save_tiny, token_ids
from test_paging import FakeDevice

from streamprune.activations import Boundaries
from streamprune.binding import Perturbation
from streamprune.devices import HostDevice
from streamprune.errors import OutputError
from streamprune.statistics import Statistics

SHAPE = (3, 5, 7)


def boundaries(place, transfers, tmp_path, count=8):
    return Boundaries(count, SHAPE, torch.float32, torch.device("cpu"), place, transfers, tmp_path)


def value(sweep, index):
    return torch.full(SHAPE, float(100 * sweep + index))


class Host:
    """A device that computes at once; tensors are read and written where the test says."""

    def __init__(self):
        self.transfers = HostDevice()

    def compute(self, work):
        work()

    def finish(self):
        pass


class Late(Host):
    """One that computes as late as it may."""

    def __init__(self, late):
        self.transfers = FakeDevice(late=late)

    def compute(self, work):
        self.transfers.queue("compute", work)

    def finish(self):
        self.transfers.finish_all()


@pytest.mark.parametrize("device", ["host", "copy", "compute"])
@pytest.mark.parametrize("place", ["device", "host", "scratch"])
def test_a_backward_sweep_finds_what_a_forward_sweep_left(place, device, tmp_path):
    machine = Host() if device == "host" else Late(device)
    store, seen, expected = boundaries(place, machine.transfers, tmp_path), [], []
    for sweep in range(3):
        for index in range(8):
            buffer = store.buffer(index) if index or sweep == 0 else store.take(0)
            what = value(sweep, index)
            machine.compute(lambda buffer=buffer, what=what: buffer.copy_(what))
            if index < 7:
                store.save(index)
        for index in range(6, -1, -1):
            buffer = store.take(index)
            machine.compute(lambda buffer=buffer: seen.append(buffer.clone()))
            expected.append(value(sweep, index))
    store.close()
    machine.finish()
    assert len(seen) == len(expected) == 21
    assert all(torch.equal(one, other) for one, other in zip(seen, expected, strict=True))


@pytest.mark.parametrize("micro_batch", [1, 2, 64])
def test_gradients_have_the_same_bits_wherever_boundaries_stay(tmp_path, micro_batch):
    save_tiny(tmp_path / "model", "llama", dtype=torch.float32)
    ids, results = token_ids(n=5), []
    for place in ("device", "scratch"):
        sweeper = make_sweeper(tmp_path / "model", dtype=torch.float32, micro_batch=micro_batch)
        sweeper.place, sweeper.scratch = place, tmp_path / "scratch"
        statistics, grads = Statistics(sweeper, ids, range(1, N_LAYERS), 0), []
        for draw in range(3):
            perturbation = Perturbation(0.05, (0, 0, draw))
            statistics.gradients(lambda ref, w, g, grads=grads: grads.append((ref.key, g)), perturbation)
        results.append(grads)
    for (key, grad), (other, again) in zip(*results, strict=True):
        assert key == other and torch.equal(grad, again)


def test_the_scratch_file_has_no_name_and_goes(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    store = boundaries("scratch", HostDevice(), tmp_path / "new")
    assert os.listdir(tmp_path / "new") == []
    store.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_only_three_boundaries_are_in_memory(tmp_path):
    store = boundaries("scratch", HostDevice(), tmp_path, count=40)
    assert store._buffers.nbytes == 3 * store.nbytes
    store.close()


def test_a_full_or_missing_scratch_disk_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"scratch .*file"):
        boundaries("scratch", HostDevice(), tmp_path / "file")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match=r"No space left .*hidden states"):
        boundaries("scratch", HostDevice(), tmp_path)
    monkeypatch.undo()
    store = boundaries("scratch", HostDevice(), tmp_path)
    monkeypatch.setattr(os, "pwrite", full)
    store.buffer(0)
    store.save(0)
    with pytest.raises(OutputError, match="No space left"):
        store.buffer(3)
    store.close()
