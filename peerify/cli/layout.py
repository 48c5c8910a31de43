"""How tables look, on a screen and in a pipe."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


def console() -> Console:
    made = Console(highlight=False, markup=False, emoji=False)
    if not made.is_terminal:
        made.width = 1000  # rich assumes 80 columns for a pipe and would cut the paths
    return made


def table(*headers: str) -> Table:
    """Headers that start with ">" are for numbers, aligned to the right."""
    made = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for header in headers:
        made.add_column(
            header.removeprefix(">"),
            justify="right" if header.startswith(">") else "left",
            # On a narrow screen words fold, numbers do not.
            no_wrap=header not in ("layer", "model", "text", "stays dense"),
            overflow="fold",
        )
    return made
