"""Process in which `streamprune speed` loads one model with one engine, so that its peak memory is its own.

python -P -m streamprune.reports._speed_child

The first line of stdin is the task, JSON: engine, path, device, dtype, ids (the prompt), new (tokens), remote_code.
When the model is loaded and has computed once, a line {"ready": true} is written; each line after is answered by one
measurement: {"prefill": tokens/s, "decode": tokens/s, "peak_rss": bytes}, on a GPU with "peak_gpu".
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any


def by_transformers(task: dict[str, Any]) -> Callable[[], dict[str, float]]:
    """Load by transformers; measure a forward of the prompt, then greedy tokens one by one with the KV cache."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    import streamprune  # noqa: F401  layers of different widths load then
    from streamprune.paging.device import peaks, synchronize

    logging.disable_progress_bar()
    device = torch.device(task["device"])
    options: dict[str, Any] = {"dtype": getattr(torch, task["dtype"]), "trust_remote_code": task["remote_code"]}
    loaded: Any = AutoModelForCausalLM.from_pretrained(task["path"], **options)
    model = loaded.to(device).eval()
    ids = torch.tensor([task["ids"]], device=device)

    @torch.no_grad()
    def measure() -> dict[str, float]:
        synchronize(device)
        start = time.perf_counter()
        out = model(ids, use_cache=True, logits_to_keep=1)
        synchronize(device)
        middle = time.perf_counter()
        for _ in range(task["new"]):
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
        synchronize(device)
        end = time.perf_counter()
        return {"prefill": ids.shape[1] / (middle - start), "decode": task["new"] / (end - middle), **peaks()}

    return measure


def by_llama_cpp(task: dict[str, Any]) -> Callable[[], dict[str, float]]:
    """Load a GGUF file by llama.cpp, whose own times are taken."""
    import xllamacpp

    from streamprune.figures import peak_rss

    params = xllamacpp.CommonParams()
    params.model.path = task["path"]
    params.n_ctx = params.n_batch = len(task["ids"]) + task["new"] + 8
    params.n_parallel, params.verbosity, params.warmup = 1, 0, False
    if threads := os.environ.get("OMP_NUM_THREADS"):  # as torch takes it
        params.cpuparams.n_threads = int(threads)
    server = xllamacpp.Server(params)
    asked = {"prompt": task["ids"], "n_predict": task["new"], "temperature": 0}
    asked |= {"ignore_eos": True, "cache_prompt": False}

    def measure() -> dict[str, float]:
        times = server.handle_completions(asked)["timings"]
        speeds = {"prefill": times["prompt_per_second"], "decode": times["predicted_per_second"]}
        return speeds | {"peak_rss": peak_rss()}

    return measure


ENGINES = {"transformers": by_transformers, "llama.cpp": by_llama_cpp}


def answer(task: dict[str, Any]) -> None:
    """Load, compute once, and measure as often as asked."""
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what engines print is no answer
    measure = ENGINES[task["engine"]](task)
    measure()
    print(json.dumps({"ready": True}), file=said, flush=True)
    for _ in sys.stdin:
        print(json.dumps(measure()), file=said, flush=True)


if __name__ == "__main__":
    answer(json.loads(sys.stdin.readline()))
    os._exit(0)  # to take down what was imported takes a second
