"""Opening models: what loads is what was saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from dense_checkpoint import edit_json, refusal, shards, tiny_llama
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, LlamaForCausalLM

from peerify.checkpoint.load import load_dense, load_for_eval, load_skeleton
from peerify.errors import CheckpointError
from peerify.modeling.modeling_peer import FORMAT, make_layer


def test_directory_loads_as_saved(dense: Path) -> None:
    loaded = load_dense(dense)
    stored = {key: value for path in shards(dense) for key, value in load_file(path).items()}
    assert set(stored) == set(loaded.model.state_dict())
    assert all(torch.equal(value, loaded.model.state_dict()[key]) for key, value in stored.items())
    assert type(loaded.model) is LlamaForCausalLM
    assert not loaded.model.training
    assert (loaded.source, loaded.revision, loaded.files) == ("dense", None, dense)
    assert loaded.tokenizer("w3 w7")["input_ids"] == [6, 10]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_is_as_asked_and_auto_is_as_stored(tmp_path: Path, dtype: str) -> None:
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path / "m")
    assert load_dense(tmp_path / "m", dtype=dtype).model.dtype == getattr(torch, dtype)
    assert load_dense(tmp_path / "m", dtype="auto").model.dtype == torch.bfloat16


def test_named_class_is_kept(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    assert type(load_dense(tmp_path / "bert").model) is BertForMaskedLM
    assert type(load_skeleton(tmp_path / "bert")) is BertForMaskedLM
    edit_json(tmp_path / "bert" / "config.json", architectures=None)
    assert type(load_skeleton(tmp_path / "bert")) is not BertForMaskedLM


def test_skeleton_reads_no_weights(dense: Path) -> None:
    for path in shards(dense):
        path.unlink()
    model = load_skeleton(dense)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.num_parameters() == tiny_llama().num_parameters()


def test_processor_files_are_copied_and_weights_are_not(dense: Path, tmp_path: Path) -> None:
    (dense / "LICENSE").write_text("terms")
    (dense / "additional_chat_templates").mkdir()
    (dense / "additional_chat_templates" / "tool.jinja").write_text("{{ x }}")
    (dense / "evil.py").write_text("raise SystemExit")
    out = tmp_path / "out"
    out.mkdir()
    load_dense(dense).save_processor(out)
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert {"LICENSE", "additional_chat_templates/tool.jinja", "generation_config.json"} <= names
    assert not [name for name in names if name.endswith((".safetensors", ".py")) or name == "config.json"]
    for name in names:
        assert (out / name).read_bytes() == (dense / name).read_bytes()


def test_no_local_path_is_saved(dense: Path, tmp_path: Path) -> None:
    loaded = load_dense(dense)
    loaded.model.save_pretrained(tmp_path / "out")
    loaded.save_processor(tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()


def test_quiet_and_restored(dense: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    load_dense(dense)
    assert capfd.readouterr() == ("", "")
    assert (transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()) == before


def test_converted_models_are_for_evaluation_only(dense: Path) -> None:
    edit_json(dense / "config.json", peer={"format": FORMAT, "layers": {}, "identities": []})
    assert "already a PEER model" in refusal(dense)
    with pytest.raises(CheckpointError, match="already a PEER model"):
        load_skeleton(dense)
    config = json.loads((dense / "config.json").read_text())
    edit_json(
        dense / "config.json",
        model_type="peer_" + config["model_type"],
        architectures=["PeerLlamaForCausalLM"],
    )
    assert "already a PEER model" in refusal(dense)
    assert type(load_for_eval(dense).model).__name__ == "PeerLlamaForCausalLM"
    edit_json(dense / "config.json", peer={"format": FORMAT - 1, "layers": {}, "identities": []})
    with pytest.raises(CheckpointError, match=r"an? .*version of peerify before 0\.1 .*: convert it again"):
        load_for_eval(dense)


@pytest.mark.parametrize("gone", [{"rerank": "up", "candidates": 9}, {"share_query": True}, {"estimate": True}])
def test_options_that_layers_no_longer_have(dense: Path, gone: dict[str, Any]) -> None:
    """A layer that made no use of them loads; any other is refused, with the remedy."""
    shape = {"d_model": 8, "num_experts": 12, "grid": [3, 4], "num_heads": 1, "topk": 4, "num_shared": 0}
    unused = {"candidates": 4, "shortlist": 4, "rerank": None, "share_query": False, "estimate": False}
    old, new = make_layer(shape | unused), make_layer(shape)
    assert repr(old) == repr(new)
    assert old.state_dict().keys() == new.state_dict().keys()
    config = json.loads((dense / "config.json").read_text())
    edit_json(
        dense / "config.json",
        model_type="peer_" + config["model_type"],
        architectures=["PeerLlamaForCausalLM"],
        peer={"format": FORMAT, "layers": {"model.layers.0.mlp": shape | unused | gone}, "identities": []},
    )
    with pytest.raises(CheckpointError, match=r"with re-ranking or low-rank keys, .*: convert it again, or load it"):
        load_for_eval(dense)
