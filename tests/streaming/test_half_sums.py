"""What a bfloat16 run adds up does not stop growing: sums are float32 or wider, whatever the terms are."""

import pytest
import torch
from tiny_models import make_sweeper, save_tiny, token_ids

from streamprune.streaming.inputs import Gram, Moments
from streamprune.streaming.statistics import Statistics

# Beyond 256 equal terms a bfloat16 sum stays where it is. A power of two, so that a share of the mean is exact.
COPIES = 512


@pytest.fixture
def of(tmp_path):
    """Makes statistics of so many copies of a sequence, one at a time, in bfloat16."""
    save_tiny(tmp_path, "llama", dtype=torch.bfloat16, num_hidden_layers=1)
    ids = token_ids(n=1, seq=5)

    def make(copies):
        sweeper = make_sweeper(tmp_path, dtype=torch.bfloat16, micro_batch=1)
        return Statistics(sweeper, ids.expand(copies, -1).contiguous(), range(1), 0)

    return make


def close(many, one):
    assert many.dtype in (torch.float32, torch.float64)
    torch.testing.assert_close(many, one, rtol=1e-5, atol=1e-5 * float(one.abs().max()))


def test_gradients_and_losses_of_copies_are_those_of_one(of):
    found = []
    for copies in (COPIES, 1):
        grads = {}
        loss = of(copies).gradients(lambda ref, weight, grad, into=grads: into.update({ref.key: grad.clone()}))
        found.append((loss, grads))
    (many, grads), (one, expected) = found
    assert many == pytest.approx(one, rel=1e-6)
    assert grads.keys() == expected.keys() and len(grads) == 7
    for key, grad in grads.items():
        close(grad, expected[key])


def test_norms_of_sample_gradients_add_up(of):
    found = []
    for copies in (COPIES, 1):
        norms = {}
        of(copies).gradient_powers(lambda ref, weight, sums, into=norms: into.update({ref.key: sums[1].clone()}), (1,))
        found.append(norms)
    for key, norm in found[0].items():
        close(norm, COPIES * found[1][key])


@pytest.mark.parametrize("kind", [Gram, Moments])
def test_sums_over_inputs_add_up(kind, of):
    found = []
    for copies in (COPIES, 1):
        sums = {}

        def take(ref, weight, each, into=sums):
            into[ref.key] = (each.total if kind is Gram else each.squares).clone()

        of(copies).inputs(kind, take)
        found.append(sums)
    for key, total in found[0].items():
        close(total, COPIES * found[1][key])
