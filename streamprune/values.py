"""Conversion of the values that an option may be given as, from Python or as text.

Each function takes (name of the option as on the command line, value) and returns a plain Python value, or raises a
UsageError that names both. numpy's and torch's scalars count as the numbers they are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, NoReturn

from streamprune.errors import UsageError

AUTO = "auto"  # of dtypes: what suits the model and the machine
GGUF_TYPES = (AUTO, "f32", "f16", "bf16", "q8_0")  # of matrices in GGUF files
STANDARD_INPUT = ("-", "/dev/stdin", "/dev/fd/0")
SIZE_UNITS = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9}
SIZE_UNITS |= {"TB": 10**12, "": 1}
MOST = 2**63
MOST_M = 64  # of N:M; beyond, weights of a row are as good
SHOWN = 100  # characters of a value in a message


def plain(value: Any) -> Any:
    """Return a scalar of numpy or torch as Python's own; anything else as it is."""
    if not hasattr(value, "item") or getattr(value, "ndim", None) != 0:
        return value
    try:
        return value.item()
    except RuntimeError:  # a tensor on meta has none
        return value


def text(flag: str, value: Any) -> str:
    """Take a string."""
    return value if isinstance(value, str) else _refuse(flag, value, "give a string")


def source(flag: str, value: Any) -> str:
    """Take a path or a name, as a string."""
    name = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    good = isinstance(name, str) and name and "\0" not in name
    return str(name) if good else _refuse(flag, value, "give a path or a name")


def path(flag: str, value: Any) -> Path:
    """Take a path."""
    return Path(source(flag, value))


def source_or_off(flag: str, value: Any) -> str | bool | None:
    """Take a path or a name, False for none, or True for the default, which becomes None."""
    value = plain(value)
    if isinstance(value, bool):
        return None if value else False
    return source(flag, value)


def switch(flag: str, value: Any) -> bool:
    """Take True or False."""
    value = plain(value)
    return value if isinstance(value, bool) else _refuse(flag, value, "give True or False")


def whole_number(flag: str, value: Any) -> int:
    """Take a whole number below 2^63 in size; 3.0 and "3" are as good as 3."""
    value = plain(value)
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?[0-9]{1,20}\s*", value):
        found = int(value)
    elif isinstance(value, int) and not isinstance(value, bool):
        found = value
    else:
        real = number(flag, value)
        found = int(real) if real.is_integer() else _refuse(flag, value, "give a whole number")
    return found if abs(found) < MOST else _refuse(flag, value, "give a number below 2^63")


def number(flag: str, value: Any) -> float:
    """Take a number, also as text; True and False are none."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        _refuse(flag, value, "give a number")
    try:
        return float(value)
    except (ValueError, OverflowError):
        _refuse(flag, value, "give a number")


def size(flag: str, value: Any) -> int:
    """Take a size in bytes: a number, or text with KB, MB, GB, TB or KiB, MiB, GiB, TiB."""
    if not isinstance(value, str):
        return whole_number(flag, value)
    unit = next(unit for unit in SIZE_UNITS if value.strip().upper().endswith(unit))
    try:
        digits = value.strip()[: len(value.strip()) - len(unit)]
        return int(float(digits) * SIZE_UNITS[unit]) if unit else int(digits)
    except (ValueError, OverflowError):
        _refuse(flag, value, "give a size such as 5GB or 20GiB")


def layer_range(flag: str, value: Any) -> tuple[int, int]:
    """Take two layers (A, B), end-exclusive, as a pair, a range or "A:B"."""
    if isinstance(value, range) and value.step == 1:
        return value.start, value.stop
    ends = value.split(":") if isinstance(value, str) else value
    try:
        if isinstance(ends, range | Mapping | Set):
            raise TypeError
        start, stop = ends
    except (TypeError, ValueError):
        _refuse(flag, value, "give A:B, such as 4:28")
    return whole_number(flag, start), whole_number(flag, stop)


def dtype(flag: str, value: Any) -> str:
    """Take a dtype, "bfloat16" or torch.bfloat16, and return its name."""
    # By the type's name, so that reading options does not import torch.
    return dtype_name(value) if type(value).__name__ in ("str", "dtype") else text(flag, value)


def dtype_name(value: Any) -> str:
    """Name a dtype of torch as the options do: "bfloat16"."""
    return str(value).removeprefix("torch.")


def device(flag: str, value: Any) -> str:
    """Take a device, "cuda:0", torch.device("cuda", 0) or 0, and return its name."""
    value = plain(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"cuda:{value}"
    return str(value) if type(value).__name__ == "device" else text(flag, value)


def granularity(flag: str, value: Any) -> str:
    """Take the name of what goes: "units", "layers", "weights", or "N:M"."""
    name = text(flag, value)
    if name not in ("units", "layers", "weights"):
        pattern = n_of_m(name)
        if pattern is None or not 0 < pattern[0] < pattern[1] <= MOST_M:
            raise UsageError(
                f"{flag} {name}: choose units, layers, weights, or N:M with N below M, M at most {MOST_M} (2:4)"
            )
    return name


def n_of_m(name: str) -> tuple[int, int] | None:
    """Return (N, M) of a granularity "N:M"; None of another one."""
    match = re.fullmatch(r"([0-9]{1,3}):([0-9]{1,3})", name)
    return (int(match[1]), int(match[2])) if match else None


def settings(flag: str, value: Any) -> dict[str, Any]:
    """Take a method's own numbers, by name."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        _refuse(flag, value, 'give a dictionary such as {"rho": 0.2}')
    found = {name: plain(each) for name, each in value.items()}
    for name, each in found.items():
        if isinstance(each, bool) or not isinstance(each, str | int | float | None):
            _refuse(f"{flag} {name}", each, "give a number or a name")
    return found


def _refuse(flag: str, value: Any, remedy: str) -> NoReturn:
    shown = repr(value)
    raise UsageError(f"{flag} {shown if len(shown) <= SHOWN else shown[:SHOWN] + '...'}: {remedy}")
