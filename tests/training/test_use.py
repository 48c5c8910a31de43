"""How often experts are found in training: counted right, told in the log, kept by checkpoints, and drawn."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training_footprint import model_of
from test_training_grown import POOL as SHARED
from test_training_tables import WITHOUT
from training_runs import files, grown, log, recipe, trained  # noqa: F401

from peerify import cli
from peerify.errors import CheckpointError
from peerify.modeling.peer_elastic import ElasticPEER
from peerify.modeling.peer_layer import PEER
from peerify.modeling.peer_memory import Memory
from peerify.training import loggers, state, use, use_plot

POOL = SHARED.rstrip(".")


def with_memories() -> Any:
    """Layers of several kinds: two memories with one pool, and soft gates of a layer's own experts."""
    model = model_of(ElasticPEER, gated=True, activation="silu")
    layers = [block.mlp for block in model.model.layers]
    form: dict[str, Any] = {"query_dim": 16, "gated": True, "activation": "silu"}
    layers[0].memory = Memory(64, 400, (20, 20), 2, 4, **form)
    layers[1].memory = Memory(64, 400, (20, 20), 2, 4, **form, pool_of="model.layers.0.mlp")
    layers[1].memory.share(layers[0].memory.pool)
    model.model.layers[2].mlp = PEER(64, 258, (16, 16), 2, 4, gates="softmax", query_dim=16, num_shared=2)
    return model


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31), st.booleans(), st.integers(1, 60))
def test_counts_are_those_of_a_loop_over_tokens(seed: int, checkpointing: bool, context: int) -> None:
    """Once, though activations are computed twice; no padding, and nothing outside of training."""
    torch.manual_seed(seed)
    model = with_memories().train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layers = [block.mlp for block in model.model.layers]
    retrievers, inputs = [layers[0].memory, layers[1].memory, layers[2]], {}

    def keep(number: int, _: Any, args: tuple[torch.Tensor]) -> None:
        inputs.setdefault(number, args[0].detach().flatten(0, -2))

    for number, layer in enumerate(retrievers):
        layer.register_forward_pre_hook(partial(keep, number))
    ids_bt, real_bt = torch.randint(48, (2, context)), torch.rand(2, context) < 0.8
    counter = use.Use(model)
    with counter.watching():
        with counter.counting(real_bt):
            loss = model(input_ids=ids_bt, use_cache=False).logits.sum()
        loss.backward()
        model(input_ids=ids_bt, use_cache=False)
    expected = {path: torch.zeros_like(count_n) for path, count_n in counter.count_n.items()}
    paths = ["model.layers.0.mlp.memory.pool"] * 2 + ["model.layers.2.mlp.pool"]
    assert set(expected) == set(paths)
    for number, (path, layer) in enumerate(zip(paths, retrievers, strict=True)):
        for x_d, real in zip(inputs[number], real_bt.flatten(), strict=True):
            for expert in layer.retrieve(x_d[None]).index_tk[0].tolist() if real else ():
                expected[path][expert] += 1
    for path, count_n in counter.count_n.items():
        count_n[:2] *= ".memory." in path  # always on
        assert int(count_n.sum()) == int(expected[path].sum())
        different = (count_n != expected[path]).sum()
        assert different <= 0.02 * count_n.sum() + 2, "scores that differ by rounding only may change places"


def test_a_report_says_what_was_found_and_what_could_have_been() -> None:
    model: Any = with_memories()
    counter = use.Use(model)
    counter.tokens = 1
    count_n = counter.count_n["model.layers.0.mlp.memory.pool"]
    count_n[:4] = torch.tensor([1, 1, 2, 4])
    found = counter.report(Accelerator(cpu=True))["model.layers.0.mlp.memory.pool"]
    shares = [1 / 8, 1 / 8, 1 / 4, 1 / 2]
    assert found["kl_uniform"] == pytest.approx(sum(p * math.log(400 * p) for p in shares))
    assert {key: value for key, value in found.items() if key != "kl_uniform"} == {
        "tokens": 1, "experts": 400, "used": 0.01, "dead": 396, "reachable": 8,
    }  # fmt: skip
    assert not count_n.any()
    assert counter.tokens == 0


def test_uniform_use_is_no_divergence() -> None:
    counter = use.Use(with_memories())
    for count_n in counter.count_n.values():
        count_n += 7
    for found in counter.report(Accelerator(cpu=True)).values():
        assert found["kl_uniform"] == pytest.approx(0, abs=1e-9)
        assert (found["used"], found["dead"], found["reachable"]) == (1, 0, found["experts"])


def test_the_log_the_result_and_the_picture(grown: Path, here: Path) -> None:  # noqa: F811
    """Every 300 tokens, which three steps have; at the end of the tenth step there are too few for a line."""
    result = trained("output=grown", "train.output=learned", usage_tokens=300, **WITHOUT)
    rows = [json.loads(line) for line in Path("learned-run/log.jsonl").read_text().splitlines()]
    reports = [row for row in rows if "use" in row]
    assert [row["step"] for row in reports] == [3, 6, 9]
    assert {path for row in reports for path in row["use"]} == {POOL}
    for row in reports:
        found = row["use"][POOL]
        assert (found["tokens"], found["experts"]) == (384, 10_000)
        assert found["reachable"] == 384 * 2 * 2 * 4, "tokens, layers, heads and experts of each"
        assert 0 < found["used"] == pytest.approx(1 - found["dead"] / 10_000)
        assert found["kl_uniform"] >= math.log(10_000 / found["reachable"]) - 1e-9
    assert result["use"] == reports[-1]["use"]
    assert loggers.flat(reports[0])[f"kl_uniform/{POOL}"] == reports[0]["use"][POOL]["kl_uniform"]

    pytest.importorskip("matplotlib")
    picture = Path("learned-run") / use_plot.PICTURE
    drawn = picture.read_bytes()
    assert POOL.encode() in drawn
    use_plot.draw_use(Path("learned-run/log.jsonl"), picture)
    assert picture.read_bytes() == drawn
    assert [point["seen"] for point in use_plot.curves_of(Path("learned-run/log.jsonl"))[POOL]] == [384, 768, 1152]


def test_a_short_run_says_it_once_and_one_without_keys_never(grown: Path, here: Path) -> None:  # noqa: F811
    trained("output=grown", "train.output=learned", tokens=256, **WITHOUT)
    assert log("learned")["use 2"][POOL]["tokens"] == 256
    recipe("output=grown", "train.output=again", tokens=256, **WITHOUT)
    shown = CliRunner().invoke(cli.cli, ["train", "r.yaml", "--set", "output=grown", "--set", "train.output=again"])
    assert shown.exit_code == 0, shown.output
    assert f"{POOL}: the last 256 tokens found" in shown.output
    assert trained(tokens=256, stages=[{}], evaluation=None)["use"] == {}
    assert not Path("peer-healed-run", use_plot.PICTURE).exists()


KEPT: dict[str, Any] = WITHOUT | {"usage_tokens": 1000, "checkpoints": {"every": 3, "keep": 9}}


def test_a_window_goes_on_from_a_checkpoint(grown: Path, here: Path) -> None:  # noqa: F811
    """It ends in the eighth step; the checkpoint is of the sixth. Counts that were changed are refused."""
    trained("output=grown", "train.output=whole", **KEPT)
    expected = log("whole")
    assert expected["use 8"][POOL]["tokens"] == 1024
    shutil.rmtree("whole")
    for name in ("step-000010", "step-000009"):
        shutil.rmtree(f"whole-run/{name}")
    shutil.copytree("whole-run", "kept")
    trained("output=grown", "train.output=whole", resume=True, **KEPT)
    assert log("whole") == expected

    saved = state.read_optimizer(Path("kept/step-000006"))
    assert saved is not None
    good = saved[use.USE]
    assert good[use.TOKENS] == 768
    for wrong in ({}, {**good, POOL: good[POOL][1:]}, {**good, POOL: -good[POOL]}, {**good, use.TOKENS: -1}):
        shutil.rmtree("whole-run")
        shutil.copytree("kept", "whole-run")
        torch.save({**saved, use.USE: wrong}, "whole-run/step-000006/optimizer.pt")
        with pytest.raises(CheckpointError, match="does not say how often experts of"):
            trained("output=grown", "train.output=whole", resume=True, overwrite=True, **KEPT)
