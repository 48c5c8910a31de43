"""Opening models: every refusal against a really broken file, and what loads is what was saved."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peerify import checkpoint
from peerify.checkpoint import load_dense, load_for_eval, load_skeleton
from peerify.errors import CheckpointError, UsageError

WORDS = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(29))]


def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A small model in two shards, with tokenizer, as save_pretrained leaves it."""
    folder = tmp_path / "dense"
    tiny_llama().save_pretrained(folder, max_shard_size="8KB")
    tiny_tokenizer().save_pretrained(folder)
    assert len(shards(folder)) > 1
    return folder


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def one_sentence(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert not text.endswith(".")
    return text


def refusal(source: str | Path, **options: object) -> str:
    with pytest.raises(CheckpointError) as error:
        load_dense(source, **options)  # type: ignore[arg-type]
    return one_sentence(error)


def edit_json(path: Path, **changes: object) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def edit_header(path: Path, change: Callable[[dict], object]) -> None:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :])


# --- what loads ------------------------------------------------------------------------------------


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
    edit_json(dense / "config.json", peer={"format": 1, "layers": {}, "identities": []})
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


# --- what is refused -------------------------------------------------------------------------------


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
    assert "not valid JSON" in refusal(dense)


def test_impossible_config(dense: Path) -> None:
    edit_json(dense / "config.json", num_attention_heads="many")
    assert "dense" in refusal(dense)


def test_unknown_architecture(dense: Path) -> None:
    edit_json(dense / "config.json", model_type="tomorrow")
    assert "'tomorrow'" in refusal(dense)


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


@pytest.mark.parametrize("weight_map", [{}, {"a": "../b.safetensors"}, {"a": 3}, None])
def test_bad_index(dense: Path, weight_map: object) -> None:
    edit_json(dense / "model.safetensors.index.json", weight_map=weight_map)
    assert "index.json" in refusal(dense)


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


def test_overflow_in_half_precision(tmp_path: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight[0, 0] = -1e6
    model.save_pretrained(tmp_path)
    assert "infinite values in float16" in refusal(tmp_path, dtype="float16")
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
    for device in ("warp", "cuda:99"):
        with pytest.raises(UsageError, match=device) as error:
            load_dense(dense, device=device)
        one_sentence(error)


def test_no_tokenizer(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        _ = load_dense(tmp_path).tokenizer


def test_old_transformers(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint.transformers, "__version__", "4.57.1")
    assert "pip install -U transformers" in refusal(dense)


# --- GGUF ------------------------------------------------------------------------------------------


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


# --- the Hub, through its real client and a small server -------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[SimpleNamespace]:
    """Serves folders of tmp_path/repos as Hub models; `user/gated` and `user/broken` answer 403 and 500."""
    root, asked = tmp_path / "repos", []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self) -> None:
            parts = self.path.split("?")[0].strip("/").split("/")
            is_api = parts[:2] == ["api", "models"]
            repo, rest = "/".join(parts[2:4] if is_api else parts[:2]), parts[4 if is_api else 2 :]
            if repo == "user/gated":
                return self.answer(403, X_Error_Code="GatedRepo")
            if repo == "user/broken":
                return self.answer(500)
            if not (root / repo).is_dir():
                return self.answer(404, X_Error_Code="RepoNotFound")
            if len(rest) > 1 and rest[1] not in ("main", COMMIT):
                return self.answer(404, X_Error_Code="RevisionNotFound")
            files = [path for path in sorted((root / repo).rglob("*")) if path.is_file()]
            names = [str(path.relative_to(root / repo)) for path in files]
            if is_api and rest[:1] == ["tree"]:
                rows = [
                    {"type": "file", "path": name, "size": path.stat().st_size, "oid": "0" * 40}
                    for name, path in zip(names, files, strict=True)
                ]
                return self.answer(200, json.dumps(rows).encode(), Content_Type="application/json")
            if is_api:
                info = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
                return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
            name = "/".join(rest[2:])
            if name not in names:
                return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            if self.command == "GET":
                asked.append(name)
            body = (root / repo / name).read_bytes()
            return self.answer(200, body, ETag=f'"{abs(hash((repo, name))):x}"', X_Repo_Commit=COMMIT)

        do_HEAD = do_GET  # noqa: N815

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "cache"),
    }

    def load(source: str, options: str = "", **changes: str) -> str:
        # open_source is all that touches the Hub, and needs no torch: each process takes half a second.
        code = (
            "import time\ntime.sleep = lambda seconds: None\n"  # no waiting between the client's retries
            "from peerify.source import open_source\nfrom peerify.errors import CheckpointError\n"
            f"try:\n    found = open_source({source!r}, {options})\n"
            "    print('ok', found.name, found.revision)\n"
            "except CheckpointError as error:\n    print(error)\n"
        )
        run = subprocess.run(
            [sys.executable, "-c", code],
            env=environment | changes,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        assert run.stdout.count("\n") == 1
        return run.stdout.strip()

    yield SimpleNamespace(root=root, asked=asked, load=load)
    server.shutdown()
    server.server_close()


def test_hub_model_loads_with_only_the_files_it_needs(dense: Path, hub: SimpleNamespace) -> None:
    repo = hub.root / "user" / "model"
    shutil.copytree(dense, repo)
    for extra in ("pytorch_model.bin", "consolidated.safetensors", "run.py"):
        (repo / extra).write_bytes(b"x")
    assert hub.load("user/model", "weights=False") == f"ok user/model {COMMIT}"
    assert not [name for name in hub.asked if name.endswith(".safetensors")]
    assert hub.load("user/model") == f"ok user/model {COMMIT}"
    assert set(hub.asked) & {"pytorch_model.bin", "consolidated.safetensors", "run.py"} == set()
    assert {path.name for path in shards(dense)} | {"tokenizer.json"} <= set(hub.asked)
    count = len(hub.asked)
    assert hub.load("user/model", HF_HUB_OFFLINE="1") == f"ok user/model {COMMIT}"  # from the cache
    assert len(hub.asked) == count


def test_hub_refusals(dense: Path, hub: SimpleNamespace) -> None:
    for name in ("pickled", "gguf"):
        (hub.root / "user" / name).mkdir(parents=True)
    shutil.copy(dense / "config.json", hub.root / "user" / "pickled")
    (hub.root / "user" / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    (hub.root / "user" / "gguf" / "m.Q4.gguf").write_bytes(b"x")
    assert "is gated: accept its terms" in hub.load("user/gated")
    assert "no such model on the Hub" in hub.load("user/unknown")
    assert "pytorch_model.bin" in hub.load("user/pickled")
    assert "GGUF files only" in hub.load("user/gguf")
    assert "no revision v9" in hub.load("user/pickled", "revision='v9'")
    assert "status 500" in hub.load("user/broken")
    assert "cannot be reached" in hub.load("user/pickled", HF_ENDPOINT="http://127.0.0.1:9")
