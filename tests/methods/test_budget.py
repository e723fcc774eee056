"""Budgets: the projection against quadratic programs solved by hand, starts, and masks against a run's own choice."""

from itertools import product
from statistics import NormalDist

import pytest
import torch
from toy_spaces import F64, made, random

from streamprune.methods.budget import Masks, Space, project, shifted, start_from_scores
from streamprune.planning.allocation import GlobalRule, allocate_globally, count_globally

# The projection.


def quadratic_program(values, costs, budget):
    """The nearest point by trying every set of numbers that are at 0, at 1, or between: 3^n systems."""
    best, found = torch.inf, None
    for where in product((0, 1, 2), repeat=len(values)):
        at = torch.tensor(where)
        free = at == 2
        room = budget - costs[at == 1].sum()
        for tight in (False, True):
            s = (at == 1).to(F64)
            s[free] = values[free]
            if tight and free.any():
                s[free] -= costs[free] * (costs[free] @ values[free] - room) / costs[free].square().sum()
            feasible = bool((s >= 0).all()) and bool((s <= 1).all()) and float(costs @ s) <= budget + 1e-9
            distance = float((s - values).square().sum())
            if feasible and distance < best:
                best, found = distance, s
    return found


@pytest.mark.parametrize("seed", range(12))
def test_a_projection_is_the_solution_of_the_quadratic_program(seed):
    values, costs = 3 * random(seed, 5) - 1, random(seed + 100, 5) * 4 + 0.1
    if seed % 3 == 0:
        costs = costs.ceil()  # bends that fall together
    budget = float(costs.sum() * random(seed + 200, 1))
    torch.testing.assert_close(project(values, costs, budget), quadratic_program(values, costs, budget))


def test_a_projection_is_idempotent_keeps_the_order_and_leaves_what_is_feasible():
    values, costs = 3 * random(1, 10_000) - 1, torch.full((10_000,), 2.0, dtype=F64)
    s = project(values, costs, 3000.0)
    assert float(costs @ s) == pytest.approx(3000.0, rel=1e-13)
    torch.testing.assert_close(project(s, costs, 3000.0), s, rtol=0, atol=1e-13)
    assert bool((s[values.argsort()].diff() >= 0).all())
    inside = random(2, 10) / 10
    assert project(inside, torch.ones(10, dtype=F64), 5.0).equal(inside)
    assert project(values, costs, 0.0).max() == 0
    for budget, each in ((-1.0, costs), (1.0, costs * 0)):
        with pytest.raises(ValueError, match="wanted"):
            project(values, each, budget)


# Starts.


def test_scores_become_probabilities_that_meet_the_budget_in_their_order():
    parts, costs = {(0, "kv_group"): slice(0, 3), (0, "channel"): slice(3, 23)}, torch.ones(23, dtype=F64)
    costs[:3] = 40
    space = made(parts, costs, 70.0)
    scores = {(0, "kv_group"): random(3, 3) * 1e6, (0, "channel"): random(4, 20)}
    s = start_from_scores(scores, space)
    assert float(costs @ s) == pytest.approx(70.0, rel=1e-12)
    for key, place in parts.items():
        assert s[place].argsort().equal(scores[key].argsort())
    assert made(parts, costs, 1e9).shifted(torch.zeros(23, dtype=F64)).min() == 1
    apart = made(parts, costs, 60.0, 5.0)
    for each in (start_from_scores(scores, apart), apart.project(s + 0.7)):
        assert float(costs[:3] @ each[:3]) == pytest.approx(60.0, rel=1e-12)
        assert float(costs[3:] @ each[3:]) == pytest.approx(5.0, rel=1e-12)
    assert apart.eased(0.5).budgets == {((0, "kv_group"),): 90.0, ((0, "channel"),): 12.5}


def test_many_units_begin_by_their_order_alone_and_few_by_their_scores():
    parts, costs = {(0, "kv_group"): slice(0, 3), (0, "channel"): slice(3, 43)}, torch.ones(43, dtype=F64)
    costs[:3] = 40
    space, few, many = made(parts, costs, 100.0), random(3, 3), random(4, 40)
    scores, far = ({(0, "kv_group"): few, (0, "channel"): each} for each in (many, many.exp().pow(9)))
    s = start_from_scores(scores, space, by_order=True)
    assert s.equal(start_from_scores(far, space, by_order=True)) and float(costs @ s) == pytest.approx(100.0)
    logits = torch.logit(s)
    of_few, of_many = logits[:3], logits[3:].sort()
    assert of_many.indices.equal(many.argsort())
    quantiles = torch.tensor([NormalDist().inv_cdf((rank + 0.5) / 40) for rank in range(40)], dtype=F64)
    torch.testing.assert_close(of_many.values - of_many.values.mean(), quantiles, atol=1e-9, rtol=0)
    torch.testing.assert_close(of_few - of_few.mean(), (few - few.mean()) / few.std(), atol=1e-9, rtol=0)
    equal = {(0, "kv_group"): few, (0, "channel"): torch.ones(40)}
    assert start_from_scores(equal, space, by_order=True)[3:].diff().min() > 0  # the first go first


@pytest.mark.parametrize("spread", [0.0, 1e-9, 3.0, 700.0])
@pytest.mark.parametrize("share", [0.0, 1e-6, 0.3, 1 - 1e-6, 1.0])
def test_shifted_logits_meet_the_budget_whatever_lies_between_them(share, spread):
    logits, costs = spread * (random(1, 500) - 0.5), 1 + 99 * random(2, 500)
    logits[7] -= 40 * spread  # alone, far from all others
    total = float(costs.sum())
    s = shifted(logits, costs, share * total)
    assert float(costs @ s) == pytest.approx(share * total, rel=1e-11)
    between = (s > 1e-9) & (s < 1 - 1e-9)
    moved = (torch.logit(s) - logits)[between]
    torch.testing.assert_close(moved, moved[:1].expand_as(moved), atol=1e-5, rtol=0)


def test_masks_of_units_that_move_together_are_those_that_a_run_would_end_with():
    sizes = {(0, "kv_group"): 3, (0, "channel"): 60, (1, "kv_group"): 3, (1, "channel"): 44}
    ends = torch.tensor([0, *sizes.values()]).cumsum(0).tolist()
    parts = {key: slice(*ends[number : number + 2]) for number, key in enumerate(sizes)}
    price = {layer: {"kv_group": 25, "channel": 4} for layer in range(2)}
    everything = {layer: {kind: list(range(sizes[layer, kind])) for kind in price[layer]} for layer in price}
    rule, costs = (
        GlobalRule(0.4, "none"),
        torch.cat([torch.full((n,), price[0][kind]) for (_, kind), n in sizes.items()]),
    )

    def by_layer(ordered):
        return {layer: {kind: ordered[layer, kind] for kind in price[layer]} for layer in price}

    def lost(ordered, part):
        counts = count_globally(by_layer(ordered), rule.eased(part), price)
        return {(layer, kind): gone for layer, of in counts.items() for kind, gone in of.items()}

    space = Space(parts, costs.double(), {tuple(parts): 0.6 * float(costs.sum())}, lost)
    logits = random(5, 110).round(decimals=1)  # some are equal
    masks = Masks(space, logits, space.directions())
    for seed, part in product(range(8), (0.5, 1.0)):
        moved = 0.25 * (random(seed, 8) - 0.5)
        row = logits + moved[space.directions()]
        kept = allocate_globally(by_layer(space.split(row)), rule.eased(part), price, everything)
        mask = masks.kept(moved, part)
        for (layer, kind), at in parts.items():
            assert mask[at].nonzero().flatten().tolist() == kept[layer][kind]
