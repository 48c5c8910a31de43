"""The language model of a larger one, loaded alone through its Auto class: exact as with the dense model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from build import small_models
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from peerify import PeerConfig, convert
from peerify.modeling.peer_elastic import ElasticPEER

STRANGER = """
import sys, torch
sys.modules["peerify"] = None
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

folder = sys.argv[1]
said = load_file(folder + "/said")
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
again = AutoModelForCausalLM.from_pretrained(folder + "/alone", trust_remote_code=True).eval()
for model in (model, again):
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=said["input_ids"]).logits, said["logits"])
"""


def answer(model: PreTrainedModel, ids_bt: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids_bt).logits


@pytest.mark.parametrize(
    ("model_type", "whole_class", "text_class"),
    [
        ("qwen3_5", "Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM"),
        ("llama4", "Llama4ForConditionalGeneration", "Llama4ForCausalLM"),
    ],
)
def test_text_part_of_a_converted_model(model_type: str, whole_class: str, text_class: str, tmp_path: Path) -> None:
    whole = next(built.model for built in small_models(model_type, whole_class))
    assert whole is not None
    ids_bt = torch.randint(5, 40, (8, 16))
    converted = convert(whole.eval(), PeerConfig(active=0.5), ids_bt).model
    inside = [path for path in converted.config.peer["layers"] if "language_model." in path]
    assert inside
    converted.set_active(0.5, prefill="budget")
    converted.save_pretrained(tmp_path)
    expected = answer(converted, ids_bt)

    part, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert type(part).__name__ == "Peer" + text_class
    assert sum(isinstance(module, ElasticPEER) for module in part.modules()) == len(inside)
    torch.testing.assert_close(answer(part.eval(), ids_bt), expected)

    part.save_pretrained(tmp_path / "alone")
    save_file({"input_ids": ids_bt, "logits": expected}, tmp_path / "said")
    assert not any("visual" in name or "vision" in name for name in load_file(tmp_path / "alone" / "model.safetensors"))
    run = subprocess.run([sys.executable, "-c", STRANGER, tmp_path], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
