"""`streamprune compare`: overlaps and rank correlations as counted by hand, differences of recipes, and refusals."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import check_refusal, snapshot
from safetensors.torch import load_file
from tiny_models import N_LAYERS, save_tiny

from streamprune import PruneConfig, UsageError, compare, prune
from streamprune.output.sparse24 import decompressed
from streamprune.reports.drawing import draw
from streamprune.reports.ranks import spearman

SHORT: dict[str, Any] = {"samples": 2, "seq_len": 16, "layers": (2, 7)}


@pytest.fixture(scope="module")
def outputs(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs of one model, by what was done."""
    place = tmp_path_factory.mktemp("outputs")
    evaluated = place / "text.txt"
    evaluated.write_text("The harbour was quiet in the morning. " * 8)
    for name, options in {
        "taylor": {"method": "taylor", "evaluate": str(evaluated)},
        "magnitude": {"method": "magnitude", "evaluate": str(evaluated)},
        "seed": {"method": "taylor", "seed": 1, "evaluate": False},
        "layers": {"method": "block-influence", "granularity": "layers", "ratio": 0.4, "evaluate": False},
        "other layers": {"method": "random", "granularity": "layers", "ratio": 0.4, "evaluate": False},
        "weights": {"method": "magnitude", "granularity": "weights", "samples": None, "seq_len": None},
    }.items():
        chosen = {key: value for key, value in (SHORT | {"ratio": 0.4} | options).items() if value is not None}
        if name == "weights":
            chosen |= {"evaluate": False}
        prune(PruneConfig(model=tiny_llama, output=place / name, **chosen))
    return place


def facts(output: Path) -> dict[str, Any]:
    return json.loads((output / "streamprune.json").read_text())


# The figures.


def ranks(values: list[float]) -> list[float]:
    """By the definition: how many are less, and half of the others that are equal."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2 for value in values
    ]


@pytest.mark.parametrize("different", [3, 7, 1000])
def test_the_correlation_of_ranks_is_pearson_s_of_mean_ranks(different: int) -> None:
    random = torch.Generator().manual_seed(different)
    one, other = (torch.randint(different, (50,), generator=random).double() for _ in range(2))
    expected = statistics.correlation(ranks(one.tolist()), ranks(other.tolist()))
    found = spearman(one, other)
    assert found is not None and abs(found - expected) < 1e-12
    assert spearman(one, one**3) == pytest.approx(1)
    assert spearman(one, -one) == pytest.approx(-1)


def test_scores_that_are_all_equal_have_no_correlation() -> None:
    assert spearman(torch.zeros(4), torch.arange(4.0)) is None


def test_overlaps_are_those_of_the_recorded_units(outputs: Path) -> None:
    found = compare(outputs / "taylor", outputs / "magnitude")
    kept = [facts(outputs / name)["kept"] for name in ("taylor", "magnitude")]
    scores = [load_file(outputs / name / "streamprune.scores") for name in ("taylor", "magnitude")]
    assert [(row.kind, row.layer) for row in found.layers] == [
        (kind, layer) for kind in ("kv_group", "channel") for layer in range(2, 7)
    ]
    for row in found.layers:
        a, b = ({*units[str(row.layer)][row.kind]} for units in kept)
        of_a, of_b = (values[f"{row.layer}.{row.kind}"] for values in scores)
        assert row.kept == (len(a), len(b)) and row.only == (len(a - b), len(b - a))
        assert row.jaccard == len(a & b) / len(a | b)
        assert row.units == len(of_a)
        assert row.spearman == pytest.approx(statistics.correlation(ranks(of_a.tolist()), ranks(of_b.tolist())))
    for total in found.totals:
        rows = [row for row in found.layers if row.kind == total.kind]
        assert total.common == sum(row.common for row in rows) and total.units == sum(row.units or 0 for row in rows)
    assert 0 < found.by_chance["channel"] < 1


def test_random_choices_overlap_as_much_as_is_said(outputs: Path, tiny_llama: Path, tmp_path: Path) -> None:
    for seed in range(4):
        config = {"method": "random", "seed": seed, "ratio": 0.4, "layers": (2, 7), "evaluate": False}
        prune(PruneConfig(model=tiny_llama, output=tmp_path / str(seed), **config))
    pairs = [compare(tmp_path / str(a), tmp_path / str(b)) for a in range(4) for b in range(a)]
    mean = statistics.mean(pair.totals[1].jaccard for pair in pairs)
    assert mean == pytest.approx(pairs[0].by_chance["channel"], abs=0.08)


def test_layers_are_chosen_among_all_of_them(tiny_llama: Path, tmp_path: Path) -> None:
    for seed in range(2):
        config = {"granularity": "layers", "method": "random", "seed": seed, "ratio": 0.34, "layers": (1, 7)}
        prune(PruneConfig(model=tiny_llama, output=tmp_path / str(seed), evaluate=False, **config))
    chance = compare(tmp_path / "0", tmp_path / "1").by_chance["layer"]
    common = 4 * 4 / 6  # of two choices of 4 of 6
    assert chance == pytest.approx(common / (8 - common))


def test_recipes_and_perplexities_differ_as_recorded(outputs: Path) -> None:
    found = compare(outputs / "taylor", outputs / "magnitude")
    assert found.recipe["method"] == ("taylor", "magnitude")
    assert "seed" not in found.recipe and "output" not in found.recipe
    assert found.perplexity == tuple(facts(outputs / name)["perplexity"]["after"] for name in ("taylor", "magnitude"))
    assert found.same_text and "different texts" not in found.text
    other = compare(outputs / "taylor", outputs / "seed")
    assert set(other.recipe) == {"seed", "calibration tokens"} and other.perplexity is None


def test_a_run_and_its_copy_are_the_same(outputs: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(outputs / "taylor", tmp_path / "copy")
    found = compare(outputs / "taylor", copy)
    assert not found.recipe and "the recipes are the same" in found.text
    assert all(row.jaccard == 1 and row.spearman == pytest.approx(1) for row in (*found.layers, *found.totals))
    (copy / "streamprune.scores").unlink()  # of an older version
    found = compare(outputs / "taylor", copy)
    assert all(row.spearman is None and row.jaccard == 1 for row in found.layers)


def test_whole_layers_are_compared(outputs: Path) -> None:
    found = compare(outputs / "layers", outputs / "other layers")
    gone = [{*range(2, 7)} - {*map(int, facts(outputs / name)["kept"])} for name in ("layers", "other layers")]
    assert [row.kept for row in found.layers] == [(layer not in gone[0], layer not in gone[1]) for layer in range(2, 7)]
    (total,) = found.totals
    assert total.kind == "layer" and total.kept == (3, 3) and total.spearman is not None


def test_copies_in_other_dtypes_are_of_one_model(tiny_llama: Path, outputs: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "half", "llama", dtype=torch.bfloat16, num_hidden_layers=8)
    options = {**SHORT, "ratio": 0.4, "method": "taylor", "dtype": "float32", "evaluate": False}
    prune(PruneConfig(model=tmp_path / "half", output=tmp_path / "out", **options))
    found = compare(outputs / "taylor", tmp_path / "out")
    assert "source tensors" in found.recipe
    assert all(row.spearman is not None and row.spearman > 0.9 for row in found.totals)


# The command.


def test_the_command_prints_and_writes_what_python_gives(outputs: Path, tmp_path: Path, streamprune: Any) -> None:
    pytest.importorskip("matplotlib")
    a, b = outputs / "taylor", outputs / "magnitude"
    files = ["--json", tmp_path / "c.json", "--draw", tmp_path / "c.svg"]
    done = streamprune("compare", a, b, *files)
    assert done.code == 0, done.err
    assert done.out == compare(a, b).text + "\n"
    assert json.loads((tmp_path / "c.json").read_text()) == json.loads(json.dumps(compare(a, b).to_json()))
    drawn = (tmp_path / "c.svg").read_text()
    assert "taylor and magnitude</text>" in drawn and "Jaccard" in drawn
    again = streamprune("compare", a, b, *files)
    check_refusal(again, 1, ("c.json", "exists"))
    assert streamprune("compare", a, b, *files, "--overwrite").code == 0
    assert (tmp_path / "c.svg").read_text() == drawn
    assert streamprune("compare", a, b, "--draw", tmp_path / "c.png").code == 0
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert {file.name for file in tmp_path.iterdir()} == {"c.json", "c.svg", "c.png"}


@pytest.mark.parametrize(
    "other",
    [{"method": "random", "granularity": "weights"}, {"method": "wanda", "granularity": "2:4", "compress": True}],
)
def test_weights_overlap_where_both_are_not_zero(other: dict[str, Any], tmp_path: Path) -> None:
    if other.get("compress"):
        pytest.importorskip("compressed_tensors")
    save_tiny(tmp_path / "dense", "llama", intermediate_size=40)
    given: dict[str, Any] = {"samples": 2, "seq_len": 16, "evaluate": False}
    for name, options in {"one": {"method": "magnitude", "granularity": "weights"}, "other": other}.items():
        prune(PruneConfig(tmp_path / "dense", tmp_path / name, **given, **options))
    found = compare(tmp_path / "one", tmp_path / "other")
    a = load_file(tmp_path / "one" / "model.safetensors")
    with decompressed(tmp_path / "other") as plain:
        b = load_file(plain / "model.safetensors")
    assert [row.layer for row in found.layers] == list(range(N_LAYERS))
    for row in found.layers:
        names = [name for name in a if name.startswith(f"model.layers.{row.layer}.") and a[name].ndim == 2]
        stay = [torch.cat([(tensors[name] != 0).flatten() for name in names]) for tensors in (a, b)]
        common, either = int((stay[0] & stay[1]).sum()), int((stay[0] | stay[1]).sum())
        assert (row.kind, row.units, row.kept) == ("weight", len(stay[0]), tuple(int(each.sum()) for each in stay))
        assert row.jaccard == common / either and row.spearman is None
    (total,) = found.totals
    assert total.common == sum(row.common for row in found.layers)
    if other["method"] == "random":
        assert total.jaccard == pytest.approx(found.by_chance["weight"], abs=0.02)
    assert "two random choices of as many weights would overlap by 0." in found.text
    pytest.importorskip("matplotlib")
    assert b"weights" in draw(found, ".svg")


def test_weights_are_compared_in_layers_that_either_could_prune(tmp_path: Path) -> None:
    save_tiny(tmp_path / "dense", "llama")
    for layer in (0, 3):
        given: dict[str, Any] = {"granularity": "weights", "layers": (layer, layer + 1), "evaluate": False}
        prune(PruneConfig(tmp_path / "dense", tmp_path / str(layer), method="magnitude", **given))
    assert [row.layer for row in compare(tmp_path / "0", tmp_path / "3").layers] == [0, 3]


@pytest.mark.parametrize(
    ("a", "b", "code", "names"),
    [
        ("taylor", "nowhere", 1, ("nowhere", "streamprune.json")),
        ("taylor", "layers", 2, ("units", "layers")),
        ("taylor", "weights", 2, ("units", "weights")),
    ],
)
def test_what_cannot_be_compared_is_refused(
    a: str, b: str, code: int, names: tuple[str, ...], outputs: Path, streamprune: Any
) -> None:
    check_refusal(streamprune("compare", outputs / a, outputs / b), code, names)


@pytest.mark.parametrize("fields", [{"num_hidden_layers": 6}, {"intermediate_size": 35}, {"vocab_size": 261}])
def test_models_of_other_shapes_are_named(
    fields: dict[str, int], outputs: Path, tmp_path: Path, streamprune: Any
) -> None:
    save_tiny(tmp_path / "model", "llama", dtype=torch.float32, **{"num_hidden_layers": 8, **fields})
    prune(PruneConfig(tmp_path / "model", tmp_path / "out", method="random", layers=(2, 5), evaluate=False))
    names = {"num_hidden_layers": "8 layers", "intermediate_size": "37 channels in layer", "vocab_size": "parameters"}
    (name,) = (names[field] for field in fields)
    check_refusal(streamprune("compare", outputs / "taylor", tmp_path / "out"), 2, (name,))


@pytest.mark.parametrize("damage", ["{}", "[]", "no", '{"options": {"granularity": "units"}, "layers": "x"}'])
def test_a_damaged_record_is_named(damage: str, outputs: Path, tmp_path: Path, streamprune: Any) -> None:
    copy = shutil.copytree(outputs / "taylor", tmp_path / "copy")
    (copy / "streamprune.json").write_text(damage)
    result = streamprune("compare", copy, outputs / "taylor")
    check_refusal(result, 1, ("copy/streamprune.json",), remedy="prune|download|expected")


@pytest.mark.parametrize(
    ("option", "file", "names"),
    [("--draw", "c.jpg", (".svg", ".png")), ("--draw", "", ("is a directory",)), ("--json", "", ("is a directory",))],
)
def test_files_that_cannot_be_written_are_refused_first(
    option: str, file: str, names: tuple[str, ...], tmp_path: Path, streamprune: Any
) -> None:
    before = snapshot(tmp_path)
    result = streamprune("compare", "nowhere", "nowhere", option, tmp_path / file)
    check_refusal(result, 2 if file else 1, names)
    assert snapshot(tmp_path) == before


def test_python_refuses_as_the_command_does(outputs: Path) -> None:
    with pytest.raises(UsageError, match="granularity"):
        compare(outputs / "taylor", outputs / "layers")
