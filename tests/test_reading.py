"""What a library says of a fault becomes one line of use, and names from strangers one that a terminal can show."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from peerify.errors import CheckpointError
from peerify.reading import local_path, printable, read_object, reason, shown


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KeyError("added_tokens"), "it has no 'added_tokens'"),
        (ValueError(""), "ValueError"),
        (ValueError("Broken."), "Broken"),
        (ValueError("Failed to load:"), "ValueError: Failed to load"),
        (ValueError("\n For 'x':\n   expected int, got str\nmore"), "For 'x': expected int, got str"),
        (OSError(2, "No such file or directory"), "No such file or directory"),
        (ValueError("\x1b[31mred"), r"\x1b[31mred"),
        (ValueError("x" * 999), f"{'x' * 297}..."),
    ],
)
def test_reason(error: Exception, line: str) -> None:
    assert reason(error) == line


def test_values_and_names_are_one_short_line() -> None:
    deep: list = []
    for _ in range(2000):
        deep = [deep]
    for value in (deep, "x" * 10_000, 10**400, list(range(10**5)), {"a": "x" * 10**5}, "a\nb"):
        assert len(shown(value)) <= 80
        assert "\n" not in shown(value)
    assert printable("a\nb\x1b\udcffé") == r"a\nb\x1b\udcffé"
    assert len(printable("x" * 10_000)) == 300


@pytest.mark.parametrize("text", ["a\0b", "~nosuchuser/x", "x" * 300, "/a" * 5000])
def test_what_no_file_can_be_called(text: str) -> None:
    with pytest.raises(CheckpointError, match="is not a usable path"):
        local_path(text, CheckpointError)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[" * 100_000, "is nested too deeply"),
        (b"[]", "does not hold a JSON object"),
        (b"{", "is not valid JSON"),
        (b"9" * 5000, "is not valid JSON"),
        (b"\xff", "is not UTF-8 text"),
        (b" " * 2000 + b"{}", "more than 1,000"),
    ],
)
def test_json_that_is_no_object(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as error:
        read_object(path, CheckpointError, limit=1000 if data[0] == ord(" ") else 10**6)
    assert str(error.value).startswith(str(path))


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(CheckpointError, match="is not a regular file"):
        read_object(tmp_path / "a.json", CheckpointError)
