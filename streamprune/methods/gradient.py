"""Methods that score by gradients: Taylor, SmoothGrad, MoreauPruner and MoreauPruner-GS.

g is the gradient of the mean next-token loss. δ = w_t − w is kept in float32 apart from w: iterating on w
itself would round δ away (a relative error of 1 in bfloat16).
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from streamprune.kernels import moreau_step, soft_threshold
from streamprune.methods.sinks import Sink, WeightPruner
from streamprune.model.units import TensorRef
from streamprune.streaming.binder import Perturbation
from streamprune.streaming.statistics import Statistics

State = MutableMapping[tuple[int, str], Tensor]


def taylor(statistics: Statistics, settings: dict[str, Any], sink: Sink) -> None:
    """Score by |g w|, |w² F|, |g w − ½ w² F| or the line's |Σ g w|, summed over the unit.

    arXiv 2305.11627, Eqs. 3-5, with F = (1/N) Σ_n g_n² and, for `second`, no ½, as its code has it.
    """
    order = settings["order"]

    def consume(ref: TensorRef, weight: Tensor, grad: Tensor) -> None:
        sink.add(ref, weight, grad, order)

    def consume_powers(ref: TensorRef, weight: Tensor, sums: dict[int, Tensor]) -> None:
        sink.add(ref, weight, sums.get(0), order, sums[2].div_(statistics.samples))

    if order in ("second", "mix"):
        statistics.gradient_powers(consume_powers, (0, 2) if order == "mix" else (2,))
    else:
        statistics.gradients(consume)


def smoothgrad(statistics: Statistics, settings: dict[str, Any], sink: Sink) -> None:
    """Score by |mean g ⊙ w| or mean |g ⊙ w| over noisy copies of the weights (2406.07017 states it both ways)."""
    sigma, draws = settings["sigma"], settings["draws"]
    if settings["mean"] == "score" and not isinstance(sink, WeightPruner):
        # Sums over units need no state between the draws.
        for draw in range(draws):
            perturbation = Perturbation(sigma, (statistics.seed, 0, draw))
            statistics.gradients(lambda ref, weight, grad: sink.add(ref, weight, grad.div_(draws)), perturbation)
        return
    of = torch.abs_ if settings["mean"] == "score" else None
    _mean_gradient(statistics, sink.add, {}, sigma, 0, draws, of)


def moreau(statistics: Statistics, settings: dict[str, Any], sink: Sink) -> None:
    """Score by |δ_T ⊙ w| / ρ after T gradient steps on the Moreau envelope of the loss (2406.07017, Alg. 1)."""
    rho, gamma = settings["rho"], settings["gamma"]

    def advance(ref: TensorRef, delta: Tensor | None, grad: Tensor) -> Tensor:
        return moreau_step(delta, grad, rho, gamma, backend=statistics.backend).delta

    _moreau(statistics, settings, sink, advance)


def moreau_gs(statistics: Statistics, settings: dict[str, Any], sink: Sink) -> None:
    """Score as `moreau` does, with group soft-thresholding of δ after each step (2406.07017, §3.3).

    A group is the unit's own slice of a matrix: a row of q, k, v, gate, up, a column of o and down. With
    `eta_quantile`, η is set at step 0 to that quantile of the matrix's line norms ‖g_S‖₂.
    """
    rho, gamma, quantile = settings["rho"], settings["gamma"], settings["eta_quantile"]
    thresholds = statistics.store("threshold")  # γη per matrix, with eta_quantile

    def advance(ref: TensorRef, delta: Tensor | None, grad: Tensor) -> Tensor:
        dim, threshold = ref.dim, gamma * settings["eta"]
        if quantile is not None:
            threshold = float(thresholds[ref.key]) if ref.key in thresholds else 0.0
        step = moreau_step(delta, grad, rho, gamma, dim=dim, threshold=threshold, backend=statistics.backend)
        if quantile is not None and ref.key not in thresholds:
            assert step.norms is not None
            # δ_1 = −γg, so the quantile of its norms is γη already.
            threshold = float(torch.quantile(step.norms.double(), quantile))
            thresholds[ref.key] = torch.tensor(threshold, dtype=torch.float64)
            soft_threshold(step.delta, dim, threshold, step.norms)
        return step.delta

    _moreau(statistics, settings, sink, advance)


def _moreau(
    statistics: Statistics,
    settings: dict[str, Any],
    sink: Sink,
    advance: Callable[[TensorRef, Tensor | None, Tensor], Tensor],
) -> None:
    """Make T updates of δ by `advance`, from the gradient at w + δ + noise; score the last as it comes, unstored."""
    rho, steps = settings["rho"], settings["steps"]
    state = statistics.store("delta")  # a sweep binds a layer with its δ before it hands over that layer's gradients

    def update(step: int, ref: TensorRef, weight: Tensor, grad: Tensor) -> None:
        previous, last = state.pop(ref.key, None), step == steps - 1
        if previous is not None:
            # Where δ is kept narrower it moves where it lies; the last one is scored before it is rounded.
            previous = previous.to(grad) if last else previous.to(grad.device)
        delta = advance(ref, previous, grad)
        if last:
            sink.add(ref, weight, delta, scale=1 / rho)
        else:
            state[ref.key] = delta

    for step in range(steps):
        _mean_gradient(statistics, partial(update, step), state, settings["sigma"], step, settings["draws"])


def _mean_gradient(
    statistics: Statistics,
    finish: Callable[[TensorRef, Tensor, Tensor], object],
    delta: State,
    sigma: float,
    step: int,
    draws: int,
    of: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Average the gradient at w + δ + noise (or `of` it) over `draws` draws; give it to `finish` tensor by tensor."""
    sums = statistics.store("sum")

    def consume(last: bool, ref: TensorRef, weight: Tensor, grad: Tensor) -> None:
        if of is not None:
            grad = of(grad)
        if draws > 1:
            grad = grad.div_(draws)
        if ref.key in sums:
            grad = sums.pop(ref.key).to(grad).add_(grad)
        if last:
            finish(ref, weight, grad)
        else:
            sums[ref.key] = grad

    for draw in range(draws):
        perturbation = Perturbation(sigma, (statistics.seed, step, draw), delta)
        statistics.gradients(partial(consume, draw == draws - 1), perturbation)
