"""Seconds of a training step, of a converted model beside the dense one it came from.

Both take the step of `stage.py`, with the objectives of the recipes: half next token, and the divergence from the dense
model, which runs beside them as the teacher. One takes its step after the other, on the same random tokens, so that
what else the machine does touches both alike.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch

from peerify.checkpoint.load import load_for_eval
from peerify.config.train import DataConfig, ObjectiveConfig, OptimizerConfig, StageConfig, TrainConfig
from peerify.errors import UsageError
from peerify.modules import peer_layers
from peerify.progress import Progress, teller
from peerify.training.data import Windows
from peerify.training.distribution import accelerator_on, forget_processes
from peerify.training.malloc import keep_freed_memory
from peerify.training.stage import Run, Stage
from peerify.training.state import Checkpoints, RunState

Trains = Literal["peer", "full"]
WINDOWS = 2  # of a step, as in the recipes for small models
PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}  # weights and optimizer stay in float32
OBJECTIVES = ObjectiveConfig(next_token=0.5, kl=1.0)
STAGE = "Measuring steps of training"


def check_step(context: int, dtype: str, device: str) -> None:
    """Raise UsageError where no step can be taken."""
    if dtype == "float16" and torch.device(device).type == "cpu":
        raise UsageError("training in float16 takes a GPU: measure it with --dtype bfloat16 or float32")
    if context < 2:
        raise UsageError("training predicts the second token of a window and those after it: give --prompt 2 or more")


def step_seconds(
    source: str,
    against: str,
    *,
    shares: Sequence[float | None],
    trains: Trains,
    context: int,
    repeats: int,
    dtype: str = "float32",
    device: str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> tuple[int, list[float], list[list[float]]]:
    """Tokens of a step, and seconds of each of `repeats` steps: the dense model's, and at each budget.

    Args:
        source, against: the converted model and the dense one.
        shares: budgets; None: as the model is.
        trains: of the dense model either what was converted trains, or everything.
        context: tokens of a window, of which a step has WINDOWS.
        dtype: what is computed in; weights and optimizer stay in float32.

    Raises:
        UsageError: see `check_step`.
        CheckpointError: see `load_for_eval`.
        TrainingError: the loss or its gradient is not finite.
    """
    check_step(context, dtype, device)
    tell = teller(progress)
    converted: list[str] = []  # where the parameters of converted layers are

    def load_dense() -> Any:
        return load_for_eval(against, trust_remote_code=trust_remote_code).model

    def load_converted() -> Any:
        model: Any = load_for_eval(source, revision=revision, trust_remote_code=trust_remote_code).model
        converted.extend(path + "." for path in (*peer_layers(model), *model.config.peer["identities"]))
        return model

    def select_dense(model: Any, stage: StageConfig) -> Any:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(stage.train == "full" or name.startswith(tuple(converted)))
        return model

    accelerator = accelerator_on(device, PRECISION[dtype])
    if accelerator.device.type == "cpu":
        keep_freed_memory()  # as `peerify train` does
    teacher = load_dense().requires_grad_(False).to(accelerator.device)
    ids_bt = torch.randint(teacher.config.get_text_config().vocab_size, (WINDOWS, context)).numpy()
    ours: list[list[float]] = [[] for _ in shares]
    dense: list[float] = []
    try:
        with tempfile.TemporaryDirectory() as nowhere, ExitStack() as stages:
            run: dict[str, Any] = {
                "config": _config(trains, context),
                "accelerator": accelerator,
                "teacher": teacher,
                "windows": cast(Windows, _Same(ids_bt)),
                "test_bt": None,
                "checkpoints": Checkpoints(Path(nowhere), 1),
                "log": None,
                "progress": tell,
                "publish": None,
                "recipe": {},
            }
            # The converted one first: it tells which parameters of the dense one train.
            made = Run(make_model=load_converted, **run), Run(make_model=load_dense, select=select_dense, **run)
            peer, beside = (stages.enter_context(Stage(each, RunState(), 2**31, None)) for each in made)
            for number in range(repeats + 1):
                tell(STAGE, number, repeats + 1)
                seconds = [_seconds(beside)]
                for share in shares:
                    if share is not None:
                        peer.unwrapped.set_active(share)
                    seconds.append(_seconds(peer))
                if number:  # the first one makes the optimizer's state
                    for of_arm, taken in zip((dense, *ours), seconds, strict=True):
                        of_arm.append(taken)
            tell(STAGE, repeats + 1, repeats + 1)
    finally:
        forget_processes()
    return ids_bt.size, dense, ours


def _config(trains: Trains, context: int) -> TrainConfig:
    """Steps as recipes take them, at a rate at which weights stay what the budgets were measured on."""
    optimizer = OptimizerConfig(lr=1e-6)
    stage = StageConfig(train=trains, objectives=OBJECTIVES, optimizer=optimizer, schedule="constant", warmup=0)
    data = DataConfig(context=context)
    return TrainConfig(batch_size=WINDOWS, data=data, stages=[stage], spike=0, log_every=2**31)


def _seconds(stage: Stage) -> float:
    device = stage.run.accelerator.device
    start = time.perf_counter()
    stage.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


class _Same:
    """The same windows for every step."""

    def __init__(self, ids_bt: np.ndarray) -> None:
        self.ids_bt = ids_bt

    def block(self, count: int) -> np.ndarray:
        return self.ids_bt[:count]

    def position(self) -> None:
        return None
