"""Beside the tensors: what a next step needs comes along, what misleads does not, and nothing of it ends a run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

SHORT = ("--method", "random", "--no-evaluate", "--layers", "1:3")
STOCK = ("--method", "random", "--no-evaluate", "--stock")
ALWAYS = {
    *(
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "streamprune.json",
        "streamprune.scores",
    ),
    *("tokenizer.json", "tokenizer_config.json"),
}
OURS = "modeling_streamprune_llama.py"
NEEDED = (
    *("tokenizer.model", "tokenizer.model.v3", "tokenizer.model.v7m1", "tekken.json", "spiece.model", "vocab.json"),
    *("sentencepiece.bpe.model", "qwen.tiktoken", "vocab.txt", "merges.txt", "added_tokens.json", "bpe.codes"),
    *("special_tokens_map.json", "chat_template.json", "chat_template.jinja", "processor_config.json", "vocab.bpe"),
    *("preprocessor_config.json", "video_preprocessor_config.json", "LICENSE", "License.txt", "NOTICE.md"),
    *("USE_POLICY.md", "use_policy.txt", "LICENCE", "third_party_notices.txt", "rwkv_vocab_v20230424.txt"),
    *("additional_chat_templates/rag.jinja", "decoder_tokenizer/tokenizer.json", "1_Pooling/config.json"),
    "decoder_tokenizer/tokenizer_config.json",
)
LEFT_BEHIND = (
    *("trainer_state.json", "training_args.bin", "optimizer.pt", "optimizer.json", "scheduler.pt", "rng_state_0.pth"),
    *("all_results.json", "train_results.json", "params.json", "consolidated.00.pth", "consolidated.safetensors"),
    *("quantize_config.json", "adapter_config.json", "pytorch_model.bin", "pytorch_model.bin.index.json", "notes.txt"),
    *("model.safetensors.index.json.bak", "answers.json", "train_data.txt", ".gitattributes", "license_check.py"),
    *("checkpoint-500/tokenizer_config.json", "checkpoint-500/trainer_state.json", "original/tokenizer.model"),
    *("global_step500/tokenizer.json", "runs/vocab.txt", ".cache/tokenizer.json", "original/params.json"),
    "tokenizer_results.json",
)


@pytest.fixture
def prune(streamprune: Any, model: Path, output: Path) -> Callable[..., str]:
    """Prunes the tiny Llama, which must go well, and returns what it said."""

    def run(*options: str) -> str:
        result = streamprune("--model", model, "--output", output, *(options or SHORT))
        assert result.code == 0, result.err
        return result.err

    return run


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir()}


def place(directory: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text("{}" if name.endswith(".json") else f"of {name}")


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_what_a_next_step_needs_comes_along_and_what_misleads_does_not(
    model: Path, output: Path, prune: Callable[..., str]
) -> None:
    place(model, (*NEEDED, *LEFT_BEHIND))
    prune()
    assert files(output) == ALWAYS | {OURS, *NEEDED}
    for name in NEEDED:
        assert (output / name).read_bytes() == (model / name).read_bytes()


def test_files_that_are_links_as_in_the_hub_s_cache_come_along_as_files(
    model: Path, output: Path, prune: Callable[..., str]
) -> None:
    blobs = model.parent / "blobs"
    blobs.mkdir()
    place(model, NEEDED)
    for number, file in enumerate(sorted(path for path in model.rglob("*") if path.is_file())):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))
    prune()
    assert files(output) == ALWAYS | {OURS, *NEEDED}
    assert not any(path.is_symlink() for path in output.rglob("*"))


def test_files_that_the_tokenizer_s_config_names_come_along(
    model: Path, output: Path, prune: Callable[..., str]
) -> None:
    place(model, ("words.dat", "secret.dat"))
    edit(
        model / "tokenizer_config.json", vocab_file="words.dat", other_file="../secret.dat", weights="pytorch_model.bin"
    )
    place(model, ("pytorch_model.bin",))
    prune()
    assert files(output) == ALWAYS | {OURS, "words.dat"}


CODE = """
from transformers import PreTrainedTokenizerFast
from .own_words import WORDS
NAMES = {"words_file": "own_words.dat", "weights": "model.safetensors"}


class OwnTokenizer(PreTrainedTokenizerFast):
    words = WORDS
"""


def tokenizer_with_code(model: Path) -> None:
    """A tokenizer whose class is defined beside it, in a module that imports another and names a file."""
    (model / "tokenization_own.py").write_text(CODE)
    (model / "own_words.py").write_text("from .own_letters import WORDS\n")
    (model / "own_letters.py").write_text("WORDS = ['a']\n")
    place(model, ("own_words.dat", "unrelated.py"))
    entry = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
    edit(model / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=entry)


@pytest.mark.parametrize("options", [SHORT, STOCK], ids=["ragged", "stock"])
def test_a_tokenizer_s_code_comes_along_where_it_is_trusted(
    options: tuple[str, ...], model: Path, output: Path, prune: Callable[..., str]
) -> None:
    tokenizer_with_code(model)
    prune(*options, "--trust-remote-code")
    code = {"tokenization_own.py", "own_words.py", "own_letters.py", "own_words.dat"}
    assert files(output) - {OURS} == ALWAYS | code
    assert (output / "tokenizer_config.json").read_bytes() == (model / "tokenizer_config.json").read_bytes()
    dense, pruned = (AutoTokenizer.from_pretrained(path, trust_remote_code=True) for path in (model, output))
    assert type(pruned).__name__ == type(dense).__name__ == "OwnTokenizer" and pruned.words == ["a"]
    assert pruned("A text.")["input_ids"] == dense("A text.")["input_ids"]


@pytest.mark.parametrize("options", [SHORT, STOCK], ids=["ragged", "stock"])
def test_a_tokenizer_s_code_is_named_no_more_where_it_is_not_trusted(
    options: tuple[str, ...], model: Path, output: Path, prune: Callable[..., str]
) -> None:
    tokenizer_with_code(model)
    said = prune(*options)
    assert files(output) - {OURS} == ALWAYS
    assert said.count("tokenization_own.OwnTokenizer") == 1 and "--trust-remote-code" in said
    assert "auto_map" not in json.loads((output / "tokenizer_config.json").read_text())
    assert AutoTokenizer.from_pretrained(output)("A text.")["input_ids"]


@pytest.mark.parametrize(
    "entry", ["../elsewhere.OwnTokenizer", "sub/elsewhere.OwnTokenizer", "/tmp/elsewhere.OwnTokenizer", "gone.Own", 7]
)
def test_code_outside_the_directory_or_gone_is_not_followed(
    entry: Any, model: Path, output: Path, prune: Callable[..., str]
) -> None:
    for directory in (model.parent, model / "sub"):
        directory.mkdir(exist_ok=True)
        (directory / "elsewhere.py").write_text("raise SystemExit")
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, entry]})
    said = prune(*STOCK, "--trust-remote-code")
    assert files(output) == ALWAYS
    assert f"{entry}, which is not there" in said
    assert "auto_map" not in json.loads((output / "tokenizer_config.json").read_text())


def test_code_of_another_repository_needs_no_file(model: Path, output: Path, prune: Callable[..., str]) -> None:
    entries = {"AutoTokenizer": ["org/name--tokenization.Own", None], "AutoProcessor": "org/name--processing.Own"}
    edit(model / "tokenizer_config.json", auto_map=entries)
    prune(*STOCK)
    assert files(output) == ALWAYS
    assert json.loads((output / "tokenizer_config.json").read_text())["auto_map"] == entries


OWN_MODEL = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    pass


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.parametrize("trusted", [False, True])
def test_a_model_s_code_comes_along_where_it_is_trusted_and_knows_the_layout(
    trusted: bool, model: Path, output: Path, prune: Callable[..., str]
) -> None:
    (model / "modeling_own.py").write_text(OWN_MODEL)
    entries = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    edit(model / "config.json", auto_map=entries)
    said = prune(*STOCK, *(["--trust-remote-code"] if trusted else []))
    config = json.loads((output / "config.json").read_text())
    assert files(output) == ALWAYS | ({"modeling_own.py"} if trusted else set())
    assert config.get("auto_map") == (entries if trusted else None)
    assert ("modeling_own" in said) != trusted
    loaded = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=trusted)
    assert type(loaded).__name__ == ("OwnModel" if trusted else "LlamaForCausalLM")


def test_a_ragged_layout_has_code_of_its_own(model: Path, output: Path, prune: Callable[..., str]) -> None:
    (model / "modeling_own.py").write_text(OWN_MODEL)
    edit(model / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.OwnModel"})
    said = prune(*SHORT, "--trust-remote-code")
    assert files(output) == ALWAYS | {OURS}
    entries = json.loads((output / "config.json").read_text())["auto_map"]
    assert set(entries.values()) and all(entry.startswith("modeling_streamprune_llama.") for entry in entries.values())
    assert "config.json names code of its own" in said


FRONT = {
    "broken": "license: [mit\nbase_model: : x",
    "no-mapping": "- a\n- b",
    "a-date": "license: 2024-01-01",
    "a-list-of-dates": "license: [mit, 2024-01-01]",
    "keys-of-other-kinds": "1: 2\nnull: mit",
    "tags": "license: !!python/object:os.system mit",
}


@pytest.mark.parametrize("front", FRONT.values(), ids=FRONT)
def test_a_model_card_that_cannot_be_read_costs_no_run(
    front: str, model: Path, output: Path, prune: Callable[..., str]
) -> None:
    (model / "README.md").write_text(f"---\n{front}\n---\nA model.\n")
    prune()
    assert json.loads((output / "streamprune.json").read_text())["license"] is None


def test_a_model_card_in_another_encoding_is_said(model: Path, prune: Callable[..., str]) -> None:
    (model / "README.md").write_bytes("---\nlicense: mité\n---\n".encode("latin-1"))
    assert "README.md cannot be read" in prune()


@pytest.mark.parametrize("license", ["apache-2.0", ["mit", "apache-2.0"]])
def test_the_licence_of_the_model_card_is_kept(
    license: Any, model: Path, output: Path, prune: Callable[..., str]
) -> None:
    (model / "README.md").write_text(f"---\nlicense: {json.dumps(license)}\n---\nA model.\n")
    prune()
    assert json.loads((output / "streamprune.json").read_text())["license"] == license
    assert f"license: {json.dumps(license)}" in (output / "README.md").read_text()


def test_a_file_that_cannot_be_read_is_said_and_left_out(model: Path, output: Path, prune: Callable[..., str]) -> None:
    (model / "LICENSE").symlink_to(model / "gone")
    said = prune()
    assert "LICENSE cannot be read (No such file or directory)" in said
    assert files(output) == ALWAYS | {OURS}


@pytest.mark.parametrize("contents", [b"\xff\xfe{", b"[1]", b"{'a'", b""], ids=["encoding", "list", "quotes", "empty"])
def test_a_tokenizer_that_cannot_be_loaded_costs_no_run_that_reads_no_text(
    contents: bytes, model: Path, output: Path, prune: Callable[..., str]
) -> None:
    (model / "tokenizer_config.json").write_bytes(contents)
    (model / "tokenizer.json").write_bytes(contents)
    said = prune()
    assert "tokenizer_config.json" in said and "copied as it is" in said
    assert (output / "tokenizer_config.json").read_bytes() == contents


def test_all_of_it_is_decided_before_a_layer_is_read(
    streamprune: Any, model: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    tokenizer_with_code(model)
    (model / "LICENSE").symlink_to(model / "gone")
    monkeypatch.setattr("streamprune.paging.pager.Pager.pages", stop)
    said = streamprune("--model", model, "--output", output, *SHORT).err
    assert "tokenization_own.OwnTokenizer" in said and "LICENSE cannot be read" in said


def test_a_plain_output_says_nothing_of_its_companions(prune: Callable[..., str], model: Path) -> None:
    place(model, NEEDED)
    said = prune()
    for word in ("copied", "left out", "cannot be read", "comes along"):
        assert word not in said


def test_a_tokenizer_splits_as_before_where_a_mistral_is_emitted(
    streamprune: Any, tmp_path: Path, output: Path
) -> None:
    save_tiny(tmp_path / "llama", "llama", dtype=torch.float32)
    edit(tmp_path / "llama" / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    options = ("--method", "random", "--no-evaluate", "--stock", "--emit", "mistral")
    assert streamprune("--model", tmp_path / "llama", "--output", output, *options).code == 0
    dense, pruned = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "llama", output))
    assert dense("A  text, 12 é.")["input_ids"] == pruned("A  text, 12 é.")["input_ids"]
