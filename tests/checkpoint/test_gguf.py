"""GGUF files: they load and are saved as plain models, and broken ones are refused."""

from __future__ import annotations

import ast
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from dense_checkpoint import refusal, tiny_llama
from gguf_files import write_gguf

from peerify.checkpoint.load import load_dense, load_skeleton


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # One flipped byte made these hang, or end in a traceback.
        ("dimensions", "a tensor of 4,294,967,295 dimensions"),
        ("general.alignment=0", "general.alignment is no power of two"),
        ("general.alignment=48", "general.alignment is no power of two"),
        ("split.count='x'", "has a split.count that is no number"),
        ("layers", "'block_count' is 10000000, more than 512"),
        ("general.architecture=1", "general.architecture twice"),
        ("arrays", "an array of arrays"),
        ("texts", "texts of an array in"),
        ("numbers", "numbers of an array in"),
        ("tensors", "tensors in"),
        ("keys", "keys in"),
        ("key", "bytes of a text in"),
    ],
)
def test_numbers_in_a_header_are_held_against_the_file(tmp_path: Path, change: str, message: str) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, tiny_llama())
    raw = path.read_bytes()
    (pairs,) = struct.unpack("<Q", raw[16:24])
    huge = struct.pack("<Q", 2**60)
    name, equals, value = change.partition("=")
    if equals:
        added = ast.literal_eval(value)
        of_kind = struct.pack("<II", 4, added) if isinstance(added, int) else struct.pack("<IQ", 8, 1) + b"x"
        pair = struct.pack("<Q", len(name)) + name.encode() + of_kind
        raw = raw[:16] + struct.pack("<Q", pairs + 1) + pair + raw[24:]
    elif change == "dimensions":
        at = raw.index(b"token_embd.weight") + len(b"token_embd.weight")
        raw = raw[:at] + b"\xff" * 4 + raw[at + 4 :]
    elif change == "layers":
        at = raw.index(b"llama.block_count") + len(b"llama.block_count") + 4
        raw = raw[:at] + struct.pack("<I", 10_000_000) + raw[at + 4 :]
    elif change in ("arrays", "texts", "numbers"):
        kind = {"arrays": 9, "texts": 8, "numbers": 4}[change]
        pair = struct.pack("<Q", 1) + b"a" + struct.pack("<II", 9, kind) + huge
        raw = raw[:16] + struct.pack("<Q", pairs + 1) + pair + raw[24:]
    else:
        at = {"tensors": 8, "keys": 16, "key": 24}[change]
        raw = raw[:at] + huge + raw[at + 8 :]
    path.write_bytes(raw)
    said = refusal(path)
    assert message in said
    assert len(said) < 400


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("feed_forward_length", 25, "down_proj.weight has the shape 16×24 in the file, and its header asks for 16×25"),
        ("feed_forward_length", 2**31, "its header asks for 206,158,"),
        ("block_count", 500, "its header asks for"),
        ("embedding_length", 0, "'embedding_length' is 0, and must be at least 1"),
        ("embedding_length", 2**31, "cannot be built from its config"),
    ],
)
def test_a_header_that_asks_for_other_weights(tmp_path: Path, key: str, value: int, message: str) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, tiny_llama())
    raw = path.read_bytes()
    at = raw.index(f"llama.{key}".encode()) + len(f"llama.{key}") + 4
    path.write_bytes(raw[:at] + struct.pack("<I", value) + raw[at + 4 :])
    assert message in refusal(path)


def test_a_pipe_is_no_gguf_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.gguf")
    assert "m.gguf is not a regular file" in refusal(tmp_path / "m.gguf")
