"""Dead sub-keys move beside busy ones, and their experts become copies: what changes, and what does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_training_grown import POOL as SHARED
from test_training_resume import die, kill_self
from test_training_tables import STAGE
from training_runs import files, grown, log, trained, weights  # noqa: F401

from peerify.config.train import TrainConfig
from peerify.modeling.peer_memory import Memory
from peerify.training import stage
from peerify.training.reseed import EXPECTED, reseed
from peerify.training.tables import SUM, TABLES, RowOptimizer

POOL = SHARED.rstrip(".")
ROWS, COLUMNS, WIDTH = 6, 5, 16


def trained_memory(seed: int) -> tuple[Memory, RowOptimizer, torch.Tensor]:
    """With outputs that are not zero, its optimizer after a step, and tokens."""
    torch.manual_seed(seed)
    memory = Memory(WIDTH, ROWS * COLUMNS, (ROWS, COLUMNS), 2, 6, query_dim=8, gated=True, activation="silu")
    torch.nn.init.normal_(memory.pool.v)
    tables = [memory.pool.u, memory.pool.gate, memory.pool.v]
    keys = torch.optim.AdamW([{"name": "router", "params": [memory.keys.sub_keys], "lr": 0.0}])
    optimizer = RowOptimizer(keys, {"name": TABLES, "params": tables, "lr": 0.0}, adagrad=True)
    memory.pool.sparse = True
    x = torch.randn(200, WIDTH)
    memory(x).square().sum().backward()
    optimizer.step()
    return memory, optimizer, x


def counts(dead_rows: list[int], dead_columns: list[int]) -> torch.Tensor:
    """Row 1 and column 3 are the busiest."""
    count_ab = torch.full((ROWS, COLUMNS), 100.0)
    count_ab[1] += 50
    count_ab[:, 3] += 50
    count_ab[dead_rows] = 0
    count_ab[:, dead_columns] = 0
    return count_ab.flatten().double()


def test_a_dead_row_and_a_dead_column_become_copies(seed: int) -> None:
    memory, optimizer, _ = trained_memory(seed)
    pool, keys = memory.pool, memory.keys.sub_keys
    before = {name: getattr(pool, name).detach().clone().view(ROWS, COLUMNS, WIDTH) for name in ("u", "gate", "v")}
    old_keys = keys.detach().clone()
    assert reseed([memory], counts([4], [0]), optimizer, 7) == COLUMNS + ROWS - 1
    rest = [(a, b) for a in range(ROWS) for b in range(COLUMNS) if a not in (1, 4) and b not in (0, 3)]
    for name, old in before.items():
        new = getattr(pool, name).detach().view(ROWS, COLUMNS, WIDTH)
        assert all(torch.equal(new[a, b], old[a, b]) for a, b in rest), "all others stay to the bit"
        if name == "v":
            assert torch.equal(new[1, 1], old[1, 1] / 2)
            assert torch.equal(new[4, 1], old[1, 1] / 2)
            assert torch.equal(new[2, 0], old[2, 3] / 2)
            assert torch.equal(new[4, 0], old[1, 3] / 4), "a copy of a copy"
        else:
            assert torch.equal(new[1], old[1].where(torch.arange(COLUMNS)[:, None] != 0, new[1]))
            assert 0 < (new[4, 1] - old[1, 1]).norm() < 0.05 * old[1, 1].norm()
        total = optimizer.state[getattr(pool, name)][SUM].view(ROWS, COLUMNS)
        assert torch.equal(total[4], total[1])
        assert torch.equal(total[:, 0], total[:, 3])
    moved = (keys != old_keys).any(-1)[0].nonzero().flatten().tolist()
    assert moved == [4, ROWS + 0]
    assert (keys[0, 4] - old_keys[0, 1]).norm() < 0.05 * old_keys[0, 1].norm()
    moments = optimizer.state[keys]["exp_avg"]
    assert torch.equal(moments[0, 4], moments[0, 1])


def test_what_a_memory_computes_changes_less_by_halves_and_not_at_all_where_it_is_new(seed: int) -> None:
    """On average of memories. Whole copies would count twice."""
    torch.manual_seed(seed)
    changes = torch.stack([torch.stack(reseeded()) for _ in range(24)])
    assert (changes > 0).all()
    halved, whole = changes.mean(0)
    assert halved < whole


def reseeded() -> tuple[torch.Tensor, torch.Tensor]:
    """By how much of itself the output of a memory changes, with halved and with whole copies.

    Row 4 is behind all queries, and nothing finds it until it moves.
    """
    memory = Memory(WIDTH, 400, (20, 20), 4, 16, query_dim=8, gated=True, activation="silu")
    assert memory.keys.query_proj is not None
    optimizer, x = torch.optim.SGD(memory.parameters()), torch.randn(500, WIDTH)

    def found() -> torch.Tensor:
        return torch.bincount(memory.retrieve(x).index_tk.flatten(), minlength=400)

    with torch.no_grad():
        memory.keys.query_proj.bias[:] = 1.5
        memory.keys.sub_keys[0, 4] = -10
        count_n = found().double()
        if count_n.view(20, 20).sum(1)[4] > 0:  # a query turned round: one draw in some dozens
            return reseeded()
        count_n.view(20, 20)[torch.arange(20) != 4] += 1  # whatever else is not found
        old = memory.keys.sub_keys.clone()
        assert reseed([memory], count_n, optimizer, 7) == 20
        assert not memory(x).any()
        assert found().view(20, 20).sum(1)[4] > 0

        memory.keys.sub_keys.copy_(old)
        torch.nn.init.normal_(memory.pool.v)
        expected, before = memory(x), memory.pool.v.clone()
        reseed([memory], count_n, optimizer, 7)
        halved = (memory(x) - expected).norm() / expected.norm()
        changed = (memory.pool.v != before).any(-1)
        assert changed.sum() == 40
        memory.pool.v[changed] *= 2
        whole = (memory(x) - expected).norm() / expected.norm()
    return halved, whole


def test_nothing_happens_without_dead_keys_or_with_few_tokens() -> None:
    memory, optimizer, _ = trained_memory(0)
    before = {name: value.clone() for name, value in memory.state_dict().items()}
    few = counts([4], []) * (EXPECTED / 2 / counts([4], []).view(ROWS, COLUMNS).sum(0).mean())
    one_dead_expert = counts([], [])
    one_dead_expert[7] = 0
    for count_n in (few, one_dead_expert, torch.zeros(ROWS * COLUMNS)):
        assert reseed([memory], count_n, optimizer, 7) == 0
    assert all(torch.equal(value, before[name]) for name, value in memory.state_dict().items())


def test_a_run_revives_dead_keys_and_goes_on_after_a_kill(
    grown: Path,  # noqa: F811
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two layers share the pool; ten of its rows are out of reach at the start."""
    from peerify.checkpoint.load import load_for_eval

    loaded: Any = load_for_eval("grown")
    for number in (0, 2):
        keys = loaded.model.model.layers[number].mlp.memory.keys
        keys.sub_keys.data[:, :10] = 0
        keys.query_proj.bias.data[:] = keys.sub_keys.data[0, 50].repeat(4) * 4
    loaded.model.save_pretrained("dead")
    loaded.tokenizer.save_pretrained("dead")
    Path("dead/peerify.json").write_bytes(Path("grown/peerify.json").read_bytes())
    settings: dict[str, Any] = {"evaluation": None, "usage_tokens": 512}
    for name, on in (("without", False), ("with", True)):
        trained("output=dead", f"train.output={name}", stages=[STAGE | {"reseed": on}], **settings)
    first, again = log("with")["use 4"][POOL], log("with")["use 8"][POOL]
    assert first["reseeded"] >= 10 * 100
    assert first["dead"] == log("without")["use 4"][POOL]["dead"]
    assert again["dead"] < log("without")["use 8"][POOL]["dead"]
    assert "reseeded" not in log("without")["use 4"][POOL]

    real = stage.Stage._backward
    with monkeypatch.context() as patch:
        dying = lambda self, ids: kill_self() if self.now.step == 7 else real(self, ids)  # noqa: E731
        patch.setattr(stage.Stage, "_backward", dying)
        die(lambda: trained("output=dead", "train.output=killed", stages=[STAGE | {"reseed": True}], **settings))
    trained("output=dead", "train.output=killed", resume=True, stages=[STAGE | {"reseed": True}], **settings)
    assert log("killed") == log("with")
    expected, resumed = weights("with"), weights("killed")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("settings", "more", "expected"),
    [
        ({}, {"optimizer": {"router_scale": 0}}, "reseed moves sub-keys, and these stay as they are: set reseed false"),
        ({}, {"train": "memory", "memory": {"background": "b.txt"}}, "these stay as they are: set reseed false"),
        ({"compile": True}, {}, "what is compiled is not counted: set train.compile false"),
    ],
)
def test_what_does_not_go_together(settings: Any, more: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        TrainConfig.model_validate({"data": {"sources": "a.txt"}, "stages": [{"reseed": True, **more}], **settings})
