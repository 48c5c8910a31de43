"""Any kind of model can be written from Python, tried out and published: text, pictures, sound, or two of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from exact import exact_layer
from hub_client import edit_card, record
from hub_server import Hub
from safetensors.torch import load_file

import peerify
from peerify.checkpoint.load import load_dense
from peerify.conversion.feedforward import read_feedforward, replace
from peerify.conversion.model import Conversion
from peerify.discovery.example_inputs import candidates
from peerify.discovery.sites import find_feedforwards
from peerify.errors import OutputError
from peerify.modeling.modeling_peer import FORMAT, adopt
from peerify.publishing import clean_process as stranger
from peerify.publishing import push as publishing
from peerify.publishing import verify

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**SMALL, "image_size": 16, "patch_size": 4}
WHISPER = {
    **{"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2},
    **{"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 64},
    **{"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16, "pad_token_id": 0},
    **{"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
}
WAVES = {**SMALL, "conv_dim": [8] * 7, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
TEXT = {**SMALL, "vocab_size": 64, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
MODELS: dict[str, tuple[type, Any]] = {
    "whisper": (hf.WhisperForConditionalGeneration, lambda: hf.WhisperConfig(**WHISPER)),
    "wav2vec2": (hf.Wav2Vec2ForCTC, lambda: hf.Wav2Vec2Config(**WAVES, vocab_size=32)),
    "spectrogram": (hf.ASTForAudioClassification, lambda: hf.ASTConfig(**SMALL, num_mel_bins=32, max_length=64)),
    "vit": (hf.ViTForImageClassification, lambda: hf.ViTConfig(**VISION, num_labels=3)),
    "clip": (hf.CLIPModel, lambda: hf.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)),
    "bert": (hf.BertForMaskedLM, lambda: hf.BertConfig(**TEXT)),
}


def saved(root: Path, name: str) -> Path:
    """A converted model of this kind, written from Python."""
    kind, config = MODELS[name]
    kind(config()).save_pretrained(root / "dense")
    (root / "dense" / "README.md").write_text("---\nlicense: mit\n---\n")
    feature_extractor = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 8}
    (root / "dense" / "preprocessor_config.json").write_text(json.dumps(feature_extractor))
    dense = load_dense(str(root / "dense"))
    settings, batch = peerify.PeerConfig(active=1.0), fitting(dense.model)
    conversion = exact(dense.model, batch)
    peerify.save(root / "out", conversion, dense, settings, [batch], data=["user/some-data"])
    with pytest.raises(OutputError, match="exists"):
        peerify.save(root / "out", conversion, dense, settings, [batch])
    edit_card(root / "out", "license: mit", "license: mit\nbase_model: user/dense")
    return root / "out"


def exact(model: Any, batch: dict[str, Any]) -> Conversion:
    """A conversion that takes no calibration, since that is not what is tried here."""
    sites = [site for site in find_feedforwards(model, batch) if site.convertible]
    layers: dict[str, Any] = {}
    for site in sites:
        layer, layers[site.path] = exact_layer(read_feedforward(model, site), site)
        replace(model, site, layer)
    identities = [path for site in sites for path in site.identities]
    adopt(model, {"format": FORMAT, "layers": layers, "identities": identities})
    return Conversion(
        model=model,
        layers=layers,
        layer_errors=dict.fromkeys(layers, 0.0),
        bytes_fraction=1.0,
        macs_fraction=1.0,
        predicted_ratio=None,
        seconds=0.0,
    )


def fitting(model: Any) -> dict[str, Any]:
    for inputs in candidates(model):
        try:
            model(**inputs)
        except Exception:
            continue
        return {key: value for key, value in inputs.items() if isinstance(value, torch.Tensor)}
    raise AssertionError("no inputs")


def look(folder: Path, scratch: Path, name: str, reference: str | None = None) -> dict[str, Any]:
    """What the other process does, in this one."""
    job = {"source": str(folder), "revision": None, "files": None, "inputs": str(scratch / "inputs.pt")}
    where = {"out": str(scratch / name), "reference": reference and str(scratch / reference)}
    result = stranger.look(job | where)
    (scratch / f"{name}.json").write_text(json.dumps(result))
    return result


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_is_tried_out(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path, name)
    assert record(folder)["calibration"] == {"inputs": 1}
    assert {file.name for file in publishing.check_folder(folder)} >= {"peerify.json", "preprocessor_config.json"}
    card = (folder / "README.md").read_text()
    assert "AutoProcessor" in card
    assert "on 1 inputs of user/some-data" in card
    verify._write_inputs(folder, tmp_path / "inputs.pt")
    assert "error" not in look(folder, tmp_path, "first")
    assert look(folder, tmp_path, "second", "first")["differs"] is None
    assert load_file(tmp_path / "first.safetensors"), "nothing was compared"
    config = json.loads((folder / "config.json").read_text())
    for layer in config["peer"]["layers"].values():
        layer["activation"] = "tanh"
    (folder / "config.json").write_text(json.dumps(config))
    assert "the weights are the same, but its" in look(folder, tmp_path, "third", "first")["differs"]


def test_a_model_that_takes_nothing_we_know_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, "bert")
    torch.save([{"input_ids": torch.tensor([[10**6]])}, {"pixel_values": torch.ones(1)}], tmp_path / "inputs.pt")
    with pytest.raises(ValueError, match=r"takes none of the inputs tried: index out of range"):
        look(folder, tmp_path, "first")


@pytest.mark.slow
def test_a_model_of_sound_is_published(tmp_path: Path, hub: Hub) -> None:
    result = publishing.push(saved(tmp_path, "whisper"), "user/whisper-peer")
    assert result["verified"]
    assert hub.repos["user/whisper-peer"].refs["main"] == result["commit"]
