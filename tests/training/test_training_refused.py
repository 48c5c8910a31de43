"""What stops a training run, and what it refuses to begin or to go on with."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import files, recipe, trained  # noqa: F401

from peerify.config.recipe import Recipe
from peerify.errors import CheckpointError, OutputError, PeerifyError, TrainingError, UsageError
from peerify.training import stage, state
from peerify.training import train as training
from peerify.training.dry_run import plan_training
from peerify.training.train import train_checkpoint


def test_nan_and_spikes_stop_and_name_the_last_good_checkpoint(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = stage.Stage._backward

    def poisoned(value: float, *at: int) -> Callable[[Any, Any], Any]:
        def backward(self: Any, ids: Any) -> Any:
            sums = real(self, ids)
            return sums * value if self.now.step in at else sums

        return backward

    monkeypatch.setattr(stage.Stage, "_backward", poisoned(math.nan, 7))
    with pytest.raises(
        TrainingError, match=r"the loss is nan in step 8 \(stage 1\); the last good checkpoint is .*-run/"
    ):
        trained()
    monkeypatch.setattr(stage.Stage, "_backward", poisoned(9.0, 21, 24, 25, 26))
    with pytest.raises(
        TrainingError, match=r"the loss jumped to .* in step 27 .*lower train\.stages\.0\.optimizer\.lr"
    ):
        trained(tokens=128 * 30, stages=[{"optimizer": {"lr": 1e-4}}], overwrite=True, evaluation=None)
    assert not Path("peer-healed").exists()
    monkeypatch.setattr(stage.Stage, "_backward", poisoned(math.inf, 1))
    with pytest.raises(TrainingError, match=r"the loss is inf in step 2 .*there is no checkpoint yet"):
        trained(overwrite=True)


def refused(error: type[PeerifyError], message: str, *overrides: str, **settings: Any) -> None:
    before = sorted(str(path) for path in Path().glob("*"))
    with pytest.raises(error, match=message) as caught:
        trained(*overrides, **settings)
    assert "\n" not in str(caught.value)
    after = {str(path) for path in Path().glob("*")} - {"r.yaml"}
    assert after <= set(before) | {"r.yaml"}, "a refusal leaves nothing behind"


def test_bad_recipes_are_refused_in_one_sentence(here: Path) -> None:
    refused(UsageError, r"r\.yaml: unknown key train\.token; did you mean train\.tokens\?", token=3)
    refused(UsageError, r"unknown key train\.stages\.0\.objectives\.kll; did you mean .*objectives\.kl\?",
            stages=[{"objectives": {"kll": 1}}])  # fmt: skip
    refused(UsageError, r"--set: train\.tokens: .*integer.*, not 'many'", "train.tokens=many")
    refused(UsageError, r"train\.stages\.0\.optimizer\.lr: .*greater than 0, not -1", "train.stages.0.optimizer.lr=-1")
    refused(UsageError, "there is no element 7 in a list of 2", "train.stages.7.optimizer.lr=1")
    refused(UsageError, r"train\.stages\.0\.objectives: all of next_token, kl and layerwise are 0",
            stages=[{"objectives": {"load_balance": 1}}])  # fmt: skip
    refused(
        UsageError,
        r"train\.stages\.0\.objectives: kl_topk is about kl",
        stages=[{"objectives": {"next_token": 1, "kl_topk": 4}}],
    )
    refused(UsageError, r"train\.stages\.0: lora has no effect with train peer", stages=[{"lora": {"rank": 2}}])
    refused(UsageError, r"train\.stages\.0: adapters can be kept .* in the last stage only",
            stages=[{"train": "peer+lora", "lora": {"merge": False}}, {}])  # fmt: skip
    refused(UsageError, r"train\.stages\.0: lisa has no effect", stages=[{"lisa": {"every": 2}}])
    refused(UsageError, r"train\.stages\.0: .*router, whose rate is 0",
            stages=[{"objectives": {"kl": 1, "z_loss": 1}, "optimizer": {"router_scale": 0}}])  # fmt: skip
    refused(UsageError, r"train\.batch_size 4 cannot be run 3 at a time", micro_batch_size=3)
    refused(PeerifyError, "train.data.sources is empty", data={"context": 32})
    refused(PeerifyError, "no such text file: gone.txt", "train.data.sources=gone.txt")
    refused(PeerifyError, "no such text file: gone.txt", "train.evaluation.data=gone.txt")
    refused(UsageError, "a context of 128 tokens is longer than the model's 64", "train.data.context=128")
    refused(UsageError, "no PEER layer: convert it first", "output=dense")
    if not torch.cuda.is_available():  # it trained on the CPU, silently
        refused(UsageError, r"device 'cuda' cannot be used", "device=cuda")
    refused(CheckpointError, "nowhere: no such file|nowhere", "output=./nowhere")
    refused(CheckpointError, "peer is already a PEER model", "model=peer")
    refused(UsageError, "--resume finds no checkpoint in peer-healed-run", resume=True)
    with pytest.raises(UsageError, match="the recipe has no train section: add `train:`"):
        train_checkpoint(Recipe.load(None, ["model=dense", "output=peer"]))


def test_loggers_that_are_missing_are_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peerify.training.loggers._installed", lambda package: False)
    refused(
        UsageError,
        r"train.loggers names wandb, which is not installed: pip install 'peerify\[wandb\]'",
        loggers=["wandb"],
    )


def test_earlier_runs_and_results_are_not_lost(here: Path) -> None:
    trained()
    with pytest.raises(OutputError, match=r"peer-healed exists; set train\.output"):
        trained()
    shutil.rmtree("peer-healed")
    with pytest.raises(UsageError, match=r"peer-healed-run holds the checkpoints of an earlier run: pass --resume"):
        trained()
    with pytest.raises(
        UsageError, match=r"was made with train\.stages\.1\.optimizer\.lr 0\.001, and the recipe says 0\.002"
    ):
        trained("train.stages.1.optimizer.lr=0.002", resume=True)
    trained("train.checkpoints.keep=1", resume=True)  # does not change what is computed
    assert Path("peer-healed/model.safetensors").exists()


def test_a_disk_that_is_too_small_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match=r"peer-healed-run will take up to .* GB"):
        plan_training(recipe())
    refused(OutputError, r"peer-healed-run will take up to .* GB and its disk has 1e-06 GB free; free some space")


def test_damaged_checkpoints_are_named(here: Path) -> None:
    trained()
    shutil.rmtree("peer-healed")
    latest = state.Checkpoints(Path("peer-healed-run"), 2).latest()
    assert latest is not None
    (latest / "model.safetensors").write_bytes(b"rubbish")
    Path("peer-healed-run/best/model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read .*; remove "):
        trained(resume=True)
    (latest / "run.json").write_text("{}x")
    with pytest.raises(CheckpointError, match=r"run\.json is not valid JSON .*; remove peer-healed-run/step-"):
        trained(resume=True)
    (latest / "run.json").write_text('{"stage": "first"}')
    with pytest.raises(CheckpointError, match=r"is no checkpoint of this version \(stage: "):
        trained(resume=True)


class Evil:
    """Runs when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def test_an_optimizer_state_from_a_stranger_runs_nothing(here: Path) -> None:
    path = here / "optimizer.pt"
    for content in (Evil(), {"a": Evil()}, {"a": 5}, [1], {5: {}}, {"a": {"step": torch.tensor(float("nan"))}}):
        torch.save(content, path)
        with pytest.raises(
            CheckpointError, match=r"optimizer\.pt .*; .*remove .* to go on from the checkpoint"
        ) as caught:
            state.read_optimizer(here)
        assert "weights_only" not in str(caught.value), "torch advises to load it unsafely"
        assert "\n" not in str(caught.value)
    assert not Path("ran").exists()


def test_what_others_put_among_the_checkpoints_stays(here: Path, tmp_path: Path) -> None:
    run = Path("peer-healed-run")
    for name in ("step-000001", "best"):
        (run / name).mkdir(parents=True)
        (run / name / "notes.txt").write_text("mine")
    (run / "step-000007").write_text("a file")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "peerify.json").write_text('{"checkpoint": 9}')
    (run / "step-000009").symlink_to(tmp_path / "elsewhere")
    checkpoints = state.Checkpoints(run, 1)
    assert checkpoints.latest() is None
    checkpoints.clear()
    checkpoints.save(state.RunState(step=12), {}, None)
    checkpoints.save(state.RunState(step=13), {}, None)
    assert sorted(path.name for path in run.iterdir()) == [
        *("best", "step-000001", "step-000007", "step-000009", "step-000013")
    ]
    assert (tmp_path / "elsewhere" / "peerify.json").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.data.sources=[]"], "train.data.sources is empty"),
        (["train.data.sources=gone.txt"], "no such text file: gone.txt"),
        (["train.data.sources=[train.txt, 'a b']"], "no such text file, and not the name of a Hub dataset"),
        (["train.evaluation.data=gone.txt"], "no such text file: gone.txt"),
        (["train.evaluation.test=gone.txt"], "no such text file: gone.txt"),
        (["train.output=train.txt"], "train.txt exists and is not a folder"),
        (["train.output=train.txt/healed"], "train.txt/healed cannot be written: .*train.txt is not a folder"),
        (["train.output=~nosuchuser/x"], "~nosuchuser/x.* is not a usable path"),
        (["train.output=."], "working directory"),
        (["train.output=dense"], "dense exists and is not a folder"),
        (["train.data.context=128"], "a context of 128 tokens is longer than the model's 64"),
        (["output=dense", "train.output=x"], "no PEER layer: convert it first"),
    ],
)
def test_the_dry_run_and_the_run_refuse_the_same_and_the_run_at_once(
    here: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str
) -> None:
    with pytest.raises(PeerifyError, match=message):
        plan_training(recipe(*overrides))
    if not message.startswith(("no PEER", "a context")):  # which only the model can tell
        monkeypatch.setattr(training, "load_for_eval", lambda *_, **__: pytest.fail("it loaded the model first"))
    with pytest.raises(PeerifyError, match=message):
        trained(*overrides)


def test_a_place_that_may_not_be_written_is_refused_before_the_training(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root every place may be written, so the answer of the system is made up."""
    access = os.access
    Path("locked").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked" and access(path, mode))
    for act in (lambda: plan_training(recipe("train.output=locked/x")), lambda: trained("train.output=locked/x")):
        with pytest.raises(OutputError, match=r"locked/x cannot be written: .*locked may not be written"):
            act()
