"""Greedy continuation of a text, up to what it is to stop at."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from streamprune.errors import TaskError

MOST_TOKENS = 256  # where a task does not say: lm-eval's own
GREEDY = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}  # of no effect without sampling


class Continuation:
    """Text that goes on token by token.

    Args:
        task: that asks for it.
        context: its tokens; what is too long to leave room for the new ones loses its beginning.
        wishes: the task's, as lm-eval writes them: what to stop at, and how many tokens at the most.
        longest: tokens that the model takes.
        eos: what the end of a text is written as, if it is.

    Raises:
        TaskError: the task wishes for samples, or for more tokens than the model takes.
    """

    def __init__(self, task: str, context: list[int], wishes: dict[str, Any], longest: int, eos: str | None) -> None:
        wishes = dict(normalize_gen_kwargs(wishes, MOST_TOKENS))
        if wishes.get("do_sample") or wishes.keys() - GREEDY:
            asked = ", ".join(f"{key}={wishes[key]}" for key in wishes if key == "do_sample" or key not in GREEDY)
            raise TaskError(f"{task} generates with {asked}; streamed generation is greedy: leave the task out")
        self.most: int = wishes["max_gen_toks"]
        if self.most >= longest:
            raise TaskError(f"{task} generates {self.most} tokens, the model takes {longest} in all; leave it out")
        self.until = handle_stop_sequences(wishes["until"], eos=eos)
        self.ids = context[max(0, len(context) - (longest - self.most)) :]
        self.generated: list[int] = []
        self.done = self.most < 1

    def add(self, token: int, ends: Collection[int], tokenizer: Any) -> None:
        """Take the next token, and see whether that was the last.

        Args:
            ends: tokens that end a text.
        """
        self.ids.append(token)
        self.generated.append(token)
        said = tokenizer.decode(self.generated)
        stopped = token in ends or any(stop in said for stop in self.until if stop)
        self.done = stopped or len(self.generated) >= self.most

    def text(self, tokenizer: Any) -> str:
        """Return what was generated, without what it stopped at."""
        return postprocess_generated_text(
            tokenizer.decode(self.generated, skip_special_tokens=True), self.until, think_end_token=None
        )
