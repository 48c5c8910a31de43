"""Tables of many experts with an optimizer of their own: what it computes, and that only retrieved rows move."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training_grown import KEYS, POOL
from test_training_resume import die, kill_self
from training_runs import files, grown, log, recipe, trained, weights  # noqa: F401

from peerify import cli
from peerify.checkpoint.load import load_for_eval
from peerify.config.train import OptimizerConfig, StageConfig, TrainConfig
from peerify.errors import CheckpointError, UsageError
from peerify.training import footprint, groups, stage, state, tables
from peerify.training import train as training
from peerify.training.dry_run import plan_training
from peerify.training.optimizers import build_optimizer

OPTIMIZER: dict[str, Any] = {"lr": 1e-2, "router_scale": 1, "tables": "rowwise_adagrad", "weight_decay": 0.5}
STAGE: dict[str, Any] = {"objectives": {"next_token": 1}, "optimizer": OPTIMIZER}
WITHOUT: dict[str, Any] = {"stages": [STAGE], "evaluation": None}


def sparse(row: torch.Tensor, value: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.sparse_coo_tensor(row[None], value, (rows, value.shape[1]), check_invariants=False)


def table_optimizer(table: torch.nn.Parameter, name: str, lr: float = 0.1) -> tables.RowOptimizer:
    return tables.RowOptimizer(
        None, {"name": tables.TABLES, "params": [table], "lr": lr}, adagrad=name == "rowwise_adagrad"
    )


# The optimizer


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(0, 2**31))
def test_steps_are_those_of_dense_formulas_in_float64(data: st.DataObject, seed: int) -> None:
    """Rows may repeat and come in any order; a step may have none."""
    name = data.draw(st.sampled_from(["rowwise_adagrad", "sgd"]))
    n, d = data.draw(st.integers(1, 700), "rows"), data.draw(st.integers(1, 9), "width")
    generator = torch.Generator().manual_seed(seed)
    table = torch.nn.Parameter(torch.randn(n, d, generator=generator))
    start, wide, total = table.detach().clone(), table.detach().double(), torch.zeros(n, dtype=torch.float64)
    optimizer, touched = table_optimizer(table, name), torch.zeros(n, dtype=torch.bool)
    for _ in range(3):
        count = data.draw(st.integers(0, 2 * n), "gradients")
        row = torch.randint(n, (count,), generator=generator)
        value = torch.randn(count, d, generator=generator)
        table.grad = sparse(row, value, n)
        touched[row] = True
        gradient = torch.zeros(n, d, dtype=torch.float64).index_add(0, row, value.double())
        total += gradient.square().mean(1)
        scale = total.sqrt().clamp_min(1e-30)[:, None] if name == "rowwise_adagrad" else 1.0
        wide -= 0.1 * gradient / scale
        optimizer.step()
    torch.testing.assert_close(table.detach().double(), wide, rtol=1e-4, atol=1e-5)
    assert torch.equal(table[~touched], start[~touched]), "no other row moves by a bit"
    if name == "rowwise_adagrad":
        torch.testing.assert_close(optimizer.state[table]["sum"].double(), total, rtol=1e-4, atol=1e-6)
    else:
        assert not optimizer.state


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.booleans(), st.floats(0.01, 100))
def test_the_norm_is_that_of_dense_gradients(seed: int, in_order: bool, largest: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    row = torch.randint(9, (7,), generator=generator)
    value, other = torch.randn(7, 5, generator=generator), torch.randn(3, generator=generator)
    ours, theirs = ([torch.nn.Parameter(torch.zeros(9, 5)), torch.nn.Parameter(torch.zeros(3))] for _ in range(2))
    ours[0].grad, theirs[0].grad = sparse(row, value, 9), sparse(row, value, 9).to_dense()
    ours[1].grad, theirs[1].grad = other.clone(), other.clone()
    if in_order:
        tables.in_order(ours[0])
    norm, expected = tables.clip(ours, largest), torch.nn.utils.clip_grad_norm_(theirs, largest)
    torch.testing.assert_close(norm, expected)
    for mine, dense in zip(ours, theirs, strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad.to_dense(), dense.grad)


def test_gradients_of_one_backward_pass_are_not_sorted_again() -> None:
    table = torch.nn.Parameter(torch.zeros(9, 2))
    table.grad = sparse(torch.tensor([1, 4, 8]), torch.ones(3, 2), 9)
    before = table.grad._values().data_ptr()
    tables.in_order(table)
    assert table.grad.is_coalesced()
    assert table.grad.values().data_ptr() == before
    table.grad = sparse(torch.tensor([4, 4]), torch.ones(2, 2), 9)
    tables.in_order(table)
    assert table.grad.indices().tolist() == [[4]]


def test_a_scaler_steps_all_or_nothing() -> None:
    """As fp16 needs it: an overflow anywhere moves nothing, and scaled gradients move what others do."""
    table, weight = torch.nn.Parameter(torch.ones(9, 2)), torch.nn.Parameter(torch.ones(4))
    rest = torch.optim.AdamW([{"name": "rest", "params": [weight], "lr": 0.1}])
    optimizer = tables.RowOptimizer(rest, {"name": tables.TABLES, "params": [table], "lr": 0.1}, adagrad=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))  # starts it
    for wrong in ("rest", "table"):
        table.grad = sparse(torch.tensor([3, 3]), torch.full((2, 2), torch.inf if wrong == "table" else 1.0), 9)
        weight.grad = torch.full((4,), torch.inf if wrong == "rest" else 1.0)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(table, torch.ones(9, 2))
        assert torch.equal(weight, torch.ones(4))
        assert not optimizer.state
    scale = scaler.get_scale()
    table.grad = sparse(torch.tensor([3, 3]), torch.full((2, 2), scale), 9)
    weight.grad = torch.full((4,), scale)
    scaler.step(optimizer)
    assert optimizer.state[table]["sum"].tolist() == [0, 0, 0, 4, 0, 0, 0, 0, 0]
    torch.testing.assert_close(table[3], torch.full((2,), 0.9))
    assert (weight < 1).all()


# Whole runs


@pytest.mark.parametrize("name", ["rowwise_adagrad", "sgd"])
def test_retrieved_rows_learn_and_no_others_move(name: str, grown: Path, here: Path) -> None:  # noqa: F811
    """With weight decay asked for; one number of state for each row, or none."""
    trained("output=grown", "train.output=learned", f"train.stages.0.optimizer.tables={name}", **WITHOUT)
    before, after = weights("grown"), weights("learned-run/step-000009")
    saved = state.read_optimizer(Path("learned-run/step-000009"))
    assert saved is not None
    for table in ("u", "gate", "v"):
        moved = (after[POOL + table] != before[POOL + table]).any(1)
        assert 0 < moved.sum() < len(moved), "an expert that no token finds stays as it is"
        if name == "rowwise_adagrad":
            total = saved[POOL + table]["sum"]
            assert total.shape == (10000,)
            assert set(saved[POOL + table]) == {"sum"}
            assert ((total > 0) | ~moved).all()
        else:
            assert POOL + table not in saved
    assert not torch.equal(after[KEYS + "sub_keys"], before[KEYS + "sub_keys"])
    assert set(saved[KEYS + "sub_keys"]) == {"step", "exp_avg", "exp_avg_sq"}, "all else has AdamW"


def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    grown: Path,  # noqa: F811
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained("output=grown", "train.output=whole", **WITHOUT)
    real = stage.Stage._backward
    with monkeypatch.context() as patch:
        dying = lambda self, ids: kill_self() if self.now.step == 7 else real(self, ids)  # noqa: E731
        patch.setattr(stage.Stage, "_backward", dying)
        die(lambda: trained("output=grown", "train.output=killed", **WITHOUT))
    trained("output=grown", "train.output=killed", resume=True, **WITHOUT)
    assert log("killed") == log("whole")
    expected, resumed = weights("whole"), weights("killed")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())

    name = POOL + "u"
    shutil.rmtree("killed-run/step-000010")
    checkpoint = Path("killed-run/step-000009")
    saved = state.read_optimizer(checkpoint)
    assert saved is not None
    for wrong in ({}, {"sum": torch.ones(3)}):
        torch.save({**saved, name: wrong}, checkpoint / "optimizer.pt")
        with pytest.raises(CheckpointError, match=f"does not hold sum of the rows of {name}"):
            trained("output=grown", "train.output=killed", resume=True, overwrite=True, **WITHOUT)


@pytest.mark.parametrize("rest", ["adamw", "adafactor", "galore"])
def test_losses_do_not_depend_on_micro_batches(rest: str, grown: Path, here: Path) -> None:  # noqa: F811
    """The router stays: where it chooses another expert at a rounding, all that follows differs."""
    optimizer = {"name": rest, "rank": 4, "lr": 1e-3, "router_scale": 0, "tables": "rowwise_adagrad"}
    settings: dict[str, Any] = {"stages": [STAGE | {"optimizer": optimizer}]}
    for size in (4, 1):
        trained("output=grown", f"train.output=by-{size}", evaluation=None, micro_batch_size=size, **settings)
    losses = [{k: v for k, v in log(f"by-{size}").items() if k.startswith(("loss", "grad"))} for size in (4, 1)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert sum(map(len, losses)) == 40


@pytest.mark.parametrize(("name", "scale"), [("rowwise_adagrad", 1), ("sgd", 300)])
def test_tables_alone_learn_a_text(name: str, scale: float, grown: Path, here: Path) -> None:  # noqa: F811
    Path("four.txt").write_text(Path("train.txt").read_text()[:130])
    optimizer = {"lr": 0.03, "experts_scale": 0, "router_scale": 0, "tables": name, "tables_scale": scale}
    trained(
        "output=grown", "train.output=learned", evaluation=None, tokens=128 * 40,
        data={"sources": "four.txt", "context": 32},
        stages=[{"objectives": {"next_token": 1}, "optimizer": optimizer}],
    )  # fmt: skip
    losses = [value for key, value in log("learned").items() if key.startswith("loss")]
    assert losses[-1] < 0.8 * losses[0]
    before, after = weights("grown"), weights("learned")
    assert {key for key in before if not torch.equal(before[key], after[key])} == set(
        tables.tables_of(load_for_eval("grown").model)
    )


def test_sparse_gradients_are_only_another_way_to_write_dense_ones(grown: Path, here: Path) -> None:  # noqa: F811
    """The loss and its norm before anything has moved, and everything but the tables after one step."""
    settings: dict[str, Any] = {"evaluation": None, "tokens": 128, "clip": 0.1}
    for name in ("same", "sgd"):
        stages = [{"objectives": {"next_token": 1}, "optimizer": {"lr": 1e-3, "tables": name}}]
        trained("output=grown", f"train.output={name}", stages=stages, **settings)
    assert log("sgd")["loss 1"] == log("same")["loss 1"]
    assert log("sgd")["gradient_norm 1"] == pytest.approx(log("same")["gradient_norm 1"], rel=1e-6)
    one, other = weights("same"), weights("sgd")
    for name, tensor in one.items():
        if not name.startswith(POOL):
            torch.testing.assert_close(other[name], tensor, rtol=1e-5, atol=1e-7)


def test_groups_and_their_rates(grown: Path, here: Path) -> None:  # noqa: F811
    """With experts_scale 0 the neurons stay, and tables learn."""
    settings = StageConfig(optimizer=OptimizerConfig(tables="sgd", lr=0.5, tables_scale=10, experts_scale=0))
    model: Any = groups.select_trainable(load_for_eval("grown").model, settings)
    assert model.model.layers[0].mlp.memory.pool.sparse
    found = {group["name"]: group for group in groups.parameter_groups(model, settings)}
    assert set(found) == {"router", "tables"}
    assert set(found["tables"]["names"]) == {POOL + table for table in ("u", "gate", "v")}
    assert set(found["tables"]["names"]) == set(tables.tables_of(model))
    assert found["tables"]["lr"] == 5
    assert found["tables"]["weight_decay"] == 0
    alone = [found["tables"]]
    assert build_optimizer(settings.optimizer, alone).rest is None  # type: ignore[attr-defined]


# Refused


@pytest.mark.parametrize(
    ("settings", "stage_settings", "expected"),
    [
        ({}, {"train": "memory", "memory": {"background": "b.txt"}}, "no effect with train memory.*leave tables out"),
        ({"compile": True}, {}, "which compile cannot make: set train.compile false"),
        ({}, {"optimizer": {"tables": "sgd", "name": "adamw8bit"}}, "never tried beside adamw8bit: take adamw"),
        ({}, {"optimizer": {"tables_scale": 2}}, "tables_scale has no effect with tables same: set tables"),
    ],
)
def test_what_does_not_go_together(settings: Any, stage_settings: Any, expected: str) -> None:
    stages = [{"optimizer": {"tables": "sgd"}, **stage_settings}]
    with pytest.raises(ValueError, match=expected):
        TrainConfig.model_validate({"data": {"sources": "a.txt"}, "stages": stages, **settings})


def test_models_without_tables_and_shards_are_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = r"train.stages.0.optimizer.tables rowwise_adagrad is for .* grow it first"
    for refused in (lambda: trained(**WITHOUT), lambda: plan_training(recipe(**WITHOUT))):
        with pytest.raises(UsageError, match=expected):
            refused()
    monkeypatch.setattr(training, "is_sharded", lambda _: True)
    with pytest.raises(UsageError, match="FSDP shards them: set it to same, or launch with DDP"):
        trained(**WITHOUT)


# What it costs


@pytest.mark.parametrize("name", ["adamw", "adafactor", "rowwise_adagrad", "sgd"])
def test_stated_states_are_those_that_optimizers_keep(name: Any) -> None:
    made = [torch.nn.Parameter(torch.ones(50, 7)) for _ in range(3)]
    rows = name in footprint.BY_ROWS
    config = OptimizerConfig(tables=name) if rows else OptimizerConfig(name=name)
    optimizer = build_optimizer(config, [{"name": tables.TABLES if rows else "experts", "params": made, "lr": 1e-3}])
    for table in made:
        table.grad = torch.ones(50, 7).to_sparse(1) if rows else torch.ones(50, 7)
    optimizer.step()
    kept = [part for state in optimizer.state.values() for part in state.values() if torch.is_tensor(part)]
    assert footprint.state_bytes(50, 7, 3)[name] == 4 * sum(part.numel() for part in kept if part.dim())


def test_the_plan_tells_what_optimizers_of_tables_take(grown: Path, here: Path) -> None:  # noqa: F811
    plans = {
        name: plan_training(recipe("output=grown", f"train.stages.0.optimizer.tables={name}", **WITHOUT))
        for name in ("same", "rowwise_adagrad", "sgd")
    }
    costs = plans["same"]["tables"]
    assert all(plan["tables"] == costs for plan in plans.values())
    numbers = 10_000 * 3 * 16
    assert (costs["experts"], costs["parameters"]) == (10_000, numbers)
    assert costs["state_bytes"]["adamw"] == 8 * numbers
    assert costs["state_bytes"]["rowwise_adagrad"] == 4 * 3 * 10_000
    found = 4 * 32 * 2 * 4 * 2  # windows, tokens, heads, experts of each, layers that share the pool
    assert costs["gradient_bytes"] == dict.fromkeys(("adamw", "adafactor"), 4 * numbers) | dict.fromkeys(
        ("rowwise_adagrad", "sgd"), 4 * found * 3 * 16
    )
    memory = {name: plan["stages"][0]["memory"] for name, plan in plans.items()}
    assert memory["same"]["optimizer"] - memory["rowwise_adagrad"]["optimizer"] == 8 * numbers - 4 * 3 * 10_000
    assert memory["same"]["gradients"] - memory["sgd"]["gradients"] == 4 * (numbers - found * 3 * 16)
    assert plans["same"]["checkpoint_bytes"] > plans["sgd"]["checkpoint_bytes"] + 8 * numbers
    assert {group for plan in plans.values() for group in plan["stages"][0]["groups"]} == {
        "experts",
        "router",
        "tables",
    }
    assert plan_training(recipe())["tables"] is None

    shown = CliRunner().invoke(cli.cli, ["train", "r.yaml", "--set", "output=grown", "--dry-run"])
    assert shown.exit_code == 0, shown.output
    assert "10,000 experts of memories" in shown.output
    assert "rowwise_adagrad" in shown.output
    listed = CliRunner().invoke(cli.cli, ["train", "r.yaml", "--set", "output=grown", "--dry-run", "--json"])
    assert json.loads(listed.stdout)["tables"] == costs
