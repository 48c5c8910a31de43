"""What people read on stderr while they wait: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

PATIENCE_S = 1.0  # work shorter than this shows no progress
LINE_S = 60.0  # between two lines of one stage where there is no terminal
STARTING = "Starting"  # the stage that leaves nothing on the screen


@contextmanager
def progress_on_stderr() -> Iterator[ProgressReport]:
    """A `progress(stage, done, total)` callable for library functions."""
    report = ProgressReport()
    try:
        yield report
    except BaseException:
        report.close(failed=True)
        raise
    report.close()


class ProgressReport:
    """Bars with time left on a terminal; elsewhere a line at a stage's start and end, and one each minute. Nothing for
    short work."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._lock = threading.Lock()
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._stage: str | None = None
        self._started = self._line = 0.0
        self._state = (0, 1)
        self._shown = False
        self._timer: threading.Timer | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Say that `done` of `total` units of `stage` are done; another stage's name ends the one before."""
        with self._lock:
            if stage != self._stage:
                self._finish()
                self._stage, self._started, self._shown = stage, time.monotonic(), False
                # A timer, not a look at the clock in the next call: that call may be minutes away.
                self._timer = threading.Timer(PATIENCE_S, self._appear, [stage])
                self._timer.daemon = True
                self._timer.start()
            self._state = (done, total)
            if self._bars is not None and stage in self._tasks:
                self._bars.update(self._tasks[stage], completed=done, total=total, spent=self._spent())
            elif self._shown and 0 < done < total and time.monotonic() - self._line >= LINE_S:
                self._line = time.monotonic()
                left = timedelta(seconds=round(self._spent() * (total - done) / done))
                self._console.print(f"{stage}: {done:,} of {total:,}, {left} left", markup=False)
            if done >= total:
                self._finish()

    def close(self, failed: bool = False) -> None:
        """End the last stage; its bar stays full, or where it was if the work failed."""
        with self._lock:
            self._finish(failed)
            if self._bars is not None:
                self._bars.stop()
                self._bars = None

    def _appear(self, stage: str) -> None:
        with self._lock:
            if stage != self._stage:
                return
            self._shown, self._line = True, time.monotonic()
            if not self._console.is_terminal:
                self._console.print(f"{stage} …", markup=False)
                return
            if self._bars is None:
                self._bars = Progress(
                    TextColumn("{task.description}", markup=False),
                    BarColumn(),
                    TextColumn("{task.percentage:>3.0f} %"),
                    TimeElapsedColumn(),
                    _TimeLeft(),
                    console=self._console,
                )
                self._bars.start()
            done, total = self._state
            self._tasks[stage] = self._bars.add_task(stage, completed=done, total=total, spent=self._spent())
            self._bars.tasks[-1].start_time = self._started  # rich's clock is time.monotonic, too

    def _spent(self) -> float:
        return time.monotonic() - self._started

    def _finish(self, failed: bool = False) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._stage is not None and self._shown and not self._console.is_terminal and not failed:
            self._console.print(f"{self._stage}: {self._spent():.0f} s", markup=False)
        if self._bars is not None and self._stage in self._tasks and not failed:
            total = self._state[1]
            self._bars.update(self._tasks[self._stage], completed=total, total=total, visible=self._stage != STARTING)
        self._stage = None


class _TimeLeft(ProgressColumn):
    """Time left at the mean speed so far; rich's own column forgets what is older than half a minute."""

    def render(self, task: Task) -> Text:
        if not task.total or not task.completed or task.elapsed is None:
            return Text("")
        left = max(0.0, task.fields["spent"] * task.total / task.completed - task.elapsed)
        return Text(f"{timedelta(seconds=round(left))} left", style="progress.remaining")
