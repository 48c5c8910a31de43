"""peerify needs nothing that only POSIX has: it converts, loads and generates where that is missing."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import without_posix
from checkpoints import text_file, tiny_checkpoint
from command_line import spawn

PACKAGE = Path(__file__).parents[1] / "peerify"
NAMES = {"os": without_posix.OF_OS, "signal": without_posix.OF_SIGNAL}


def test_everything_works_without_posix(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "dense")
    text_file(tmp_path / "text.txt", 2000)
    out, err = spawn(without_posix.__file__, cwd=tmp_path).communicate(timeout=300)
    assert out.endswith("done\n"), err


def unguarded(tree: ast.AST) -> Iterator[str]:
    """What is only there on POSIX, and neither tried nor asked for first."""
    for node in ast.iter_child_nodes(tree):
        # `except ImportError`, `if hasattr(…)`, `if os.name`: whoever writes these has thought of it.
        if isinstance(node, ast.Try) or (isinstance(node, ast.If) and asks(node.test)):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in without_posix.MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.level == 0 and node.module.split(".")[0] in without_posix.MODULES:
                yield node.module
            yield from (
                f"{node.module}.{alias.name}" for alias in node.names if alias.name in NAMES.get(node.module, ())
            )
        elif isinstance(node, ast.Attribute) and node.attr in NAMES.get(ast.unparse(node.value), ()):
            yield ast.unparse(node)
        yield from unguarded(node)


def asks(test: ast.expr) -> bool:
    return any(word in ast.unparse(test) for word in ("hasattr(os", "hasattr(signal", "os.name", "sys.platform"))


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import resource", ["resource"]),
        ("def f():\n    from fcntl import flock", ["fcntl"]),
        ("try:\n    import pwd\nexcept ImportError:\n    pwd = None", []),
        ("from signal import SIGKILL, SIGTERM", ["signal.SIGKILL"]),
        ("if hasattr(os, 'fork'):\n    os.fork()", []),
        ("if ready:\n    os.kill(1, signal.SIGKILL)\n    os.fork()", ["signal.SIGKILL", "os.fork"]),
        ("from importlib import resources\nsignal.SIGTERM\nos.open", []),
    ],
)
def test_what_counts_as_unguarded(code: str, found: list[str]) -> None:
    assert list(unguarded(ast.parse(code))) == found


def test_no_module_takes_posix_for_granted() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 50
    found = {str(file): list(unguarded(ast.parse(file.read_text(encoding="utf-8")))) for file in files}
    assert not {file: names for file, names in found.items() if names}


@pytest.mark.skipif(sys.platform == "win32", reason="there everything is taken away already")
def test_what_is_taken_away_is_there() -> None:
    import os
    import signal

    for module, names in ((os, without_posix.OF_OS), (signal, without_posix.OF_SIGNAL)):
        assert len(names & set(vars(module))) > len(names) / 2
