"""Weights pruned the plain way: the whole model in memory, hooks on its modules, one layer after another."""

import copy
import math

import torch
from plain_methods import LAYERS, SEED
from tiny_models import make_sweeper, save_tiny, token_ids, whole_model_gradients
from transformers.pytorch_utils import Conv1D

from streamprune.methods.sinks import WeightPruner
from streamprune.methods.table import METHODS, resolve_settings
from streamprune.streaming.statistics import Statistics
from streamprune.streaming.sweeper import Sweeper

# GPT-2 stores [d_in, d_out]; granite has biases everywhere; OPT's and GPT-2's attention cannot be cut into units.
FAMILIES = ("llama", "qwen2", "phi3", "granite", "gpt_neox", "opt", "gpt2")
MATRICES = {"phi3": 4, "gpt2": 4, "gpt_neox": 4, "opt": 6}  # of a layer; 7 in the others
STACKS = {"gpt2": "transformer.h", "opt": "model.decoder.layers", "gpt_neox": "gpt_neox.layers"}
WIDTHS = {"gpt2": "n_inner", "opt": "ffn_dim"}


class TinyWeights:
    """A tiny model, saved for the streamed side and in memory for the plain one; matrices are [d_out, d_in]."""

    def __init__(self, family, path, *, width=37, samples=4, seq=12, **options):
        self.family, self.path, self.stack = family, path, STACKS.get(family, "model.layers")
        self.model = save_tiny(path, family, **{WIDTHS.get(family, "intermediate_size"): width}, **options)
        self.ids = token_ids(samples, seq)

    def modules(self, layer, model=None):
        """{weight name: module} of the Linears of a layer."""
        block = (model or self.model).get_submodule(f"{self.stack}.{layer}")
        return {
            f"{name}.weight": module
            for name, module in block.named_modules()
            if isinstance(module, torch.nn.Linear | Conv1D)
        }

    def dense(self, layers=LAYERS):
        """{(layer, name): W}."""
        return {(layer, name): matrix_of(module) for layer in layers for name, module in self.modules(layer).items()}

    def inputs(self, layer, model=None, ids=None):
        """{name: x [n, seq, d_in]} of a layer's Linears, by a forward pass of the whole model."""
        model, seen, ids = model or self.model, {}, self.ids if ids is None else ids

        def keep(name):
            def hook(module, arguments):
                seen[name] = arguments[0].detach().clone().reshape(len(ids), -1, arguments[0].shape[-1])

            return hook

        modules = self.modules(layer, model).items()
        handles = [module.register_forward_pre_hook(keep(name)) for name, module in modules]
        with torch.no_grad():
            model(ids)
        for handle in handles:
            handle.remove()
        return seen

    def gradients(self, ids=None, moved=None):
        """{(layer, name): gradient of the mean loss}, with the matrices `moved` in the place of W."""
        model = copy.deepcopy(self.model)
        for layer in LAYERS:
            for name, module in self.modules(layer, model).items():
                if moved is not None:
                    set_matrix(module, moved[layer, name])
        grads = whole_model_gradients(model, self.ids if ids is None else ids)
        named = {(layer, name): f"{self.stack}.{layer}.{name}" for layer in LAYERS for name in self.modules(layer)}
        return {key: grads[name].T if self.family == "gpt2" else grads[name] for key, name in named.items()}

    def sample_gradients(self):
        """[samples, d_out, d_in] of every matrix: each sample through the model on its own."""
        samples = [self.gradients(self.ids[n : n + 1]) for n in range(len(self.ids))]
        return {key: torch.stack([grads[key] for grads in samples]) for key in samples[0]}

    def sequential(self, prune, layers=LAYERS):
        """{(layer, name): `prune`(key, W, x)}; each layer sees what the pruned layers below it put out."""
        model, pruned = copy.deepcopy(self.model), {}
        for layer in layers:
            inputs = self.inputs(layer, model)
            for name, module in self.modules(layer, model).items():
                key = (layer, name)
                pruned[key] = prune(key, matrix_of(module), inputs[name])
            for name, module in self.modules(layer, model).items():
                set_matrix(module, pruned[layer, name])
        return pruned

    def statistics(self, *, layers=LAYERS, scope="matrices", micro_batch=64, dtype=torch.float64):
        """What a streamed method asks."""
        made = make_sweeper(self.path, dtype=dtype)
        return Statistics(Sweeper(made.skeleton, made.pager, micro_batch, scope), self.ids, layers, SEED)

    def streamed(self, method, sparsity, *, micro_batch=64, dtype=torch.float64, **settings):
        """{(layer, name): pruned W} of the package; each matrix is handed on once, with its stored weight."""
        found = {}

        def emit(ref, stored, pruned):
            assert ref.key not in found and pruned.dtype == stored.dtype and pruned.shape == stored.shape
            dense = matrix_of(self.modules(ref.layer)[ref.tensor])
            assert torch.equal(ref.matrix(stored), dense.to(stored.dtype)), "as it is stored"
            found[ref.key] = ref.matrix(pruned).clone()

        statistics = self.statistics(micro_batch=micro_batch, dtype=dtype)
        resolved = resolve_settings(method, settings, "weights")
        METHODS[method].score(statistics, resolved, WeightPruner(sparsity, emit))
        return found


def matrix_of(module):
    """W [d_out, d_in] of a Linear or Conv1D, a copy."""
    weight = module.weight.detach().clone()
    return weight.T if isinstance(module, Conv1D) else weight


def set_matrix(module, matrix):
    with torch.no_grad():
        module.weight.copy_(matrix.T if isinstance(module, Conv1D) else matrix)


def whole(number):
    """⌊number + 1e-9⌋."""
    return math.floor(number + 1e-9)


def without_lowest(weight, scores, sparsity):
    """W without its lowest scores, row by row in plain lists; of equal ones the lowest index goes first."""
    rows = []
    for values, row in zip(weight.tolist(), scores.tolist(), strict=True):
        size, count = len(values), whole(sparsity.ratio * len(values))
        if sparsity.m:
            size, count = sparsity.m, sparsity.m - sparsity.n
        for start in range(0, len(values), size):
            places = sorted(range(start, start + size), key=lambda index: (row[index], index))
            for index in places[:count]:
                values[index] = 0.0
        rows.append(values)
    return torch.tensor(rows, dtype=weight.dtype)


def input_squares(x):
    """(1/N) Σ_n ‖X_n,j‖² of x [n, seq, d_in], sample by sample: Wanda's scaler."""
    total = torch.zeros(x.shape[-1], dtype=torch.float64)
    for sample in x:
        for token in sample:
            total += token.double() ** 2
    return total / len(x)


def assert_same_weights(found, expected):
    assert set(found) == set(expected)
    for key, weight in expected.items():
        assert torch.equal(found[key], weight), key


def check_zeros(found, sparsity):
    """Exactly ⌊ratio·columns⌋ zeros per row, or exactly N kept of every M."""
    for key, weight in found.items():
        gone = weight == 0
        if sparsity.m:
            assert ((~gone).view(len(weight), -1, sparsity.m).sum(-1) == sparsity.n).all(), key
        else:
            assert (gone.sum(1) == whole(sparsity.ratio * weight.shape[1])).all(), key
