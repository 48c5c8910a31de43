"""The picture of `peerify sweep`: what shares lose, compute and gain, against the bytes that a token reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peerify.cli.bench_plot import BLUE, GREY, ORANGE, name_of, write
from peerify.report.axes import bytes_axis, loss_axis, over

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
        bytes_axis(ax, rows[0]["bytes_fraction"])
        ax.xaxis.label.set_size(9)
        ax.yaxis.label.set_size(9)
        ax.tick_params(labelsize=9, which="both")
        ax.grid(alpha=0.25)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{name_of(result['model'])}. {result['choice']['said']}.", fontsize=9, parse_math=False)
    write(figure, path)


def _loss(ax: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    values = [over(row["ratio"]) for row in rows]
    _line(ax, rows, values)
    loss_axis(ax, max(values))


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
