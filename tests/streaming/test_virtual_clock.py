"""What sweeps would take on a card that is not there: the clock against formulas, measured runs, and what is wanted."""

from functools import cache
from pathlib import Path

import pytest

from streamprune.paging.state import STATE_SLOTS
from streamprune.planning import placement
from streamprune.planning.cards import CARDS
from streamprune.planning.rates import GPU_START
from streamprune.planning.stage import Kept

BENCH = Path(__file__).parents[2] / "bench"
GIB = 1 << 30
ENDLESS = float("inf")
LAYER = 4 * 4096**2 + 3 * 4096 * 11008  # weights of a layer of Llama-2-7B


@pytest.fixture(scope="module")
def bench():
    """The modules of bench/ that the tests need; its directory is not on the path otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        import clock_rates
        import clocked
        import plans
        import virtual_time

        yield {each.__name__: each for each in (clock_rates, clocked, plans, virtual_time)}


@pytest.fixture(scope="module")
def checkpoint(bench, tmp_path_factory):
    """Makes the headers of a model of the shape of one of bench/plans.py, with as many layers as wanted."""

    @cache
    def make(model="llama-2-7b", layers=None):
        fields, path = dict(bench["plans"].MODELS[model]), tmp_path_factory.mktemp("headers") / model
        fields["num_hidden_layers"] = layers or fields["num_hidden_layers"]
        bench["plans"].write_headers(path, fields)
        return path

    return make


# Time.


def test_threads_run_in_the_order_of_their_clocks(bench):
    world, seen = bench["virtual_time"].World(), []

    def work(name, step):
        for _ in range(3):
            world.spend(step)
            world.turn()
            seen.append((name, world.now))

    threads = [bench["virtual_time"].Thread(world, work, each) for each in (("slow", 3.5), ("fast", 2.0))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [("fast", 2), ("slow", 3.5), ("fast", 4), ("fast", 6), ("slow", 7), ("slow", 10.5)]
    assert world.now == 10.5


def test_what_is_handed_on_carries_its_time(bench):
    world = bench["virtual_time"].World()
    queue, told, word = bench["virtual_time"].Queue(world), bench["virtual_time"].Condition(world), []

    def work():
        world.spend(5)
        queue.put("item")
        world.spend(2)
        with told:
            word.append("told")
            told.notify()

    thread = bench["virtual_time"].Thread(world, work)
    thread.start()
    assert (queue.get(), world.now) == ("item", 5)
    told.wait_for(lambda: bool(word))
    assert world.now == 7
    with bench["virtual_time"].Executor(world, 2) as executor:
        futures = [executor.submit(world.spend, each) for each in (4, 1, 1)]
        assert [(future.result(), world.now) for future in futures[1:]] == [(None, 8), (None, 9)]
        assert (futures[0].result(), world.now) == (None, 11)


def test_an_error_in_a_thread_comes_to_whoever_waits_for_it(bench):
    world = bench["virtual_time"].World()
    with bench["virtual_time"].Executor(world) as executor, pytest.raises(ZeroDivisionError):
        executor.submit(lambda: 1 // 0).result()


def test_an_engine_fills_its_gaps_and_does_one_thing_at_a_time(bench):
    engine = bench["virtual_time"].Engine()
    assert engine.take(10, 2) == 12
    assert engine.take(0, 3) == 3  # there was nothing to do before
    assert engine.take(2, 7) == 10
    assert engine.take(0, 1) == 13
    assert engine.busy == 13


# A machine that is slow in one thing only takes as long as that.


def only(bench, **rates):
    """A machine without other limits than these."""
    named = dict.fromkeys(bench["clock_rates"].Machine.__dataclass_fields__, ENDLESS)
    return bench["clock_rates"].Machine(**named | {"launch": 0.0} | rates)


def test_where_only_the_link_is_slow_a_sweep_takes_the_bytes_over_it(bench, checkpoint):
    run = {"gpu_memory": 20 * GIB, "layers": (1, 5), "samples": 4, "held": Kept()}
    found = bench["clocked"].score(checkpoint(layers=6), only(bench, link_up=1e9), "wanda", **run)
    read = 5 * (2 * LAYER + 4 * 4096)
    assert found.seconds == pytest.approx(read / 1e9, rel=1e-3)
    assert found.linked["up"] == pytest.approx(read, rel=1e-3)


def test_where_only_the_disk_is_slow_what_stays_is_read_once(bench, checkpoint):
    taken = [
        bench["clocked"]
        .score(
            checkpoint(layers=6),
            only(bench, disk=1e9),
            "taylor",
            gpu_memory=20 * GIB,
            layers=(1, 5),
            held=Kept(slots),
            again=again,
        )
        .seconds
        for slots, again in ((6, False), (6, True), (2, True))
    ]
    # The page cache holds all of it afterwards, and costs nothing here.
    assert taken == [pytest.approx(6 * (2 * LAYER + 4 * 4096) / 1e9, rel=1e-3), 0, 0]


def test_where_only_arithmetic_is_slow_a_sweep_takes_its_products(bench, checkpoint):
    rates = only(bench, half=1e12, single=1e12)
    found = bench["clocked"].score(
        checkpoint(layers=4), rates, "taylor", gpu_memory=20 * GIB, layers=(1, 3), samples=4, seq_len=64, held=Kept()
    )
    tokens, head = 4 * 64, 32000 * 4096 * 63 / 64
    # Layers 1 to 3 again, with gradients of all inputs, and of two layers' weights.
    backward = 3 * LAYER + 3 * LAYER + 2 * LAYER + head
    assert found.seconds == pytest.approx(2 * tokens * (4 * LAYER + head + backward) / 1e12, rel=1e-3)


def test_state_in_pageable_memory_is_waited_for(bench, checkpoint):
    """δ of a step goes down once, fresh, and comes up forwards, to be bound backwards, and to be changed."""
    rates = only(bench, pageable_up=1e9, fresh=0.5e9, pageable_down=1e9)
    found = bench["clocked"].score(
        checkpoint(layers=4),
        rates,
        "moreau",
        gpu_memory=20 * GIB,
        layers=(1, 3),
        settings={"steps": 2},
        then=True,
        held=Kept(),
    )
    state = 2 * 4 * LAYER
    assert found.seconds == pytest.approx(state / 0.5e9 + 3 * state / 1e9, rel=1e-3)
    assert found.waits["link"] == pytest.approx(found.seconds, rel=1e-3)


def test_it_takes_no_memory_and_says_the_same_each_time(bench, checkpoint):
    run = {"gpu_memory": 20 * GIB, "layers": (1, 5), "samples": 8, "seq_len": 256}
    taken = {
        bench["clocked"].score(checkpoint(layers=6), bench["clock_rates"].machine_of("l4"), "taylor", **run).seconds
        for _ in range(2)
    }
    assert len(taken) == 1 and taken.pop() > 0


def test_where_only_arithmetic_is_slow_sparsegpt_takes_its_products(bench, checkpoint):
    """A matrix's columns: each error goes to those behind it, within a block by the kernel, behind it by a product."""
    rates = only(bench, half=1e12, single=1e11)
    run = {"gpu_memory": 20 * GIB, "layers": (1, 2), "samples": 4, "seq_len": 64, "held": Kept()}
    found = bench["clocked"].score(checkpoint(layers=2), rates, "sparsegpt", granularity="2:4", **run)
    tokens, rows = 4 * 64, {4096: 4 * 4096 + 2 * 11008, 11008: 4096}
    forward = 2 * tokens * (2 * LAYER - 4096 * 11008)  # the last layer's inputs are enough
    gram = tokens * (3 * 4096**2 + 11008**2)
    factors = 3 * 4096**3 + 11008**3  # a third of each is Cholesky's, two thirds are the inverse's products
    columns = sum(count * width**2 for width, count in rows.items())
    assert found.seconds == pytest.approx((forward + gram) / 1e12 + (factors + columns) / 1e11, rel=0.01)


# The plan's bytes.

LONG = {"samples": 4, "seq_len": 2048}
LINKED = [
    ("taylor", "device", {}),
    ("taylor", "host", LONG),
    ("wanda", "host", LONG),
    ("wanda", "host", {**LONG, "granularity": "weights"}),
    ("block-influence", "host", {**LONG, "granularity": "layers"}),
    ("layer-ppl", "host", {**LONG, "granularity": "layers"}),
    ("smoothgrad", "device", {"settings": {"draws": 3}}),
    ("gblm", "host", {**LONG}),
    ("moreau", "device", {"settings": {"steps": 3, "draws": 2}}),
    ("moreau-gs", "host", {"settings": {"steps": 3}}),
]


@pytest.mark.parametrize("method,place,run", LINKED)
def test_bytes_over_the_link_are_those_of_the_plan(method, place, run, bench, checkpoint, monkeypatch):
    def nothing(sweeper, config, plan, make, room, left):
        return Kept(), placement._with_reading(sweeper, make(Kept()), 2, left(0))

    monkeypatch.setattr(placement, "places", lambda config, gpu: [place])
    monkeypatch.setattr(placement, "_keep", nothing)  # as if nothing were left of the budget
    run = {"layers": (1, 7), "gpu_memory": 20 * GIB} | run
    found = bench["clocked"].score(checkpoint(layers=8), bench["clock_rates"].machine_of("h100"), method, **run)
    stage, hidden = found.placement.stages[0], 4 * 2048 * 4096 * 2 if place == "host" else 0
    # Norms that are there when the second sweep turns are used, and never leave.
    never = STATE_SLOTS * 2 * LAYER if method == "gblm" else 0
    for direction, planned in (("up", stage.up), ("down", stage.down - never)):
        # But for scores, and for what a sweep does not take of its first layer or make of its last.
        assert found.linked[direction] == pytest.approx(planned, rel=0.01, abs=2 * hidden + 1e7)


# What was measured, when state was pageable and budgets kept weights alone; and what is wanted.

# Layers 1:31 have the 17.7 GB of hidden states that were said of the runs with taylor.
THEN = {"samples": 32, "seq_len": 2048, "at_once": 4, "layers": (1, 31)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "measured,run",
    [
        (95.4, {"method": "moreau-gs", "held": Kept(32)}),
        (8.5, {"method": "taylor", **THEN, "held": Kept(9)}),
        (9.2, {"method": "taylor", **THEN, "held": Kept(14), "gpu_memory": 8 * GIB}),
    ],
)
def test_runs_that_were_measured_on_an_h100_take_as_long_by_the_clock(measured, run, bench, checkpoint):
    """Llama-2-7B's shape from the page cache, δ in pageable memory; taylor the second time in a process."""
    again = run["method"] == "taylor"
    run = {"gpu_memory": 22 * GIB, "warm": True, "again": again, "then": True} | run
    found = bench["clocked"].score(checkpoint(), bench["clock_rates"].machine_of("h100"), **run)
    assert found.seconds == pytest.approx(measured, rel=0.25)


@pytest.mark.slow
def test_the_first_run_of_a_process_takes_as_long_by_the_clock(bench, checkpoint):
    """The same of taylor with hidden states on the host: these are pinned first, and CUDA and the kernels are new."""
    run = {"gpu_memory": 8 * GIB, "warm": True, "then": True, "held": Kept(14), **THEN}
    found = bench["clocked"].score(checkpoint(), bench["clock_rates"].machine_of("h100"), "taylor", **run)
    assert found.placement.stages[0].host["hidden states"] == pytest.approx(17.7e9, rel=0.01)
    assert found.seconds + GPU_START == pytest.approx(25.7, rel=0.25)


@pytest.mark.slow
def test_a_forward_pass_that_was_measured_on_an_h100_takes_as_long_by_the_clock(bench, checkpoint):
    found = bench["clocked"].forward(
        checkpoint(), bench["clock_rates"].machine_of("h100"), (32, 2048), slots=2, at_once=4, warm=True
    )
    assert found.seconds == pytest.approx(2.35, rel=0.25)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method,run",
    [
        ("moreau-gs", {"settings": {"steps": 3}, "gpu_memory": 10 * GIB, "host_memory": 8 * GIB}),
        ("taylor", {"samples": 16, "seq_len": 2048, "gpu_memory": 6 * GIB, "host_memory": GIB}),
    ],
)
def test_what_goes_to_a_scratch_disk_is_waited_for_no_longer_than_it_takes(method, run, bench, checkpoint, tmp_path):
    """State, and hidden states, by a drive of their own that does one thing at a time."""
    run = {"scratch": tmp_path / "scratch", "warm": True, **run}
    found = bench["clocked"].score(checkpoint(), bench["clock_rates"].machine_of("h100"), method, **run)
    places = found.placement.place, found.placement.state
    assert places == (("device", "scratch") if method == "moreau-gs" else ("scratch", "host"))
    moved = sum(each.busy.scratch for each in found.sweeps) * bench["clock_rates"].DISK
    assert moved == pytest.approx(found.placement.stages[0].moved, rel=0.1)
    assert not found.late and not (tmp_path / "scratch").exists()


LONGER = {"samples": 16, "seq_len": 2048}
SWEEPS = [
    ("taylor", {}),
    ("taylor", LONGER),
    ("wanda", LONGER),
    ("wanda", {**LONGER, "granularity": "weights"}),
    ("wanda-sp", LONGER),
    ("thinet", {**LONGER, "samples": 128}),  # its default: of less text the starts of units that go show
    ("flap", {"samples": 128}),
    ("moreau", {"settings": {"steps": 3}}),
    ("moreau-gs", {"settings": {"steps": 3}}),
    ("smoothgrad", {"settings": {"draws": 3}}),
    ("gblm", LONGER),
]


def late_sweeps(bench, checkpoint, model, card, method, run, layers=None, share=1.0):
    gpu_memory = round(share * (CARDS[card].gib << 30))
    found = bench["clocked"].score(
        checkpoint(model, layers),
        bench["clock_rates"].machine_of(card),
        method,
        gpu_memory=gpu_memory,
        warm=True,
        **run,
    )
    return [(each.busy, each.one_layer) for each in found.late]


@pytest.mark.slow
@pytest.mark.parametrize(
    "model,card,layers,share",
    [
        # As large a share of fewer layers stays in as much less memory; bench/clocked.py has all of them.
        ("llama-2-7b", "h100", 16, 0.5),
        ("llama-2-7b", "rtx3090", 16, 0.5),
        ("llama-2-13b", "rtx4090", 20, 0.5),
        ("llama-3-70b", "a100", 20, 0.3),
    ],
)
@pytest.mark.parametrize("method,run", SWEEPS)
def test_a_sweep_takes_what_its_busiest_resource_does_and_one_layer(
    method, run, model, card, layers, share, bench, checkpoint
):
    assert late_sweeps(bench, checkpoint, model, card, method, run, layers, share) == []


@pytest.mark.slow
def test_a_sweep_of_sparsegpt_takes_what_its_busiest_resource_does(bench, checkpoint):
    """An H100 computes as fast as it is told to, and waits for the host at every matrix (bench/README.md)."""
    run = {**LONGER, "granularity": "weights"}
    assert late_sweeps(bench, checkpoint, "llama-2-7b", "rtx3090", "sparsegpt", run) == []


@pytest.mark.parametrize("method,run", [("taylor", {}), ("wanda", {"samples": 4, "seq_len": 2048})])
def test_a_sweep_over_two_slots_takes_what_its_busiest_resource_does(method, run, bench, checkpoint):
    run = {**run, "held": Kept(), "layers": (1, 15)}
    assert late_sweeps(bench, checkpoint, "llama-2-7b", "rtx4090", method, run, layers=16) == []
