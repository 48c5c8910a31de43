"""Growth: many more experts in a model that computes what it did before."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, VOCAB, inputs_for, logits, relative_error
from transformers import AutoModelForCausalLM

import peerify
from peerify.config.grow import GrowConfig
from peerify.config.peer import PeerConfig
from peerify.conversion.growth import fractions, grow, plan_growth
from peerify.conversion.memory_keys import fit_keys
from peerify.conversion.model import convert
from peerify.errors import ConversionError
from peerify.modeling.peer_keys import ProductKeys
from peerify.modules import peer_layers

SMALL: dict[str, Any] = {"num_experts": 144, "num_heads": 2, "topk": 4}


def converted(family: str = "llama", seed: int = 3, **options: Any) -> Any:
    model = FAMILIES[family](seed=seed)
    convert(model, PeerConfig(**{"active": 0.6, "refine_steps": 0 if options else None} | options), texts(model))
    return model


def texts(model: Any) -> list[Any]:
    return [inputs_for(model, seed=seed) for seed in range(5, 9)]


def teach(model: Any) -> None:
    """As training may leave the memories."""
    for layer in peer_layers(model).values():
        if layer.memory is not None:
            torch.nn.init.normal_(layer.memory.pool.v)


@pytest.mark.parametrize("keys", ["copies", "product"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_grown_model_computes_what_it_did(family: str, keys: str, tmp_path: Path) -> None:
    """To the bit, at its budget and with everything on, and after it was saved and loaded."""
    model = converted(family, keys=keys, refit=False if keys == "product" else None)
    inputs = inputs_for(model, seed=4)
    shares = [0.6, 1.0] if keys == "copies" else [1.0]
    before = []
    for share in shares:
        model.set_active(share, prefill="budget")
        before.append(logits(model, inputs))
    growth = grow(model, GrowConfig(**SMALL, layers="all", share_pool=True), texts(model))
    assert list(growth.layers) == list(peer_layers(model))
    assert all(layer.memory is not None for layer in peer_layers(model).values())
    model.save_pretrained(tmp_path / "grown")
    loaded = type(model).from_pretrained(tmp_path / "grown").eval()
    for one in (model, loaded):
        for share, expected in zip(shares, before, strict=True):
            one.set_active(share, prefill="budget")
            assert torch.equal(logits(one, inputs), expected)
    teach(model)
    assert relative_error(logits(model, inputs), before[-1]) > 1e-4, "the memory is in the model"


def test_only_the_layers_asked_for_grow_and_what_they_take_is_told() -> None:
    model = converted()
    before = fractions(model)
    growth = grow(model, GrowConfig(**SMALL, layers="1"), texts(model))
    assert list(growth.layers) == ["model.layers.1.mlp"]
    assert [layer.memory is not None for layer in peer_layers(model).values()] == [False, True, False]
    assert set(model.config.peer["layers"]["model.layers.1.mlp"]["memory"]) >= {"num_experts", "grid", "query_dim"}
    read, done = model.model.layers[1].mlp.memory.cost()
    assert growth.bytes_fraction == pytest.approx(before[0] + read / 56 / 3)
    assert growth.macs_fraction == pytest.approx(before[1] + done / 56 / 3)
    assert (growth.bytes_fraction, growth.macs_fraction) == fractions(model)


def test_the_same_seed_gives_the_same_memory_and_training_does_not_matter() -> None:
    one, other, third = converted(), converted(), converted()
    for model, seed in ((one, 0), (other, 0), (third, 1)):
        model.train(model is other)
        grow(model, GrowConfig(**SMALL, seed=seed), texts(model))
        assert model.training is (model is other)
    state = {name: tensor for name, tensor in one.state_dict().items() if ".memory." in name}
    assert {name.rpartition("memory.")[2] for name in state} == {
        *("keys.sub_keys", "keys.query_proj.weight", "keys.query_proj.bias", "pool.u", "pool.v", "pool.gate")
    }
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in state.items())
    assert not torch.equal(state["model.layers.1.mlp.memory.pool.u"], third.model.layers[1].mlp.memory.pool.u)


def test_new_experts_are_as_large_as_neurons_and_say_nothing() -> None:
    model = converted()
    grow(model, GrowConfig(num_experts=1024), texts(model))
    layer = model.model.layers[1].mlp
    for name in ("u", "gate"):
        new, own = getattr(layer.memory.pool, name), getattr(layer.pool, name)
        assert new.std().item() == pytest.approx(own.square().mean().sqrt().item(), rel=0.05)
    assert not layer.memory.pool.v.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tables_have_the_models_number_type(dtype: torch.dtype) -> None:
    model = converted().to(dtype)
    inputs = inputs_for(model, seed=4)
    before = logits(model, inputs)
    grow(model, GrowConfig(**SMALL), texts(model))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.equal(logits(model, inputs), before)


def test_one_pool_for_several_layers_is_one_module_and_is_saved_once(tmp_path: Path) -> None:
    model = converted()
    grow(model, GrowConfig(**SMALL, layers="0,2", share_pool=True), texts(model))
    first, last = model.model.layers[0].mlp.memory, model.model.layers[2].mlp.memory
    assert first.pool is last.pool
    assert not torch.equal(first.keys.query_proj.weight, last.keys.query_proj.weight)
    teach(model)
    inputs = inputs_for(model, seed=4)
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path / "grown", max_shard_size="20KB")
    stored = [name for file in tmp_path.glob("grown/*.safetensors") for name in _names(file)]
    assert [name for name in stored if name.endswith("memory.pool.v")] == ["model.layers.0.mlp.memory.pool.v"]
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "grown", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.model.layers[0].mlp.memory.pool is loaded.model.layers[2].mlp.memory.pool
    assert torch.equal(logits(loaded.eval(), inputs), expected)
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())


def _names(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), side=st.sampled_from([8, 16]), heads=st.integers(1, 3), flat=st.booleans())
@torch.no_grad()
def test_fitted_keys_find_more_evenly_than_random_ones(seed: int, side: int, heads: int, flat: bool) -> None:
    """On inputs with a mean and a few large directions, as those of language models have."""
    torch.manual_seed(seed)
    scale_d = torch.ones(24) if flat else torch.cat([torch.full((2,), 20.0), torch.ones(22)])
    x_td = torch.randn(4000, 24) @ torch.linalg.qr(torch.randn(24, 24))[0] * scale_d + 3 * torch.randn(24)
    keys = ProductKeys(
        24, side * side, (side, side), heads,
        share_pool=True, share_keys=True, query_dim=8, query_norm=False, key_bias=False, query_bias=True,
    )  # fmt: skip
    torch.nn.init.zeros_(keys.query_proj.bias)

    def unevenness() -> float:
        share_n = torch.bincount(keys(x_td, 2)[0].flatten(), minlength=side * side) / (4000 * heads * 2)
        return math.log(side * side) - torch.special.entr(share_n).sum().item()

    random = unevenness()
    fit_keys(keys, x_td, seed)
    query = keys.query_proj(x_td).view(4000, heads, 8)
    assert query.mean(0).abs().max() < 1e-3
    for head in range(heads):
        torch.testing.assert_close(torch.cov(query[:, head].T), torch.eye(8), atol=0.02, rtol=0)
    assert unevenness() < min(0.5, random)


def test_what_cannot_grow_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(model: Any, message: str, **options: Any) -> None:
        with pytest.raises(ConversionError, match=message):
            grow(model, GrowConfig(**SMALL | options), texts(model))

    refused(FAMILIES["llama"](seed=3), "LlamaForCausalLM has no PEER layer to grow: convert the model first")
    model = converted()
    refused(model, "layers '7': the model has PEER layers 0-2; config.json lists them", layers="7")
    refused(model, "layers 'mlp': no PEER layer has that path", layers="mlp")
    refused(model, "model.layers.1.mlp has 56 experts, and a memory of 36 is no growth", num_experts=36)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("M", (), {"available": 10_000})())
    size = 3 * 144 * 3 * 32 * 4
    assert size > 10_000
    refused(model, "the model with 432 new experts takes 0.0 GB, and this machine has 0.0 GB free", layers="all")
    monkeypatch.undo()
    assert not any(layer.memory for layer in peer_layers(model).values())
    grow(model, GrowConfig(**SMALL), texts(model))
    refused(model, "model.layers.1.mlp has a memory of 144 experts already: leave it out", layers="all")
    assert list(plan_growth(model, GrowConfig(**SMALL, layers="0"))) == ["model.layers.0.mlp"]
    model.model.layers[0].mlp.pool.u.data.fill_(math.nan)
    model.model.embed_tokens.weight.data.fill_(math.nan)
    refused(model, "model.layers.0.mlp: its input on the calibration data is NaN or infinite", layers="0")


def test_layers_of_different_forms_share_no_pool() -> None:
    model = converted("llama")
    model.model.layers[2].mlp.pool.act = torch.nn.GELU()
    with pytest.raises(ConversionError, match="cannot share a pool: their experts are of different forms"):
        plan_growth(model, GrowConfig(**SMALL, layers="all", share_pool=True))


def test_it_is_exported() -> None:
    assert peerify.grow is grow
    assert peerify.GrowConfig is GrowConfig


def test_windows_of_tokens_are_calibration_too() -> None:
    model = converted()
    grow(model, GrowConfig(**SMALL), torch.randint(3, VOCAB, (8, 24)))
    assert model.model.layers[1].mlp.memory is not None
