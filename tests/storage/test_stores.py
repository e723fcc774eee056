"""What methods keep between sweeps comes back as it was, or as near as a narrower dtype has it."""

import os

import pytest
import torch

from streamprune import PruneConfig
from streamprune.errors import OutputError, UsageError
from streamprune.storage.tensor_store import Memory, Narrow, Scratch, make_store


@pytest.mark.parametrize("make", [Memory, None])
def test_a_store_is_a_mapping(make, tmp_path):
    store, expected = (make or (lambda: Scratch(tmp_path)))(), {}
    generator = torch.Generator().manual_seed(0)
    for step in range(200):
        key = (int(torch.randint(0, 5, (), generator=generator)), "abc"[step % 3])
        if key in expected and step % 4 == 0:
            assert torch.equal(store.pop(key), expected.pop(key))
        else:
            size = 1 + int(torch.randint(0, 3, (), generator=generator))
            expected[key] = torch.randn((size, 4), generator=generator, dtype=torch.float64)
            store[key] = expected[key].T if step % 2 else expected[key]
            expected[key] = expected[key].T.contiguous() if step % 2 else expected[key]
        assert sorted(store) == sorted(expected) and len(store) == len(expected)
        assert all(torch.equal(store[key], value) for key, value in expected.items())
    with pytest.raises(KeyError):
        store[9, "none"]


def test_a_scratch_store_uses_its_room_again_and_leaves_no_name(tmp_path):
    store, before = Scratch(tmp_path), len(os.listdir("/proc/self/fd"))
    for step in range(10):
        store[0, "a"] = torch.full((100,), float(step))
        assert float(store.pop((0, "a"))[7]) == step
    assert os.fstat(store._descriptor).st_size == 400
    assert os.listdir(tmp_path) == []
    del store
    assert len(os.listdir("/proc/self/fd")) == before - 1


def test_a_scratch_disk_that_is_full_is_named(tmp_path, monkeypatch):
    store = make_store("delta", scratch=tmp_path)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match=f"--scratch {tmp_path}.*No space left"):
        store[0, "a"] = torch.ones(3)


def test_a_narrow_store_rounds_float32_and_nothing_else(tmp_path):
    store, value = make_store("delta", scratch=tmp_path, dtype="bfloat16"), torch.randn(50, 20)
    assert isinstance(store, Narrow)
    store[0, "a"], store[0, "b"] = value, torch.tensor(1.0 + 1e-12, dtype=torch.float64)
    assert store[0, "a"].dtype == torch.float32 and torch.equal(store[0, "a"], value.bfloat16().float())
    assert float(store[0, "b"]) == 1.0 + 1e-12


def test_only_what_was_measured_is_offered(tmp_path):
    with pytest.raises(UsageError, match="--state-dtype int8: choose auto or float32 or bfloat16"):
        PruneConfig("model", tmp_path, state_dtype="int8")
