"""The parts of training by themselves: losses, groups, optimizers, steps, checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from training_layers import peer

from peerify.config.train import OptimizerConfig, StageConfig, TrainConfig
from peerify.errors import UsageError
from peerify.modeling.peer_elastic import ElasticPEER
from peerify.training import groups, objectives, optimizers, state

# Losses


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.3, 0.7)])
def test_the_fast_loss_is_the_plain_one(weights: tuple[float, float]) -> None:
    ce, kl = weights
    logits = torch.randn(300, 40, requires_grad=True)
    teacher, target = torch.randn(300, 40), torch.randint(40, (300,))
    target[::7] = objectives.IGNORED
    fast, cross_entropy, divergence = objectives.prediction_loss(logits, target, teacher, next_token=ce, kl=kl)
    (got,) = torch.autograd.grad(fast * 0.01, logits)
    plain = reference_loss(logits, target, teacher, ce, kl)
    (wanted,) = torch.autograd.grad(plain * 0.01, logits)
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ce * cross_entropy + kl * divergence, fast)


def reference_loss(logits_pv: Any, target_p: Any, teacher_pv: Any, ce: float, kl: float) -> torch.Tensor:
    """`prediction_loss` by plain autograd, the definition that the fast one is tested against."""
    ignored = objectives.IGNORED
    loss = ce * F.cross_entropy(logits_pv.float(), target_p, ignore_index=ignored, reduction="sum")
    if teacher_pv is not None:
        q, p = teacher_pv.float().log_softmax(-1), logits_pv.float().log_softmax(-1)
        loss = loss + kl * (F.kl_div(p, q, reduction="none", log_target=True).sum(-1) * (target_p != ignored)).sum()
    return loss


def test_top_logits_compare_the_rest_as_one() -> None:
    logits = torch.randn(50, 30, dtype=torch.float64).float().requires_grad_()
    teacher, target = torch.randn(50, 30) * 2, torch.randint(30, (50,))
    top = objectives.top_logits(teacher, 5)
    loss, _, _ = objectives.prediction_loss(logits, target, top, next_token=0.0, kl=1.0)
    (got,) = torch.autograd.grad(loss, logits)

    p, q = logits.softmax(-1), teacher.softmax(-1)
    inside_p, inside_q = p.gather(1, top.index_pk), q.gather(1, top.index_pk)
    rest_p, rest_q = 1 - inside_p.sum(-1), 1 - inside_q.sum(-1)
    plain = (inside_q * (inside_q.log() - inside_p.log())).sum() + (rest_q * (rest_q.log() - rest_p.log())).sum()
    (wanted,) = torch.autograd.grad(plain, logits)
    torch.testing.assert_close(loss, plain.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)
    everything = objectives.top_logits(teacher, 30)
    full = objectives.prediction_loss(logits, target, teacher, next_token=0.0, kl=1.0)[0]
    torch.testing.assert_close(
        objectives.prediction_loss(logits, target, everything, next_token=0.0, kl=1.0)[0], full, rtol=1e-4, atol=1e-4
    )


def test_layerwise_is_zero_for_equals_and_blind_to_scale() -> None:
    hidden = [torch.randn(2, 5, 8) for _ in range(3)]
    used = torch.ones(2, 5, dtype=torch.bool)
    assert objectives.layerwise_loss(hidden, hidden, used) == 0
    twice = [2 * h for h in hidden]
    assert objectives.layerwise_loss(twice, hidden, used).item() == pytest.approx(10, rel=1e-5)
    big = [1000 * h for h in hidden]
    torch.testing.assert_close(objectives.layerwise_loss([2 * h for h in big], big, used), torch.tensor(10.0))


# Groups and optimizers


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Linear(12, 12)
        self.norm = nn.LayerNorm(12)
        self.mlp = peer()


def blocks_model() -> nn.Module:
    return nn.ModuleDict({"embed": nn.Embedding(9, 12), "layers": nn.ModuleList([Block() for _ in range(4)])})


def test_groups_have_their_own_rates_and_only_matrices_decay() -> None:
    model = blocks_model()
    optimizer = OptimizerConfig(lr=1e-3, experts_scale=4, router_scale=0.5, weight_decay=0.1)
    stage = StageConfig(train="full", optimizer=optimizer)
    groups.select_trainable(model, stage)
    found = {group["name"]: group for group in groups.parameter_groups(model, stage)}
    rates = {name: (group["lr"], group["weight_decay"]) for name, group in found.items()}
    assert rates == {"experts": (4e-3, 0), "router": (5e-4, 0), "decayed": (1e-3, 0.1), "rest": (1e-3, 0)}
    assert all(".mlp.pool." in name for name in found["experts"]["names"])
    assert all(".mlp.keys." in name for name in found["router"]["names"])
    assert sum(len(group["params"]) for group in found.values()) == len(list(model.parameters()))
    model = nn.ModuleDict({"mlp": ElasticPEER(12, 30, gated=True, output_bias=True)})
    groups.select_trainable(model, stage)
    found = {group["name"]: group for group in groups.parameter_groups(model, stage)}
    assert {name.rpartition("pool.")[2] for name in found["experts"]["names"]} >= {"u", "v", "gate"}
    assert not any("input_rms" in name for group in found.values() for name in group["names"])


@pytest.mark.parametrize(("train", "trains"), [("peer", {"pool", "keys"}), ("full", {"pool", "keys", "other"})])
def test_what_trains(train: Any, trains: set[str]) -> None:
    model = blocks_model()
    groups.select_trainable(model, StageConfig(train=train))
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    kinds = {"pool" if ".pool." in name else "keys" if ".keys." in name else "other" for name in names}
    assert kinds == trains
    frozen = StageConfig(train=train, optimizer=OptimizerConfig(router_scale=0))
    groups.select_trainable(model, frozen)
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".keys." in name)


def test_a_model_without_peer_is_refused() -> None:
    with pytest.raises(UsageError, match="no PEER layer: convert it first"):
        groups.select_trainable(nn.ModuleDict({"a": nn.Linear(2, 2)}), StageConfig())


def test_lisa_opens_a_few_blocks_by_turns() -> None:
    model = blocks_model()
    stage = StageConfig(train="lisa", lisa={"blocks": 2, "every": 3})
    seen = set()
    groups.select_trainable(model, stage)
    for step in range(60):
        open_blocks = groups.lisa_blocks(model, stage, step, 0)
        assert open_blocks == groups.lisa_blocks(model, stage, step // 3 * 3, 0)
        seen |= set(open_blocks)
        closed = groups.apply_lisa(model, open_blocks)
        assert len(open_blocks) == 2
        for name, parameter in model.named_parameters():
            always = ".mlp." in name or name.startswith("embed")
            assert parameter.requires_grad == (always or any(name.startswith(b + ".") for b in open_blocks))
            assert (name in closed) == (not parameter.requires_grad)
    assert len(seen) == 4


@pytest.mark.parametrize("name", ["adamw", "adafactor", "galore"])
def test_optimizers_find_the_minimum(name: Any) -> None:
    target = torch.randn(12, 20)
    weight = nn.Parameter(torch.zeros(12, 20))
    config = OptimizerConfig(name=name, lr=0.05, rank=6, update_every=10, betas=(0.9, 0.95))
    optimizer = optimizers.build_optimizer(
        config, [{"name": "decayed", "params": [weight], "lr": 0.05, "weight_decay": 0.0}]
    )
    first = None
    for _ in range(400):
        optimizer.zero_grad()
        loss = (weight - target).pow(2).mean()
        first = first or loss.item()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 * (first or 0)


def test_galore_keeps_its_moments_in_a_low_rank() -> None:
    wide, tall, small = (nn.Parameter(torch.randn(*shape)) for shape in ((8, 30), (30, 8), (3, 30)))
    config = OptimizerConfig(name="galore", rank=4)
    optimizer = optimizers.build_optimizer(
        config,
        [
            {"name": "decayed", "params": [wide, tall, small], "lr": 1e-3, "weight_decay": 0.0},
            {"name": "experts", "params": [extra := nn.Parameter(torch.randn(8, 30))], "lr": 1e-3, "weight_decay": 0.0},
        ],
    )
    (wide.sum() ** 2 + tall.sum() ** 2 + small.sum() ** 2 + extra.sum() ** 2).backward()
    optimizer.step()
    shapes = {tuple(optimizer.state[p]["exp_avg"].shape) for p in (wide, tall)}
    assert shapes == {(4, 30), (30, 4)}
    assert optimizer.state[small]["exp_avg"].shape == (3, 30), "no larger than the rank: nothing to gain"
    assert optimizer.state[extra]["exp_avg"].shape == (8, 30), "expert tables are no linear layers"


def test_full_rank_galore_is_adamw_in_another_basis() -> None:
    """With a rank as large as the matrix, and rotation-invariant moments (betas 0), the step has AdamW's size."""
    weight = nn.Parameter(torch.randn(6, 9))
    before = weight.detach().clone()
    optimizer = optimizers.GaLore([{"params": [weight], "rank": 5}], lr=0.1, betas=(0.0, 0.0))
    weight.grad = torch.randn(6, 9)
    optimizer.step()
    step = (before - weight).detach()
    assert torch.linalg.matrix_rank(step) <= 5
    assert step.norm() == pytest.approx(0.1 * optimizer.SCALE * (5 * 9) ** 0.5, rel=1e-3)


def test_rates_rise_and_fall() -> None:
    stage = StageConfig(warmup=0.1, final_lr=0.1)
    factors = [optimizers.lr_factor(stage, step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[9:] == sorted(factors[9:], reverse=True)
    assert factors[-1] == pytest.approx(0.1)
    assert optimizers.lr_factor(stage.model_copy(update={"schedule": "constant"}), 70, 100) == 1
    linear = stage.model_copy(update={"schedule": "linear", "warmup": 0.0})
    assert optimizers.lr_factor(linear, 49, 100) == pytest.approx(0.55)


def test_8_bit_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"adamw8bit needs bitsandbytes: pip install 'peerify\[bitsandbytes\]'"):
        optimizers.build_optimizer(OptimizerConfig(name="adamw8bit"), [])


# Steps and checkpoints


@settings(max_examples=50, deadline=None)
@given(
    tokens=st.integers(1, 5000),
    batch=st.integers(1, 8),
    shares=st.lists(st.floats(0.001, 100), min_size=1, max_size=5),
)
def test_stages_share_the_steps(tokens: int, batch: int, shares: list[float]) -> None:
    config = TrainConfig(
        tokens=tokens, batch_size=batch, data={"context": 16}, stages=[StageConfig(share=share) for share in shares]
    )
    steps = config.steps_of_stages()
    assert len(steps) == len(shares)
    assert min(steps) >= 1
    assert sum(steps) == max(len(shares), tokens // (batch * 16))
    if sum(steps) > 20 * len(shares):
        assert all(
            abs(got - sum(steps) * share / sum(shares)) <= len(shares) + 1
            for got, share in zip(steps, shares, strict=True)
        )


@pytest.mark.parametrize("act", ["prune", "clear"])
def test_a_removal_that_is_killed_leaves_no_half_checkpoint(
    act: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = state.Checkpoints(tmp_path / "run", keep=3)
    for step in (5, 10):
        kept.save(state.RunState(step=step), state.weights_of(blocks_model()), None)
    (tmp_path / "run" / ".mine.gone").mkdir()

    def killed(folder: Path, **_: object) -> None:
        (folder / "peerify.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            getattr(state.Checkpoints(tmp_path / "run", keep=1), act)()
    assert not (tmp_path / "run" / "step-000005").exists()
    getattr(state.Checkpoints(tmp_path / "run", keep=1), act)()
    left = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert left == [".mine.gone", *(["step-000010"] if act == "prune" else [])]


def test_checkpoints_rotate_and_read_back(tmp_path: Path) -> None:
    model = blocks_model()
    weights = state.weights_of(model)
    kept = state.Checkpoints(tmp_path / "run", keep=2)
    assert kept.latest() is None
    optimizer = {"embed.weight": {"step": torch.tensor(3.0), "exp_avg": torch.randn(9, 12)}}
    for step in (5, 10, 15):
        kept.save(state.RunState(step=step, losses=[0.1 + 0.2]), weights, optimizer)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["step-000010", "step-000015"]
    (tmp_path / "run" / ".step-000005.gone").mkdir()  # a removal that was killed
    state.Checkpoints(tmp_path / "run", keep=1).prune()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step-000015"]
    latest = kept.latest()
    assert latest is not None
    assert state.read_state(latest) == state.RunState(step=15, losses=[0.1 + 0.2])
    other = blocks_model()
    state.put_weights(other, state.read_weights(latest), "x")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    assert torch.equal(state.read_optimizer(latest)["embed.weight"]["exp_avg"], optimizer["embed.weight"]["exp_avg"])  # type: ignore[index]
    smaller = copy.deepcopy(other)
    del smaller["layers"][3]
    with pytest.raises(Exception, match=r"x does not fit the model: layers\.3"):
        state.put_weights(smaller, weights, "x")
