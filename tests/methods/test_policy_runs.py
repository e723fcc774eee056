"""Whole runs of the policy: same bytes, budgets, starts, ends, and masks that a run could end with."""

import json

import pytest
import torch
from killed_runs import Killed, weights
from killed_runs import config as killed_config
from ragged_models import dense_model, random_cuts, write_checkpoint
from tiny_models import make_sweeper, save_tiny, save_tokenizer

from streamprune import PruneConfig, prune
from streamprune.errors import StreampruneError, UsageError
from streamprune.methods.policy import Policy
from streamprune.model.families import unit_costs
from streamprune.pipeline.run import foretell
from streamprune.storage.directory import OWN_FILE
from streamprune.storage.scores import SCORES_FILE, read_scores


@pytest.mark.parametrize("granularity", ["units", "layers"])
@pytest.mark.parametrize("variant", ["best", "exact", "published", "logits"])
def test_a_run_is_the_same_twice_and_keeps_the_budget(granularity, variant, tiny_llama, tmp_path):
    outputs = []
    for name in ("one", "two"):
        config = PruneConfig(
            str(tiny_llama), tmp_path / name, "bernoulli", {"variant": variant, "steps": 4, "batch": 2}
        )
        options = {"samples": 6, "seq_len": 16, "layers": (1, 7), "ratio": 0.3, "granularity": granularity}
        result = prune(PruneConfig(**{**vars(config), **options, "evaluate": False}))
        told = [json.loads(line) for line in (result.output / "policy.jsonl").read_text().splitlines()]
        assert [step["step"] for step in told] == [1, 2, 3, 4]
        assert all(step["loss"] > 0 and step["kept"] > 0 and step["entropy"] >= 0 for step in told)
        outputs.append((result.output / "model.safetensors").read_bytes())
        gone = result.facts["parameters"]["before"] - result.facts["parameters"]["after"]
        one, all_of_them = costs_of(tiny_llama, range(1, 7), granularity)
        assert 0.3 * all_of_them - one < gone < 0.3 * all_of_them + one
    assert outputs[0] == outputs[1]


def costs_of(model, layers, granularity):
    """Parameters of the largest unit, or layer, and of all of them."""
    skeleton = make_sweeper(model, dtype=torch.float32).skeleton
    if granularity == "layers":
        of = [sum(shape.numel() for shape in skeleton.shapes(layer).values()) for layer in layers]
        return max(of), sum(of)
    costs = {layer: unit_costs(skeleton.family, skeleton.geometries[layer], skeleton.shapes(layer)) for layer in layers}
    units = [cost for layer in layers for kind, cost in costs[layer].items()]
    return max(units), sum(
        cost * skeleton.geometries[layer].units(kind) for layer in layers for kind, cost in costs[layer].items()
    )


def test_layers_without_attention_or_mlp_have_no_part_in_it(tmp_path):
    write_checkpoint(tmp_path / "in", dense_model("llama", vocab_size=260), "llama", random_cuts("policy"))
    save_tokenizer(tmp_path / "in")
    options = SHORT | {"layers": (0, 4), "ratio": 0.2, "trust_remote_code": True}
    kept = prune(PruneConfig(str(tmp_path / "in"), tmp_path / "out", "bernoulli", {"steps": 2}, **options)).kept
    assert not kept[0].get("kv_group") and not kept[2].get("channel") and kept[0]["channel"] and kept[2]["kv_group"]


def test_updates_that_share_a_pass_learn_by_the_probabilities_of_their_draws(tiny_llama, tmp_path, monkeypatch):
    drawn_from, stale = {}, []
    draw, learn = Policy.draw, Policy.learn

    def drawing(self, step):
        drawn_from[step] = self.sampled_from
        return draw(self, step)

    def learning(self, step, steps, masks, losses, p):
        assert torch.equal(p, drawn_from[step])
        stale.append(not torch.equal(p, self.sampled_from))
        return learn(self, step, steps, masks, losses, p)

    monkeypatch.setattr(Policy, "draw", drawing)
    monkeypatch.setattr(Policy, "learn", learning)
    given = {"steps": 4, "per_pass": 2, "variant": "logits", "batch": 1}
    prune(PruneConfig(str(tiny_llama), tmp_path / "out", "bernoulli", given, **SHORT))
    assert stale == [False, True, False, True]


@pytest.mark.parametrize(
    "init", ["magnitude", "taylor", "wanda", "wanda-sp", "flap", "thinet", "score-const", "random"]
)
def test_it_begins_with_scores_of_any_method_that_keeps_nothing(init, tiny_llama, tmp_path):
    given = {"init": init, "steps": 1, "batch": 2, "lr": 1e-9} | ({"repaired": "yes"} if init == "thinet" else {})
    options = {"samples": 4, "seq_len": 16, "layers": (1, 7), "ratio": 0.3, "evaluate": False}
    assert prune(PruneConfig(str(tiny_llama), tmp_path / "out", "bernoulli", given, **options)).layout == "ragged"


SHORT = {"samples": 4, "seq_len": 16, "layers": (1, 7), "ratio": 0.3, "evaluate": False}


@pytest.mark.parametrize("settings,names", [({}, "a score is NaN"), ({"repaired": "yes"}, "layer 2, mlp.down_proj")])
def test_numbers_that_overflow_are_refused(settings, names, tmp_path):
    model = save_tiny(tmp_path / "model", "llama", dtype=torch.float32)
    with torch.no_grad():
        for name in ("gate_proj", "up_proj"):
            model.model.layers[2].mlp.get_submodule(name).weight.mul_(3000)
    model.save_pretrained(tmp_path / "model")
    options = SHORT | {"layers": (1, 3), "dtype": "float16", "device": "cpu"}
    with pytest.raises(StreampruneError, match=rf"{names}.*--dtype float32"):
        prune(PruneConfig(str(tmp_path / "model"), tmp_path / "out", "bernoulli", {"steps": 1} | settings, **options))


@pytest.mark.parametrize("granularity,init", [("units", "wanda-sp"), ("units", "taylor"), ("layers", "taylor")])
def test_scores_of_an_earlier_run_are_as_good_as_those_of_the_same_run(granularity, init, tiny_llama, tmp_path):
    options = SHORT | {"granularity": granularity}
    first = prune(PruneConfig(str(tiny_llama), tmp_path / "first", init, **options))
    written = []
    for name, start in (("same", init), ("earlier", str(first.output)), ("facts", str(first.output / OWN_FILE))):
        settings = {"init": start, "steps": 2}
        prune(PruneConfig(str(tiny_llama), tmp_path / name, "bernoulli", settings, **options))
        written.append((tmp_path / name / "model.safetensors").read_bytes())
    assert written[0] == written[1] == written[2]


@pytest.mark.parametrize("variant", ["best", "exact"])
def test_a_policy_goes_on_from_what_an_earlier_one_has_learnt(variant, tiny_llama, tmp_path):
    learnt = []
    for name, init in (("first", "random"), ("second", str(tmp_path / "first"))):
        settings = {"variant": variant, "init": init, "steps": 2, "lr": 1e-9}
        prune(PruneConfig(str(tiny_llama), tmp_path / name, "bernoulli", settings, **SHORT))
        scores, facts = read_scores(tmp_path / name)
        assert facts["learner"] == {"best": "explore", "exact": "projection"}[variant]
        learnt.append(torch.cat(list(scores.values())))
    torch.testing.assert_close(*learnt, rtol=0, atol=1e-6)
    assert learnt[0].std() > 0.1


def test_layers_that_go_are_not_filled_in(tiny_llama, tmp_path):
    options = SHORT | {"granularity": "layers"}
    with pytest.raises(UsageError, match="--set repaired=yes is of units; leave it out"):
        prune(PruneConfig(str(tiny_llama), tmp_path / "out", "bernoulli", {"repaired": "yes"}, **options))


def test_explore_is_refused_where_nothing_that_it_moves_changes_what_goes(tiny_llama, tmp_path):
    save_tiny(tmp_path / "in", "gpt2", dtype=torch.float32)  # channels alone
    options = {**SHORT, "layers": None, "ratio": 0.3, "allocation": "uniform", "stock": True}
    with pytest.raises(UsageError, match=r"loses as many whatever moves it; take --set variant=logits$"):
        prune(PruneConfig(str(tmp_path / "in"), tmp_path / "out", "bernoulli", **options))
    prune(
        PruneConfig(str(tmp_path / "in"), tmp_path / "out", "bernoulli", {"variant": "logits", "steps": 1}, **options)
    )
    for few in (
        {"allocation": "uniform", "ratio": 0.3},  # of two KV groups none
        {"layers": (1, 2), "attention_ratio": 0.0, "mlp_ratio": 0.3, "ratio": None},
    ):
        with pytest.raises(UsageError, match=r"whatever moves it; .* or --allocation global of several layers"):
            foretell(PruneConfig(str(tiny_llama), tmp_path / "few", "bernoulli", **SHORT | few))


@pytest.mark.parametrize("variant", ["exact", "logits"])
def test_with_one_width_every_layer_and_kind_has_a_budget_of_its_own(variant, tiny_llama, tmp_path):
    settings = {"variant": variant, "steps": 4, "batch": 2, "lr": 0.02}
    options = SHORT | {"allocation": "uniform", "attention_ratio": 0.5, "ratio": 0.3}
    result = prune(PruneConfig(str(tiny_llama), tmp_path / "out", "bernoulli", settings, **options))
    scores, _ = read_scores(result.output)
    assert len(scores) == 12
    for (layer, kind), s in scores.items():
        most = len(result.kept[layer][kind])  # which `exact` only does not exceed
        assert (0.95 if variant == "exact" else 1 - 1e-6) * most < float(s.double().sum()) < (1 + 1e-6) * most


def test_scores_that_do_not_go_with_the_run_are_refused(tiny_llama, tmp_path):
    prune(PruneConfig(str(tiny_llama), tmp_path / "earlier", "magnitude", **SHORT))
    save_tiny(tmp_path / "other", "llama", num_hidden_layers=8, vocab_size=300)

    def refused(said, model=tiny_llama, init="earlier", **options):
        config = PruneConfig(
            str(model), tmp_path / "out", "bernoulli", {"init": str(tmp_path / init)}, **SHORT | options
        )
        with pytest.raises(UsageError, match=said):
            prune(config)
        assert not (tmp_path / "out").exists()

    refused("its scores are of another model", model=tmp_path / "other")
    refused("its scores are of units, wanted are those of layers", granularity="layers")
    refused("it has no scores of layer 0; .*--layers have 0:7", layers=(0, 7))
    refused("no streamprune.scores of an earlier run", init="nowhere")
    (tmp_path / "earlier" / SCORES_FILE).write_bytes(b"garbage")
    refused("no streamprune.scores of an earlier run")


def test_it_ends_when_nothing_has_changed_side_for_as_long_as_it_was_told_to_wait(tiny_llama, tmp_path):
    given = {"variant": "exact", "steps": 50, "batch": 2, "lr": 1e-9, "patience": 3, "per_pass": 2}
    options = {"samples": 4, "seq_len": 16, "layers": (1, 7), "ratio": 0.3, "evaluate": False}
    prune(PruneConfig(str(tiny_llama), tmp_path / "out", "bernoulli", given, **options))
    assert len((tmp_path / "out" / "policy.jsonl").read_text().splitlines()) == 4  # the pass that the third is in


@pytest.mark.parametrize("variant", ["best", "exact", "logits"])
def test_a_progressive_start_comes_down_to_the_budget_in_steps_of_a_twentieth(variant, tiny_llama, tmp_path):
    given = {"variant": variant, "init": "random-progressive", "steps": 9, "batch": 2}
    options = {"samples": 6, "seq_len": 16, "layers": (1, 7), "ratio": 0.22, "evaluate": False}
    prune(PruneConfig(str(tiny_llama), tmp_path / "out", "bernoulli", given, **options))
    kept = [json.loads(line)["kept"] for line in (tmp_path / "out" / "policy.jsonl").read_text().splitlines()]
    # 6 sequences, 2 a step: a third of an epoch is one step.
    whole = kept[0] / 0.95
    assert kept == pytest.approx([whole * share for share in (0.95, 0.9, 0.85, 0.8, *[0.78] * 5)], rel=0.02)
    with pytest.raises(UsageError, match="--set steps=4: random-progressive comes down to the budget after 4"):
        foretell(PruneConfig(str(tiny_llama), tmp_path / "no", "bernoulli", {**given, "steps": 4}, **options))


@pytest.mark.parametrize("normalize", ["raw", "zscore"])
def test_other_normalizations_than_its_own_are_refused(normalize, tiny_llama, tmp_path):
    with pytest.raises(UsageError, match=f"--normalize {normalize}: bernoulli compares its probabilities as they are"):
        prune(PruneConfig(str(tiny_llama), tmp_path / "out", "bernoulli", normalize=normalize, evaluate=False))


# What is tried is what could be written.

WHATS = [
    ({}, {}),
    ({"min_keep": 0.5}, {}),
    ({"round_to": 4}, {}),
    ({"attention_ratio": 0.5, "mlp_ratio": 0.2}, {"ratio": None}),
    ({"attention_ratio": 0.25}, {}),
    ({"allocation": "uniform", "attention_ratio": 0.5}, {}),
    ({"allocation": "uniform", "attention_ratio": 0.5, "stock": True, "layers": None}, {}),
    ({"granularity": "layers"}, {}),
    ({"granularity": "layers", "contiguous": True}, {}),
]


@pytest.mark.parametrize("options,without", WHATS, ids=str)
def test_every_mask_that_is_tried_is_one_that_a_run_could_end_with(options, without, tiny_llama, tmp_path, monkeypatch):
    tried = []

    def losses(sweeper, input_ids, trials, first, inverses):
        tried.extend(trials)
        return [float(len(tried) - number) for number in range(len(trials))]

    monkeypatch.setattr("streamprune.streaming.statistics.masked_losses", losses)
    given = {"layers": (1, 7), "ratio": 0.3, "samples": 4, "seq_len": 16, "evaluate": False, **options}
    given = {name: value for name, value in given.items() if name not in without}
    settings = {"steps": 3, "init": "random"}
    result = prune(PruneConfig(str(tiny_llama), tmp_path / "out", "bernoulli", settings, **given))

    def shape(kept):
        """What all that a run could end with have in common."""
        if options.get("granularity") == "layers":
            gone = sorted(set(range(1, 7)) - kept.keys())
            assert not options.get("contiguous") or gone == list(range(gone[0], gone[-1] + 1))
            return len(gone)
        counts = {layer: {kind: len(units) for kind, units in kinds.items()} for layer, kinds in kept.items()}
        if options.get("allocation") == "uniform":
            return counts
        for of in counts.values():
            assert of["channel"] == 37 or of["channel"] % options.get("round_to", 1) == 0
            assert of["kv_group"] >= 3 * options.get("min_keep", 0.1)
        if "attention_ratio" in options:
            return sum(of["kv_group"] for of in counts.values())
        return 0

    end = {int(layer): kinds for layer, kinds in result.kept.items()}
    layers = range(8) if options.get("stock") else range(1, 7)
    end = {layer: kinds for layer, kinds in end.items() if layer in layers}
    assert len(tried) == 12
    for trial in tried:
        masks = {layer: trial.kept.get(layer, {}) for layer in layers if layer not in trial.gone}
        kept = {
            layer: {kind: mask.nonzero().flatten().tolist() for kind, mask in of.items()} for layer, of in masks.items()
        }
        assert shape(kept) == shape(end)
        if "granularity" not in options:
            block = options.get("round_to", 1) * costs_of(tiny_llama, layers, "units")[0]
            assert abs(parameters(tiny_llama, kept) - parameters(tiny_llama, end)) < block


def parameters(model, kept):
    """Parameters of units that stay."""
    skeleton = make_sweeper(model, dtype=torch.float32).skeleton
    return sum(
        cost * len(kept[layer][kind])
        for layer in kept
        for kind, cost in unit_costs(skeleton.family, skeleton.geometries[layer], skeleton.shapes(layer)).items()
    )


def test_masks_that_are_repaired_are_tried_as_planned(tiny_llama, tmp_path):
    settings, outputs = {"steps": 4, "per_pass": 2}, []
    for name in ("one", "two"):
        config = PruneConfig(str(tiny_llama), tmp_path / name, "bernoulli", settings, **SHORT, compensate=True)
        forecast, result = foretell(config), prune(config)
        (stage,) = (each for each in forecast.placement.stages if each.name == "scoring bernoulli")
        assert stage.read == result.facts["scoring"]["bytes_read"]
        outputs.append((result.output / "model.safetensors").read_bytes())
    geometry = make_sweeper(tiny_llama, dtype=torch.float32).skeleton.geometries[1]
    widths = geometry.kv_groups * geometry.n_rep * geometry.head_dim, geometry.channels
    assert stage.host["state of the method"] == 4 * 6 * sum(width**2 for width in widths)
    assert outputs[0] == outputs[1]


def test_updates_that_share_a_pass_stay_as_many_where_a_resumed_run_would_choose_others(
    tiny_llama, tmp_path, killing, monkeypatch
):
    def wanted(count):
        monkeypatch.setattr("streamprune.pipeline.run.updates_per_pass", lambda *given: count)

    what = ("bernoulli", "units", {"steps": 6, "batch": 2}, {})
    outputs = {}
    for count in (3, 1):
        wanted(count)
        result = prune(killed_config(tiny_llama, tmp_path / f"whole-{count}", *what))
        assert result.facts["options"]["settings"]["per_pass"] == count
        outputs[count] = weights(result.output)
    assert outputs[3] != outputs[1]
    wanted(3)
    killing(1, "after")
    with pytest.raises(Killed):
        prune(killed_config(tiny_llama, tmp_path / "out", *what, resume=True))
    wanted(1)
    killing(-1, "after")
    assert weights(prune(killed_config(tiny_llama, tmp_path / "out", *what, resume=True)).output) == outputs[3]


@pytest.mark.parametrize("variant", ["best", "exact", "logits"])
@pytest.mark.parametrize("ratio,left", [(0.0, 8), (0.99, 6)])
def test_nothing_or_all_of_the_prunable_layers_may_go(ratio, left, variant, tiny_llama, tmp_path):
    options = {"samples": 2, "seq_len": 16, "evaluate": False, "granularity": "layers", "layers": (1, 3)}
    given = {"steps": 2, "batch": 1, "variant": variant, "init": "random"}
    run = prune(PruneConfig(str(tiny_llama), tmp_path / "out", "bernoulli", given, ratio=ratio, **options))
    assert json.loads((run.output / "config.json").read_text())["num_hidden_layers"] == left
