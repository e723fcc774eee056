"""Bernoulli policy: keep probabilities of units or layers, learnt from losses of random masks (arXiv 2406.10576).

Minimised is Φ(s) = E L(m) over masks m ~ Bernoulli(s) under a budget of parameters, Σ cost·s <= budget. Forward passes
are all that it takes: ∇Φ = E[(L(m) − b)·(m − s)/(s(1 − s))] for any b that does not depend on m (§3.2, Eq. 6).

A unit that is drawn by itself is lost in the noise of all others. `explore` draws what the units of a layer and kind
share: Φ(θ) = E L(m(θ + σξ)), ξ ~ N(0, 1), where m(θ) keeps what a run would keep by these logits, and
∇Φ = E[(L(m(θ + σξ)) − L(m(θ − σξ)))·ξ]/2σ (parameter-exploring policy gradients, Sehnke et al. 2010, with symmetric
samples). Units are drawn together then, and every mask meets the budget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from streamprune.errors import StreampruneError
from streamprune.kernels import noise_seed
from streamprune.methods.budget import Masks, Space
from streamprune.storage.journal import Key

STATE = 0  # the layer by whose number the policy's tensors are kept in a store
BETAS, EPSILON = (0.9, 0.99), 1e-12  # of Adam; losses of single masks are noise for the most part
AS_NORMAL = 1.702  # σ(1.702 x) is the normal distribution's Φ(x) to 0.01
MOST_REFUSED = 10  # steps in a row without a finite loss
MOST_MOVED = 0.1  # of probabilities in one step, on the average, that may end with all of them at 0 or 1
ROUNDING = 1e-9  # of parts, that are sums of floating-point numbers
RAMP = 0.05  # of all parameters, by which the budget of `random-progressive` falls
FIGURES = ("loss", "baseline", "kept", "entropy", "changed", "refused")  # of a step


def estimate(masks: Tensor, gains: Tensor, p: Tensor) -> Tensor:
    """Estimate ∇Φ times s(1 − s), so the gradient by logits [n], from masks [count, n] drawn from `p` [n].

    It is the mean of (L − b)·(m − s) (§3.2, Eq. 6 with ∇log p(m|s) = (m − s)/(s(1 − s))): by logits the score does not
    grow where s is near 0 or 1.

    Args:
        gains: L − b of each mask [count]; b must not depend on that mask.
    """
    total = torch.zeros_like(p)
    for mask, gain in zip(masks, gains, strict=True):  # one at a time: of millions of units all take gigabytes
        total += gain * (mask.double() - p)
    return total / len(gains)


class Policy:
    """Policy on a `Space`: draws masks, and learns from their losses. All of its state is in `store`.

    Args:
        start: keep probabilities [n], where `store` has none yet.
        settings: of the method, with what its variant says filled in.
        stage: steps after which the budget falls by RAMP, from one RAMP below all parameters to that of `space`; None
            where it is that from the beginning.

    Attributes:
        space: with the budget of the step that was drawn, or learnt from, last.
    """

    def __init__(
        self,
        space: Space,
        start: Tensor,
        settings: Mapping[str, Any],
        seed: int,
        store: MutableMapping[Key, Tensor],
        stage: int | None = None,
    ) -> None:
        self._whole, self._stage, self.settings, self.seed, self.store = space, stage, settings, seed, store
        self._part, self.space = self._at(0)
        self._direction = space.directions()
        if (STATE, "s") not in store:
            s = self.space.project(start)
            if settings["learner"] == "logits":
                floor = settings["floor"]
                logits = torch.logit(start.clamp(floor, 1 - floor))
                s = self.space.shifted(logits)
                self._put(logits=logits, shared=torch.zeros(len(space.parts), dtype=torch.float64))
            elif settings["learner"] == "explore":
                logits = torch.logit(start.clamp(EPSILON, 1 - EPSILON))
                s = self._marginal(logits)
                moved = torch.zeros(int(self._direction.max()) + 1, dtype=torch.float64)
                self._put(logits=logits, moved=moved)
            self._put(s=s)

    def _at(self, step: int) -> tuple[float, Space]:
        """Return the part of what is to go that does at a step, and the space with its budgets."""
        if self._stage is None:
            return 1.0, self._whole
        part = RAMP * (1 + step // self._stage) / max(RAMP, self._whole.gone)
        part = 1.0 if part > 1 - ROUNDING else part
        return part, self._whole.eased(part)

    def _put(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            self.store[STATE, name] = tensor

    def _get(self, name: str, default: Tensor | None = None) -> Tensor:
        if default is not None and (STATE, name) not in self.store:
            return default
        return self.store[STATE, name].clone()

    @property
    def s(self) -> Tensor:
        """Keep probabilities [n], float64."""
        return self._get("s")

    @property
    def scores(self) -> Tensor:
        """Scores that units are compared by in the end [n]: by which masks were chosen, so logits where they move."""
        if self.settings["learner"] != "explore":
            return self.s
        return self._get("logits") + self._get("moved")[self._direction]

    @property
    def sampled_from(self) -> Tensor:
        """Probabilities that masks are drawn from [n]: away from 0 and 1, which no draw would ever leave again."""
        return self.s.clamp(self.settings["floor"], 1 - self.settings["floor"])

    def draw(self, step: int) -> Tensor:
        """Draw the masks of a step, bool [masks, n]; the same of the same state."""
        self._part, self.space = self._at(step)
        if self.settings["learner"] == "explore":
            moved, ways = self._get("moved"), self.settings["spread"] * self._noise(step)
            return torch.stack([self._masks.kept(moved + sign * way, self._part) for way in ways for sign in (1, -1)])
        p, generator, size = self.sampled_from, self._generator(step), 2 if self.settings["antithetic"] == "yes" else 1
        masks = torch.empty((self.settings["masks"], len(p)), dtype=torch.bool)
        for first in range(0, len(masks), size):
            drawn = torch.rand(len(p), generator=generator, dtype=torch.float64)
            for opposite, mask in enumerate(masks[first : first + size]):
                torch.lt(1 - drawn if opposite else drawn, p, out=mask)
        return masks

    @cached_property
    def _of(self) -> Tensor:
        return self._whole.groups()

    @cached_property
    def _masks(self) -> Masks:
        return Masks(self._whole, self._get("logits"), self._direction)

    def _generator(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(noise_seed(self.seed, "policy", step))

    def _noise(self, step: int) -> Tensor:
        """Draw ξ of the step's pairs of masks [masks / 2, directions]."""
        shape = self.settings["masks"] // 2, int(self._direction.max()) + 1
        return torch.randn(shape, generator=self._generator(step), dtype=torch.float64)

    def _marginal(self, logits: Tensor) -> Tensor:
        """Return the probabilities [n] that units stay when their logits are moved by σξ."""
        return self.space.shifted(logits * (AS_NORMAL / self.settings["spread"]))

    def learn(self, step: int, steps: int, masks: Tensor, losses: Sequence[float], p: Tensor) -> dict[str, float]:
        """Move the probabilities by the losses of one step's masks, which were drawn from `p`; return figures of it.

        The figures are the mean loss, the baseline, the parameters that stay as expected, the mean entropy (nats), how
        many units changed side, and of a step that is refused its mask. `told` returns them again.

        A step with a loss that is not finite is refused: nothing moves, and "refused" is the number of its mask.

        Raises:
            StreampruneError: MOST_REFUSED steps in a row were refused.
        """
        (self._part, self.space), values = self._at(step), torch.tensor(losses, dtype=torch.float64)
        before, figures = self.s, {"loss": float(values.mean())}
        refused = self._get("refused", torch.zeros(()))
        bad = [number for number, loss in enumerate(losses) if not math.isfinite(loss)]
        if bad:
            self._put(refused=refused + 1)
            if int(refused) + 1 == MOST_REFUSED:
                raise StreampruneError(
                    f"step {step + 1}: the loss of mask {bad[0]} is {losses[bad[0]]}, and nothing was learnt from "
                    f"{MOST_REFUSED} steps in a row; try --dtype float32"
                )
            return self._tell(step, steps, figures | {"refused": float(bad[0])})
        if int(refused):
            self._put(refused=torch.zeros(()))
        baseline = self._baseline(values)
        if self.settings["learner"] == "projection":
            s = self._projected(step, steps, masks, values - baseline, p)
        elif self.settings["learner"] == "logits":
            s = self._shared(masks, values - baseline, p)
        else:
            s = self._explored(step, steps, values)
        self._put(s=s)
        changed = int(((s > 0.5) != (before > 0.5)).sum())
        entropy = float(-(torch.special.xlogy(s, s) + torch.special.xlogy(1 - s, 1 - s)).mean())
        figures |= {"baseline": float(baseline.mean()), "kept": float(self.space.costs @ s)}
        return self._tell(step, steps, figures | {"entropy": entropy, "changed": float(changed)})

    def _tell(self, step: int, steps: int, figures: dict[str, float]) -> dict[str, float]:
        """Keep the figures of a step, with the policy."""
        rows = self._get("figures", torch.full((steps, len(FIGURES)), math.nan, dtype=torch.float64))
        rows[step] = torch.tensor([figures.get(name, math.nan) for name in FIGURES], dtype=torch.float64)
        self._put(figures=rows)
        return self.told(step)

    def told(self, step: int) -> dict[str, float]:
        """Return the figures of a step that was learnt from, also in an earlier run."""
        return {
            name: value
            for name, value in zip(FIGURES, self._get("figures")[step].tolist(), strict=True)
            if math.isfinite(value)
        }

    def check_learnt(self) -> None:
        """Raise a StreampruneError if no step was learnt from: all that were made were refused."""
        if not bool(self._get("figures")[:, FIGURES.index("baseline")].isfinite().any()):
            raise StreampruneError("no step had losses that are finite, so nothing was learnt; try --dtype float32")

    def settled(self, step: int) -> bool:
        """Tell whether nothing has changed side in `patience` steps up to this one, all of them at the last budget."""
        window = self.settings["patience"]
        if window is None or step + 1 < window or self._at(step + 1 - window)[0] < 1:
            return False
        changed = self._get("figures")[step + 1 - window : step + 1, FIGURES.index("changed")]
        return bool((changed == 0).all())

    def _baseline(self, losses: Tensor) -> Tensor:
        """Return what is subtracted from each loss; it does not depend on the mask that it stands beside.

        "moving": the mean of earlier steps. "others": that of the step's masks that were drawn apart. "published": the
        moving mean with this step's losses in it already, as the published code has it, which is not unbiased.
        """
        kind, mean = self.settings["baseline"], losses.mean()
        if kind == "others":
            # Opposite masks depend on each other, so neither stands in the other's baseline.
            size = 2 if self.settings["antithetic"] == "yes" else 1
            own = losses.view(-1, size).sum(dim=1).repeat_interleave(size)
            return (losses.sum() - own) / (len(losses) - size)
        before = self._get("baseline", mean)
        after = before + (mean - before) / self.settings["window"]
        self._put(baseline=after)
        return after if kind == "published" else before

    def _projected(self, step: int, steps: int, masks: Tensor, gains: Tensor, p: Tensor) -> Tensor:
        """Take a step against the estimate of ∇Φ and project it onto the budget (Algorithm 1)."""
        published, lr, before = self.settings["variant"] == "published", self.settings["lr"], self.s
        variance, gradient = p * (1 - p), estimate(masks, gains, p)
        if published:
            lr *= (1 + math.cos(math.pi * step / steps)) / 2
            gradient *= len(gains) / max(1, len(gains) - 1) / variance.sqrt()
        elif self.settings["natural"] == "no":  # of these coordinates the Fisher information is 1/(s(1 − s))
            gradient /= variance
        s = self.space.project(before - lr * gradient)
        # Of few units of one cost that may also be where learning ends, a little at a time.
        at_ends, far = bool(((s == 0) | (s == 1)).all()), float((s - before).abs().mean()) > MOST_MOVED
        if 0 < self.space.gone < 1 and at_ends and far:
            raise StreampruneError(
                f"after step {step + 1} every probability is 0 or 1; lower --set lr={self.settings['lr']}"
            )
        return s

    def _shared(self, masks: Tensor, gains: Tensor, p: Tensor) -> Tensor:
        """Move logits of units, and one that the units of a layer and kind share, by Adam; the budget holds exactly.

        Of logits the score is m − p: its variance does not grow where p is near 0 or 1. A shift μ of those that share a
        budget keeps it, and is differentiated through.
        """
        variance, gradient = p * (1 - p), estimate(masks, gains, p)
        for places, _ in self.space.pools:
            weight = self.space.costs[places] * variance[places]
            gradient[places] -= weight / weight.sum() * gradient[places].sum()
        shared = torch.zeros(len(self.space.parts), dtype=torch.float64).index_add_(0, self._of, gradient)
        count = self._counted()
        logits = self._get("logits") - self._adam("logits", gradient, count)
        offsets = self._get("shared") - self._adam("shared", shared, count)
        self._put(logits=logits, shared=offsets)
        return self.space.shifted(logits + offsets[self._of])

    def _explored(self, step: int, steps: int, losses: Tensor) -> Tensor:
        """Move the directions against the slopes that pairs of opposite masks have shown.

        Adam's mean is divided by the size of all slopes together: of each direction's own it is noise. The step falls
        to 0 by a cosine, so that the last ones average the noise out.
        """
        noise, spread = self._noise(step), self.settings["spread"]
        gradient = (losses[0::2] - losses[1::2]) @ noise / (2 * spread * len(noise))
        mean, deviation = self._moments("moved", gradient, self._counted())
        size = deviation.square().mean().sqrt() + EPSILON
        lr = self.settings["lr"] * (1 + math.cos(math.pi * step / steps)) / 2
        moved = self._get("moved") - lr * mean / size
        self._put(moved=moved)
        return self._marginal(self._get("logits") + moved[self._direction])

    def _counted(self) -> float:
        """Count a step that was learnt from, and return their number."""
        count = self._get("count", torch.zeros(1, dtype=torch.float64)) + 1
        self._put(count=count)
        return float(count)

    def _adam(self, name: str, gradient: Tensor, count: float) -> Tensor:
        mean, deviation = self._moments(name, gradient, count)
        return self.settings["lr"] * mean / (deviation + EPSILON)

    def _moments(self, name: str, gradient: Tensor, count: float) -> tuple[Tensor, Tensor]:
        """Return Adam's mean of gradients and the root of that of their squares, without bias."""
        first = BETAS[0] * self._get(f"{name}.first", torch.zeros_like(gradient)) + (1 - BETAS[0]) * gradient
        second = BETAS[1] * self._get(f"{name}.second", torch.zeros_like(gradient)) + (1 - BETAS[1]) * gradient.square()
        self._put(**{f"{name}.first": first, f"{name}.second": second})
        return first / (1 - BETAS[0] ** count), (second / (1 - BETAS[1] ** count)).sqrt()
