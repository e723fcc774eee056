"""Losses with masks, many in one pass, are those of whole models with the same units zeroed and layers skipped."""

import math

import pytest
import torch
from tiny_models import FAMILY_NAMES, N_LAYERS, make_sweeper, save_tiny, token_ids
from whole_models import load, mask_unit_kind, matrix, mean_loss, out_name, run, skip_layers, stack

from streamprune.model.masking import output_matrices
from streamprune.model.units import TensorRef
from streamprune.paging.hidden_states import Activations
from streamprune.paging.pager import Pager
from streamprune.streaming import masked
from streamprune.streaming.filling import FILL_RIDGE, inverse_gram
from streamprune.streaming.masked import CUT_TOKENS, Trial, cuts_weights, masked_losses

FIRST, SEQ = 1, 12


def drawn(sweeper, seed, least=1):
    """Masks of random units of the layers from FIRST up; every one has a layer that keeps all."""
    generator, kept = torch.Generator().manual_seed(seed), {}
    for layer in range(FIRST, N_LAYERS):
        kept[layer] = {}
        for kind in sweeper.skeleton.family.kinds:
            n = sweeper.skeleton.geometries[layer].units(kind)
            count = n if layer == N_LAYERS - 1 else int(torch.randint(least, n + 1, (), generator=generator))
            kept[layer][kind] = torch.randperm(n, generator=generator) < count
    return kept


@pytest.fixture(params=[("cut", 2), ("zeroed", 2), ("zeroed", 8)], ids=str)
def at_once(request, monkeypatch):
    """Sequences that a layer computes at once: one mask's, with cut weights, or of several with zeros in inputs."""
    way, size = request.param
    monkeypatch.setattr(masked, "cuts_weights", lambda device, tokens: way == "cut")
    return size


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_each_trial_has_the_loss_of_the_whole_model_with_its_mask(family, at_once, tmp_path):
    save_tiny(tmp_path, family)
    sweeper, ids = make_sweeper(tmp_path, micro_batch=at_once), token_ids(5, SEQ)
    gone = [(), (), (2,), (1, 3)]
    places = [slice(0, 3), slice(0, 3), slice(3, 5), slice(3, 5)]
    trials = [
        Trial(drawn(sweeper, number), frozenset(each), place)
        for number, (each, place) in enumerate(zip(gone, places, strict=True))
    ]
    losses = masked_losses(sweeper, ids, trials, FIRST)
    for trial, loss in zip(trials, losses, strict=True):
        model = load(tmp_path)
        for layer, kinds in trial.kept.items():
            for kind, units in kinds.items():
                if layer not in trial.gone:
                    mask_unit_kind(model, layer, kind, units.nonzero().flatten().tolist())
        expected = mean_loss(skip_layers(model, trial.gone), ids[trial.sequences])
        # OLMo 2's norm adds its ε to a mean over all heads: what is masked here is not told of that.
        assert loss == pytest.approx(expected, abs=1e-5 if family == "olmo2" else 1e-11), trial


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_with_lost_lines_filled_in_it_is_the_loss_of_layers_fitted_to_their_own_output(family, at_once, tmp_path):
    save_tiny(tmp_path, family)
    sweeper, ids = make_sweeper(tmp_path, micro_batch=at_once), token_ids(5, SEQ)
    trials = [Trial(drawn(sweeper, number), frozenset(), slice(number, number + 3)) for number in range(2)]
    model, inverses, grams = load(tmp_path), {}, {}
    modules = {
        (layer, member.tensor): member.kind
        for layer in range(FIRST, N_LAYERS)
        for member in output_matrices(sweeper.skeleton, layer)
    }
    for (layer, name), kind in modules.items():
        assert name == f"{out_name(model, kind)}.weight"
        _, (x, _) = run(model, ids, stack(model)[layer].get_submodule(out_name(model, kind)))
        gram = x.T @ x
        grams[layer, name] = gram + FILL_RIDGE * gram.diagonal().mean() * torch.eye(len(gram)).double()
        ref = TensorRef(layer, name, sweeper.skeleton.geometries[layer], None)
        inverses[layer, name] = inverse_gram(gram, ref, "repaired=no")
    losses = masked_losses(sweeper, ids, trials, FIRST, inverses)
    for trial, loss in zip(trials, losses, strict=True):
        model = load(tmp_path)
        for (layer, name), kind in modules.items():
            weight = matrix(stack(model)[layer].get_submodule(out_name(model, kind))).clone()
            units = trial.kept[layer][kind].nonzero().flatten().tolist()
            lines, gram = mask_unit_kind(model, layer, kind, units), grams[layer, name]
            fitted = torch.linalg.solve(gram[lines][:, lines], gram[lines] @ weight.T).T
            matrix(stack(model)[layer].get_submodule(out_name(model, kind)))[:, lines] = fitted
        expected = mean_loss(model, ids[trial.sequences])
        assert loss == pytest.approx(expected, abs=1e-5 if family == "olmo2" else 1e-10)


def test_a_layer_can_lose_all_of_a_kind(at_once, tmp_path):
    save_tiny(tmp_path, "llama")
    sweeper, ids = make_sweeper(tmp_path, micro_batch=at_once), token_ids(2, SEQ)
    none = {kind: torch.zeros(sweeper.skeleton.geometries[2].units(kind)).bool() for kind in ("kv_group", "channel")}
    trial = Trial({2: none}, frozenset(), slice(0, 2))
    (loss,) = masked_losses(sweeper, ids, [trial], FIRST)
    assert loss == pytest.approx(mean_loss(skip_layers(load(tmp_path), [2]), ids), abs=1e-11)


def test_a_gpu_cuts_weights_for_many_tokens_only():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert cuts_weights(cpu, 1) and cuts_weights(gpu, CUT_TOKENS) and not cuts_weights(gpu, CUT_TOKENS - 1)


def test_widths_of_cut_weights_are_of_few_sizes_and_what_overflows_is_not_among_them(tmp_path):
    """A product is compiled for each size, and kept."""
    model = save_tiny(tmp_path, "llama", intermediate_size=100)
    weights = {name: weight.detach() for name, weight in model.model.layers[2].named_parameters()}
    skeleton, sizes = make_sweeper(tmp_path).skeleton, set()
    up, down = weights["mlp.up_proj.weight"], weights["mlp.down_proj.weight"]
    for count in (0, 1, 15, 16, 17, 60, 80, 81, 99):
        kept = torch.randperm(100)[:count].sort().values
        made, inputs = masked.masked_layer(skeleton, 2, weights, {"channel": kept}, {}, {})
        cut_up, cut_down = made["mlp.up_proj.weight"], made["mlp.down_proj.weight"]
        sizes.add(len(cut_up))
        assert cut_up.shape[0] == cut_down.shape[1]
        assert bool(inputs) == (count == 99)
        if not inputs:
            assert (cut_down[:, :count] == down[:, kept]).all() and not cut_down[:, count:].any()
            assert all((up[kept] == row).all(dim=1).any() for row in cut_up)
    assert sizes == {0, 16, 32, 64, 80, 96, 100}


def test_what_goes_is_zero_whatever_it_was():
    x = torch.tensor([[1.0, math.inf, -2.0, math.nan]])
    assert masked.Zeroed(4, [torch.tensor([0, 2])], [1], x.device)(x).tolist() == [[1.0, 0.0, -2.0, 0.0]]


@pytest.mark.parametrize("place", ["device", "host", "scratch"])
def test_where_hidden_states_stay_changes_nothing(place, at_once, tmp_path):
    save_tiny(tmp_path / "model", "llama")
    losses = []
    for where in ("device", place):
        sweeper = make_sweeper(tmp_path / "model", micro_batch=at_once)
        sweeper.place, sweeper.scratch = where, tmp_path
        trials = [Trial(drawn(sweeper, seed), frozenset({seed}), slice(0, 3)) for seed in range(4)]
        losses.append(masked_losses(sweeper, token_ids(3, SEQ), trials, FIRST))
        sweeper.close()
    assert losses[0] == losses[1]


@pytest.mark.parametrize("way", ["cut", "zeroed"])
def test_masks_that_leave_weights_alone_go_through_a_layer_together(way, tmp_path, monkeypatch):
    save_tiny(tmp_path, "llama")
    monkeypatch.setattr(masked, "cuts_weights", lambda device, tokens: way == "cut")
    sweeper, sizes = make_sweeper(tmp_path, micro_batch=4), []
    original = sweeper.skeleton.run_layer

    def run_layer(layer, weights, call, hidden):
        if layer >= FIRST:
            sizes.append((layer, len(hidden)))
        return original(layer, weights, call, hidden)

    monkeypatch.setattr(sweeper.skeleton, "run_layer", run_layer)
    # One leaves layer 2 out: then there are seven in it.
    trials = [Trial(drawn(sweeper, seed), frozenset({2} if seed == 3 else ()), slice(0, 1)) for seed in range(8)]
    masked_losses(sweeper, token_ids(1, SEQ), trials, FIRST)
    of_layer = {layer: [size for each, size in sizes if each == layer] for layer in range(FIRST, N_LAYERS)}
    assert [sum(each) for each in of_layer.values()] == [7 if layer == 2 else 8 for layer in of_layer]
    whole, gap = ([1] * 8, [1] * 7) if way == "cut" else ([4, 4], [4, 3])
    assert all(each == (gap if layer == 2 else whole) for layer, each in of_layer.items())


def test_hidden_states_on_scratch_come_once_for_each_layer_whatever_is_left_out(at_once, tmp_path, monkeypatch):
    save_tiny(tmp_path / "model", "llama")
    sweeper, brought, original = make_sweeper(tmp_path / "model", micro_batch=at_once), [], Activations.bring
    sweeper.place, sweeper.scratch = "scratch", tmp_path

    def bring(self, place, offset, buffer):
        brought.append(len(buffer))
        return original(self, place, offset, buffer)

    monkeypatch.setattr(Activations, "bring", bring)
    trials = [Trial({}, frozenset({2} if number % 3 == 0 else ()), slice(number, number + 1)) for number in range(9)]
    masked_losses(sweeper, token_ids(9, SEQ), trials, FIRST)
    sweeper.close()
    assert sum(brought) == 9 * (N_LAYERS + 1)  # and for the head


def test_one_pass_serves_all_trials_and_what_stays_is_not_read_again(tmp_path, monkeypatch):
    save_tiny(tmp_path, "llama")
    sweeper, orders, original = make_sweeper(tmp_path), [], Pager.pages
    monkeypatch.setattr(
        Pager, "pages", lambda self, order, *rest: orders.append(list(order)) or original(self, order, *rest)
    )
    trials = [Trial(drawn(sweeper, seed), frozenset(), slice(0, 1)) for seed in range(8)]
    sweeper.pager.slots = N_LAYERS
    checkpoint = sweeper.skeleton.checkpoint
    reads = []
    for _ in range(3):
        before = checkpoint.bytes_read
        masked_losses(sweeper, token_ids(1, SEQ), trials, FIRST)
        reads.append(checkpoint.bytes_read - before)
    assert orders == [list(range(N_LAYERS))] * 3
    assert reads[0] >= sweeper.pager.layer_bytes() and reads[1:] == [0, 0]
