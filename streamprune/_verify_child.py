"""Run by `streamprune verify` in a process of its own: plain transformers only, nothing of streamprune.

python -P _verify_child.py DIRECTORY SCRATCH REMOTE_CODE
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

# Two float32 computations of the same sums in another order; a wrong mask or width is off by the logits' size.
TOLERANCE = 1e-3
PROMPT, NEW_TOKENS, PADDING = 12, 16, 5


def check(name: str, deviation: float, scale: float, detail: str = "") -> dict[str, Any]:
    """One row: passed if `deviation` is within TOLERANCE of `scale`, both maximum absolute values."""
    passed = bool(deviation <= TOLERANCE * max(scale, 1e-6))
    return {"name": name, "passed": passed, "detail": detail or f"off by {deviation:.1e} of {scale:.1f}"}


def generate(model: Any, ids: Tensor, mask: Tensor, use_cache: bool) -> tuple[Tensor, Tensor]:
    """Greedy tokens [n, new] and the logits of every step, [new, n, vocabulary]."""
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=use_cache,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits)


def compare_generation(name: str, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Steps are compared until the tokens part; they may part only where two logits tie."""
    (tokens, logits), (other_tokens, other_logits) = first, second
    scale, worst, compared = float(logits.abs().max()), 0.0, 0
    for row in range(tokens.shape[0]):
        for step in range(tokens.shape[1]):
            worst = max(worst, float((logits[step, row] - other_logits[step, row]).abs().max()))
            compared += 1
            if tokens[row, step] != other_tokens[row, step]:
                break
    return check(name, worst, scale, f"off by {worst:.1e} of {scale:.1f} over {compared} steps")


def main(directory: str, scratch: str, remote_code: str) -> None:
    """Write checks.json into `scratch`, next to expected.safetensors."""
    expected = load_file(Path(scratch) / "expected.safetensors")
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, trust_remote_code=remote_code == "1", output_loading_info=True
    )
    model, info = loaded
    model.eval()
    lost = sorted([*info["missing_keys"], *info["unexpected_keys"], *map(str, info["mismatched_keys"])])
    checks = [
        {
            "name": "weights",
            "passed": not lost,
            "detail": f"not matched: {lost[:3]}" if lost else "all matched",
        }
    ]
    ids = expected["ids"]
    text = (Path(scratch) / "text.txt").read_text(encoding="utf-8")
    tokens = AutoTokenizer.from_pretrained(directory)(text, add_special_tokens=False)["input_ids"]
    same = tokens[: ids.numel()] == ids.flatten().tolist()
    checks.append({"name": "tokens of a text", "passed": same, "detail": f"{ids.numel()} compared"})
    with torch.no_grad():
        logits = model(ids).logits
    deviation = float((logits - expected["logits"]).abs().max())
    checks.append(check("logits of the masked dense model", deviation, float(expected["logits"].abs().max())))
    prompt = ids[:, :PROMPT]
    ones = torch.ones_like(prompt)
    cached = generate(model, prompt, ones, True)
    checks.append(
        compare_generation("generation with and without KV cache", cached, generate(model, prompt, ones, False))
    )
    padding = torch.zeros(len(prompt), PADDING, dtype=prompt.dtype)
    padded = generate(model, torch.cat([padding, prompt], 1), torch.cat([padding, ones], 1), True)
    checks.append(compare_generation("generation with left padding", cached, padded))
    (Path(scratch) / "checks.json").write_text(json.dumps(checks))


if __name__ == "__main__":
    main(*sys.argv[1:])
