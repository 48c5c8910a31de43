"""The picture of `peerify bench`: converted over dense, a panel for each kind of work, a bar for each budget.

`check_plot` and `write` are those of other pictures, too.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from peerify.errors import OutputError, UsageError
from peerify.reading import local_path, printable, reason

FORMATS = (".png", ".svg", ".pdf")
COLUMNS = 4  # panels side by side, at most
# Inches: of a bar, of what is beside the bars in a panel, of the narrowest panel and picture, of a row of panels.
BAR, MARGIN, PANEL, PICTURE, HEIGHT = 0.62, 0.5, 2.8, 8.4, 3.0
LONGEST = 40  # characters of a model's name
BLUE, ORANGE, GREY = "#3b6ea8", "#d1720f", "#444444"


def check_plot(file: str) -> Path:
    """The path of a picture that can be drawn.

    Raises:
        UsageError: no matplotlib, or no such kind of file.
        OutputError: no such folder.
    """
    path = local_path(file, OutputError)
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"--plot {printable(file)}: name a file that ends in {', '.join(FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install 'peerify[plots]'")
    if path.is_dir() or not path.parent.is_dir():
        raise OutputError(
            f"--plot {printable(file)}: it is a folder, or its folder is not there: make it, or rename it"
        )
    return path


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw what `bench_checkpoint` returned; the file is written whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    from matplotlib.figure import Figure  # without pyplot, which would open windows and keep figures
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels = list(_panels(result))
    rows = -(-len(panels) // COLUMNS)
    columns = -(-len(panels) // rows)
    bars = max(len(found) for _, found in panels)
    width = max(PICTURE, columns * max(PANEL, MARGIN + BAR * bars))
    apart: Any = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
    figure = Figure(figsize=(width, 1.1 + rows * HEIGHT), dpi=150, layout=apart)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    top = 1.12 * max(max(1.0, row["spread"][1], row.get("limit", 0)) for _, found in panels for row in found)
    axes = list(grid.flat)
    for ax, (title, found) in zip(axes, panels, strict=False):
        _draw_panel(ax, title, found, top)
    for ax in axes[len(panels) :]:
        ax.axis("off")
    for line in grid:
        line[0].set_ylabel("speed over the dense model's")
    _explain(figure, result)
    write(figure, path)


def write(figure: Any, path: Path) -> None:
    """Write a picture, whole or not at all. Raises OutputError where it cannot be written."""
    beside = path.with_name(f".{path.name}.tmp")
    try:
        figure.savefig(beside, format=path.suffix[1:].lower())
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OutputError(f"{printable(path)} cannot be written: {reason(error)}") from error


def _panels(result: Mapping[str, Any]) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """Titles, and the rows of one kind of work."""
    trains = {"peer": "train the PEER layers", "full": "train everything"}
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in result["decode"]:
        groups.setdefault(f"decode, {row['batch']} at once", []).append(row)
    for row in result["prefill"]:
        groups.setdefault(f"read a prompt of {row['tokens']:,}", []).append(row)
    for row in result["train"]:
        groups.setdefault(trains[row["trains"]], []).append(row)
    yield from groups.items()


def _draw_panel(ax: Any, title: str, rows: Sequence[Mapping[str, Any]], top: float) -> None:
    at = range(len(rows))
    ratios = [row["ratio"] for row in rows]
    spread = [
        [max(0.0, row["ratio"] - row["spread"][0]) for row in rows],
        [max(0.0, row["spread"][1] - row["ratio"]) for row in rows],
    ]
    ax.bar(at, ratios, width=0.72, color=BLUE, zorder=2)
    ax.errorbar(at, ratios, yerr=spread, fmt="none", ecolor=GREY, elinewidth=1, capsize=3, zorder=4)
    ax.axhline(1, color="black", linewidth=1, zorder=3)
    if "limit" in rows[0]:
        edges = [i - 0.5 for i in range(len(rows) + 1)]
        ax.stairs([row["limit"] for row in rows], edges, baseline=None, color=ORANGE, linewidth=2, zorder=3)
    for i, row in enumerate(rows):
        inside = row["spread"][0] > 0.2 * top  # else words would cover what is measured
        ax.annotate(
            f"{row['ratio']:.2f}×\n{_speed(row['converted'])}/s",
            (i, 0 if inside else max(row["spread"][1], row["ratio"])),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=8,
            color="white" if inside else "black",
            bbox=None if inside else {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
            zorder=5,
        )
    ax.set_title(title, fontsize=10, pad=20)
    # The medians of one panel's dense model are of the same measurements.
    below = {"xytext": (0, 5), "textcoords": "offset points", "xycoords": "axes fraction", "ha": "center"}
    ax.annotate(f"dense: {_speed(rows[0]['dense'])} tokens/s", (0.5, 1), fontsize=8, **below)
    ax.set_xticks(at, [f"{100 * row['active']:.3g} %" for row in rows], fontsize=9)
    ax.set_xlabel("budget, of the dense layers' bytes", fontsize=9)
    middle, half = (len(rows) - 1) / 2, max(3, len(rows)) / 2 + 0.1
    ax.set_xlim(middle - half, middle + half)
    ax.set_ylim(0, top)
    ax.locator_params(axis="y", nbins=8, steps=[1, 2, 5, 10])
    ax.tick_params(axis="x", length=0)
    ax.grid(axis="y", alpha=0.25)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _explain(figure: Any, result: Mapping[str, Any]) -> None:
    """Heading and legend."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    threads = f", {result['threads']} threads" if result["device"] == "cpu" else ""
    kernel = ", without the CPU kernel" if result["kernel"] and result["device"] == "cpu" else ""
    heading = f"{name_of(result['model'])} beside {name_of(result['against'])}"
    figure.suptitle(f"{heading}\n{result['dtype']}, {result['device']}{threads}{kernel}", fontsize=10, parse_math=False)
    handles = [
        Patch(color=BLUE, label="converted: times dense, and tokens/s"),
        Line2D([], [], color="black", linewidth=1, label="dense"),
        Line2D([], [], color=GREY, linewidth=1, marker="|", label="least and largest of the measurements"),
        Line2D([], [], color=ORANGE, linewidth=2, label="limit: converted layers take just their share of the time"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, numpoints=2, frameon=False, fontsize=9)


def _speed(tokens: float) -> str:
    if tokens >= 10_000:
        return f"{tokens / 1000:.3g}k"  # as wide as a bar
    return f"{tokens:,.0f}" if tokens >= 100 else f"{tokens:.3g}"


def name_of(model: str) -> str:
    """A Hub id, or a local model by its name only: a picture is shown to others."""
    name = Path(model).name if local_path(model, OutputError).exists() else model
    return name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}"
