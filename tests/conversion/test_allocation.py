"""Active shares by sensitivity: the closed form, its limits, and the measurement."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, inputs_for, logits

from peerify.config.peer import PeerConfig
from peerify.conversion import allocation as allocation_module
from peerify.conversion import model as conversion_module
from peerify.conversion.allocation import (
    FLOOR,
    KEEP_DENSE,
    LEAST,
    allocate,
    allocate_for_loss,
    plan_shares,
    predicted_loss,
    samples,
    sensitivities,
)
from peerify.conversion.elastic import EVERYTHING, SLACK, Point, choose
from peerify.conversion.feedforward import read_feedforward
from peerify.conversion.model import convert, plan_conversion
from peerify.discovery.sites import find_feedforwards
from peerify.errors import ConversionError
from peerify.modules import peer_layers

LAYERS = st.lists(st.tuples(st.floats(1e-4, 1e2), st.floats(1, 1e4)), min_size=1, max_size=8)


def named(layers: list[tuple[float, float]]) -> tuple[dict[str, float], dict[str, float]]:
    return {str(i): k for i, (k, _) in enumerate(layers)}, {str(i): c for i, (_, c) in enumerate(layers)}


@settings(max_examples=60, deadline=None)
@given(LAYERS, st.floats(0.15, 0.95), st.integers(0, 2**31))
def test_the_total_is_spent_and_nothing_else_is_better(
    layers: list[tuple[float, float]], total: float, seed: int
) -> None:
    k, cost = named(layers)
    shares = allocate(k, cost, total)
    assert all(LEAST - 1e-12 <= share <= 1 for share in shares.values())
    spent = sum(shares[path] * cost[path] for path in k)
    assert spent == pytest.approx(total * sum(cost.values()), rel=1e-3)
    # Moving compute from one layer to another never lowers the predicted loss.
    generator = torch.Generator().manual_seed(seed)
    for _ in range(20):
        a, b = (str(int(i)) for i in torch.randint(len(layers), (2,), generator=generator))
        amount = 1e-3 * min(cost[a], cost[b])
        moved = {**shares}
        moved[a] += amount / cost[a]
        moved[b] -= amount / cost[b]
        if a != b and moved[a] <= 1 and moved[b] >= LEAST:
            assert predicted_loss(k, moved) >= predicted_loss(k, shares) * (1 - 1e-4) - 1e-9


@settings(max_examples=40, deadline=None)
@given(LAYERS, st.floats(1e-3, 10))
def test_a_stated_loss_is_kept_at_the_least_compute(layers: list[tuple[float, float]], loss: float) -> None:
    k, cost = named(layers)
    shares = allocate_for_loss(k, cost, loss)
    assert predicted_loss(k, shares) <= loss * (1 + 1e-6) + 1e-9
    spent = sum(shares[path] * cost[path] for path in k) / sum(cost.values())
    if spent > LEAST + 0.01:
        assert predicted_loss(k, allocate(k, cost, spent - 0.01)) > loss


@settings(max_examples=60, deadline=None)
@given(LAYERS, st.floats(0.01, 0.9), st.floats(0.01, 0.4), st.floats(0.5, 1))
def test_limits_are_kept_and_give_way_to_the_total(
    layers: list[tuple[float, float]], total: float, least: float, most: float
) -> None:
    """No layer below `least` unless all of them must be, none above `most`, never more spent than asked for."""
    k, cost = named(layers)
    shares = allocate(k, cost, total, least=least, most=most)
    assert all(min(least, total) - 1e-9 <= share <= most for share in shares.values())
    spent = sum(shares[path] * cost[path] for path in k) / sum(cost.values())
    assert spent == pytest.approx(min(total, most), rel=1e-3)


@settings(max_examples=60, deadline=None)
@given(LAYERS, st.floats(0.15, 0.9))
def test_layers_that_stay_dense_are_paid_for_by_the_others(layers: list[tuple[float, float]], total: float) -> None:
    k, cost = named(layers)
    shares = plan_shares(k, cost, total=total, max_loss=None, keep_dense=True)
    assert list(shares) == list(k)
    assert all(share == 1 or LEAST - 1e-9 <= share <= KEEP_DENSE for share in shares.values())
    converted = [share for share in shares.values() if share != 1]
    spent = sum(shares[path] * cost[path] for path in k) / sum(cost.values())
    if converted and min(converted) > LEAST * 1.001:
        assert spent == pytest.approx(total, rel=1e-3)
    ratio = 1.2
    shares = plan_shares(k, cost, total=None, max_loss=ratio, keep_dense=True)
    assert predicted_loss(k, shares) <= math.log(ratio) * (1 + 1e-6)
    assert all(share == 1 or share <= KEEP_DENSE for share in shares.values())


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(1e-3, 1e2),
            st.floats(1, 1e3),
            st.lists(st.tuples(st.floats(0.05, 0.99), st.floats(1e-4, 1)), min_size=1, max_size=4),
        ),
        min_size=1,
        max_size=3,
    ),
    st.floats(0.1, 1),
)
def test_no_other_points_of_curves_lose_less_for_as_many_bytes(
    layers: list[tuple[float, float, list[tuple[float, float]]]], total: float
) -> None:
    k, cost = named([layer[:2] for layer in layers])
    curves = {
        str(i): [*(Point(1.0, 1.0, read, read, error) for read, error in points), EVERYTHING]
        for i, (_, _, points) in enumerate(layers)
    }

    def spent(points: tuple[Point, ...]) -> float:
        return sum(point.bytes * cost[path] for path, point in zip(curves, points, strict=True)) / sum(cost.values())

    def loss(points: tuple[Point, ...]) -> float:
        return sum(point.error * k[path] for path, point in zip(curves, points, strict=True))

    chosen = tuple(choose(curves, k, cost, total).values())
    least = spent(tuple(min(curve, key=lambda point: point.bytes) for curve in curves.values()))
    assert spent(chosen) <= max(total, least) + 1e-9
    for others in itertools.product(*curves.values()):
        assert loss(others) >= loss(chosen) * (1 - 1e-6) - 1e-9 or spent(others) > spent(chosen) - 1e-9


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.integers(1, 40), st.integers(1, 400))
def test_samples_to_judge_by_are_others_than_those_fitted_to(sizes: list[int], length: int, tokens: int) -> None:
    """All of them distinct, from beginning to end of the data, as many as `tokens` pay for, one in four to judge by."""
    ids = torch.arange(sum(sizes))[:, None].expand(-1, length)
    batches = [{"input_ids": part, "flag": True} for part in ids.split(sizes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peerify.conversion.allocation.TOKENS", tokens)
        fitted, held_out = samples(batches)
    rows = [[int(sample["input_ids"][0, 0]) for sample in part] for part in (fitted, held_out)]
    assert all(sample["input_ids"].shape == (1, length) and sample["flag"] is True for sample in fitted + held_out)
    if len(ids) == 1:
        assert rows == [[0], [0]]
        return
    together = sorted(rows[0] + rows[1])
    count = min(len(ids), max(2, tokens // length))
    assert len(set(together)) == len(together) == count
    assert together[0] == 0
    assert together[-1] >= len(ids) - len(ids) / count - 1
    assert len(rows[1]) == max(1, count // 4)


def test_sensitivity_is_the_divergence_with_one_layer_converted(seed: int) -> None:
    """A layer whose output is scaled down matters less; the model is left as it was."""
    model = FAMILIES["llama"](seed)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e-3)
    inputs = inputs_for(model, seed)
    before = logits(model, inputs)
    config = PeerConfig(active=0.4, keys="product", refine_steps=0, refit=False)
    sites = find_feedforwards(model)

    def build(data):  # type: ignore[no-untyped-def]
        from peerify.conversion.layer import convert_layer

        ff = read_feedforward(model, data.site)
        layer, _, _ = convert_layer(ff, data, config)
        return layer, layer.bytes_fraction

    k = sensitivities(model, sites, [inputs], build)
    assert list(k) == [site.path for site in sites]
    assert all(value > 0 for value in k.values())
    assert k["model.layers.1.mlp"] == pytest.approx(FLOOR * sum(k.values()) / len(k), rel=0.02)
    assert k["model.layers.1.mlp"] < min(k["model.layers.0.mlp"], k["model.layers.2.mlp"])
    assert torch.equal(logits(model, inputs), before)


@pytest.mark.parametrize("keys", ["copies", "product"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "t5"])
def test_allocated_conversion_spends_what_was_asked(family: str, keys: Any, seed: int) -> None:
    model = FAMILIES[family](seed)
    inputs = inputs_for(model, seed, rows=8)
    with torch.no_grad():  # a layer that matters less: of these random ones two may matter alike
        model.get_submodule(find_feedforwards(model)[-1].down).weight.mul_(1e-2)
    conversion = convert(model, PeerConfig(active=0.7, keys=keys), [inputs])
    assert conversion.bytes_fraction <= 0.7 * SLACK + 0.01
    assert conversion.bytes_fraction >= 0.5  # whole experts of a few dozen, and a router that may take less
    assert logits(model, inputs).isfinite().all()
    spent = [layer.bytes_fraction for layer in peer_layers(model).values()]
    if not (
        family == "opt" and keys == "copies"
    ):  # what ReLU cuts off is free to leave out: less may be all of a layer
        assert spent[-1] < max(spent)


@pytest.mark.parametrize("keys", ["copies", "product"])
def test_auto_leaves_dense_what_costs_too_much(keys: Any, seed: int) -> None:
    """A price is stated; what would have to stay nearly whole stays dense."""
    model = FAMILIES["llama"](seed)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e-2)
    inputs = inputs_for(model, seed)
    max_loss = 1.0000002 if keys == "copies" else 1.000005  # fine copies lose so little
    conversion = convert(model, PeerConfig(layers="auto", keys=keys, max_loss=max_loss), [inputs])
    assert "model.layers.1.mlp" in conversion.layers
    assert len(conversion.layers) < 3
    with pytest.raises(ConversionError, match=r"max_loss 1\.0000"):
        convert(FAMILIES["llama"](seed), PeerConfig(layers="auto", keys=keys, max_loss=1 + 1e-14), [inputs])
    if keys == "product":
        with pytest.raises(ConversionError, match=r"within active 0\.99"):
            convert(FAMILIES["llama"](seed), PeerConfig(layers="auto", keys=keys, active=0.99), [inputs])


def test_what_states_no_price() -> None:
    inputs = inputs_for(FAMILIES["llama"](0))
    with pytest.raises(ConversionError, match="num_experts 28 leaves out some of 56 neurons"):
        convert(FAMILIES["llama"](0), PeerConfig(num_experts=28, max_loss=1.1), [inputs])
    with pytest.raises(ValueError, match="give one of them"):
        PeerConfig(active=0.5, max_loss=1.1)
    for key, value in (("layers", "auto"), ("allocation", "sensitivity")):
        with pytest.raises(ValueError, match="not topk"):
            PeerConfig(topk=3, **{key: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("keys", ["copies", "product"])
@pytest.mark.parametrize("options", [{"active": 0.6}, {"max_loss": 1.5}, {"layers": "auto", "max_loss": 1.001}])
def test_convert_does_what_the_plan_says(options: dict[str, Any], keys: Any, seed: int) -> None:
    model = FAMILIES["llama"](seed)
    inputs = inputs_for(model, seed)
    before = logits(model, inputs)
    config = PeerConfig(keys=keys, **options)
    plan = plan_conversion(model, config, [inputs])
    assert torch.equal(logits(model, inputs), before)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert [site.path for site in plan.sites] == [f"model.layers.{i}.mlp" for i in range(3)]
    assert plan.sensitivity.keys() == plan.fractions.keys() == {site.path for site in plan.sites}
    assert plan.predicted_ratio is not None
    assert 1 < plan.predicted_ratio < (config.max_loss or 10) * 1.3  # whole experts: shares are rounded down
    assert all(plan.fractions[site.path] == (1, 1) for site in plan.sites if site.path not in plan.layers)
    done = convert(model, config, [inputs])
    assert list(done.layers) == list(plan.layers)
    mean = sum(plan.fractions[path][0] for path in plan.layers) / len(plan.layers)
    assert done.bytes_fraction == pytest.approx(mean, abs=0.05)


@pytest.mark.parametrize(
    "options",
    [
        {"topk": 9},
        {"active": 1.0, "keys": "product"},
        {"layers": "1", "keys": "product"},
        {"layers": "1"},
        {"allocation": "uniform", "keys": "product"},
        {"allocation": "uniform"},
        {"num_experts": 28, "active": 0.5},  # half of the 56 neurons: all that is left is retrieved
    ],
)
def test_nothing_is_measured_where_it_would_change_nothing(
    options: dict[str, object], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FAMILIES["llama"](seed)
    inputs = inputs_for(model, seed)
    measured: list[str] = []
    real = allocation_module.divergences

    def note(*arguments: object) -> dict[str, float]:
        measured.append("yes")
        return real(*arguments)  # type: ignore[arg-type]

    for module in (conversion_module, allocation_module):
        monkeypatch.setattr(module, "divergences", note)
    config = PeerConfig(**options)  # type: ignore[arg-type]
    plan = plan_conversion(model, config, [inputs], measure=False)
    assert (measured, plan.sensitivity, plan.predicted_ratio) == ([], {}, None)
    assert all(own == config for own in plan.configs.values())
    assert plan_conversion(model, config, [inputs]).predicted_ratio >= 1  # type: ignore[operator]
    assert measured == ["yes"]


def test_always_on_experts_leave_every_layer_room(seed: int) -> None:
    """A layer that hardly matters still gets its shared experts and one more."""
    model = FAMILIES["llama"](seed)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e-3)
    conversion = convert(model, PeerConfig(active=0.5, num_shared=14), [inputs_for(model, seed)])
    assert {layer["num_shared"] for layer in conversion.layers.values()} == {14}
    assert conversion.bytes_fraction <= 0.5
