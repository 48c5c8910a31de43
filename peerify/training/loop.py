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
    signal: int
    """That stopped the run before its end; 0: none did."""


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
    checkpoint, first, stopped_by = resume_from, now.step, 0
    with _signals() as caught:
        while now.stage < len(config.stages):
            with Stage(run, now, steps[now.stage], checkpoint) as stage:
                while now.step_in_stage < steps[now.stage]:
                    stage.step()
                    run.progress("Training", now.step - first, sum(steps) - first)
                    if run.test_bt is not None and (now.step % config.evaluation.every == 0 or now.step == sum(steps)):
                        stage.evaluate()
                    stopped_by = _in_any(run.accelerator, max(caught, default=0))
                    if now.step_in_stage < steps[now.stage]:
                        if stopped_by or now.step % config.checkpoints.every == 0:
                            checkpoint = stage.save()
                        if stopped_by:
                            return Outcome(state=now, checkpoint=checkpoint, signal=stopped_by)
                checkpoint = stage.finish()
                # A signal in the last step stops the run, too: what comes next may be hours of writing and pushing.
                stopped_by = stopped_by or _in_any(run.accelerator, max(caught, default=0))
            if stopped_by:
                return Outcome(state=now, checkpoint=checkpoint, signal=stopped_by)
    return Outcome(state=now, checkpoint=checkpoint, signal=0)


def _in_any(accelerator: Accelerator, number: int) -> int:
    """The signal that some process caught; every process must call it."""
    if accelerator.num_processes == 1:
        return number
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())


@contextmanager
def _signals() -> Iterator[list[int]]:
    """A list to which SIGINT and SIGTERM add their number; a second signal ends the process as ever."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # What a background job ignores it goes on to ignore; None is a handler that Python cannot put back.
    before = {number: handler for number, handler in handlers.items() if handler not in (None, signal.SIG_IGN)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _: Any) -> None:
        caught.append(number)
        restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield caught
    finally:
        restore()
