"""The exactness law on every family, and what conversion does with each option."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from checkpoints import text_file, tiny_checkpoint
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, VOCAB, inputs_for, logits, relative_error
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

import peerify.conversion.refit as fitting
from peerify.checkpoint.files import CODE
from peerify.config.peer import PeerConfig
from peerify.config.recipe import CalibrationConfig, Recipe
from peerify.conversion import calibration
from peerify.conversion.checkpoint import convert_checkpoint
from peerify.conversion.feedforward import FeedForward
from peerify.conversion.layer import convert_layer
from peerify.conversion.model import Conversion, convert
from peerify.errors import ConversionError
from peerify.modeling import modeling_peer as modeling
from peerify.modeling.peer_elastic import ElasticPEER
from peerify.modeling.peer_layer import PEER
from peerify.modules import peer_layers


def data_for(model: PreTrainedModel) -> Tensor | list[dict[str, Tensor]]:
    """Windows of tokens, or pictures."""
    if model.main_input_name == "pixel_values":
        return [inputs_for(model, seed=int(torch.randint(2**31, ())), rows=8) for _ in range(2)]
    return torch.randint(3, VOCAB, (8, 24))


def converted(family: str, seed: int, **options: Any) -> tuple[Conversion, Tensor, dict[str, Tensor]]:
    """A conversion, the dense model's logits, and the inputs they belong to."""
    model = FAMILIES[family](seed=seed)
    inputs = inputs_for(model, seed=seed + 1)
    expected = logits(model, inputs)
    return convert(model, PeerConfig(**options), data_for(model)), expected, inputs


def reloaded(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    model.save_pretrained(folder)
    return getattr(modeling, type(model).__name__).from_pretrained(folder).eval()


KINDS: dict[str, type] = {"copies": ElasticPEER, "product": PEER}
DEPTH = dict.fromkeys(("llama", "mistral", "qwen3", "gemma3", "phi3", "olmo2"), 3) | {"t5": 4, "t5-gated": 4}


# --- The exactness law --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", ["copies", "product"])
@pytest.mark.parametrize("family", FAMILIES)
def test_everything_active_is_the_dense_model(family: str, keys: str, seed: int, tmp_path: Path) -> None:
    conversion, expected, inputs = converted(family, seed, active=1.0, keys=keys)
    model = conversion.model
    placed = sorted(name for name, module in model.named_modules() if isinstance(module, KINDS[keys]))
    assert placed == sorted(conversion.layers)
    assert len(placed) == DEPTH.get(family, 2)
    assert conversion.bytes_fraction == conversion.macs_fraction == pytest.approx(1)
    assert max(conversion.layer_errors.values()) < 1e-10
    assert relative_error(logits(model, inputs), expected) <= 1e-5
    again = reloaded(model, tmp_path)
    assert relative_error(logits(again, inputs), expected) <= 1e-5
    assert torch.equal(logits(again, inputs), logits(model, inputs))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gpt2", {"num_heads": 1, "topk": 128, "share_pool": True}),
        ("llama", {"num_heads": 4, "topk": 14, "joint_topk": False}),
        ("llama", {"active": 1.0, "num_heads": 3}),  # 57 cells for 56 neurons
        ("llama", {"active": 1.0, "num_shared": 11}),
        ("falcon", {"active": 1.0, "query_dim": 8, "query_norm": True}),
        # each neuron once or several times, in equal parts
        ("llama", {"num_experts": 150, "num_heads": 3, "topk": 50}),
        ("opt-square", {"num_experts": 64, "num_heads": 1, "topk": 64}),
    ],
)
def test_exact_with_explicit_numbers(family: str, options: dict[str, Any], seed: int) -> None:
    conversion, expected, inputs = converted(family, seed, **options)
    assert relative_error(logits(conversion.model, inputs), expected) <= 1e-5


@pytest.mark.parametrize("options", [{"num_heads": 1, "topk": 56, "share_pool": True}, {"num_heads": 4, "topk": 14}])
def test_exact_through_the_router(options: dict[str, Any], seed: int) -> None:
    """The layer need not retrieve when it takes everything; made to, it finds everything."""
    conversion, expected, inputs = converted("llama", seed, **options)
    for layer in conversion.model.modules():
        if isinstance(layer, PEER):
            assert layer.weights(torch.zeros(1, 32)) is None
    with patch.object(PEER, "needs_routing", True):
        assert relative_error(logits(conversion.model, inputs), expected) <= 1e-5


# --- Options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "chosen"), [("middle", [1]), ("first-last", [0, 2]), ("1-2", [1, 2]), ("*.0.mlp", [0])]
)
@pytest.mark.parametrize("keys", ["copies", "product"])
def test_some_layers(layers: str, chosen: list[int], keys: str, seed: int, tmp_path: Path) -> None:
    conversion, expected, inputs = converted("llama", seed, layers=layers, active=0.3, keys=keys)
    model = conversion.model
    model.set_active(0.3 if keys == "copies" else 1, prefill="budget")
    assert list(conversion.layers) == [f"model.layers.{i}.mlp" for i in chosen]
    assert [isinstance(block.mlp, KINDS[keys]) for block in model.model.layers] == [i in chosen for i in range(3)]
    # Against the dense model, not merely converted: something has changed, and loading brings it back.
    assert relative_error(logits(model, inputs), expected) > 1e-4
    assert torch.equal(logits(reloaded(model, tmp_path), inputs), logits(model, inputs))


@pytest.mark.parametrize(
    "options",
    [
        {"keys": "product"},
        {"num_shared": 6},
        {"keys": "product", "refit": False},
        {"gates": "sigmoid"},
        {"gates": "softmax"},
        {"share_pool": True, "num_heads": 2},
        {"joint_topk": False, "num_heads": 4},
        {"query_dim": 8},
        {"num_experts": 40},
        {"num_experts": 100},
        {"grid": (5, 12)},
        {"grid": (5, 6), "num_heads": 2, "topk": 6},
        {"preset": "peer-paper", "num_heads": 2, "topk": 4},
    ],
)
def test_every_option_makes_a_working_layer(options: dict[str, Any], seed: int, tmp_path: Path) -> None:
    """On what it was fitted to, the layer says better than nothing (error 1) what the dense one says."""
    conversion, _, inputs = converted(
        "llama", seed, layers="0", **({"active": 0.5} if "topk" not in options else {}) | options
    )
    (error,) = conversion.layer_errors.values()
    assert error < 1
    scores = logits(conversion.model, inputs)
    assert scores.isfinite().all()
    if "active" in options or "topk" not in options:
        assert conversion.bytes_fraction <= 0.5 + 1e-9
    assert torch.equal(logits(reloaded(conversion.model, tmp_path), inputs), scores)


def layer_problem(gated: bool = True, tokens: int = 1500) -> tuple[FeedForward, calibration.SiteData]:
    """A dense layer and inputs of unequal variance, so that neurons matter unequally."""
    d_model, d_ff = 24, 96
    ff = FeedForward(
        u_fd=torch.randn(d_ff, d_model) / d_model**0.5,
        gate_fd=torch.randn(d_ff, d_model) / d_model**0.5 if gated else None,
        v_fd=torch.randn(d_ff, d_model) / d_ff**0.5,
        u_bias_f=torch.randn(d_ff),
        gate_bias_f=None,
        bias_d=torch.randn(d_model),
        activation="silu" if gated else "relu",
    )
    x_td = torch.randn(tokens, d_model) * torch.linspace(0.1, 2, d_model)
    site: Any = SimpleNamespace(path="mlp", d_model=d_model, d_ff=d_ff, activation=ff.activation)
    return ff, calibration.SiteData(site=site, x_td=x_td, y_td=ff(x_td), correction_td=None)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("gates", ["unit", "softmax", "sigmoid"])
def test_refit_lowers_the_error(gated: bool, gates: str) -> None:
    ff, data = layer_problem(gated)
    errors = {}
    for refit in (False, True):
        config = PeerConfig(active=0.4, keys="product", gates=gates, refit=refit)
        layer, _, errors[refit] = convert_layer(ff, data, config)
        again = (layer(data.x_td) - data.y_td).pow(2).sum() / data.y_td.pow(2).sum()
        assert errors[refit] == pytest.approx(again.item(), rel=1e-3)
    assert errors[True] < 0.9 * errors[False]


@pytest.mark.parametrize("gates", ["softmax", "sigmoid"])
def test_gates_that_shrink_are_made_up_for(gates: str) -> None:
    """With everything retrieved too: a softmax over 96 experts makes each about 96 times smaller."""
    ff, data = layer_problem()
    config = PeerConfig(active=1.0, gates=gates)
    layer, _, error = convert_layer(ff, data, config)
    assert layer.active_experts(data.x_td[:50]).all()
    assert error < 0.3


def test_activations_that_are_not_kept_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """And in any number of chunks: the same layer."""
    ff, data = layer_problem()
    layers = []
    for chunk, kept in ((fitting.CHUNK_ELEMENTS, fitting.KEPT_ELEMENTS), (96 * 100, 0)):
        monkeypatch.setattr(fitting, "CHUNK_ELEMENTS", chunk)
        monkeypatch.setattr(fitting, "KEPT_ELEMENTS", kept)
        layer, _, _ = convert_layer(ff, data, PeerConfig(active=0.4, keys="product"))
        layers.append((layer.pool.v, data.converted_td))
    torch.testing.assert_close(layers[0], layers[1], rtol=1e-3, atol=1e-4)


def test_refit_follows_the_correction() -> None:
    """Asked to bring the stream back, the layer's output comes nearer to y + correction than to y."""
    ff, data = layer_problem()
    config = PeerConfig(active=0.5, keys="product")
    data.correction_td = 0.3 * data.y_td.roll(1, 1)
    layer, _, _ = convert_layer(ff, data, config)
    target = data.y_td + data.correction_td
    assert (layer(data.x_td) - target).norm() < (layer(data.x_td) - data.y_td).norm()


def test_more_compute_means_less_error() -> None:
    ff, data = layer_problem()
    errors = []
    for active in (0.15, 0.4, 0.7, 0.95):
        config = PeerConfig(active=active, keys="product")
        errors.append(convert_layer(ff, data, config)[2])
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 1


def test_fewer_experts_are_the_important_neurons() -> None:
    ff, data = layer_problem()
    config = PeerConfig(num_experts=60, num_heads=1, topk=60)
    layer, _, _ = convert_layer(ff, data, config)
    mean_f = (ff.hidden(data.x_td).abs() * ff.v_fd.norm(dim=1)).mean(0)
    kept = {int((ff.u_fd - u).norm(dim=1).argmin()) for u in layer.pool.u}
    assert kept == set(mean_f.topk(60).indices.tolist())


def test_training_on(seed: int) -> None:
    """What comes out is a model to train on: gradients reach experts and, with sigmoid gates, the keys."""
    conversion, _, inputs = converted("llama", seed, active=0.5, gates="sigmoid", num_shared=4)
    model = conversion.model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert model.model.layers[0].mlp.keys.sub_keys.grad.abs().max() > 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5-gated"])
def test_weights_of_copies_that_are_missing_start_at_random(family: str, seed: int, tmp_path: Path) -> None:
    conversion, _, inputs = converted(family, seed, active=0.5)
    conversion.model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    lost = {name for name in held if ".pool." in name}
    assert any("input_rms" in name for name in lost)
    save_file({name: held[name] for name in held.keys() - lost}, tmp_path / "model.safetensors", {"format": "pt"})
    model = type(conversion.model).from_pretrained(tmp_path).eval()
    model.set_active(0.5, prefill="budget")
    assert logits(model, inputs).isfinite().all()
    for layer in peer_layers(model).values():
        assert layer.pool.input_rms.eq(1).all()
        assert 1e-4 < layer.pool.u.std() < 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5-gated", "vit"])
def test_weights_that_are_missing_start_at_random(family: str, seed: int, tmp_path: Path) -> None:
    """Models are built on the meta device: what no file holds must still become numbers."""
    conversion, _, inputs = converted(family, seed, preset="peer-paper", num_heads=2, topk=3)
    conversion.model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    lost = [name for name in held if ".keys." in name or ".pool." in name]
    assert any("query_norm" in name for name in lost)
    save_file({name: held[name] for name in held.keys() - lost}, tmp_path / "model.safetensors", {"format": "pt"})
    model, info = type(conversion.model).from_pretrained(tmp_path, output_loading_info=True)
    assert len(info["missing_keys"]) >= sum("num_batches" not in name for name in lost)
    assert logits(model.eval(), inputs).isfinite().all()
    for layer in model.modules():
        if isinstance(layer, PEER):
            assert layer.keys.query_norm.running_var.eq(1).all()
            for table in (layer.keys.sub_keys, layer.keys.query_proj.weight, layer.pool.u, layer.pool.v):
                assert 1e-4 < table.std() < 2
                assert table.abs().max() < 20
    fresh = type(conversion.model)._from_config(model.config).eval()
    assert logits(fresh, inputs).isfinite().all()


# --- Refusals and repeatability -----------------------------------------------------------------------------------


def test_nan_names_the_layer(seed: int) -> None:
    model = FAMILIES["gpt2"](seed=seed)
    model.transformer.h[1].mlp.c_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ConversionError, match=r"transformer\.h\.1\.mlp.*NaN"):
        convert(model, PeerConfig(), data_for(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "7"}, "0-2"),
        ({"layers": "*.attention"}, "no feed-forward"),
        ({"num_heads": 99}, "99 heads"),
        ({"active": 0.01}, r"active 0\.01 cannot be reached"),
        ({"active": 0.01, "allocation": "uniform"}, r"active 0\.01 cannot be reached"),
    ],
)
def test_refusals_leave_the_model_alone(options: dict[str, Any], message: str, seed: int) -> None:
    model = FAMILIES["llama"](seed=seed)
    inputs = inputs_for(model)
    before = logits(model, inputs)
    with pytest.raises(ConversionError, match=message):
        convert(model, PeerConfig(**options), data_for(model))
    assert type(model).__name__ == "LlamaForCausalLM"
    assert torch.equal(logits(model, inputs), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays(dtype: torch.dtype, seed: int) -> None:
    model = FAMILIES["llama"](seed=seed).to(dtype)
    inputs = inputs_for(model)
    expected = logits(model, inputs)
    convert(model, PeerConfig(active=1.0), data_for(model))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert F.cosine_similarity(logits(model, inputs).flatten(), expected.flatten(), dim=0) > 0.99


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "dense")
    text = text_file(tmp_path / "text.txt", 2000)

    def run(name: str, **options: Any) -> dict[str, str]:
        torch.manual_seed(len(name))  # whatever happened before must not matter
        recipe = Recipe(
            model=str(source), output=str(tmp_path / name), convert=PeerConfig(**options),
            calibration=CalibrationConfig(data=str(text), tokens=1024, context=32),
        )  # fmt: skip
        summary = convert_checkpoint(recipe)
        assert summary["output"] == str(tmp_path / name)
        return {
            str(path.relative_to(tmp_path / name)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }

    first = run("first", seed=3)
    assert {"model.safetensors", "config.json", *CODE, "peerify.json", "README.md"} <= first.keys()
    assert run("the second", seed=3) == first
    product = run("product keys", keys="product", seed=3)
    assert run("product keys again", keys="product", seed=3) == product
    assert run("another", keys="product", seed=4)["model.safetensors"] != product["model.safetensors"]
