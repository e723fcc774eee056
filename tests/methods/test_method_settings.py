"""Settings of the methods: the papers' defaults, and what is refused."""

import pytest

from streamprune.errors import UsageError
from streamprune.methods.table import METHODS, resolve_settings


def test_defaults_are_those_of_the_papers():
    assert resolve_settings("smoothgrad", {}) == {"draws": 100, "sigma": 0.05, "mean": "gradient"}
    common = {"steps": 10, "sigma": 0.05, "draws": 1}
    assert resolve_settings("moreau", {}) == {**common, "rho": 0.05, "gamma": 1e-3}
    gs = {**common, "rho": 0.2, "gamma": 2e-4, "eta": 5e-6, "eta_quantile": None}
    assert resolve_settings("moreau-gs", {}) == gs
    assert resolve_settings("taylor", {}) == {"order": "first"}
    assert resolve_settings("magnitude", {}) == resolve_settings("random", {}) == {}


def test_given_settings_win_and_text_becomes_numbers():
    settings = resolve_settings("moreau-gs", {"steps": "3", "rho": "0.1", "eta_quantile": "0.5", "gamma": 1e-3})
    assert settings["steps"] == 3 and isinstance(settings["steps"], int)
    assert (settings["rho"], settings["eta_quantile"], settings["gamma"]) == (0.1, 0.5, 1e-3)
    assert settings["eta"] == 5e-6
    assert resolve_settings("taylor", {"order": "mix"}) == {"order": "mix"}


@pytest.mark.parametrize(
    "method,given,fragments",
    [
        ("wanda2", {}, ["wanda2", *METHODS]),
        ("moreau", {"lambda": 1}, ["moreau", "lambda", "rho", "gamma", "steps"]),
        ("moreau", {"eta": 1e-6}, ["moreau", "eta"]),
        ("random", {"seed": 1}, ["random", "seed"]),
        ("moreau", {"rho": "small"}, ["rho", "small", "number"]),
        ("moreau", {"rho": ""}, ["rho", "number"]),
        ("moreau", {"steps": "2.5"}, ["steps", "2.5", "integer"]),
        ("moreau", {"steps": "ten"}, ["steps", "ten", "integer"]),
        ("moreau", {"steps": 0}, ["steps", "0", "1"]),
        ("moreau", {"draws": "-1"}, ["draws", "-1", "1"]),
        ("moreau", {"rho": 0}, ["rho", "0"]),
        ("moreau", {"gamma": "0"}, ["gamma", "0"]),
        ("moreau", {"gamma": -1e-3}, ["gamma", "0"]),
        ("smoothgrad", {"sigma": "-0.1"}, ["sigma", "-0.1", "0"]),
        ("moreau-gs", {"eta": "-1"}, ["eta", "-1", "0"]),
        ("moreau-gs", {"eta_quantile": 1.5}, ["eta_quantile", "1.5", "1"]),
        ("moreau-gs", {"eta_quantile": "-0.5"}, ["eta_quantile", "-0.5", "0"]),
        ("moreau", {"rho": "nan"}, ["rho", "nan"]),
        ("smoothgrad", {"sigma": float("nan")}, ["sigma", "nan"]),
        ("moreau-gs", {"eta_quantile": "nan"}, ["eta_quantile", "nan"]),
        ("moreau-gs", {"eta": "nan"}, ["eta", "nan"]),
        ("moreau", {"steps": "nan"}, ["steps", "nan"]),
        ("taylor", {"order": "third"}, ["order", "third", "first", "second", "mix", "vectorize"]),
        ("smoothgrad", {"mean": "median"}, ["mean", "median", "gradient", "score"]),
    ],
)
def test_a_setting_that_cannot_be_meant_is_refused_by_name_value_and_remedy(method, given, fragments):
    with pytest.raises(UsageError) as error:
        resolve_settings(method, given)
    message = str(error.value)
    assert all(fragment in message for fragment in fragments), message
    assert "\n" not in message


@pytest.mark.parametrize("name,value", [("sigma", "inf"), ("gamma", "inf"), ("rho", "inf"), ("steps", float("inf"))])
def test_an_infinite_setting_is_refused(name, value):
    # Infinite noise or steps make every score NaN, and NaN has no order.
    with pytest.raises(UsageError):
        resolve_settings("moreau", {name: value})


def test_a_fractional_count_is_refused_whatever_its_type():
    with pytest.raises(UsageError):
        resolve_settings("moreau", {"steps": 2.5})


@pytest.mark.parametrize(
    "method,given,remedy",
    [
        ("bernoulli", {"natural": "yes"}, "pass --set learner=projection"),
        ("bernoulli", {"window": 9}, "pass --set learner=projection"),
        ("bernoulli", {"baseline": "others"}, "pass --set learner=projection"),
        ("bernoulli", {"floor": 0.2}, "pass --set learner=projection"),
        ("bernoulli", {"variant": "exact", "spread": 1.0}, "pass --set learner=explore"),
        ("bernoulli", {"variant": "logits", "natural": "yes"}, "pass --set learner=projection"),
        ("moreau-gs", {"eta": 7, "eta_quantile": 0.3}, "leave it out"),
        ("gblm", {"terms": "gradient", "alpha": 7}, "pass --set terms=both"),
    ],
)
def test_a_setting_that_does_nothing_beside_another_is_refused(method, given, remedy):
    with pytest.raises(UsageError, match=f"does nothing with .*{remedy}"):
        resolve_settings(method, given)


@pytest.mark.parametrize("method", METHODS)
def test_all_settings_as_they_were_resolved_can_be_given_again(method):
    for variant in METHODS[method].variants or ("",):
        settings = resolve_settings(method, {"variant": variant} if variant else {})
        given = {name: value for name, value in settings.items() if value is not None}
        assert resolve_settings(method, given) == settings


def test_a_repair_takes_the_place_of_biases():
    assert resolve_settings("flap", {}, "units")["bias"] == "yes"
    assert resolve_settings("flap", {}, "units", repairs=True)["bias"] == "no"


def test_a_path_that_is_too_long_is_none_of_the_choices():
    with pytest.raises(UsageError, match="choose one of"):
        resolve_settings("bernoulli", {"init": "x" * 300})
