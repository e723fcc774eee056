"""A run fits into its budget or is refused with the smallest that would do; its output does not depend on it."""

import re
from types import SimpleNamespace

import psutil
import pytest
import torch
from cli_runner import snapshot
from tiny_models import make_sweeper, save_tiny

from streamprune import PruneConfig, prune
from streamprune.errors import StreampruneError
from streamprune.planning.placement import HOLES, MOST_UPDATES, budget_of, holes, memory_limits, updates_per_pass

MIB = 2**20
METHODS = [
    ("taylor", "units", {}),
    ("moreau", "units", {"steps": 2}),
    ("moreau-gs", "layers", {"steps": 2}),
    ("gblm", "units", {}),
    ("wanda", "weights", {}),
    ("sparsegpt", "weights", {}),
    ("layer-ppl", "layers", {}),
    ("magnitude", "units", {}),
]
SPILLED = [
    ("block-influence", "layers", {}, {}),
    ("gblm", "weights", {}, {}),
    ("flap", "units", {}, {}),
    ("thinet", "units", {"refit": "yes"}, {}),
    ("smoothgrad", "units", {"draws": 2}, {"micro_batch": 1}),
    ("taylor", "units", {"order": "mix"}, {"micro_batch": 3}),
    ("taylor", "units", {}, {"compensate": True}),
    ("taylor", "units", {}, {"compensate": True, "compensate_target": "own"}),
    ("magnitude", "layers", {}, {"compensate": True}),
]


def options(tiny_llama, output, method="taylor", granularity="units", settings=(), **more):
    common = {
        "samples": 4,
        "seq_len": 32,
        "method": method,
        "granularity": granularity,
        "settings": dict(settings),
        "evaluate": False,
    }
    if granularity != "weights":
        common["layers"] = (1, 7)
    return PruneConfig(str(tiny_llama), output, **common | more)


def now():
    """Bytes of this process."""
    return psutil.Process().memory_info().rss


def test_a_stage_whose_size_no_option_changes_has_no_remedy_but_memory(tiny_llama, tmp_path):
    with pytest.raises(StreampruneError, match=r"\(writing: .*\); raise it$"):
        prune(options(tiny_llama, tmp_path / "out", samples=1, seq_len=2, host_memory=now() - 50 * MIB))
    with pytest.raises(StreampruneError, match=r"\(perplexity before: .*\); pass --no-evaluate$"):
        short = {"samples": 1, "seq_len": 2, "micro_batch": 1, "evaluate": None}
        prune(options(tiny_llama, tmp_path / "out", **short, host_memory=now() - 50 * MIB))


@pytest.mark.parametrize("method,granularity,settings", METHODS)
def test_what_is_refused_names_the_smallest_budget_that_would_do(method, granularity, settings, tiny_llama, tmp_path):
    what = (method, granularity, settings)
    with pytest.raises(StreampruneError, match=r"--host-memory.*; (lower --samples|raise it)") as refusal:
        prune(options(tiny_llama, tmp_path / "out", *what, host_memory=now() - 50 * MIB))
    assert not list(tmp_path.iterdir())
    smallest = int(re.search(r"needs at least (\d+)MiB of memory", str(refusal.value))[1]) * MIB
    assert prune(options(tiny_llama, tmp_path / "out", *what, host_memory=smallest)).output.is_dir()


def test_the_remedies_fit_the_method(tiny_llama, tmp_path):
    short = {"host_memory": now() - 50 * MIB}
    with pytest.raises(StreampruneError, match="steps=1"):
        prune(options(tiny_llama, tmp_path / "out", "moreau", samples=1, seq_len=8, **short))
    with pytest.raises(StreampruneError, match="--scratch DIR"):
        prune(options(tiny_llama, tmp_path / "out", **short))
    with pytest.raises(StreampruneError) as refusal:
        prune(options(tiny_llama, tmp_path / "out", **short, scratch=tmp_path / "scratch"))
    assert "--scratch" not in str(refusal.value)


@pytest.mark.parametrize("method,granularity,settings", METHODS)
def test_the_output_does_not_depend_on_the_budget(method, granularity, settings, tiny_llama, tmp_path, monkeypatch):
    shards, places = [], []
    budgets = {"free": {}, "all layers": {"host_memory": now() + 4000 * MIB}, "direct": {"reader": "direct"}}
    if method != "magnitude":
        # As if only what is on scratch fitted.
        budgets["scratch"] = {"scratch": tmp_path / "spill"}
    for name, budget in budgets.items():
        if name == "scratch":
            on_scratch(monkeypatch)
        result = prune(options(tiny_llama, tmp_path / name, method, granularity, settings, **budget))
        shards.append({k: v for k, v in snapshot(result.output).items() if k.endswith("safetensors")})
        places.append((result.facts["memory"]["slots"], result.facts["memory"]["hidden_states"]))
    assert all(shard == shards[0] for shard in shards)
    assert places[:3] == [(2, "device"), (8, "device"), (2, "device")] and places[3:] in ([], [(2, "scratch")])


def test_a_scratch_that_is_a_file_is_refused_by_its_name(tiny_llama, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StreampruneError, match=r"/file is no directory; choose another --scratch"):
        prune(options(tiny_llama, tmp_path / "out", scratch=tmp_path / "file" / "spill"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def on_scratch(monkeypatch):
    monkeypatch.setattr("streamprune.planning.placement.places", lambda config, gpu: ["scratch"])
    monkeypatch.setattr("streamprune.planning.placement._state_places", lambda *given: ["scratch"])


@pytest.mark.parametrize("method,granularity,settings,more", SPILLED)
def test_the_output_does_not_depend_on_where_things_stay(
    method, granularity, settings, more, tiny_llama, tmp_path, monkeypatch
):
    outputs = []
    for name in ("memory", "scratch"):
        if name == "scratch":
            on_scratch(monkeypatch)
        config = options(tiny_llama, tmp_path / name, method, granularity, settings, scratch=tmp_path / "spill", **more)
        result = prune(config)
        assert result.facts["memory"]["state"] == ("host" if name == "memory" else "scratch")
        outputs.append({k: v for k, v in snapshot(result.output).items() if k.endswith("safetensors")})
        assert not any((tmp_path / "spill").glob("*"))
    assert outputs[0] == outputs[1]


@pytest.mark.slow
def test_state_goes_to_scratch_where_memory_is_short(tmp_path):
    save_tiny(
        tmp_path / "model", "llama", hidden_size=240, intermediate_size=16384, num_hidden_layers=6, dtype=torch.bfloat16
    )
    given = {"granularity": "weights", "settings": {"steps": 2, "sigma": 0.0}, "method": "moreau", "dtype": "float32"}
    given["layers"] = (0, 6)  # the state of two is in memory

    def smallest(**scratch):
        with pytest.raises(StreampruneError) as refusal:
            prune(options(tmp_path / "model", tmp_path / "out", **given, host_memory=now() - 50 * MIB, **scratch))
        return int(re.search(r"needs at least (\d+)MiB of memory", str(refusal.value))[1]) * MIB

    within, without = smallest(), smallest(scratch=tmp_path / "spill")
    assert within - without > 150 * MIB
    held = []
    # In this order: what a run leaves in the process counts in the next one.
    for name, budget in (("short", {"host_memory": (within + without) // 2}), ("free", {})):
        config = options(tmp_path / "model", tmp_path / name, **given, scratch=tmp_path / "spill", **budget)
        result = prune(config)
        held.append((result.facts["memory"]["state"], snapshot(result.output)["model.safetensors"]))
    assert [state for state, _ in held] == ["scratch", "host"]
    assert held[0][1] == held[1][1]


def test_a_larger_budget_reads_less_and_the_plan_says_so(tiny_llama, tmp_path):
    reads = []
    for name, budget in (("small", None), ("large", now() + 4000 * MIB)):
        facts = prune(options(tiny_llama, tmp_path / name, "moreau", settings={"steps": 3}, host_memory=budget)).facts
        reads.append(facts["scoring"]["bytes_read"])
        assert facts["memory"]["planned_read"]["scoring moreau"] == reads[-1]
    layers = reads[1]  # each layer once
    assert reads[0] > 3 * layers


@pytest.mark.parametrize(
    "disk,up,forward,gpu,count",
    [
        (0, 0, 1e12, False, 1),  # all stays
        (9e9, 0, 0.1e12, False, 3),
        (1e15, 0, 1, False, MOST_UPDATES),
        (0, 50e9, 50e12, True, 4),
        (30e9, 50e9, 200e12, True, 5),
    ],
)
def test_updates_share_a_pass_until_it_computes_for_as_long_as_it_reads(disk, up, forward, gpu, count):
    stage = SimpleNamespace(name="scoring bernoulli", disk=disk, moved=0, up=up, forward=forward)
    others = SimpleNamespace(name="writing", disk=1e15, moved=0, up=1e15, forward=0)
    assert updates_per_pass(SimpleNamespace(stages=[stage, others]), 600, gpu) == count
    assert updates_per_pass(SimpleNamespace(stages=[stage, others]), 2, gpu) == min(2, count)


@pytest.mark.parametrize("tensors", [0, 1, 10**6, 5 * 10**7, HOLES - 1, HOLES + 1, 10**9, 10**11])
def test_a_budget_has_room_for_its_tensors_and_little_more(tensors, tiny_llama):
    """Beside a process of 300 MB, on a CPU: tensors, holes as large up to 128 MiB, and a twentieth."""
    sweeper, baseline = make_sweeper(tiny_llama), 300 * MIB
    config = SimpleNamespace(gpu_memory=None, host_memory=budget_of(tensors, False) + baseline)
    _, (_, room) = memory_limits(config, sweeper, baseline, 1 << 50)
    assert tensors <= room <= tensors + 2 * MIB
    assert room + holes(room, False) <= config.host_memory - baseline
