"""The page in a real browser, where there is one: both themes, a phone's width, no word on the console, no request."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium: apt install chromium")
# A page of ours around the report tells its width and its colours; a console error would be on stderr.
AROUND = """<!DOCTYPE html><html><body>
<iframe id="page" src="report.html" style="width:{width}px;height:900px;border:0"></iframe><script>
addEventListener("load", () => {{
  const inside = document.getElementById("page").contentWindow, root = inside.document.documentElement;
  const style = inside.getComputedStyle(inside.document.body), figure = inside.document.querySelector("figure svg");
  const text = inside.document.querySelector("figure svg text");
  document.body.dataset.told = JSON.stringify({{
    overflow: root.scrollWidth - root.clientWidth, ink: style.color, paper: style.backgroundColor,
    drawn: figure.getBoundingClientRect().width, letters: text.getBoundingClientRect().height,
    axis: inside.getComputedStyle(text).fill, asked: inside.performance.getEntriesByType("resource").length,
  }});
}});
</script></body></html>"""


def told(pages: Path, tmp_path: Path, *, width: int, dark: bool) -> dict[str, float | str]:
    assert BROWSER is not None
    shutil.copy(pages / "rep/report.html", tmp_path / "report.html")
    (tmp_path / "around.html").write_text(AROUND.format(width=width))
    net = tmp_path / "net.json"
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
            "--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path}/profile",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--log-net-log={net}",
            "--virtual-time-budget=5000", "--dump-dom", (tmp_path / "around.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    asked = set(re.findall(r'"url":"((?:https?|wss?|ftp)://[^"]*)', net.read_text()))
    # What a browser asks by itself, for updates of its own, is not of the page.
    assert not {url for url in asked if not re.match(r"https?://([\w-]+\.)*(google|googleapis|gvt1)\.com[:/]", url)}
    found = re.search(r'data-told="([^"]*)"', done.stdout)
    assert found is not None
    return dict(json.loads(found[1].replace("&quot;", '"')))


def luminance(colour: object) -> float:
    """Relative luminance of ``rgb(r, g, b)``, as WCAG defines it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", str(colour))[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: object, other: object) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1200])
def test_it_reads_on_a_phone_and_in_the_dark(pages: Path, tmp_path: Path, width: int, dark: bool) -> None:
    found = told(pages, tmp_path, width=width, dark=dark)
    assert found["overflow"] == 0, "nothing but tables scrolls sideways"
    assert found["asked"] == 0
    assert (luminance(found["paper"]) < 0.1) == dark
    assert contrast(found["ink"], found["paper"]) > 7
    assert contrast(found["axis"], found["paper"]) > 7
    assert 280 < float(found["drawn"]) < width
    assert float(found["letters"]) > 8, "pixels"
