"""Opening models: every refusal against a really broken file."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dense_checkpoint import edit_json, one_sentence, refusal, shards, tiny_llama
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, ViTConfig, ViTModel

from peerify.checkpoint import load as checkpoint
from peerify.checkpoint.load import load_dense, load_skeleton
from peerify.conversion.inspection import inspect_model
from peerify.errors import CheckpointError, UsageError
from peerify.reading import printable


def edit_header(path: Path, change: Callable[[dict], object]) -> None:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :])


@pytest.mark.parametrize("source", ["/no/such/dir", "./nothing", "~/nothing", "nothing.gguf", ""])
def test_missing_path(source: str) -> None:
    assert "no such" in refusal(source)


def test_missing_hub_model_offline() -> None:
    assert "cannot be reached" in refusal("user/name")
    assert "not a Hub id" in refusal("a/b/c")
    assert "no such file or directory" in refusal(Path("user/name"))


def test_file_that_is_no_model(dense: Path) -> None:
    assert "neither a model directory" in refusal(shards(dense)[0])


def test_no_config(dense: Path) -> None:
    (dense / "config.json").unlink()
    assert "no config.json" in refusal(dense)
    (dense / "adapter_config.json").write_text("{}")
    assert "PEFT adapter" in refusal(dense)
    (dense / "adapter_config.json").unlink()
    (dense / "x.gguf").touch()
    assert "x.gguf" in refusal(dense)


@pytest.mark.parametrize("text", ["{", "", "[]", "\x00\x01", '{"a": 1}'])
def test_bad_config(dense: Path, text: str) -> None:
    (dense / "config.json").write_text(text)
    assert "config.json" in refusal(dense)
    (dense / "config.json").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8 text" in refusal(dense)


def test_impossible_config(dense: Path) -> None:
    edit_json(dense / "config.json", num_attention_heads="many")
    assert "dense" in refusal(dense)


def test_unknown_architecture(dense: Path) -> None:
    edit_json(dense / "config.json", model_type="tomorrow")
    assert "'tomorrow'" in refusal(dense)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": []}, "has no model_type"),
        ({"model_type": ["llama"]}, r"model_type is a name such as llama, not \['llama'\]"),
        ({"architectures": [5]}, r"architectures is a list of class names, not \[5\]"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is a list of class names"),
        ({"architectures": ["Foo"]}, "names the architecture 'Foo', .*; write LlamaForCausalLM there"),
        (
            {"architectures": ["PreTrainedModel"]},
            "names the architecture 'PreTrainedModel', .*; write LlamaForCausalLM",
        ),
        ({"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM goes with model_type bert, not llama"),
        ({"auto_map": 5}, "auto_map names a class for each Auto class, and is 5"),
        ({"hidden_act": "foo"}, "'hidden_act' is 'foo', which transformers .* does not know"),
        ({"intermediate_size": "24"}, r"Field 'intermediate_size' expected int, got str \(value: '24'\)"),
        ({"architectures": ["A" * 10_000]}, r"AAA\.\.\.AAA"),
        ({"hidden_size": 0}, "'hidden_size' is 0, and must be at least 1"),
        ({"num_labels": 10**9}, "'num_labels' is 1000000000, more than 1,000,000"),
        ({"dtype": 5}, "dtype 5 is not one of"),
        ({"dtype": "int8"}, "dtype 'int8' is not one of"),
        ({"intermediate_size": 1e12}, r"'intermediate_size' is 1000000000000\.0, more than"),
        ({"intermediate_size": 10**300}, "'intermediate_size' is 1000"),
        ({"num_hidden_layers": 10_000_000}, "'num_hidden_layers' is 10000000, more than 512"),
        ({"vision_config": {"depth": 1e9}}, "'depth' is 1000000000.0, more than 512"),
        ({"vision_config": {"depths": [300, 300]}}, "has 602 layers in all, more than 512"),
        ({"num_hidden_layers": 500}, r"asks for [\d,]+ parameters, and the file holds [\d,]+ numbers"),
        ({"intermediate_size": 48}, r"weight has the shape (24×16|16×24) in the file, and .* asks for (48×16|16×48)"),
        (
            {"model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": 10**6},
            r"asks for [\d,]+ parameters, and the file holds [\d,]+ numbers",
        ),
    ],
)
def test_configs_that_no_model_has(dense: Path, changes: dict[str, object], message: str) -> None:
    edit_json(dense / "config.json", **changes)
    said = refusal(dense)
    assert re.search(message, said), said
    assert len(said) < 500
    with pytest.raises(CheckpointError) as error:
        inspect_model(str(dense))
    assert str(error.value) == said, "inspect says what convert would"


def test_widths_that_no_weights_speak_against(dense: Path) -> None:
    """Without weights in the folder nothing shows that a config is absurd; it must not take memory all the same."""
    for path in shards(dense):
        path.unlink()
    edit_json(dense / "config.json", intermediate_size=2**31, num_hidden_layers=2)
    assert inspect_model(str(dense))["totals"]["convertible"] == 0
    edit_json(dense / "config.json", intermediate_size=0)
    layer = inspect_model(str(dense))["feedforwards"]
    assert not any(row["convertible"] for row in layer)


def test_inspect_says_which_weights_convert_will_refuse(dense: Path) -> None:
    assert inspect_model(str(dense))["weights"] is None
    path = shards(dense)[0]
    path.write_bytes(path.read_bytes()[:-1])
    assert inspect_model(str(dense))["weights"] == refusal(dense)
    assert "is truncated" in refusal(dense)


@pytest.mark.parametrize("data", [b"[" * 100_000, b"[]", b"{", b"\xff"])
def test_the_file_beside_the_weights_that_is_damaged_is_named(dense: Path, data: bytes) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        before = (dense / name).read_bytes()
        (dense / name).write_bytes(data)
        with pytest.raises(CheckpointError, match=rf"/{name} .*; download it again") as error:
            _ = load_dense(dense).tokenizer
        one_sentence(error)
        (dense / name).write_bytes(before)
    (dense / "generation_config.json").write_bytes(data)
    if data[:1] == b"[":  # transformers passes over what is no JSON at all
        assert "/generation_config.json " in refusal(dense)


def test_names_that_a_terminal_cannot_show(dense: Path) -> None:
    for name in ("a\nb", "\x1b[31mred", "\udcff", "a\nb/c"):
        assert refusal(name).endswith(": no such file or directory")
    for name in ("a\nb", "\udcff"):
        dense = dense.rename(dense.parent / name)
        if name == "\udcff":  # safetensors opens no such file
            assert "not valid UTF-8" in refusal(dense)
        else:
            assert load_dense(dense).source == printable(name)
        json.dumps(inspect_model(str(dense)), ensure_ascii=False).encode()
        (dense / "config.json").rename(dense / "x")
        assert "has no config.json" in refusal(dense)
        (dense / "x").rename(dense / "config.json")


def test_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to("model")
    assert "model is a link that leads nowhere" in refusal(str(tmp_path / "model"))


def test_a_config_that_names_no_class(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "depth_anything"}')
    with pytest.raises(CheckpointError, match="names no architectures, and depth_anything has no usual one"):
        load_skeleton(tmp_path)
    # Its usual class takes the text part of the config, which the Auto class knows.
    small = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 8, "vocab_size": 64, "pad_token_id": 0}
    config.write_text(json.dumps({"model_type": "mllama", "text_config": small}))
    assert type(load_skeleton(tmp_path)).__name__ == "MllamaForCausalLM"


def test_deeply_nested_json(dense: Path) -> None:
    for name in ("config.json", "model.safetensors.index.json"):
        before = (dense / name).read_text()
        (dense / name).write_text("[" * 200_000)
        assert f"{name} is nested too deeply" in refusal(dense)
        (dense / name).write_text(before)
    path = shards(dense)[0]
    path.write_bytes(struct.pack("<Q", 200_000) + b"[" * 200_000)
    assert f"{path.name} has a corrupt safetensors header" in refusal(dense)


def test_numbers_that_are_no_weights(tmp_path: Path) -> None:
    """Masks and positions beside the weights may be integers."""
    tiny_llama().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    for dtype, called in ((torch.int8, "I8"), (torch.int32, "I32"), (torch.complex64, "C64"), (torch.bool, "BOOL")):
        save_file(tensors | {name: tensors[name].to(dtype)}, path, {"format": "pt"})
        assert f"holds {name} as {called}; only floating-point weights are read" in refusal(tmp_path)
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, path, {"format": "pt"})
    assert f"is quantized: {name} is F8_E4M3" in refusal(tmp_path)
    masks = {"model.layers.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool), "position_ids": torch.arange(4)}
    save_file(tensors | masks, path, {"format": "pt"})
    load_dense(tmp_path)


def test_a_parameter_of_integers_that_is_not_called_weight(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    ViTModel(ViTConfig(**sizes, image_size=4, patch_size=2)).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    load_dense(tmp_path)
    save_file(tensors | {"embeddings.cls_token": torch.ones(1, 1, 8, dtype=torch.int32)}, path, {"format": "pt"})
    assert "holds embeddings.cls_token as I32; only floating-point weights are read" in refusal(tmp_path)


def test_an_adapter_beside_the_weights_is_not_applied_unasked(dense: Path) -> None:
    (dense / "adapter_config.json").write_text('{"base_model_name_or_path": "/somewhere/private"}')
    assert "holds a PEFT adapter beside its weights" in refusal(dense)


def test_quantized(dense: Path) -> None:
    edit_json(dense / "config.json", quantization_config={"quant_method": "gptq"})
    assert "quantized (gptq)" in refusal(dense)


@pytest.mark.parametrize("keep", [0, 5, 8, 40, -1, -700])
def test_truncated_safetensors(dense: Path, keep: int) -> None:
    path = shards(dense)[-1]
    path.write_bytes(path.read_bytes()[:keep])
    text = refusal(dense)
    assert path.name in text
    assert "truncated" in text


def test_overlong_safetensors(dense: Path) -> None:
    with shards(dense)[0].open("ab") as file:
        file.write(b"x")
    assert "corrupt" in refusal(dense)


def test_corrupt_header(dense: Path) -> None:
    path = shards(dense)[0]
    raw = bytearray(path.read_bytes())
    raw[8] = ord("x")
    path.write_bytes(raw)
    assert f"{path.name} has a corrupt safetensors header" in refusal(dense)
    raw[:8] = b"\xff" * 8
    path.write_bytes(raw)
    assert "corrupt" in refusal(dense)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "Git LFS pointer" in refusal(dense)


def test_header_that_lies_about_a_shape(dense: Path) -> None:
    def double(header: dict) -> None:
        next(entry for name, entry in header.items() if name != "__metadata__")["shape"][0] *= 2

    edit_header(shards(dense)[0], double)
    assert "corrupt safetensors header" in refusal(dense)


def test_missing_shard(dense: Path) -> None:
    gone = shards(dense)[1]
    gone.unlink()
    text = refusal(dense)
    assert gone.name in text
    assert "missing" in text


def test_shard_without_its_tensor(dense: Path) -> None:
    path = shards(dense)[0]
    tensors = load_file(path)
    name = sorted(tensors)[0]
    save_file({key: value for key, value in tensors.items() if key != name}, path)
    assert f"lacks the tensor {name}" in refusal(dense)


@pytest.mark.parametrize(
    "weight_map",
    [{}, {"a": "../b.safetensors"}, {"a": ".."}, {"a": "/b.safetensors"}, {"a": "a\0b"}, {"a": ""}, {"a": 3}, [], None],
)
def test_bad_index(dense: Path, weight_map: object) -> None:
    edit_json(dense / "model.safetensors.index.json", weight_map=weight_map)
    assert "index.json" in refusal(dense)
    assert "is there" not in refusal(dense)


def test_an_index_that_names_what_is_no_shard(dense: Path) -> None:
    index = dense / "model.safetensors.index.json"
    (dense / "folder.safetensors").mkdir()
    edit_json(index, weight_map={"a": "folder.safetensors"})
    assert "folder.safetensors in" in refusal(dense)
    assert "is a folder" in refusal(dense)
    edit_json(index, weight_map={"a": "x" * 300 + ".safetensors"})
    assert "File name too long" in refusal(dense)
    edit_json(index, metadata=None)
    assert 'has no metadata; add "metadata": {}' in refusal(dense)


def test_a_header_whose_tensors_overlap_or_leave_a_hole(dense: Path) -> None:
    def move(header: dict) -> None:
        entry = next(entry for name, entry in header.items() if name != "__metadata__")
        entry["data_offsets"] = [offset + 4 for offset in entry["data_offsets"]]

    edit_header(shards(dense)[0], move)
    assert "corrupt safetensors header" in refusal(dense)


def test_pickle_only(tmp_path: Path) -> None:
    model = tiny_llama()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    text = refusal(tmp_path)
    assert "pytorch_model.bin" in text
    assert "only .safetensors and .gguf" in text


def test_no_weights_at_all(tmp_path: Path) -> None:
    tiny_llama().config.save_pretrained(tmp_path)
    assert "no weights" in refusal(tmp_path)


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinite")])
def test_nonfinite_weights(tmp_path: Path, value: float, word: str) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    model.save_pretrained(tmp_path)
    text = refusal(tmp_path)
    assert "model.layers.1.mlp.up_proj.weight" in text
    assert word in text
    assert text.endswith("the checkpoint is damaged"), "it is float32 already"


def test_overflow_in_half_precision(tmp_path: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight[0, 0] = -1e6
    model.save_pretrained(tmp_path)
    assert "infinite values in float16; the checkpoint is damaged, or needs --dtype float32" in refusal(
        tmp_path, dtype="float16"
    )
    load_dense(tmp_path)


def test_weights_that_would_be_random(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert "no weights for model.layers.1.mlp.down_proj.weight" in refusal(tmp_path)


def test_remote_code_runs_only_when_trusted(dense: Path, tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    (dense / "mine.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(proof)!r}).touch()\n"
        "class MyConfig(LlamaConfig):\n    model_type = 'mine'\n"
        "class MyModel(LlamaForCausalLM):\n    config_class = MyConfig\n"
    )
    auto_map = {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"}
    edit_json(dense / "config.json", auto_map=auto_map)
    assert type(load_dense(dense).model) is LlamaForCausalLM  # the architecture is known: no foreign code
    edit_json(dense / "config.json", model_type="mine", architectures=["MyModel"])
    assert "--trust-remote-code" in refusal(dense)
    with pytest.raises(CheckpointError, match="--trust-remote-code"):
        load_skeleton(dense)
    assert not proof.exists()
    assert type(load_dense(dense, trust_remote_code=True).model).__name__ == "MyModel"
    assert type(load_skeleton(dense, trust_remote_code=True)).__name__ == "MyModel"
    assert proof.exists()


def test_wrong_options(dense: Path) -> None:
    with pytest.raises(UsageError, match="float8"):
        load_dense(dense, dtype="float8")
    for device in ("warp", "cuda:99", "meta", "mps", "x" * 999):
        with pytest.raises(UsageError, match=rf"device '{device[:9]}.*this machine has cpu") as error:
            load_dense(dense, device=device)
        assert len(one_sentence(error)) < 250


def test_no_tokenizer(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        _ = load_dense(tmp_path).tokenizer


def test_old_transformers(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint.transformers, "__version__", "4.57.1")
    assert "pip install -U transformers" in refusal(dense)
