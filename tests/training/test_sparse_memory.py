"""train: memory. The experts that new text uses more than other text learn, and nothing else moves by a bit."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training_grown import GROW
from test_training_resume import die, kill_self
from training_layers import peer
from training_runs import files, log, recipe, trained, weights  # noqa: F401

from peerify.checkpoint.load import load_for_eval
from peerify.config.recipe import Recipe
from peerify.config.train import MemoryConfig, TrainConfig
from peerify.conversion.growth_checkpoint import grow_checkpoint
from peerify.data import load_windows
from peerify.errors import CheckpointError, DataError, UsageError
from peerify.modeling.peer_elastic import ElasticPEER
from peerify.modeling.peer_memory import Memory
from peerify.training import sparse_memory, stage, state, use
from peerify.training import train as training
from peerify.training.data import PADDING
from peerify.training.dry_run import plan_training

MEMORY: dict[str, Any] = {"background": "test.txt", "experts": 5, "tokens": 256}
STAGE: dict[str, Any] = {
    "train": "memory",
    "memory": MEMORY,
    "objectives": {"next_token": 1},
    "optimizer": {"lr": 1e-2, "weight_decay": 0.5},
}
WITHOUT: dict[str, Any] = {"stages": [STAGE], "evaluation": None}


def moved(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """The rows of a table in which any bit is another."""
    different = before.view(torch.int32) != after.view(torch.int32)
    return different.flatten(1).any(1).nonzero().flatten() if before.dim() > 1 else different.nonzero().flatten()


@pytest.mark.parametrize("folder", ["peer", "product", "grown"])
def test_chosen_rows_learn_and_nothing_else_moves(folder: str, here: Path) -> None:
    """With weight decay asked for, and with the moments of ten steps."""
    if folder == "grown":
        options = ["calibration.data=train.txt", "calibration.tokens=512", "calibration.context=32"]
        grow_checkpoint(Recipe.load(None, ["model=peer", "output=grown", *options, *GROW]))
    trained(f"output={folder}", "train.output=learned", **WITHOUT)
    before, after = weights(folder), weights("learned")
    rows = state.read_optimizer(Path("learned-run/step-000009"))[sparse_memory.ROWS]  # type: ignore[index]
    tables = {f"{path}.{table}": row_m for path, row_m in rows.items() for table in sparse_memory.TABLES}
    assert {len(row_m) for row_m in rows.values()} == {5}
    assert all((".memory.pool" in path) == (folder == "grown") for path in rows)
    for name, table in before.items():
        found = moved(table, after[name])
        if name in tables:
            assert set(found.tolist()) <= set(tables[name].tolist()), name
            # An expert that is not retrieved in these steps has no gradient; the others have one.
            assert len(found) == 5 if folder == "peer" else len(found), name
        else:
            assert not len(found), name
    moments = state.read_optimizer(Path("learned-run/step-000009"))
    assert moments is not None
    assert {len(moments[name]["exp_avg"]) for name in tables if name in before} == {5}, "of the rows alone"
    counts = {use.USE} if folder == "grown" else set()  # of what its keys find
    assert set(moments) - counts == {name for name in tables if name in before} | {sparse_memory.ROWS}


def test_the_choice_is_that_of_a_loop_over_tokens(here: Path) -> None:
    """Every expert counted by itself, token by token, from what goes into the layers."""
    model = load_for_eval("peer").model
    tokenizer = load_for_eval("peer").tokenizer
    texts = [load_windows([name], tokenizer, context=32, max_tokens=128) for name in ("train.txt", "test.txt")]
    inputs: dict[str, list[torch.Tensor]] = {}
    pools = sparse_memory.pools_of(model)
    for pool in pools:
        layer = model.get_submodule(pool.layers[0])
        layer.register_forward_pre_hook(
            lambda _, args, path=pool.path: inputs.setdefault(path, []).append(args[0].flatten(0, -2))
        )
    with torch.no_grad():
        for windows in texts:
            model(input_ids=windows)
    chosen = sparse_memory.choose(model, MemoryConfig(background=["x"], experts=0.1), *texts, nullcontext)
    model.requires_grad_(False)
    for pool in pools:
        experts = model.get_submodule(pool.path)
        shares = []
        for x_td in inputs[pool.path][:2]:
            use = [0.0] * pool.num_experts
            for x_d in x_td:
                for i in range(pool.num_experts):
                    u, gate = experts.u[i] @ x_d, experts.gate[i] @ x_d
                    if experts.u_bias is not None:
                        u, gate = u + experts.u_bias[i], gate + experts.gate_bias[i]
                    use[i] += float((experts.act(gate) * u).abs() * experts.v[i].norm())
            total = sum(use) * 1.1
            shares.append([(each + 0.1 * sum(use) / len(use)) / total for each in use])
        score = [p * math.log(p / q) for p, q in zip(*shares, strict=True)]
        wanted = max(1, round(0.1 * len(score)))
        best = sorted(range(len(score)), key=lambda i: -score[i])[:wanted]
        assert chosen[pool.path].tolist() == sorted(best)


@settings(max_examples=20, deadline=None)
@given(gates=st.sampled_from(["unit", "softmax", "sigmoid"]), shared=st.integers(0, 3), seed=st.integers(0, 2**31))
@torch.no_grad()
def test_what_keys_retrieve_counts_by_its_gate(gates: str, shared: int, seed: int) -> None:
    torch.manual_seed(seed)
    layer, x_td = peer(gates=gates, num_shared=shared), torch.randn(9, 12)
    layer.keys.reset_parameters()
    assert sparse_memory.used(layer, x_td).tolist() == pytest.approx(layer.weights(x_td).double().sum(0).tolist())  # type: ignore[union-attr]


@torch.no_grad()
def test_of_a_grown_layer_the_memory_counts(seed: int) -> None:
    torch.manual_seed(seed)
    layer: Any = ElasticPEER(12, 20, gated=True, activation="silu")
    layer.memory = Memory(12, 64, (8, 8), 2, 3, query_dim=4, gated=True, activation="silu")
    x_td = torch.randn(7, 12)
    expected = torch.zeros(64)
    for index_k, weight_k in zip(*layer.memory.retrieve(x_td), strict=True):
        for i, weight in zip(index_k, weight_k, strict=True):
            expected[i] += weight
    torch.testing.assert_close(sparse_memory.used(layer, x_td).float(), expected)
    assert expected.sum().item() == pytest.approx(7 * 2)


def test_experts_rank_by_what_the_new_text_uses_more() -> None:
    background_n = torch.tensor([100.0, 100.0, 100.0, 0.0, 0.0])
    new_n = torch.tensor([100.0, 300.0, 10.0, 50.0, 0.0])
    # Used much, and more than before; never used before; never used; used less; used much, and less.
    assert sparse_memory.rank(new_n, background_n).tolist() == [1, 3, 4, 2, 0]
    assert sparse_memory.rank(new_n, 8 * background_n).tolist() == [1, 3, 4, 2, 0], "shares, whatever the tokens"
    nothing_n = torch.zeros(5)
    assert sorted(sparse_memory.rank(nothing_n, nothing_n).tolist()) == [0, 1, 2, 3, 4]


def test_padding_is_not_counted(here: Path) -> None:
    model = load_for_eval("peer").model
    ids_bt = torch.randint(3, 50, (3, 8))
    padded_bt = torch.cat([ids_bt, torch.full((3, 5), PADDING)], dim=1)
    pools = sparse_memory.pools_of(model)
    counts = [sparse_memory.use(model, pools, ids, nullcontext) for ids in (ids_bt, padded_bt)]
    for path, use_n in counts[0].items():
        torch.testing.assert_close(counts[1][path], use_n, rtol=1e-4, atol=1e-6)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second stage, where the choice cannot be made again from the weights that the checkpoint has."""
    plan: dict[str, Any] = {"stages": [{"share": 0.3}, STAGE], "checkpoints": {"every": 2}, "micro_batch_size": 2}
    trained("train.output=whole", **plan)
    real = stage.Stage._backward
    monkeypatch.setattr(
        stage.Stage, "_backward", lambda self, ids: kill_self() if self.now.step == 7 else real(self, ids)
    )
    die(lambda: trained("train.output=killed", **plan))
    monkeypatch.undo()
    monkeypatch.chdir(here)
    monkeypatch.setattr(sparse_memory, "choose", lambda *_: pytest.fail("it chose again"))
    trained("train.output=killed", resume=True, **plan)
    assert log("killed") == log("whole"), "to the last digit"
    a, b = weights("whole"), weights("killed")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_choice_takes_nothing_from_the_text_that_is_learned(here: Path) -> None:
    """The steps read the windows that they would read without it."""
    losses = []
    for name, tokens in (("a", 64), ("b", 1024)):
        trained(f"train.output={name}", **WITHOUT | {"stages": [STAGE | {"memory": MEMORY | {"tokens": tokens}}]})
        losses.append(log(name)["loss 1"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("experts", [3, 0.25, 1.0, 10_000])
def test_the_dry_run_counts_what_learns(experts: float, here: Path) -> None:
    chosen = recipe(**WITHOUT | {"stages": [STAGE | {"memory": MEMORY | {"experts": experts}}]})
    plan = plan_training(chosen)["stages"][0]
    model = load_for_eval("peer").model
    each = 3 if experts == 3 else 6 if experts == 0.25 else 24
    pools = sparse_memory.pools_of(model)
    rows = sparse_memory.Rows(pools, {pool.path: torch.arange(each) for pool in pools})
    really = sum(parameter.numel() for parameter in rows.parameters.values())
    assert plan["trainable"] == really == plan["groups"]["experts"]
    assert plan["memory"]["optimizer"] == 8 * really
    largest = max(table.numel() for pool in pools for table in pool.tables.values())
    assert plan["memory"]["gradients"] == 4 * (really + largest)


def test_what_cannot_be_is_refused_in_one_sentence(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(error: type[Exception], message: str, **changes: Any) -> None:
        with pytest.raises(error, match=message) as caught:
            trained(**WITHOUT | {"stages": [{**STAGE, **changes}]})
        assert "\n" not in str(caught.value)
        assert not Path("peer-healed-run").exists()

    refused(UsageError, r"stages\.0: memory\.background is empty, and use of experts is counted against it", memory={})
    refused(UsageError, r"stages\.0: memory\.background names train\.txt, which is learned",
            memory={"background": ["test.txt", "train.txt"]})  # fmt: skip
    refused(DataError, "no such text file: gone.txt", memory={"background": "gone.txt"})
    refused(UsageError, r"memory\.experts: .*2\.5 is no share", memory=MEMORY | {"experts": 2.5})
    refused(UsageError, r"memory\.experts: .*greater than 0", memory=MEMORY | {"experts": 0})
    refused(UsageError, "memory has no effect with train peer", train="peer")
    refused(UsageError, "move the router, which stays as it is", balance_rate=0.1)

    class Two:
        num_processes = 2

    monkeypatch.setattr(training, "is_sharded", lambda _: False)
    config = TrainConfig.model_validate({"stages": [STAGE]})
    with pytest.raises(UsageError, match=r"stages\.0: memory runs in one process: take peer, or launch one"):
        training._check_processes(config, Two())  # type: ignore[arg-type]


def test_a_checkpoint_that_does_not_say_who_learns_is_refused(here: Path) -> None:
    model = load_for_eval("peer").model
    pools, config = sparse_memory.pools_of(model), MemoryConfig(background=["x"], experts=3)
    good = {pool.path: torch.tensor([0, 4, 7]) for pool in pools}
    assert sparse_memory.saved_rows({sparse_memory.ROWS: dict(good)}, pools, config, "here") == good
    path = pools[0].path
    for bad in (None, torch.tensor([0, 4]), torch.tensor([4, 0, 7]), torch.tensor([0, 4, 56]), torch.tensor([-1, 4, 7]),
                torch.tensor([0.0, 4.0, 7.0]), [0, 4, 7]):  # fmt: skip
        with pytest.raises(CheckpointError, match=r"here does not say which experts of .*layers\.0.* learn"):
            sparse_memory.saved_rows({sparse_memory.ROWS: good | {path: bad}}, pools, config, "here")
    with pytest.raises(CheckpointError):
        sparse_memory.saved_rows(None, pools, config, "here")


def test_gradients_of_micro_batches_add_up(here: Path) -> None:
    for size in (1, 4):
        trained(f"train.output=by-{size}", micro_batch_size=size, **WITHOUT)
    a, b = weights("by-1"), weights("by-4")
    for name, table in a.items():
        torch.testing.assert_close(table, b[name], rtol=1e-3, atol=1e-4)
