"""Verification of an output: a pruned directory against the masked dense model.

The masked dense model is streamed from the source (`comparison.py`); the pruned one is loaded whole by plain
transformers in a fresh process (`_verify_child.py`) at the same time, which imports nothing of streamprune.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamprune.errors import CheckpointError
from streamprune.verification.fresh_process import FreshProcess

if TYPE_CHECKING:
    from streamprune.verification.comparison import Check


def verify(directory: Path, source: str | None = None, *, trust_remote_code: bool = False) -> list[Check]:
    """Compare a pruned directory with the masked dense model it stands for.

        for check in verify("pruned"):
            print(check.name, check.passed, check.detail)

    Args:
        directory: written by streamprune.
        source: the dense model, where it has moved.
        trust_remote_code: also run code that streamprune did not write: of the modelling, of the tokenizer.

    Returns:
        Checks of the weights' names, the tokens of a text, the logits, generation with and without the KV cache,
        and left padding.

    Raises:
        StreampruneError: not a pruned directory, the source is gone, or the fresh process failed.
    """
    directory = Path(directory)
    if not (directory / "streamprune.json").is_file():
        raise CheckpointError(f"{directory} has no streamprune.json; give a directory that streamprune wrote")
    with FreshProcess() as process:
        with _collecting_nothing():  # while the process imports its own
            facts = _facts_of(directory)
            import transformers.generation.utils  # noqa: F401  what the tokenizer's config and the model will import

            from streamprune.verification.comparison import compare_with_masked

        return compare_with_masked(process, directory, facts, source, trust_remote_code=trust_remote_code)


def _facts_of(directory: Path) -> dict[str, Any]:
    """Read what a run says of its output; refuse one of a training."""
    from streamprune.storage.checkpoint import read_json

    facts = read_json(directory / "streamprune.json")
    if "recovery" in facts:
        raise CheckpointError(
            f"{directory} was trained after pruning, so it is no masked model; give the directory that was recovered"
        )
    return facts


@contextmanager
def _collecting_nothing() -> Iterator[None]:
    """Keep the collector still: what imports make stays, and to look through it for garbage takes a fifth of them."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
