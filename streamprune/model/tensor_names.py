"""Names that wrappers put before a model's tensors, and how to tell them: by the names that the model has.

torch.compile, DistributedDataParallel, FSDP, PEFT, and models that hold the language model as a part, all save the
same tensors under longer names. Whatever stands before them is taken away where that gives every name of the model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

# Put in anywhere, before every module that is wrapped on its own: torch.compile, FSDP, activation checkpointing.
INNER = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
Choices = tuple[str, ...]  # the names that one tensor of the model may have in a file


@dataclass(frozen=True)
class Renaming:
    """Mapping from the names in a file to the model's, and the parts that names lose by it, in words."""

    names: dict[str, str]
    lost: str


def missing(wanted: Iterable[Choices], names: Collection[str], base: str = "") -> list[str]:
    """List the wanted tensors, by their first name, of which none of the names (without `base`) is in `names`."""
    return [choices[0] for choices in wanted if not any(each.removeprefix(base) in names for each in choices)]


def renaming(wanted: Sequence[Choices], names: Collection[str], base: str) -> Renaming | None:
    """Find how wrapped names become the model's.

    Args:
        wanted: the names of each tensor of the model.
        names: those in the file.
        base: what the model's names begin with and files of a base model lack: "model.".

    Returns:
        None where nothing, or more than one thing, gives all of `wanted`.
    """
    plain = {name: _without_inner(name) for name in names}
    inner = [repr(part) for part in INNER if any(part in name for name in names)]
    for added in ("", base):
        found = [
            Renaming(made, " and ".join([_lost(prefix, added)] * bool(prefix) + inner))
            for prefix in _prefixes([each.removeprefix(added) for each in wanted[0]], plain.values())
            if (made := _renamed(wanted, plain, prefix, added))
        ]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def _renamed(wanted: Sequence[Choices], plain: dict[str, str], prefix: str, added: str) -> dict[str, str]:
    """Rename the tensors that are the model's: new names by old; empty where some are missing or come twice."""
    allowed = {choice for choices in wanted for choice in choices}
    made: dict[str, str] = {}
    for name, short in plain.items():
        new = added + short.removeprefix(prefix) if short.startswith(prefix) else short
        if new in allowed:
            made[name] = new
    new_names = set(made.values())
    return made if len(new_names) == len(made) and not missing(wanted, new_names) else {}


def _lost(prefix: str, added: str) -> str:
    return f"{prefix!r}" + (f" for {added!r}" if added else "")


def _without_inner(name: str) -> str:
    for part in INNER:
        name = name.replace(part, "")
    return name


def _prefixes(ends: Iterable[str], names: Collection[str]) -> list[str]:
    """List what stands in `names` before one of `ends`, sorted."""
    found = {name.removesuffix(end) for end in ends for name in names if name.endswith(end)}
    return sorted(prefix for prefix in found if not prefix or prefix.endswith("."))


def beginnings(names: Collection[str], count: int = 3) -> str:
    """Say what names begin with, the most frequent first, for a message: "'vision.encoder.' (120), 'head.' (2)"."""
    tally: dict[str, int] = {}
    for name in names:
        # Up to the first number, or to the last part: what the names of a module's tensors share.
        parts = name.split(".")
        stop = next((at for at, part in enumerate(parts) if part.isdecimal()), len(parts) - 1)
        start = ".".join(parts[:stop]) + "." if stop else name
        tally[start] = tally.get(start, 0) + 1
    most = sorted(tally.items(), key=lambda item: (-item[1], item[0]))[:count]
    return ", ".join(f"{start!r} ({number})" for start, number in most)
