"""Feed-forward layers in the forms that architectures give them, and models made of several models."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from exact import exact_layer
from tiny import FAMILIES, SPECIAL, VOCAB, inputs_for, logits, relative_error
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

import peerify
from peerify.conversion.feedforward import read_feedforward, replace
from peerify.conversion.inspection import inspect_model
from peerify.discovery.sites import Site, calibrated_feedforwards, find_feedforwards, select_sites, survey
from peerify.errors import ConversionError

D, D_FF = 8, 12


class Layer(nn.Module):
    """A residual block whose feed-forward `formula(self, x)` is written with the modules given."""

    def __init__(self, formula: Callable[[Any, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.mlp = nn.Module()
        for name, module in {"fc": nn.Linear(D, D_FF), "out": nn.Linear(D_FF, D), **modules}.items():
            self.mlp.add_module(name, module)
        self.mlp.forward = lambda x: formula(self.mlp, x)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


@torch.no_grad()
def converted(model: nn.Module, sites: list[Site]) -> None:
    """Put PEER layers that retrieve everything in place of all sites."""
    for site in sites:
        layer, _ = exact_layer(read_feedforward(model, site), site)
        replace(model, site, layer)


def dropped(m: Any, x: Tensor) -> Tensor:
    return F.dropout(m.out(m.drop(F.gelu(m.fc(x)))), 0.3, m.training)


def layer_scaled(m: Any, x: Tensor) -> Tensor:
    return m.gamma.weight * m.out(m.act(m.fc(x)))


def learned(m: Any, x: Tensor) -> Tensor:
    return m.out(m.act(m.fc(x)))


def divided(m: Any, x: Tensor) -> Tensor:
    return m.out(F.silu(m.fc(x) / 4))


FORMS: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[], dict[str, nn.Module]], str, str]] = {
    "dropout inside": (dropped, lambda: {"drop": nn.Dropout(0.3)}, "gelu", "0.mlp"),
    # The scale is no part of the layer: PEER goes where the first linear layer was, and the rest falls away.
    "layer scale inside": (layer_scaled, lambda: {"gamma": nn.Embedding(1, D), "act": nn.ReLU()}, "relu", "0.mlp.fc"),
    "learned slope": (learned, lambda: {"act": ACT2FN["prelu"].float()}, "prelu", "0.mlp"),
    "divided": (divided, dict, "silu", "0.mlp"),
}


@pytest.mark.parametrize("name", FORMS)
def test_form_is_converted_exactly(name: str) -> None:
    formula, modules, activation, path = FORMS[name]
    model, x = nn.Sequential(Layer(formula, **modules())), torch.randn(2, 5, D)
    model.train()  # dropout must not hide what the layer computes
    (site,) = find_feedforwards(model, {"input": x})
    assert (site.activation, site.path, site.convertible) == (activation, path, True), site.reason
    model.eval()
    expected = model(x)
    converted(model, [site])
    assert relative_error(model(x), expected) < 1e-6
    model.get_submodule(path).pool.v.data.mul_(2)
    assert relative_error(model(x), expected) > 1e-3


def test_a_feed_forward_that_runs_in_chunks_is_one_layer() -> None:
    model = FAMILIES["bert"](chunk_size_feed_forward=4)
    inputs = inputs_for(model, seed=1)
    before = logits(model, inputs)
    sites = find_feedforwards(model, inputs)
    assert [site.path for site in sites] == [site.path for site in find_feedforwards(FAMILIES["bert"]())]
    converted(model, sites)
    assert relative_error(logits(model, inputs), before) < 1e-5


@pytest.mark.parametrize(
    ("spec", "layers"),
    [("encoder.*", [0, 1]), ("decoder.*", [2, 3]), ("*.0.*", [0, 2]), ("encoder.block.1.layer.1.DenseReluDense", [1])],
)
def test_globs_choose_among_encoder_and_decoder(spec: str, layers: list[int]) -> None:
    sites = find_feedforwards(FAMILIES["t5"](device="meta"))
    assert select_sites(sites, spec) == [sites[i] for i in layers]


TEXT = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    **SPECIAL,
}
IMAGE = 20  # the token that stands for a picture


def llava(device: str = "cpu") -> PreTrainedModel:
    """A text model with a vision tower."""
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 16, "patch_size": 8, "projection_dim": 32,
    }  # fmt: skip
    config = hf.LlavaConfig(
        vision_config=vision,
        text_config={"model_type": "llama", **TEXT},
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )
    return build(hf.LlavaForConditionalGeneration, config, device)


def qwen2_vl(device: str = "cpu") -> PreTrainedModel:
    """A text model with a tower that takes flattened patches and their grid."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    config = hf.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config={"embed_dim": 32, "hidden_size": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
        image_token_id=IMAGE,
    )
    return build(hf.Qwen2VLForConditionalGeneration, config, device)


def whisper(device: str = "cpu") -> PreTrainedModel:
    """Sound in, text out."""
    config = hf.WhisperConfig(
        vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=10,
        max_target_positions=16, decoder_start_token_id=1, **SPECIAL,
    )  # fmt: skip
    return build(hf.WhisperForConditionalGeneration, config, device)


def build(cls: Any, config: Any, device: str) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        return cls._from_config(config, dtype=torch.float32).eval()  # type: ignore[no-any-return]


def seen(seed: int = 0) -> dict[str, Tensor]:
    """A sentence about a picture of four patches."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(30, VOCAB, (2, 12), generator=generator)
    ids[:, 2:6] = IMAGE
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}


@pytest.mark.parametrize("make", [llava, qwen2_vl])
def test_towers_that_text_does_not_run_are_listed(make: Callable[..., PreTrainedModel]) -> None:
    for device in ("cpu", "meta"):
        sites, unseen = survey(make(device))
        assert unseen == {}
        assert all(site.convertible for site in sites if "layers" in site.path or "blocks" in site.path)
        text = [site for site in sites if "language_model" in site.path]
        tower = [site for site in sites if "vision" in site.path or "visual.blocks" in site.path]
        assert (len(text), len(tower)) == (2, 2)
        assert sites[:2] == text, "numbers of text layers must not depend on the tower"


def test_layers_of_sound_models_are_found() -> None:
    sites = find_feedforwards(whisper("meta"))
    assert [site.path.split(".")[1] for site in sites] == ["encoder", "encoder", "decoder", "decoder"]
    assert find_feedforwards(whisper()) == sites


def test_only_what_the_calibration_runs_is_converted() -> None:
    model = llava()
    sites = calibrated_feedforwards(model, {"input_ids": seen()["input_ids"].clamp(min=30)})
    assert [site.path for site in sites] == [site.path for site in find_feedforwards(model)]
    able = [site for site in sites if site.convertible]
    assert len(able) == 2
    assert all("language_model" in site.path for site in able)
    reasons = {site.reason for site in sites if "vision" in site.path}
    assert reasons == {"the calibration data does not run it"}
    both = calibrated_feedforwards(model, dict(seen()))
    assert sum(site.convertible for site in both) == 4


def test_a_model_with_a_tower_is_converted_on_pictures(tmp_path: Path) -> None:
    model = llava()
    before = logits(model, seen(1))
    result = peerify.convert(model, peerify.PeerConfig(active=1.0), [seen(seed) for seed in range(2)])
    assert len(result.layers) == 4
    assert relative_error(logits(model, seen(1)), before) < 1e-4
    model.save_pretrained(tmp_path / "peer")
    again = hf.AutoModelForImageTextToText.from_pretrained(tmp_path / "peer").eval()
    assert relative_error(logits(again, seen(1)), logits(model, seen(1))) < 1e-6


def test_lora_adapters_must_be_merged_before_conversion() -> None:
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4, init_lora_weights=False)
    adapted = peft.get_peft_model(FAMILIES["llama"](), options).eval()
    tokens = inputs_for(FAMILIES["llama"](), rows=4)["input_ids"]
    for model in (adapted, adapted.base_model.model):
        with pytest.raises(ConversionError, match="merge_and_unload"):
            peerify.convert(model, peerify.PeerConfig(active=1.0), tokens)
    before = logits(adapted, {"input_ids": tokens})
    merged = adapted.merge_and_unload()
    peerify.convert(merged, peerify.PeerConfig(active=1.0), tokens)
    assert relative_error(logits(merged, {"input_ids": tokens}), before) < 1e-4


def test_inspection_has_every_column_and_says_what_it_left_out(tmp_path: Path) -> None:
    llava("meta").config.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps(
            json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["LlavaForConditionalGeneration"]}
        )
    )
    result = inspect_model(str(tmp_path))
    for row in result["feedforwards"]:
        assert {"path", "kind", "d_model", "d_ff", "activation", "convertible", "reason", "parameters"} <= row.keys()
        assert row["convertible"] is (row["reason"] is None)
        for cost in ("bytes_per_token", "flops_per_token"):
            assert row[cost].keys() == {"dense", "converted"}
        if row["convertible"]:
            assert 0 < row["bytes_per_token"]["converted"] < row["bytes_per_token"]["dense"]
            assert row["flops_per_token"]["converted"] > 0
    assert sum(row["convertible"] for row in result["feedforwards"]) == 4
    assert result["unseen"] == {}


@pytest.mark.parametrize(("few", "lines"), [(10**9, []), (0, [""])])
def test_a_model_that_branches_on_activations_is_inspected_with_random_weights_if_small(
    few: int, lines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peerify.conversion.inspection._FEW_PARAMETERS", few)
    hf.JetMoeConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_key_value_heads=2, kv_channels=8,
        intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, architectures=["JetMoeForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    state = torch.get_rng_state()
    result = inspect_model(str(tmp_path))
    assert torch.equal(torch.get_rng_state(), state)
    assert (result["feedforwards"], list(result["unseen"])) == ([], lines)


LARGE = """
import json, resource, sys
from peerify.conversion.inspection import inspect_model
result = inspect_model(sys.argv[1])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"peak_kb": peak, "parameters": result["parameters"], "rows": result["feedforwards"]}))
"""


def test_a_config_of_70_billion_parameters_is_inspected_in_little_memory(tmp_path: Path) -> None:
    config = hf.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=128256, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    run = subprocess.run([sys.executable, "-c", LARGE, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert 70e9 < result["parameters"] < 71e9
    assert len(result["rows"]) == 80
    weights = 3 * 8192 * 28672
    for row in result["rows"]:
        assert (row["parameters"], row["bytes_per_token"]["dense"]) == (weights, 2 * weights)
        assert row["flops_per_token"]["dense"] == 2 * weights
    assert result["peak_kb"] < 2 * 2**20


def test_a_model_that_needs_text_and_a_picture_is_listed_from_its_config() -> None:
    part = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.CLIPConfig(
        text_config={**part, "vocab_size": VOCAB, **SPECIAL},
        vision_config={**part, "image_size": 16, "patch_size": 8},
        projection_dim=16,
    )
    sites = find_feedforwards(build(hf.CLIPModel, config, "meta"))
    assert [site.path.split(".")[0] for site in sites] == ["vision_model"] * 2 + ["text_model"] * 2
    assert all(site.convertible for site in sites)


def test_layers_that_only_some_activations_run_are_said_to_be_missing() -> None:
    def formula(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.out(F.relu(m.fc(x)))
        return 2 * y if y.sum() > 100 else y

    model = nn.Sequential(Layer(formula)).eval().to("meta")
    sites, unseen = survey(model, {"input": torch.randn(2, 5, D)})
    assert [site.path for site in sites] == ["0.mlp"]
    assert "may be missing" in unseen[""]
