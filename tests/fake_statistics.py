"""Statistics whose gradient is a known function of the perturbed weights."""

from types import SimpleNamespace

import torch
from plain_methods import unit_totals

from streamprune.kernels import noise_seed, perturb
from streamprune.model.families import FAMILIES
from streamprune.model.units import Geometry, TensorRef, all_units

HIDDEN = 7
GEOMETRY = Geometry(kv_groups=2, n_rep=2, head_dim=3, channels=5)
SHAPES = {
    "self_attn.q_proj.weight": (12, HIDDEN),
    "self_attn.k_proj.weight": (6, HIDDEN),
    "self_attn.v_proj.weight": (6, HIDDEN),
    "self_attn.o_proj.weight": (HIDDEN, 12),
    "mlp.gate_proj.weight": (5, HIDDEN),
    "mlp.up_proj.weight": (5, HIDDEN),
    "mlp.down_proj.weight": (HIDDEN, 5),
}
KINDS = ("kv_group", "channel")
FAKE_LAYERS = (2, 3)


def random_tensors(seed, scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {
        (layer, name): (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)
        for layer in FAKE_LAYERS
        for name, shape in SHAPES.items()
    }


class FakeStatistics:
    """Statistics whose gradient is `gradient(key, perturbed weight)`; the noise is the package's own.

    compute: the dtype of perturbed weights. Records the weights and gradients of each sweep, and each perturbation.
    """

    def __init__(self, weights, gradient, seed=0, compute=torch.float64):
        self.layers, self.seed, self.samples, self.backend = FAKE_LAYERS, seed, 1, None
        skeleton = SimpleNamespace(all_units=lambda layers: {layer: all_units(GEOMETRY, KINDS) for layer in layers})
        self.sweeper = SimpleNamespace(skeleton=skeleton)
        self.stored, self.gradient, self.compute = weights, gradient, compute
        members = {member.tensor: member for member in FAMILIES["llama"].members}
        self.refs = {key: TensorRef(*key, GEOMETRY, members[key[1]]) for key in weights}
        self.seen, self.grads, self.perturbations = [], [], []

    def weights(self, consume):
        for key, weight in self.stored.items():
            consume(self.refs[key], weight.clone())

    def store(self, name):
        return {}

    def gradients(self, consume, perturbation=None):
        moved = {}
        for key, weight in self.stored.items():
            if perturbation is None:
                moved[key] = weight.to(self.compute)
                continue
            seed = noise_seed(*perturbation.key, *key)
            out = torch.empty(weight.shape, dtype=self.compute)
            moved[key] = perturb(out, weight, perturbation.delta.get(key), perturbation.sigma, seed)
        grads = {key: self.gradient(key, weight) for key, weight in moved.items()}
        self.seen.append(moved)
        self.grads.append(grads)
        self.perturbations.append(perturbation)
        # Backwards, as a sweep comes; each consumer may overwrite what it is given.
        for key in reversed(self.stored):
            consume(self.refs[key], self.stored[key].clone(), grads[key].clone())
        return 0.0

    def gradient_powers(self, consume, powers):
        """Of one sample, whose own gradient is the mean gradient."""

        def split(ref, weight, grad):
            consume(ref, weight, {power: grad.abs() ** power if power else grad.clone() for power in powers})

        return self.gradients(split)


def fake_totals(elements):
    return unit_totals(GEOMETRY, KINDS, FAKE_LAYERS, elements)


W, G = random_tensors(1), random_tensors(2)


def constant(gradients=G):
    return FakeStatistics(W, lambda key, weight: gradients[key])
