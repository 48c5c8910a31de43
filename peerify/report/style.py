"""How pictures of the page look: colours for a light and a dark page, sizes, and how they are written.

A figure is drawn once, in the colours of the light page. On the page it is SVG whose colours are CSS variables, so
that a dark page shows the same figure; beside the page it is a PNG.
"""

from __future__ import annotations

import io
import re
from typing import Any

# Name -> colour on a light page, on a dark one. Lines have Okabe and Ito's colours, which people who see fewer colours
# can tell apart, made darker or lighter where they would be hard to see.
COLOURS = {
    "ink": ("#1b2330", "#e8ecf2"),
    "muted": ("#566173", "#a3aebf"),
    "grid": ("#d8dee7", "#384252"),
    "paper": ("#fefefe", "#161b22"),
    "c0": ("#0072b2", "#56b4e9"),
    "c1": ("#c4500a", "#f08a3c"),
    "c2": ("#007a5a", "#2fc79a"),
    "c3": ("#a8518a", "#e093c4"),
    "c4": ("#8a6d00", "#f0e442"),
    "c5": ("#4b5fb5", "#9fb0ff"),
}
INK, MUTED, GRID, PAPER = (COLOURS[name][0] for name in ("ink", "muted", "grid", "paper"))
LINES = tuple(light for name, (light, _) in COLOURS.items() if re.fullmatch(r"c\d", name))
MARKERS, DASHES = "os^DvP*X", ("-", "--", "-.", ":")  # lines are told apart without colours, too
MAP = "cividis"  # of heat maps: it reads the same to everyone, and in grey
WIDTH, HEIGHT = 4.7, 3.3  # inches; on a phone that is the whole width, and words of 9 points can still be read
ROW = 0.19  # inches, of a legend
DPI = 160
LONGEST = 44  # characters of a name in a legend
_FONT = "'DejaVu Sans', Verdana, sans-serif"  # of the same widths


def new_figure(height: float = HEIGHT) -> tuple[Any, Any]:
    """A figure in the colours of the light page, and its axes."""
    from matplotlib.figure import Figure  # without pyplot, which would open windows and keep figures
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    apart: Any = ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.05)
    figure = Figure(figsize=(WIDTH, height), layout=apart, facecolor=PAPER)
    ax = figure.subplots()
    ax.set_facecolor("none")
    ax.grid(color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["bottom", "left"]].set_color(MUTED)
    ax.tick_params(colors=MUTED, labelcolor=INK, labelsize=9, which="both")
    for label in (ax.xaxis.label, ax.yaxis.label):
        label.set(color=INK, fontsize=9)
    return figure, ax


def line(number: int, *, markers: bool = True) -> dict[str, Any]:
    """How line `number` of a picture is drawn."""
    style = {"color": LINES[number % len(LINES)], "linewidth": 1.8}
    style["linestyle"] = DASHES[number // len(LINES) % len(DASHES)]
    return style | ({"marker": MARKERS[number % len(MARKERS)], "markersize": 5} if markers else {})


def legend(figure: Any, ax: Any) -> None:
    """A legend below the axes, where there is more than one line."""
    handles, labels = ax.get_legend_handles_labels()
    if len(handles) > 1:
        names = [shortened(label) for label in labels]
        columns = 1 if max(map(len, names)) > 22 else 2
        figure.set_figheight(figure.get_figheight() + ROW * -(-len(names) // columns))
        figure.legend(
            handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5, labelcolor=INK
        )


def shortened(text: str, longest: int = LONGEST) -> str:
    """A name that fits, its end kept; what matplotlib would take for mathematics is not."""
    text = text if len(text) <= longest else f"…{text[1 - longest :]}"
    return text.replace("$", r"\$")


def as_png(figure: Any) -> bytes:
    """A figure as PNG."""
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=DPI)
    return held.getvalue()


def as_svg(figure: Any, name: str) -> str:
    """A figure as SVG inside an HTML page: its colours are ``var(--ink)`` and so on, its ids begin with `name`."""
    import matplotlib

    held = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(held, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = held.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    size = re.search(r'viewBox="[^"]*"', svg)
    assert size is not None
    svg = f"<svg {size[0]} aria-hidden='true'>" + svg[svg.index(">") + 1 :]  # the picture's words are in the caption
    svg = re.sub(r' id="', f' id="{name}-', svg.replace("xlink:href", "href"))
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"(font(?:-family)?: [^;\"]*?)'DejaVu Sans'[^;\"]*", rf"\g<1>{_FONT}", svg)
    for variable, (light, _) in COLOURS.items():
        svg = svg.replace(light, f"var(--{variable})")
    return svg.strip()
