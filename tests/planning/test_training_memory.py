"""Memory of a streamed training: hidden states spill where they do not fit, and nothing that is learnt changes."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import make_sweeper

from streamprune.errors import StreampruneError
from streamprune.paging.hidden_states import Spilled
from streamprune.pipeline.recovery_work import _measured
from streamprune.pipeline.source import Source
from streamprune.planning.placement import DRIFT, MARGIN
from streamprune.planning.training_memory import WHERE_IT_DOES_NOT_FIT, TrainingSizes, _held, place_training
from streamprune.recovery.course import Course
from streamprune.recovery.lora import new_adapter
from streamprune.recovery.streamed import train_streamed
from streamprune.streaming.costs import Sizes
from streamprune.streaming.sweeper import Sweeper
from streamprune.texts.instructions import Example

SHAPE = (24, 64)


def sweeper_in(model: Path, budget: int, scratch: Path | None) -> Sweeper:
    """A sweeper that was placed within so many bytes."""
    sweeper = make_sweeper(model, dtype=torch.float32, micro_batch=2)
    config = SimpleNamespace(gpu_memory=None, host_memory=budget, scratch=scratch, resume=False)
    place_training(sweeper, config, TrainingSizes(SHAPE), baseline=0, memory=budget)
    return sweeper


def smallest(model: Path, scratch: Path | None) -> int:
    """The smallest budget that a refusal names, in bytes, without what a process takes more or less by chance."""
    with pytest.raises(StreampruneError, match="--host-memory") as refused:
        sweeper_in(model, 1000, scratch)
    assert "--batch" in str(refused.value) and ("--scratch" in str(refused.value)) == (scratch is None)
    (named,) = (word for word in str(refused.value).replace(",", "").split() if word.endswith("MiB"))
    return (int(named.removesuffix("MiB")) << 20) - DRIFT


def test_the_budget_that_a_refusal_names_is_enough(tiny_llama: Path, tmp_path: Path) -> None:
    alone, spilled = smallest(tiny_llama, None), smallest(tiny_llama, tmp_path)
    assert spilled < alone
    assert sweeper_in(tiny_llama, alone, None).place == "device"
    assert sweeper_in(tiny_llama, spilled, tmp_path).place == "scratch"


def test_spilled_hidden_states_change_nothing_that_is_learnt(tiny_llama: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    found = [Example(ids, ids) for ids in torch.randint(0, 256, (30, SHAPE[1]), generator=generator)]
    course = Course.of(len(found), SHAPE[0], 1.0, None, 1e-2, 0, 0)
    adapters = []
    for scratch in (None, tmp_path):
        sweeper = sweeper_in(tiny_llama, smallest(tiny_llama, scratch), scratch)
        assert isinstance(sweeper.embed(found[0].ids[None], 1), Spilled) == (scratch is not None)
        first = new_adapter(sweeper.skeleton, 2, 4.0, 0)
        adapters.append(train_streamed(sweeper, first, found, course, dropout=0.1).adapter)
        sweeper.close()
    for one, other in zip(*(each.parameters for each in adapters), strict=True):
        assert one.equal(other)


@pytest.mark.parametrize("name", ["the perplexity", "the held-out loss", "merging"])
def test_what_is_measured_and_merged_is_planned_too(name: str, tiny_llama: Path) -> None:
    """Each is refused by its name, with its own remedy, where it takes more than a step of few tokens."""
    sweeper = make_sweeper(tiny_llama, dtype=torch.float32, micro_batch=2)
    measured = {} if name == "merging" else {name: (64, 128)}
    given = TrainingSizes((1, 2), measured, merged=name == "merging")
    config = SimpleNamespace(gpu_memory=None, host_memory=1000, scratch=None, resume=False)
    with pytest.raises(StreampruneError) as refused:
        place_training(sweeper, config, given, baseline=0, memory=1000)
    assert str(refused.value).startswith(f"{name} of --streamed") and WHERE_IT_DOES_NOT_FIT[name] in str(refused.value)
    assert ("--scratch" in str(refused.value)) == (name != "merging")


def test_all_that_a_recovery_measures_has_a_remedy() -> None:
    example = Example(torch.zeros(8, dtype=torch.int64), torch.zeros(8, dtype=torch.int64))
    found = _measured(torch.zeros(3, 16), [example] * 2, 8)
    assert sorted(found.values()) == [(2, 8), (3, 16)] and set(found) < set(WHERE_IT_DOES_NOT_FIT)
    assert not _measured(None, [], 8)


def test_the_stage_that_does_not_fit_on_a_gpu_is_named(tiny_llama: Path) -> None:
    """An adapter on the host is much more than what a GPU lacks; it is not what does not fit."""
    given = TrainingSizes((1, 8), {}, 30 << 20, merged=True)
    with Source(str(tiny_llama), planned=torch.device("cuda"), dtype="bfloat16", scope="matrices").open() as sweeper:
        held = _held(Sizes(sweeper), given, "device", resume=False)
        step, merging = held["a step"], held["merging"]
        assert step[0] < merging[0] and step[1] > merging[1]
        budget = int((step[0] + merging[0]) / 2 / (1 - MARGIN))
        config = SimpleNamespace(gpu_memory=budget, host_memory=1 << 40, scratch=None, resume=False)
        with pytest.raises(StreampruneError, match=r"^merging of --streamed does not fit.*--gpu-memory.*--adapter$"):
            place_training(sweeper, config, given, baseline=0, memory=1 << 40)
