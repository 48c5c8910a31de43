"""A training run that was killed or interrupted goes on as if nothing had happened."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import STAGES, files, log, recipe, trained, weights  # noqa: F401

from peerify import cli
from peerify.training import stage, state
from peerify.training import train as training


def die(work: Callable[[], Any]) -> None:
    """Run `work` in a child that kills itself, and see that it did."""

    def child() -> None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        work()
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def kill_self(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL in the middle of steps, while a checkpoint is written, between stages, and while the result is."""
    settings: dict[str, Any] = {"stages": [*STAGES, {"train": "peer+lora", "lora": {"dropout": 0.3}}]}
    trained("train.output=whole", **settings)
    expected = log("whole")
    assert len([key for key in expected if key.startswith("loss ")]) == 10

    def dying_step(at: int) -> None:
        real = stage.Stage._backward
        monkeypatch.setattr(
            stage.Stage, "_backward", lambda self, ids: kill_self() if self.now.step == at else real(self, ids)
        )
        trained("train.output=killed", resume=at > 4, **settings)

    def dying_write(name: str, count: int) -> None:
        """Die at the `count`-th time that a file is written, half of it there."""
        real, calls = state.save_file, []

        def write(tensors: Any, path: Path, **options: Any) -> None:
            calls.append(path)
            if len(calls) == count:
                Path(path).write_bytes(b"half")
                kill_self()
            real(tensors, path, **options)

        monkeypatch.setattr(state, "save_file", write)
        trained("train.output=killed", resume=True, **settings)

    die(lambda: dying_step(4))
    die(lambda: dying_step(5))  # in the second stage: the first ended after step 2 or 4
    die(lambda: dying_write("checkpoint", 2))
    die(lambda: dying_step(9))
    monkeypatch.setattr(training, "_write", kill_self)
    die(lambda: trained("train.output=killed", resume=True, **settings))
    monkeypatch.undo()
    os.chdir(here)
    assert not Path("killed").exists()
    trained("train.output=killed", resume=True, **settings)
    assert log("killed") == expected, "to the last digit"
    a, b = weights("whole"), weights("killed")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not [path for path in Path("killed-run").iterdir() if path.name.startswith(".")], "nothing is left over"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "command", "said"),
    [
        (signal.SIGTERM, "train", r"peerify: terminated; the same command with --resume goes on after step \d+\n"),
        (signal.SIGINT, "run", r"peerify: interrupted; the same command goes on with training after step \d+\n"),
    ],
)
def test_a_signal_saves_and_says_so_and_is_no_success(here: Path, number: int, command: str, said: str) -> None:
    """So that `peerify train r.yaml && peerify push ...` does not go on."""
    recipe("convert.refine_steps=0", tokens=1280 * 40)
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2])}
    argv = [sys.executable, "-m", "peerify", command, "r.yaml", "--json"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            path = Path("peer-healed-run/log.jsonl")
            if path.exists() and path.read_text().count("\n") > 3:
                break
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert re.fullmatch(said, err.splitlines(keepends=True)[-1])
    result = json.loads(out) if command == "train" else json.loads(out)["train"]
    assert result["stopped"] is True
    assert result["output"] is None
    assert not Path("peer-healed").exists()
    latest = state.Checkpoints(Path("peer-healed-run"), 2).latest()
    assert latest is not None
    assert latest.name == f"step-{result['steps']:06d}"
    # The rest by itself, as a shorter run would be another recipe.
    assert state.read_state(latest).position is not None


def test_an_interrupt_stops_after_the_step(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = stage.Stage.step

    def step(self: Any) -> float:
        if self.now.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self)

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(stage.Stage, "step", step)
    result = trained()
    assert (result["stopped"], result["signal"], result["steps"]) == (True, signal.SIGINT, 5)
    assert signal.getsignal(signal.SIGINT) is handler
    monkeypatch.setattr(stage.Stage, "step", real)
    assert trained(resume=True)["steps"] == 10
    stopped = log()
    trained(overwrite=True)
    assert log() == stopped


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_last_step_stops_before_the_result(
    here: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """`train && push` must not go on because the signal came a moment late; --resume only writes the result."""
    real = stage.Stage.finish

    def finish(self: Any) -> Path:
        if self.now.step == 10:
            os.kill(os.getpid(), number)
        return real(self)

    monkeypatch.setattr(stage.Stage, "finish", finish)
    result = trained()
    assert (result["signal"], result["steps"], result["output"]) == (number, 10, None)
    assert not Path("peer-healed").exists()
    monkeypatch.setattr(stage.Stage, "step", lambda _: pytest.fail("nothing is left to train"))
    assert trained(resume=True)["output"] == "peer-healed"


def test_a_second_interrupt_ends_at_once(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = stage.Stage.step

    def step(self: Any) -> float:
        if self.now.step == 4:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return real(self)

    monkeypatch.setattr(stage.Stage, "step", step)
    with pytest.raises(KeyboardInterrupt):
        trained()
    monkeypatch.setattr(stage.Stage, "step", real)
    assert trained(resume=True)["steps"] == 10, "from the checkpoint after step 4"


def test_a_thread_trains_without_handlers(here: Path) -> None:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(trained()))
    thread.start()
    thread.join(120)
    assert results[0]["steps"] == 10
    assert results[0]["stopped"] is False


def test_a_signal_that_a_background_job_ignores_stays_ignored(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = stage.Stage.step
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)

    def step(self: Any) -> float:
        signal.raise_signal(signal.SIGINT)
        return real(self)

    monkeypatch.setattr(stage.Stage, "step", step)
    try:
        assert trained()["stopped"] is False
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
