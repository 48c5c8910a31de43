"""Whole training runs on a tiny model: its files, a recipe of ten steps, and what a run leaves."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import text_file, tiny_checkpoint

from peerify.config.recipe import Recipe
from peerify.conversion.checkpoint import convert_checkpoint
from peerify.conversion.growth_checkpoint import grow_checkpoint
from peerify.training import state
from peerify.training.train import train_checkpoint

STAGES = [
    {"train": "peer", "share": 0.4, "objectives": {"layerwise": 1}, "optimizer": {"lr": 1e-3, "router_scale": 1}},
    {"train": "full", "objectives": {"kl": 1, "next_token": 0.2}, "optimizer": {"lr": 1e-3, "router_scale": 1}},
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, the same converted to layers with budgets (peer) and with product keys (product), and text."""
    folder = tmp_path_factory.mktemp("training")
    before = Path.cwd()
    os.chdir(folder)
    try:
        tiny_checkpoint(folder / "dense")
        text_file(folder / "train.txt", 6000)
        text_file(folder / "test.txt", 400)
        options = ["model=dense", "calibration.data=train.txt", "calibration.tokens=512", "calibration.context=32"]
        convert_checkpoint(Recipe.load(None, [*options, "output=peer"]))
        convert_checkpoint(Recipe.load(None, [*options, "output=product", "convert.keys=product"]))
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(scope="module")
def grown(files: Path) -> Path:
    """A folder `grown` beside them: two layers share a pool with more experts than ten steps find."""
    options = ["calibration.data=train.txt", "calibration.tokens=512", "calibration.context=32"]
    options += ["grow.num_experts=10000", "grow.num_heads=2", "grow.topk=4", "grow.layers=0,2", "grow.share_pool=true"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(files)
        grow_checkpoint(Recipe.load(None, ["model=peer", "output=grown", *options]))
    return files / "grown"


def recipe(*overrides: str, stages: list[dict[str, Any]] | None = None, **train: Any) -> Recipe:
    """Ten steps of 4 x 32 tokens, a line of the log for each."""
    settings = {
        "data": {"sources": "train.txt", "context": 32},
        "tokens": 1280,
        "evaluation": {"data": "test.txt", "tokens": 128, "every": 4},
        "checkpoints": {"every": 3},
        "log_every": 1,
        "stages": stages or STAGES,
        "loggers": [],
        **train,
    }
    Path("r.yaml").write_text(yaml.safe_dump({"model": "dense", "output": "peer", "train": settings}))
    return Recipe.load("r.yaml", overrides)


def trained(*overrides: str, resume: bool = False, overwrite: bool = False, **settings: Any) -> dict[str, Any]:
    result = train_checkpoint(recipe(*overrides, **settings), resume=resume, overwrite=overwrite)
    assert result is not None
    return result


def log(output: str = "peer-healed") -> dict[str, Any]:
    """Key of a row and step -> what depends on nothing but the computation."""
    rows = [json.loads(line) for line in Path(f"{output}-run/log.jsonl").read_text().splitlines()]
    return {
        f"{name} {row['step']}": value
        for row in rows
        for name, value in row.items()
        if name not in ("tokens_per_s", "memory_mb", "step")
    }


def weights(folder: str) -> dict[str, torch.Tensor]:
    return state.read_weights(Path(folder))
