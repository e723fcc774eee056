"""Hidden states come back as they were, wherever they stay, and however late the device's copies finish."""

import os
import threading
import time

import pytest
import torch
from fake_device import FakeDevice
from tiny_models import N_LAYERS, make_sweeper, save_tiny, token_ids

from streamprune.errors import OutputError
from streamprune.paging.device import HostDevice
from streamprune.paging.hidden_states import Activations, ahead, whole
from streamprune.streaming.binder import Perturbation
from streamprune.streaming.statistics import Statistics

N = 7  # sequences


def activations(place, transfers, tmp_path):
    return Activations(torch.device("cpu"), place, transfers, tmp_path)


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
        self.transfers = FakeDevice(late=late.removesuffix(", staged"), registers="staged" not in late)

    def compute(self, work):
        self.transfers.queue("compute", work)

    def finish(self):
        self.transfers.finish_all()


def made(machine, shape, number):
    """A tensor that the device will have computed."""
    tensor = torch.full(shape, -1.0)
    machine.compute(lambda: tensor.fill_(float(number)))
    return tensor


PLACES = [
    ("device", "host"),
    *((place, device) for place in ("host", "scratch") for device in ("host", "copy", "compute")),
    *(("host", f"{device}, staged") for device in ("copy", "compute")),
]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("place,device", PLACES)
def test_a_backward_sweep_finds_what_a_forward_sweep_left(place, device, size, tmp_path):
    machine = Host() if device == "host" else Late(device)
    owner, seen, expected = activations(place, machine.transfers, tmp_path), [], []
    parts = [slice(start, min(start + size, N)) for start in range(0, N, size)]

    def look(part):
        machine.compute(lambda: seen.append(part.clone()))

    kept, numbers = owner.several(5, (N, 5, 7), torch.float32), iter(range(1000))
    for sweep in range(3):
        left = {}
        for index in range(5):
            for part in parts:
                if index and sweep:
                    look(kept[index - 1][part])
                    expected.append(left[index - 1, part.start])
                number = next(numbers)
                kept[index][part] = made(machine, (part.stop - part.start, 5, 7), number)
                left[index, part.start] = torch.full((part.stop - part.start, 5, 7), float(number))
        for index in range(4, -1, -1):
            for part in parts:
                if index and part.stop == N:
                    ahead(kept[index - 1], parts[0])
                look(kept[index][part])
                expected.append(left[index, part.start])
    machine.finish()
    owner.close()
    assert len(seen) == len(expected) >= 15
    assert all(torch.equal(one, other) for one, other in zip(seen, expected, strict=True))


@pytest.mark.parametrize("registers", [True, False])
def test_memory_that_is_not_registered_is_copied_from_by_way_of_memory_that_is(registers):
    class Watched(FakeDevice):
        def copy(self, target, source):
            copied.append((target.data_ptr(), source.data_ptr()))
            return super().copy(target, source)

    device, copied, said = Watched(registers=registers), [], []
    owner = Activations(torch.device("cpu"), "host", device, None, lambda: said.append("staged"))
    (states,) = owner.several(1, (N, 5, 7), torch.float32)
    states[slice(0, N)] = torch.ones(N, 5, 7)
    assert float(whole(states).sum()) == N * 5 * 7 and float(states[slice(0, N)].sum()) == N * 5 * 7
    stays = states._place.result().data_ptr()
    assert len(copied) == 2 and all((stays in each) is registers for each in copied)
    assert bool(said) is not registers
    owner.close()


@pytest.mark.parametrize("place", ["device", "host", "staged", "scratch"])
def test_what_is_written_in_place_is_read_in_the_next_pass(place, tmp_path):
    transfers = FakeDevice(registers=place != "staged") if place in ("host", "staged") else HostDevice()
    owner = activations("host" if place == "staged" else place, transfers, tmp_path)
    (states,) = owner.several(1, (N, 5, 7), torch.float32)
    for start in range(N):
        states[slice(start, start + 1)] = torch.full((1, 5, 7), float(start))
    for _ in range(3):
        for start in range(0, N, 2):
            part = slice(start, min(start + 2, N))
            value = states[part] * 2 + 1
            states[part] = value
    expected = torch.arange(N, dtype=torch.float32) * 8 + 7
    assert torch.equal(whole(states)[:, 0, 0], expected)
    owner.close()


def test_what_was_brought_ahead_and_is_written_anew_is_read_anew(tmp_path):
    owner = activations("scratch", HostDevice(), tmp_path)
    (states,) = owner.several(1, (N, 5, 7), torch.float32)
    states[slice(0, N)] = torch.zeros(N, 5, 7)
    states[slice(0, 2)]  # 2:4 comes ahead
    states[slice(3, 5)] = torch.ones(2, 5, 7)
    assert states[slice(2, 4)][:, 0, 0].tolist() == [0, 1]
    owner.close()


@pytest.mark.parametrize("micro_batch", [1, 2, 64])
def test_gradients_have_the_same_bits_wherever_hidden_states_stay(tmp_path, micro_batch):
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
    owner = activations("scratch", HostDevice(), tmp_path / "new")
    states = owner.several(2, (N, 5, 7), torch.float32)
    assert os.listdir(tmp_path / "new") == [] and len(os.listdir("/proc/self/fd")) > before
    del states
    owner.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_scratch_directory_that_goes_does_no_harm(tmp_path):
    owner = activations("scratch", HostDevice(), tmp_path / "gone")
    before = owner.several(1, (N, 5, 7), torch.float32)[0]
    (tmp_path / "gone").rmdir()
    after = owner.several(1, (N, 5, 7), torch.float32)[0]
    for number, states in enumerate((before, after)):
        states[slice(0, N)] = torch.full((N, 5, 7), float(number))
    assert [float(whole(states)[N - 1, 4, 6]) for states in (before, after)] == [0, 1]
    owner.close()


def test_room_is_used_again(tmp_path):
    """A forward sweep makes new hidden states at every layer; the file holds those of two or three."""
    owner, hidden = activations("scratch", HostDevice(), tmp_path), None
    for layer in range(50):
        (output,) = owner.several(1, (N, 5, 7), torch.float32)
        output[slice(0, N)] = torch.full((N, 5, 7), float(layer))
        hidden = output
    assert float(whole(hidden)[0, 0, 0]) == 49
    assert os.fstat(owner._descriptor).st_size <= 2 * hidden.nbytes
    owner.close()


def test_a_full_or_missing_scratch_disk_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"scratch .*file"):
        activations("scratch", HostDevice(), tmp_path / "file").several(1, (N, 5, 7), torch.float32)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match=r"No space left .*hidden states"):
        activations("scratch", HostDevice(), tmp_path).several(1, (N, 5, 7), torch.float32)
    monkeypatch.undo()
    owner = activations("scratch", HostDevice(), tmp_path)
    (states,) = owner.several(1, (N, 5, 7), torch.float32)
    monkeypatch.setattr(os, "pwrite", full)
    states[slice(0, 2)] = torch.zeros(2, 5, 7)
    with pytest.raises(OutputError, match="No space left"):
        states[slice(0, 2)]
    owner.close()


def test_memory_is_given_back_also_where_what_was_before_it_is_called_off():
    """A sweep that fails leaves work in the queue, and registered memory behind it."""
    given, held, closing = [], threading.Event(), threading.Event()

    class Slow(FakeDevice):
        def copy(self, target, source):
            assert held.wait(10)
            return super().copy(target, source)

        def release(self, arena):
            given.append(arena.nbytes)

    owner = Activations(torch.device("cpu"), "host", Slow(), None)
    (states,) = owner.several(1, (2, 5, 7), torch.float32)
    for row in range(2):  # the first is copied when the second is called off
        states[slice(row, row + 1)] = torch.ones(1, 5, 7)
    nbytes = states.nbytes
    del states
    assert not given
    shutdown = owner._worker.shutdown
    owner._worker.shutdown = lambda **options: (closing.set(), shutdown(**options))
    thread = threading.Thread(target=owner.close)
    thread.start()
    assert closing.wait(10)
    time.sleep(0.05)  # until what waits is called off
    held.set()
    thread.join(10)
    assert given == [nbytes]
