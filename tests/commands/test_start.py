"""What needs neither torch nor transformers imports neither, and a ragged checkpoint still loads after one import."""

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from marks import slow
from ragged_models import dense_model, random_cuts, tokens, write_checkpoint
from safetensors.torch import load_file, save_file

import streamprune
from streamprune.methods.table import METHODS

ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
ANSWERED_AT_ONCE = """
import sys
from streamprune.cli import main

def answer(code, *arguments):
    try:
        main(list(arguments))
    except SystemExit as stopped:
        assert stopped.code == code, (arguments, stopped.code)
    heavy = {"torch", "transformers", "numpy", "huggingface_hub"} & set(sys.modules)
    assert not heavy, (arguments, heavy)

answer(0)
answer(0, "--version")
answer(0, "methods")
for command in (
    *([], ["plan"], ["eval"], ["verify"], ["recover"], ["compare"], ["report"], ["speed"], ["methods"], ["demo"]),
):
    answer(0, *command, "--help")
    answer(2, *command, "--unknown")
run = ("--model", "here", "--output", "there")
answer(2, "--model", "here")
answer(2, "--output", "there")
answer(2, *run, "--ratio", "2")
answer(2, *run, "--method", "unknown")
answer(2, *run, "--set", "order=third", "--method", "taylor")
answer(2, *run, "--method", "flap", "--granularity", "layers")
answer(2, *run, "--gpu-memory", "much")
answer(2, *run, "--quiet", "--json-progress")
answer(2, *run, "methods")
answer(2, "plan")
answer(2, "plan", "--model", "here", "--assume", "abacus")
answer(2, "plan", "--model", "here", "--granularity", "3:2")
answer(2, "eval")
answer(2, "eval", "--model", "here", "--seq-len", "1")
answer(2, "eval", "--model", "here", "--tasks", "piqa", "--limit", "0")
answer(2, "eval", "--model", "here", "--limit", "3")
answer(2, "verify")
answer(2, "recover", "--model", "here", "--output", "there")
answer(2, "recover", *run, "--data", "text", "--rank", "0")
answer(1, "verify", "nowhere")
answer(2, "compare", "here")
answer(2, "report")
answer(2, "speed", "here", "--runs", "0")
answer(1, "compare", "here", "there", "--json", ".")
"""


def run(code: str, *arguments: object) -> str:
    """What a fresh process prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_tables_and_usage_errors_import_nothing_that_takes_seconds() -> None:
    run(ANSWERED_AT_ONCE)


def test_importing_the_package_imports_nothing_that_takes_seconds() -> None:
    run(
        """
import sys, streamprune
from streamprune import METHODS, PruneConfig, StreampruneError
assert PruneConfig(model="a", output="b").ratio == 0.2 and "taylor" in METHODS
assert set(streamprune.__all__) <= set(dir(streamprune))
assert not {"torch", "transformers", "numpy", "click"} & set(sys.modules)
"""
    )


def test_every_public_name_is_there_and_documented() -> None:
    for name in streamprune.__all__:
        value = getattr(streamprune, name)
        assert name in ("METHODS", "FAMILIES") or inspect.getdoc(value)
    assert streamprune.plan is streamprune.pipeline.run.foretell  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="no attribute 'prune_all'"):
        streamprune.prune_all  # noqa: B018


@pytest.mark.parametrize("name", METHODS)
def test_every_method_s_function_is_where_its_row_says(name: str) -> None:
    assert list(inspect.signature(METHODS[name].score).parameters)[:2] == ["statistics", "settings"]


def test_evaluate_measures_what_its_command_prints(tiny_llama: Path, streamprune: Any, tmp_path: Path) -> None:
    import streamprune as package

    (tmp_path / "text.txt").write_text("The harbour was quiet in the morning. " * 20)
    found = package.evaluate(tiny_llama, tmp_path / "text.txt", seq_len=16, samples=5)
    options = ("--text", tmp_path / "text.txt", "--seq-len", 16, "--samples", 5, "--quiet")
    printed = streamprune("eval", "--model", tiny_llama, *options).out
    assert (
        printed == f"perplexity {found.perplexity:.4f} (loss {found.loss:.6f} nats, {found.text}, in {found.dtype})\n"
    )
    assert (found.segments, found.tokens) == (5, 75)
    for wrong in ({"seq_len": 1}, {"samples": 0}, {"micro_batch": 0}):
        with pytest.raises(package.UsageError):
            package.evaluate(tiny_llama, **wrong)


# Ragged checkpoints after `import streamprune`.

IMPORTS = {
    "first": "import streamprune, transformers",
    "last": "import transformers, streamprune",
    "after the auto classes": "from transformers import AutoConfig, AutoModelForCausalLM\nimport streamprune",
    "twice": "import importlib, streamprune, transformers\ntransformers.AutoConfig\nimportlib.reload(streamprune)",
}
LOADS = """
import pickle, sys
from pathlib import Path
assert not [name for name in sys.modules if "modeling_streamprune" in name]
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

root = Path(sys.argv[1])
expected = load_file(root / "expected.safetensors")
for model_type in ("llama", "gemma3_text"):
    model = AutoModelForCausalLM.from_pretrained(root / model_type, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(model(expected["ids"]).logits, expected[model_type])
    assert type(model).__module__ == f"streamprune.modeling_streamprune_{model_type}"
    config = AutoConfig.from_pretrained(root / model_type)
    assert type(config) is type(model.config) is AutoConfig.from_pretrained(root / model_type).__class__
    assert type(AutoModel.from_config(config)) is type(model.model)
    assert type(AutoModelForCausalLM.from_config(config)) is type(model)
    (root / f"{model_type}.pickle").write_bytes(pickle.dumps(model))
loaded = sorted(name for name in sys.modules if "modeling_streamprune" in name)
assert loaded == ["streamprune.modeling_streamprune_gemma3_text", "streamprune.modeling_streamprune_llama"], loaded
"""
FIRST_USES = """
import sys, streamprune
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
import pickle
assert pickle.loads(pickle.dumps(CONFIG_MAPPING)).keys() == CONFIG_MAPPING.keys()
use, path = sys.argv[1:]
if use == "a config by its type":
    found = AutoConfig.for_model("streamprune_llama", per_layer_config={})
elif use == "a stand-in":
    stand_in = CONFIG_MAPPING["streamprune_llama"]
    assert issubclass(stand_in, PreTrainedConfig) and stand_in.model_type == "streamprune_llama"
    assert not [name for name in sys.modules if "modeling_streamprune" in name]
    found = stand_in.from_pretrained(path)
    assert type(stand_in(per_layer_config={})) is type(found)
elif use == "the module":
    from streamprune.modeling_streamprune_llama import StreampruneLlamaConfig
    found = StreampruneLlamaConfig(per_layer_config={})
assert type(found) is CONFIG_MAPPING["streamprune_llama"], type(found)
assert type(found).__module__ == "streamprune.modeling_streamprune_llama"
import inspect
assert "class StreampruneLlamaConfig" in inspect.getsource(sys.modules[type(found).__module__])
"""


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ragged checkpoints of two families, without their code, and their logits as the transformers model gives them."""
    from ragged_models import load

    root, expected = tmp_path_factory.mktemp("ragged"), {"ids": tokens()}
    for model_type in ("llama", "gemma3_text"):
        write_checkpoint(root / model_type, dense_model(model_type), model_type, random_cuts(model_type))
        expected[model_type] = load(root / model_type)(tokens()).logits.detach()
        for file in root.glob("*/modeling_*.py"):
            file.unlink()
    save_file(expected, root / "expected.safetensors")
    assert len(load_file(root / "expected.safetensors")) == 3
    return root


@pytest.mark.parametrize("order", ["first", *map(slow, list(IMPORTS)[1:])])
def test_ragged_checkpoints_load_whenever_the_package_was_imported(order: str, ragged: Path) -> None:
    run(f"{IMPORTS[order]}\n{LOADS}", ragged)


@pytest.mark.slow
def test_a_ragged_model_can_be_unpickled_where_nothing_was_imported(ragged: Path) -> None:
    run(f"import streamprune.errors\n{LOADS}", ragged)
    run(
        """
import pickle, sys
from pathlib import Path
model = pickle.loads(Path(sys.argv[1]).read_bytes())
assert type(model).__name__ == "StreampruneGemma3ForCausalLM"
from transformers import AutoModelForCausalLM
assert type(AutoModelForCausalLM.from_config(model.config)) is type(model)
""",
        ragged / "gemma3_text.pickle",
    )


@pytest.mark.parametrize("use", ["a stand-in", slow("a config by its type"), slow("the module")])
def test_the_first_use_of_a_family_registers_its_own_classes(use: str, ragged: Path) -> None:
    run(FIRST_USES, use, ragged / "llama")


def test_the_command_ends_though_a_thread_waits_for_ever() -> None:
    """A thread may wait for a lock that Ctrl-C came upon and left held; the interpreter would wait for the thread."""
    code = """
import sys, threading
from streamprune.__main__ import command
threading.Thread(target=threading.Event().wait).start()
sys.argv = ["streamprune", "verify", "nowhere"]
command()
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("streamprune: nowhere")
