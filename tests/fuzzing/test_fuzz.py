"""Damaged files end in a result or in one sentence, within seconds and without a flood of memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parent / "fuzz.py"


def fuzz(*argv: str) -> str:
    """What the run says; it runs in a process of its own, which forks a child for each case."""
    done = subprocess.run([sys.executable, str(RUN), *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-3000:]
    return done.stdout


def test_damaged_files_end_in_a_result_or_one_sentence() -> None:
    """Always the same ones, so that a change is told by what it breaks; `make fuzz` draws fresh ones."""
    said = fuzz("--seed", "12", "--count", "60")
    assert ", 0 faults" in said


def test_a_hang_and_a_flood_of_memory_are_faults() -> None:
    """In a process without torch, whose children may be forked and killed at will."""
    code = (
        "import pathlib, sys, time\n"
        f"sys.path.insert(0, {str(RUN.parent.parent)!r})\n"
        "from fuzzing.harness import outcome\n"
        "def spin(folder):\n"
        "    while True: pass\n"
        "for reader in (spin, lambda _: time.sleep(100), lambda _: bytearray(3 << 30), lambda _: None):\n"
        "    print(outcome(reader, pathlib.Path(), seconds=0.2).kind)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["hang", "hang", "memory", "result"], done.stderr


@pytest.mark.slow
def test_twenty_thousand_damaged_files() -> None:
    fuzz("--count", "700")
