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


@pytest.mark.slow
def test_twenty_thousand_damaged_files() -> None:
    fuzz("--count", "700")
