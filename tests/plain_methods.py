"""Scores the plain way: units sliced by hand, and group shrinking line by line."""

import itertools
from types import SimpleNamespace

import torch

from streamprune.methods.sinks import UnitScores
from streamprune.methods.table import METHODS, resolve_settings

LAYERS = (1, 2)  # a layer below and a layer above them stay as they are
SEED = 5


def run(name, statistics, **settings):
    """{(layer, kind): scores} of a method."""
    sink = UnitScores(statistics.sweeper.skeleton.all_units(statistics.layers))
    METHODS[name].score(statistics, resolve_settings(name, settings), sink)
    return {(layer, kind): values for layer, kinds in sink.values.items() for kind, values in kinds.items()}


def assert_scores(actual, expected, rtol=1e-9, atol=0.0):
    assert set(actual) == set(expected)
    for key in expected:
        assert actual[key].dtype == torch.float64
        torch.testing.assert_close(actual[key], expected[key], rtol=rtol, atol=atol, msg=lambda m, k=key: f"{k}: {m}")


def unit_slices(sizes, kind, unit, tensors):
    """The slices of the weights of one layer that go with a unit: (name, slice, dimension that is cut).

    sizes: kv_groups, n_rep, head_dim, channels. Written out per layout, apart from the package's family table.
    """
    groups, rep, hd, channels = sizes.kv_groups, sizes.n_rep, sizes.head_dim, sizes.channels
    # The query heads of a KV group are neighbours, as in transformers' repeat_kv.
    query, kv = slice(unit * rep * hd, (unit + 1) * rep * hd), slice(unit * hd, (unit + 1) * hd)
    one = slice(unit, unit + 1)

    def shifted(part, by):
        return slice(part.start + by, part.stop + by)

    n_query, n_kv = groups * rep * hd, groups * hd
    table = {
        "self_attn.q_proj.weight": ("kv_group", 0, [query]),
        "self_attn.k_proj.weight": ("kv_group", 0, [kv]),
        "self_attn.v_proj.weight": ("kv_group", 0, [kv]),
        "self_attn.qkv_proj.weight": ("kv_group", 0, [query, shifted(kv, n_query), shifted(kv, n_query + n_kv)]),
        "self_attn.o_proj.weight": ("kv_group", 1, [query]),
        "mlp.gate_proj.weight": ("channel", 0, [one]),
        "mlp.up_proj.weight": ("channel", 0, [one]),
        "mlp.gate_up_proj.weight": ("channel", 0, [one, shifted(one, channels)]),
        "mlp.down_proj.weight": ("channel", 1, [one]),
        "mlp.c_fc.weight": ("channel", 1, [one]),  # Conv1D: [d_in, d_out]
        "mlp.c_proj.weight": ("channel", 0, [one]),
    }
    pieces = []
    for name, (belongs, dim, parts) in table.items():
        if belongs == kind and name in tensors:
            for part in parts:
                pieces.append((name, (part,) if dim == 0 else (slice(None), part), dim))
    return pieces


def line_dim(name):
    """The dimension that units cut."""
    return 1 if name in ("self_attn.o_proj.weight", "mlp.down_proj.weight", "mlp.c_fc.weight") else 0


def unit_totals(sizes, kinds, layers, elements, reduce=lambda piece, dim: piece.sum()):
    """Sum of element-wise importances over each unit: {(layer, kind): [units]}.

    elements: {(layer, name): [d_out, d_in]}.
    """
    totals = {}
    for layer, kind in itertools.product(layers, kinds):
        tensors = {name: value for (at, name), value in elements.items() if at == layer}
        count = sizes.kv_groups if kind == "kv_group" else sizes.channels
        totals[layer, kind] = torch.stack(
            [
                sum(reduce(tensors[name][where], dim) for name, where, dim in unit_slices(sizes, kind, unit, tensors))
                for unit in range(count)
            ]
        )
    return totals


def group_shrink(delta, dim, threshold):
    """Eq. 12 line by line."""
    lines = []
    for line in delta.unbind(dim):
        norm = float(line.square().sum().sqrt())
        lines.append(line * (1 - threshold / norm) if norm > threshold else torch.zeros_like(line))
    return torch.stack(lines, dim)


SIZES = {
    "llama": SimpleNamespace(kv_groups=3, n_rep=2, head_dim=10, channels=37),
    "mistral": SimpleNamespace(kv_groups=3, n_rep=2, head_dim=8, channels=37),
    "qwen2": SimpleNamespace(kv_groups=3, n_rep=2, head_dim=8, channels=37),
    "phi3": SimpleNamespace(kv_groups=3, n_rep=2, head_dim=8, channels=37),
    "gpt2": SimpleNamespace(kv_groups=0, n_rep=0, head_dim=0, channels=37),
}
FAMILIES_TESTED = tuple(SIZES)
