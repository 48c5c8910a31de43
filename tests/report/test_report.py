"""The page of a report: it says what the files say, asks for nothing, and holds no code of others."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from report_pages import QUALITY, places, read_page

from peerify.choice import Wish, choose
from peerify.report import figures
from peerify.report.content import content_of
from peerify.report.read import read_runs

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
VOID = {"meta", "link", "path", "use", "image", "br"}


class Page(HTMLParser):
    """Whether tags close, where attributes lead, and which ids there are."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.leads: list[str] = []
        self.handlers: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            self.handlers += [name] * name.startswith("on")
            if name == "id":
                self.ids.append(value or "")
            elif name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
                self.leads.append(value or "")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def test_the_page_is_whole_and_asks_for_nothing(pages: Path) -> None:
    html = (pages / "rep/report.html").read_text()
    page = Page(html)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert not page.tags & {"script", "iframe", "object", "embed", "form", "video", "audio", "base"}
    assert page.handlers == []
    for lead in page.leads:
        assert lead.startswith("data:") or lead[1:] in page.ids, lead
    assert set(re.findall(r"url\(#?([^)]*)\)", html)) <= set(page.ids)
    assert "@import" not in html
    assert not re.search(r"https?:|//[a-z]", html)
    assert str(pages) not in html
    assert str(Path.home()) not in html
    assert len(html) < 1_500_000


def test_both_themes_have_every_colour(pages: Path) -> None:
    html = (pages / "rep/report.html").read_text()
    light, dark = html.split("prefers-color-scheme: dark", 1)
    asked = set(re.findall(r"var\(--([\w]+)\)", html))
    assert asked <= set(re.findall(r"--([\w]+): #", light))
    assert asked <= set(re.findall(r"--([\w]+): #", dark.split("</style>")[0]))
    svg = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert "var(--ink)" in svg
    assert not re.search(r"(fill|stroke): #(?!0{6})", re.sub(r"fill: #(fff|ffffff)\b", "", svg)), (
        "black would be lost in the dark"
    )


def test_what_is_shown_is_what_was_measured(pages: Path) -> None:
    content = json.loads((pages / "rep/report.json").read_text())
    evaluated = json.loads((pages / "out/eval.json").read_text())
    speed = json.loads((pages / "out/bench.json").read_text())
    record = json.loads((pages / "out/peerify.json").read_text())
    tables = read_page(pages / "rep/report.html")
    assert content["runs"] == ["out", "copies", "healed-run"]
    # The curve, of the evaluation and of the benchmark.
    price = tables["All figures"]
    for budget in evaluated["budgets"]:
        row = next(row for row in price if row[0] == "out, text.txt" and row[1] == f"{budget['active']:g}")
        assert row[2] == f"{100 * budget['bytes_fraction']:.1f} %"
        assert row[3] == f"{100 * budget['macs_fraction']:.1f} %"
        assert row[4] == f"{budget['ratio']:.3f} ×"
        assert row[5] == f"{budget['kl']:.4f}"
        assert row[6] == f"{100 * budget['agreement']:.1f} %"
    cells = json.loads((QUALITY / "results.json").read_text())["cells"]
    for method in ("peerify", "oracle", "teal", "cmoe"):
        told = {row[1]: row[4] for row in price if row[0] == f"{method} (copies)"}
        found = {f"{cell['active']:g}": cell["test"]["ratio"] for cell in cells if cell["method"] == method}
        assert told.keys() == found.keys()
        assert all(told[share] in (f"{ratio:.3f} ×", f"{ratio:,.0f} ×") for share, ratio in found.items())
    # The decision, by the rule of a sweep.
    fast = {row["active"]: row["ratio"] for row in speed["decode"] if row["batch"] == 1}
    rows = [{**budget, "speed": fast[budget["active"]]} for budget in evaluated["budgets"]]
    chosen = choose(rows, Wish(max_loss=1.02))
    (decision,) = content["decisions"]
    assert (decision["active"], decision["said"]) == (chosen.active, chosen.said)
    assert decision["speed"] == fast[chosen.active]
    # Speed, layers, training.
    (title,) = (title for title in tables if title.startswith("out: float32, cpu"))
    for row, shown in zip([*speed["decode"], *speed["prefill"]], tables[title], strict=True):
        assert shown[1:5] == [
            f"{row['active']:g}",
            f"{row['dense']:.1f}",
            f"{row['converted']:.1f}",
            f"{row['ratio']:.2f} ×",
        ]
        assert shown[6] == (f"{row['limit']:.2f} ×" if "limit" in row else "")
    for layer, shown in zip(evaluated["layers"], tables["out"], strict=True):
        assert shown[0] == layer["path"]
        assert shown[3] == f"{record['layer_errors'][layer['path']]:.2g}"
        assert shown[4] == f"{layer['effective_experts']:,.0f}"
    log = [json.loads(line) for line in (pages / "healed-run/log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in log if "loss" in row]
    row = next(row for row in tables["From the first to the last"] if row[1] == "training loss")
    assert row == ["healed-run", "training loss", f"{losses[0]:.4g}", f"{losses[-1]:.4g}", str(log[-1]["step"])]
    (curves,) = (run["curves"] for run in content["training"])
    used = [
        sum(layer["used"] for layer in row["layers"].values()) / len(row["layers"]) for row in log if "layers" in row
    ]
    assert [value for _, value in curves["used"]] == pytest.approx([100 * value for value in used])
    html = (pages / "rep/report.html").read_text()
    for prompt in evaluated["continuations"]:
        for budget in prompt["budgets"]:
            assert f"{100 * budget['active']:g} %: {budget['alike']} of {len(prompt['dense'])} tokens alike" in html
    assert "active: 0.5" in html, "the recipe"


def test_pictures_draw_the_content(pages: Path) -> None:
    content = content_of(read_runs(places(pages)), Wish(max_loss=1.02))
    assert content == json.loads((pages / "rep/report.json").read_text())
    drawn = {name: figure.axes for name, figure, _ in figures.price_figures(content["price"])}
    assert [line.get_label() for line in drawn["price-loss"][0].lines] == [line["name"] for line in content["price"]]
    for line, told in zip(drawn["price-loss"][0].lines, content["price"], strict=True):
        assert list(line.get_xdata()) == pytest.approx([100 * point["bytes"] for point in told["points"]])
        assert list(line.get_ydata()) == pytest.approx([max(0.0005, point["ratio"] - 1) for point in told["points"]])
    ((_, figure, _), *_) = figures.use_figures(content["use"])
    image = figure.axes[0].images[0].get_array()
    assert image.tolist() == [layer["ranked"] for layer in content["use"][0]["layers"]]
    (name, figure, _), *_ = figures.training_figures(content["training"])
    assert name == "training-loss"
    assert [list(pair) for pair in figure.axes[0].lines[0].get_xydata()] == content["training"][0]["curves"]["loss"]
    ((_, figure, _), *_) = figures.speed_figures(content["speed"])
    measured, limit, _ = figure.axes[0].lines
    rows = sorted(
        (row for row in content["speed"][0]["rows"] if row["work"] == "decode, 1 at once"), key=lambda r: r["active"]
    )
    assert list(measured.get_ydata()) == [row["ratio"] for row in rows]
    assert list(limit.get_ydata()) == [row["limit"] for row in rows]


def test_files_beside_the_page(pages: Path, tmp_path: Path) -> None:
    html = (pages / "rep/report.html").read_text()
    pictures = sorted(path.stem for path in (pages / "rep/pictures").iterdir())
    assert pictures == sorted(re.findall(r'<figure id="picture-([\w-]+)">', html))
    assert all((pages / f"rep/pictures/{name}.png").read_bytes()[:4] == b"\x89PNG" for name in pictures)
    assert sorted(path.name for path in (pages / "rep").iterdir()) == ["pictures", "report.html", "report.json"]
    # A second report replaces the first, and nothing else.
    (tmp_path / "rep/pictures").mkdir(parents=True)
    (tmp_path / "rep/mine.txt").write_text("mine")
    (tmp_path / "rep/pictures/old.png").write_bytes(b"")
    done = run("report", str(pages / "healed-run"), "--out", str(tmp_path / "rep"), "--json")
    found = json.loads(done.stdout)
    assert found["sections"] == ["Training"]
    assert sorted(map(os.path.basename, found["pictures"])) == sorted(os.listdir(tmp_path / "rep/pictures"))
    assert (tmp_path / "rep/mine.txt").read_text() == "mine"
    again = run("report", str(pages / "healed-run"), "--out", str(tmp_path / "again"))
    assert again.stdout == f"of healed-run\nsections: Training\npage: {tmp_path}/again/report.html\n"
    for name in ("report.html", "report.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "rep" / name).read_bytes(), "the same twice"


def test_files_about_a_model_belong_to_its_folder(pages: Path, tmp_path: Path) -> None:
    for name in ("eval.json", "bench.json"):
        (tmp_path / name).write_bytes((pages / "out" / name).read_bytes())
    (tmp_path / "out").mkdir()
    for name in ("peerify.json", "config.json"):
        (tmp_path / "out" / name).write_bytes((pages / "out" / name).read_bytes())
    apart = [str(tmp_path / "eval.json"), str(tmp_path / "out"), str(tmp_path / "bench.json"), str(QUALITY)]
    assert [run.name for run in read_runs(apart)] == ["out", "copies"]
    together = content_of(read_runs([str(pages / "out"), str(QUALITY)]), Wish(max_loss=1.02))
    assert content_of(read_runs(apart), Wish(max_loss=1.02)) == together
    assert [run.name for run in read_runs(apart[::2])] == ["eval", "bench"]


def test_words_of_others_stay_words(pages: Path, tmp_path: Path) -> None:
    found = json.loads((pages / "out/eval.json").read_text())
    found["continuations"][0]["prompt"] = "<script>alert(1)</script>"
    found["continuations"][0]["budgets"][0]["tokens"][0] = "<img src=https://example.com/x.png>"
    found["data"] = '"><b>$x$ & https://example.com'
    (tmp_path / "eval.json").write_text(json.dumps(found))
    assert run("report", str(tmp_path / "eval.json"), "--out", str(tmp_path / "rep")).exit_code == 0
    page = Page((tmp_path / "rep/report.html").read_text())
    assert not page.tags & {"script", "img"}
    assert page.open == []
    assert all(not lead.startswith("http") for lead in page.leads)


def damaged(pages: Path, **change: Any) -> str:
    return json.dumps(json.loads((pages / "out/eval.json").read_text()) | change)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "eval.json is not valid JSON"),
        ("[]", "eval.json does not hold a JSON object"),
        ("{}", "holds nothing to report: give a converted model"),
        ({"perplexity": "low"}, r"eval\.json: perplexity: .* not 'low'; write it again"),
        ({"layers": [{"path": 3}]}, r"eval\.json: layers\.0\.path: "),
        ({"budgets": [{"active": 0.5}]}, r"eval\.json: budgets\.0\.bytes_fraction: "),
    ],
)
def test_damaged_files(pages: Path, tmp_path: Path, content: Any, message: str) -> None:
    text = content if isinstance(content, str) else damaged(pages, **content)
    (tmp_path / "eval.json").write_text(text)
    for place in (tmp_path / "eval.json", tmp_path):
        done = run("report", str(place), "--out", str(tmp_path / "rep"))
        assert (done.exit_code, done.stdout) == (1, ""), done.output
        assert re.search(message, done.stderr), done.stderr
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / "rep").exists()


def test_mistakes(pages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "out").symlink_to(pages / "out")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy/out").symlink_to(pages / "healed-run")
    (tmp_path / "copy/eval.json").write_text("not peerify's")
    log = str(pages / "healed-run")
    for argv, code, message in (
        ([], 2, "Missing argument 'DIRS"),
        (["missing"], 1, "missing: no such file or folder"),
        (["empty"], 1, "empty holds nothing to report: give a converted model"),
        ([log, log], 2, "two of the folders are called healed-run: rename one"),
        ([log, "--out", "file"], 1, "file is a file: name a folder to write to"),
        ([log, "--max-loss", "0"], 2, "is not in the range x>0"),
    ):
        done = run("report", *argv)
        assert (done.exit_code, done.stdout) == (code, ""), done.output
        assert message in done.stderr
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = run("report", log)
    assert done.exit_code == 2
    assert done.stderr == "peerify: a report needs matplotlib and Jinja2: pip install 'peerify[plots]'\n"
