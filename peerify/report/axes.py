"""Axes of price curves, which `peerify sweep --plot` and the page share."""

from __future__ import annotations

import math
from typing import Any

LEAST, MOST = 0.0005, 99.0  # of a ratio less 1: what is nearer to 1 is drawn there, and the axis ends here
TICKS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 9, 99)


def over(ratio: float) -> float:
    """A ratio of perplexities, less 1, as it is drawn: 1.003 and 1.02 are told apart, and 1.7, too."""
    return max(LEAST, ratio - 1)


def loss_axis(ax: Any, highest: float) -> None:
    """The logarithmic axis of what `over` returns, up to `highest`."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    ax.set_yscale("log")
    ax.set_ylim(LEAST * 0.8, max(0.03, min(MOST, highest)) * 1.4)
    ax.yaxis.set_major_locator(FixedLocator(TICKS))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{1 + value:g} ×"))
    ax.set_ylabel("perplexity over the dense model's")


def bytes_axis(ax: Any, least: float) -> None:
    """The axis of bytes, from a little less than the share `least` on."""
    ax.set_xlim(100 * max(0.0, math.floor(10 * least - 0.4) / 10), 104)
    ax.set_xlabel("bytes that a token reads, % of the dense layers'")
