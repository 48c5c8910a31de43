"""The documents agree with the code, and with each other."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from write_options import DOCUMENT, render

from peerify.config.recipe import valid_keys

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "benchmarks/quality/README.md"]


def test_options_are_of_this_schema() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == render(), "run `make docs`"


def test_every_key_of_a_recipe_has_a_row() -> None:
    keys = [key.replace(".N.", ".") for key in re.findall(r"^\| `(\S+)` \|", render(), re.MULTILINE)]
    assert sorted(keys) == sorted(valid_keys())


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", document.read_text(encoding="utf-8")):
        name, _, anchor = unquote(link).partition("#")
        target = document.parent / name if name else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120, "move it to docs/"
