"""GGUF files: they load and are saved as plain models, and broken ones are refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from dense_checkpoint import WORDS, refusal, tiny_llama
from transformers import LlamaForCausalLM

from peerify.checkpoint import load_dense, load_skeleton


def write_gguf(path: Path, model: LlamaForCausalLM, arch: str = "llama", parts: int = 1) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_name("Some name")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*WORDS[:-2], "w", "1"])
    writer.add_token_types([gguf.TokenType.NORMAL] * len(WORDS))
    writer.add_token_merges(["w 1"])  # makes w1
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if parts > 1:
        writer.add_uint16("split.count", parts)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, value in model.state_dict().items():
        array = value.numpy()
        if "q_proj" in key or "k_proj" in key:  # llama.cpp stores rotary halves interleaved
            heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(key, (".weight",)), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_loads_and_saves_as_plain_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tiny_llama().eval()
    write_gguf(tmp_path / "m.gguf", model)
    capfd.readouterr()
    loaded = load_dense(tmp_path / "m.gguf")
    assert capfd.readouterr() == ("", "")
    tokens = torch.randint(32, (2, 9))
    torch.testing.assert_close(loaded.model(tokens).logits, model(tokens).logits)
    assert load_skeleton(tmp_path / "m.gguf").num_parameters() == model.num_parameters()
    assert loaded.source == "m.gguf"
    out = tmp_path / "out"
    loaded.model.save_pretrained(out)
    loaded.save_processor(out)
    for path in out.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()
    assert "Some name" not in (out / "config.json").read_text()
    assert json.loads((out / "tokenizer_config.json").read_text())["model_max_length"] == 64
    again = load_dense(out)
    torch.testing.assert_close(again.model(tokens).logits, model(tokens).logits)
    assert again.tokenizer("w3")["input_ids"] == loaded.tokenizer("w3")["input_ids"]


def test_gguf_refusals(tmp_path: Path) -> None:
    model, path = tiny_llama(), tmp_path / "m.gguf"
    write_gguf(path, model)
    raw = path.read_bytes()
    for keep in (6, 24, 100, 700, len(raw) // 2, len(raw) - 200):
        path.write_bytes(raw[:keep])
        text = refusal(path)
        assert "truncated" in text
        assert "m.gguf" in text
    path.write_bytes(b"GGML" + raw[4:])
    assert "not a GGUF file" in refusal(path)
    path.write_bytes(raw[:4] + struct.pack("<I", 77) + raw[8:])
    assert "corrupt" in refusal(path)
    write_gguf(path, model, parts=3)
    assert "one of 3 parts" in refusal(path)
    write_gguf(path, model, arch="tomorrow")
    assert "tomorrow" in refusal(path)
    path.unlink()
    path.mkdir()
    assert "no config.json" in refusal(path)
