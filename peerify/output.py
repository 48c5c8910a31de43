"""Write a folder whole or not at all. Needs nothing but the standard library."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peerify.errors import OutputError

MARKER = "peerify.json"  # in every folder peerify writes; `overwrite` replaces no other
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic_folder(out: str | Path, *, overwrite: bool = False, expected_bytes: int = 0) -> Iterator[Path]:
    """Yield a temporary sibling of `out`; it becomes `out` when the block ends, and vanishes if it raises.

    Until the last moment the target is untouched: an exception, Ctrl-C, kill -9 or a full disk leaves it as
    it was, and the next run clears what a killed one left. `expected_bytes` is what will be written, so
    that a disk too small is refused before the work. `overwrite` replaces only an empty folder or one that
    holds peerify.json, so a mistyped path cannot delete anything else.
    Raises OutputError: `out` exists, its place is not writable, the disk is full.
    """
    target = Path(os.path.abspath(Path(out).expanduser()))
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    new_parent = _first_missing(target.parent)
    try:
        _clear_stale(target)
        _check_target(target, out, overwrite)
        temporary.mkdir(parents=True)
        free = shutil.disk_usage(temporary).free
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror or error}") from error
    try:
        if free < expected_bytes:
            raise OutputError(
                f"{out} needs {expected_bytes / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free; "
                "free some space or choose another place"
            )
        yield temporary
        _flush(temporary)
        _check_target(target, out, overwrite)
        _move_in(temporary, target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if new_parent:
            _remove_empty(target.parent, new_parent)
        reason = _write_failure(error, temporary)
        if reason:
            raise OutputError(f"{out} could not be written: {reason}; nothing was changed there") from error
        raise


def _check_target(target: Path, out: str | Path, overwrite: bool) -> None:
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir() or target.is_symlink():
        raise OutputError(f"{out} exists and is not a folder; choose another place")
    if not overwrite:
        raise OutputError(f"{out} exists; choose another place, or pass --overwrite to replace it")
    if any(target.iterdir()) and not (target / MARKER).exists():
        raise OutputError(
            f"{out} was not written by peerify (it has no {MARKER}), so --overwrite leaves it alone; "
            "choose another place"
        )


def _clear_stale(target: Path) -> None:
    """Remove what killed runs left beside `target`; put back a target that one had just moved aside."""
    if not target.parent.is_dir():
        return
    pattern = re.compile(re.escape(f".{target.name}.") + r"(tmp|old)-(\d+)")
    for entry in sorted(target.parent.iterdir()):
        match = pattern.fullmatch(entry.name)
        if match and not _alive(int(match[2])):
            if match[1] == "old" and not target.exists():
                entry.rename(target)
            else:
                shutil.rmtree(entry, ignore_errors=True)


def _alive(pid: int) -> bool:
    if pid == os.getpid():  # left by an earlier process of the same number, as in containers
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # someone else's process
        return True
    return True


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
    if isinstance(error, OSError) and error.errno:
        inside = str(error.filename or "").startswith(str(temporary))
        if error.errno in DISK_FULL:
            return "the disk is full"
        return error.strerror if inside else None
    # safetensors raises its own error type, with the system's words in it
    return "the disk is full" if "No space left on device" in str(error) else None


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
