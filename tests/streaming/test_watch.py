"""A pass that ends early ends there alone, and leaves nothing behind."""

import torch
from torch import nn

from streamprune.streaming.watch import SeenEnough, watch_inputs


def test_a_pass_that_has_been_seen_enough_of_holds_nothing():
    """What its traceback holds would be a layer's activations, in a cycle from Python 3.12 on."""
    layer, enough, after = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), SeenEnough(), []

    def see(given):
        raise enough

    with watch_inputs(layer, {"1.weight": see}):
        after.append(layer(torch.ones(1, 4)))
    assert after == [] and enough.__traceback__ is None
    assert layer(torch.ones(1, 4)).shape == (1, 4), "the hooks have gone"
