"""A plan for a GPU holds what a run takes there, and no more than a little above: counted on meta tensors.

Each stage's peak is between 0.85 and 1.0 of what is planned for it, by tests/memory_counter.py, on checkpoints of
headers alone: the shapes of Llama-2-7B, -13B and Llama-3-70B, of a few layers each.
"""

from functools import cache
from pathlib import Path

import pytest
from marks import slow
from memory_counter import count

from streamprune.methods.table import METHODS
from streamprune.planning import placement
from streamprune.planning.placement import _with_reading
from streamprune.planning.stage import Kept

GIB = 1 << 30
BUDGET = 22 * GIB
N_LAYERS = 4
LONG, SHORT = {"samples": 4, "seq_len": 2048}, {"samples": 10, "seq_len": 128}
TEXTS = {name: LONG if row.calibration[1] > 128 else SHORT for name, row in METHODS.items()} | {"taylor": LONG}
SETTINGS = {
    "moreau": [{"steps": 2}, {"steps": 2, "draws": 2}],
    "moreau-gs": [{"steps": 2}],
    "smoothgrad": [{"draws": 2}, {"draws": 2, "mean": "score"}],
    "taylor": [{}, {"order": "second"}, {"order": "mix"}, {"order": "vectorize"}],
    "gblm": [{}, {"terms": "gradient"}, {"p": 2}],
    "flap": [{}, {"bias": "no"}],
    "thinet": [{}, {"refit": "yes"}],
    "bernoulli": [{"steps": 4}, {"repaired": "yes", "steps": 2}],
}
GRANULARITIES = {"units": ("units",), "layers": ("layers",), "weights": ("weights", "2:4")}


@pytest.fixture(scope="module", autouse=True)
def bench():
    """The modules of bench/ that the counter needs; its directory is not on the path otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
        import plans

        yield plans


@pytest.fixture(scope="module")
def checkpoint(bench, tmp_path_factory):
    """Makes the headers of a model of the shape of one of bench/plans.py, or of other fields, with a few layers."""

    @cache
    def make(model="llama-2-7b", layers=N_LAYERS):
        path = tmp_path_factory.mktemp("headers") / model
        bench.write_headers(path, bench.MODELS[model] | {"num_hidden_layers": layers})
        return path

    return make


@pytest.fixture
def placed(monkeypatch, tmp_path):
    """Counts a run whose hidden states and state stay at given places, and which keeps what is given."""

    def run(path, method="random", *, place=None, state=None, held=None, **options):
        if place is not None:
            monkeypatch.setattr(placement, "places", lambda config, gpu: [place])
        if state is not None:
            monkeypatch.setattr(placement, "_state_places", lambda config, plan, gpu: [state])
        if held is not None:
            monkeypatch.setattr(
                placement,
                "_keep",
                lambda sweeper, config, plan, make, room, left: (
                    held,
                    _with_reading(sweeper, make(held), held.slots, left(0)),
                ),
            )
        options = {"gpu_memory": BUDGET, "scratch": tmp_path, **TEXTS[method], **options}
        if options.get("granularity", "units") in ("units", "layers"):
            options = {"layers": (1, N_LAYERS - 1), "ratio": 0.5, **options}
        return count(path, method=method, **options)

    return run


def check(counted):
    for stage, real in counted.real.items():
        parts = counted.parts[stage]
        planned = sum(parts.values())
        assert 0.85 * planned <= real <= planned, f"{stage}: {real:,} of {planned:,} planned, {parts}"


def every_method():
    """A case for each method and granularity, and for each of its settings with the first; one of a method is fast."""
    for name, row in METHODS.items():
        granularities = [each for target in row.targets for each in GRANULARITIES[target]]
        for number, granularity in enumerate(granularities):
            for which, settings in enumerate(SETTINGS.get(name, [{}])):
                case = name, granularity, settings
                if granularity == "units" or not which:
                    yield slow(*case) if number or which else case


@pytest.mark.parametrize("method,granularity,settings", list(every_method()))
def test_what_a_method_takes_is_planned(method, granularity, settings, placed, checkpoint):
    check(placed(checkpoint(), method, place="device", granularity=granularity, settings=settings, held=Kept()))


@pytest.mark.parametrize("repaired", ["no", "yes"])
@pytest.mark.parametrize("place", ["device", "host"])
def test_what_many_masks_take_that_are_tried_at_once_is_planned(place, repaired, placed, checkpoint):
    settings = {"steps": 2, "masks": 32, "batch": 2, "repaired": repaired, "init": "random"}
    check(placed(checkpoint(layers=3), "bernoulli", place=place, settings=settings, held=Kept()))


@pytest.mark.slow
@pytest.mark.parametrize("place", ["host", "scratch"])
@pytest.mark.parametrize(
    "method,granularity",
    [
        (name, granularity)
        for name, row in METHODS.items()
        for target in row.targets
        for granularity in GRANULARITIES[target]
        if row.needs_text
    ],
)
def test_what_it_takes_with_hidden_states_elsewhere_is_planned(method, granularity, place, placed, checkpoint):
    settings = SETTINGS.get(method, [{}])[0]
    check(placed(checkpoint(), method, place=place, granularity=granularity, settings=settings, held=Kept()))


STATEFUL = [name for name, row in METHODS.items() if row.states and "weights" in row.targets]


@pytest.mark.slow
@pytest.mark.parametrize("state", ["host", "scratch"])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("granularity", ["units", "2:4", "layers"])
@pytest.mark.parametrize("method", STATEFUL)
def test_what_its_state_takes_is_planned(method, granularity, state_dtype, state, placed, checkpoint):
    run = {"granularity": granularity, "settings": SETTINGS[method][0], "state_dtype": state_dtype}
    check(placed(checkpoint(), method, place="device", state=state, held=Kept(), **run))


@pytest.mark.parametrize(
    "method,held",
    [
        ("taylor", Kept(slots=2, graphs=2)),
        slow("taylor", Kept(slots=4)),
        slow("taylor", Kept(slots=4, graphs=3)),
        slow("moreau-gs", Kept(slots=4, state_slots=4, graphs=1)),
        slow("moreau", Kept(slots=3, graphs=3)),
        slow("gblm", Kept(slots=2, state_slots=4)),
        slow("gblm", Kept(slots=4, state_slots=4, graphs=2)),
    ],
)
def test_weights_state_and_graphs_that_are_kept_are_planned(method, held, placed, checkpoint):
    settings = SETTINGS[method][0]
    check(placed(checkpoint(), method, place="device", held=held, settings=settings, **LONG))


OTHERS = {  # but mixtral: here no tokens choose experts; tests/output/test_experts.py has what it really saves
    "opt": {
        "hidden_size": 4096,
        "word_embed_proj_dim": 4096,
        "num_attention_heads": 32,
        "ffn_dim": 16384,
        "vocab_size": 50272,
    },
    "gpt_neox": {"intermediate_size": 16384, "vocab_size": 50432},
    "phi3": {"pad_token_id": 0},
    "gemma2": {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256},  # its attention keeps scores
}


@pytest.mark.slow
@pytest.mark.parametrize("graphs", [0, 2])
@pytest.mark.parametrize("family", OTHERS)
def test_graphs_of_other_families_are_planned(family, graphs, placed, bench, tmp_path):
    fields = {"model_type": family, "num_hidden_layers": N_LAYERS, "max_position_embeddings": 4096} | OTHERS[family]
    bench.write_headers(tmp_path / family, fields)
    held = Kept(slots=4, graphs=graphs)
    check(placed(tmp_path / family, "taylor", place="device", held=held, stock=True, layers=None, **LONG))


@pytest.mark.parametrize("model", ["llama-2-7b", slow("llama-3-70b")])
@pytest.mark.parametrize("method", [*STATEFUL, "taylor", "wanda"])
@pytest.mark.slow
def test_what_a_budget_keeps_stays_within_it(method, model, placed, checkpoint):
    """Chosen by the plan itself, for more layers than there is room for."""
    settings, layers = SETTINGS.get(method, [{}])[0], 12 if model == "llama-2-7b" else 6
    budget = (6 if model == "llama-2-7b" else 22) * GIB
    counted = placed(
        checkpoint(model, layers), method, layers=(1, layers - 1), gpu_memory=budget, settings=settings, **SHORT
    )
    check(counted)
    assert max(counted.real.values()) <= budget
    assert counted.placement.held != Kept(), "there is room for some"


REPAIRS = [("units", "own"), ("units", "stream"), ("layers", "stream")]


@pytest.mark.parametrize(
    "granularity,goal,place",
    [
        each if each[2] == "host" else slow(*each)
        for each in ((*repair, place) for repair in REPAIRS for place in ("device", "host", "scratch"))
    ],
)
def test_what_a_repair_takes_is_planned(granularity, goal, place, placed, checkpoint):
    """All layers may be fitted, so that all those that are kept are used."""
    run = {"granularity": granularity, "layers": (0 if granularity == "units" else 1, N_LAYERS)}
    counted = placed(
        checkpoint(), place=place, held=Kept(), compensate=True, compensate_target=goal, repair=(4, 2048), **run
    )
    assert "repairing" in counted.real
    check(counted)


@pytest.mark.parametrize("place", ["host", slow("device")])
def test_what_an_evaluation_takes_is_planned(place, placed, checkpoint):
    counted = placed(checkpoint(), "taylor", place=place, held=Kept(), evaluation=(5, 2048))
    assert "perplexity before" in counted.real
    check(counted)


@pytest.mark.parametrize(
    "model,granularity,goal",
    [
        ("llama-3-70b", "units", "own"),
        *(slow("llama-3-70b", *repair) for repair in REPAIRS[1:]),
        *(slow(model, *repair) for model in ("llama-2-7b", "llama-2-13b") for repair in REPAIRS),
    ],
)
def test_a_repair_on_65536_tokens_stays_within_22_gib(model, granularity, goal, placed, checkpoint):
    layers = 3 if model == "llama-3-70b" else 8
    counted = placed(
        checkpoint(model, layers),
        granularity=granularity,
        layers=(1, layers),
        compensate=True,
        compensate_target=goal,
        repair=(32, 2048),
    )
    check(counted)
    assert counted.real["repairing"] <= BUDGET
