"""The GPU kernels in Triton's interpreter, which must be chosen before triton is imported: a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("gpu_kernel_cases.py")


def run(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, timeout=900,
        cwd=CASES.parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def test_all_cases_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    said = run("-m", "pytest", str(CASES), "-x", TRITON_INTERPRET="1", PEERIFY_KERNELS="triton")
    assert "passed" in said
    assert "skipped" not in said


@pytest.mark.parametrize(
    ("kernels", "reason"),
    [
        ("0", "switched off by PEERIFY_KERNELS=0"),
        ("", "not measured yet; PEERIFY_KERNELS=triton switches it on"),
        ("triton", "triton is not installed"),
    ],
)
def test_why_they_are_not_used(kernels: str, reason: str) -> None:
    code = (
        "import sys; sys.modules['triton'] = None; from peerify.modeling import peer_gpu as g; print(g.gpu_obstacle())"
    )
    assert run("-c", code, PEERIFY_KERNELS=kernels) == reason
