"""Feed-forward layers are found, read and replaced in every family, and nothing else is taken for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, ROUTED, inputs_for, logits, relative_error
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AlbertConfig, AlbertForMaskedLM
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from peerify.dense import FeedForward, read_feedforward, replace
from peerify.errors import ConversionError
from peerify.feedforward import (
    Site,
    find_feedforwards,
    select_sites,
)
from peerify.formula import Projection
from peerify.layer import exact_layer

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


class StandIn(nn.Module):
    """What a converted layer is to the model: a module that computes the feed-forward by itself."""

    def __init__(self, layer: FeedForward) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def replace_all(model: nn.Module, sites: list[Site]) -> None:
    for site in sites:
        replace(model, site, StandIn(read_feedforward(model, site)))


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


D, D_FF = 8, 12


class Zoo(nn.Module):
    """One layer, written by `formula(self, x)` with the modules given."""

    def __init__(self, formula: Callable[[Any, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.formula = formula
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(self, x)


class Block(nn.Module):
    """A residual block around a Zoo layer, so that nothing but the layer is a module of its own."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(self.norm(x))


def fused() -> nn.Linear:
    return nn.Linear(D, 2 * D_FF)


def up() -> nn.Linear:
    return nn.Linear(D, D_FF)


def down() -> nn.Linear:
    return nn.Linear(D_FF, D)


def conv(n_out: int, n_in: int) -> Conv1D:
    module = Conv1D(n_out, n_in)
    nn.init.normal_(module.bias)
    return module


def gate_up(m: Any, x: Tensor) -> Tensor:
    gate, value = m.fc(x).chunk(2, dim=-1)
    return m.out(F.silu(gate) * value)


def up_gate(m: Any, x: Tensor) -> Tensor:
    value, gate = m.fc(x).split([D_FF, D_FF], dim=-1)
    return m.out(value * F.gelu(gate))


def interleaved(m: Any, x: Tensor) -> Tensor:
    h = m.fc(x)
    return m.out(h[..., ::2] * torch.sigmoid(h[..., 1::2]))


def stacked(m: Any, x: Tensor) -> Tensor:
    h = m.fc(x).view(*x.shape[:-1], 2, D_FF)
    return m.out(F.relu(h[..., 0, :]) * h[..., 1, :])


def paired(m: Any, x: Tensor) -> Tensor:
    gate, value = m.fc(x).unflatten(-1, (D_FF, 2)).unbind(-1)
    return m.out(gate * value)


def functional(m: Any, x: Tensor) -> Tensor:
    h = m.fc(x)
    return m.out(0.5 * h * (1.0 + torch.erf(h / 2.0**0.5)))


def in_place(m: Any, x: Tensor) -> Tensor:
    return m.out(m.fc(x).clamp_(min=0).pow(2))


def flattened(m: Any, x: Tensor) -> Tensor:
    return m.out(F.mish(m.fc(x.reshape(-1, D)))).reshape(x.shape)


CONVERTIBLE = {
    "fused, gate first": (gate_up, fused, "silu", (0, 1), (D_FF, 1)),
    "fused, up first": (up_gate, fused, "gelu", (D_FF, 1), (0, 1)),
    "interleaved": (interleaved, fused, "sigmoid", (1, 2), (0, 2)),
    "stacked": (stacked, fused, "relu", (0, 1), (D_FF, 1)),
    "bilinear pairs": (paired, fused, "linear", (0, 2), (1, 2)),
    "functional": (functional, up, "gelu", None, (0, 1)),
    "in place": (in_place, up, "relu2", None, (0, 1)),
    "flattened tokens": (flattened, up, "mish", None, (0, 1)),
    "Conv1D": (up_gate, lambda: conv(2 * D_FF, D), "gelu", (D_FF, 1), (0, 1)),
}


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_zoo_is_converted(name: str) -> None:
    formula, first, activation, gate, value = CONVERTIBLE[name]
    layer = Zoo(formula, fc=first(), out=conv(D, D_FF) if name == "Conv1D" else down())
    model, x = nn.Sequential(Block(layer)).eval(), torch.randn(2, 5, D)
    (site,) = find_feedforwards(model, {"input": x})
    assert (site.path, site.identities, site.activation) == ("0.layer", (), activation)
    assert site.convertible
    assert (site.up.start, site.up.step) == value
    assert (site.gate and (site.gate.start, site.gate.step)) == gate
    expected = model(x)
    replace_all(model, [site])
    assert relative_error(model(x), expected) < 1e-6


def clamped(m: Any, x: Tensor) -> Tensor:
    gate, value = m.fc(x).chunk(2, dim=-1)
    return m.out(F.silu(gate.clamp(max=0.3)) * value.clamp(-0.5, 0.5))


def clamped_after(m: Any, x: Tensor) -> Tensor:
    gate, value = m.fc(x).chunk(2, dim=-1)
    return m.out(F.silu(gate).clamp(max=0.2) * value.clamp(min=-0.4, max=0.4))


def clamped_and_shifted(m: Any, x: Tensor) -> Tensor:
    gate, value = m.fc(x).chunk(2, dim=-1)
    gate, value = gate.clamp(max=0.6), value.clamp(-0.7, 0.7)
    return m.out((value + 1.0) * (gate * torch.sigmoid(1.702 * gate)))


def multiplied(m: Any, x: Tensor) -> Tensor:
    gate, value = m.fc(x).chunk(2, dim=-1)
    return m.out(value * F.silu(gate * 0.35)) * 0.8


@pytest.mark.parametrize(
    ("formula", "clamp", "scales"),
    [
        (clamped, {"gate": 0.3, "up": 0.5}, (1.0, 1.0)),
        (clamped_after, {"act": 0.2, "up": 0.4}, (1.0, 1.0)),
        (clamped_and_shifted, {"gate": 0.6, "up": 0.7, "shift": 1.0}, (1.0, 1.0)),
        (multiplied, None, (0.35, 0.8)),
    ],
)
def test_clamps_shifts_and_constant_factors_belong_to_the_layer(
    formula: Callable[[Any, Tensor], Tensor], clamp: dict[str, float] | None, scales: tuple[float, float]
) -> None:
    model = nn.Sequential(Block(Zoo(formula, fc=fused(), out=down()))).eval()
    x = 3 * torch.randn(2, 5, D)
    (site,) = find_feedforwards(model, {"input": x})
    assert site.convertible, site.reason
    assert site.clamp == clamp
    assert (site.inner_scale, site.outer_scale) == scales
    expected = model(x)
    layer, plan = exact_layer(read_feedforward(model, site), site)
    assert plan.get("clamp") == clamp
    replace_all(model, [site])
    assert relative_error(model(x), expected) < 1e-6
    replace(model, site, layer)
    assert relative_error(model(x), expected) < 1e-6


def test_low_rank_adapters_beside_the_projection_are_the_reason() -> None:
    def adapted(m: Any, x: Tensor) -> Tensor:
        gate, value = (m.fc(x) + m.b(m.a(x))).chunk(2, dim=-1)
        return m.out(F.silu(gate) * value)

    low = {"a": nn.Linear(D, 3, bias=False), "b": nn.Linear(3, fused().out_features, bias=False)}
    model = nn.Sequential(Block(Zoo(adapted, fc=fused(), out=down(), **low))).eval()
    (site,) = find_feedforwards(model, {"input": torch.randn(2, 5, D)})
    assert not site.convertible
    assert "adapters" in site.reason


@pytest.mark.parametrize("name", ["relu", "gelu", "silu", "relu2", "gelu_pytorch_tanh"])
def test_two_neurons_and_one_token_are_enough_to_tell_the_activation(name: str) -> None:
    layer = Zoo(lambda m, x: m.out(ACT2FN[name](m.fc(x))), fc=nn.Linear(D, 2), out=nn.Linear(2, D))
    (site,) = find_feedforwards(nn.Sequential(Block(layer)).eval(), {"input": torch.randn(1, D)})
    assert site.activation == name


def test_a_learned_activation_goes_with_the_layer() -> None:
    act = ACT2FN["xielu"].float()
    with torch.no_grad():
        for number in (*act.parameters(), *act.buffers()):
            number.add_(0.3)
    model = nn.Sequential(Block(Zoo(lambda m, x: m.out(m.act(m.fc(x))), fc=up(), act=act, out=down()))).eval()
    x = torch.randn(2, 5, D)
    (site,) = find_feedforwards(model, {"input": x})
    assert (site.activation, site.learned, site.path, site.convertible) == ("xielu", "0.layer.act", "0.layer", True)
    expected = model(x)
    layer, _ = exact_layer(read_feedforward(model, site), site)
    replace(model, site, layer)
    assert relative_error(model(x), expected) < 1e-6


def test_a_module_that_holds_up_and_activation_is_what_is_replaced() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = up()

        def forward(self, x: Tensor) -> Tensor:
            return F.gelu(self.fc(x))

    model = nn.Sequential(Zoo(lambda m, x: x + m.out(m.inner(x)), inner=Inner(), out=down())).eval()
    x = torch.randn(2, 5, D)
    (site,) = find_feedforwards(model, {"input": x})
    assert (site.path, site.identities, site.convertible) == ("0.inner", ("0.out",), True)
    expected = model(x)
    replace_all(model, [site])
    assert relative_error(model(x), expected) < 1e-6


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


def normed(m: Any, x: Tensor) -> Tensor:
    return m.out(m.norm(F.silu(m.fc(x))))


def scaled(m: Any, x: Tensor) -> Tensor:
    return m.out(F.gelu(m.fc(x)) * m.norm.weight)


def batch_normed(m: Any, x: Tensor) -> Tensor:
    h = m.fc(x).flatten(0, 1)
    h = F.batch_norm(h, m.norm.weight.abs(), m.norm.weight.abs(), m.norm.weight, m.norm.bias)
    return m.out(F.relu(h)).view(x.shape)


def both_activated(m: Any, x: Tensor) -> Tensor:
    gate, value = m.fc(x).chunk(2, dim=-1)
    return m.out(F.silu(gate) * torch.tanh(value))


def odd_activation(m: Any, x: Tensor) -> Tensor:
    return m.out(torch.sin(m.fc(x)))


def read_twice(m: Any, x: Tensor) -> Tensor:
    h = F.relu(m.fc(x))
    return m.out(h) + h.mean(-1, keepdim=True)


def weights_twice(m: Any, x: Tensor) -> Tensor:
    return m.out(F.relu(m.fc(x))) + m.out(torch.tanh(x[..., :1]).expand(*x.shape[:-1], D_FF))


def extra_argument(m: Any, x: Tensor) -> Tensor:
    return x + m.out(F.relu(m.fc(x)))


NOT_CONVERTIBLE = {
    "norm": (normed, up, "a norm lies between"),
    "learned scale": (scaled, up, "learned parameters"),
    "batch norm": (batch_normed, up, "a norm lies between"),
    "both activated": (both_activated, fused, "not combined as act"),
    "odd activation": (odd_activation, up, "none of those that transformers knows"),
    "hidden read elsewhere": (read_twice, up, "hidden activation is also used"),
    "weights used elsewhere": (weights_twice, up, "weights are also used"),
    "residual inside, functional": (extra_argument, up, "neither the layer nor its activation"),
}


@pytest.mark.parametrize("name", NOT_CONVERTIBLE)
def test_zoo_is_refused_with_a_reason(name: str) -> None:
    formula, first, reason = NOT_CONVERTIBLE[name]
    model = nn.Sequential(Block(Zoo(formula, fc=first(), out=down(), norm=nn.LayerNorm(D_FF)))).eval()
    (site,) = find_feedforwards(model, {"input": torch.randn(2, 5, D)})
    assert not site.convertible
    assert reason in site.reason
    with pytest.raises(ConversionError, match=reason):
        read_feedforward(model, site)


def attention(m: Any, x: Tensor) -> Tensor:
    q = m.fc(x)
    return m.out(torch.softmax(q @ q.transpose(-1, -2), -1) @ q)


def low_rank(m: Any, x: Tensor) -> Tensor:
    return m.out(m.fc(x))


def low_rank_normed(m: Any, x: Tensor) -> Tensor:
    return m.out(m.norm(m.fc(x)))


def two_inputs(m: Any, x: Tensor) -> Tensor:
    return m.out(F.relu(m.fc(x)) * m.fc(x + 1))


def written_through_a_view(m: Any, x: Tensor) -> Tensor:
    h = F.relu(m.fc(x))
    h[..., :3].copy_(x[..., :3])
    return m.out(h)


def routed(m: Any, x: Tensor) -> Tensor:
    tokens = (x[..., 0] > 0).flatten().nonzero()[:, 0]
    flat = x.reshape(-1, D)
    return torch.zeros_like(flat).index_add(0, tokens, m.out(F.relu(m.fc(flat[tokens])))).view(x.shape)


@pytest.mark.parametrize("formula", [attention, low_rank, low_rank_normed, two_inputs, written_through_a_view, routed])
def test_zoo_of_other_layers_is_not_reported(formula: Callable[[Any, Tensor], Tensor]) -> None:
    model = nn.Sequential(Block(Zoo(formula, fc=up(), out=down(), norm=nn.LayerNorm(D_FF)))).eval()
    x = torch.randn(2, 5, D)
    x[0, 0, 0] = 9.0  # at least one token is routed
    assert find_feedforwards(model, {"input": x}) == []


def test_a_gated_layer_without_a_module_of_its_own_is_refused() -> None:
    def formula(m: Any, x: Tensor) -> Tensor:
        return x + m.out(m.act(m.gate(x)) * m.fc(x))

    model = nn.Sequential(Zoo(formula, gate=up(), fc=up(), act=nn.SiLU(), out=down())).eval()
    (site,) = find_feedforwards(model, {"input": torch.randn(2, 5, D)})
    assert (site.kind, site.convertible) == ("gated", False)
    assert "no module of its own" in site.reason


def test_a_layer_that_changes_the_width_is_refused() -> None:
    model = nn.Sequential(nn.Linear(D, D_FF), nn.ReLU(), nn.Linear(D_FF, D + 1)).eval()
    (site,) = find_feedforwards(model, {"input": torch.randn(2, D)})
    assert not site.convertible
    assert "output width 9 differs from its input width 8" in site.reason


def test_an_activation_module_shared_with_something_else_is_kept() -> None:
    def formula(m: Any, x: Tensor) -> Tensor:
        return m.act(x) + m.out(m.act(m.fc(x)))

    model = nn.Sequential(Zoo(formula, fc=up(), act=nn.ReLU(), out=down())).eval()
    (site,) = find_feedforwards(model, {"input": torch.randn(2, 5, D)})
    assert not site.convertible


def test_a_module_under_two_names_is_replaced_under_both() -> None:
    layer = Zoo(functional, fc=up(), out=down())
    model = nn.Sequential(Block(layer), Block(layer)).eval()
    x = torch.randn(2, 5, D)
    expected = model(x)
    (site,) = find_feedforwards(model, {"input": x})
    replace_all(model, [site])
    assert isinstance(model[0].layer, StandIn)
    assert model[0].layer is model[1].layer
    assert relative_error(model(x), expected) < 1e-6


NAMED = sorted(set(ACT2FN) - {"prelu", "xielu", "linear"})


@settings(deadline=None, max_examples=40)
@given(name=st.sampled_from(NAMED), gated=st.booleans(), swapped=st.booleans(), width=st.integers(1, 9))
def test_any_activation_and_layout_reads_back_exactly(name: str, gated: bool, swapped: bool, width: int) -> None:
    def formula(m: Any, x: Tensor) -> Tensor:
        if not gated:
            return m.out(ACT2FN[name](m.fc(x)))
        a, b = m.fc(x).chunk(2, dim=-1)
        return m.out(a * ACT2FN[name](b) if swapped else ACT2FN[name](a) * b)

    first = nn.Linear(D, 2 * width if gated else width)
    model = nn.Sequential(Block(Zoo(formula, fc=first, out=nn.Linear(width, D)))).eval()
    x = torch.randn(3, 40, D)
    (site,) = find_feedforwards(model, {"input": x})
    assert site.convertible, site.reason
    expected = model(x)
    replace_all(model, [site])
    assert relative_error(model(x), expected) < 1e-5


def test_a_failing_forward_is_one_sentence() -> None:
    with pytest.raises(ConversionError, match="pass example inputs"):
        find_feedforwards(nn.Linear(D, D))
    with pytest.raises(ConversionError, match="trial forward pass of LlamaForCausalLM failed"):
        find_feedforwards(FAMILIES["llama"](), {"input_ids": torch.tensor([[10**6]])})


def test_a_model_that_branches_on_its_activations_needs_weights() -> None:
    def formula(m: Any, x: Tensor) -> Tensor:
        return m.out(F.relu(m.fc(x))) if m.fc(x).sum() > 0 else x

    model = nn.Sequential(Zoo(formula, fc=up(), out=down())).eval().to("meta")
    with pytest.raises(ConversionError, match="without its weights"):
        find_feedforwards(model, {"input": torch.randn(2, D)})


def site(path: str, reason: str = "") -> Site:
    return Site(
        path=path,
        identities=(),
        up=Projection(path=f"{path}.up"),
        gate=None,
        down=f"{path}.down",
        kind="plain",
        d_model=D,
        d_ff=D_FF,
        activation="relu",
        parameters=2 * D * D_FF,
        convertible=not reason,
        reason=reason,
    )


SITES = [site(f"model.layers.{i}.mlp", "it is odd" if i == 3 else "") for i in range(12)]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("all", [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11]),
        ("middle", [6]),
        ("first-last", [0, 11]),
        ("0,4,9", [0, 4, 9]),
        ("9, 4 ,0,4", [0, 4, 9]),
        ("7-9", [7, 8, 9]),
        ("2,7-9,middle", [2, 6, 7, 8, 9]),
        ("model.layers.1.mlp", [1]),
        ("model.layers.1*", [1, 10, 11]),
        ("*.mlp", [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11]),
    ],
)
def test_layers_are_selected(spec: str, expected: list[int]) -> None:
    assert select_sites(SITES, spec) == [SITES[i] for i in expected]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("12", "feed-forward layers 0-11"),
        ("0,99", "'99'.*feed-forward layers 0-11"),
        ("9-7", "'9-7'"),
        ("3", r"layer 3 \(model.layers.3.mlp\) cannot be converted: it is odd"),
        ("2-4", "it is odd"),
        ("model.layers.3.mlp", "it is odd"),
        ("encoder.*", "no feed-forward layer has that path.*'model.layers.0.mlp'"),
        ("-1", "no feed-forward layer has that path"),
        ("", "no feed-forward layer has that path"),
        ("1,,2", "no feed-forward layer has that path"),
    ],
)
def test_wrong_layers_are_named(spec: str, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        select_sites(SITES, spec)


@pytest.mark.parametrize(("sites", "message"), [([], "routed experts"), ([SITES[3]], "it is odd")])
def test_a_model_without_convertible_layers_is_named(sites: list[Site], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        select_sites(sites, "all")


@given(chosen=st.sets(st.sampled_from([i for i in range(12) if i != 3]), min_size=1))
def test_selection_does_not_depend_on_how_it_is_written(chosen: set[int]) -> None:
    expected = [SITES[i] for i in sorted(chosen)]
    assert select_sites(SITES, ",".join(str(i) for i in chosen)) == expected
    assert select_sites(SITES, ",".join(SITES[i].path for i in chosen)) == expected
    assert select_sites(SITES, ",".join(f"{i}-{i}" for i in sorted(chosen, reverse=True))) == expected
