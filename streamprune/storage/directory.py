"""Directory or file that appears only when it is whole, and checks of its place before work begins."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from streamprune.errors import OutputError

PARTIAL, REPLACED = ".partial-", ".replaced-"  # names beside an output: what is written, what it replaces
LONGEST_NAME = 230  # filesystems take 255, and a directory beside it has some more
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


OWN_FILE = "streamprune.json"  # in every output, and the only thing that --overwrite takes for one


def write_json(file: Path, value: object) -> None:
    """Write indented JSON with a final newline, as transformers does; file names that are no UTF-8 are escaped."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    file.write_text(text, encoding="utf-8", errors="backslashreplace")


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse an output path that exists (without `overwrite`) or whose parent cannot be written to."""
    if len(os.fsencode(output.name)) > LONGEST_NAME:
        raise OutputError(f"{output}: a name of more than {LONGEST_NAME} bytes; choose another --output")
    if (output.exists() or output.is_symlink()) and not overwrite:
        raise OutputError(f"{output} exists; choose another --output, or pass --overwrite to replace it")
    if (output.exists() or output.is_symlink()) and not output.is_dir():
        what = "a file" if output.exists() else "a link to nothing"
        raise OutputError(f"{output} is {what}; choose another --output")
    if os.path.ismount(output):
        raise OutputError(f"{output} is where a disk is mounted and cannot be replaced; choose a directory inside it")
    if overwrite and output.is_dir() and any(output.iterdir()) and not (output / OWN_FILE).is_file():
        raise OutputError(f"{output} has no {OWN_FILE}, so it is not streamprune's; --overwrite will not remove it")
    check_directory(output.absolute().parent, "--output")


def check_apart(output: Path, model: Path, *others: object) -> None:
    """Refuse an output that is or holds what is read, which --overwrite would remove, or what is written beside it.

    Args:
        model: directory of the model. others: paths of what else is read or written, False or None for nothing.

    Raises:
        OutputError: it names what is read.
    """
    whole = os.path.realpath(output)  # a link that leads back to itself is none of both
    for read in (model, *(Path(str(each)) for each in others if each)):
        there = Path(os.path.realpath(read))
        if Path(whole) in (there, *there.parents):
            what = "the model itself" if read == model else str(read)
            raise OutputError(f"{output} is or holds {what}; choose another --output")


def check_directory(directory: Path, option: str) -> None:
    """Refuse a directory, given by `option`, that can neither be written to nor made."""
    existing = _existing(directory)
    if not existing.is_dir():
        raise OutputError(f"{existing} is no directory; choose another {option}")
    if not os.access(existing, os.W_OK):
        raise OutputError(f"{existing} cannot be written to; choose another {option}")


def check_space(directory: Path, needs: int, what: str = "the output") -> None:
    """Refuse a directory, or one that will be made, on a disk that has less than `needs` bytes free for `what`."""
    existing = _existing(directory)
    free = shutil.disk_usage(existing).free
    if free < needs:
        raise OutputError(f"{existing} has {free:,} bytes free, {what} needs {needs:,}; make room")


def check_file(file: Path, option: str, *, overwrite: bool) -> None:
    """Refuse a file that exists (without `overwrite`), is a directory, or whose place cannot be written to."""
    if file.is_dir():
        raise OutputError(f"{file} is a directory; choose a file as {option}")
    if (file.exists() or file.is_symlink()) and not overwrite:
        raise OutputError(f"{file} exists; choose another {option}, or pass --overwrite to replace it")
    check_directory(file.absolute().parent, option)


def write_whole(file: Path, content: bytes) -> None:
    """Write a file that appears, or takes the place of another, only when it is whole.

    Raises:
        OutputError: it cannot be written.
    """
    partial = file.with_name(f".{file.name}{PARTIAL}{secrets.token_hex(4)}")
    try:
        file.absolute().parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        sync_path(partial)
        os.replace(partial, file)
    except OSError as error:
        raise OutputError(f"{file}: {error.strerror or error}; choose another place") from error
    finally:
        with suppress(OSError):
            partial.unlink()


@contextmanager
def atomic_directory(output: Path, *, overwrite: bool, temporary: Path | None = None) -> Iterator[Path]:
    """Give a temporary sibling of `output` that takes its name when the block ends well, and goes away otherwise.

    Args:
        temporary: on the same disk; it stays if the block does not end well.
        output: must not exist, unless `overwrite`; what is there then stays until the new one is whole.

    Raises:
        OutputError: the path is taken, or the disk is full.
    """
    check_output(output, overwrite=overwrite)
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    keep = temporary is not None
    if temporary is None:
        _remove_dead(output)
        temporary = output.with_name(f".{output.name}{PARTIAL}{secrets.token_hex(4)}")
    lock = None
    try:
        lock = _make_and_hold(temporary, exist_ok=keep)
        yield temporary
        # On the disk before it has the name: a rename can outlive a power cut that the contents did not.
        sync_directory(temporary)
        check_output(output, overwrite=overwrite)  # somebody may have made it in the meantime
        _replace(output, temporary)
        sync_path(output.parent)
    except (OSError, SafetensorError) as error:
        # safetensors writes a code into its message.
        codes = [code for code in FULL if getattr(error, "errno", None) == code or f"os error {code})" in str(error)]
        if codes:
            left = f"{temporary.parent} stays to go on from" if keep else "nothing was left behind"
            raise OutputError(
                f"{output.parent}: {os.strerror(codes[0])} while writing; {left}, make room and repeat"
            ) from error
        raise
    finally:
        if not keep:
            shutil.rmtree(temporary, ignore_errors=True)
        if lock is not None:
            os.close(lock)


@contextmanager
def temporary_sibling(directory: Path) -> Iterator[Path]:
    """Give a directory beside `directory`, on whose disk there is room for models, until the block ends.

    It is in the system's temporary directory where the parent cannot be written to. What a process that was killed left
    beside it is removed.
    """
    directory = directory.absolute()
    if not os.access(directory.parent, os.W_OK):
        with tempfile.TemporaryDirectory(prefix="streamprune-") as elsewhere:
            yield Path(elsewhere)
        return
    name, partial, _ = directory.name.partition(PARTIAL)  # it may be one that is being written
    output = directory.with_name(name.removeprefix(".")) if partial and name else directory
    _remove_dead(output, but=directory)
    temporary = output.with_name(f".{output.name}{PARTIAL}{secrets.token_hex(4)}")
    lock = _make_and_hold(temporary, exist_ok=False)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def sync_path(path: Path) -> None:
    """Wait until a file's contents, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _existing(directory: Path) -> Path:
    """Return the directory, or the nearest of its parents that is there."""
    directory = directory.absolute()
    while not directory.exists():
        if directory.is_symlink():
            raise OutputError(f"{directory} is a link to nothing; choose another place")
        directory = directory.parent
    return directory


def _remove_dead(output: Path, but: Path | None = None) -> None:
    """Remove what earlier runs for this output left when they were killed: directories that nobody holds.

    They were writing them, or removing what they had replaced; the latter stays where the output is not there, since it
    is all that is left of it then.
    """
    kinds = [PARTIAL, *([REPLACED] if output.exists() else [])]
    for each in output.parent.iterdir():
        named = each != but and any(each.name.startswith(f".{output.name}{kind}") for kind in kinds)
        if named and (lock := _hold(each)) is not None:
            shutil.rmtree(each, ignore_errors=True)
            os.close(lock)


def _make_and_hold(directory: Path, *, exist_ok: bool) -> int | None:
    """Make a directory and lock it, as `_hold` does, before anybody finds it and takes it for a dead one."""
    if exist_ok and directory.exists():
        return _hold(directory)
    unseen = directory.with_name(f".{secrets.token_hex(8)}")
    try:
        unseen.mkdir()
        lock = _hold(unseen)
        unseen.rename(directory)  # the lock goes with it
    except BaseException:
        shutil.rmtree(unseen, ignore_errors=True)
        raise
    return lock


def _hold(directory: Path) -> int | None:
    """Lock a directory until the descriptor that is returned is closed, or the process ends.

    Returns:
        None where another process has the lock, or the filesystem has none.
    """
    descriptor = None
    try:
        descriptor = os.open(directory, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if descriptor is not None:
            os.close(descriptor)
        return None
    return descriptor


def _replace(output: Path, temporary: Path) -> None:
    """Give `temporary` the name `output`; what had it before comes back if that fails."""
    if not output.exists():
        temporary.rename(output)
        return
    replaced = output.with_name(f".{output.name}{REPLACED}{secrets.token_hex(4)}")
    try:
        output.rename(replaced)
        temporary.rename(output)
    except BaseException:
        # Also after Ctrl-C between the two: nothing is removed until the new one has the name.
        if not output.exists() and replaced.exists():
            replaced.rename(output)
        raise
    if replaced.is_symlink():
        replaced.unlink()
    else:
        shutil.rmtree(replaced, ignore_errors=True)


def sync_directory(directory: Path) -> None:
    """Put the files of a directory and of those in it on the disk, and their names."""
    for path in (*directory.rglob("*"), directory):
        sync_path(path)
