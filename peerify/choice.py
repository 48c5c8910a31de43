"""Which share to take of those that were measured, for a stated loss or a stated speed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peerify.errors import UsageError

MAX_LOSS = 1.02  # where nothing is wished: what few readers would notice


@dataclass(frozen=True)
class Wish:
    """What a share must keep to."""

    max_loss: float | None = None
    """Perplexity over the dense model's, at most."""
    min_speed: float | None = None
    """Speed over the dense model's when decoding one token at a time, at least."""

    def __str__(self) -> str:
        parts = [f"a loss of at most {self.max_loss:g} ×"] if self.max_loss is not None else []
        parts += [f"a speed of at least {self.min_speed:g} ×"] if self.min_speed is not None else []
        return " and ".join(parts)


@dataclass(frozen=True)
class Choice:
    """The share to take."""

    active: float
    met: bool
    """False: no share that was measured keeps to the wish, and this one comes nearest."""
    said: str
    """The same as a sentence, without its full stop."""


def choose(rows: Sequence[Mapping[str, Any]], wish: Wish) -> Choice:
    """The share below 1 to take.

    A stated loss asks for the fewest bytes within it; a stated speed alone for the least loss at that speed.

    Args:
        rows: of each share ``{"active", "bytes_fraction", "ratio", "speed"}``: the perplexity, and the speed when
            decoding one token at a time, over the dense model's; speed may be None or missing where nothing is wished
            of it.

    Raises:
        UsageError: no share below 1 was measured; a speed is wished, and none was measured.
    """
    below = [row for row in rows if row["active"] < 1]
    if not below:
        raise UsageError("a share of 1 is the dense model: give --active at least one share below 1")
    if wish.min_speed is not None and any(row.get("speed") is None for row in below):
        raise UsageError("a speed is wished for, and none was measured")
    met = [row for row in below if _short(row, wish) == 0]
    if not met:
        best = min(below, key=lambda row: _short(row, wish))
    elif wish.max_loss is not None:
        best = min(met, key=lambda row: row["bytes_fraction"])
    else:
        best = min(met, key=lambda row: (row["ratio"], -row["active"]))
    return Choice(best["active"], bool(met), _sentence(best, wish, bool(met)))


def _short(row: Mapping[str, Any], wish: Wish) -> float:
    """By how much a row misses the wish, as a logarithm; 0 where it keeps to it."""
    loss = math.log(row["ratio"] / wish.max_loss) if wish.max_loss is not None else 0.0
    speed = math.log(wish.min_speed / row["speed"]) if wish.min_speed is not None else 0.0
    return max(0.0, loss) + max(0.0, speed)


def _sentence(row: Mapping[str, Any], wish: Wish, met: bool) -> str:
    speed = row.get("speed")
    figures = f"perplexity is {row['ratio']:.3f} × the dense model's, a token reads {row['bytes_fraction']:.1%} of the "
    figures += "bytes" + (f", and decoding is {speed:.2f} × as fast" if speed is not None else "")
    if met:
        return f"Take a share of {row['active']:g}: {figures}"
    return f"No share that was measured has {wish}; {row['active']:g} comes nearest: {figures}"
