"""What a training run will refuse, found before anything is loaded: by the dry run, by `train` and by `run`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from peerify.checkpoint.atomic import check_target
from peerify.checkpoint.files import MARKER
from peerify.checkpoint.load import usable_device
from peerify.checkpoint.record import read_record
from peerify.config.recipe import Recipe
from peerify.config.train import TrainConfig
from peerify.data import check_source
from peerify.errors import CheckpointError, DataError, OutputError, UsageError
from peerify.reading import local_path
from peerify.training import loggers, state
from peerify.training.footprint import optimizer_bytes
from peerify.training.optimizers import require_package


def check_training(recipe: Recipe) -> None:
    """Whether `recipe.train` can be begun: its texts, its loggers, and the places that it writes.

    Raises:
        UsageError: there is no train section, or a logger is not installed.
        DataError: no text, or one that is not there.
        CheckpointError: peerify.json of the converted model cannot be read.
        OutputError: the result or the checkpoints may not be written where they would lie.
    """
    config = recipe.training
    if not config.data.sources:
        raise DataError("train.data.sources is empty: name a text to train on, such as a .txt file")
    texts = [*(source.path for source in config.data.sources), config.evaluation.data, config.evaluation.test]
    texts += [text for stage in config.stages for text in stage.memory.background]
    for text in texts:
        if text is not None:
            check_source(text)
    loggers.chosen(config.loggers)
    converted = local_path(recipe.output, CheckpointError)
    if (converted / MARKER).exists():
        read_record(converted, CheckpointError)  # goes into the result's record, at the end
    read = [recipe.model, recipe.output, *(text for text in texts if text is not None)]
    # Whether a result that is there may be replaced is for the caller to say; what others put into it may never be.
    check_target(recipe.trained_output, overwrite=True, inputs=read)
    folder = recipe.run_folder
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} exists and is not a folder; set train.output to another place")
    check_target(folder / "step-000000")


def check_start(recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """`check_training`, and that no earlier run or result is lost and that there is one to go on with."""
    target, checkpoints = recipe.trained_output, state.Checkpoints(recipe.run_folder, 1)
    check_training(recipe)
    usable_device(recipe.device)  # a dry run may be for another machine
    for stage in recipe.training.stages:
        require_package(stage.optimizer)
    latest = checkpoints.latest()
    if Path(target).expanduser().exists() and not overwrite:
        raise OutputError(f"{target} exists; set train.output to another place, or pass --overwrite to replace it")
    if resume and latest is None:
        raise UsageError(f"--resume finds no checkpoint in {checkpoints.folder}: leave it out to start")
    if not resume and not overwrite and latest is not None:
        raise UsageError(
            f"{checkpoints.folder} holds the checkpoints of an earlier run: pass --resume to go on with it, or "
            "--overwrite to start anew"
        )


def check_space(config: TrainConfig, model: Any, folder: Path) -> None:
    """Refuse a disk that the checkpoints of `model` will not fit on. Raises OutputError."""
    count = sum(parameter.numel() for parameter in model.parameters())
    state = max(optimizer_bytes(model, stage, count) for stage in config.stages)
    size = 4 * count
    needed = (config.checkpoints.keep + 1) * (size + state) + 2 * size  # the best and the result
    parent = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OutputError(
            f"{folder} will take up to {needed / 1e9:.3g} GB and its disk has {free / 1e9:.3g} GB free; free some "
            "space, lower train.checkpoints.keep, or set train.output to another disk"
        )
