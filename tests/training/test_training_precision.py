"""`train.precision: auto` is bf16 where the device has it, and stays what it was when a run goes on elsewhere."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from training_runs import files, recipe, trained  # noqa: F401

from peerify.training import half, stage, state


def on_a_machine(monkeypatch: pytest.MonkeyPatch, *, fast: bool) -> None:
    """With products in bfloat16, or without."""
    monkeypatch.setattr(half, "has_fast_bfloat16", lambda _: fast)


def latest_recipe() -> dict[str, Any]:
    """What the newest checkpoint says it was made with."""
    folder = state.Checkpoints(Path("peer-healed-run"), 1).latest()
    assert folder is not None
    return state.read_state(folder).recipe


@pytest.mark.parametrize(("fast", "precision"), [(True, "bf16"), (False, "no")])
def test_auto_is_what_the_device_is_fast_at(
    here: Path, monkeypatch: pytest.MonkeyPatch, fast: bool, precision: str
) -> None:
    on_a_machine(monkeypatch, fast=fast)
    assert half.with_precision(recipe(precision="auto")).training.precision == precision
    for said in ("no", "fp16"):
        assert half.with_precision(recipe(precision=said)).training.precision == said


def test_bf16_on_a_cpu_without_it_is_warned_of(
    here: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for fast in (True, False):
        on_a_machine(monkeypatch, fast=fast)
        with caplog.at_level(logging.WARNING):
            assert half.with_precision(recipe(precision="bf16")).training.precision == "bf16"
        assert ("has no instructions for it" in caplog.text) != fast


def test_a_run_goes_on_in_the_precision_it_began_in(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = stage.Stage.step

    def step(self: Any) -> float:
        if self.now.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self)

    on_a_machine(monkeypatch, fast=True)
    with monkeypatch.context() as patch:
        patch.setattr(stage.Stage, "step", step)
        assert trained(precision="auto")["stopped"]
    on_a_machine(monkeypatch, fast=False)
    assert trained(precision="auto", resume=True)["steps"] == 10
    assert latest_recipe()["train.precision"] == "bf16"
