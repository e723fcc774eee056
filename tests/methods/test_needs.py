"""What a method asks for says what it costs: of every method, of layers of different shapes, of a need of one's own."""

import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from math import prod

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import make_sweeper, save_tiny, token_ids

import streamprune.methods.needs
from streamprune import PruneConfig, prune
from streamprune.methods.needs import (
    GRADIENTS,
    GRAMS,
    LOSSES,
    MASKED,
    MOVED_GRADIENTS,
    POLICY_BYTES,
    STORED_WEIGHTS,
    KeptState,
    Need,
    _graph,
)
from streamprune.methods.sinks import LayerScores, UnitScores, WeightPruner
from streamprune.methods.table import METHODS, Method, resolve_settings
from streamprune.pipeline.batches import open_texts
from streamprune.pipeline.run import foretell
from streamprune.planning import rates
from streamprune.planning.decision import make_plan
from streamprune.planning.footprint import stages
from streamprune.planning.stage import Work
from streamprune.streaming.costs import Sizes, Task
from streamprune.streaming.masked import CUT_TOKENS
from streamprune.streaming.statistics import Statistics

# --- A need of one's own -----------------------------------------------------------------------------------------


def cost_of_sums(task):
    """Of sweeps that sum every second layer's hidden states, a layer at a time."""
    (passed, *_) = passes_of_sums(task)
    return task.cost(
        states=2,
        brought=len(passed) * task.sweeps,
        taken=len(passed) * task.sweeps,
        device={"activations": task.forward_activations(passed), "sums of hidden states": 8 * task.shape[0]},
        forward=task.sweeps * task.flops(passed),
    )


def passes_of_sums(task):
    return [range(task.layers[-1] + 1)] * task.sweeps


def roughness(statistics, settings, sink):
    """The spread of sequences' sums around a mean that a first sweep finds; every second layer is never taken."""
    means, scored = statistics.store("mean"), statistics.sweeper.scored

    def sums(parts):
        return torch.cat([after.double().sum(dim=(1, 2)) for _, after in parts])

    def keep(layer, parts):
        if layer % 2 == 0:
            mean = sums(parts).mean()
            means.update({(layer, name): mean for name in scored[layer]})

    def score(layer, parts):
        spread = (sums(parts) - means[layer, next(iter(scored[layer]))]).abs().mean() if layer % 2 == 0 else 1e9
        sink.values[layer] = float(spread)

    statistics.hidden(keep)
    statistics.hidden(score)


SUMS = Need("sums", passes_of_sums, cost_of_sums)
MEAN = KeptState("mean", lambda settings, target: True, "nothing=else", numbers=lambda shape, width: 1, dtype="float64")
ROUGHNESS = Method(
    "roughness", roughness, ("layers",), (SUMS,), "the spread", "-", sweeps=lambda settings: 2, states=(MEAN,)
)


def test_a_need_of_ones_own_is_planned_and_met(tiny_llama, tmp_path, monkeypatch, streamprune):
    monkeypatch.setitem(METHODS, "roughness", ROUGHNESS)
    given = {"granularity": "layers", "layers": (1, 7), "ratio": 0.4, "samples": 4, "seq_len": 32, "evaluate": False}
    config = PruneConfig(str(tiny_llama), tmp_path / "out", "roughness", **given)
    forecast = foretell(config)
    result = prune(config)
    stage = forecast.placement.stages[0]
    assert (stage.name, stage.passes) == ("scoring roughness", [range(7), range(7)])
    assert stage.device["sums of hidden states"] == 8 * 4
    assert stage.host["state of the method"] == 8 * 6 * 7  # a number for each matrix of each prunable layer
    assert stage.read == result.facts["scoring"]["bytes_read"] > 0
    assert "keeps 336" in forecast.text
    gone = set(range(8)) - set(result.kept)
    assert len(gone) == 2 and gone < {2, 4, 6}
    (row,) = (line for line in streamprune("methods").out.splitlines() if line.startswith("roughness"))
    assert " sums " in row


# --- Layers of different shapes ----------------------------------------------------------------------------------

NARROW, N_LAYERS = 2, 6
SHAPE, BATCH, HIDDEN = (4, 16), 2, 96


@pytest.fixture(scope="module")
def ragged(tmp_path_factory):
    """A Llama whose first two layers are half as wide as the others, and each layer's matrices as the file has them."""
    path = tmp_path_factory.mktemp("ragged")
    wide = {"hidden_size": HIDDEN, "intermediate_size": 336, "num_hidden_layers": N_LAYERS, "head_dim": 8}
    save_tiny(path / "in", "llama", dtype=torch.float32, **wide)
    prune(PruneConfig(str(path / "in"), path / "out", "magnitude", layers=(0, NARROW), ratio=0.5, evaluate=False))
    matrices = [{} for _ in range(N_LAYERS)]
    for name, tensor in load_file(path / "out" / "model.safetensors").items():
        if name.startswith("model.layers.") and tensor.ndim == 2:
            matrices[int(name.split(".")[2])][name.split(".")[4]] = tuple(tensor.shape)
    assert elements(matrices[0]) < 0.6 * elements(matrices[-1])
    return make_sweeper(path / "out", dtype=torch.float32, micro_batch=BATCH), matrices


def elements(matrices):
    return sum(map(prod, matrices.values()))


def task_of(sweeper, layers=range(1, N_LAYERS), **more):
    return Task(Sizes(sweeper), SHAPE, BATCH, layers=layers, **more)


@pytest.mark.parametrize("layers", [[0], [1, 2], range(N_LAYERS)])
def test_flops_are_those_of_each_layer(layers, ragged):
    sweeper, matrices = ragged
    per_token = [2 * elements(each) + 4 * SHAPE[1] * each["o_proj"][1] for each in matrices]
    assert task_of(sweeper).flops(layers) == sum(prod(SHAPE) * per_token[layer] for layer in layers)


def test_what_is_held_is_that_of_the_largest_layer_and_what_is_done_of_each(ragged):
    sweeper, matrices = ragged
    sizes, narrow, wide = list(map(elements, matrices)), matrices[0], matrices[-1]
    largest = max(map(prod, wide.values()))
    cost = MOVED_GRADIENTS.cost(task_of(sweeper, sweeps=3))
    assert cost.device["activations"] == 4 * BATCH * SHAPE[1] * sum(map(sum, wide.values()))
    assert cost.device["gradients, and what is made of them"] == 4 * (2 * largest + elements(wide))
    assert cost.noise == 2 * 3 * sum(sizes[1:])
    below = GRADIENTS.cost(task_of(sweeper, layers=range(NARROW)))
    assert below.device["gradients, and what is made of them"] == 4 * (
        2 * max(map(prod, narrow.values())) + elements(narrow)
    )
    assert below.device["activations"] == cost.device["activations"], "the layers above are passed too"
    assert STORED_WEIGHTS.cost(task_of(sweeper)).device["a matrix and its scores"] == 12 * largest


def test_gram_matrices_are_as_wide_as_each_layers_inputs(ragged):
    sweeper, matrices = ragged
    # Of q, k and v; o; gate and up; down.
    widths = [(HIDDEN, each["o_proj"][1], HIDDEN, each["down_proj"][1]) for each in matrices]
    grams = GRAMS.cost(task_of(sweeper, prunes=True))
    assert grams.device["sums over inputs"] == 4 * sum(width**2 for width in set(widths[-1]))
    # A Cholesky factor of n³/3 FLOPs, and the inverse of a triangle of twice as many.
    assert grams.factors == pytest.approx((1 / 3 + 2 / 3) * sum(width**3 for each in widths[1:] for width in each))
    assert grams.updates == sum(map(elements, matrices[1:]))


def test_masks_are_chosen_of_all_units_of_the_layers_that_may_lose_some(ragged):
    sweeper, _ = ragged
    task = task_of(sweeper, trials=(5, 4, 1))
    geometries = [sweeper.skeleton.geometries[layer] for layer in task.layers]
    units = sum(each.kv_groups + each.channels for each in geometries)
    cost, whole = MASKED.cost(task), MASKED.cost(replace(task, cuts=False))
    assert (cost.chosen, whole.chosen) == (5 * 4 * units, 5 * 4 * len(geometries))
    assert cost.host["masks"] == 4 * units and cost.host["policy"] == POLICY_BYTES * units


def test_masks_copy_weights_only_where_they_cut_them(ragged, monkeypatch):
    sweeper, matrices = ragged
    wide = sum(prod(matrices[-1][f"{name}_proj"]) for name in ("gate", "up", "down"))
    down = prod(matrices[-1]["down_proj"])  # turned
    task = task_of(sweeper, trials=(5, 4, 1))
    many = replace(task, trials=(5, 4, -(-CUT_TOKENS // SHAPE[1])))
    assert task.mask_copies == 4 * (wide + down) and replace(task, fills=True).mask_copies == 4 * (wide - down)
    monkeypatch.setattr("streamprune.streaming.masked.is_gpu", lambda device: True)
    assert (task.mask_copies, many.mask_copies) == (0, 4 * (wide + down))


def test_what_autograd_saves_of_the_widest_layer_is_counted(ragged):
    sweeper, matrices = ragged
    ids, saved = token_ids(BATCH, SHAPE[1]), {}
    call = sweeper.skeleton.record(ids)[-1]
    with sweeper.pager.pages([N_LAYERS - 1]) as pages:
        weights = {name: weight.clone() for name, weight in next(pages).tensors.items()}
    own = {weight.untyped_storage().data_ptr() for weight in weights.values()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = tensor  # alive, so that no other takes its place
        return tensor

    hidden = torch.randn(BATCH, SHAPE[1], HIDDEN, requires_grad=True)
    scored = {name: weight.requires_grad_(weight.ndim == 2) for name, weight in weights.items()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sweeper.skeleton.run_layer(N_LAYERS - 1, scored, call, hidden)
    held = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    device = GRADIENTS.cost(task_of(sweeper)).device
    narrow, widest = sum(map(sum, matrices[0].values())), max(map(max, matrices[0].values()))
    # What is saved is there before there are gradients of it.
    counted = device["activations"] + device["gradients of activations"]
    assert 4 * BATCH * SHAPE[1] * (narrow + 3 * widest) < held <= counted


def test_every_stage_of_a_plan_has_the_wide_layers_in_it(ragged):
    sweeper, matrices = ragged
    config = PruneConfig("ragged", "out", "magnitude", layers=(0, N_LAYERS), evaluate=False, compensate=True)
    plan = make_plan(config, sweeper.skeleton)
    evaluated, _, repaired, written = stages(
        Sizes(sweeper), config, plan, Work(None, SHAPE, SHAPE), "device", "host", BATCH
    )
    tokens, widest = prod(SHAPE), matrices[-1]["down_proj"][1]
    assert evaluated.device["activations"] == repaired.device["activations"] - 2 * 4 * tokens * widest
    left = max(len(units["channel"]) for units in plan.choice.widths.values())
    # H_S, the right side of down's fit, H_S's factor, and what its making may take.
    assert repaired.device["Gram matrices"] == pytest.approx(4 * (3 * left**2 + HIDDEN * left), rel=0.02)
    assert repaired.factors == pytest.approx(sum(each["down_proj"][1] ** 3 for each in matrices) / 3)
    largest = sorted((4 * prod(shape) for shape in matrices[-1].values()), reverse=True)
    assert written.host["tensors, cut"] >= 2 * sum(largest[:2])


@pytest.mark.parametrize("method", ["moreau", "gblm", "magnitude"])
def test_a_pruned_model_is_pruned_again_as_planned(method, ragged, tmp_path):
    source = str(ragged[0].skeleton.checkpoint.path)
    settings = {"steps": 2} if method == "moreau" else {}
    given = {"settings": settings, "layers": (1, 5), "samples": 4, "seq_len": 32, "evaluate": False}
    config = PruneConfig(source, tmp_path / "out", method, **given)
    planned, facts = foretell(config).placement.stages[0], prune(config).facts
    assert planned.read == facts["scoring"]["bytes_read"] == facts["memory"]["planned_read"][planned.name] > 0


def test_rates_are_measured_on_what_most_layers_are_like(ragged, tmp_path, monkeypatch):
    sweeper, _ = ragged
    assert Sizes(sweeper).commonest == NARROW
    seen, run_layer = set(), sweeper.skeleton.run_layer
    monkeypatch.setattr(rates, "MEASURE_SECONDS", 0.01)
    monkeypatch.setattr(sweeper.skeleton, "run_layer", lambda layer, *more: seen.add(layer) or run_layer(layer, *more))
    found = rates.measured(sweeper, 16, tmp_path)
    assert seen == {NARROW} and min(found.forward, found.backward, found.noise, found.updates) > 0
    assert rates.known(sweeper, 16, tmp_path) == found


# --- Every method ------------------------------------------------------------------------------------------------

KEEPING = [
    ("moreau", "units", {"steps": 3}),
    ("moreau", "weights", {"steps": 2, "draws": 2}),
    ("moreau", "layers", {"steps": 1, "draws": 2}),
    ("moreau", "units", {"steps": 1}),
    ("moreau-gs", "units", {"steps": 2}),
    ("smoothgrad", "units", {"draws": 2}),
    ("smoothgrad", "units", {"draws": 2, "mean": "score"}),
    ("smoothgrad", "weights", {"draws": 2, "mean": "score"}),
    ("gblm", "units", {}),
    ("gblm", "weights", {}),
    ("gblm", "units", {"terms": "gradient"}),
]


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
@pytest.mark.parametrize("method,target,settings", KEEPING)
def test_what_a_method_keeps_is_what_is_planned(method, target, settings, family, tmp_path):
    """Tensors in its stores, one by one, where biases are cut beside matrices but not scored."""
    save_tiny(tmp_path / "in", family, dtype=torch.float32)
    sweeper, most = make_sweeper(tmp_path / "in", dtype=torch.float32), defaultdict(int)
    sweeper.scope = "units" if target == "units" else "matrices"
    more = {"stock": True} if target == "units" else {"layers": (1, 4)}
    config = PruneConfig("in", tmp_path / "out", method, settings, granularity=target, ratio=0.5, **more)
    numbers = resolve_settings(method, settings, config.target)
    plan = make_plan(config, sweeper.skeleton)

    def store(name):
        class Store(dict):
            def __setitem__(self, key, value):
                super().__setitem__(key, value)
                most[name] = max(most[name], sum(tensor.nbytes for tensor in self.values()))

        return Store()

    statistics = Statistics(sweeper, token_ids(2, 8), plan.layers, 0, store=store)
    sinks = {
        "units": lambda: UnitScores(sweeper.skeleton.all_units(plan.layers)),
        "layers": lambda: LayerScores(plan.layers),
        "weights": lambda: WeightPruner(plan.sparsity, lambda ref, stored, pruned: None),
    }
    METHODS[method].score(statistics, numbers, sinks[target]())
    assert {state.name: nbytes for state, nbytes in plan.state.items()} == dict(most)


@pytest.mark.parametrize("streams", [1, 2, 3, 100])
def test_layers_left_out_are_planned_as_they_are_carried(streams, tmp_path, monkeypatch):
    save_tiny(tmp_path, "llama", num_hidden_layers=7)
    sweeper, ids = make_sweeper(tmp_path), token_ids(3, 12)
    monkeypatch.setattr("streamprune.streaming.statistics.STREAM_BYTES", streams * ids.numel() * 48 * 8 + 7)
    task, orders, pages = Task(Sizes(sweeper), (3, 12), layers=range(1, 6)), [], sweeper.pager.pages
    monkeypatch.setattr(sweeper.pager, "pages", lambda order, *more: orders.append(order) or pages(order, *more))
    Statistics(sweeper, ids, range(1, 6), 0).losses_without()
    assert LOSSES.passes(task) == orders
    assert LOSSES.cost(task).carried == (1 + min(streams, 5)) * ids.numel() * 48 * 8


def test_needs_are_known_without_torch():
    """The command line lists methods before anything heavy is there."""
    script = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("needs", {streamprune.methods.needs.__file__!r})
sys.modules["needs"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.LOSSES.label == "losses"
print(sorted({{"torch", "transformers", "numpy"}} & set(sys.modules)))
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize("wanted", [100, 700, 10**6])
@pytest.mark.parametrize("characters", [11_000, 1300, 90])
def test_the_sequences_of_a_run_are_those_of_its_plan(characters, wanted, tiny_llama, tmp_path):
    """But for the repair, of a text that is shorter than the plan takes it to be: 64 tokens are as many as fit."""
    (tmp_path / "text.txt").write_text(("as it is " * 2000)[:characters])
    given = {"calibration": str(tmp_path / "text.txt"), "samples": 1, "seq_len": 16, "compensate_tokens": wanted}
    config = PruneConfig(str(tiny_llama), tmp_path / "out", "taylor", compensate=True, bos="never", **given)
    skeleton = make_sweeper(tiny_llama, dtype=torch.float32).skeleton
    opened = open_texts(config, skeleton)
    tokens, planned = opened.tokens(config, skeleton), opened.work(config, skeleton)
    assert tokens.calibration.shape == planned.calibration == (1, 16)
    assert tokens.evaluation.shape == planned.evaluation == (100, 64)
    assert planned.repair == (wanted // 64, 64)
    assert tokens.repair.shape == (min(wanted, characters) // 64, 64)


def test_a_graph_grows_with_the_sequences_whatever_the_micro_batch(ragged):
    sweeper, _ = ragged
    sizes = Sizes(sweeper)
    one, two, more = (_graph(Task(sizes, (n, 64), 8)) - sweeper.binder.buffer_bytes for n in (8, 16, 9))
    assert two == 2 * one and more == pytest.approx(9 / 8 * one, rel=1e-6)


def test_a_graph_is_planned_where_no_layer_runs_without_weights(tmp_path):
    """Experts are chosen by numbers: then by the ends of matrices, with the scores of an attention that keeps them."""
    save_tiny(tmp_path, "mixtral", dtype=torch.float32)
    sweeper = make_sweeper(tmp_path, dtype=torch.float32)
    task, config = Task(Sizes(sweeper), (4, 32), 4), sweeper.skeleton.config
    assert task.sizes.saved(4, 32) is None and not task.attention_columns
    fused = _graph(task)
    config._attn_implementation = "eager"
    assert _graph(task) == fused + 4 * 4 * config.num_attention_heads * 4 * 32**2
