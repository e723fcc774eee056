"""What goes over the link to a GPU is counted; a stage takes as long as the busiest of link, disk and arithmetic."""

import json
import math
from dataclasses import replace

import pytest
import torch
from tiny_models import make_sweeper, save_tiny, token_ids
from torch.utils.flop_counter import FlopCounterMode

from streamprune import PruneConfig
from streamprune.errors import StreampruneError
from streamprune.methods.needs import MOMENTS
from streamprune.paging.device import PlannedDevice
from streamprune.paging.hidden_states import PARTS
from streamprune.paging.state import STATE_SLOTS
from streamprune.pipeline.run import foretell
from streamprune.planning import rates
from streamprune.planning.cards import CARDS
from streamprune.planning.placement import MARGIN, _keep, _with_reading
from streamprune.planning.rates import Rates, assumed, seconds
from streamprune.planning.stage import Kept, Stage
from streamprune.streaming.costs import LIBRARY_BYTES, Sizes, Task
from streamprune.streaming.inputs import Moments
from streamprune.streaming.statistics import Statistics

SAMPLES, SEQ, LAYERS, N_LAYERS = 4, 32, (1, 7), 8


def keep_nothing(sweeper, config, plan, make, room, left):
    return Kept(), _with_reading(sweeper, make(Kept()), Kept().slots, left(0))


def scoring(tiny_llama, tmp_path, monkeypatch, method, place="device", keep=False, **more):
    """The stage of a plan for a card, with hidden states at a place; it may keep what there is room for."""
    monkeypatch.setattr("streamprune.planning.placement.places", lambda config, gpu: [place])
    monkeypatch.setattr("streamprune.planning.placement._keep", _keep if keep else keep_nothing)
    given = {"samples": SAMPLES, "seq_len": SEQ, "layers": LAYERS, "evaluate": False, "scratch": tmp_path} | more
    config = PruneConfig(str(tiny_llama), tmp_path / "out", method, **given)
    return foretell(config, assume="l4").placement.stages[0]


@pytest.fixture
def hidden(tiny_llama):
    """Bytes of hidden states of all sequences."""
    return SAMPLES * SEQ * json.loads((tiny_llama / "config.json").read_text())["hidden_size"] * 4


@pytest.fixture
def scored(tiny_llama):
    """Weights of the prunable layers' matrices."""
    sweeper = make_sweeper(tiny_llama, dtype=torch.float32)
    return sum(
        sweeper.skeleton.shapes(ref.layer)[name].numel()
        for layer in range(*LAYERS)
        for name, ref in sweeper.scored[layer].items()
    )


@pytest.mark.parametrize("place", ["host", "scratch"])
def test_hidden_states_that_are_spilled_pass_the_link_as_often_as_they_are_used(
    place, hidden, tiny_llama, tmp_path, monkeypatch
):
    stage = scoring(tiny_llama, tmp_path, monkeypatch, "taylor", place)
    above = N_LAYERS - LAYERS[0]
    # Forwards into each layer and the head; backwards the input of each layer and the gradient after it.
    assert stage.up == stage.read + hidden * (N_LAYERS + 1 + 2 * above)
    # Each layer's output, the head's gradient, and those before each layer.
    assert stage.down == hidden * (N_LAYERS + 1 + above)
    assert stage.moved == (stage.up - stage.read + stage.down if place == "scratch" else 0)


def test_hidden_states_on_the_device_do_not_pass_it(tiny_llama, tmp_path, monkeypatch):
    stage = scoring(tiny_llama, tmp_path, monkeypatch, "taylor")
    assert (stage.up, stage.down) == (stage.read, 0) and stage.read > 0


@pytest.mark.parametrize(
    "method,settings,up,both_ways,down",
    [
        # δ after each update but the last: twice into every later sweep, and once out of the backward one before it.
        ("moreau", {"steps": 3}, 2 * 2, 2 * 2, 2),
        ("moreau-gs", {"steps": 3}, 2 * 2, 2 * 2, 2),
        # With two draws there are twice as many sweeps to bind it in; a sum of the first draw comes and goes each time.
        ("moreau", {"steps": 3, "draws": 2}, 2 * 2 * 2 + 3, 2 * 2 * 2, 2 + 3),
        ("smoothgrad", {"draws": 5}, 4, 0, 4),
        ("gblm", {}, 1, 1, 1),
        ("gblm", {"terms": "gradient"}, 0, 0, 0),
        ("taylor", {}, 0, 0, 0),
    ],
)
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_state_passes_it_as_often_as_its_kind_is_used(
    method, settings, up, both_ways, down, state_dtype, scored, tiny_llama, tmp_path, monkeypatch
):
    stage = scoring(tiny_llama, tmp_path, monkeypatch, method, settings=settings, state_dtype=state_dtype)
    nbytes, layers = scored * getattr(torch, state_dtype).itemsize, len(range(*LAYERS))
    # Of the layers where a sweep turns, what it reads both ways is there.
    assert stage.up - stage.read == nbytes * (up - both_ways * STATE_SLOTS / layers)
    assert stage.down == down * nbytes
    kept = scoring(tiny_llama, tmp_path, monkeypatch, method, settings=settings, state_dtype=state_dtype, keep=True)
    assert (kept.up, kept.down) == (kept.read, 0), "all of it has room on the card"


@pytest.mark.parametrize("place", ["device", "host", "scratch"])
def test_memory_that_cannot_be_registered_costs_pinned_memory_and_time(place, tiny_llama, tmp_path, monkeypatch):
    run = (tiny_llama, tmp_path, monkeypatch, "moreau", place)
    free = scoring(*run)
    monkeypatch.setattr(PlannedDevice, "registers", False)
    staged = scoring(*run)
    slot = free.device["state of layers"] // STATE_SLOTS
    part = staged.device["hidden states"] // PARTS if place != "device" else 0
    state, hidden = (staged.host.get(f"staging of {what}", 0) for what in ("state", "hidden states"))
    assert state == 4 * slot, "two chunks each way, of which tiny ones hold all of a layer"
    assert part <= hidden < max(1, 2 * part)
    assert sum(staged.host.values()) - sum(free.host.values()) == state + (hidden if place == "host" else 0)
    # What passes the link, but for the layers that are read, and hidden states on scratch, which are read into it.
    over = staged.up - staged.read + staged.down - (staged.moved if place == "scratch" else 0)
    assert (free.staged, staged.staged) == (0, over) and over > 0
    slow = Rates(math.inf, math.inf, math.inf, "made up", staging=10.0)
    assert seconds(staged, slow) == over / 10 and seconds(free, slow) == 0


def test_state_on_scratch_passes_the_disk_and_the_link(tiny_llama, tmp_path, monkeypatch):
    run = (tiny_llama, tmp_path, monkeypatch, "moreau")
    host = scoring(*run)
    monkeypatch.setattr("streamprune.planning.placement._state_places", lambda *given: ["scratch"])
    scratch = scoring(*run)
    assert (scratch.up, scratch.down) == (host.up, host.down)
    assert scratch.moved == host.up - host.read + host.down and host.moved == 0
    assert scratch.scratch == host.host["state of the method"] and scratch.host["state of the method"] == 0
    assert scratch.device == host.device and scratch.host["staging of state"] > 0


def test_a_journal_takes_all_that_changes(scored, tiny_llama, tmp_path, monkeypatch):
    run = (tiny_llama, tmp_path, monkeypatch, "moreau")
    free, resumed = (scoring(*run, keep=True, resume=each, scratch=None) for each in (False, True))
    assert free.down == 0 and resumed.down == 4 * scored * 9, "once for each update but the last of ten"
    assert resumed.up == free.up == free.read, "what is kept need not come back"
    assert resumed.host["state of the method"] == free.host["state of the method"] > 4 * scored


def test_what_is_left_of_a_budget_keeps_weights_state_and_graphs(tiny_llama, tmp_path):
    """The larger the budget the less passes the link and is computed again, and the plan stays within it."""
    config = PruneConfig(str(tiny_llama), tmp_path / "out", "moreau", {"steps": 3}, samples=4, seq_len=32)
    config = replace(config, layers=LAYERS, evaluate=False, host_memory="8GiB")
    seen = []
    libraries = int(LIBRARY_BYTES / (1 - MARGIN))
    for budget in range(libraries + 710_000, libraries + 8_000_000, 90_000):
        try:
            placement = foretell(replace(config, gpu_memory=budget), assume="l4").placement
        except StreampruneError:
            assert not seen, "what a budget holds a larger one does"
            continue
        stage = placement.stages[0]
        assert placement.device_bytes <= budget
        seen.append((stage.up + stage.down, stage.backward, placement.held))
    assert [link for link, _, _ in seen] == sorted([link for link, _, _ in seen], reverse=True)
    assert [flops for _, flops, _ in seen] == sorted([flops for _, flops, _ in seen], reverse=True)
    assert seen[0][2] == Kept() and seen[-1][2] == Kept(N_LAYERS, 6, N_LAYERS - LAYERS[0])
    link, _, _ = seen[-1]
    assert link == sum(entry.nbytes for layer in make_sweeper(tiny_llama).skeleton.entries for entry in layer.values())


@pytest.mark.parametrize("reader", ["buffered", "direct"])
def test_what_the_page_cache_does_not_hold_is_kept_first(reader, tmp_path):
    """State of all layers saves the link more than weights of all do, but it does not come from the disk each time."""
    layers = 16
    save_tiny(tmp_path / "model", "llama", num_hidden_layers=layers, dtype=torch.bfloat16)
    config = PruneConfig(str(tmp_path / "model"), tmp_path / "out", "moreau-gs", samples=4, seq_len=32)
    config = replace(config, layers=(1, 15), evaluate=False, host_memory="8GiB", state_dtype="float32", reader=reader)
    placement = foretell(
        replace(config, gpu_memory=int(LIBRARY_BYTES / (1 - MARGIN)) + 2_100_000), assume="l4"
    ).placement
    stage, size = placement.stages[0], sum(map(make_sweeper(tmp_path / "model").pager.bytes_of, range(layers)))
    if reader == "direct":
        assert placement.held.slots == layers and stage.disk == stage.read == size
    else:
        assert placement.held.state_slots == 14 and stage.read > stage.disk == size


def test_on_a_cpu_there_is_no_link(tiny_llama, tmp_path):
    config = PruneConfig(str(tiny_llama), tmp_path / "out", "moreau", samples=2, seq_len=16, evaluate=False)
    forecast = foretell(config)
    assert {(stage.up, stage.down) for stage in forecast.placement.stages} == {(0, 0)}
    assert " link " not in forecast.text


RATES = Rates(read=10.0, forward=1.0, backward=2.0, source="made up", link=100.0)
STAGE = Stage(name="all at once", read=200, disk=20, up=500, down=300, forward=1.0, backward=4.0)


@pytest.mark.parametrize(
    "stage,expected",
    [
        (STAGE, 5.0),  # up
        (replace(STAGE, down=700), 7.0),  # it goes both ways at the same time
        (replace(STAGE, disk=90), 9.0),
        (replace(STAGE, moved=60), 8.0),
        (replace(STAGE, backward=10.0), 6.0),
        (replace(STAGE, written=10), 5.0 + 10 / (10 * rates.WRITE_SHARE)),
        (replace(STAGE, chosen=3 * rates.CHOSEN), 5.0 + 3.0),  # a pass waits for its masks
    ],
)
def test_a_stage_takes_as_long_as_the_busiest_of_disk_link_and_arithmetic(stage, expected):
    assert seconds(stage, RATES) == pytest.approx(expected)


def test_an_assumed_card_has_a_link_and_a_start(streamprune, tiny_llama):
    for card, (_, _, link) in CARDS.items():
        assert assumed(card).link == link * 1e9
    result = streamprune("plan", "--model", tiny_llama, "--no-evaluate", "--assume", "h100", "--layers", "1:7")
    assert "55 GB/s each way" in result.out and "s more until work begins" in result.out


def test_two_sums_of_a_weight_take_twice_the_room(tiny_llama, tmp_path, monkeypatch):
    purpose, run = "gradients, and what is made of them", (tiny_llama, tmp_path, monkeypatch, "taylor")
    # Of so few tokens that logits take less.
    first, mix = (
        scoring(*run, settings={"order": order}, micro_batch=1, seq_len=4).device[purpose] for order in ("first", "mix")
    )
    fields = json.loads((tiny_llama / "config.json").read_text())
    one = (
        4 * fields["hidden_size"] * fields["num_attention_heads"] * fields["head_dim"]
    )  # what is made of one is there beside them
    assert mix - one == 2 * (first - one)


def test_flops_of_a_sweep_that_prunes_are_those_that_torch_counts(tmp_path):
    save_tiny(tmp_path, "llama", num_hidden_layers=N_LAYERS)
    sweeper, ids = make_sweeper(tmp_path), token_ids(8, 1)
    for prunes in (False, True):
        task = Task(Sizes(sweeper), (8, 1), 2, layers=range(4, 7), prunes=prunes)
        with FlopCounterMode(display=False) as counter:
            Statistics(sweeper, ids, range(4, 7), 0).inputs(Moments, lambda *_: None, prunes=prunes)
        # torch does not count attention on a CPU, which of one token is little.
        assert counter.get_total_flops() == pytest.approx(MOMENTS.cost(task).forward, rel=0.01)
