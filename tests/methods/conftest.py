"""Tiny models for both sides of a comparison: streamed, and whole in memory."""

from __future__ import annotations

import pytest
import torch
from plain_methods import FAMILIES_TESTED, LAYERS, SEED, SIZES, unit_slices, unit_totals
from tiny_models import make_sweeper, save_tiny, token_ids, whole_model_gradients

from streamprune.kernels import noise_seed, perturb
from streamprune.streaming.statistics import Statistics


class Case:
    """A tiny model: saved for the streamed side, in memory for the whole-model side."""

    def __init__(self, family, path):
        self.family, self.path, self.sizes = family, path, SIZES[family]
        self.model = save_tiny(path, family)
        self.ids = token_ids(n=3, seq=12)
        self.kinds = ("channel",) if family == "gpt2" else ("kv_group", "channel")
        self.layer_path = "transformer.h" if family == "gpt2" else "model.layers"
        self.sweeper = make_sweeper(path)
        self.parameters = dict(self.model.named_parameters())
        self.weights = {
            (layer, name): weight.detach().clone()
            for layer in LAYERS
            for name, weight in self.model.get_submodule(f"{self.layer_path}.{layer}").named_parameters()
            if any(unit_slices(self.sizes, kind, 0, {name}) for kind in self.kinds)
        }

    def statistics(self, seed=SEED):
        return Statistics(self.sweeper, self.ids, LAYERS, seed)

    def gradients(self, weights=None, ids=None):
        """Whole-model gradients of the scored weights, with those weights set to `weights`."""
        parameters = {key: self.parameters[f"{self.layer_path}.{key[0]}.{key[1]}"] for key in self.weights}
        with torch.no_grad():
            for key, weight in (weights or {}).items():
                parameters[key].copy_(weight)
        grads = whole_model_gradients(self.model, self.ids if ids is None else ids)
        with torch.no_grad():
            for key, weight in self.weights.items():
                parameters[key].copy_(weight)
        return {key: grads[f"{self.layer_path}.{key[0]}.{key[1]}"] for key in self.weights}

    def noisy(self, sigma, step, draw, delta=None, seed=SEED):
        """w + δ + noise of every scored weight."""
        moved = {}
        for (layer, name), weight in self.weights.items():
            at = noise_seed(seed, step, draw, layer, name)
            shift = None if delta is None else delta[layer, name]
            moved[layer, name] = perturb(torch.empty_like(weight), weight, shift, sigma, at)
        return moved

    def totals(self, elements, **options):
        return unit_totals(self.sizes, self.kinds, LAYERS, elements, **options)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    made = {}

    def case(family):
        if family not in made:
            made[family] = Case(family, tmp_path_factory.mktemp(family))
        return made[family]

    return case


@pytest.fixture(params=FAMILIES_TESTED)
def case(request, cases):
    return cases(request.param)
