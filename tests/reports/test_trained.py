"""What was trained after pruning is compared, and reported, as it is then."""

from __future__ import annotations

import html
import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from streamprune import PruneConfig, RecoverConfig, compare, prune, recover, report
from streamprune.commands.recover import recover_command
from streamprune.reports.report import training_lines

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def outputs(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output, and what two trainings made of it, one of them not measured."""
    place = tmp_path_factory.mktemp("trained")
    text = place / "text.txt"
    text.write_text("The harbour was quiet in the morning. " * 40)
    prune(PruneConfig(tiny_llama, place / "pruned", "magnitude", layers=(2, 7), evaluate=str(text)))
    given: dict[str, Any] = {"model": str(place / "pruned"), "data": str(text), "batch": 2, "cutoff": 16}
    recover(RecoverConfig(output=place / "trained", steps=3, learning_rate=0.01, evaluate=str(text), **given))
    recover(RecoverConfig(output=place / "not measured", steps=1, evaluate=False, **given))
    return place


def facts(output: Path) -> dict[str, Any]:
    return json.loads((output / "streamprune.json").read_text())


def test_perplexity_is_that_after_the_training(outputs: Path) -> None:
    found = compare(outputs / "pruned", outputs / "trained")
    before, after = (facts(outputs / "trained")["recovery"]["perplexity"][when] for when in ("before", "after"))
    assert found.perplexity == (facts(outputs / "pruned")["perplexity"]["after"], after)
    assert found.perplexity[0] == pytest.approx(before) and before != after and found.same_text
    assert all(row.jaccard == 1 for row in found.totals)


def test_a_training_is_a_part_of_the_recipe(outputs: Path) -> None:
    found = compare(outputs / "pruned", outputs / "trained").recipe
    assert found["training"] == (None, facts(outputs / "trained")["recovery"]["done"])
    assert found["learning_rate of the training"] == (None, 0.01)


def test_what_was_not_measured_after_a_training_is_not_said(outputs: Path) -> None:
    found = compare(outputs / "pruned", outputs / "not measured")
    assert found.perplexity is None and "perplexity" not in found.text


def test_the_report_has_both(outputs: Path, tmp_path: Path) -> None:
    page = report(outputs / "trained", tmp_path / "report.html").read_text()
    assert "Trained further" in page and "3 steps of 2 sequences" in page
    pruned, trained = facts(outputs / "trained")["perplexity"], facts(outputs / "trained")["recovery"]["perplexity"]
    for figure in (pruned["before"], pruned["after"], trained["after"]):
        assert f"{figure:.2f}" in page
    assert "Trained further" not in report(outputs / "pruned", tmp_path / "pruned.html").read_text()


@pytest.mark.parametrize("adapter", [False, True])
def test_the_report_says_how_to_repeat_it(adapter: bool, outputs: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"data": str(outputs / "text.txt"), "steps": 1, "batch": 2, "cutoff": 16, "evaluate": False}
    if adapter:
        recover(RecoverConfig(model=str(outputs / "trained"), output=tmp_path / "first", adapter=True, rank=2, **given))
        given["init_adapter"] = tmp_path / "first"
    recover(RecoverConfig(model=str(outputs / "trained"), output=tmp_path / "again", **given))
    first, second = training_lines(facts(tmp_path / "again"))
    assert not training_lines(facts(outputs / "pruned"))
    for line, output in ((first, outputs / "trained"), (second, tmp_path / "again")):
        program, command, *arguments = shlex.split(line)
        assert (program, command) == ("streamprune", "recover")
        taken = recover_command.make_context("recover", arguments).params
        if taken.pop("no_evaluate"):
            taken["evaluate"] = False
        known = facts(output)["recovery"]["options"]
        repeated = RecoverConfig(**{name: value for name, value in taken.items() if name in known})
        assert {name: str(value) for name, value in asdict(repeated).items()} == {k: str(v) for k, v in known.items()}
    assert html.escape(second, quote=False) in report(tmp_path / "again", tmp_path / "report.html").read_text()
