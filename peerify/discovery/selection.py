"""Which of a model's layers are meant: by words, by numbers, by paths."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence

from peerify.errors import ConversionError
from peerify.reading import shown


def select(
    paths: Sequence[str], able: Sequence[int], spec: str, *, kind: str = "feed-forward layer", where: str
) -> list[int]:
    """The numbers of the layers that `spec` names: "all", "middle", "first-last", "0,4,9", "12-18" or paths with globs.

    Words and globs pass over layers that cannot be taken, as long as there are others.

    Args:
        paths: of all layers, which numbers count from 0.
        able: numbers of those that can be taken; at least one.
        kind: what a layer is called in messages.
        where: what lists them, for messages.

    Raises:
        ConversionError: a number out of range, or a path that matches nothing.
    """
    chosen: set[int] = set()
    for part in (p.strip() for p in spec.split(",")):
        if part in ("all", "auto"):  # auto: which of them stay dense is decided by what they cost
            chosen.update(able)
        elif part == "middle":
            chosen.add(able[len(able) // 2])
        elif part == "first-last":
            chosen.update((able[0], able[-1]))
        elif match := re.fullmatch(r"([0-9]{1,9})(?:\s*-\s*([0-9]{1,9}))?", part):
            first, last = int(match[1]), int(match[2] or match[1])
            if first > last or last >= len(paths):
                raise ConversionError(f"layers {shown(part)}: the model has {kind}s 0-{len(paths) - 1}; {where}")
            chosen.update(range(first, last + 1))
        else:
            named = [i for i, path in enumerate(paths) if fnmatch.fnmatchcase(path, part)]
            if not named or not part:
                raise ConversionError(
                    f"layers {shown(part)}: no {kind} has that path; they are called like {paths[able[0]]!r}, {where}"
                )
            chosen.update([i for i in named if i in able] or named)
    return sorted(chosen)
