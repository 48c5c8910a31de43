"""The quality benchmark: its baselines do what the papers say and count what they spend."""

from __future__ import annotations

import copy
import itertools
import math
import random
from typing import Any

import pytest
import torch
from baselines import (
    BASELINES,
    Masked,
    assign,
    balanced_kmeans,
    carve,
    even_sizes,
    fit_all,
    fit_cmoe,
    fit_moefication,
    fit_oracle,
    install,
    install_in_order,
)
from checkpoints import VOCABULARY, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from methods import METHODS, Made, Maker, conversion_code, parse_method
from reference import Reference
from sparsity import SPARSITY
from tiny import FAMILIES, inputs_for, logits, relative_error
from torch import Tensor
from torch.nn import functional as F

from peerify import PeerConfig, convert, perplexity
from peerify.conversion.calibration import token_batches
from peerify.conversion.feedforward import FeedForward
from peerify.discovery.sites import find_feedforwards, select_sites
from peerify.errors import UsageError
from peerify.evaluation import evaluate

SEED = 7


def random_layer(d_model: int, d_ff: int, *, gated: bool, activation: str = "silu") -> FeedForward:
    return FeedForward(
        u_fd=torch.randn(d_ff, d_model),
        gate_fd=torch.randn(d_ff, d_model) if gated else None,
        v_fd=torch.randn(d_ff, d_model) * torch.rand(d_ff, 1),
        u_bias_f=torch.randn(d_ff),
        gate_bias_f=torch.randn(d_ff) if gated else None,
        bias_d=torch.randn(d_model),
        activation=activation,
    )


def ignore(stage: str, done: int, total: int) -> None:
    """A progress that nobody looks at."""


def replaced(name: str, model: Any, share: float, windows: Tensor) -> list[Masked]:
    """`model` with a baseline in it, in place."""
    fit, in_order = BASELINES[name]
    sites, batches = select_sites(find_feedforwards(model), "all"), token_batches(windows, model)
    if in_order:
        return install_in_order(model, sites, batches, fit, share, SEED, ignore)
    return install(model, sites, fit_all(model, sites, batches, fit, SEED, ignore), share)


# Gated and plain, with and without biases, fused projections, and a layer without a module of its own (OPT).
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gemma3", "opt"])
@pytest.mark.parametrize("name", BASELINES)
def test_everything_evaluated_is_the_dense_model(name: str, family: str, seed: int) -> None:
    model = FAMILIES[family](seed)
    inputs = inputs_for(model, seed)
    dense = logits(model, inputs)
    layers = replaced(name, model, 1.0, torch.randint(3, 128, (4, 16)))
    assert relative_error(logits(model, inputs), dense) < 1e-5
    assert [layer.spent for layer in layers] == [1.0] * len(layers)


@pytest.mark.parametrize("name", BASELINES)
def test_spent_is_the_share_asked_for(name: str, seed: int) -> None:
    model = FAMILIES["llama"](seed)
    share = random.uniform(0.15, 0.9)
    inputs = inputs_for(model, seed)
    dense = logits(model, inputs)
    layers = replaced(name, model, share, torch.randint(3, 128, (4, 16)))
    assert relative_error(logits(model, inputs), dense) > 1e-3
    for layer in layers:
        assert layer.tokens == inputs["input_ids"].numel()
        d_ff = len(layer.ff.u_fd)
        if name in ("oracle", "static"):
            assert round(layer.spent * d_ff) == max(1, int(share * d_ff))
            continue
        experts = 8 if share >= 0.25 or name != "cmoe" else 16  # CMoE's have a shared and a routed one at least
        paid = max(1, int(share * experts))
        assert paid * (d_ff // experts) / d_ff <= layer.spent + 1e-9
        assert layer.spent <= paid * math.ceil(d_ff / experts) / d_ff + 1e-9


@pytest.mark.parametrize("name", BASELINES)
def test_a_masked_layer_is_the_sum_over_what_it_selects(name: str) -> None:
    """And its router's multiply-adds are those of a linear map to the experts (two for CMoE's GLU neurons)."""
    ff, x_td, new_td = random_layer(12, 40, gated=True), torch.randn(64, 12), torch.randn(9, 12)
    layer = BASELINES[name][0](ff, x_td, SEED)(0.5)
    a_tf = ff.hidden(new_td)
    mask_tf = layer.select(new_td, a_tf)
    by_hand = torch.stack(
        [sum((a_tf[t, i] * ff.v_fd[i] for i in range(40) if mask_tf[t, i]), ff.bias_d) for t in range(9)]
    )
    torch.testing.assert_close(layer(new_td.view(3, 3, 12)), by_hand.view(3, 3, 12), rtol=1e-4, atol=1e-4)
    assert layer.spent == pytest.approx(mask_tf.float().mean().item())
    routed = {"oracle": None, "static": 0, "cmoe": 2 * (8 - 2) * 12}
    assert layer.router == routed.get(name, 8 * 12)


def test_no_mask_of_as_many_neurons_is_better_than_the_oracle() -> None:
    """With output vectors at right angles the error is what is left out, so the oracle is exactly the best."""
    d_ff, d_model = random.randint(6, 16), 16
    ff = random_layer(d_model, d_ff, gated=random.random() < 0.5)
    vectors = torch.linalg.qr(torch.randn(d_model, d_model)).Q[:d_ff] * torch.rand(d_ff, 1)
    ff = FeedForward(**{**vars(ff), "v_fd": vectors})
    x_td, count = torch.randn(32, d_model), random.randint(1, d_ff - 1)

    def errors(layer: Masked) -> Tensor:
        return (layer(x_td) - ff(x_td)).pow(2).sum(1)

    best = errors(fit_oracle(ff, x_td, SEED)(count / d_ff))
    for _ in range(50):
        other = torch.rand(32, d_ff).argsort(dim=1) < count
        assert (best <= errors(Masked(ff, lambda x, a, other=other: other, None)) + 1e-5).all()
    for name, (fit, _) in BASELINES.items():
        layer = fit(ff, x_td, SEED)(count / d_ff)
        if layer.select(x_td, ff.hidden(x_td)).sum(1).max() <= count:
            assert (best <= errors(layer) + 1e-5).all(), name


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**31))
def test_clusters_are_balanced_and_hold_each_neuron_once(count: int, parts: int, seed: int) -> None:
    parts = min(parts, count)
    sizes = even_sizes(count, parts)
    assert sum(sizes) == count
    assert max(sizes) - min(sizes) <= 1
    rows = torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))
    assert balanced_kmeans(rows, sizes, seed).bincount(minlength=parts).tolist() == sizes
    shared = seed % parts
    marked = (torch.rand(30, count, generator=torch.Generator().manual_seed(seed)) < 0.3).float()
    member, representative = carve(marked.T @ marked, sizes, shared)
    assert member.bincount(minlength=parts).tolist() == sizes
    assert member[representative].tolist() == list(range(shared, parts))  # each in the expert that it stands for


def test_assignment_is_the_best_of_all() -> None:
    gain, sizes = torch.randn(6, 3), [1, 2, 3]
    places = [0, 1, 1, 2, 2, 2]
    best = max(sum(gain[row, part].item() for row, part in enumerate(p)) for p in set(itertools.permutations(places)))
    part = assign(gain, sizes)
    assert part.bincount().tolist() == sizes
    assert gain[range(6), part].sum().item() == pytest.approx(best)


def test_carving_finds_what_fires_together() -> None:
    """CMoE's groups and representatives, from tokens that mark planted groups of neurons; every formula by hand."""
    groups, size, tokens = 4, 5, 600
    owner, leads = torch.randperm(groups * size) % groups, torch.zeros(groups * size, dtype=torch.bool)
    for group in range(groups):  # the most active neurons are where experts begin: one in each group
        leads[(owner == group).nonzero()[0]] = True
    topic = torch.arange(tokens) % (groups - 1) + 1
    often = torch.where(leads, 0.9, 0.6)
    often[owner == 0] = 0.95  # group 0 fires for all topics: it is to be shared
    marked = (((owner == topic[:, None]) | (owner == 0)) & (torch.rand(tokens, groups * size) < often)).float()
    member, representative = carve(marked.T @ marked, [size] * groups, 1)
    assert (member[owner == 0] == 0).all()
    for expert in range(1, groups):
        assert len(set(owner[member == expert].tolist())) == 1
        members = (member == expert).nonzero().flatten()
        centre = marked[:, members].mean(1)
        distances = (marked[:, members] - centre[:, None]).pow(2).sum(0)
        chosen = distances[members == representative[expert - 1]].item()
        assert chosen == pytest.approx(distances.min().item(), abs=1e-3)


@pytest.mark.parametrize("similarity", [True, False])
def test_moefication_selects_the_group_that_answers(similarity: bool) -> None:
    """ReLU neurons in groups that look in directions at right angles: one expert for each token is all there is."""
    groups, size, d_model = 8, 4, 16
    direction = torch.linalg.qr(torch.randn(d_model, d_model)).Q[:groups]
    order = torch.randperm(groups * size)
    rows = (direction.repeat_interleave(size, 0) + 0.01 * torch.randn(groups * size, d_model))[order]
    ff = FeedForward(
        u_fd=rows - 0.02 * direction.sum(0),  # so that the others stay below zero
        gate_fd=None,
        v_fd=torch.randn(groups * size, d_model),
        u_bias_f=None,
        gate_bias_f=None,
        bias_d=None,
        activation="relu",
    )

    def tokens(count: int) -> Tensor:
        return direction[torch.randint(groups, (count,))] * (1 + torch.rand(count, 1))

    layer = fit_moefication(ff, tokens(500), SEED, similarity=similarity)(1 / groups)
    x_td = tokens(100)
    assert layer.spent <= 1 / groups
    assert F.mse_loss(layer(x_td), ff(x_td)) < 1e-3 * ff(x_td).pow(2).mean()


def test_cmoe_is_fitted_behind_converted_layers() -> None:
    """Each layer sees the stream that it will get: what the layers before make of it, not the dense model's."""
    model, windows = tiny_model("llama"), torch.randint(VOCABULARY, (4, 32))
    sites, batches = select_sites(find_feedforwards(model), "all"), token_batches(windows, model)
    seen: list[Tensor] = []

    def fit(ff: FeedForward, x_td: Tensor, seed: int) -> Any:
        seen.append(x_td)
        return fit_cmoe(ff, x_td, seed)

    install_in_order(model, sites, batches, fit, 0.5, SEED, ignore)
    really: list[Tensor] = []
    for site in sites:
        hook = lambda module, args: really.append(args[0].flatten(0, -2))  # noqa: E731
        model.get_submodule(site.path).register_forward_pre_hook(hook)
    with torch.no_grad():
        model(input_ids=windows, use_cache=False)
    for x_td, y_td in zip(seen, really, strict=True):
        torch.testing.assert_close(x_td, y_td, rtol=1e-3, atol=1e-3)


def test_the_reference_runs_the_dense_model_once_for_each_window() -> None:
    model, batch = tiny_model("llama"), torch.randint(VOCABULARY, (2, 16))
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    reference = Reference(model)
    with torch.no_grad():
        expected = model(input_ids=batch).logits
        for other in (batch, batch.flip(0), batch, batch.flip(0), batch[:1]):
            wanted = {2: expected, 1: expected[:1]}[len(other)]
            if len(other) == 2 and torch.equal(other, batch.flip(0)):
                wanted = expected.flip(0)
            torch.testing.assert_close(reference(input_ids=other, use_cache=False).logits, wanted)
    assert len(calls) == 1 + 3


def test_the_reference_keeps_nothing_where_logits_are_more_than_a_product(seed: int) -> None:
    model = FAMILIES["gemma3"](seed, final_logit_softcapping=0.5)
    batch, reference = torch.randint(3, 128, (2, 8)), Reference(model)
    with torch.no_grad():
        expected = model(input_ids=batch).logits
        assert expected.abs().max() <= 0.5
        for _ in range(2):
            torch.testing.assert_close(reference(input_ids=batch).logits, expected)


def test_random_layers_keep_their_neurons_and_forget_their_keys() -> None:
    model, windows = tiny_model("llama"), torch.randint(VOCABULARY, (4, 32))
    maker = Maker(model, windows, SEED)
    dense = perplexity(model, windows)
    everything = maker.make(parse_method("random-keys"), 1.0)
    assert perplexity(everything.model, windows) == pytest.approx(dense, rel=1e-4)
    assert costs_of(everything, windows)["bytes"] == 1.0
    half, fitted = (maker.make(parse_method(name), 0.5) for name in ("random-keys", "product-keys"))
    assert costs_of(half, windows)["bytes"] <= 0.5
    before = {tuple(row) for layer in fitted.layers for row in layer.keys.sub_keys.flatten(0, -2).tolist()}
    after = {tuple(row) for layer in half.layers for row in layer.keys.sub_keys.flatten(0, -2).tolist()}
    assert not before & after
    for made, same in ((half, True), (maker.make(parse_method("random-peer+num_heads=1+query_dim=2"), 0.5), False)):
        for layer, site in zip(made.layers, maker.sites, strict=True):
            neurons = {tuple(row) for row in model.get_submodule(site.up.path).weight.tolist()}
            assert ({tuple(row) for row in layer.pool.u.tolist()} == neurons) is same
    assert perplexity(model, windows) == dense  # the dense model is left as it was


def costs_of(made: Made, windows: torch.Tensor) -> dict[str, float]:
    return made.costs(evaluate(made.model, windows)["layers"])


def test_costs_of_a_conversion_are_its_own() -> None:
    windows = torch.randint(VOCABULARY, (4, 32))
    model = tiny_model("llama", intermediate_size=96, hidden_size=32)
    made = Maker(model, windows, SEED).make(parse_method("product-keys+num_shared=8+refine_steps=0"), 0.5)
    costs = costs_of(made, windows)
    again = convert(copy.deepcopy(model), PeerConfig(active=0.5, num_shared=8, refine_steps=0), windows)
    assert costs == {
        "bytes": pytest.approx(again.bytes_fraction),
        "macs": pytest.approx(again.macs_fraction),
    }


def test_one_conversion_serves_every_budget() -> None:
    windows = torch.randint(VOCABULARY, (8, 32))
    maker = Maker(tiny_model("llama", intermediate_size=96, hidden_size=32), windows, SEED)
    costs = {}
    for active in (0.4, 0.7, 1.0):
        made = maker.make(parse_method("peerify"), active)
        costs[active] = costs_of(made, windows)["bytes"]
    assert costs[0.4] < costs[0.7] < costs[1.0] == 1
    assert costs[0.7] == pytest.approx(0.7, abs=0.1)


@pytest.mark.parametrize("name", SPARSITY)
def test_fewer_inputs_and_fewer_bits(name: str) -> None:
    model, windows = tiny_model("llama", intermediate_size=96, hidden_size=32), torch.randint(VOCABULARY, (8, 32))
    maker, dense = Maker(model, windows, SEED), perplexity(model, windows)
    everything, half = (maker.make(parse_method(name), share) for share in (1.0, 0.5))
    assert perplexity(everything.model, windows) == pytest.approx(dense, rel=1e-5)
    assert everything.costs([])["bytes"] == pytest.approx(1)
    assert perplexity(half.model, windows) != dense
    assert 0.4 < half.costs([])["bytes"] <= 0.55


def test_names_and_options_of_methods() -> None:
    assert parse_method("peerify+seed=3").config(0.25) == PeerConfig(active=0.25, seed=3)
    for name in METHODS:
        assert parse_method(name).identity(0.5) == parse_method(name).identity(0.5) != parse_method(name).identity(0.25)
    assert parse_method("peerify+seed=3").identity(0.5) != parse_method("peerify").identity(0.5)
    names = {f"{path.parent.name}/{path.stem}" for path in conversion_code()}
    fits = ("model", "router", "clustering", "sizing", "refit", "calibration")
    assert {f"conversion/{name}" for name in fits} <= names
    assert {"modeling/modeling_peer", "modeling/peer_keys", "modeling/peer_selection"} <= names
    assert not {name for name in names if name.startswith(("config/", "discovery/", "cli/")) or name.endswith("/card")}
    for wrong, word in (("nonsense", "oracle"), ("oracle+k=1", "no options"), ("peerify+seed", "key=value")):
        with pytest.raises(UsageError, match=word):
            parse_method(wrong)
    with pytest.raises(UsageError, match="sed"):
        parse_method("peerify+sed=3").config(0.5)
