"""The code that travels beside the weights: complete, the same everywhere, and on its own."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from hub_client import converted
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import get_relative_import_files

from peerify.checkpoint.files import CODE, CODE_FOLDER, ENTRY
from peerify.modeling import modeling_peer


def test_what_ships_is_what_the_entry_imports() -> None:
    """transformers fetches the file that auto_map names and what this imports, found its own way: by reading."""
    imported = {Path(path).name for path in get_relative_import_files(CODE_FOLDER / ENTRY)}
    assert imported | {ENTRY} == set(CODE)
    assert modeling_peer.FILES == CODE


def test_what_ships_needs_no_peerify() -> None:
    for name in CODE:
        text = (CODE_FOLDER / name).read_text(encoding="utf-8")
        assert not re.search(r"^\s*(from|import) peerify", text, re.MULTILINE), name
        # transformers follows `from .file import name` only, and only into files beside this one.
        assert all(re.fullmatch(r"\w+", module) for module in re.findall(r"from \.(\S*) import", text)), name


def test_a_folder_from_before_the_code_was_split_loads_and_is_saved_whole(tmp_path: Path) -> None:
    """It has modeling_peer.py alone."""
    folder = converted(tmp_path / "old")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    for name in set(CODE) - {ENTRY}:
        (folder / name).unlink()
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
    model.save_pretrained(tmp_path / "new")
    assert set(CODE) <= {path.name for path in (tmp_path / "new").iterdir()}
