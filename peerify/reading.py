"""Read what others wrote without trusting it: paths, text and JSON, each fault one sentence.

Needs nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import reprlib
import stat
from pathlib import Path
from typing import Any

from peerify.errors import PeerifyError

MAX_JSON = 200_000_000  # bytes; the largest tokenizer.json of the Hub has about 40 million
MAX_DEPTH = 100  # of lists and objects in JSON, so that what follows may call itself for each level
_SHOWN = 80  # characters of a value in a message


def shown(value: Any) -> str:
    """`value` as a message shows it: one line of at most 80 characters, whatever its size."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = brief.maxlong = _SHOWN
    brief.maxlevel = 2
    text = brief.repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def reason(error: BaseException) -> str:
    """What a library says of a fault: its first line, or the kind of fault where it says nothing of use.

    A line that ends in a colon goes on in the next. Where there is none, or the message is a mere ``'metadata'`` (a
    KeyError's), it is no reason by itself, so the kind of error stands before it.
    """
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    joined = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    line = printable(joined.rstrip("."))
    if not line:
        return type(error).__name__
    if isinstance(error, KeyError) and " " not in line:
        return f"it has no {line}"
    return f"{type(error).__name__}: {line.rstrip(': ')}" if line.endswith(":") else line


def local_path(text: str | Path, fault: type[PeerifyError]) -> Path:
    """The path that a person wrote, with ``~`` expanded.

    Raises:
        fault: no file can have that name: a NUL in it, a home of nobody, a part that is too long.
    """
    try:
        path = Path(text).expanduser()
        os.lstat(path)
    except FileNotFoundError:
        pass
    except (ValueError, RuntimeError, OSError) as error:
        if isinstance(error, OSError) and isinstance(error, PermissionError | NotADirectoryError):
            return path
        raise fault(f"{printable(text)} is not a usable path: {reason(error)}") from None
    return path


def printable(text: str | Path) -> str:
    """A name as a terminal can show it: at most 300 characters, and what is not UTF-8 or not printable is escaped."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return line if len(line) <= 300 else f"{line[:297]}..."


def read_text(path: Path, fault: type[PeerifyError], remedy: str, *, limit: int = MAX_JSON) -> str:
    """The text of a regular file.

    Args:
        fault: what to raise, with the path, what is wrong and `remedy` in its message.
        limit: bytes; a larger file is refused before it is read.

    Raises:
        fault: it cannot be opened, is no regular file (a FIFO would block), is too large, or is not UTF-8.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise fault(f"{printable(path)} is not a regular file; {remedy}")
        if status.st_size > limit:
            raise fault(f"{printable(path)} has {status.st_size:,} bytes, more than {limit:,}; {remedy}")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise fault(f"{printable(path)} is not UTF-8 text; {remedy}") from None
    except (OSError, ValueError) as error:
        raise fault(f"{printable(path)} cannot be read: {reason(error)}") from error


def read_object(
    path: Path, fault: type[PeerifyError], remedy: str = "download it again", *, limit: int = MAX_JSON
) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        fault: see `read_text`; also where it is not JSON, is nested too deeply, or holds something else than an object.
    """
    text = read_text(path, fault, remedy, limit=limit)
    try:
        value = json.loads(text)
        too_deep = _is_deeper(value, MAX_DEPTH)
    except RecursionError:
        too_deep = True
    except ValueError as error:
        raise fault(f"{printable(path)} is not valid JSON ({reason(error)}); {remedy}") from None
    if too_deep:
        raise fault(f"{printable(path)} is nested too deeply to be read; {remedy}")
    if not isinstance(value, dict):
        raise fault(f"{printable(path)} does not hold a JSON object; {remedy}")
    return value


def _is_deeper(value: Any, limit: int) -> bool:
    """Whether lists and mappings are nested more than `limit` deep in `value`."""
    holders = [value] if isinstance(value, dict | list) else []
    for _ in range(limit):
        parts = (part for held in holders for part in (held.values() if isinstance(held, dict) else held))
        holders = [part for part in parts if isinstance(part, dict | list)]
        if not holders:
            return False
    return True
