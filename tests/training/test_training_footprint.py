"""The memory that `train --dry-run` states, against what a forward pass really keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig, LlamaForCausalLM

from peerify.config.train import StageConfig, TrainConfig
from peerify.modeling.peer_elastic import ElasticPEER
from peerify.modeling.peer_layer import PEER
from peerify.training.footprint import PROCESS, memory_of
from peerify.training.straight_through import StraightThrough

WINDOWS, CONTEXT, WIDTH, EXPERTS = 4, 64, 64, 256


def model_of(kind: type[PEER | ElasticPEER] = PEER, **options: Any) -> Any:
    config = LlamaConfig(
        vocab_size=48, hidden_size=WIDTH, intermediate_size=EXPERTS, num_hidden_layers=3, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    for block in model.model.layers:
        block.mlp = kind(WIDTH, EXPERTS, **options)
    return model


def kept_bytes(model: Any, router: StraightThrough) -> int:
    """Of a forward pass, for the backward pass: no parameter, and each storage once."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    ids = torch.randint(48, (WINDOWS, CONTEXT))
    with router, saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(input_ids=ids, use_cache=False).logits
        size = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in parameters)
        assert logits.requires_grad
    return size


@pytest.mark.parametrize("active", [0.4, 1])
@pytest.mark.parametrize("gated", [True, False])
def test_activations_of_layers_with_budgets(gated: bool, active: float) -> None:
    """Experts are read in all ways. No copies are kept."""
    model = model_of(ElasticPEER, gated=gated, activation="silu", budgets=[[0.4, 1.0, 0.002, 0.4, 0.6]])
    for block in model.model.layers:
        block.mlp.set_active(active)
    data = {"sources": [], "context": CONTEXT}
    config = TrainConfig.model_validate({"data": data, "tokens": 1, "batch_size": WINDOWS, "precision": "no"})
    parameters = sum(parameter.numel() for parameter in model.parameters())
    stage = StageConfig(train="full")
    stated = memory_of(model, config, stage, parameters=parameters, trainable=parameters, teacher=0)
    really = kept_bytes(model.train(), StraightThrough(model, temperature=0.3))
    assert stated["copies"] == (0 if active == 1 else 2 * 4 * (3 if gated else 2) * WIDTH * EXPERTS)
    assert stated["activations"] == pytest.approx(really, rel=0.15)


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    "form",
    [
        {"grid": (4, EXPERTS // 32), "num_heads": 8, "share_pool": False, "share_keys": False, "joint_topk": True},
        {"grid": (16, EXPERTS // 16), "num_heads": 4, "query_dim": 16},
    ],
)
def test_activations_are_what_a_forward_pass_keeps(every: int, gated: bool, form: dict[str, Any]) -> None:
    model = model_of(**form, topk=12, gates="unit", key_bias=True, gated=gated, activation="silu")
    data = {"sources": [], "context": CONTEXT}
    stage = StageConfig(train="full", router_every=every)
    config = TrainConfig.model_validate({"data": data, "tokens": 1, "batch_size": WINDOWS, "precision": "no"})
    parameters = sum(parameter.numel() for parameter in model.parameters())
    stated = memory_of(model, config, stage, parameters=parameters, trainable=parameters, teacher=0)
    really = kept_bytes(model, StraightThrough(model, temperature=0.3, every=every, with_losses=False))
    assert stated["activations"] == pytest.approx(really, rel=0.25)

    assert stated["total"] == sum(size for part, size in stated.items() if part != "total")
    assert stated["total"] > PROCESS + 16 * parameters, "weights, gradients and two moments"
    smaller = memory_of(
        model, config.model_copy(update={"micro_batch_size": 1}), stage,
        parameters=parameters, trainable=parameters, teacher=0,
    )  # fmt: skip
    assert smaller["activations"] == pytest.approx(stated["activations"] / WINDOWS)
    # When a step takes little, writing a checkpoint takes more: it holds weights and moments twice.
    one = memory_of(
        model, config.model_copy(update={"batch_size": 1, "micro_batch_size": None}), stage,
        parameters=10**8, trainable=10**8, teacher=0,
    )  # fmt: skip
    assert one["total"] == PROCESS + 2 * 12 * 10**8
