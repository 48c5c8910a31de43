"""Whole runs on a tiny model: kills and resumes, stages, what may go wrong, and the trained folder."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import text_file, tiny_checkpoint, tiny_tokenizer
from click.testing import CliRunner

from peerify import cli
from peerify.errors import CheckpointError, OutputError, PeerifyError, TrainingError, UsageError
from peerify.folder import convert_checkpoint
from peerify.recipe import Recipe
from peerify.training import stage, state
from peerify.training import train as training
from peerify.training.plan import plan_training
from peerify.training.train import train_checkpoint

STAGES = [
    {"train": "peer", "share": 0.4, "objectives": {"layerwise": 1}, "optimizer": {"lr": 1e-3}},
    {"objectives": {"kl": 1, "next_token": 0.2}, "optimizer": {"lr": 1e-3}},
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, the same converted, and text."""
    folder = tmp_path_factory.mktemp("training")
    before = Path.cwd()
    os.chdir(folder)
    try:
        tiny_checkpoint(folder / "dense")
        text_file(folder / "train.txt", 6000)
        text_file(folder / "test.txt", 400)
        options = ["model=dense", "output=peer", "calibration.data=train.txt", "calibration.tokens=512"]
        convert_checkpoint(Recipe.load(None, [*options, "calibration.context=32"]))
    finally:
        os.chdir(before)
    return folder


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


# Kills and resumes


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
def test_sigterm_saves_and_exits_0_and_resume_goes_on(here: Path) -> None:
    recipe(tokens=1280 * 40)
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2])}
    argv = [sys.executable, "-m", "peerify", "train", "r.yaml", "--json"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            path = Path("peer-healed-run/log.jsonl")
            if path.exists() and path.read_text().count("\n") > 3:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    result = json.loads(out)
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
    assert (result["stopped"], result["steps"]) == (True, 5)
    assert signal.getsignal(signal.SIGINT) is handler
    monkeypatch.setattr(stage.Stage, "step", real)
    assert trained(resume=True)["steps"] == 10
    stopped = log()
    trained(overwrite=True)
    assert log() == stopped


# What is learnt, and what is written


def overfit(**stage: Any) -> tuple[float, float]:
    """First and last loss of 40 steps on the same four windows."""
    Path("four.txt").write_text(Path("train.txt").read_text()[:130])
    settings = {"data": {"sources": "four.txt", "context": 32}, "tokens": 128 * 40, "evaluation": None}
    train = {key: stage.pop(key) for key in ("precision", "gradient_checkpointing", "micro_batch_size") if key in stage}
    stage = {"objectives": {"kl": 1}, "optimizer": {"lr": 1e-3}} | stage
    trained(stages=[stage], overwrite=True, **settings, **train)
    losses = [value for key, value in log().items() if key.startswith("loss ")]
    assert len(losses) == 40
    return losses[0], losses[-1]


WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "peer": {"train": "peer"},
    "peer+lora": {"train": "peer+lora"},
    "lisa": {"train": "lisa"},
    "galore": {"optimizer": {"name": "galore", "lr": 3e-3, "rank": 4}},
    "adafactor": {"optimizer": {"name": "adafactor", "lr": 1e-3}},
    "layerwise": {"objectives": {"layerwise": 1}},
    "next_token": {"objectives": {"next_token": 1}, "optimizer": {"lr": 5e-3}},
    "top logits": {"objectives": {"kl": 1, "kl_topk": 20}},
    "balance": {"objectives": {"kl": 1, "load_balance": 1e-3, "z_loss": 1e-4}, "balance_rate": 1e-3},
    "bf16": {"precision": "bf16", "gradient_checkpointing": True},
    "accumulate": {"micro_batch_size": 1},
}


@pytest.mark.parametrize("way", [way if way == "full" else pytest.param(way, marks=pytest.mark.slow) for way in WAYS])
def test_every_way_to_train_lowers_its_loss(here: Path, way: str) -> None:
    first, last = overfit(**WAYS[way])
    assert last < 0.8 * first


def test_the_best_is_written_not_the_last(here: Path) -> None:
    stages = [{"objectives": {"kl": 1}, "optimizer": {"lr": 0.3}}]  # diverges
    result = trained(stages=stages, spike=0.0, evaluation={"data": "test.txt", "tokens": 128, "every": 1})
    perplexities = {int(k.split()[1]): v for k, v in log().items() if k.startswith("eval_perplexity")}
    best = min(perplexities, key=perplexities.__getitem__)
    assert result["best_step"] == best
    assert result["perplexity"] == perplexities[best]
    from peerify.evaluation import evaluate_checkpoint

    measured = evaluate_checkpoint("peer-healed", data="test.txt", context=32, max_tokens=128)
    assert measured["perplexity"] == pytest.approx(perplexities[best], rel=1e-4)


def test_what_does_not_train_stays_to_the_bit(here: Path) -> None:
    trained(stages=[{"train": "peer", "optimizer": {"router_scale": 0}}])
    before, after = weights("peer"), weights("peer-healed")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(".pool." in name for name in moved)


@pytest.mark.slow
def test_accumulated_gradients_are_those_of_the_whole_batch(here: Path) -> None:
    trained()
    whole = {key: value for key, value in log().items() if key.startswith("loss")}
    trained(micro_batch_size=1, overwrite=True)
    parts = {key: value for key, value in log().items() if key.startswith("loss")}
    assert parts == pytest.approx(whole, rel=1e-4)


LOAD_ALONE = """
import sys
from importlib.abc import MetaPathFinder
class Refuse(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "peerify":
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
ids = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
print(torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).exp().item())
"""


@pytest.mark.slow
def test_a_trained_and_merged_model_loads_without_peerify(here: Path) -> None:
    result = trained(stages=[*STAGES[:1], {"train": "peer+lora", "optimizer": {"lr": 5e-3}}])
    ids = torch.tensor(tiny_tokenizer()(Path("test.txt").read_text())["input_ids"][:128]).view(-1, 32)
    torch.save(ids, here / "ids.pt")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD_ALONE, "peer-healed", "ids.pt"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(result["perplexity"], rel=1e-4)
    assert not any("lora" in name for name in weights("peer-healed"))
    assert weights("peer-healed").keys() == weights("peer").keys()
    record = json.loads(Path("peer-healed/peerify.json").read_text())
    assert record["training"]["steps"] == 10
    assert record["training"]["recipe"]["data"]["sources"][0]["path"] == "train.txt"
    assert str(here) not in json.dumps(record)


@pytest.mark.slow
def test_adapters_can_be_kept_beside_the_weights(here: Path) -> None:
    trained(stages=[{"train": "peer+lora", "lora": {"merge": False}, "optimizer": {"lr": 5e-3}}], evaluation=None)
    from peft import PeftModel

    from peerify.checkpoint import load_for_eval

    base = load_for_eval("peer-healed").model
    ids = torch.randint(250, (1, 32))
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(base, "peer-healed/adapter")(input_ids=ids).logits  # type: ignore[arg-type]
    assert not torch.equal(plain, adapted)
    before, after = weights("peer"), weights("peer-healed")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(".mlp." in name for name in moved)


def test_every_nth_checkpoint_is_published_and_a_failure_stops_nothing(
    here: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from peerify.errors import PublishError

    pushed: list[tuple[str, int]] = []

    def push_checkpoint(checkpoint: Path, converted: Path, hub: Any, *, steps: int, progress: Any) -> None:
        assert weights(str(checkpoint)).keys() == weights(str(converted)).keys()
        pushed.append((hub.repo, steps))
        raise PublishError("the Hub is away")

    monkeypatch.setattr("peerify.publishing.push_checkpoint", push_checkpoint)
    trained("hub.repo=ada/peer", "hub.every=2", stages=[{}], evaluation=None)
    assert pushed == [("ada/peer", 6), ("ada/peer", 10)], "of the checkpoints after steps 3, 6, 9 and 10"
    assert "step-000006 was not pushed, training goes on: the Hub is away" in caplog.text


@pytest.mark.parametrize("name", ["tensorboard", "trackio"])
def test_curves_go_to_the_loggers(here: Path, name: Any) -> None:
    pytest.importorskip(name)
    trained(loggers=[name], tokens=256, stages=[{}])
    where = here if name == "tensorboard" else Path(os.environ["HF_HOME"])  # of the tests alone
    found = [path for path in where.rglob("*") if "tfevents" in path.name or path.suffix == ".db"]
    assert found
    assert max(path.stat().st_size for path in found) > 500


# What may go wrong


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
    refused(UsageError, r"train\.stages\.0: lora has no effect with train full", stages=[{"lora": {"rank": 2}}])
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
    monkeypatch.setattr(training.shutil, "disk_usage", lambda path: usage._replace(free=1000))
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
    with pytest.raises(CheckpointError, match="is no checkpoint of this version"):
        trained(resume=True)


# The plan and the command line


def test_the_plan_counts_what_trains(here: Path) -> None:
    plan = plan_training(recipe())
    real = trained()
    assert plan["steps"] == real["steps"]
    assert plan["tokens"] == real["tokens"]
    from peerify.checkpoint import load_for_eval

    model: Any = load_for_eval("peer").model
    assert plan["parameters"] == sum(p.numel() for p in model.parameters())
    counts = {name: p.numel() for name, p in model.named_parameters() if not re.search("rerank_|deviation", name)}
    peer = sum(count for name, count in counts.items() if ".mlp." in name)
    assert [stage["trainable"] for stage in plan["stages"]] == [peer, sum(counts.values())]
    size = sum(path.stat().st_size for path in Path("peer-healed-run").rglob("*") if path.is_file())
    assert plan["checkpoint_bytes"] == pytest.approx(size, rel=0.6)
    before = plan_training(recipe("output=not-there-yet"))
    # Without the converted model about the same: the text decides each layer's share, and with it the router's rank.
    assert before["parameters"] == pytest.approx(plan["parameters"], rel=0.02)
    lora = plan_training(recipe(stages=[{"train": "peer+lora"}]))["stages"][0]
    from peerify.training import groups
    from peerify.training.config import StageConfig

    wrapped = groups.select_trainable(model, StageConfig(train="peer+lora"))
    assert lora["trainable"] == sum(p.numel() for p in wrapped.parameters() if p.requires_grad)


def test_the_commands_print_plans_and_results(here: Path) -> None:
    recipe()
    result = CliRunner().invoke(cli.cli, ["train", "r.yaml", "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "10 steps of 4 x 32" in " ".join(result.stdout.split())
    plan = json.loads(CliRunner().invoke(cli.cli, ["train", "r.yaml", "--dry-run", "--json"]).stdout)
    assert plan["steps"] == 10
    assert not Path("peer-healed-run").exists()
    result = CliRunner().invoke(cli.cli, ["train", "r.yaml", "--set", "train.tokens=256", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert {"output", "steps", "tokens", "final_loss", "perplexity"} <= found.keys()
    assert (found["steps"], found["output"]) == (2, "peer-healed")
    again = CliRunner().invoke(cli.cli, ["train", "r.yaml"])
    assert again.exit_code == 1
    assert again.stderr.startswith("peerify: peer-healed exists")
