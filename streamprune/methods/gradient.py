"""The gradient family: Taylor, SmoothGrad, MoreauPruner and MoreauPruner-GS.

g is the gradient of the mean next-token loss. δ = w_t − w is kept in float32 apart from w: iterating on w
itself would round δ away (a relative error of 1 in bfloat16).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from streamprune.binding import Perturbation
from streamprune.kernels import line_norms, moreau_step, soft_threshold, unit_score
from streamprune.methods.scores import UnitScores
from streamprune.sweep import Statistics, TensorRef

State = dict[tuple[int, str], Tensor]


def taylor(statistics: Statistics, settings: dict[str, Any]) -> UnitScores:
    """|g w|, |w² F|, |g w − ½ w² F| or the line's |Σ g w|, summed over the unit.

    arXiv 2305.11627, Eqs. 3-5, with F = (1/N) Σ_n g_n² and, for `second`, no ½, as its code has it.
    """
    scores, order = UnitScores.zeros(statistics), settings["order"]

    def consume(ref: TensorRef, weight: Tensor, grad: Tensor, fisher: Tensor | None) -> None:
        scores.add(ref, unit_score(weight, grad, ref.member.dim, order, fisher))

    statistics.gradients(consume, second_moment=order in ("second", "mix"))
    return scores


def smoothgrad(statistics: Statistics, settings: dict[str, Any]) -> UnitScores:
    """|mean g ⊙ w| or mean |g ⊙ w| over noisy copies of the weights (2406.07017 states it both ways)."""
    scores, draws = UnitScores.zeros(statistics), settings["draws"]

    def score(ref: TensorRef, weight: Tensor, grad: Tensor) -> None:
        scores.add(ref, unit_score(weight, grad, ref.member.dim))

    if settings["mean"] == "gradient":
        _mean_gradient(statistics, score, {}, settings["sigma"], 0, draws)
        return scores

    def consume(ref: TensorRef, weight: Tensor, grad: Tensor, fisher: Tensor | None) -> None:
        score(ref, weight, grad.div_(draws))

    for draw in range(draws):
        statistics.gradients(consume, Perturbation(settings["sigma"], (statistics.seed, 0, draw)))
    return scores


def moreau(statistics: Statistics, settings: dict[str, Any]) -> UnitScores:
    """|δ_T ⊙ w| / ρ after T gradient steps on the Moreau envelope of the loss (2406.07017, Alg. 1)."""
    return _moreau(statistics, settings, lambda ref, delta, step: None)


def moreau_gs(statistics: Statistics, settings: dict[str, Any]) -> UnitScores:
    """MoreauPruner with group soft-thresholding after each step (2406.07017, §3.3).

    A group is the unit's own slice of a matrix: a row of q, k, v, gate, up, a column of o and down. With
    `eta_quantile`, η is set at step 0 to that quantile of the matrix's line norms ‖g_S‖₂.
    """
    gamma, quantile = settings["gamma"], settings["eta_quantile"]
    thresholds: dict[tuple[int, str], float] = {}  # γη per matrix, with eta_quantile

    def shrink(ref: TensorRef, delta: Tensor, step: int) -> None:
        norms = line_norms(delta, ref.member.dim)
        if quantile is not None and step == 0:
            # δ_1 = −γg, so the quantile of its norms is γη already.
            thresholds[ref.key] = float(torch.quantile(norms.double(), quantile))
        soft_threshold(delta, ref.member.dim, thresholds.get(ref.key, gamma * settings["eta"]), norms)

    return _moreau(statistics, settings, shrink)


def _moreau(
    statistics: Statistics, settings: dict[str, Any], shrink: Callable[[TensorRef, Tensor, int], None]
) -> UnitScores:
    """T updates δ ← shrink((1 − γ/ρ)δ − γ g(w + δ + noise)); the last is scored as it comes, not stored."""
    scores = UnitScores.zeros(statistics)
    rho, gamma, steps = settings["rho"], settings["gamma"], settings["steps"]
    state: State = {}  # a sweep binds a layer with its δ before it hands over that layer's gradients

    def update(step: int, ref: TensorRef, weight: Tensor, grad: Tensor) -> None:
        previous = state.pop(ref.key, None)
        delta = grad.mul_(-gamma) if previous is None else moreau_step(previous.to(grad.device), grad, rho, gamma)
        shrink(ref, delta, step)
        if step < steps - 1:
            state[ref.key] = delta.to("cpu")
        else:
            scores.add(ref, unit_score(weight, delta, ref.member.dim) / rho)

    for step in range(steps):
        _mean_gradient(statistics, partial(update, step), state, settings["sigma"], step, settings["draws"])
    return scores


def _mean_gradient(
    statistics: Statistics,
    finish: Callable[[TensorRef, Tensor, Tensor], None],
    delta: State,
    sigma: float,
    step: int,
    draws: int,
) -> None:
    """The gradient at w + δ + noise, averaged over `draws` draws, given tensor by tensor to `finish`."""
    sums: State = {}

    def consume(last: bool, ref: TensorRef, weight: Tensor, grad: Tensor, fisher: Tensor | None) -> None:
        if draws > 1:
            grad = grad.div_(draws)
        if ref.key in sums:
            grad = sums.pop(ref.key).to(grad.device).add_(grad)
        if last:
            finish(ref, weight, grad)
        else:
            sums[ref.key] = grad.to("cpu")

    for draw in range(draws):
        perturbation = Perturbation(sigma, (statistics.seed, step, draw), delta)
        statistics.gradients(partial(consume, draw == draws - 1), perturbation)
