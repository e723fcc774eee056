"""A ragged output is a model like any other: it is pruned again, layer by layer from what it has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow
from ragged_models import dense_model, random_cuts, write_checkpoint
from safetensors.torch import load_file
from tiny_models import make_sweeper, save_tiny, save_tokenizer, token_ids, whole_model_gradients
from transformers import AutoModelForCausalLM

from streamprune import PruneConfig, prune
from streamprune.errors import UsageError
from streamprune.planning.decision import make_plan
from streamprune.streaming.statistics import Statistics
from streamprune.verification.verify import verify

FIRST = {"method": "taylor", "allocation": "global", "ratio": 0.3, "layers": (1, 7)}
SECOND: dict[str, dict[str, Any]] = {
    "global": {"method": "taylor", "allocation": "global", "layers": (0, 8)},
    "uniform": {"method": "magnitude", "layers": (0, 6)},
    "repaired": {"method": "wanda-sp", "compensate": True, "compensate_tokens": 64},
    "biases": {"method": "flap", "allocation": "global"},
    "layers": {"method": "block-influence", "granularity": "layers", "layers": (0, 8)},
    "weights": {"method": "wanda", "granularity": "weights"},
    "nothing": {"method": "random", "ratio": 0.0},
}


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose layers were given widths of their own."""
    path = tmp_path_factory.mktemp("once")
    save_tiny(path / "dense", "llama", dtype=torch.float32, num_hidden_layers=8)
    return prune(config(path / "dense", path / "once", FIRST)).output


def config(model: Path, output: Path, options: dict[str, Any]) -> PruneConfig:
    return PruneConfig(str(model), output, samples=4, seq_len=16, evaluate=False, **options)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def widths(directory: Path) -> list[tuple[int, int]]:
    """KV heads and channels of each layer, by the tensors."""
    stored, found = tensors(directory), []
    for layer in range(json.loads((directory / "config.json").read_text())["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        heads = len(stored[f"{prefix}self_attn.k_proj.weight"]) // 10
        found.append((heads, len(stored[f"{prefix}mlp.up_proj.weight"])))
    return found


def test_the_first_output_has_layers_of_different_widths(once: Path) -> None:
    assert len(set(widths(once))) > 2
    sweeper = make_sweeper(once)
    assert [(each.kv_groups, each.channels) for each in sweeper.skeleton.geometries] == widths(once)
    assert (sweeper.skeleton.geometry.kv_groups, sweeper.skeleton.geometry.channels) == (3, 37)


@pytest.mark.parametrize("name", [n if n in ("global", "repaired") else slow(n) for n in SECOND])
def test_it_is_pruned_again_and_behaves_as_the_masked_first_output(name: str, once: Path, tmp_path: Path) -> None:
    result = prune(config(once, tmp_path / "twice", SECOND[name]))
    checks = verify(result.output)
    assert [check for check in checks if not check.passed] == []
    assert result.layout == "ragged"
    if name in ("global", "uniform", "biases", "repaired"):
        assert result.facts["parameters"]["after"] < result.facts["parameters"]["before"]
        pairs = list(zip(widths(once), widths(result.output), strict=True))
        assert all(new <= old for before, after in pairs for old, new in zip(before, after, strict=True))
        assert any(before != after for before, after in pairs)
    if name == "nothing":
        before, after = tensors(once), tensors(result.output)
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_what_stays_is_the_first_output_s_own_slices(once: Path, tmp_path: Path) -> None:
    result = prune(config(once, tmp_path / "twice", SECOND["global"]))
    before, after = tensors(once), tensors(result.output)
    for layer, kinds in result.kept.items():
        prefix, heads = f"model.layers.{layer}.", torch.tensor(kinds["kv_group"])
        rows = (heads[:, None] * 10 + torch.arange(10)).flatten()
        queries = (heads[:, None] * 20 + torch.arange(20)).flatten()
        for module, lines, dim in (
            ("self_attn.k_proj", rows, 0),
            ("self_attn.v_proj", rows, 0),
            ("self_attn.q_proj", queries, 0),
            ("self_attn.o_proj", queries, 1),
            ("mlp.up_proj", torch.tensor(kinds["channel"]), 0),
            ("mlp.down_proj", torch.tensor(kinds["channel"]), 1),
        ):
            key = f"{prefix}{module}.weight"
            assert torch.equal(after[key], before[key].index_select(dim, lines)), key


def test_gradients_of_its_layers_are_those_of_the_whole_model(once: Path) -> None:
    sweeper, ids = make_sweeper(once), token_ids(n=3, seq=12)
    found: dict[str, torch.Tensor] = {}

    def consume(ref: Any, weight: torch.Tensor, grad: torch.Tensor) -> None:
        found[f"model.layers.{ref.layer}.{ref.tensor}"] = grad.clone()

    Statistics(sweeper, ids, range(8), 0).gradients(consume)
    model = AutoModelForCausalLM.from_pretrained(once, dtype=torch.float64)
    expected = whole_model_gradients(model, ids)
    assert len(found) == 8 * 7
    for name, grad in found.items():
        assert torch.allclose(grad, expected[name], rtol=1e-6, atol=1e-9), name


def test_layers_lose_the_ratio_of_their_own_units(once: Path, tmp_path: Path) -> None:
    options = SECOND["uniform"] | {"ratio": 0.5}
    result = prune(config(once, tmp_path / "twice", options))
    for (_, channels), (heads, left) in list(zip(widths(once), widths(result.output), strict=True))[:6]:
        assert heads >= 1 and 0 < left < channels


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the package that reads compressed weights
def test_one_width_for_all_and_compressed_weights_are_refused(once: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--stock.*different widths"):
        prune(config(once, tmp_path / "out", {"method": "random", "stock": True}))
    save_tiny(tmp_path / "dense", "llama", dtype=torch.float32, num_hidden_layers=8, intermediate_size=40, head_dim=8)
    first = prune(config(tmp_path / "dense", tmp_path / "first", FIRST | {"round_to": 4})).output
    with pytest.raises(UsageError, match=r"--compress.*different widths"):
        prune(config(first, tmp_path / "out", {"method": "magnitude", "granularity": "2:4", "compress": True}))


def test_a_plan_counts_every_layer_s_own_units(once: Path, tmp_path: Path) -> None:
    options = config(once, tmp_path / "out", SECOND["uniform"] | {"ratio": 0.0})
    sweeper = make_sweeper(once)
    plan = make_plan(options, sweeper.skeleton)
    stored = tensors(once)
    for layer, costs in plan.costs.items():
        units = sum(cost * sweeper.skeleton.geometries[layer].units(kind) for kind, cost in costs.items())
        prefix = f"model.layers.{layer}."
        norms = sum(t.numel() for name, t in stored.items() if name.startswith(prefix) and "norm" in name)
        assert units == sum(t.numel() for name, t in stored.items() if name.startswith(prefix)) - norms


@pytest.mark.parametrize("name", ["global", "biases", "repaired"])
def test_so_is_one_whose_attention_has_its_scores_as_a_whole(name: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "dense", "gemma2", dtype=torch.float32)
    first = prune(config(tmp_path / "dense", tmp_path / "first", FIRST | {"layers": (1, 3), "ratio": 0.5})).output
    assert json.loads((first / "config.json").read_text())["per_layer_config"]
    result = prune(config(first, tmp_path / "twice", SECOND[name] | {"layers": (0, 4)}))
    assert [check for check in verify(result.output) if not check.passed] == []


SKIPPING: dict[str, dict[str, Any]] = {
    "weights": {"method": "magnitude", "granularity": "weights"},
    "uniform": {"method": "magnitude", "ratio": 0.1},
    "layers": {"method": "magnitude", "granularity": "layers"},
    "global": {"method": "taylor", "allocation": "global", "layers": (0, 4)},
    "repaired": {"method": "wanda-sp", "compensate": True, "compensate_tokens": 64},
    "policy": {"method": "bernoulli", "settings": {"steps": 3, "init": "random"}, "layers": (0, 4)},
}


@pytest.mark.parametrize("name", SKIPPING)
def test_blocks_that_are_skipped_stay_skipped(name: str, tmp_path: Path) -> None:
    model = dense_model("llama", vocab_size=260)
    write_checkpoint(tmp_path / "in", model, "llama", random_cuts("skipped"))  # no attention in 0, no MLP in 2
    save_tokenizer(tmp_path / "in")
    options = {"layers": (1, 4)} | SKIPPING[name]
    texts = {} if options["method"] == "magnitude" else {"samples": 4, "seq_len": 16}
    result = prune(PruneConfig(str(tmp_path / "in"), tmp_path / "out", evaluate=False, **texts, **options))
    assert [check for check in verify(result.output) if not check.passed] == []
    found = json.loads((result.output / "config.json").read_text())["per_layer_config"]
    assert found["0"]["skip"] == ["attention"]
