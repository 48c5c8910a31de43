"""A converted model becomes the dense model that it is with every expert kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import text_file, tiny_checkpoint
from command_line import run
from safetensors.torch import load_file
from tiny import FAMILIES, inputs_for, logits, relative_error
from torch import nn

from peerify.config.peer import PeerConfig
from peerify.config.recipe import Recipe
from peerify.conversion.checkpoint import convert_checkpoint
from peerify.conversion.densify import densify, densify_checkpoint
from peerify.conversion.model import convert
from peerify.errors import ConversionError, OutputError
from peerify.modeling.peer_elastic import ElasticPEER
from peerify.modules import peer_layers


def keep_everything(model: nn.Module) -> None:
    for layer in peer_layers(model).values():
        if isinstance(layer, ElasticPEER):
            layer.set_active(1)
        else:
            layer.topk = layer.keys.num_keys


@pytest.mark.parametrize("keys", ["copies", "product"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_dense_again_is_the_model_with_every_expert_kept(family: str, keys: str) -> None:
    model = FAMILIES[family](seed=3)
    inputs = inputs_for(model, seed=4)
    before, dense_class = logits(model, inputs), type(model)
    batches = [inputs_for(model, seed=seed) for seed in range(5, 9)]
    options: dict[str, Any] = {"active": 0.6, "keys": keys, "refine_steps": 0, "refit": False}
    convert(model, PeerConfig(**options), batches)
    dense = densify(model)
    assert type(dense) is dense_class
    assert not peer_layers(dense)
    assert relative_error(logits(dense, inputs), before) < 1e-5, "nothing was fitted: the original, in another order"

    for layer in peer_layers(model).values():
        for name, parameter in layer.pool.named_parameters():
            if name in ("u", "gate", "v", "u_bias", "gate_bias"):
                parameter.data.mul_(1 + 0.1 * torch.randn_like(parameter))
        if layer.bias is not None:
            layer.bias.data.add_(torch.randn_like(layer.bias))
    dense = densify(model)
    keep_everything(model)
    after = logits(model, inputs)
    assert relative_error(after, before) > 1e-4
    assert relative_error(logits(dense, inputs), after) < 1e-5, "trained weights are taken"


def test_what_has_no_dense_form_is_refused() -> None:
    def converted(**options: Any) -> Any:
        model = FAMILIES["llama"](seed=3)
        convert(model, PeerConfig(**options), [inputs_for(model, seed=5)])
        return model

    with pytest.raises(ConversionError, match=r"layers\.0\.mlp cannot become dense: softmax gates weigh its experts"):
        densify(converted(preset="peer-paper", num_heads=2, topk=4))
    with pytest.raises(ConversionError, match="it has 32 experts, and the dense layer 56 neurons"):
        densify(converted(num_experts=32, active=0.25))
    with pytest.raises(ConversionError, match="LlamaForCausalLM has no PEER layer: it is dense already"):
        densify(FAMILIES["llama"](seed=3))


def test_the_command_writes_what_plain_transformers_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_checkpoint(tmp_path / "dense")
    text_file(tmp_path / "text.txt", 2000)
    options = ["model=dense", "output=peer", "calibration.data=text.txt", "calibration.tokens=512"]
    options += ["calibration.context=32", "convert.active=0.5"]
    convert_checkpoint(Recipe.load(None, options))
    said = json.loads(run("densify", "peer", "again", "--json").stdout)
    assert said["architecture"] == "LlamaForCausalLM"
    assert len(said["layers"]) == 3
    names = {path.name for path in (tmp_path / "dense").iterdir()}
    assert {path.name for path in (tmp_path / "again").iterdir()} <= names | {"generation_config.json"}
    config = json.loads((tmp_path / "again/config.json").read_text())
    assert not {"peer", "peer_active", "peer_prefill", "auto_map"} & config.keys()
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    one, other = load_file(tmp_path / "dense/model.safetensors"), load_file(tmp_path / "again/model.safetensors")
    assert {name: tensor.shape for name, tensor in one.items()} == {name: t.shape for name, t in other.items()}
    up = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(one[up], other[up]), "the same neurons in the same order"
    code = (
        "import sys, torch\nassert not any('peerify' in name for name in sys.modules)\n"
        "from transformers import AutoModelForCausalLM\n"
        "a, b = (AutoModelForCausalLM.from_pretrained(name) for name in ('dense', 'again'))\n"
        "ids = torch.arange(20)[None]\n"
        "with torch.no_grad(): torch.testing.assert_close(a(ids).logits, b(ids).logits)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    with pytest.raises(OutputError, match="again exists"):
        densify_checkpoint("peer", "again")
    assert run("densify", "dense", "x").exit_code == 1
    assert not (tmp_path / "x").exists()
