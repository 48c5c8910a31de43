"""The pictures of the page: each from the content alone, as ``(name, figure, caption)``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from peerify.report import style
from peerify.report.axes import bytes_axis, loss_axis, over
from peerify.report.content import CURVES, OTHERS

Picture = tuple[str, Any, str]
LIMIT = (0, (2, 2))  # dashes of a limit
LAYERS, TALL = 0.16, 1.5  # inches: a row of a heat map, and what is beside the rows
GRIDS = 4  # at most, of layers with product keys


def price_figures(lines: Sequence[Mapping[str, Any]]) -> Iterator[Picture]:
    """Loss and multiply-adds against bytes."""
    figure, ax = style.new_figure()
    values = [[over(point["ratio"]) for point in line["points"]] for line in lines]
    for number, (line, value) in enumerate(zip(lines, values, strict=True)):
        at = [100 * point["bytes"] for point in line["points"]]
        thin = {"linewidth": 1.2} if line["name"].split(" (")[0] in OTHERS else {}
        ax.plot(at, value, label=line["name"], **style.line(number) | thin)
    loss_axis(ax, max(max(value) for value in values))
    _finish(figure, ax, lines)
    caption = "What a share loses. Lower is better; 1 is the dense model, and less than 1.0005 × lies at the bottom"
    if any(point["ratio"] > 100 for line in lines for point in line["points"]):
        caption += "; what loses more than 100 × is above the frame"
    yield "price-loss", figure, f"{caption}. The table has all of it."
    counted = [line for line in lines if any(point["macs"] is not None for point in line["points"])]
    if counted:
        figure, ax = style.new_figure()
        for number, line in enumerate(lines):
            points = [point for point in line["points"] if point["macs"] is not None]
            at, done = [100 * point["bytes"] for point in points], [100 * point["macs"] for point in points]
            if points:
                ax.plot(at, done, label=line["name"], **style.line(number))
        ax.axhline(100, color=style.INK, linewidth=1)
        ax.set_ylim(bottom=0)
        ax.set_ylabel("multiply-adds, % of the dense layers'")
        _finish(figure, ax, counted)
        caption = "What a share computes. Fewer bytes can take more multiply-adds, for keys meet every token."
        yield "price-macs", figure, caption


def _finish(figure: Any, ax: Any, lines: Sequence[Mapping[str, Any]]) -> None:
    bytes_axis(ax, min(point["bytes"] for line in lines for point in line["points"]))
    style.legend(figure, ax)


def speed_figures(speeds: Sequence[Mapping[str, Any]]) -> Iterator[Picture]:
    """Speed over the dense model's against the share, a picture for each kind of work, with the limit."""
    for place, work in enumerate(dict.fromkeys(row["work"] for speed in speeds for row in speed["rows"])):
        figure, ax = style.new_figure()
        for number, speed in enumerate(speeds):
            rows = sorted((row for row in speed["rows"] if row["work"] == work), key=lambda row: row["active"])
            if not rows:
                continue
            look, at = style.line(number), [100 * row["active"] for row in rows]
            ax.plot(at, [row["ratio"] for row in rows], label=f"{speed['run']}, {speed['dtype']}", **look)
            ax.vlines(at, *zip(*(row["spread"] for row in rows), strict=True), color=look["color"], linewidth=1.2)
            limits = [row["limit"] for row in rows]
            if all(limit is not None for limit in limits):
                label = f"{speed['run']}: limit"
                ax.plot(at, limits, color=look["color"], linewidth=1.3, linestyle=LIMIT, label=label)
        ax.axhline(1, color=style.INK, linewidth=1)
        ax.set_ylim(bottom=0)
        ax.set_xlabel("share of the dense layers' bytes, %")
        ax.set_ylabel("speed over the dense model's")
        style.legend(figure, ax)
        caption = f"{work[0].upper()}{work[1:]}. The dense model is at 1; bars span the measurements."
        if work.startswith("decode"):
            caption += " The limit is Amdahl's: converted layers take just their share of the dense ones' time."
        yield f"speed-{place}", figure, caption


def use_figures(found: Sequence[Mapping[str, Any]]) -> Iterator[Picture]:
    """Heat maps: layers by experts from the most used to the least; grids of layers with product keys."""
    for place, use in enumerate(found):
        figure = _heat(
            [layer["ranked"] for layer in use["layers"]],
            [layer["path"] for layer in use["layers"]],
            "experts of a layer, from the most used to the least, %",
        )
        at = f" at a share of {use['active']:g}" if use["active"] is not None else ""
        caption = f"{use['run']}{at}, on {use['text']}: the share of tokens that read an expert. A row is a layer."
        yield f"use-{place}", figure, f"{caption} Rows that end dark have experts that few tokens need."
        grids = [layer for layer in use["layers"] if layer.get("grid")]
        for layer in grids[:GRIDS]:
            figure = _heat(layer["grid"], None, "columns of the grid, %", height=style.WIDTH * 0.8)
            path = layer["path"]
            caption = f"{use['run']}, {path}: the same over the grid of product keys; even colour is even use."
            yield f"use-{place}-grid-{path.replace('.', '-')}", figure, caption


def _heat(rows: Sequence[Sequence[float]], names: Sequence[str] | None, below: str, height: float = 0) -> Any:
    figure, ax = style.new_figure(height or TALL + LAYERS * len(rows))
    width = max(map(len, rows))
    filled = [[*row, *[float("nan")] * (width - len(row))] for row in rows]
    extent = (0, 100, len(rows), 0)
    drawn = ax.imshow(filled, aspect="auto", cmap=style.MAP, vmin=0, vmax=1, extent=extent, interpolation="nearest")
    ax.grid(False)
    step = max(1, -(-len(rows) // 16))
    if names:
        ax.set_yticks([i + 0.5 for i in range(0, len(rows), step)], [_number(name) for name in names[::step]])
        ax.set_ylabel("layer")
    else:
        ax.set_yticks([])
        ax.set_ylabel("rows of the grid")
    ax.set_xlabel(below)
    bar = figure.colorbar(drawn, ax=ax, location="top", shrink=0.9, aspect=30, format=lambda share, _: f"{share:.0%}")
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=style.MUTED, labelcolor=style.INK, labelsize=8)
    bar.set_label("tokens that read it", color=style.INK, fontsize=8.5)
    return figure


def layer_figures(runs: Sequence[Mapping[str, Any]]) -> Iterator[Picture]:
    """Share of bytes and error of each layer."""
    of_error = "Squared error of the output over its square, as predicted from calibration text."
    kinds = [
        ("bytes", "bytes that a token reads, %", 100, "How the budget is divided: more where errors cost more."),
        ("error", "error of the layer's output", 1, of_error),
    ]
    for key, label, scale, caption in kinds:
        shown = [run for run in runs if any(row[key] is not None for row in run["rows"])]
        if not shown:
            continue
        figure, ax = style.new_figure()
        for number, run in enumerate(runs):
            numbers = [_number(row["path"]) for row in run["rows"]]
            ordered = all(number.isdigit() for number in numbers) and len(set(numbers)) == len(numbers)
            at = [int(number) for number in numbers] if ordered else range(len(numbers))
            told = [(i, scale * row[key]) for i, row in zip(at, run["rows"], strict=True) if row[key] is not None]
            if told:
                ax.plot(*zip(*told, strict=True), label=run["run"], **style.line(number) | {"markersize": 3.5})
        if key == "error" and all(row[key] is None or row[key] > 0 for run in shown for row in run["rows"]):
            ax.set_yscale("log")
        else:
            ax.set_ylim(bottom=0)
        ax.set_xlabel("layer, as they run")
        ax.set_ylabel(label)
        style.legend(figure, ax)
        yield f"layers-{key}", figure, caption


def training_figures(runs: Sequence[Mapping[str, Any]]) -> Iterator[Picture]:
    """A picture for each curve that some log has."""
    for key, label in CURVES.items():
        shown = [run for run in runs if key in run["curves"]]
        if not shown:
            continue
        figure, ax = style.new_figure(2.9)
        for number, run in enumerate(runs):
            if key in run["curves"]:
                points = run["curves"][key]
                look = style.line(number, markers=len(points) <= 30)
                ax.plot(*zip(*points, strict=True), label=run["run"], **look)
        ax.set_xlabel("steps")
        ax.set_ylabel(label.split(",")[0])
        style.legend(figure, ax)
        yield f"training-{key.replace('_', '-')}", figure, f"{label[0].upper()}{label[1:]}."


def _number(path: str) -> str:
    """The number of a layer, or its name where it has none."""
    return next((part for part in path.split(".") if part.isdigit()), style.shortened(path, 12))
