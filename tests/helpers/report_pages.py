"""A page of a tiny model's conversion, evaluation and speed, of a benchmark, and of a training's log."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest
from checkpoints import text_file, tiny_checkpoint
from command_line import run

QUALITY = Path(__file__).parents[2] / "docs/quality/copies"


def places(folder: Path) -> list[str]:
    """What `pages` makes a page of."""
    return [str(folder / "out"), str(QUALITY), str(folder / "healed-run")]


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """rep: the page of `places`."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    folder = tmp_path_factory.mktemp("report")
    llama, out = str(tiny_checkpoint(folder / "llama")), str(folder / "out")
    text = str(text_file(folder / "text.txt", 3000))

    def done(*argv: str) -> str:
        result = run(*argv)
        assert result.exit_code == 0, result.output
        return result.stdout

    done("convert", llama, out, "--calibration", text, "--context", "32", "--layers", "1-2", "--allocation", "uniform")
    asked = [out, "--against", llama, "--active", "0.5,0.75", "--json"]
    found = done("eval", *asked, "--data", text, "--context", "32", "--max-tokens", "640", "--details")
    (folder / "out/eval.json").write_text(found)
    timed = done("bench", *asked, "--prompt", "24", "--new", "2", "--repeats", "2", "--batch", "1,2")
    (folder / "out/bench.json").write_text(timed)
    (folder / "healed-run").mkdir()
    (folder / "healed-run/log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log()))
    done("report", *places(folder), "--out", str(folder / "rep"))
    return folder


def log() -> list[dict[str, object]]:
    """Lines of a training's log."""
    rows: list[dict[str, object]] = []
    for step in (1, 10, 20, 30):
        layers = {
            f"model.layers.{i}.mlp": {"used": 0.9 + 0.002 * step, "kl_uniform": 0.1 + i, "bytes": 0.5} for i in (1, 2)
        }
        rows.append({"step": step, "stage": 0, "loss": 3 * math.exp(-step / 30), "kl": 1 / step, "layers": layers})
    return [*rows, {"step": 30, "stage": 0, "eval_perplexity": 20.5}]


def read_page(path: Path) -> dict[str, list[list[str]]]:
    """Titles of a page's tables -> their rows."""

    class Tables(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.found: dict[str, list[list[str]]] = {}
            self.inside = ""
            self.title = ""

        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            self.inside = tag
            if tag == "summary":
                self.title = ""
            elif tag == "tbody":
                self.found[self.title] = []
            elif tag == "tr" and self.title in self.found:
                self.found[self.title].append([])
            elif tag == "td":
                self.found[self.title][-1].append("")

        def handle_endtag(self, tag: str) -> None:
            self.inside = ""

        def handle_data(self, data: str) -> None:
            if self.inside == "summary":
                self.title += data
            elif self.inside == "td":
                self.found[self.title][-1][-1] += data

    tables = Tables()
    tables.feed(path.read_text())
    return tables.found
