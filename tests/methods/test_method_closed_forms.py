"""Methods driven by a known gradient equal their closed forms."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from fake_statistics import FAKE_LAYERS, HIDDEN, KINDS, FakeStatistics, G, W, constant, fake_totals, random_tensors
from plain_methods import assert_scores, group_shrink, line_dim, run

from streamprune.methods.sinks import UnitScores
from streamprune.methods.table import METHODS, resolve_settings
from streamprune.model.units import Geometry, all_units


def labels(method):
    return {need.label for need in method.needs}


@pytest.mark.parametrize("steps", [1, 2, 10])
@pytest.mark.parametrize("rho,gamma", [(0.05, 1e-3), (0.2, 2e-4), (0.1, 0.1), (0.1, 0.15)])
def test_identity_2_constant_gradient_gives_a_geometric_factor(rho, gamma, steps):
    factor = 1 - (1 - gamma / rho) ** steps
    expected = fake_totals({key: factor * (G[key] * w).abs() for key, w in W.items()})
    assert_scores(run("moreau", constant(), steps=steps, rho=rho, gamma=gamma, draws=3), expected, rtol=1e-11)


@pytest.mark.parametrize("steps", [1, 2, 10])
@pytest.mark.parametrize("rho,gamma", [(0.05, 1e-3), (0.2, 2e-4), (0.1, 0.1)])
def test_identity_2_with_group_shrinking_the_same_factor_times_the_shrunk_gradient(rho, gamma, steps):
    eta, factor = 2.5, 1 - (1 - gamma / rho) ** steps
    shrunk = {key: group_shrink(g, line_dim(key[1]), eta) for key, g in G.items()}
    zero = torch.cat([(s == 0).all(1 - line_dim(key[1])) for key, s in shrunk.items()]).double().mean()
    assert 0.2 < zero < 0.8
    expected = fake_totals({key: factor * (shrunk[key] * w).abs() for key, w in W.items()})
    scores = run("moreau-gs", constant(), steps=steps, rho=rho, gamma=gamma, eta=eta)
    assert_scores(scores, expected, rtol=1e-10, atol=1e-14)


def test_identity_2_holds_for_bfloat16_weights_because_delta_is_kept_apart_in_float32():
    weights = {key: w.bfloat16() for key, w in W.items()}
    small = {key: (g * 1e-4).float() for key, g in G.items()}  # w + δ rounds to w in bf16
    fake = FakeStatistics(weights, lambda key, weight: small[key], compute=torch.bfloat16)
    scores = run("moreau", fake, steps=10, rho=0.05, gamma=1e-3)
    factor = 1 - (1 - 1e-3 / 0.05) ** 10
    expected = {key: factor * (small[key].double() * w.double()).abs() for key, w in weights.items()}
    assert_scores(scores, fake_totals(expected), rtol=3e-6)
    assert {value.dtype for p in fake.perturbations for value in p.delta.values()} <= {torch.float32}


@pytest.mark.parametrize("dim_of", [0, 1], ids=["rows", "columns"])
def test_identity_3_one_step_is_nonzero_exactly_where_the_gradient_norm_exceeds_eta(dim_of):
    # Only one tensor has gradients, so that its lines are the channels' scores.
    name = "mlp.up_proj.weight" if dim_of == 0 else "mlp.down_proj.weight"
    norms = torch.tensor([0.0, 1.0, 2.0, 2.5, 4.0], dtype=torch.float64)
    only = {key: torch.zeros_like(w) for key, w in W.items()}
    for layer in FAKE_LAYERS:
        line = torch.zeros(HIDDEN, dtype=torch.float64)
        line[0], line[3] = 0.6, -0.8
        grad = norms[:, None] * line
        only[layer, name] = grad if dim_of == 0 else grad.T.contiguous()
    for eta, expected in ((0, [0, 1, 1, 1, 1]), (1.5, [0, 0, 1, 1, 1]), (2.25, [0, 0, 0, 1, 1]), (5, [0] * 5)):
        scores = run("moreau-gs", constant(only), steps=1, eta=eta, gamma=0.125, rho=0.25)
        for layer in FAKE_LAYERS:
            assert (scores[layer, "channel"] > 0).tolist() == [bool(x) for x in expected], eta
            assert (scores[layer, "kv_group"] == 0).all()


def test_identity_3_a_one_element_group_is_scalar_soft_thresholded():
    # One nonzero element per row: the row's group shrink is that element's soft threshold.
    only = {key: torch.zeros_like(w) for key, w in W.items()}
    values = torch.tensor([-3.0, -0.5, 0.25, 1.0, 2.0], dtype=torch.float64)
    only[2, "mlp.gate_proj.weight"][:, 4] = values
    eta, gamma, rho = 0.75, 0.01, 0.05
    scores = run("moreau-gs", constant(only), steps=1, eta=eta, gamma=gamma, rho=rho)
    soft = (values.abs() - eta).clamp(min=0)
    expected = gamma / rho * soft * W[2, "mlp.gate_proj.weight"][:, 4].abs()
    torch.testing.assert_close(scores[2, "channel"], expected, rtol=1e-12, atol=0)


def nonlinear(key, weight):
    """A gradient that depends on every element, and on where it stands."""
    return torch.sin(3 * weight) + 0.2 * weight.flip(0)


def test_identity_4_delta_is_the_discounted_sum_of_the_gradients_seen():
    rho, gamma, steps, draws = 0.3, 0.1, 5, 2
    fake = FakeStatistics(W, nonlinear)
    scores = run("moreau", fake, steps=steps, draws=draws, rho=rho, gamma=gamma, sigma=0.05)
    assert len(fake.grads) == steps * draws
    delta = {}
    for key in W:
        means = [sum(g[key] for g in fake.grads[t * draws : (t + 1) * draws]) / draws for t in range(steps)]
        delta[key] = -gamma * sum((1 - gamma / rho) ** (steps - 1 - t) * g for t, g in enumerate(means))
    assert_scores(scores, fake_totals({key: (delta[key] * w).abs() / rho for key, w in W.items()}), rtol=1e-12)


def test_identity_4_the_gradient_is_taken_at_the_weight_plus_delta():
    rho, gamma = 0.3, 0.1
    fake = FakeStatistics(W, nonlinear)
    run("moreau", fake, steps=4, rho=rho, gamma=gamma, sigma=0)
    delta = {key: torch.zeros_like(w) for key, w in W.items()}
    for seen, grads in zip(fake.seen, fake.grads, strict=True):
        for key, w in W.items():
            torch.testing.assert_close(seen[key], w + delta[key], rtol=1e-13, atol=1e-14)
            delta[key] = (1 - gamma / rho) * delta[key] - gamma * grads[key]


def test_identity_4_gamma_equal_to_rho_is_memoryless():
    fake = FakeStatistics(W, nonlinear)
    scores = run("moreau", fake, steps=4, rho=0.25, gamma=0.25, sigma=0)
    last = fake.grads[-1]
    assert_scores(scores, fake_totals({key: (last[key] * w).abs() for key, w in W.items()}), rtol=1e-12)


H, C = {key: h.abs() + 0.1 for key, h in random_tensors(3).items()}, random_tensors(4)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_identity_5_quadratic_loss_has_a_closed_form(steps):
    rho, gamma = 0.2, 0.03
    fake = FakeStatistics(W, lambda key, weight: H[key] * (weight - C[key]))
    elements = {}
    for key, w in W.items():
        rate = H[key] + 1 / rho
        delta = -(1 - (1 - gamma * rate) ** steps) / rate * H[key] * (w - C[key])
        elements[key] = (delta * w).abs() / rho
    assert_scores(run("moreau", fake, steps=steps, rho=rho, gamma=gamma, sigma=0), fake_totals(elements), rtol=1e-11)


def test_identity_5_many_steps_reach_the_gradient_of_the_moreau_envelope():
    rho, gamma = 0.2, 0.05
    fake = FakeStatistics(W, lambda key, weight: H[key] * (weight - C[key]))
    elements = {key: (H[key] * (w - C[key]) * w).abs() / (1 + rho * H[key]) for key, w in W.items()}
    scores = run("moreau", fake, steps=150, rho=rho, gamma=gamma, sigma=0)
    assert_scores(scores, fake_totals(elements), rtol=1e-9)


@pytest.mark.parametrize(
    "name,settings",
    [("smoothgrad", {"draws": 3}), ("moreau", {"draws": 2}), ("moreau-gs", {"draws": 2, "eta": 1.0})],
)
def test_identity_6_a_linear_loss_does_not_feel_noise(name, settings):
    quiet, noisy = run(name, constant(), **settings, sigma=0), run(name, constant(), **settings, sigma=0.7)
    assert all(torch.equal(noisy[key], quiet[key]) for key in quiet)


def test_identity_6_zero_weights_get_no_noise_and_score_zero():
    weights = {key: w.clone() for key, w in W.items()}
    for layer in FAKE_LAYERS:
        weights[layer, "mlp.gate_proj.weight"][2] = 0
        weights[layer, "mlp.up_proj.weight"][2] = 0
        weights[layer, "mlp.down_proj.weight"][:, 2] = 0
    fake = FakeStatistics(weights, nonlinear)
    for name, settings in (("smoothgrad", {"draws": 3}), ("moreau", {"steps": 1, "draws": 3}), ("moreau", {})):
        scores = run(name, fake, sigma=0.5, **settings)
        for layer in FAKE_LAYERS:
            assert scores[layer, "channel"][2] == 0
            assert (scores[layer, "channel"][[0, 1, 3, 4]] > 0).all()
    for seen, perturbation in zip(fake.seen, fake.perturbations, strict=True):
        if not perturbation.delta:
            assert (seen[2, "mlp.up_proj.weight"][2] == 0).all()


@pytest.mark.parametrize("name,settings", [("smoothgrad", {"draws": 4}), ("moreau", {"draws": 2, "steps": 3})])
def test_every_step_and_draw_sees_other_noise(name, settings):
    fake = FakeStatistics(W, lambda key, weight: G[key], seed=9)
    run(name, fake, sigma=0.05, **settings)
    keys = [perturbation.key for perturbation in fake.perturbations]
    steps, draws = settings.get("steps", 1), settings["draws"]
    assert keys == [(9, step, draw) for step in range(steps) for draw in range(draws)]
    assert all(perturbation.sigma == 0.05 for perturbation in fake.perturbations)


def test_smoothgrad_forms_agree_only_where_gradients_do_not_change_sign():
    flips = itertools.cycle([1.0, -1.0])
    sign = {}

    def alternating(key, weight):
        if key == (2, "self_attn.q_proj.weight"):
            sign["now"] = next(flips)
        return sign["now"] * G[key]

    of_mean = run("smoothgrad", FakeStatistics(W, alternating), draws=2)
    mean_of = run("smoothgrad", FakeStatistics(W, alternating), draws=2, mean="score")
    assert all((value == 0).all() for value in of_mean.values())
    assert_scores(mean_of, fake_totals({key: (G[key] * w).abs() for key, w in W.items()}), rtol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("quantile", [0, 0.25, 0.3, 0.5, 0.9, 1])
def test_eta_quantile_zeroes_the_lines_up_to_that_quantile_of_each_matrix(quantile, dtype):
    # Rows of norms 1..5 in `up` alone; matrices of other layers are a thousand times larger and decide nothing.
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(5, HIDDEN, generator=generator, dtype=torch.float64), dim=1)
    rows = rows * torch.tensor([3.0, 1.0, 5.0, 2.0, 4.0])[:, None]
    only = {key: torch.zeros_like(w, dtype=dtype) for key, w in W.items()}
    only[2, "mlp.up_proj.weight"], only[3, "mlp.up_proj.weight"] = rows.to(dtype), (1000 * rows).to(dtype)
    weights = {key: w.to(dtype) for key, w in W.items()}
    fake = FakeStatistics(weights, lambda key, weight: only[key], compute=dtype)
    scores = run("moreau-gs", fake, steps=1, eta_quantile=quantile)
    eta = 1 + 4 * quantile  # of 1, 2, 3, 4, 5 with linear interpolation
    for layer in FAKE_LAYERS:
        positive = (scores[layer, "channel"] > 0).tolist()
        assert positive == [norm > eta + 1e-9 for norm in (3, 1, 5, 2, 4)]
        assert torch.isfinite(scores[layer, "kv_group"]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eta_quantile_of_one_zeroes_every_unit(dtype):
    # The largest line's norm equals γη, and a line goes when its norm is at most γη.
    for seed in range(20):
        grads = random_tensors(seed, dtype=dtype)
        fake = FakeStatistics(grads, lambda key, weight, grads=grads: grads[key], compute=dtype)
        scores = run("moreau-gs", fake, steps=1, eta_quantile=1)
        assert all((values == 0).all() for values in scores.values()), seed


def test_eta_quantile_is_fixed_at_step_zero():
    # Gradients shrink tenfold after the first sweep: with η from step 0, later steps are shrunk to nothing.
    def fading(key, weight):
        return G[key] * (1.0 if len(fake.grads) == 0 else 0.1)

    fake = FakeStatistics(W, fading)
    scores = run("moreau-gs", fake, steps=2, eta_quantile=0.47, gamma=0.25, rho=0.25)
    # γ = ρ forgets δ₁, so δ₂ = GST(−0.1γg), which is 0 wherever 0.1‖g_S‖ ≤ η.
    elements = {}
    for key, w in W.items():
        dim = line_dim(key[1])
        eta = float(G[key].square().sum(1 - dim).sqrt().quantile(0.47))
        elements[key] = (group_shrink(0.1 * G[key], dim, eta) * w).abs()
    expected = fake_totals(elements)
    assert all((value == 0).all() for value in expected.values())
    assert_scores(scores, expected)


def test_eta_quantile_does_not_depend_on_the_scale_of_the_gradient():
    scaled = {key: 1e-6 * g for key, g in G.items()}
    settings = {"steps": 3, "eta_quantile": 0.47}
    plain, small = run("moreau-gs", constant(), **settings), run("moreau-gs", constant(scaled), **settings)
    assert_scores(small, {key: 1e-6 * value for key, value in plain.items()}, rtol=1e-10)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if labels(method) == {"gradients"}])
def test_the_table_announces_as_many_sweeps_as_a_method_makes(name):
    given = {"draws": 3, "steps": 2}
    settings = resolve_settings(name, {key: value for key, value in given.items() if key in METHODS[name].settings})
    fake = constant()
    METHODS[name].score(fake, settings, UnitScores(fake.sweeper.skeleton.all_units(fake.layers)))
    assert len(fake.seen) == METHODS[name].sweeps(settings)


@pytest.mark.parametrize(
    "name", [name for name, method in METHODS.items() if labels(method) <= {"weights", "gradients"}]
)
def test_scoring_leaves_the_weights_alone(name):
    fake = FakeStatistics({key: w.clone() for key, w in W.items()}, nonlinear)
    run(name, fake, **({"draws": 2} if "draws" in METHODS[name].settings else {}))
    assert all(torch.equal(fake.stored[key], w) for key, w in W.items())


# --- random ----------------------------------------------------------------------------------------------------


def test_random_is_uniform_seeded_and_different_in_every_layer_and_kind():
    many = Geometry(kv_groups=4000, n_rep=1, head_dim=2, channels=4000)

    skeleton = SimpleNamespace(all_units=lambda layers: {layer: all_units(many, KINDS) for layer in layers})
    sweeper = SimpleNamespace(skeleton=skeleton)

    def scores(seed, layers=FAKE_LAYERS):
        return run("random", SimpleNamespace(layers=layers, sweeper=sweeper, seed=seed))

    first, again, other = scores(1), scores(1), scores(2)
    assert all(torch.equal(first[key], again[key]) for key in first)
    everything = [*first.values(), *other.values()]
    assert len({tuple(values[:20].tolist()) for values in everything}) == len(everything)
    for values in everything:
        assert values.min() >= 0 and values.max() < 1
        assert (values.sort().values - torch.linspace(0, 1, 4000)).abs().max() < 2.23 / 4000**0.5
    correlations = torch.corrcoef(torch.stack(everything)) - torch.eye(len(everything))
    assert correlations.abs().max() < 5 / 4000**0.5
    # A layer's scores do not depend on which other layers are prunable.
    assert torch.equal(scores(1, (3,))[3, "channel"], first[3, "channel"])
