"""A form of output is one class: a toy one goes through a whole run, with nothing else touched."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_runs import Killed, weights
from safetensors.torch import load_file, save_file
from torch import Tensor

from streamprune import PruneConfig, prune
from streamprune.errors import UsageError
from streamprune.output.stock import StockForm
from streamprune.storage.shards import TensorSpec

LOWER = ".rows.{}"  # of a matrix: its even rows, its odd rows


class HalvesForm(StockForm):
    """Stores the even and the odd rows of every down_proj apart, in layers of one width."""

    stored_as = "halves"
    read_by = "halves are read by nobody but this test"
    loading = ("import halves",)

    @classmethod
    @contextmanager
    def readable(cls, directory: Path) -> Iterator[Path]:
        whole = directory.with_name(f"{directory.name}-whole")
        whole.mkdir()
        for file in directory.iterdir():
            if file.suffix != ".safetensors":
                (whole / file.name).write_bytes(file.read_bytes())
        save_file(joined(directory), whole / "model.safetensors", {"format": "pt"})
        yield whole

    def check(self) -> None:
        super().check()
        if self.skeleton.config.hidden_size % 2:
            raise UsageError("halves need an even number of rows; choose another form")

    def config(self, zeros: float = 0.0) -> dict[str, Any]:
        return super().config(zeros) | {"toy": {"format": "halves", "zeros": zeros}}

    def files(self) -> Mapping[str, str]:
        return {"halves.py": "# how halves are read\n"}

    def store_specs(self, name: str, spec: TensorSpec) -> list[TensorSpec]:
        if "down_proj" not in name:
            return [spec]
        shape = (spec.shape[0] // 2, *spec.shape[1:])
        return [TensorSpec(spec.name + LOWER.format(odd), spec.dtype, shape) for odd in (0, 1)]

    def store(self, name: str, target: str, tensor: Tensor) -> dict[str, Tensor]:
        if "down_proj" not in name:
            return {target: tensor}
        return {target + LOWER.format(odd): tensor[odd::2] for odd in (0, 1)}


def joined(directory: Path) -> dict[str, Tensor]:
    """The tensors of an output with its halves joined again."""
    stored = load_file(directory / "model.safetensors")
    for name in [name for name in stored if name.endswith(LOWER.format(0))]:
        name = name.removesuffix(LOWER.format(0))
        halves = [stored.pop(name + LOWER.format(odd)) for odd in (0, 1)]
        stored[name] = torch.stack(halves, dim=1).flatten(0, 1).contiguous()
    return stored


def config(model: Path, output: Path, **options: Any) -> PruneConfig:
    return PruneConfig(str(model), output, method="magnitude", stock=True, **options)


def test_a_toy_form_goes_through_a_run(tiny_llama: Path, tmp_path: Path) -> None:
    plain = prune(config(tiny_llama, tmp_path / "plain"))
    toy = prune(config(tiny_llama, tmp_path / "toy"), form=HalvesForm)
    stored, whole = load_file(toy.output / "model.safetensors"), load_file(plain.output / "model.safetensors")
    assert len(stored) == len(whole) + 8 and not any(name.endswith("down_proj.weight") for name in stored)
    again = joined(toy.output)
    assert again.keys() == whole.keys() and all(torch.equal(again[name], whole[name]) for name in whole)
    assert json.loads((toy.output / "config.json").read_text())["toy"] == {"format": "halves", "zeros": 0.0}
    assert (toy.output / "halves.py").read_text() == "# how halves are read\n"
    card = (toy.output / "README.md").read_text()
    assert "They are stored as `halves`." in card and f"{HalvesForm.read_by}." in card and "import halves\n" in card
    assert toy.read_by == HalvesForm.read_by and toy.layout == "stock"
    assert toy.facts["perplexity"]["after"] == plain.facts["perplexity"]["after"]
    assert toy.facts["parameters"] == plain.facts["parameters"] and toy.facts["bytes"] == plain.facts["bytes"]


def test_a_toy_form_goes_on_after_a_kill(tiny_llama: Path, tmp_path: Path, killing: Any) -> None:
    whole = prune(config(tiny_llama, tmp_path / "whole", evaluate=False), form=HalvesForm).output
    killing(6, "after")
    with pytest.raises(Killed):
        prune(config(tiny_llama, tmp_path / "toy", evaluate=False, resume=True), form=HalvesForm)
    killing(-1, "after")
    with pytest.raises(UsageError, match="output form HalvesForm, this run has None"):
        prune(config(tiny_llama, tmp_path / "toy", evaluate=False, resume=True))
    again = prune(config(tiny_llama, tmp_path / "toy", evaluate=False, resume=True), form=HalvesForm).output
    assert weights(whole) == weights(again)


def test_what_a_toy_form_refuses_is_refused_before_any_work(tiny_llama: Path, tmp_path: Path) -> None:
    class Never(HalvesForm):
        def check(self) -> None:
            raise UsageError("not today; come back")

    with pytest.raises(UsageError, match="not today"):
        prune(config(tiny_llama, tmp_path / "toy"), form=Never)
    assert not list(tmp_path.iterdir())
