"""Run a reader on a damaged file in a child of its own, with a limit of time and memory.

A reader takes the folder with the damaged file and returns, or raises. The one thing that counts is how it ends: a
result or one PeerifyError of one line is fine; everything else, a hang and a flood of memory included, is a fault.
Children are forked from a process that has imported everything already, so a case takes milliseconds.
"""

from __future__ import annotations

import json
import math
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from peerify.errors import PeerifyError

SECONDS = 10.0  # of a core's time: a busy machine makes no reader hang
WAITING = 6  # times as long on the clock, for those who wait for what never comes
MEMORY = 2 << 30  # bytes beyond what the parent has mapped

Reader = Callable[[Path], object]


@dataclass(frozen=True)
class Corpus:
    """A valid example, the file in it that is damaged, and who reads it.

    `as_json` damages the values of a JSON file, besides its bytes.
    """

    make: Callable[[Path], object]
    """Writes the example into a folder."""
    file: str
    reader: Reader
    as_json: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a reader ended: kind is "result", "refused", or a fault: "error", "hang", "memory", "died"."""

    kind: str
    message: str = ""
    seconds: float = 0.0

    @property
    def fine(self) -> bool:
        """Whether this is how a reader may end."""
        return self.kind == "result" or (
            self.kind == "refused" and "\n" not in self.message and len(self.message) < 1000 and bool(self.message)
        )


def outcome(reader: Reader, folder: Path, *, seconds: float = SECONDS, memory: int = MEMORY) -> Outcome:
    """How `reader` ends on `folder`."""
    receive, send = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if not child:
        os.close(receive)
        _child(reader, folder, send, seconds, memory)
    os.close(send)
    said = b""
    while (left := started + WAITING * seconds - time.monotonic()) > 0:
        if not select.select([receive], [], [], left)[0]:
            break
        chunk = os.read(receive, 1 << 16)
        if not chunk:
            break
        said += chunk
    waited = time.monotonic() - started >= WAITING * seconds
    if waited:
        os.kill(child, signal.SIGKILL)
    os.close(receive)
    _, status, usage = os.wait4(child, 0)
    took = usage.ru_utime + usage.ru_stime
    if waited or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
        return Outcome("hang", f"after {took:.0f} s of a core's time", took)
    try:
        kind, message = json.loads(said)
    except ValueError:
        return Outcome("died", f"with status {status}", took)
    return Outcome(kind, message, took)


def _child(reader: Reader, folder: Path, send: int, seconds: float, memory: int) -> None:
    """Never returns."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + memory, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), resource.RLIM_INFINITY))
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        try:
            reader(folder)
            said = ("result", "")
        except PeerifyError as error:
            said = ("refused", str(error))
        except MemoryError:
            said = ("memory", traceback.format_exc(limit=-5))
        except BaseException as error:
            kind = "memory" if "alloc" in str(error) and "memory" in str(error) else "error"
            said = (kind, "".join(traceback.format_exception(error, limit=-6)))
        kind, text = said
        text = text if len(text) < 5000 else f"{text[:2500]}\n …\n{text[-2500:]}"
        os.write(send, json.dumps((kind, text)).encode())
    finally:
        sys.stdout.flush()
        os._exit(0)
