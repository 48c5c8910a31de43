"""Training of grown models: memories learn, one pool for several layers as well, and a killed run goes on."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training_footprint import kept_bytes, model_of
from test_training_resume import die, kill_self
from training_runs import STAGES, files, log, recipe, trained, weights  # noqa: F401

from peerify.checkpoint.load import load_for_eval
from peerify.config.recipe import Recipe
from peerify.config.train import StageConfig, TrainConfig
from peerify.conversion.growth_checkpoint import grow_checkpoint
from peerify.modeling.peer_elastic import ElasticPEER
from peerify.modeling.peer_memory import Memory
from peerify.modules import peer_layers
from peerify.training import groups, stage
from peerify.training.dry_run import plan_training
from peerify.training.footprint import memory_of
from peerify.training.straight_through import StraightThrough

GROW = ["grow.num_experts=144", "grow.num_heads=2", "grow.topk=4", "grow.layers=0,2", "grow.share_pool=true"]
POOL, KEYS = "model.layers.0.mlp.memory.pool.", "model.layers.2.mlp.memory.keys."


@pytest.fixture(scope="module", params=["peer", "product"])
def grown(files: Path, request: pytest.FixtureRequest) -> str:  # noqa: F811
    """The name of a folder with a pool that two layers share, beside the others."""
    name = f"grown-{request.param}"
    before = Path.cwd()
    os.chdir(files)
    try:
        options = ["calibration.data=train.txt", "calibration.tokens=512", "calibration.context=32"]
        grow_checkpoint(Recipe.load(None, [f"model={request.param}", f"output={name}", *options, *GROW]))
    finally:
        os.chdir(before)
    return name


def test_tables_are_experts_and_keys_are_router(grown: str, here: Path) -> None:
    model = load_for_eval(grown).model
    assert not any(name.endswith("input_rms") and parameter.requires_grad for name, parameter in
                   groups.select_trainable(model, StageConfig()).named_parameters())  # fmt: skip
    named = {group["name"]: group["names"] for group in groups.parameter_groups(model, StageConfig())}
    assert {name for name in named["experts"] if ".memory." in name} == {POOL + part for part in ("u", "v", "gate")}
    assert {KEYS + part for part in ("sub_keys", "query_proj.weight", "query_proj.bias")} <= set(named["router"])
    assert all(group["weight_decay"] == 0 for group in groups.parameter_groups(model, StageConfig()))


def test_memories_learn_and_a_killed_run_goes_on_as_if_nothing_had_happened(
    grown: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(f"output={grown}", "train.output=whole")
    before, after = weights(grown), weights("whole")
    assert before.keys() == after.keys()
    assert after[POOL + "v"].any()
    assert not torch.equal(after[POOL + "u"], before[POOL + "u"])
    assert not torch.equal(after[KEYS + "sub_keys"], before[KEYS + "sub_keys"])
    loaded: Any = load_for_eval("whole").model
    assert loaded.model.layers[0].mlp.memory.pool is loaded.model.layers[2].mlp.memory.pool
    assert torch.equal(loaded.model.layers[2].mlp.memory.pool.v, after[POOL + "v"])

    real = stage.Stage._backward
    with monkeypatch.context() as patch:
        dying = lambda self, ids: kill_self() if self.now.step == 7 else real(self, ids)  # noqa: E731
        patch.setattr(stage.Stage, "_backward", dying)
        die(lambda: trained(f"output={grown}", "train.output=killed"))
    trained(f"output={grown}", "train.output=killed", resume=True)
    assert log("killed") == log("whole")
    resumed = weights("killed")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in after.items())


def test_the_plan_counts_memories(grown: str, here: Path) -> None:
    plan = plan_training(recipe(f"output={grown}"))
    model: Any = load_for_eval(grown).model
    assert plan["parameters"] == sum(p.numel() for p in model.parameters())
    counts = {path: p.numel() for path, p in model.named_parameters() if not path.endswith("input_rms")}
    assert plan["stages"][0]["trainable"] == sum(count for path, count in counts.items() if ".mlp." in path)
    options = ["convert.keys=product"] if grown == "grown-product" else []
    before = plan_training(recipe("output=not-there-yet", *options, *GROW))
    assert before["parameters"] == pytest.approx(plan["parameters"], rel=0.02)
    more = plan_training(recipe("output=not-there-yet", *options, *GROW, "grow.num_experts=14400"))
    assert more["parameters"] - before["parameters"] > 14_000 * 3 * 16
    # What is not found takes no products: only the sub-keys are more.
    assert more["flops"] - before["flops"] < 0.05 * before["tokens"] * (more["parameters"] - before["parameters"])
    assert more["stages"][0]["memory"]["optimizer"] > before["stages"][0]["memory"]["optimizer"] + 14_000 * 3 * 16 * 8


@pytest.mark.parametrize("gated", [True, False])
def test_activations_of_memories(gated: bool) -> None:
    """With kernels; without them rows are copied."""
    model = model_of(ElasticPEER, gated=gated, activation="silu")
    bare = model_of(ElasticPEER, gated=gated, activation="silu")
    for block in model.model.layers:
        block.mlp.memory = Memory(64, 1024, (32, 32), 4, 16, query_dim=16, gated=gated, activation="silu")
    data = {"sources": [], "context": 64}
    config = TrainConfig.model_validate({"data": data, "tokens": 1, "batch_size": 4, "precision": "no"})
    stated, really = [], []
    for each in (model, bare):
        size = sum(parameter.numel() for parameter in each.parameters())
        found = memory_of(each, config, StageConfig(train="full"), parameters=size, trainable=size, teacher=0)
        stated.append(found["activations"])
        really.append(kept_bytes(each.train(), StraightThrough(each, temperature=0.3)))
    assert stated[0] - stated[1] == pytest.approx(really[0] - really[1], rel=0.2)


def test_layers_with_product_keys_learn_through_their_memory(here: Path) -> None:
    """Unit gates are trained by another path, which adds the memory as well."""
    model: Any = load_for_eval("product").model
    layer = next(iter(peer_layers(model).values()))
    layer.memory = Memory(16, 64, (8, 8), 2, 4, query_dim=6, gated=True, activation="silu")
    torch.nn.init.normal_(layer.memory.pool.v)
    x = torch.randn(5, 16)
    with torch.no_grad():
        expected = layer(x)
    with StraightThrough(model, temperature=0.3):
        y = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4 * math.sqrt(expected.square().mean().item()))
    y.square().sum().backward()
    assert layer.memory.keys.sub_keys.grad.any()
