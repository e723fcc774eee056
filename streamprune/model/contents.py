"""Sorting of a checkpoint's tensors: those of the model get the model's own names, the others are left out."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

from streamprune.errors import CheckpointError
from streamprune.figures import human
from streamprune.model.quantisation import declared, quantised
from streamprune.model.tensor_names import beginnings, missing, renaming
from streamprune.storage.checkpoint import Checkpoint

Wanted = Mapping[
    tuple[str, ...], Sequence[int]
]  # shape of each tensor of the model, by the names it may have in a file
NAMED = 3  # of the tensors that are left out
ADAPTERS = ("lora_", "base_layer.", "ia3_", "prompt_encoder.")  # parts of names that PEFT gives


def settle(checkpoint: Checkpoint, wanted: Wanted, base: str) -> tuple[str, list[str]]:
    """Rename the checkpoint's tensors where a wrapper's names hide the model's, and drop what its config says wrongly.

    Args:
        base: what the model's names begin with and those of a file of the base model lack: "model.".

    Returns:
        What names in the checkpoint lack: `base` or ""; and lines that say what was done.

    Raises:
        CheckpointError: the weights are quantised, an adapter's, or have the names of another model.
    """
    names = checkpoint.tensors.keys() | checkpoint.others.keys() | checkpoint.misplaced.keys()
    strip, lacking, notes = "", missing(wanted, names), []
    if lacking:
        bare = missing(wanted, names, base)
        if not bare or not any(name.startswith(base) for name in names):
            strip, lacking = base, bare
    if lacking and (found := renaming(list(wanted), names, base)) is not None:
        checkpoint.rename(found.names)
        strip, lacking = "", []
        notes.append(f"its tensors' names lose {found.lost}; the output has the model's own")
    unusable = lacking or [
        choices[0] for choices, shape in wanted.items() if not _is_float(checkpoint, choices, strip, shape)
    ]
    if unusable and (message := quantised(checkpoint, unusable)) is not None:
        raise CheckpointError(message)
    if 2 * len(lacking) > len(wanted):
        _refuse_names(checkpoint, next(iter(wanted))[0])
    for field in declared(checkpoint.config):
        del checkpoint.config[field]
        notes.append(f"{field} of its config.json is left out: the weights are floats")
    return strip, notes


def _is_float(checkpoint: Checkpoint, choices: tuple[str, ...], strip: str, shape: Sequence[int]) -> bool:
    """Tell whether the checkpoint has a tensor, by one of its names, in the model's shape and of floats."""
    found = (checkpoint.tensors.get(choice.removeprefix(strip)) for choice in choices)
    return any(entry and entry.dtype.is_floating_point and entry.shape == tuple(shape) for entry in found)


def _refuse_names(checkpoint: Checkpoint, expected: str) -> None:
    names = [*checkpoint.tensors, *checkpoint.others]
    if adapter := next((name for name in names if any(part in name for part in ADAPTERS)), None):
        raise CheckpointError(
            f"{checkpoint.path} holds a PEFT adapter that is not merged ({adapter}); call merge_and_unload() and "
            "save_pretrained(...), and give the directory that this writes"
        )
    raise CheckpointError(
        f"{checkpoint.path}: the names of its tensors begin with {beginnings(names)}, where its config.json calls for "
        f"{expected!r}; export it again with save_pretrained(...) of the model itself"
    )


def leave_out(checkpoint: Checkpoint, used: Container[str]) -> list[str]:
    """Forget the tensors that are not `used`; return a line that says which, if there are any."""
    left = checkpoint.keep(used)
    if not left:
        return []
    some = ", ".join(entry.name for entry in left[:NAMED]) + ", ..." * (len(left) > NAMED)
    size = human(sum(entry.nbytes for entry in left))
    return [f"left out, as the model does not use them: {len(left)} tensors, {size} ({some})"]
