"""The table of methods: what each needs, its numbers, and the paper.

A method is a function of `Statistics` (what a sweep can give), its settings, and a sink for its scores: units, layers,
or weights to be pruned. CONTRIBUTING.md says how to add one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamprune.config import Target
from streamprune.errors import UsageError
from streamprune.methods.method import Method, Setting
from streamprune.methods.needs import (
    GRADIENTS,
    GRAMS,
    HIDDEN,
    INVERSES,
    LOSSES,
    MASKED,
    MOMENTS,
    MOVED_GRADIENTS,
    REFITTED_REMOVALS,
    REMOVALS,
    SAMPLE_POWERS,
    STORED_WEIGHTS,
    KeptState,
    Need,
)

_SIGMA = Setting(0.05, "noise relative to each weight", minimum=0)
_ALL: tuple[Target, ...] = ("units", "weights", "layers")
_LONG = (128, 2048)


def _moreau_settings(rho: float, gamma: float) -> dict[str, Setting]:
    return {
        "steps": Setting(10, "updates T", minimum=1),
        "rho": Setting(rho, "weight of the Moreau pull, 1/ρ", minimum=0, exclusive=True),
        "gamma": Setting(gamma, "step size γ", minimum=0, exclusive=True),
        "sigma": _SIGMA,
        "draws": Setting(1, "noisy gradients per update, m", minimum=1),
    }


def _moreau_sweeps(settings: Mapping[str, Any]) -> int:
    return settings["steps"] * settings["draws"]


# δ is bound forwards and backwards in every sweep after the first update; the last update is scored and not kept.
# Beside it moreau-gs keeps a threshold for each matrix: 8 bytes, which no plan counts.
_DELTA = KeptState(
    "delta",
    lambda settings, target: settings["steps"] > 1,
    "steps=1",
    brought=lambda settings: 2 * (settings["steps"] - 1) * settings["draws"],
    taken=lambda settings: settings["steps"] - 1,
)


def _sums_of_moreau(settings: Mapping[str, Any]) -> int:
    return settings["steps"] * (settings["draws"] - 1)


def _sums_of_smoothgrad(settings: Mapping[str, Any]) -> int:
    return settings["draws"] - 1


_SUM = KeptState(
    "sum",
    lambda settings, target: settings["draws"] > 1,
    "draws=1",
    brought=_sums_of_moreau,
    taken=_sums_of_moreau,
    both_ways=False,
)
# Sums over units need no gradient between the draws.
_SUM_OF_SMOOTHGRAD = KeptState(
    "sum",
    lambda settings, target: settings["draws"] > 1 and (settings["mean"] == "gradient" or target == "weights"),
    "draws=1",
    brought=_sums_of_smoothgrad,
    taken=_sums_of_smoothgrad,
    both_ways=False,
)
_NORM = KeptState("norm", lambda settings, target: settings["terms"] == "both", "terms=gradient")

# Scores that a policy can begin with: of methods that keep nothing between sweeps.
_STARTS = ("magnitude", "taylor", "wanda", "wanda-sp", "flap", "thinet", "layer-ppl", "block-influence")
_OF_A_START = (STORED_WEIGHTS, GRADIENTS, MOMENTS, REMOVALS, REFITTED_REMOVALS, LOSSES, HIDDEN)


def _not_of_the_start(settings: Mapping[str, Any]) -> tuple[Need, ...]:
    start = METHODS.get(settings["init"])
    needs = () if start is None else start.needs_for("units", {"refit": settings["repaired"]})
    unneeded = tuple(need for need in _OF_A_START if need not in needs)
    return unneeded if settings["repaired"] == "yes" else (INVERSES, *unneeded)


# P of the inputs of o and down, for the layers that pass with masks.
_INVERSE = KeptState(
    "inverse",
    lambda settings, target: settings["repaired"] == "yes",
    "repaired=no",
    lambda shape, width: width**2,
    brought=lambda settings: _trials(settings)[0],
    taken=lambda settings: 1,
)


def _trials(settings: Mapping[str, Any]) -> tuple[int, int, int]:
    together = min(settings["per_pass"] or 1, settings["steps"])
    return -(-settings["steps"] // together), together * settings["masks"], settings["batch"]


_CHOSEN = "; by default the variant's"
# What a variant does where a setting does not say: as in the paper, as in its code, or two of our own.
_PAPER = {
    "antithetic": "no",
    "learner": "projection",
    "lr": 2e-3,
    "masks": 2,
    "batch": 8,
    "steps": 300,
    "repaired": "no",
}
_OWN = {"antithetic": "yes", "lr": 0.05, "masks": 4}
_VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "best": {**_OWN, "baseline": "moving", "learner": "explore", "batch": 1, "steps": 600},
    "exact": {**_PAPER, "baseline": "moving"},
    "published": {**_PAPER, "baseline": "published"},
    "logits": {**_OWN, "baseline": "others", "learner": "logits", "batch": 8, "steps": 300},
}
_UNIT_BY_UNIT = {"learner": ("projection", "logits")}
_WINDOWED = _UNIT_BY_UNIT | {"baseline": ("moving", "published")}
_UNSCALED = {"learner": ("projection",), "variant": ("exact", "best", "logits")}
_POLICY = {
    "variant": Setting("best", "what else is not set", choices=tuple(_VARIANTS)),
    "init": Setting(
        None,
        "scores to begin with: by default thinet, of layers layer-ppl",
        choices=(*_STARTS, "score-const", "random", "random-progressive"),
        path=True,
    ),
    "steps": Setting(None, f"updates{_CHOSEN}", minimum=1, whole=True),
    "batch": Setting(None, f"sequences of an update{_CHOSEN}", minimum=1, whole=True),
    "masks": Setting(None, f"masks that are tried on them, N_s{_CHOSEN}", minimum=1, whole=True),
    "per_pass": Setting(
        None, "updates that one pass over the layers serves, K; by default the plan's", minimum=1, whole=True
    ),
    "lr": Setting(None, f"step size{_CHOSEN}", minimum=0, exclusive=True),
    "window": Setting(5, "steps of the moving baseline", minimum=1, beside=_WINDOWED),
    "baseline": Setting(
        None, f"what losses are compared with{_CHOSEN}", choices=("moving", "others", "published"), beside=_UNIT_BY_UNIT
    ),
    "antithetic": Setting(None, f"masks come in opposite pairs{_CHOSEN}", choices=("yes", "no")),
    "learner": Setting(None, f"what moves{_CHOSEN}", choices=("projection", "logits", "explore")),
    "spread": Setting(
        0.5,
        "deviation σ of what explore tries, in those of scores",
        minimum=0,
        exclusive=True,
        beside={"learner": ("explore",)},
    ),
    "natural": Setting("no", "times s(1 - s), in projection", choices=("yes", "no"), beside=_UNSCALED),
    "repaired": Setting(
        None, "masks are tried with o and down fitted: by default of units with --compensate", choices=("yes", "no")
    ),
    "patience": Setting(None, "steps after which it ends if no unit changed side", minimum=1, whole=True),
    "floor": Setting(
        1e-3, "least probability that is drawn from", minimum=0, exclusive=True, maximum=0.5, beside=_UNIT_BY_UNIT
    ),
}

_ROWS = (
    Method("random", "plain:random", _ALL, (), "uniform at random, the floor to beat", "-"),
    Method("magnitude", "plain:magnitude", _ALL, (STORED_WEIGHTS,), "|w|, or the l2 norm of the unit or layer", "-"),
    Method(
        "taylor",
        "gradient:taylor",
        _ALL,
        (GRADIENTS,),
        "first-order effect on the loss, |g w|",
        "LLM-Pruner, arXiv 2305.11627",
        {"order": Setting("first", "form", choices=("first", "second", "mix", "vectorize"))},
        sums=lambda settings: 2 if settings["order"] == "mix" else 1,
    ),
    Method(
        "smoothgrad",
        "gradient:smoothgrad",
        _ALL,
        (MOVED_GRADIENTS,),
        "|g w| with g averaged over noisy weights",
        "MoreauPruner, arXiv 2406.07017",
        {
            "draws": Setting(100, "noisy copies", minimum=1),
            "sigma": _SIGMA,
            "mean": Setting("gradient", "what is averaged", choices=("gradient", "score")),
        },
        sweeps=lambda settings: settings["draws"],
        states=(_SUM_OF_SMOOTHGRAD,),
    ),
    Method(
        "moreau",
        "gradient:moreau",
        _ALL,
        (MOVED_GRADIENTS,),
        "|g w| of the loss's Moreau envelope",
        "MoreauPruner, arXiv 2406.07017",
        _moreau_settings(rho=0.05, gamma=1e-3),
        sweeps=_moreau_sweeps,
        states=(_DELTA, _SUM),
    ),
    Method(
        "moreau-gs",
        "gradient:moreau_gs",
        _ALL,
        (MOVED_GRADIENTS,),
        "moreau with group soft-thresholding",
        "MoreauPruner-GS, arXiv 2406.07017",
        {
            **_moreau_settings(rho=0.2, gamma=2e-4),
            "eta": Setting(5e-6, "threshold of the group norms", minimum=0, beside={"eta_quantile": (None,)}),
            "eta_quantile": Setting(None, "eta from this quantile of them at step 0", minimum=0, maximum=1),
        },
        sweeps=_moreau_sweeps,
        states=(_DELTA, _SUM),
        narrows=True,
    ),
    Method(
        "wanda",
        "activation:wanda",
        _ALL,
        (MOMENTS,),
        "|w| times the norm of its input",
        "Wanda, arXiv 2306.11695",
        {},
        _LONG,
    ),
    Method(
        "wanda-sp",
        "activation:wanda_sp",
        ("units",),
        (MOMENTS,),
        "wanda over the columns of o and down",
        "arXiv 2312.11983",
        {},
        _LONG,
    ),
    Method(
        "flap",
        "activation:flap",
        ("units",),
        (MOMENTS,),
        "variance of the inputs of o and down times their columns' squares, and a bias in their place",
        "FLAP, arXiv 2312.11983",
        {"bias": Setting("yes", "add o and down biases that keep the mean output", choices=("yes", "no"))},
        (1024, 128),
        allocation="global",
    ),
    Method(
        "gblm",
        "activation:gblm",
        _ALL,
        (SAMPLE_POWERS, MOMENTS),
        "|w| times the norms of its input and of its gradients",
        "GBLM-Pruner, arXiv 2311.04902",
        {
            "p": Setting(1, "norm over the samples' gradients", minimum=1, maximum=2),
            "alpha": Setting(100.0, "weight of the gradient term", minimum=0, beside={"terms": ("both",)}),
            "terms": Setting("both", "what counts", choices=("both", "gradient")),
            "norm": Setting("mean", "per sample, or as the published code has it", choices=("mean", "published")),
        },
        _LONG,
        unneeded=lambda settings: (MOMENTS,) if settings["terms"] == "gradient" else (),
        states=(_NORM,),
        narrows=True,
        stateless="wanda",
    ),
    Method(
        "thinet",
        "activation:thinet",
        ("units",),
        (REMOVALS, REFITTED_REMOVALS),
        "what a unit adds to the error of o and down as units go one by one",
        "ThiNet, arXiv 1707.06342; with a fit ZipLM, 2302.04089",
        {
            "refit": Setting(
                None, "errors behind a fit of the rest: by default with --compensate", choices=("yes", "no")
            )
        },
        _LONG,
        unneeded=lambda settings: (REMOVALS if settings["refit"] == "yes" else REFITTED_REMOVALS,),
    ),
    Method(
        "sparsegpt",
        "sparsegpt:sparsegpt",
        ("weights",),
        (GRAMS,),
        "second-order error, and an update of what remains",
        "SparseGPT, arXiv 2301.00774",
        {"damp": Setting(0.01, "λ relative to the mean of H's diagonal", minimum=0)},
        _LONG,
    ),
    Method(
        "bernoulli",
        "bernoulli:bernoulli",
        ("units", "layers"),
        (*_OF_A_START, INVERSES, MASKED),
        "keep probabilities, learnt from losses of random masks",
        "arXiv 2406.10576",
        _POLICY,
        (512, 128),
        unneeded=_not_of_the_start,
        allocation="global",
        normalize="none",
        states=(_INVERSE,),
        trials=_trials,
        variants=_VARIANTS,
        check="bernoulli:check",
    ),
    Method(
        "layer-ppl",
        "plain:layer_ppl",
        ("layers",),
        (LOSSES,),
        "perplexity without the layer",
        "Shortened LLaMA, 2402.02834",
    ),
    Method(
        "block-influence",
        "plain:block_influence",
        ("layers",),
        (HIDDEN,),
        "1 - cos between a layer's input and output",
        "ShortGPT, arXiv 2403.03853",
    ),
)
METHODS: Mapping[str, Method] = {method.name: method for method in _ROWS}


def _check_masks(settings: Mapping[str, Any]) -> None:
    """Refuse too few masks for what they are compared with.

    Raises:
        UsageError: there are none beside a mask, or beside a pair of opposite ones.
    """
    size, masks = 2 if settings["antithetic"] == "yes" else 1, settings["masks"]
    if settings["learner"] == "explore" and (size == 1 or masks % 2):
        raise UsageError(
            f"--set masks={masks}: explore compares opposite masks; give an even number, with antithetic=yes"
        )
    if settings["baseline"] == "others" and (masks % size or masks < 2 * size):
        what = "pairs of opposite masks" if size == 2 else "masks"
        raise UsageError(
            f"--set masks={masks}: with baseline=others two {what} are needed at least; give {2 * size}, or moving"
        )


def resolve_settings(
    method: str, given: Mapping[str, Any], target: Target | None = None, *, repairs: bool = False
) -> dict[str, Any]:
    """Resolve all of a method's numbers: `given` over the defaults; `repairs` tells whether a repair follows.

    Raises:
        UsageError: an unknown method or name, a value out of range, or a method that has no scores for `target`.
    """
    if method not in METHODS:
        raise UsageError(f"unknown method {method!r}; known are {', '.join(METHODS)}")
    if target is not None and target not in METHODS[method].targets:
        able = [row.name for row in _ROWS if target in row.targets]
        raise UsageError(f"{method} has no scores for {target}; use one of {', '.join(able)}")
    known = METHODS[method].settings
    for name in given:
        if name not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise UsageError(f"{method} has no setting {name!r}; {has}")
    settings = {
        name: setting.parse(name, given[name]) if given.get(name) is not None else setting.default
        for name, setting in known.items()
    }
    if METHODS[method].variants:
        chosen = METHODS[method].variants[settings["variant"]]
        settings |= {name: value for name, value in chosen.items() if settings[name] is None}
        _check_masks(settings)
        settings["init"] = settings["init"] or ("layer-ppl" if target == "layers" else "thinet")
        if settings["init"] in METHODS:
            resolve_settings(settings["init"], {}, target)
        settings["repaired"] = settings["repaired"] or ("yes" if repairs and target == "units" else "no")
    if "refit" in settings:
        settings["refit"] = settings["refit"] or ("yes" if repairs else "no")
    if repairs and "bias" in settings:  # the fit takes their place
        settings["bias"] = "no"
    METHODS[method].refuse_idle(settings)
    if target == "weights" and settings.get("order") == "vectorize":
        raise UsageError("--set order=vectorize sums over rows and columns, so it has no scores for weights; use first")
    return settings
