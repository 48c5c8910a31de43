"""Write a folder whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from peerify.checkpoint.files import MARKER, foreign, is_ours
from peerify.errors import OutputError
from peerify.reading import local_path, printable, reason

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic_folder(
    out: str | Path, *, overwrite: bool = False, expected_bytes: int = 0, inputs: Sequence[str | Path] = ()
) -> Iterator[Path]:
    """Yield a temporary sibling of `out`; it becomes `out` when the block ends, and vanishes if it raises.

    Until the last moment the target is untouched: an exception, Ctrl-C, kill -9 or a full disk leaves it as
    it was, and the next run clears what a killed one left. `expected_bytes` is what will be written, so
    that a disk too small is refused before the work. `inputs` are what the block reads, as the user named it.
    `overwrite` replaces only an empty folder, or one that peerify wrote and that holds nothing else, so that a
    mistyped path cannot delete anything. Where a file of someone else's turns up there during the work, the result
    stays beside it under a name that the error tells.
    Raises OutputError: see `check_target`; also where the disk is full or the place is not writable.
    """
    target = _absolute(out)
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    new_parent = _first_missing(target.parent)
    try:
        _clear_stale(target)
        check_target(out, overwrite=overwrite, inputs=inputs)
        temporary.mkdir(parents=True)
        free = shutil.disk_usage(temporary).free
    except OSError as error:
        raise OutputError(f"{printable(out)} cannot be written: {reason(error)}") from error
    try:
        if free < expected_bytes:
            raise OutputError(
                f"{printable(out)} needs {expected_bytes / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free; "
                "free some space or choose another place"
            )
        yield temporary
        _flush(temporary)
        _check_again(target, out, overwrite, temporary)
        _move_in(temporary, target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if new_parent:
            _remove_empty(target.parent, new_parent)
        fault = _write_failure(error, temporary)
        if fault:
            raise OutputError(f"{printable(out)} could not be written: {fault}; nothing was changed there") from error
        raise


def check_target(out: str | Path, *, overwrite: bool = False, inputs: Sequence[str | Path] = ()) -> Path:
    """The absolute path of `out`, which may be written there.

    Raises:
        OutputError: `out` is no usable path, or is the root, the home or the working directory or holds one of them;
            its place may not be written; it exists, and `overwrite` is not set or it is not a folder that peerify
            wrote and nobody added to; one of `inputs` lies in it.
    """
    target = _absolute(out)
    parent = next(place for place in target.parents if place.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        fault = "may not be written" if parent.is_dir() else "is not a folder"
        raise OutputError(f"{printable(out)} cannot be written: {printable(parent)} {fault}; choose another place")
    if not target.exists() and not target.is_symlink():
        return target
    if not target.is_dir() or target.is_symlink():
        raise OutputError(f"{printable(out)} exists and is not a folder; choose another place")
    if not overwrite:
        raise OutputError(f"{printable(out)} exists; choose another place, or pass --overwrite to replace it")
    for name in inputs:
        path = Path(name).expanduser()
        if path.exists() and path.resolve().is_relative_to(target.resolve()):
            raise OutputError(
                f"{printable(name)} is read and lies in {printable(out)}, which --overwrite would replace; "
                "choose another place"
            )
    try:
        if any(target.iterdir()) and not is_ours(target):
            raise OutputError(
                f"{printable(out)} was not written by peerify (it has no valid {MARKER}), so --overwrite leaves it "
                "alone; choose another place"
            )
        others = foreign(target)
    except OSError as error:
        raise OutputError(f"{printable(out)} cannot be replaced: {reason(error)}") from error
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise OutputError(
            f"{printable(out)} holds {printable(others[0])}{more}, which peerify did not write, so --overwrite leaves "
            "it alone; move it away, or choose another place"
        )
    return target


def _absolute(out: str | Path) -> Path:
    """The absolute path of `out`; OutputError where no folder that is only for output can lie there."""
    path = local_path(out, OutputError)
    try:
        target, here = Path(os.path.abspath(path)), Path.cwd()
    except OSError as error:
        raise OutputError(f"{printable(out)}: the working directory is gone; change to another one") from error
    if any(place.is_relative_to(target.resolve()) for place in (here, Path("~").expanduser().resolve())):
        raise OutputError(f"{printable(out)} is or holds the working directory or your home; name a folder in it")
    return target


def _check_again(target: Path, out: str | Path, overwrite: bool, temporary: Path) -> None:
    """Look at the target once more after the work, which is not thrown away where something came up there."""
    try:
        check_target(out, overwrite=overwrite)
    except OutputError as error:
        spare = target.with_name(f"{target.name}-{os.getpid()}")
        if spare.exists():
            raise
        temporary.rename(spare)
        raise OutputError(f"{error}; what was made lies in {printable(spare)}") from error


def _clear_stale(target: Path) -> None:
    """Remove what killed runs left beside `target`; put back a target that one had just moved aside."""
    if not target.parent.is_dir():
        return
    pattern = re.compile(re.escape(f".{target.name}.") + r"(tmp|old)-(\d+)")
    for entry in sorted(target.parent.iterdir()):
        match = pattern.fullmatch(entry.name)
        if match and not alive(int(match[2])):
            if match[1] == "old" and not target.exists():
                entry.rename(target)
            else:
                shutil.rmtree(entry, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a small file, whole or not at all. Raises OutputError where it may not be written, or the disk is full."""
    beside = path.with_name(f".{path.name}.tmp")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        raise OutputError(f"{printable(path)} cannot be written: {reason(error)}") from error


def alive(pid: int) -> bool:
    """Whether another process of this number runs."""
    import psutil

    # This process's own number: left by an earlier one, as in containers.
    return pid != os.getpid() and psutil.pid_exists(pid)


def _flush(folder: Path) -> None:
    """Give every file the folder's own access (safetensors writes 0600) and force all of it to disk."""
    access = folder.stat().st_mode & 0o666
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(parent, name)
            path.chmod(access)
            _fsync(path)
        _fsync(Path(parent))


def _fsync(path: Path) -> None:
    if os.name == "nt":  # Windows opens no folders, and flushes only what was opened for writing
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _move_in(temporary: Path, target: Path) -> None:
    if target.exists():
        old = target.with_name(f".{target.name}.old-{os.getpid()}")
        target.rename(old)
        try:
            temporary.rename(target)
        except BaseException:
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        temporary.rename(target)
    _fsync(target.parent)


def _write_failure(error: BaseException, temporary: Path) -> str | None:
    """Why writing failed, if it is the disk's or the folder's fault; None for every other error."""
    if isinstance(error, OutputError) and isinstance(error.__cause__, OSError):
        error = error.__cause__
    if isinstance(error, OSError) and error.errno:
        inside = str(error.filename or "").startswith(str(temporary))
        if error.errno in DISK_FULL:
            return "the disk is full"
        return reason(error) if inside else None
    # safetensors raises its own error type, with the system's words in it
    full = ("No space left on device", "File too large", "Disk quota exceeded")
    return "the disk is full" if any(words in str(error) for words in full) else None


def _first_missing(folder: Path) -> Path | None:
    missing = None
    while not folder.exists() and folder != folder.parent:
        missing, folder = folder, folder.parent
    return missing


def _remove_empty(folder: Path, top: Path) -> None:
    """Remove `folder` and its parents up to `top` as far as they are empty."""
    while True:
        try:
            folder.rmdir()
        except OSError:
            return
        if folder == top:
            return
        folder = folder.parent
