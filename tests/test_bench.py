"""Speed: what is measured, how it is put together, and that models are left as they were. No test asserts a time."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_checkpoint, tiny_model
from command_line import run

from peerify.bench import WITHOUT, _compared, _limited, _taking, kernel_status
from peerify.checkpoint.load import load_for_eval
from peerify.config.peer import PeerConfig
from peerify.config.recipe import Recipe
from peerify.conversion.model import convert
from peerify.modeling import peer_cpu, peer_kernels, peer_triton
from peerify.modules import peer_layers
from peerify.training import speed


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dense: a model; peer: the same one converted; other: converted with product keys."""
    here = tmp_path_factory.mktemp("bench")
    tiny_checkpoint(here / "dense")
    for name, keys in (("peer", "copies"), ("other", "product")):
        model: Any = load_for_eval(here / "dense").model
        convert(model, PeerConfig(active=0.6, keys=keys), torch.randint(3, 128, (8, 32)))  # type: ignore[arg-type]
        model.save_pretrained(here / name)
    return here


def test_bench_measures_every_batch_and_budget(folders: Path) -> None:
    asked = ["bench", str(folders / "peer"), "--against", str(folders / "dense"), "--active", "0.8,1", "--batch", "2,1"]
    done = run(*asked, "--prompt", "24", "--new", "3", "--repeats", "2", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [(row["batch"], row["active"]) for row in found["decode"]] == [(2, 0.8), (2, 1.0), (1, 0.8), (1, 1.0)]
    assert [(row["tokens"], row["active"]) for row in found["prefill"]] == [(24, 0.8), (24, 1.0)]
    for row in found["decode"] + found["prefill"]:
        low, high = row["spread"]
        assert 0 < low <= row["ratio"] <= high
        assert row["dense"] > 0
    for row in found["decode"]:
        assert row["limit"] >= 1
        assert row["of_limit"] == pytest.approx(row["ratio"] / row["limit"])
    for row in found["prefill"]:
        assert row["first_token_s"] == pytest.approx(24 / row["converted"])
        assert row["dense_first_token_s"] == pytest.approx(24 / row["dense"])
    assert found["train"] == []
    dense = load_for_eval(folders / "dense").model
    weights = sum(each.nbytes for each in (*dense.parameters(), *dense.buffers()))
    assert found["memory"]["dense"] == weights < found["memory"]["converted"]
    peak = found["peak_rss_mb"]
    assert peak is None or 1e6 * peak > weights
    table = run(*asked, "--prompt", "24", "--new", "2", "--repeats", "1").stdout
    assert ("the process held" in table) == (peak is not None)
    assert "read a prompt" in table
    assert re.search(r"^first token of a prompt: \S+ s dense, \S+ s at 0\.8, \S+ s at 1$", table, re.MULTILINE)
    assert {len(line) for line in table.splitlines() if "×" in line} <= {*range(60, 81)}


def test_figures_of_a_row() -> None:
    """By hand: halves of the converted layers' time, which is 6 of 10 seconds."""
    dense = [10.0, 10.0, 10.0]
    row = _limited(_compared(dense, [5.0, 8.0, 20.0], 0.5, 30), dense, [4.0, 4.0, 9.0])
    assert (row["dense"], row["converted"], row["ratio"]) == pytest.approx((3.0, 3.75, 1.25))
    assert row["spread"] == pytest.approx([0.5, 2.0])
    assert row["limit"] == pytest.approx(10 / 7)
    assert row["of_limit"] == pytest.approx(1.25 * 0.7)
    assert _limited(row, dense, [11.0, 11.0, 11.0])["limit"] == 1, "noise"


def test_layers_are_left_out_and_come_back(folders: Path, seed: int) -> None:
    dense: Any = load_for_eval(folders / "dense").model
    converted: Any = load_for_eval(folders / "peer").model
    ids = torch.randint(3, 200, (1, 9))
    with torch.no_grad():
        before = dense(ids).logits
        with _taking(WITHOUT, dense, converted, peer_layers(converted), []) as model:
            assert not torch.allclose(model(ids).logits, before)
            x = torch.randn(1, 2, dense.config.hidden_size)
            assert model.model.layers[0].mlp(x) is x
        assert torch.equal(dense(ids).logits, before)


def test_what_cannot_be_compared(folders: Path) -> None:
    for asked, reason in (
        ([str(folders / "dense")], "is a dense model: bench compares a converted one with it"),
        ([str(folders / "peer"), "--active", "0.01"], "--active 0.01: give shares of"),
        ([str(folders / "other"), "--active", "0.5"], "this one has no budgets"),
        ([str(folders / "peer"), "--prompt", "100000"], "more than the model's"),
        ([str(folders / "peer"), "--batch", "1,0"], "1,0 is no list of counts"),
    ):
        done = run("bench", *asked, "--against", str(folders / "dense"))
        assert done.exit_code == 2
        assert reason in done.stderr
    done = run("bench", str(folders / "other"), "--against", str(folders / "dense"), "--new", "2", "--repeats", "1",
               "--batch", "1", "--prompt", "8")  # fmt: skip
    assert "The kernel for few tokens is not used: the layers have no budgets" in done.stdout


def test_kernels_are_accounted_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    convert(model, PeerConfig(active=0.6), torch.randint(3, 128, (8, 32)))
    pools = [layer.pool for layer in peer_layers(model).values()]
    for pool in pools:
        pool.misfit = None
    assert kernel_status(model) == peer_cpu.obstacle()
    assert kernel_status(model, "cuda:0") == peer_triton.obstacle()
    assert kernel_status(model, "mps") == "there is none for mps"
    if peer_cpu.obstacle() is None:
        pools[0].misfit = "it is odd"
        assert kernel_status(model) == f"1 of {len(pools)} layers: it is odd"
    monkeypatch.setattr(peer_kernels, "enabled", False)
    found = json.loads(run("env", "--json").stdout)
    assert found["kernels"] == {
        "cpu, few tokens": "switched off by PEERIFY_KERNELS=0",
        "gpu, few tokens": "not measured yet; PEERIFY_KERNELS=triton switches it on",
    }
    assert found["packages"]["torch"] == torch.__version__
    assert "not used: switched off" in run("env").stdout


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_of_training_beside_the_dense_model(folders: Path, tmp_path: Path, dtype: str) -> None:
    asked = ["bench", str(folders / "peer"), "--against", str(folders / "dense"), "--active", "0.8,1", "--batch", "1"]
    asked += ["--prompt", "16", "--new", "2", "--repeats", "2", "--dtype", dtype, "--train"]
    done = run(*asked, "--train-full", "--json")
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["train"]
    assert [(row["trains"], row["active"]) for row in rows] == [
        ("peer", 0.8),
        ("peer", 1.0),
        ("full", 0.8),
        ("full", 1.0),
    ]
    for row in rows:
        low, high = row["spread"]
        assert 0 < low <= row["ratio"] <= high
        assert (row["tokens"], row["dtype"]) == (32, dtype)
    picture = ["--plot", str(tmp_path / "speed.svg")] if importlib.util.find_spec("matplotlib") else []
    table = run(*asked, *picture).stdout
    assert "train PEER" in table
    assert (tmp_path / "speed.svg").exists() == bool(picture)
    assert {len(line) for line in table.splitlines() if "×" in line} <= {*range(60, 81)}


def test_product_keys_train_beside_the_dense_model_too(folders: Path) -> None:
    tokens, dense, ours = speed.step_seconds(
        str(folders / "other"), str(folders / "dense"), shares=[None], trains="peer", context=8, repeats=1
    )
    assert (tokens, len(dense), len(ours), len(ours[0])) == (16, 1, 1, 1)


@pytest.mark.parametrize("trains", ["peer", "full"])
def test_the_step_that_is_measured_trains_the_same_in_both(
    folders: Path, trains: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many numbers with a gradient, one teacher, the objectives of the recipes."""
    made: list[Any] = []

    def noted(stage: Any) -> float:
        made.append(stage)
        return float(stage.step())

    monkeypatch.setattr(speed, "_seconds", noted)
    speed.step_seconds(
        str(folders / "peer"), str(folders / "dense"), shares=[0.8, 1.0], trains=trains, context=8, repeats=1
    )
    dense, peer = made[0], made[1]
    assert made == [dense, peer, peer] * 2, "in turns"
    counts = [sum(p.numel() for p in each.model.parameters() if p.requires_grad) for each in (dense, peer)]
    assert counts[0] == counts[1] > 0
    everything = sum(p.numel() for p in dense.model.parameters())
    assert (counts[0] == everything) == (trains == "full")
    assert dense.run.teacher is peer.run.teacher is not dense.model
    recipe = Recipe.load(str(Path(__file__).parents[1] / "recipes/smollm2-135m/heal-50.yaml"))
    assert dense.config.objectives == peer.config.objectives == recipe.training.stages[0].objectives
    assert recipe.training.batch_size == speed.WINDOWS
    assert (dense.now.step, peer.now.step) == (2, 4)


def test_steps_that_cannot_be_taken(folders: Path) -> None:
    asked = ["bench", str(folders / "peer"), "--against", str(folders / "dense"), "--train"]
    for more, reason in (
        (["--dtype", "float16"], "training in float16 takes a GPU"),
        (["--prompt", "1"], "give --prompt 2 or more"),
    ):
        done = run(*asked, *more)
        assert done.exit_code == 2
        assert reason in done.stderr
