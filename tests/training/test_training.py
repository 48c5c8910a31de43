"""Whole runs on a tiny model: what is learnt, what is written, the plan and the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_tokenizer
from click.testing import CliRunner
from training_runs import STAGES, files, log, recipe, trained, weights  # noqa: F401

from peerify import cli
from peerify.evaluation import evaluate_checkpoint
from peerify.training.dry_run import plan_training

# What is learnt, and what is written


def overfit(**stage: Any) -> tuple[float, float]:
    """First and last loss of 40 steps on the same four windows."""
    Path("four.txt").write_text(Path("train.txt").read_text()[:130])
    settings = {"data": {"sources": "four.txt", "context": 32}, "tokens": 128 * 40, "evaluation": None}
    train = {key: stage.pop(key) for key in ("precision", "gradient_checkpointing", "micro_batch_size") if key in stage}
    model = stage.get("model", "peer")
    stage = {"objectives": {"kl": 1}, "optimizer": {"lr": 1e-3}} | {k: v for k, v in stage.items() if k != "model"}
    trained(f"output={model}", stages=[stage], overwrite=True, output="peer-healed", **settings, **train)
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
    "product": {"model": "product", "optimizer": {"lr": 1e-3, "router_scale": 1}},
    "balance": {
        "model": "product",
        "objectives": {"kl": 1, "load_balance": 1e-3, "z_loss": 1e-4},
        "balance_rate": 1e-3,
    },
    "bf16": {"precision": "bf16", "gradient_checkpointing": True},
    "accumulate": {"micro_batch_size": 1},
}


QUICK = ("full", "product")


@pytest.mark.parametrize("way", [way if way in QUICK else pytest.param(way, marks=pytest.mark.slow) for way in WAYS])
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
    measured = evaluate_checkpoint("peer-healed", data="test.txt", context=32, max_tokens=128)
    assert measured["perplexity"] == pytest.approx(perplexities[best], rel=1e-4)


@pytest.mark.parametrize("model", ["peer", "product"])
def test_what_does_not_train_stays_to_the_bit(here: Path, model: str) -> None:
    trained(f"output={model}", stages=[{"train": "peer", "optimizer": {"router_scale": 0}}])
    before, after = weights(model), weights(f"{model}-healed")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    tables = {name for name in before if name.endswith((".pool.u", ".pool.v", ".pool.gate"))}
    assert moved == tables, "not what calibration text told, either"


def test_a_model_with_budgets_trains_at_its_own(here: Path) -> None:
    """What training measures is what the model does at its budget, and the budget stays."""
    converted = json.loads(Path("peer/config.json").read_text())
    result = trained(stages=[{}])
    healed = json.loads(Path("peer-healed/config.json").read_text())
    assert healed["peer_active"] == converted["peer_active"] == 0.5
    assert healed["peer"] == converted["peer"]
    rows = [layers for key, layers in log().items() if key.startswith("layers")]
    assert len(rows) == 10
    assert all(0 < layer["bytes"] < 1 and 0 < layer["used"] <= 1 for layers in rows for layer in layers.values())
    measured = evaluate_checkpoint("peer-healed", data="test.txt", context=32, max_tokens=128, active=[0.5, 1.0])
    assert measured["perplexity"] == pytest.approx(result["perplexity"], rel=1e-4)
    assert measured["budgets"][1]["perplexity"] != pytest.approx(result["perplexity"], rel=1e-6)


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
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, peer_prefill="budget").eval()
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

    from peerify.checkpoint.load import load_for_eval

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

    def push_checkpoint(checkpoint: Path, converted: Path, hub: Any, *, steps: int, **_: Any) -> None:
        assert weights(str(checkpoint)).keys() == weights(str(converted)).keys()
        pushed.append((hub.repo, steps))
        raise PublishError("the Hub is away")

    monkeypatch.setattr("peerify.publishing.push.push_checkpoint", push_checkpoint)
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


# The plan and the command line


@pytest.mark.parametrize("name", ["peer", "product"])
def test_the_plan_counts_what_trains(here: Path, name: str) -> None:
    plan = plan_training(recipe(f"output={name}"))
    real = trained(f"output={name}")
    assert plan["steps"] == real["steps"]
    assert plan["tokens"] == real["tokens"]
    from peerify.checkpoint.load import load_for_eval

    model: Any = load_for_eval(name).model
    assert plan["parameters"] == sum(p.numel() for p in model.parameters())
    counts = {path: p.numel() for path, p in model.named_parameters() if not path.endswith("input_rms")}
    peer = sum(count for path, count in counts.items() if ".mlp." in path)
    assert [stage["trainable"] for stage in plan["stages"]] == [peer, sum(counts.values())]
    size = sum(path.stat().st_size for path in Path(f"{name}-healed-run").rglob("*") if path.is_file())
    assert plan["checkpoint_bytes"] == pytest.approx(size, rel=0.6)
    before = plan_training(recipe("output=not-there-yet", *(["convert.keys=product"] if name == "product" else [])))
    # Without the converted model about the same: the text decides each layer's share, and with it the number of heads.
    assert before["parameters"] == pytest.approx(plan["parameters"], rel=0.02 if name == "product" else 1e-9)
    lora = plan_training(recipe(f"output={name}", stages=[{"train": "peer+lora"}]))["stages"][0]
    from peerify.config.train import StageConfig
    from peerify.training import groups

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
