"""Feed-forward layers are found, read and replaced in every family."""

from __future__ import annotations

import pytest
import torch
from feedforward_layers import replace_all
from tiny import FAMILIES, ROUTED, inputs_for, logits, relative_error
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertForMaskedLM

from peerify.conversion.feedforward import read_feedforward, replace
from peerify.discovery.sites import find_feedforwards, select_sites

# family: number of layers, kind, activation, d_ff, whether the layer is a module of its own
EXPECTED = {
    "llama": (3, "gated", "silu", 56, True),
    "mistral": (3, "gated", "silu", 56, True),
    "qwen3": (3, "gated", "silu", 56, True),
    "gemma3": (3, "gated", "gelu_pytorch_tanh", 56, True),
    "phi3": (3, "gated", "silu", 56, True),
    "olmo2": (3, "gated", "silu", 56, True),
    "gpt2": (2, "plain", "gelu_pytorch_tanh", 128, True),
    "gpt_neox": (2, "plain", "gelu", 64, True),
    "opt": (2, "plain", "relu", 64, False),
    "opt-square": (2, "plain", "relu", 32, False),
    "falcon": (2, "plain", "gelu", 128, True),
    "bloom": (2, "plain", "gelu_pytorch_tanh", 128, False),
    "bert": (2, "plain", "gelu", 64, False),
    "t5": (4, "plain", "relu", 48, True),
    "t5-gated": (4, "gated", "gelu_pytorch_tanh", 48, True),
    "vit": (2, "plain", "gelu", 64, True),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_finds_every_layer_with_and_without_weights(family: str) -> None:
    count, kind, activation, d_ff, whole = EXPECTED[family]
    sites = find_feedforwards(FAMILIES[family]())
    assert len(sites) == count
    for site in sites:
        assert (site.kind, site.activation, site.d_ff, site.d_model) == (kind, activation, d_ff, 32)
        assert site.convertible, site.reason
        assert (site.identities == ()) == whole
    assert find_feedforwards(FAMILIES[family](device="meta")) == sites


@pytest.mark.parametrize("family", FAMILIES)
def test_reads_what_the_layer_computes(family: str) -> None:
    model = FAMILIES[family](seed=3)
    site = find_feedforwards(model)[-1]
    seen: dict[str, Tensor] = {}

    def remember(**tensors: Tensor) -> None:  # clones: Falcon adds its attention to y in place
        seen.update({name: tensor.clone() for name, tensor in tensors.items()})

    model.get_submodule(site.path).register_forward_pre_hook(lambda m, args: remember(x=args[0]))
    model.get_submodule(site.down).register_forward_hook(lambda m, args, out: remember(z=args[0], y=out))
    logits(model, inputs_for(model, seed=4))
    layer = read_feedforward(model, site)
    assert layer.u_fd.shape == layer.v_fd.shape == (site.d_ff, site.d_model)
    assert relative_error(layer.hidden(seen["x"]), seen["z"]) < 1e-5
    assert relative_error(layer(seen["x"]), seen["y"]) < 1e-5
    tensors = (layer.u_fd, layer.gate_fd, layer.v_fd, layer.u_bias_f, layer.gate_bias_f, layer.bias_d)
    assert site.parameters == sum(t.numel() for t in tensors if t is not None)


@pytest.mark.parametrize("family", FAMILIES)
def test_replacing_every_layer_leaves_the_output_unchanged(family: str) -> None:
    model = FAMILIES[family](seed=1)
    inputs = inputs_for(model, seed=2)
    before = logits(model, inputs)
    sites = find_feedforwards(model)
    replace_all(model, sites)
    assert relative_error(logits(model, inputs), before) < 1e-5
    # The comparison can fail: without its feed-forward layers the model says something else.
    for site in sites:
        replace(model, site, nn.Identity())
    assert relative_error(logits(model, inputs), before) > 1e-2


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_bfloat16_gives_the_same_sites(family: str) -> None:
    assert find_feedforwards(FAMILIES[family]().bfloat16()) == find_feedforwards(FAMILIES[family]())


def test_discovery_leaves_no_trace() -> None:
    model = FAMILIES["gpt2"]()
    model.train()
    model.transformer.h[0].eval()
    training = {name: m.training for name, m in model.named_modules()}
    state = torch.random.get_rng_state()
    find_feedforwards(model)
    assert {name: m.training for name, m in model.named_modules()} == training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_routed_experts_are_not_dense_layers(device: str) -> None:
    assert find_feedforwards(ROUTED["mixtral"](device=device)) == []
    sites = find_feedforwards(ROUTED["qwen2_moe"](device=device))
    assert [(s.path, s.d_ff, s.convertible) for s in sites] == [
        ("model.layers.0.mlp", 56, True),
        ("model.layers.1.mlp.shared_expert", 40, True),
        ("model.layers.2.mlp.shared_expert", 40, True),
    ]


def test_replacing_shared_experts_leaves_a_mixture_unchanged() -> None:
    model = ROUTED["qwen2_moe"](seed=5)
    inputs = inputs_for(model, seed=6)
    before = logits(model, inputs)
    replace_all(model, find_feedforwards(model))
    assert relative_error(logits(model, inputs), before) < 1e-5


def test_a_layer_that_runs_many_times_is_one_site() -> None:
    config = AlbertConfig(
        vocab_size=128, embedding_size=16, hidden_size=32, intermediate_size=48, num_attention_heads=4
    )
    model = AlbertForMaskedLM(config).eval()
    inputs = inputs_for(model)
    before = logits(model, inputs)
    sites = find_feedforwards(model)
    assert [site.path for site in sites if site.convertible] == [
        "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn"
    ]
    replace_all(model, select_sites(sites, "all"))
    assert relative_error(logits(model, inputs), before) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_lora_adapters_belong_to_the_layer_they_are_around(family: str) -> None:
    peft = pytest.importorskip("peft")
    model = FAMILIES[family](seed=1)
    before = logits(model, inputs_for(model, seed=2))
    targets = {"llama": ["gate_proj", "down_proj", "q_proj"], "gpt2": ["c_fc", "c_proj"], "phi3": ["gate_up_proj"]}
    options = peft.LoraConfig(
        target_modules=targets[family], r=4, init_lora_weights=False, fan_in_fan_out=family == "gpt2"
    )
    peft.get_peft_model(model, options).eval()
    adapted = logits(model, inputs_for(model, seed=2))
    assert relative_error(adapted, before) > 1e-3
    sites = find_feedforwards(model)
    assert [site.convertible for site in sites] == [True] * EXPECTED[family][0]
    replace_all(model, sites)
    assert relative_error(logits(model, inputs_for(model, seed=2)), adapted) < 1e-5
