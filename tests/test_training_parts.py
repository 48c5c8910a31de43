"""The parts of training by themselves: text, losses, selection, groups, optimizers, checkpoints."""

from __future__ import annotations

import copy
import json
import zlib
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from checkpoints import random_text, text_file, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from peerify.errors import DataError, UsageError
from peerify.modeling_peer import PEER
from peerify.training import data as training_data
from peerify.training import groups, objectives, optimizers, state
from peerify.training.config import DataConfig, OptimizerConfig, StageConfig, TrainConfig
from peerify.training.data import PADDING, Windows
from peerify.training.routing import Router
from peerify.training.selection import most_informative

TOKENIZER = tiny_tokenizer()


def windows(seed: int = 0, **settings: Any) -> Windows:
    return Windows(DataConfig(**{"context": 16, **settings}), TOKENIZER, seed=seed)


# Text


def test_windows_hold_the_text_in_order_when_nothing_is_shuffled(tmp_path: Path) -> None:
    text = random_text(200)
    (tmp_path / "a.txt").write_text(text)
    stream = windows(sources=[str(tmp_path / "a.txt")], shuffle=False)
    ids = TOKENIZER(text)["input_ids"] + [TOKENIZER.eos_token_id]
    assert stream.block(12).flatten().tolist() == ids[: 12 * 16]


def test_an_epoch_has_every_window_once_and_the_next_another_order(tmp_path: Path) -> None:
    path = str(text_file(tmp_path / "a.txt", 16 * 40))
    plain = windows(sources=[path], shuffle=False).block(40)
    stream = windows(sources=[path])
    first, second = stream.block(40), stream.block(40)
    assert sorted(map(tuple, first)) == sorted(map(tuple, plain)) == sorted(map(tuple, second))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, plain)
    assert np.array_equal(first, windows(sources=[path]).block(40)), "the seed decides alone"
    assert not np.array_equal(first, windows(1, sources=[path]).block(40))


@settings(max_examples=20, deadline=None)
@given(weights=st.lists(st.floats(0.1, 10), min_size=1, max_size=4), count=st.integers(1, 60))
def test_texts_are_mixed_by_their_weights(
    tmp_path_factory: pytest.TempPathFactory, weights: list[float], count: int
) -> None:
    folder = tmp_path_factory.mktemp("mix")
    sources = []
    for letter, weight in zip("abcd", weights, strict=False):
        (folder / f"{letter}.txt").write_text(letter * 64)
        sources.append({"path": str(folder / f"{letter}.txt"), "weight": weight})
    block = windows(sources=sources, context=8).block(count)
    letters = {letter: TOKENIZER(letter)["input_ids"][0] for letter in "abcd"}
    for letter, weight in zip("abcd", weights, strict=False):
        got = int((block[:, 1] == letters[letter]).sum())
        assert abs(got - count * weight / sum(weights)) < 2


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("cross", [False, True])
def test_a_stream_put_back_goes_on_with_the_same_windows(tmp_path: Path, streaming: bool, cross: bool) -> None:
    rows = [random_text(random_length) for random_length in torch.randint(1, 70, (30,)).tolist()]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    options: dict[str, Any] = {
        "sources": [
            {"path": str(tmp_path / "a.jsonl"), "streaming": streaming},
            {"path": str(text_file(tmp_path / "b.txt", 300)), "weight": 0.4},
        ],
        "cross_documents": cross,
        "buffer": 7,
    }
    whole = windows(**options).block(150)  # several epochs
    for cut in (1, 17, 80):
        before = windows(**options)
        assert np.array_equal(before.block(cut), whole[:cut])
        position = json.loads(json.dumps(before.position()))
        after = windows(**options)
        after.seek(position)
        assert np.array_equal(after.block(150 - cut), whole[cut:])


def test_hub_datasets_are_streamed_and_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": random_text(50)} for _ in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    opened = []

    def hub_dataset(spec: str, *, streaming: bool = True) -> Any:
        opened.append((spec, streaming))
        return datasets.load_dataset(
            "json", data_files=str(tmp_path / "rows.jsonl"), split="train", streaming=streaming, cache_dir=str(tmp_path)
        )

    monkeypatch.setattr(training_data, "hub_dataset", hub_dataset)
    options: dict[str, Any] = {"sources": ["someone/something:config"], "buffer": 5}
    whole = windows(**options).block(300)
    assert opened == [("someone/something:config", True)]
    for cut in (3, 100, 200):  # in the first, the first or second, and the second epoch
        before = windows(**options)
        before.block(cut)
        position = json.loads(json.dumps(before.position()))
        after = windows(**options)
        after.seek(position)
        assert np.array_equal(after.block(300 - cut), whole[cut:])


def test_documents_keep_to_themselves_where_asked(tmp_path: Path) -> None:
    rows = ["a" * 20, "b" * 5, "c", "d" * 16]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    block = windows(sources=[str(tmp_path / "a.jsonl")], cross_documents=False, shuffle=False).block(4)
    lengths = [(int((window != PADDING).sum()), len(set(window[window != PADDING]))) for window in block]
    assert lengths == [(16, 1), (4, 1), (5, 1), (16, 1)], "one token predicts nothing, so c is left out"


def test_entropy_keeps_what_compresses_worst(tmp_path: Path) -> None:
    rng = np.random.default_rng()
    dull = np.tile(np.arange(4, dtype=np.int32), (30, 16))
    rich = rng.integers(0, 250, (10, 64), dtype=np.int32)
    mixed = np.concatenate([dull[:15], rich, dull[15:]])
    assert most_informative(mixed, 0.25).tolist() == list(range(15, 25))
    twice = np.concatenate([rich, rich])  # a second copy says nothing new
    chosen = most_informative(twice, 0.5) % 10
    assert len(set(chosen.tolist())) >= 9
    held = windows(sources=[str(text_file(tmp_path / "a.txt", 1600))], selection="entropy", keep=0.3).held_windows
    assert held == 30
    size = [len(zlib.compress(part.tobytes())) for part in (mixed[most_informative(mixed, 0.25)], dull[:10])]
    assert size[0] > size[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": []}, "train.data.sources is empty: name a text"),
        ({"sources": ["gone.txt"]}, "no such text file: gone.txt"),
        ({"sources": ["short.txt"]}, "short.txt is too short to train on: 5 tokens, and one window takes 16"),
        ({"sources": [{"path": "short.txt", "streaming": True}]}, "short.txt is too short to train on"),
        (
            {"sources": [{"path": "t.txt", "streaming": True}], "selection": "entropy"},
            "t.txt is streamed, and selection",
        ),
        ({"sources": ["bad.jsonl"]}, 'bad.jsonl, line 1: no "text" field'),
    ],
)
def test_missing_and_empty_texts_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    text_file(tmp_path / "t.txt", 400)
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "bad.jsonl").write_text('{"txt": "a"}\n')
    with pytest.raises(DataError, match=message):
        windows(**options).block(1)


def test_another_text_is_noticed(tmp_path: Path) -> None:
    path = str(text_file(tmp_path / "a.txt", 400))
    position = windows(sources=[path]).position()
    text_file(tmp_path / "a.txt", 400)
    with pytest.raises(DataError, match=r"a.txt is not the text that the checkpoint was made with"):
        windows(sources=[path]).seek(position)


# Losses


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.3, 0.7)])
def test_the_fast_loss_is_the_plain_one(weights: tuple[float, float]) -> None:
    ce, kl = weights
    logits = torch.randn(300, 40, requires_grad=True)
    teacher, target = torch.randn(300, 40), torch.randint(40, (300,))
    target[::7] = objectives.IGNORED
    fast, cross_entropy, divergence = objectives.prediction_loss(logits, target, teacher, next_token=ce, kl=kl)
    (got,) = torch.autograd.grad(fast * 0.01, logits)
    plain = objectives.reference_loss(logits, target, teacher, ce, kl)
    (wanted,) = torch.autograd.grad(plain * 0.01, logits)
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ce * cross_entropy + kl * divergence, fast)


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


# Selection


def peer(**options: Any) -> PEER:
    settings: dict[str, Any] = {
        "share_pool": False,
        "share_keys": False,
        "joint_topk": True,
        "gates": "unit",
        "key_bias": True,
        "activation": "silu",
        "gated": True,
        "candidates": 6,
        "rerank": "gate",
        "grid": (4, 4),
        "num_heads": 3,
    }
    return PEER(12, 46, topk=4, **(settings | options))


PLAIN = {"candidates": None, "rerank": None}
ESTIMATING = {
    "grid": (1, 46), "num_heads": 1, "query_dim": 5, "share_query": True, "estimate": True, "rerank": "up",
}  # fmt: skip
VARIANTS: list[dict[str, Any]] = [
    {},
    {"rerank": "up"},
    {"joint_topk": False},
    {"num_shared": 5, **PLAIN},
    {"gated": False, "activation": "relu", "rerank": "up", "expert_bias": True, "output_bias": True},
    {"joint_topk": False, **PLAIN},
    ESTIMATING,
]


@pytest.mark.parametrize("options", VARIANTS)
def test_training_computes_what_the_layer_computes(options: dict[str, Any]) -> None:
    layer = (
        peer(**options)
        if "num_shared" not in options
        else PEER(12, 46, (4, 4), 3, 4, share_pool=False, share_keys=False, joint_topk=True, gates="unit", num_shared=5)
    )
    shared = PEER(12, 30, (5, 6), 3, 4, share_pool=True, share_keys=True, gates="unit", query_dim=8)
    for each in (layer, shared):
        model = nn.ModuleDict({"mlp": each})
        x = torch.randn(2, 9, 12)
        with torch.no_grad():
            wanted = each(x)
        with Router(model, temperature=0.3):
            torch.testing.assert_close(each(x), wanted, rtol=1e-4, atol=1e-5)
            assert each(x).requires_grad
        assert "forward" not in vars(each)


def test_gradients_move_the_selection_towards_what_is_wanted() -> None:
    """A score that was a little too low rises when the expert would help, and falls when it would harm."""
    layer = PEER(6, 2, (1, 2), 1, 1, share_pool=True, share_keys=True, gates="unit", query_dim=2, activation="relu")
    with torch.no_grad():
        layer.pool.u.fill_(1.0)
        layer.pool.v.zero_()
        layer.pool.v[0, 0] = layer.pool.v[1, 1] = 1.0
    x = torch.rand(1, 6) + 0.1
    chosen = int(layer.active_experts(x).float().argmax())
    keys = layer.keys.sub_keys
    for wanted in (0, 1):
        target = torch.zeros(1, 6)
        target[0, wanted] = x.sum()
        with Router(nn.ModuleDict({"mlp": layer}), temperature=1.0):
            loss = (layer(x) - target).pow(2).sum()
        (slope,) = torch.autograd.grad(loss, keys)
        query = layer.keys.query_proj(x)[0, 1]  # meets the column keys
        change = -(slope[0, 1:] @ query[None]) if slope.shape[-1] == 1 else None
        assert change is not None
        gap = change[wanted] - change[1 - wanted]
        assert gap > 0 if wanted != chosen else abs(gap) < 1e-3


def test_the_gradient_is_that_of_a_sigmoid_around_the_level() -> None:
    layer = peer(**PLAIN)
    x = torch.randn(30, 12)
    with Router(nn.ModuleDict({"mlp": layer}), temperature=0.4):
        (got,) = torch.autograd.grad(layer(x).pow(2).sum(), layer.keys.sub_keys)
    row, column = layer.keys.sub_scores(x)
    score = (row[..., None] + column[..., None, :]).flatten(1)[:, :46]
    level = score.detach().topk(12, dim=1).values[:, -1:]
    step = torch.sigmoid((score - level) / (0.4 * score.detach().std(1, keepdim=True)))
    weight = (score >= level).float() + step - step.detach()
    pool = layer.pool
    assert pool.gate is not None
    y = (torch.nn.functional.silu(x @ pool.gate.T) * (x @ pool.u.T) * weight) @ pool.v
    (wanted,) = torch.autograd.grad(y.pow(2).sum(), layer.keys.sub_keys)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


def test_some_tokens_teach_the_router_on_behalf_of_all() -> None:
    layer = peer(num_shared=2)
    x = torch.randn(31, 12)
    slope = torch.randn(31, 12)
    model = nn.ModuleDict({"mlp": layer})

    def gradient(every: int, of: torch.Tensor) -> torch.Tensor:
        with Router(model, temperature=0.4, every=every):
            y = layer(x)
        torch.testing.assert_close(y, layer(x))
        return torch.autograd.grad(y, layer.keys.sub_keys, of)[0]

    some = torch.zeros_like(slope)
    some[2::4] = slope[2::4]
    torch.testing.assert_close(gradient(4, slope), 4 * gradient(1, some), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(gradient(4, slope), gradient(1, slope), rtol=0.1)


@pytest.mark.parametrize("gates", ["unit", "softmax"])
def test_the_record_shows_use_balance_and_scores(gates: str) -> None:
    options = {} if gates == "unit" else {"gates": gates, "joint_topk": False, **PLAIN}
    layer = peer(**options)
    model = nn.ModuleDict({"mlp": layer})
    x = torch.randn(40, 12)
    with Router(model, temperature=0.3) as router:
        router.recording = True
        layer(x)
        statistics = router.statistics()["mlp"]
        balance, z = router.losses()
        steps = router.load_steps()["mlp"]
    assert 0 < statistics["used"] <= 1
    assert statistics["kl_uniform"] >= 0
    assert statistics["gate"] == pytest.approx(1.0 if gates == "unit" else 0.25, rel=0.3)
    assert balance > 0
    assert z.requires_grad
    assert steps.shape == layer.keys.sub_key_bias.shape  # type: ignore[union-attr]


def test_balance_terms_even_out_retrieval() -> None:
    """Both the loss and the bias bring a lopsided router nearer to uniform."""
    x = torch.randn(200, 12)
    for method, options in [("loss", PLAIN), ("bias", PLAIN), ("bias", ESTIMATING)]:
        layer = peer(**options)
        # What a key estimates need not grow with its bias: there the scale is moved.
        bias = layer.keys.sub_key_bias if layer.keys.log_scale is None else layer.keys.log_scale
        assert bias is not None
        bias.data[..., 0] += 6.0
        model = nn.ModuleDict({"mlp": layer})
        optimizer = torch.optim.SGD([bias], lr=3.0)
        unevenness = []
        with Router(model, temperature=0.3) as router:
            router.recording = True
            for _ in range(60):
                layer(x)
                unevenness.append(router.statistics()["mlp"]["kl_uniform"])
                if method == "loss":
                    optimizer.zero_grad()
                    router.losses()[0].backward()
                    optimizer.step()
                else:
                    bias.data += 0.1 * router.load_steps()["mlp"]
        assert unevenness[-1] < 0.7 * unevenness[0], (method, options)


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
    stage = StageConfig(optimizer=OptimizerConfig(lr=1e-3, experts_scale=4, router_scale=0.5, weight_decay=0.1))
    groups.select_trainable(model, stage)
    found = {group["name"]: group for group in groups.parameter_groups(model, stage)}
    rates = {name: (group["lr"], group["weight_decay"]) for name, group in found.items()}
    assert rates == {"experts": (4e-3, 0), "router": (5e-4, 0), "decayed": (1e-3, 0.1), "rest": (1e-3, 0)}
    assert all(".mlp.pool." in name for name in found["experts"]["names"])
    assert all(".mlp.keys." in name for name in found["router"]["names"])
    fixed = [name for name, _ in model.named_parameters() if ".rerank_" in name]  # never reached by a gradient
    assert sum(len(group["params"]) for group in found.values()) == len(list(model.parameters())) - len(fixed)
    model = nn.ModuleDict({"mlp": peer(**ESTIMATING)})
    groups.select_trainable(model, stage)
    (router,) = (group for group in groups.parameter_groups(model, stage) if group["name"] == "router")
    names = {name.rpartition("keys.")[2] for name in router["names"]}
    assert names == {"query_proj.weight", "sub_keys", "sub_key_bias", "log_scale"}  # not the measured deviation


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
            if ".rerank_" in name:
                continue
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
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)
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


def test_checkpoints_rotate_and_read_back(tmp_path: Path) -> None:
    model = blocks_model()
    weights = state.weights_of(model)
    kept = state.Checkpoints(tmp_path / "run", keep=2)
    assert kept.latest() is None
    optimizer = {"embed.weight": {"step": torch.tensor(3.0), "exp_avg": torch.randn(9, 12)}}
    for step in (5, 10, 15):
        kept.save(state.RunState(step=step, losses=[0.1 + 0.2]), weights, optimizer)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["step-000010", "step-000015"]
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
