"""The policy's estimate and learning, against enumeration."""

from itertools import pairwise, product

import pytest
import torch
from memory_counter import Counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toy_spaces import F64, highest, made, random

from streamprune.errors import StreampruneError, UsageError
from streamprune.methods.needs import INVERSES, MASKED, POLICY_BYTES, REFITTED_REMOVALS, REMOVALS
from streamprune.methods.policy import MOST_REFUSED, Policy, estimate
from streamprune.methods.table import METHODS, resolve_settings


def settings(**given):
    return resolve_settings("bernoulli", given, "units")


# The estimate.

P = torch.tensor([0.3, 0.6, 0.85], dtype=F64)
MASKS = torch.tensor(list(product((False, True), repeat=3)))


def loss(mask):
    """Any function of three bits."""
    table = torch.tensor([2.0, -1.0, 0.5, 3.0, 1.0, 4.0, -2.0, 0.25], dtype=F64)
    return table[(mask.long() @ torch.tensor([4, 2, 1]))]


def probability(mask):
    return torch.where(mask, P, 1 - P).prod(dim=-1)


def gradient():
    """∂Φ/∂s_i = E[L | m_i = 1] − E[L | m_i = 0]."""
    losses, chances = loss(MASKS), probability(MASKS)
    return torch.stack(
        [
            (losses * chances * MASKS[:, i]).sum() / P[i] - (losses * chances * ~MASKS[:, i]).sum() / (1 - P[i])
            for i in range(3)
        ]
    )


@pytest.mark.parametrize("baseline", [0.0, 1.7, -30.0])
def test_over_all_masks_the_estimate_is_the_gradient_whatever_an_earlier_baseline_is(baseline):
    mean = sum(
        chance * estimate(mask[None], (each - baseline)[None], P)
        for mask, chance, each in zip(MASKS, probability(MASKS), loss(MASKS), strict=True)
    )
    torch.testing.assert_close(mean / (P * (1 - P)), gradient())


def policy(budget=3.0, **given):
    space = made({(0, "channel"): slice(0, 3)}, torch.ones(3, dtype=F64), budget)
    return Policy(space, P, settings(**given), 0, {})


def test_over_all_pairs_the_other_mask_is_a_baseline_without_bias():
    learner = policy(variant="logits", antithetic="no", masks=2)
    mean = torch.zeros(3, dtype=F64)
    for first, second in product(MASKS, repeat=2):
        masks = torch.stack([first, second])
        losses = loss(masks)
        mean += probability(masks).prod() * estimate(masks, losses - learner._baseline(losses), P)
    torch.testing.assert_close(mean / (P * (1 - P)), gradient())


def test_opposite_masks_have_the_other_pairs_as_a_baseline_and_no_bias():
    """Exactly: over all of the cells that a uniform number of each unit can lie in."""
    learner = policy(variant="logits", masks=4)
    cells = []
    for p in P.tolist():
        ends = sorted({0.0, p, 1 - p, 1.0})
        cells.append([((a + b) / 2, b - a) for a, b in pairwise(ends)])
    pairs = []
    for cell in product(*cells):
        u, chance = torch.tensor([u for u, _ in cell], dtype=F64), torch.tensor([w for _, w in cell]).prod()
        pairs.append((torch.stack([u < P, 1 - u < P]), chance))
    mean = torch.zeros(3, dtype=F64)
    for (one, chance), (two, other) in product(pairs, repeat=2):
        masks = torch.cat([one, two])
        losses = loss(masks)
        mean += chance * other * estimate(masks, losses - learner._baseline(losses), P)
    torch.testing.assert_close(mean / (P * (1 - P)), gradient(), rtol=1e-6, atol=1e-6)


def test_the_moving_baseline_is_that_of_earlier_steps_and_the_published_one_is_not():
    before, published = (policy(variant=name, window=4, masks=2) for name in ("exact", "published"))
    for losses in ([2.0, 4.0], [6.0, 8.0], [1.0, 1.0]):
        values = torch.tensor(losses, dtype=F64)
        found = [float(each._baseline(values)) for each in (before, published)]
    # δ: 3, then 3 + 4/4 = 4, then 4 − 3/4.
    assert found == [4.0, 3.25]


def test_masks_are_drawn_with_their_probabilities_and_opposite_ones_lie_apart():
    learner = policy(variant="logits", masks=4)
    drawn = torch.stack([learner.draw(step) for step in range(4000)]).double()
    torch.testing.assert_close(drawn.mean(dim=(0, 1)), learner.s, atol=0.02, rtol=0)
    covariance = (drawn[:, 0] * drawn[:, 1]).mean(dim=0) - learner.s**2
    expected = (2 * learner.s - 1).clamp(min=0) - learner.s**2
    torch.testing.assert_close(covariance, expected, atol=0.03, rtol=0)
    assert policy(variant="logits").draw(7).equal(policy(variant="logits").draw(7))


# Learning.


def toy(seed, costs):
    """Twelve units of two layers, a loss that depends on pairs of them too, and the best of all masks.

    What a unit is worth by the parameter is a step away from the next one, and the budget is that of the seven best: a
    smaller step, or a budget between, is a knapsack whose best mask no order of units finds.
    """
    parts = {(0, "kv_group"): slice(0, 2), (0, "channel"): slice(2, 6), (1, "kv_group"): slice(6, 8)}
    parts[1, "channel"] = slice(8, 12)
    order = random(seed, 12).argsort()
    worth, pairs = 0.2 + order / 6, 0.03 * (random(seed + 500, 12, 12) - 0.5)
    budget = float(costs[order >= 5].sum())

    def losses(masks):
        x = 1 - masks.double()
        return (x * worth * costs).sum(dim=-1) + ((x @ pairs) * x).sum(dim=-1)

    masks = torch.tensor(list(product((False, True), repeat=12)))
    masks = masks[masks.double() @ costs <= budget]
    return made(parts, costs, budget), budget, losses, masks[losses(masks).argmin()]


PAPER = {"variant": "exact", "lr": 0.005, "masks": 4}
LEARNERS = [  # with the steps that each needs
    (PAPER | {"natural": "yes"}, 1500),
    (PAPER | {"floor": 0.05}, 750),
    ({"variant": "logits"}, 1500),
    ({"variant": "best", "masks": 8}, 750),
]
DIFFERENT = [3.0, 3.0, 1.0, 1.0, 1.0, 1.0] * 2


def found_of(seeds, given, steps, costs):
    """In how many seeds the best mask is found."""
    found = 0
    for seed in seeds:
        space, budget, losses, best = toy(seed, torch.tensor(costs, dtype=F64))
        learner = Policy(space, torch.full((12,), 0.6, dtype=F64), settings(**given), seed, {})
        for step in range(steps):
            p, masks = learner.sampled_from, learner.draw(step)
            learner.learn(step, steps, masks, losses(masks).tolist(), p)
            assert float(space.costs @ learner.s) <= budget + 1e-9
        mask = torch.tensor(highest(learner.s.tolist(), costs, budget))
        found += bool(losses(mask) <= losses(best) + 1e-9)
    return found


@pytest.mark.parametrize("given,steps", LEARNERS, ids=str)
def test_it_finds_the_best_of_all_masks_of_a_toy(given, steps):
    assert found_of([2], given, steps, DIFFERENT) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "given,steps,costs",
    [*((*each, DIFFERENT) for each in LEARNERS), (*LEARNERS[-1], [1.0] * 12)],
    ids=lambda value: "equal" if value == [1.0] * 12 else "different" if value == DIFFERENT else str(value),
)
def test_it_finds_the_best_mask_in_nineteen_of_twenty_seeds(given, steps, costs):
    assert found_of(range(20), given, steps, costs) >= 19


@pytest.mark.slow
def test_without_a_floor_a_rare_draw_outweighs_all_others():
    """What docs/methods.md says of the paper's step alone: with as many steps it finds about half."""
    assert found_of(range(20), PAPER, 750, DIFFERENT) <= 12


@pytest.mark.parametrize("repairs,needs", [(False, (REMOVALS, MASKED)), (True, (REFITTED_REMOVALS, INVERSES, MASKED))])
def test_it_begins_with_the_errors_that_are_left_in_the_end(repairs, needs):
    found = resolve_settings("bernoulli", {"init": "thinet"}, "units", repairs=repairs)
    assert METHODS["bernoulli"].needs_for("units", found) == needs


@pytest.mark.parametrize(
    "given,target,repairs,repaired",
    [
        ({}, "units", True, "yes"),
        ({"variant": "logits"}, "units", True, "yes"),
        ({"repaired": "no"}, "units", True, "no"),
        ({"variant": "exact"}, "units", True, "no"),  # the paper's
        ({"variant": "exact", "repaired": "yes"}, "units", True, "yes"),
        ({}, "layers", True, "no"),
        ({}, "units", False, "no"),
        ({"repaired": "yes"}, "units", False, "yes"),
    ],
)
def test_where_a_repair_follows_masks_are_tried_with_it(given, target, repairs, repaired):
    assert resolve_settings("bernoulli", given, target, repairs=repairs)["repaired"] == repaired


# Bad input.


@pytest.mark.parametrize(
    "given,target,said",
    [
        ({"masks": 0}, "units", "--set masks=0: must be at least 1"),
        ({"per_pass": 0}, "units", "--set per_pass=0: must be at least 1"),
        ({"masks": 2.5}, "units", "--set masks=2.5: not an integer"),
        ({"variant": "logits", "masks": 2}, "units", "two pairs of opposite masks are needed at least; give 4"),
        ({"variant": "logits", "masks": 5}, "units", "give 4"),
        ({"masks": 3}, "units", "--set masks=3: explore compares opposite masks; give an even number"),
        ({"antithetic": "no"}, "units", "with antithetic=yes"),
        ({"variant": "exact", "baseline": "others", "masks": 1}, "units", "two masks are needed at least; give 2"),
        ({"init": "layer-ppl"}, "units", "layer-ppl has no scores for units"),
        ({"init": "wanda-sp"}, "layers", "wanda-sp has no scores for layers"),
        ({"init": "moreau"}, "units", "--set init=moreau: choose one of"),
        ({"variant": "published", "natural": "yes"}, "units", "natural=yes does nothing with variant=published"),
        ({"variant": "logits", "window": 50}, "units", "window=50 does nothing with baseline=others"),
        ({"init": "gblm"}, "units", "--set init=gblm: choose one of"),  # it keeps norms between sweeps
    ],
)
def test_settings_that_cannot_be_are_refused(given, target, said):
    with pytest.raises(UsageError, match=said):
        resolve_settings("bernoulli", given, target)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_with_a_loss_that_is_no_number_is_refused_and_many_in_a_row_end_the_run(bad):
    learner = policy(variant="exact")

    def learn(step, *losses):
        before = learner.s
        figures = learner.learn(step, 20, learner.draw(step), losses, learner.sampled_from)
        return figures, bool((learner.s != before).any())

    for begin in (0, MOST_REFUSED):  # one that is learnt from lies between
        for step in range(begin, begin + MOST_REFUSED - 1):
            figures, moved = learn(step, 1.0, bad)
            assert figures["refused"] == 1 and not moved
        if not begin:
            figures, _ = learn(MOST_REFUSED - 1, 1.0, 2.0)
            assert "refused" not in figures and figures["loss"] == 1.5
    with pytest.raises(StreampruneError, match=r"step 20: the loss of mask 1 is .*10 steps in a row"):
        learn(19, 1.0, bad)


def test_a_progressive_policy_waits_for_its_last_budget():
    space = made({(0, "channel"): slice(0, 3)}, torch.ones(3, dtype=F64), 2.7)
    learner = Policy(space, P, settings(variant="exact", patience=2, lr=1e-12), 0, {}, stage=3)
    for step in range(6):  # 0.05 of all goes in the first three, 0.1 in the others
        learner.learn(step, 6, learner.draw(step), [1.0, 1.0], learner.sampled_from)
        assert learner.settled(step) == (step >= 4)


def test_the_first_budget_may_be_the_last():
    space = made({(0, "channel"): slice(0, 20)}, torch.ones(20, dtype=F64), 19.0)  # RAMP of all goes
    start = torch.linspace(0.2, 0.8, 20, dtype=F64)
    learner = Policy(space, start, settings(variant="exact", patience=1, lr=1e-12), 0, {}, stage=1)
    learner.learn(0, 2, learner.draw(0), [1.0, 1.0], learner.sampled_from)
    assert learner.settled(0)


def test_learning_that_ends_at_one_mask_is_no_failure():
    space = made({(0, "layer"): slice(0, 1), (1, "layer"): slice(1, 2)}, torch.ones(2, dtype=F64), 1.0)
    given = settings(variant="exact", natural="yes", lr=0.1, floor=0.05)
    learner, worth = Policy(space, torch.full((2,), 0.5, dtype=F64), given, 0, {}), torch.tensor([0.1, 0.9], dtype=F64)
    been = []
    for step in range(600):
        masks = learner.draw(step)
        learner.learn(step, 600, masks, (-masks.double() @ worth).tolist(), learner.sampled_from)
        been.append(learner.s.tolist())
    assert [0, 1] in been and been[-1][1] > 0.9


def test_a_run_that_learnt_from_no_step_is_refused():
    learner = policy(variant="exact")
    learner.learn(0, 2, learner.draw(0), [1.0, float("nan")], learner.sampled_from)
    with pytest.raises(StreampruneError, match="nothing was learnt; try --dtype float32"):
        learner.check_learnt()
    learner.learn(1, 2, learner.draw(1), [1.0, 2.0], learner.sampled_from)
    learner.check_learnt()


class Counting(TorchDispatchMode):
    """Counts the bytes of all tensors that are made."""

    def __init__(self):
        super().__init__()
        self.counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made_here = func(*args, **(kwargs or {}))
        for each in tree_leaves(made_here):
            if isinstance(each, torch.Tensor):
                self.counter.see(each)
        return made_here


@pytest.mark.parametrize("masks", [4, 64])
@pytest.mark.parametrize("variant", ["exact", "published", "logits"])
def test_a_policy_holds_no_more_of_a_unit_than_is_planned_however_many_masks_it_tries(variant, masks):
    n = 20_000
    with Counting() as counting:
        space = made({(0, "channel"): slice(0, n)}, torch.ones(n, dtype=F64), 0.7 * n)
        learner = Policy(space, torch.rand(n, dtype=F64), settings(variant=variant, masks=masks), 0, {})
        for step in range(2):
            drawn = learner.draw(step)
            learner.learn(step, 2, drawn, torch.rand(masks).tolist(), learner.sampled_from)
    assert 0.3 * POLICY_BYTES * n < counting.counter.peak - masks * n < POLICY_BYTES * n


@pytest.mark.parametrize("variant", ["exact", "published"])
def test_steps_so_large_that_nothing_is_left_to_learn_are_refused(variant):
    learner = policy(2.0, variant=variant, lr=1e6, masks=2)
    with pytest.raises(StreampruneError, match=r"every probability is 0 or 1; lower --set lr=1000000\.0$"):
        for step in range(10):
            learner.learn(step, 10, learner.draw(step), [1.0, 50.0], learner.sampled_from)
