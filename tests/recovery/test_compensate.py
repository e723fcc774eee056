"""What is written for o and down equals a least-squares fit on the whole model in memory, layer by layer."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_tiny
from transformers import AutoTokenizer
from whole_models import down_name, load, mask_unit_kind, matrix, mean_loss, out_name, run, skip_layers, stack

from streamprune import PruneConfig, prune
from streamprune.errors import StreampruneError, UsageError
from streamprune.recovery import least_squares
from streamprune.texts.documents import embedded_text

TOKENS, SEQ = 640, 64  # as many as a tiny model has positions
FIELDS = {"olmo2": {"rms_norm_eps": 1e-12}, "granite": {"residual_multiplier": 0.22}}
OWN = ("llama", "phi3", "olmo2", "gemma2", "gpt2", "granite", "gpt_neox", "opt", "mixtral")
STREAM = ("llama", "phi3", "gpt2", "granite", "gpt_neox", "opt")
# The norms of these are LayerNorms, which compute in the model's own dtype; RMSNorms do in float32, so that results
# that differ by rounding in float64 can come out a float32 rounding apart.
IN_FLOAT64 = ("gpt2", "gpt_neox", "opt")
ONE_WIDTH = ("gpt2", "gpt_neox", "opt", "mixtral")


def tolerance(family):
    return 1e-9 if family in IN_FLOAT64 else 1e-6


def close(actual, expected, rtol):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= rtol * expected.abs().max()


def repair(path, output, **options):
    """Prune with random scores, and repair on the first tokens of the embedded text, in float64."""
    defaults = {"method": "random", "ratio": 0.4, "evaluate": False, "dtype": "float64", "compensate": True}
    defaults |= {"sampling": "first"} | ({"compensate_tokens": TOKENS} if options.get("compensate", True) else {})
    if {"attention_ratio", "mlp_ratio"} <= options.keys():
        del defaults["ratio"]
    return prune(PruneConfig(model=str(path), output=output, **{**defaults, **options}))


def ids_of(path, tokens=TOKENS):
    text = AutoTokenizer.from_pretrained(path)(embedded_text("calibration"), add_special_tokens=False)
    return torch.tensor(text["input_ids"][:tokens]).view(-1, min(SEQ, tokens))


def ways(family):
    """Options that make the family lose KV groups, where it can, and channels."""
    if family in ONE_WIDTH:
        return {"stock": True}
    return {"layers": (1, 3), "attention_ratio": 0.34, "mlp_ratio": 0.3}


def fit(x, y, ridge):
    """B [d_out, d_in] with the least ‖x Bᵀ − y‖² + λ‖B‖², λ relative to the mean of the diagonal of xᵀx."""
    root = (ridge * x.square().sum(0).mean()).sqrt()
    below = root * torch.eye(x.shape[1], dtype=x.dtype)
    left = torch.cat([x, below]) if ridge else x
    right = torch.cat([y, torch.zeros(len(below), y.shape[1], dtype=y.dtype)]) if ridge else y
    return torch.linalg.lstsq(left, right, driver="gelsd").solution.T


def plainly_repaired(path, ids, kept, target, ridge):
    """{(layer, kind): W'} and the repaired model, masked at full width, from transformers alone."""
    dense, model, made = load(path), load(path), {}
    scale = getattr(model.config, "residual_multiplier", 1.0)
    cut = [layer for layer, units in kept.items() if any(len(units[kind]) < widths(model)[kind] for kind in units)]
    for layer in range(max(cut) + 1):
        for kind in sorted(kept[layer], reverse=True):  # attention comes before the MLP
            module, units = stack(model)[layer].get_submodule(out_name(model, kind)), kept[layer][kind]
            last = kind == "channel" and target == "stream"
            if len(units) == widths(model)[kind] and not last:
                continue
            _, (before, _) = run(model, ids, module)
            wanted = before @ matrix(module).T
            lines = mask_unit_kind(model, layer, kind, units)
            _, (after, _), (_, ours) = run(model, ids, module, stack(model)[layer])
            if last:
                _, (_, theirs) = run(dense, ids, stack(dense)[layer])
                fitted = matrix(module)[:, lines] + fit(after[:, lines], (theirs - ours) / scale, ridge)
            else:
                fitted = fit(after[:, lines], wanted, ridge)
            matrix(module)[:, lines] = fitted
            made[layer, kind] = fitted
    return made, model


def widths(model):
    groups = {"kv_group": getattr(model.config, "num_key_value_heads", 0)}
    if model.config.model_type == "mixtral":
        return groups
    return groups | {"channel": matrix(stack(model)[0].get_submodule(down_name(model))).shape[1]}


def written(output, model, kept):
    """{(layer, kind): the matrix in the output}, with the layers' numbers in the source."""
    tensors = load_file(output / "model.safetensors")
    found = {}
    for number, layer in enumerate(kept):
        for kind in kept[layer]:
            name = f".{number}.{out_name(model, kind)}.weight"
            (tensor,) = (tensor for key, tensor in tensors.items() if key.endswith(name))
            found[layer, kind] = tensor.T if model.config.model_type == "gpt2" else tensor
    return found


def check(path, result, target, ridge):
    model = load(path)
    ids, found = ids_of(path), written(result.output, model, result.kept)
    made, repaired = plainly_repaired(path, ids, result.kept, target, ridge)
    assert made
    for key, expected in made.items():
        close(found[key], expected, tolerance(model.config.model_type))
    for key in found.keys() - made.keys():
        assert torch.equal(found[key], matrix(stack(model)[key[0]].get_submodule(out_name(model, key[1]))))
    with torch.no_grad():
        close(load(result.output)(ids).logits, repaired(ids).logits, 1e-5)
    assert json.loads((result.output / "streamprune.json").read_text())["compensation"]["tokens"] == list(ids.shape)


@pytest.mark.parametrize("ridge", [1e-2, 0.3])
@pytest.mark.parametrize("family", OWN)
def test_own_target_equals_the_fit_to_the_layers_own_output(family, ridge, tmp_path):
    save_tiny(tmp_path / "in", family, **FIELDS.get(family, {}))
    options = {**ways(family), "compensate_target": "own", "compensate_ridge": ridge}
    check(tmp_path / "in", repair(tmp_path / "in", tmp_path / "out", **options), "own", ridge)


@pytest.mark.parametrize("target", ["own", "stream"])
def test_the_default_ridge_is_inputs_per_token_and_0_01_for_own(target, tmp_path):
    save_tiny(tmp_path / "in", "gpt2")
    result = repair(tmp_path / "in", tmp_path / "out", stock=True, compensate_target=target)
    kept = len(next(iter(result.kept.values()))["channel"])
    check(tmp_path / "in", result, target, 0.001 if target == "own" else max(0.1, kept / TOKENS))


@pytest.mark.parametrize("ridge", [1e-2, 0.3])
@pytest.mark.parametrize("family", STREAM)
def test_stream_target_equals_the_fit_to_the_dense_models_hidden_states(family, ridge, tmp_path):
    save_tiny(tmp_path / "in", family, **FIELDS.get(family, {}))
    options = {**ways(family), "compensate_ridge": ridge}  # the default where a family allows it
    check(tmp_path / "in", repair(tmp_path / "in", tmp_path / "out", **options), "stream", ridge)


@pytest.mark.parametrize("family", ["granite", "gpt2"])
def test_errors_may_be_added_as_goals_and_outputs(family, tmp_path, monkeypatch):
    """As on a GPU in half precision, where their difference would be rounded."""
    monkeypatch.setattr("streamprune.recovery.least_squares.sums_halves", lambda tensor: True)
    save_tiny(tmp_path / "in", family, **FIELDS.get(family, {}))
    options = {**ways(family), "compensate_ridge": 1e-2}
    check(tmp_path / "in", repair(tmp_path / "in", tmp_path / "out", **options), "stream", 1e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_kept_for_a_layers_output_may_lie_on_a_disk_and_be_wider(dtype, tmp_path, monkeypatch):
    save_tiny(tmp_path / "in", "llama", num_hidden_layers=6)
    options = {**ways("llama"), "dtype": dtype, "layers": (1, 5), "scratch": tmp_path / "spill"}
    outputs = [repair(tmp_path / "in", tmp_path / "memory", **options).output]
    monkeypatch.setattr("streamprune.planning.placement.places", lambda config, gpu: ["scratch"])
    outputs.append(repair(tmp_path / "in", tmp_path / "disk", **options).output)
    widest = least_squares._widest
    # As in a model that has been pruned already, whose layers have different widths.
    monkeypatch.setattr(least_squares, "_widest", lambda skeleton: widest(skeleton) + 5)
    outputs.append(repair(tmp_path / "in", tmp_path / "wider", **options).output)
    first, *others = (load_file(output / "model.safetensors") for output in outputs)
    for other in others:
        assert all(torch.equal(other[name], tensor) for name, tensor in first.items())


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo2", "mixtral"])
def test_families_with_a_norm_after_the_mlp_or_experts_have_no_stream_target(family, tmp_path):
    save_tiny(tmp_path / "in", family)
    for options in ({**ways(family), "compensate_target": "stream"}, {"granularity": "layers", "layers": (1, 3)}):
        with pytest.raises(UsageError, match="--compensate-target own"):
            repair(tmp_path / "in", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_own_is_the_closed_form_of_the_gram_matrix(tmp_path):
    save_tiny(tmp_path / "in", "llama")
    options = {"layers": (0, 1), "attention_ratio": 0.34, "mlp_ratio": 0.3, "compensate_target": "own"}
    result = repair(tmp_path / "in", tmp_path / "out", **options)
    model = load(tmp_path / "in")
    module = stack(model)[0].self_attn.o_proj
    _, (x, _) = run(model, ids_of(tmp_path / "in"), module)
    keep = [20 * group + line for group in result.kept[0]["kv_group"] for line in range(20)]
    assert len(keep) == 40
    gram = x.T @ x
    damped = gram[keep][:, keep] + 1e-3 * gram.diagonal()[keep].mean() * torch.eye(40, dtype=gram.dtype)
    expected = module.weight.data @ gram[:, keep] @ torch.linalg.inv(damped)
    close(written(result.output, model, result.kept)[0, "kv_group"], expected, 1e-9)


@pytest.mark.parametrize("target", ["own", "stream"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_without_a_ridge_and_with_enough_tokens_it_is_exact_least_squares(family, target, tmp_path):
    save_tiny(tmp_path / "in", family)
    options = {**ways(family), "compensate_target": target, "compensate_ridge": 0.0}
    check(tmp_path / "in", repair(tmp_path / "in", tmp_path / "out", **options), target, 0.0)


@pytest.mark.parametrize("target", ["own", "stream"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_nothing_goes_the_bytes_are_the_sources(target, dtype, tmp_path):
    save_tiny(tmp_path / "in", "llama", dtype=dtype)
    nothing = {"ratio": 0.0, "layers": (0, 4), "dtype": "float32", "compensate_target": target}
    repair(tmp_path / "in", tmp_path / "none", **nothing)
    name = "model.safetensors"
    assert (tmp_path / "none" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()
    # Layers below the first cut one stay too, also where their outputs are followed.
    some = {"layers": (2, 3), "mlp_ratio": 0.3, "attention_ratio": 0.0, "dtype": "float32", "compensate_target": target}
    repair(tmp_path / "in", tmp_path / "some", **some)
    before, after = load_file(tmp_path / "in" / name), load_file(tmp_path / "some" / name)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    mlp = {f"model.layers.2.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    assert changed == mlp


# Whole layers. Which go is decided by the range and the scores: the layers' own o and down are made small or large.

GAPS = {
    "one gap": (6, {2, 3}),
    "two gaps": (7, {1, 4, 5}),
    "at the start, with nobody to repair": (4, {0, 1}),
    "at the end": (4, {2, 3}),
    "at both ends and between": (8, {0, 3, 6, 7}),
}


def with_weak_layers(path, family, n_layers, gone):
    """A model in which the weights of the layers `gone` are the smallest, but for their work on the stream."""
    model = save_tiny(path, family, num_hidden_layers=n_layers)
    with torch.no_grad():
        for layer in gone:
            for name, parameter in stack(model)[layer].named_parameters():
                if parameter.ndim > 1 and "down" not in name:
                    parameter.mul_(0.7)
    model.save_pretrained(path)


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("family", ["llama", "granite"])
def test_the_layer_before_a_gap_is_fitted_to_the_dense_hidden_states_after_it(family, gap, tmp_path):
    n_layers, gone = GAPS[gap]
    path, output = tmp_path / "in", tmp_path / "out"
    with_weak_layers(path, family, n_layers, gone)
    options = {"granularity": "layers", "method": "magnitude", "layers": (0, n_layers), "compensate_ridge": 1e-2}
    result = repair(path, output, ratio=len(gone) / n_layers, **options)
    assert set(range(n_layers)) - set(result.kept) == gone
    dense, model, ids = load(path), skip_layers(load(path), gone), ids_of(path)
    scale, ridge = getattr(model.config, "residual_multiplier", 1.0), 1e-2
    found = written(output, model, result.kept)
    for layer in result.kept:
        after = layer + 1
        while after in gone:
            after += 1
        module = stack(model)[layer].mlp.down_proj
        if after > layer + 1:
            _, (_, theirs) = run(dense, ids, stack(dense)[after - 1])
            _, (x, _), (_, ours) = run(model, ids, module, stack(model)[layer])
            module.weight.data += fit(x, (theirs - ours) / scale, ridge)
            close(found[layer, "channel"], module.weight.data, 1e-6)
        else:
            assert torch.equal(found[layer, "channel"], stack(dense)[layer].mlp.down_proj.weight)
        assert torch.equal(found[layer, "kv_group"], stack(dense)[layer].self_attn.o_proj.weight)
    with torch.no_grad():
        close(load(output)(ids).logits, model(ids).logits, 1e-5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A Llama that has learned the calibration tokens a little, so that its loss means something."""
    path = tmp_path_factory.mktemp("trained") / "model"
    model = save_tiny(path, "llama", num_hidden_layers=5, dtype=torch.float32)
    ids, optimizer = ids_of(path), torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(path)
    assert mean_loss(load(path), ids) < 3
    return path


@pytest.mark.parametrize(
    "options",
    [
        {"layers": (1, 4), "attention_ratio": 0.34, "mlp_ratio": 0.4, "compensate_target": "own"},
        {"layers": (1, 4), "attention_ratio": 0.34, "mlp_ratio": 0.4, "compensate_target": "stream"},
        {"layers": (1, 4), "granularity": "layers"},
    ],
    ids=["own", "stream", "layers"],
)
def test_repair_lowers_the_loss_on_the_calibration_tokens(options, trained, tmp_path):
    ids = ids_of(trained)
    plain = {name: value for name, value in options.items() if name != "compensate_target"}
    broken = repair(trained, tmp_path / "broken", compensate=False, **plain)
    mended = repair(trained, tmp_path / "mended", **options)
    assert broken.kept == mended.kept
    losses = [mean_loss(load(path), ids) for path in (trained, mended.output, broken.output)]
    assert losses[0] < losses[1] < losses[2]
    assert losses[2] - losses[1] > 0.1 * (losses[2] - losses[0])


@pytest.mark.parametrize("target", ["own", "stream"])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_micro_batches_do_not_change_the_result(family, target, tmp_path):
    save_tiny(tmp_path / "in", family)
    found = []
    for size in (1, 3, 10):
        options = {**ways(family), "compensate_target": target, "micro_batch": size}
        result = repair(tmp_path / "in", tmp_path / str(size), **options)
        found.append(written(result.output, load(tmp_path / "in"), result.kept))
    for other in found[1:]:
        for key, expected in found[0].items():
            close(other[key], expected, tolerance(family))


@pytest.mark.parametrize("tokens", [2, 16, 20])
def test_fewer_tokens_than_inputs_and_no_ridge_are_refused(tokens, tmp_path):
    save_tiny(tmp_path / "in", "llama")
    options = {"layers": (1, 3), "mlp_ratio": 0.3, "attention_ratio": 0.0, "compensate_target": "own"}
    with pytest.raises(StreampruneError, match="singular; raise --compensate-ridge or --compensate-tokens"):
        repair(tmp_path / "in", tmp_path / "out", compensate_ridge=0.0, compensate_tokens=tokens, **options)
    assert not (tmp_path / "out").exists()
    repair(tmp_path / "in", tmp_path / "out", compensate_ridge=1e-3, compensate_tokens=tokens, **options)


def with_dependent_inputs(path, seed, *, twice):
    """Channel 3 of layer 1 is always zero, or the same as channel 4."""
    model = save_tiny(path, "llama", seed=seed)
    with torch.no_grad():
        for part in ("gate_proj", "up_proj"):
            weight = getattr(stack(model)[1].mlp, part).weight
            weight[3] = weight[4] if twice else 0
    model.save_pretrained(path)


# Layer 2 goes; layer 1 keeps all channels and is fitted.
ONE_GAP = {"granularity": "layers", "layers": (2, 3), "ratio": 0.9}


def test_an_input_that_is_always_zero_and_no_ridge_are_refused(tmp_path):
    with_dependent_inputs(tmp_path / "in", 0, twice=False)
    with pytest.raises(StreampruneError, match="layer 1: the inputs' Gram matrix is singular"):
        repair(tmp_path / "in", tmp_path / "out", compensate_ridge=0.0, **ONE_GAP)
    repair(tmp_path / "in", tmp_path / "out", **ONE_GAP)


@pytest.mark.parametrize("seed", range(4))
def test_two_equal_inputs_and_no_ridge_are_refused_or_fitted_as_well_as_can_be(seed, tmp_path):
    """Rounding may leave such a Gram matrix positive definite."""
    path, output = tmp_path / "in", tmp_path / "out"
    with_dependent_inputs(path, seed, twice=True)
    try:
        repair(path, output, compensate_ridge=0.0, **ONE_GAP)
    except StreampruneError as error:
        assert "singular" in str(error)
        return
    model, ids = load(path), ids_of(path)
    _, (x, _), (_, before), (_, theirs) = run(model, ids, stack(model)[1].mlp.down_proj, *stack(model)[1:3])
    repaired = load(output)
    _, (_, ours) = run(repaired, ids, stack(repaired)[1])
    best = (theirs - before - x @ fit(x, theirs - before, 0.0).T).square().sum()
    assert (theirs - ours).square().sum() <= (1 + 1e-6) * best


@pytest.mark.parametrize("target", ["own", "stream"])
def test_of_inputs_that_are_all_zero_what_stays_is_as_it_was(target, tmp_path):
    model = save_tiny(tmp_path / "in", "llama")
    with torch.no_grad():
        stack(model)[1].mlp.up_proj.weight.zero_()
    model.save_pretrained(tmp_path / "in")
    options = {"layers": (1, 3), "mlp_ratio": 0.3, "attention_ratio": 0.0, "compensate_target": target}
    result = repair(tmp_path / "in", tmp_path / "out", **options)
    left = stack(load(result.output))[1].mlp.down_proj.weight
    assert torch.equal(left, stack(load(tmp_path / "in"))[1].mlp.down_proj.weight[:, result.kept[1]["channel"]])
