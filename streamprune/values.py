"""The values that an option may be given as, from Python or as text, and what they become.

Each function takes (name of the option as on the command line, value) and returns a plain Python value, or raises a
UsageError that names both. numpy's and torch's scalars count as the numbers they are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from streamprune.errors import UsageError

SIZE_UNITS = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9}
SIZE_UNITS |= {"TB": 10**12, "": 1}


def plain(value: Any) -> Any:
    """A scalar of numpy or torch as Python's own; anything else as it is."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value


def text(flag: str, value: Any) -> str:
    """A string."""
    return value if isinstance(value, str) else _refuse(flag, value, "give a string")


def source(flag: str, value: Any) -> str:
    """A path or a name as a string."""
    return os.fspath(value) if isinstance(value, str | os.PathLike) else _refuse(flag, value, "give a path or a name")


def path(flag: str, value: Any) -> Path:
    """A path."""
    return Path(source(flag, value))


def source_or_off(flag: str, value: Any) -> Path | bool | None:
    """A path or a name, False for none, or True for what is taken by default."""
    value = plain(value)
    if isinstance(value, bool):
        return None if value else False
    return path(flag, value)


def flag(flag: str, value: Any) -> bool:
    """True or False."""
    value = plain(value)
    return value if isinstance(value, bool) else _refuse(flag, value, "give True or False")


def whole(flag: str, value: Any) -> int:
    """A whole number."""
    value = plain(value)
    if isinstance(value, str) and value.strip().lstrip("+-").isdecimal():
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    found = number(flag, value)
    return int(found) if found.is_integer() else _refuse(flag, value, "give a whole number")


def number(flag: str, value: Any) -> float:
    """A number."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        _refuse(flag, value, "give a number")
    try:
        return float(value)
    except (ValueError, OverflowError):
        _refuse(flag, value, "give a number")


def size(flag: str, value: Any) -> int:
    """Bytes: a number of them, or text with KB, MB, GB, TB or KiB, MiB, GiB, TiB."""
    if not isinstance(value, str):
        return whole(flag, value)
    unit = next(unit for unit in SIZE_UNITS if value.strip().upper().endswith(unit))
    try:
        digits = value.strip()[: len(value.strip()) - len(unit)]
        return int(float(digits) * SIZE_UNITS[unit]) if unit else int(digits)
    except (ValueError, OverflowError):
        _refuse(flag, value, "give a size such as 5GB or 20GiB")


def layer_range(flag: str, value: Any) -> tuple[int, int]:
    """Two layers (A, B), end-exclusive, or "A:B"."""
    ends = value.split(":") if isinstance(value, str) else value
    try:
        start, stop = ends
    except (TypeError, ValueError):
        _refuse(flag, value, "give A:B, such as 4:28")
    return whole(flag, start), whole(flag, stop)


def dtype(flag: str, value: Any) -> str:
    """The name of a dtype: "bfloat16", or torch.bfloat16."""
    return str(value).removeprefix("torch.") if type(value).__name__ in ("str", "dtype") else text(flag, value)


def device(flag: str, value: Any) -> str:
    """The name of a device: "cuda:0", torch.device("cuda", 0), or 0."""
    value = plain(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"cuda:{value}"
    return str(value) if type(value).__name__ == "device" else text(flag, value)


def settings(flag: str, value: Any) -> dict[str, Any]:
    """A method's own numbers by name."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        _refuse(flag, value, 'give a dictionary such as {"rho": 0.2}')
    return {name: plain(each) for name, each in value.items()}


def _refuse(flag: str, value: Any, remedy: str) -> NoReturn:
    raise UsageError(f"{flag} {value!r}: {remedy}")
