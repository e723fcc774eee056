"""Streamed scores of saved models equal plain autograd of the whole model."""

import itertools

import pytest
import torch
from plain_methods import LAYERS, SIZES, assert_scores, group_shrink, line_dim, run, unit_totals
from tiny_models import N_LAYERS, make_sweeper, save_tiny, token_ids, whole_model_gradients

from streamprune.streaming.statistics import Statistics


def averaged(gradients):
    return {key: sum(grads[key] for grads in gradients) / len(gradients) for key in gradients[0]}


def whole_moreau(case, *, steps, rho, gamma, sigma, draws, eta=None, quantile=None):
    """MoreauPruner(-GS) on the whole model in float64: δ after T updates, and how many lines are zero."""
    delta = {key: torch.zeros_like(weight) for key, weight in case.weights.items()}
    etas = {}
    for step in range(steps):
        grads = averaged([case.gradients(case.noisy(sigma, step, draw, delta)) for draw in range(draws)])
        for key, grad in grads.items():
            dim = line_dim(key[1])
            if quantile is not None and step == 0:
                etas[key] = float(grad.square().sum(1 - dim).sqrt().quantile(quantile))
            delta[key] = (1 - gamma / rho) * delta[key] - gamma * grad
            if eta is not None or quantile is not None:
                delta[key] = group_shrink(delta[key], dim, gamma * etas.get(key, eta))
    return delta


@pytest.mark.parametrize("order", ["first", "second", "mix", "vectorize"])
def test_taylor_equals_the_whole_model(order, case):
    grads, weights = case.gradients(), case.weights
    reduce = {}
    if order == "first":
        elements = {key: (grads[key] * weight).abs() for key, weight in weights.items()}
    elif order == "vectorize":
        elements = {key: grads[key] * weight for key, weight in weights.items()}
        # The absolute value is taken per row or column, before matrices are added.
        reduce = {"reduce": lambda piece, dim: piece.sum(1 - dim).abs().sum()}
    else:
        samples = [case.gradients(ids=case.ids[n : n + 1]) for n in range(len(case.ids))]
        fisher = {key: sum(sample[key] ** 2 for sample in samples) / len(samples) for key in weights}
        elements = {key: weight**2 * fisher[key] for key, weight in weights.items()}
        if order == "mix":
            elements = {key: (grads[key] * w - elements[key] / 2).abs() for key, w in weights.items()}
    # Per-sample gradients go through other batch sizes, and Llama's norms compute in float32.
    rtol = 1e-9 if order in ("first", "vectorize") else 1e-5
    assert_scores(run("taylor", case.statistics(), order=order), case.totals(elements, **reduce), rtol)


@pytest.mark.parametrize("mean", ["gradient", "score"])
def test_smoothgrad_equals_the_whole_model_with_the_same_noise(mean, case):
    draws, sigma = 3, 0.1
    noisy = [case.gradients(case.noisy(sigma, 0, draw)) for draw in range(draws)]
    if mean == "gradient":
        elements = {key: (grad * case.weights[key]).abs() for key, grad in averaged(noisy).items()}
    else:
        elements = averaged([{key: (g * case.weights[key]).abs() for key, g in grads.items()} for grads in noisy])
    scores = run("smoothgrad", case.statistics(), draws=draws, sigma=sigma, mean=mean)
    assert_scores(scores, case.totals(elements))
    plain = run("taylor", case.statistics())
    assert all((scores[key] / plain[key] - 1).abs().max() > 1e-3 for key in scores)  # the noise does something


@pytest.mark.parametrize("steps,draws", [(1, 1), (4, 1), (3, 2)])
def test_moreau_equals_the_whole_model(steps, draws, case):
    # γ so large that the gradient changes on the way: a method that never moved w would be seen.
    settings = {"steps": steps, "draws": draws, "rho": 0.3, "gamma": 0.1, "sigma": 0.05}
    delta = whole_moreau(case, **settings)
    expected = case.totals({key: (delta[key] * w).abs() / settings["rho"] for key, w in case.weights.items()})
    scores = run("moreau", case.statistics(), **settings)
    assert_scores(scores, expected, rtol=1e-6)
    if steps > 1:
        constant = run("smoothgrad", case.statistics(), draws=draws, sigma=settings["sigma"])
        factor = 1 - (1 - settings["gamma"] / settings["rho"]) ** steps
        assert any((scores[key] / (factor * constant[key]) - 1).abs().max() > 1e-2 for key in scores)


@pytest.mark.parametrize("choice", ["eta", "eta_quantile"])
@pytest.mark.parametrize("steps,draws", [(1, 1), (4, 1), (3, 2)])
def test_moreau_gs_equals_the_whole_model(steps, draws, choice, case):
    settings = {"steps": steps, "draws": draws, "rho": 0.3, "gamma": 0.1, "sigma": 0.05}
    if choice == "eta":
        grads = case.gradients()
        norms = torch.cat([grad.square().sum(1 - line_dim(key[1])).sqrt() for key, grad in grads.items()])
        eta = float(norms.quantile(0.4))
        expected, given = {"eta": eta}, {"eta": eta}
    else:
        # Between two norms: a norm that equals the threshold would be decided by the last bit.
        expected, given = {"quantile": 0.27}, {"eta_quantile": 0.27}
    delta = whole_moreau(case, **settings, **expected)
    zero = torch.cat([(value == 0).all(1 - line_dim(key[1])) for key, value in delta.items()]).double().mean()
    assert 0.05 < zero < 0.8, "the threshold must bite, and not everywhere"
    elements = {key: (delta[key] * w).abs() / settings["rho"] for key, w in case.weights.items()}
    scores = run("moreau-gs", case.statistics(), **settings, **given)
    largest = max(float(value.max()) for value in scores.values())
    assert_scores(scores, case.totals(elements), rtol=1e-5, atol=1e-9 * largest)


def test_magnitude_is_the_l2_norm_of_the_unit(case):
    squares = case.totals({key: weight**2 for key, weight in case.weights.items()})
    expected = {key: value.sqrt() for key, value in squares.items()}
    assert_scores(run("magnitude", case.statistics()), expected, rtol=1e-13)


def test_scores_cover_the_prunable_layers_and_kinds_only(case):
    for name, settings in (("random", {}), ("magnitude", {}), ("taylor", {}), ("moreau", {"steps": 1})):
        scores = run(name, case.statistics(), **settings)
        assert set(scores) == set(itertools.product(LAYERS, case.kinds)), name
        for (_, kind), values in scores.items():
            assert values.shape == (case.sizes.kv_groups if kind == "kv_group" else case.sizes.channels,)
            assert torch.isfinite(values).all() and (values >= 0).all()


def test_low_precision_checkpoints_score_their_stored_weights(tmp_path):
    # bf16 on disk, float64 compute: the weights are exact, so nothing may be lost.
    save_tiny(tmp_path, "llama", dtype=torch.bfloat16)
    ids = token_ids()
    stored = run("taylor", Statistics(make_sweeper(tmp_path), ids, LAYERS, 0))
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    grads = whole_model_gradients(model, ids)
    elements = {}
    for layer in LAYERS:
        for name, weight in model.model.layers[layer].named_parameters():
            if weight.ndim == 2:
                elements[layer, name] = (weight.detach() * grads[f"model.layers.{layer}.{name}"]).abs()
    # The product is made in float32 because the weight is not float64.
    assert_scores(stored, unit_totals(SIZES["llama"], ("kv_group", "channel"), LAYERS, elements), rtol=1e-5)


def test_models_have_layers_outside_the_prunable_ones():
    assert min(LAYERS) > 0 and max(LAYERS) < N_LAYERS - 1
