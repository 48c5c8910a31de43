"""The picture of `peerify sweep`: what shares lose, compute and gain, against the bytes that a token reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peerify.cli.bench_plot import BLUE, GREY, ORANGE, name_of, write

LEAST, MOST = 0.0005, 99.0  # of a ratio less 1: what is nearer to 1 is drawn there, and the axis ends here
TICKS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 9, 99)
WIDTH, HEIGHT = 4.0, 3.6  # inches, of a panel


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw what `sweep_checkpoint` returned, with the share that was chosen; the file is written whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    from matplotlib.figure import Figure  # without pyplot, which would open windows and keep figures
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rows = sorted(result["rows"], key=lambda row: row["bytes_fraction"])
    panels: list[tuple[Any, str]] = [(_loss, "what a share loses"), (_macs, "what it computes")]
    if result["speed"]:
        panels.append((_speed, "what it gains"))
    apart: Any = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
    figure = Figure(figsize=(WIDTH * len(panels), HEIGHT), dpi=150, layout=apart)
    chosen = next(row for row in rows if row["active"] == result["choice"]["active"])
    for ax, (panel, title) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        panel(ax, rows)
        ax.axvline(100 * chosen["bytes_fraction"], color=ORANGE, linewidth=1.2, zorder=1)
        ax.set_title(title, fontsize=10)
        ax.set_xlim(100 * max(0.0, math.floor(10 * rows[0]["bytes_fraction"] - 0.4) / 10), 104)
        ax.set_xlabel("bytes that a token reads, % of the dense layers'", fontsize=9)
        ax.yaxis.label.set_size(9)
        ax.tick_params(labelsize=9, which="both")
        ax.grid(alpha=0.25)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{name_of(result['model'])}. {result['choice']['said']}.", fontsize=9, parse_math=False)
    write(figure, path)


def _loss(ax: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Perplexity over the dense model's, less 1, on a logarithmic axis: 1.003 and 1.02 are told apart, and 1.7, too."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    over = [max(LEAST, row["ratio"] - 1) for row in rows]
    _line(ax, rows, over)
    ax.set_yscale("log")
    ax.set_ylim(LEAST * 0.8, max(0.03, min(MOST, max(over))) * 1.4)
    ax.yaxis.set_major_locator(FixedLocator(TICKS))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda over, _: f"{1 + over:g} ×"))
    ax.set_ylabel("perplexity over the dense model's")


def _macs(ax: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    _line(ax, rows, [100 * row["macs_fraction"] for row in rows])
    ax.axhline(100, color=GREY, linewidth=1)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("multiply-adds, % of the dense layers'")


def _speed(ax: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """One token at a time, and the limit of Amdahl's law as a broken line."""
    _line(ax, rows, [row["speed"] for row in rows], label="measured")
    at = [100 * row["bytes_fraction"] for row in rows]
    ax.plot(at, [row["limit"] for row in rows], color=GREY, linewidth=1.2, linestyle="--", label="limit")
    ax.axhline(1, color=GREY, linewidth=1)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("speed over the dense model's")
    ax.legend(fontsize=8, frameon=False)


def _line(ax: Any, rows: Sequence[Mapping[str, Any]], values: Sequence[float], **options: Any) -> None:
    at = [100 * row["bytes_fraction"] for row in rows]
    ax.plot(at, values, color=BLUE, marker="o", markersize=5, linewidth=1.8, **options)
