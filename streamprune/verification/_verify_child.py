"""Run by `streamprune verify` in a process of its own: plain transformers only, nothing of streamprune.

python -P _verify_child.py SCRATCH

Imports what every model needs, and reads two lines of JSON from stdin: the directory to load, with what of its code may
be run, and a text to tokenise. Of the token ids that are in `ids.safetensors` of SCRATCH by then, the logits go to
`logits.safetensors`; all other findings go to `findings.json`.
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

# ruff: noqa: E402
# What imports make stays: to look through it for garbage, again and again, would be a fifth of their time.
gc.disable()
import torch
import transformers.generation.utils
import transformers.modeling_layers
import transformers.tokenization_utils_tokenizers  # noqa: F401  what every model imports, while nothing is asked yet
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

gc.enable()
PROMPT_TOKENS, GENERATED_TOKENS, PADDING = 12, 16, 5
LOADED = "loaded"  # a file that is there when the model is


def load(directory: str, remote_code: bool) -> tuple[Any, dict[str, Any]]:
    """The model in float32, and what transformers says of its weights."""
    options: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": remote_code, "output_loading_info": True}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(directory, **options)
    except (ImportError, ValueError):  # config.json may name an attention implementation that is not installed
        config = AutoConfig.from_pretrained(directory, trust_remote_code=remote_code)
        config._attn_implementation = "sdpa"
        loaded = AutoModelForCausalLM.from_pretrained(directory, config=config, **options)
    model, info = loaded
    model.generation_config = GenerationConfig()  # beams or a stop that the model comes with are not looked at
    return model.eval(), info


def generate(model: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Greedy tokens [n, new], and the logits of every step, [n, new, vocabulary]; with the KV cache."""
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=GENERATED_TOKENS,
        min_new_tokens=GENERATED_TOKENS,
        do_sample=False,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, dim=1)


def off_without_cache(model: Any, prompt: Tensor, tokens: Tensor, logits: Tensor) -> list[float]:
    """Measure how far the logits of generated tokens are from those of one pass over the sequence, and their size.

    Step by step without a cache every step is such a pass, over less.
    """
    whole = model(torch.cat([prompt, tokens[:, :-1]], dim=1), use_cache=False).logits
    expected = whole[:, prompt.shape[1] - 1 :]
    return [float((logits - expected).abs().max()), float(expected.abs().max())]


def generation(model: Any, ids: Tensor) -> dict[str, list[float]]:
    """Compare whole and padded prompts of `ids` [n, seq], generated together, each with one without either."""
    n, length = len(ids), PROMPT_TOKENS + PADDING
    whole, short = ids[:, :length], ids[:, :PROMPT_TOKENS]
    padding = torch.zeros(n, PADDING, dtype=ids.dtype)
    mask = torch.ones(2 * n, length, dtype=ids.dtype)
    mask[n:, :PADDING] = 0
    tokens, logits = generate(model, torch.cat([whole, torch.cat([padding, short], dim=1)]), mask)
    return {
        "cache": off_without_cache(model, whole, tokens[:n], logits[:n]),
        "padding": off_without_cache(model, short, tokens[n:], logits[n:]),
    }


def examine(scratch: str) -> None:
    """Write the findings into `scratch`."""
    # The dense model runs at the same time, on the other half.
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    task = json.loads(sys.stdin.readline())
    model, info = load(task["directory"], task["model_code"])
    (Path(scratch) / LOADED).touch()
    tokenizer = AutoTokenizer.from_pretrained(task["directory"], trust_remote_code=task["tokenizer_code"])
    text = json.loads(sys.stdin.readline())["text"]
    ids = load_file(Path(scratch) / "ids.safetensors")["ids"]
    with torch.no_grad():
        save_file({"logits": model(ids).logits.contiguous()}, Path(scratch) / "logits.safetensors")
        findings = {
            "missing": sorted([*info["missing_keys"], *map(str, info["mismatched_keys"])]),
            "unexpected": sorted(info["unexpected_keys"]),
            "tokens": [
                tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"] for special in (False, True)
            ],
            "steps": len(ids) * GENERATED_TOKENS,
            **generation(model, ids),
        }
    (Path(scratch) / "findings.json").write_text(json.dumps(findings))


if __name__ == "__main__":
    examine(*sys.argv[1:])
    os._exit(0)  # the answer is awaited, and to take down what was imported takes a second
