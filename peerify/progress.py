"""How long work tells how far it is: `progress(what, done, total)`."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]


def teller(progress: Progress | None) -> Progress:
    """`progress`, or one that tells nobody."""
    return progress if progress is not None else lambda *_: None
