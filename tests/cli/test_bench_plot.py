"""The picture of `peerify bench`: that it is drawn, that its words are legible, and what is refused at once."""

from __future__ import annotations

import importlib.util
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from command_line import run

from peerify.cli import bench_plot
from peerify.errors import OutputError, UsageError

BUDGETS = (0.75, 0.5, 0.25, 0.125)


def measured(budgets: int = 4, batches: int = 3, trains: tuple[str, ...] = ("peer", "full")) -> dict[str, Any]:
    """A result with figures as far apart as they come."""

    def rows(**told: Any) -> list[dict[str, Any]]:
        made = []
        for i, active in enumerate(BUDGETS[:budgets]):
            ratio = (0.04, 0.9, 1.35, 2.2)[(i + len(told)) % 4]
            row = {"active": active, "dense": 12345.6, "converted": 12345.6 * ratio, "ratio": ratio}
            made.append({**row, "spread": [0.9 * ratio, 1.1 * ratio], **told})
        return made

    return {
        "model": "$some$_model/" + "long-" * 30,
        "against": "HuggingFaceTB/SmolLM2-135M",
        "device": "cpu",
        "dtype": "bfloat16",
        "threads": 2,
        "kernel": "it is odd",
        "decode": [row for i in range(batches) for row in rows(batch=2**i, limit=1.8, of_limit=0.7)],
        "prefill": rows(tokens=512),
        "train": [row for what in trains for row in rows(trains=what, tokens=1024)],
    }


@pytest.mark.parametrize("ending", bench_plot.FORMATS)
def test_a_picture_is_drawn(tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"speed{ending}"
    path.write_text("what was there before")
    bench_plot.draw(measured(), path)
    assert path.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml", b"%PDF-")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("budgets", "batches", "trains"), [(1, 1, ()), (4, 3, ("peer", "full")), (2, 7, ("peer",)), (4, 1, ("peer",))]
)
def test_no_text_covers_another_or_leaves_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budgets: int, batches: int, trains: tuple[str, ...]
) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kept: (drawn.append(self), save(self, *args, **kept)))
    bench_plot.draw(measured(budgets, batches, trains), tmp_path / "speed.png")
    (figure,) = drawn
    frame = figure.bbox
    shown = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    boxes = {text: text.get_window_extent() for text in shown if text.axes is None or text.axes.axison}
    words = " ".join(text.get_text() for text in boxes)
    for part in (
        "beside HuggingFaceTB/SmolLM2-135M",
        "without the CPU kernel",
        "decode, 1 at once",
        "read a prompt of",
    ):
        assert part in words
    assert ("train the PEER layers" in words) == bool(trains)
    for text, box in boxes.items():
        assert frame.x0 <= box.x0 <= box.x1 <= frame.x1, text
        assert frame.y0 <= box.y0 <= box.y1 <= frame.y1, text
    for one, other in combinations(boxes, 2):
        assert not boxes[one].overlaps(boxes[other]), (one, other)


def test_what_cannot_be_drawn_is_refused_before_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["bench", "nowhere", "--against", "nowhere", "--plot"]
    done = run(*asked, str(tmp_path / "speed.gif"))
    assert (done.exit_code, "name a file that ends in .png, .svg, .pdf" in done.stderr) == (2, True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = run(*asked, str(tmp_path / "speed.png"))
    assert done.exit_code == 2
    assert done.stderr == "peerify: --plot needs matplotlib: pip install 'peerify[plots]'\n"
    with pytest.raises(UsageError):
        bench_plot.check_plot("speed")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    (tmp_path / "folder.png").mkdir()
    for name in ("missing/speed.png", "folder.png"):
        with pytest.raises(OutputError, match="folder"):
            bench_plot.check_plot(str(tmp_path / name))
