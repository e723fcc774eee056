"""Rope of ragged outputs: that of the dense model, in a spelling that transformers reads without any code of ours."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ragged_models import FAMILIES
from tiny_models import FAMILY_FIELDS, save_tiny
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from streamprune import PruneConfig, prune
from streamprune.output.ragged import modeling_source

THETA = 5000.0
SCALED: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | {"original_max_position_embeddings": 32},
    "longrope": {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 16},
}
LOCAL = {"rope_type": "default", "rope_theta": 100.0}


def rope(family: str, kind: str) -> dict[str, Any]:
    """The parameters of a kind, with factors for half a head where they are by frequency."""
    half = FAMILY_FIELDS[family].get("head_dim", 8) // 2
    factors = {"short_factor": [1.0 + i / 8 for i in range(half)], "long_factor": [2.0 + i for i in range(half)]}
    return SCALED[kind] | (factors if kind == "longrope" else {})


def older(family: str, kind: str) -> dict[str, Any]:
    """The fields of config.json as transformers 4 wrote them."""
    scaled = rope(family, kind)
    scaled["type"] = scaled.pop("rope_type")
    fields: dict[str, Any] = {"rope_theta": THETA, "rope_scaling": None if kind == "default" else scaled}
    if family == "phi3" and kind == "longrope":
        fields["original_max_position_embeddings"] = scaled.pop("original_max_position_embeddings")
    if family == "gemma3_text":
        fields |= {"rope_local_base_freq": 300.0, "sliding_window_pattern": 2}
    return fields


def newer(family: str, kind: str) -> dict[str, Any]:
    """The same as transformers 5 writes them."""
    parameters = rope(family, kind) | {"rope_theta": THETA}
    if family == "gemma3_text":
        return {"rope_parameters": {"full_attention": parameters, "sliding_attention": LOCAL}}
    return {"rope_parameters": parameters}


CASES = [
    (family, kind, spelling)
    for family in FAMILIES
    for kind in SCALED
    for spelling in (older, newer)
    # A Phi-3 has no other kinds; each other family shares its code with the llama's.
    if (kind in ("default", "longrope") if family == "phi3" else family in ("llama", "gemma3_text") or kind == "yarn")
]
REPLACED = ("rope_parameters", "layer_types", "original_max_position_embeddings")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Source and ragged output of every case, by name."""
    root, made = tmp_path_factory.mktemp("rope"), {}
    for family in FAMILIES:
        save_tiny(root / family, family, dtype=torch.float32)
    for family, kind, spelling in CASES:
        name = f"{family}-{kind}-{spelling.__name__}"
        source, output = root / name, root / f"{name}-pruned"
        source.mkdir()
        for file in (root / family).iterdir():
            (source / file.name).symlink_to(file)
        fields = json.loads((root / family / "config.json").read_text())
        fields = {key: value for key, value in fields.items() if key not in REPLACED} | spelling(family, kind)
        if family != "gemma3_text" and "layer_types" in FAMILY_FIELDS[family]:
            fields["layer_types"] = FAMILY_FIELDS[family]["layer_types"]
        (source / "config.json").unlink()
        (source / "config.json").write_text(json.dumps(fields))
        options = {"method": "random", "ratio": 0.4, "layers": (1, 3), "evaluate": False}
        assert prune(PruneConfig(model=str(source), output=output, **options)).layout == "ragged"
        made[name] = source, output
    return made


def rotary(path: Path, **config: Any) -> list[torch.Tensor]:
    """Cosines and sines of every kind of layer, for positions beyond the length of pretraining."""
    fields = AutoConfig.from_pretrained(path, **config)
    model = AutoModelForCausalLM.from_config(fields)
    hidden, positions = torch.zeros(1, 48, fields.hidden_size), torch.arange(48)[None]
    kinds = [(kind,) for kind in sorted(set(fields.layer_types))] if fields.model_type.endswith("gemma3_text") else [()]
    return [part for kind in kinds for part in model.model.rotary_emb(hidden, positions, *kind)]


@pytest.mark.slow
def test_rotary_embeddings_are_those_of_the_dense_model(outputs: dict[str, tuple[Path, Path]]) -> None:
    for name, (source, output) in outputs.items():
        for actual, expected in zip(rotary(output), rotary(source), strict=True):
            assert torch.equal(actual, expected), name


def test_unscaled_rope_of_an_older_config_is_left_as_it_is(outputs: dict[str, tuple[Path, Path]]) -> None:
    fields = json.loads((outputs["llama-default-older"][1] / "config.json").read_text())
    assert fields["rope_theta"] == THETA and fields["rope_scaling"] is None and "rope_parameters" not in fields


def test_configs_survive_saving_copying_and_comparing(outputs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    for name, (_, output) in outputs.items():
        config = AutoConfig.from_pretrained(output)
        config.save_pretrained(tmp_path / name)
        again = AutoConfig.from_pretrained(tmp_path / name)
        again.name_or_path = config.name_or_path
        for same in (again, copy.deepcopy(config), type(config).from_dict(config.to_dict())):
            assert same == config, name
            assert same.to_diff_dict() == config.to_diff_dict()
        changed = copy.deepcopy(config)
        changed.rope_parameters = {}
        assert changed != config
        assert json.loads(config.to_json_string())["rope_parameters"] == config.to_diff_dict()["rope_parameters"]


FRESH_PROCESS = """
import json
import sys
sys.modules["streamprune"] = None  # an import of it fails
from transformers import AutoConfig, AutoTokenizer
read = {}
for path in sys.argv[1:]:
    sizes = [len(AutoTokenizer.from_pretrained(path, trust_remote_code=trust)) for trust in (False, True)]
    read[path] = [*sizes, AutoConfig.from_pretrained(path, trust_remote_code=True).rope_parameters]
print(json.dumps(read))
"""


@pytest.mark.slow
def test_tokenizers_and_configs_load_with_and_without_remote_code(
    outputs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    paths = [str(output) for _, output in outputs.values()]
    for _, saved in list(outputs.values())[:2]:
        again = tmp_path / saved.name
        AutoConfig.from_pretrained(saved).save_pretrained(again)
        for file in saved.glob("tokenizer*"):
            (again / file.name).symlink_to(file)
        paths.append(str(again))
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", FRESH_PROCESS, *paths]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    read = json.loads(finished.stdout)
    for source, output in outputs.values():
        expected = AutoConfig.from_pretrained(source).rope_parameters
        for parameters in (expected, *(each for each in expected.values() if isinstance(each, dict))):
            parameters.pop("type", None)
        actual = read[str(output)]
        for parameters in (actual[2], *(each for each in actual[2].values() if isinstance(each, dict))):
            parameters.pop("type", None)
        size = len(AutoTokenizer.from_pretrained(source))
        assert actual == [size, size, expected], output.name


def test_the_modelling_file_names_the_version_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", "5.14.1")
    with pytest.raises(ImportError, match=r"transformers 5\.15 or later, this is 5\.14\.1"):
        exec(compile(modeling_source("qwen2"), "modeling", "exec"), {"__name__": "modeling"})
    for version in ("5.15.0", "5.15.0.dev0", "5.23.1", "6.0.0rc1"):
        monkeypatch.setattr("transformers.__version__", version)
        exec(compile(modeling_source("qwen2"), "modeling", "exec"), {"__name__": f"modeling_{version}"})
