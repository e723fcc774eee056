"""Suites: the tasks of a paper's tables, as one name each."""

from __future__ import annotations

from collections.abc import Sequence

from streamprune.errors import UsageError

# The name -> lm-eval's names of the tasks.
SUITES = {
    # The seven of MoreauPruner's tables (2406.07017), which are LLM-Pruner's.
    "moreau": ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"),
    # The six of GBLM-Pruner's (2311.04902).
    "gblm": ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "openbookqa"),
    # The five of the policy gradient's (2406.10576).
    "bernoulli": ("piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge"),
}


def tasks_of(names: str | Sequence[str]) -> tuple[str, ...]:
    """Return the tasks that are meant, each once, suites replaced by theirs.

    Args:
        names: with commas between them, or a list of them.

    Raises:
        UsageError: there are none.
    """
    listed = names.split(",") if isinstance(names, str) else names
    meant = dict.fromkeys(task for name in listed if name.strip() for task in SUITES.get(name.strip(), (name.strip(),)))
    if not meant:
        raise UsageError(f"--tasks {names!r} names none; write arc_easy,piqa, or a suite: {', '.join(SUITES)}")
    return tuple(meant)
