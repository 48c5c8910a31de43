"""The results as a picture: perplexity ratio against active share, one line per method."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from summary import TEXTS

CEILING = 100.0  # ratios above leave the frame: what is worth telling apart lies below
TICKS = (1, 1.02, 1.05, 1.1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100)
MARKERS = "os^vDP*Xhp<>"
STYLES: dict[str, Any] = {"test": "-", "ood": "--", "known": ":"}
MAIN = {"peerify": "black", "oracle": "grey"}  # the line that matters, and the one that it wants to reach


def draw(results: dict[str, Any], path: Path) -> None:
    """Write the picture (.svg), whole or not at all; the same results give the same bytes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    cells = [cell for cell in results["cells"] if "error" not in cell]
    methods = list(dict.fromkeys(cell["method"] for cell in cells))
    colours = plt.get_cmap("tab20").colors[::2] + plt.get_cmap("tab20").colors[1::2]  # type: ignore[attr-defined]
    with plt.rc_context({"svg.hashsalt": "peerify", "svg.fonttype": "none", "font.size": 10}):
        figure, axes = plt.subplots(figsize=(9.5, 7), layout="constrained")
        handles = []
        for i, method in enumerate(methods):
            points = sorted((cell for cell in cells if cell["method"] == method), key=lambda cell: cell["bytes"])
            colour, marker = MAIN.get(method, colours[i % len(colours)]), MARKERS[i % len(MARKERS)]
            width = 2.6 if method in MAIN else 1.3
            for key, style in STYLES.items():
                found = [cell for cell in points if key in cell]
                axes.plot(
                    [100 * cell["bytes"] for cell in found],
                    [cell[key]["ratio"] for cell in found],
                    style,
                    color=colour,
                    marker=marker,
                    markersize=4.5,
                    linewidth=width,
                    zorder=3 if method in MAIN else 2,
                    alpha=1.0 if key == "test" else 0.6,
                )
            handles.append(Line2D([], [], color=colour, marker=marker, markersize=4.5, linewidth=width, label=method))
        ratios = [cell[key]["ratio"] for cell in cells for key in STYLES if key in cell]
        top = min(CEILING, max(ratios, default=1.0))
        axes.set_yscale("log")
        axes.set_ylim(min([0.985, *(0.99 * ratio for ratio in ratios)]), max(1.05, top * 1.05))
        axes.yaxis.set_major_locator(FixedLocator(_apart(TICKS, 0.03 * math.log(max(1.05, top)))))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlim(8, 102)
        axes.set_xticks([12.5, 25, 50, 75, 100], ["12.5", "25", "50", "75", "100"])
        axes.grid(alpha=0.25)
        axes.set_xlabel("bytes that a token reads, % of the dense layers', everything counted")
        above = f" (above {CEILING:g}: out of the frame)" if max(ratios, default=0) > CEILING else ""
        axes.set_ylabel(f"perplexity over the dense model's{above}")
        axes.set_title(results["settings"]["model"])
        if len(results["dense"]) > 1:
            handles += [
                Line2D([], [], color="black", linestyle=style, label=TEXTS[key])
                for key, style in STYLES.items()
                if key in results["dense"]
            ]
        axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        beside = path.with_name(f".{path.name}.tmp")
        figure.savefig(beside, format="svg", metadata={"Date": None})
        plt.close(figure)
    os.replace(beside, path)


def _apart(ticks: tuple[float, ...], gap: float) -> list[float]:
    """Those of `ticks` that are at least `gap` apart on a log axis."""
    kept = [ticks[0]]
    for tick in ticks[1:]:
        if math.log(tick / kept[-1]) >= gap:
            kept.append(tick)
    return kept
