"""The training loop, on Accelerate: one process or many, a stage after the other, from any checkpoint on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from peerify.training import state
from peerify.training.stage import Run, Stage


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended."""

    state: state.RunState
    checkpoint: Path | None
    """The last one written."""
    final_loss: float | None
    stopped: bool
    """By a signal, before the end."""


def run_stages(run: Run, resume_from: Path | None) -> Outcome:
    """Train all stages, or what is left of them after `resume_from`.

    Raises:
        TrainingError: the loss is NaN or infinite, or jumped; names the last good checkpoint.
        CheckpointError: `resume_from` does not fit.
    """
    config = run.config
    steps = config.steps_of_stages()
    now = state.RunState(recipe=run.recipe) if resume_from is None else state.read_state(resume_from)
    if now.position is not None:
        run.windows.seek(now.position)
    checkpoint, first, loss = resume_from, now.step, None
    with _signals() as stop:
        while now.stage < len(config.stages):
            with Stage(run, now, steps[now.stage], checkpoint) as stage:
                while now.step_in_stage < steps[now.stage]:
                    loss = stage.step()
                    run.progress("Training", now.step - first, sum(steps) - first)
                    if run.test_bt is not None and (now.step % config.evaluation.every == 0 or now.step == sum(steps)):
                        stage.evaluate()
                    stopping = _any(run.accelerator, stop.is_set())
                    if now.step_in_stage < steps[now.stage]:
                        if stopping or now.step % config.checkpoints.every == 0:
                            checkpoint = stage.save()
                        if stopping:
                            return Outcome(state=now, checkpoint=checkpoint, final_loss=loss, stopped=True)
                checkpoint = stage.finish()
            if stopping and now.stage < len(config.stages):
                break
    return Outcome(state=now, checkpoint=checkpoint, final_loss=loss, stopped=now.stage < len(config.stages))


def _any(accelerator: Accelerator, flag: bool) -> bool:
    """Whether the flag is set in any process."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum") > 0)


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; a second one ends the process as ever."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(*_: Any) -> None:
        stop.set()
        restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        restore()
