"""Two processes with gloo: the losses of one, and checkpoints that go from two to one and back."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import text_file, tiny_checkpoint
from safetensors.torch import load_file

from peerify import cli
from peerify.config.recipe import Recipe
from peerify.conversion.checkpoint import convert_checkpoint
from peerify.conversion.growth_checkpoint import grow_checkpoint

ROOT = Path(cli.__file__).parents[2]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny converted model, a recipe with two stages, and what one process makes of it."""
    folder = tmp_path_factory.mktemp("processes")
    tiny_checkpoint(folder / "dense")
    for name, length in (("train.txt", 6000), ("test.txt", 500)):
        text_file(folder / name, length)
    settings = {
        "model": str(folder / "dense"),
        "output": str(folder / "peer"),
        "calibration": {"data": str(folder / "train.txt"), "tokens": 512, "context": 32},
        "train": {
            "data": {"sources": str(folder / "train.txt"), "context": 32},
            "tokens": 1280,
            "micro_batch_size": 1,
            "evaluation": {"data": str(folder / "test.txt"), "tokens": 96, "every": 4},
            "checkpoints": {"every": 3, "keep": 9},
            "log_every": 1,
            "loggers": [],
            "stages": [
                {"share": 0.5, "train": "peer", "objectives": {"layerwise": 1}},
                {"train": "full", "objectives": {"kl": 1, "next_token": 0.3}},
            ],
        },
    }
    (folder / "r.yaml").write_text(yaml.safe_dump(settings))
    convert_checkpoint(Recipe.load(folder / "r.yaml"))
    train(folder, "one")
    return folder


def train(folder: Path, kind: str, *more: str, name: str | None = None) -> None:
    """`peerify train` in one process, two with DDP (torchrun), or two with FSDP2 (accelerate launch)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    start = {
        "one": [],
        "ddp": ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", port],
        "fsdp2": [
            *("accelerate.commands.launch", "--config_file", str(ROOT / "recipes/accelerate/fsdp2-cpu.yaml")),
            *("--main_process_port", port),
        ],
    }[kind]
    argv = [sys.executable, *(["-m", *start] if start else []), "-m", "peerify", "train", "r.yaml"]
    argv += ["--set", f"train.output={name or kind}", "--json", *more]
    settings = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, cwd=folder, env=settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["steps"] == 10, "printed once, by the main process"


def losses(folder: Path, name: str) -> dict[str, float]:
    rows = [json.loads(line) for line in (folder / f"{name}-run" / "log.jsonl").read_text().splitlines()]
    return {f"{key} {row['step']}": row[key] for row in rows for key in ("loss", "eval_perplexity") if key in row}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_do_what_one_does(here: Path, kind: str) -> None:
    train(here, kind)
    assert len(losses(here, "one")) == 13
    assert losses(here, kind) == pytest.approx(losses(here, "one"), rel=1e-4, abs=1e-4)


@pytest.mark.slow
def test_two_processes_teach_a_pool_that_layers_share(here: Path) -> None:
    grow = ["grow.num_experts=64", "grow.num_heads=2", "grow.topk=4", "grow.layers=0,2", "grow.share_pool=true"]
    places = [f"model={here / 'peer'}", f"output={here / 'grown'}"]
    grow_checkpoint(Recipe.load(here / "r.yaml", [*places, *grow]))
    for kind in ("one", "ddp", "fsdp2"):
        train(here, kind, "--set", f"output={here / 'grown'}", name=f"grown-{kind}")
    assert losses(here, "grown-one") != losses(here, "one")
    for kind in ("ddp", "fsdp2"):
        assert losses(here, f"grown-{kind}") == pytest.approx(losses(here, "grown-one"), rel=1e-4, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rowwise_adagrad", "sgd"])
def test_two_processes_teach_the_rows_that_either_retrieved(here: Path, name: str) -> None:
    grow = ["grow.num_experts=4096", "grow.num_heads=2", "grow.topk=4", "grow.layers=0,2", "grow.share_pool=true"]
    grown = f"output={here / f'grown-{name}'}"
    grow_checkpoint(Recipe.load(here / "r.yaml", [f"model={here / 'peer'}", grown, *grow]))
    rows = [f"train.stages.{number}.optimizer.{key}" for number in (0, 1) for key in (f"tables={name}", "lr=0.01")]
    rows.append("train.usage_tokens=128")
    for kind in ("one", "ddp"):
        train(here, kind, *(part for key in (grown, *rows) for part in ("--set", key)), name=f"{name}-{kind}")
    assert losses(here, f"{name}-ddp") == pytest.approx(losses(here, f"{name}-one"), rel=1e-4, abs=1e-4)
    first, second = (
        next(json.loads(line)["use"] for line in path.read_text().splitlines() if '"use"' in line)
        for path in (here / f"{name}-{kind}-run/log.jsonl" for kind in ("one", "ddp"))
    )
    assert first == second, "counted over both, in the first step"
    one, two = (load_file(here / f"{name}-{kind}" / "model.safetensors") for kind in ("one", "ddp"))
    table = "model.layers.0.mlp.memory.pool.v"
    assert 0 < one[table].any(1).sum() < 4096
    assert torch.equal(one[table].any(1), two[table].any(1))
    torch.testing.assert_close(two[table], one[table], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [("fsdp2", "one"), ("one", "fsdp2")])
@pytest.mark.parametrize("step", [3, 5, 9])
def test_a_checkpoint_of_two_goes_on_in_one_and_the_reverse(here: Path, first: str, then: str, step: int) -> None:
    """In the first stage, at its end, and in the second."""
    if not (here / f"{first}-run").exists():
        train(here, first)
    name = f"{first}-{then}-{step}"
    shutil.copytree(here / f"{first}-run", here / f"{name}-run")
    for checkpoint in (here / f"{name}-run").glob("step-*"):
        if int(checkpoint.name[5:]) > step:
            shutil.rmtree(checkpoint)
    train(here, then, "--resume", name=name)
    assert losses(here, name) == pytest.approx(losses(here, "one"), rel=1e-4, abs=1e-4)
