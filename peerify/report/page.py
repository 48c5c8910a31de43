"""The page: report.html, with report.json and the pictures as PNG beside it."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

from peerify.checkpoint.atomic import write_text
from peerify.choice import MAX_LOSS, Wish
from peerify.errors import OutputError, UsageError
from peerify.progress import Progress, teller
from peerify.reading import local_path, printable, reason

PAGE, DATA, PICTURES = "report.html", "report.json", "pictures"
STAGE = "Drawing"
LEVELS = 6  # of colour for the bytes of a token


def write_report(
    places: Sequence[str], out: str, *, wish: Wish | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Write a page of what peerify's commands left in `places`.

    Args:
        places: folders and files, see `peerify.report.read.read_runs`.
        out: a folder, made if need be: report.html and report.json are replaced there, and the folder pictures.
        wish: what the recommended share must keep to where no sweep says it; None: a loss of at most MAX_LOSS.

    Returns:
        ``{"page", "runs", "sections", "pictures"}``: paths, names, and titles.

    Raises:
        UsageError: matplotlib or Jinja2 is not installed, or two places have the same name.
        DataError: a place is not there, or holds nothing to show, or something damaged.
        OutputError: `out` cannot be written.
    """
    if any(importlib.util.find_spec(name) is None for name in ("matplotlib", "jinja2")):
        raise UsageError("a report needs matplotlib and Jinja2: pip install 'peerify[plots]'")
    from peerify.report.content import content_of
    from peerify.report.read import read_runs

    tell = teller(progress)
    tell(STAGE, 0, 1)
    folder = local_path(out, OutputError)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{printable(out)} is a file: name a folder to write to")
    content = content_of(read_runs(places), wish or Wish(max_loss=MAX_LOSS))
    found, pictures = _sections(content)
    html = render(content, found)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace_pictures(folder, pictures)
    except OSError as error:
        raise OutputError(f"{printable(out)} cannot be written: {reason(error)}") from error
    write_text(folder / DATA, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_text(folder / PAGE, html)  # last: where it is, the rest is
    tell(STAGE, 1, 1)
    return {
        "page": str(folder / PAGE),
        "runs": content["runs"],
        "sections": [section["title"] for section in found],
        "pictures": [str(folder / PICTURES / name) for name in pictures],
    }


def _replace_pictures(folder: Path, pictures: Mapping[str, bytes]) -> None:
    """Put a whole set of pictures in the place of an older one."""
    beside, target = folder / f".{PICTURES}.tmp", folder / PICTURES
    with suppress(FileNotFoundError):
        shutil.rmtree(beside)
    beside.mkdir()
    for name, png in pictures.items():
        (beside / name).write_bytes(png)
    for old in target.glob("*.png") if target.is_dir() else ():
        old.unlink()
    target.mkdir(exist_ok=True)  # what others have put there stays
    for name in pictures:
        (beside / name).replace(target / name)
    beside.rmdir()


def render(content: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> str:
    """The page: everything is in it, so that it opens from the disk and asks for nothing."""
    from jinja2 import Environment

    from peerify.report.style import COLOURS

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = percent
    environment.filters["level"] = level
    template = environment.from_string(files("peerify.report").joinpath("page.html").read_text(encoding="utf-8"))
    themes = [{name: pair[i] for name, pair in COLOURS.items()} for i in (0, 1)]
    return template.render(content=content, sections=found, light=themes[0], dark=themes[1])


def _sections(content: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """What the template shows of each section that has something, and the pictures as PNG, by file name."""
    from markupsafe import Markup

    from peerify.report import figures, style

    told: list[tuple[str, str, str, Any, list[Any]]] = [
        ("price", "What a share costs", PRICE, figures.price_figures, [_price_table]),
        ("speed", "Speed", SPEED, figures.speed_figures, [_speed_table]),
        ("use", "Which experts are read", USE, figures.use_figures, []),
        ("layers", "Layer by layer", LAYERS, figures.layer_figures, [_layer_table]),
        ("training", "Training", TRAINING, figures.training_figures, [_training_table]),
        ("continuations", "Continuations side by side", CONTINUATIONS, None, []),
        ("recipes", "Recipes", RECIPES, None, []),
    ]
    sections, pictures = [], {}
    for key, title, lead, draw, tables in told:
        if not content[key]:
            continue
        drawn = []
        for name, figure, caption in draw(content[key]) if draw else ():
            pictures[f"{name}.png"] = style.as_png(figure)
            drawn.append({"name": name, "svg": Markup(style.as_svg(figure, name)), "caption": caption})
        made = [table for make in tables for table in make(content[key])]
        sections.append({"id": key, "title": title, "lead": lead, "figures": drawn, "tables": made})
    return sections, pictures


PRICE = (
    "For each share of the dense feed-forward layers' bytes that a token may read: what it loses. All budgets of a "
    "model are one conversion."
)
SPEED = "Tokens per second over the dense model's, both measured in turns on the same machine."
USE = "What tokens read of each layer, expert by expert."
LAYERS = "What each layer may read, and how far its output then is from the dense layer's."
TRAINING = "From the log of the training run."
CONTINUATIONS = (
    "What the dense model adds to a prompt, and what the converted one adds at each share, always the most likely "
    "token. The colour says what a token read of the layers' bytes; a line marks the first token that differs."
)
RECIPES = "With which each model was made; peerify convert --recipe takes the same keys."


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]], *, opened: bool = True) -> dict[str, Any]:
    return {"title": title, "head": head, "rows": list(rows), "opened": opened}


def _price_table(lines: Sequence[Mapping[str, Any]]) -> Iterable[dict[str, Any]]:
    head = ["", "share", "bytes", "multiply-adds", "perplexity over dense", "KL from dense", "same token"]
    rows = [
        [
            line["name"],
            f"{point['active']:g}",
            percent(point["bytes"]),
            percent(point["macs"]),
            ratio(point["ratio"]),
            "" if point["kl"] is None else f"{point['kl']:.4f}",
            percent(point["agreement"]),
        ]
        for line in lines
        for point in line["points"]
    ]
    yield _table("All figures", head, rows, opened=len(rows) <= 12)


def _speed_table(speeds: Sequence[Mapping[str, Any]]) -> Iterable[dict[str, Any]]:
    for speed in speeds:
        threads = f", {speed['threads']} threads" if speed["device"] == "cpu" else ""
        head = ["", "share", "dense, tokens/s", "converted, tokens/s", "speed", "spread", "limit"]
        rows = [
            [
                row["work"],
                f"{row['active']:g}",
                f"{row['dense']:.1f}",
                f"{row['converted']:.1f}",
                times(row["ratio"]),
                f"{row['spread'][0]:.2f}–{row['spread'][1]:.2f}",
                "" if row["limit"] is None else times(row["limit"]),
            ]
            for row in speed["rows"]
        ]
        title = f"{speed['run']}: {speed['dtype']}, {speed['device']}{threads}"
        yield _table(title, head, rows, opened=len(rows) <= 12)


def _layer_table(runs: Sequence[Mapping[str, Any]]) -> Iterable[dict[str, Any]]:
    for run in runs:
        head = ["layer", "experts", "bytes", "output error", "used effectively"]
        rows = [
            [
                row["path"],
                f"{row['experts']:,}",
                percent(row["bytes"]),
                "" if row["error"] is None else f"{row['error']:.2g}",
                "" if row["effective"] is None else f"{row['effective']:,.0f}",
            ]
            for row in run["rows"]
        ]
        yield _table(run["run"], head, rows, opened=False)


def _training_table(runs: Sequence[Mapping[str, Any]]) -> Iterable[dict[str, Any]]:
    from peerify.report.content import CURVES

    rows = [
        [run["run"], CURVES[key], f"{points[0][1]:.4g}", f"{points[-1][1]:.4g}", f"{points[-1][0]:,}"]
        for run in runs
        for key, points in run["curves"].items()
    ]
    yield _table("From the first to the last", ["", "", "first", "last", "step"], rows)


def percent(share: float | None) -> str:
    """0.501 → 50.1 %."""
    return "" if share is None else f"{100 * share:.1f} %"


def ratio(value: float) -> str:
    """1.0034 → 1.003 ×; large ones without decimals."""
    return f"{value:.3f} ×" if value < 100 else f"{value:,.0f} ×"


def times(value: float) -> str:
    """1.193 → 1.19 ×."""
    return f"{value:.2f} ×"


def level(share: float | None) -> str:
    """The class that colours a token which read that share of the bytes."""
    return "none" if share is None else f"b{min(LEVELS - 1, max(0, int(share * LEVELS)))}"
