"""The command line in this process or in one of its own, and files for it."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import text_file, tiny_checkpoint
from click.testing import CliRunner, Result

from peerify import cli

CONVERT = ["convert", "llama", "out", "--calibration", "text.txt", "--context", "32"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dense tiny checkpoints of several families and some text."""
    folder = tmp_path_factory.mktemp("cli")
    for family in ("llama", "gpt2", "bert"):
        tiny_checkpoint(folder / family, family)
    tiny_checkpoint(folder / "mute", tokenizer=False)
    text_file(folder / "text.txt", 3000)
    return folder


def run(*argv: str) -> Result:
    return CliRunner().invoke(cli.cli, list(argv))


def spawn(*argv: str, cwd: Path | None = None, **environment: str) -> subprocess.Popen[str]:
    package = Path(cli.__file__).parents[2]
    settings = os.environ | {"PYTHONPATH": str(package), "HF_HUB_OFFLINE": "1"} | environment
    return subprocess.Popen(
        [sys.executable, *argv],
        cwd=cwd,
        env=settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def stand_in(monkeypatch: pytest.MonkeyPatch, convert_checkpoint: Callable[..., Any]) -> None:
    """Put a function in the place of the conversion."""
    module = types.SimpleNamespace(convert_checkpoint=convert_checkpoint)
    monkeypatch.setitem(sys.modules, "peerify.conversion.checkpoint", module)
