"""The GPU kernels in Triton's interpreter, which must be chosen before triton is imported: a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peerify.modeling import peer_triton

HERE = Path(__file__).parent
CASES = ("gpu_kernel_cases.py", "gpu_gathered_cases.py")


def run(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, timeout=900,
        cwd=HERE.parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def test_all_cases_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    said = run(
        "-m", "pytest", *(str(HERE / name) for name in CASES), "-x", TRITON_INTERPRET="1", PEERIFY_KERNELS="triton"
    )
    assert "passed" in said
    assert "skipped" not in said


def test_they_compile_for_an_h100(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    folders = os.pathsep.join([str(HERE.parent / "helpers"), str(HERE.parents[1])])
    environment = {"PYTHONPATH": folders, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    said = run(str(HERE / "gpu_kernel_compiles.py"), **environment, PEERIFY_KERNELS="triton")
    assert said == "21 kernels"


def test_why_they_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_triton, "enabled", False)
    for value, reason in (
        ("0", "switched off by PEERIFY_KERNELS=0"),
        ("1", "not measured yet; PEERIFY_KERNELS=triton switches it on"),
    ):
        monkeypatch.setenv("PEERIFY_KERNELS", value)
        assert peer_triton.obstacle() == reason
    monkeypatch.setattr(peer_triton, "enabled", True)
    monkeypatch.setattr(peer_triton, "interpreted", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(peer_triton, "_has_triton", lambda: True)
    assert peer_triton.obstacle() == "there is no GPU"
    monkeypatch.setattr(peer_triton, "_has_triton", lambda: False)
    assert peer_triton.obstacle() == "triton is not installed"
