"""What a push checks before it sends anything, and commands that read from the Hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoints import tiny_checkpoint
from click.testing import CliRunner
from hub_client import converted, edit_card, record, send
from hub_server import Hub
from huggingface_hub import ModelCard

from peerify import cli
from peerify.checkpoint.files import CODE_FOLDER
from peerify.errors import PeerifyError, PublishError
from peerify.publishing import push as publishing


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "peerify.json",
        "README.md",
        "modeling_peer.py",
        "peer_keys.py",
        "model.safetensors",
        "tokenizer.json",
        "generation_config.json",
    ],
)
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(PeerifyError, match=r"is missing|has no|is not a converted"):
        publishing.check_folder(folder)


def test_folders_that_are_not_ready(folder: Path, tmp_path: Path) -> None:
    def refused(message: str, path: Path = folder) -> None:
        with pytest.raises(PeerifyError, match=message):
            publishing.check_folder(path)

    refused("no such folder", tmp_path / "nowhere")
    refused(r"not a converted model: it has no peerify\.json", tiny_checkpoint(tmp_path / "tiny"))
    (folder / "modeling_peer.py").write_text((folder / "modeling_peer.py").read_text() + "\n")
    refused(r"modeling_peer\.py is not the one of this peerify")
    shutil.copy(CODE_FOLDER / "modeling_peer.py", folder)
    publishing.check_folder(folder)
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[:-10])
    refused("truncated")


def test_a_missing_shard(tmp_path: Path) -> None:
    folder = converted(tmp_path, shards="8KB")
    next(folder.glob("model-00002*")).unlink()
    with pytest.raises(PeerifyError, match=r"the shard model-00002-of-.* is missing"):
        publishing.check_folder(folder)


def test_the_card_must_say_licence_and_base_model_and_be_valid(folder: Path, hub: Hub) -> None:
    edit_card(folder, "base_model: user/dense\n", "")
    with pytest.raises(PublishError, match="write `base_model: …`"):
        send(folder)
    edit_card(folder, "license: apache-2.0\n", "base_model: user/dense\n")
    with pytest.raises(PublishError, match="write `license: …`"):
        send(folder)
    edit_card(folder, "base_model: user/dense", "base_model: user/dense\nlicense: sold")
    with pytest.raises(PublishError, match=r'does not accept its metadata: "license" must be one of'):
        send(folder)
    edit_card(folder, "license: sold", "license: [")
    with pytest.raises(PublishError, match=r"README\.md, between the --- lines, line \d+: not valid YAML"):
        send(folder)
    assert hub.count("^PUT") == 0, "found before the weights were sent"


def test_licence_and_base_model_come_from_the_source(tmp_path: Path, hub: Hub) -> None:
    """The dense model is on the Hub: its card says the licence, its id is the base model."""
    from peerify.config.recipe import Recipe
    from peerify.conversion.checkpoint import convert_checkpoint

    out = converted(tmp_path)
    upload(hub, "ada/dense", tmp_path / "dense")
    calibration = {"data": str(tmp_path / "text.txt"), "tokens": 256, "context": 32}
    convert_checkpoint(
        Recipe.model_validate({"model": "ada/dense", "output": str(tmp_path / "b"), "calibration": calibration})
    )
    source = record(tmp_path / "b")["source"]
    assert source == {
        "model": "ada/dense",
        "revision": hub.repos["ada/dense"].refs["main"],
        "base_model": "ada/dense",
        "license": "apache-2.0",
        "language": ["en"],
    }
    card = ModelCard((tmp_path / "b" / "README.md").read_text())
    assert (card.data.license, card.data.base_model, card.data.base_model_relation) == (
        "apache-2.0",
        "ada/dense",
        "finetune",
    )
    send(tmp_path / "b")
    assert "base_model" not in record(out)["source"], "a folder has no address"


def upload(hub: Hub, repo: str, folder: Path) -> None:
    """Put a plain folder on the Hub with the Hub's own client."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo)
    api.upload_folder(repo_id=repo, folder_path=folder)


def test_commands_take_hub_ids(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """inspect, convert and eval as in the README, with ids instead of folders, public and private."""
    out = converted(tmp_path)
    upload(hub, "ada/dense", tmp_path / "dense")
    send(out, "ada/dense-peer", private=True)
    monkeypatch.chdir(tmp_path)

    def run(*argv: str, code: int = 0) -> Any:
        result = CliRunner().invoke(cli.cli, list(argv))
        assert result.exit_code == code, result.output
        return json.loads(result.stdout) if code == 0 else result.stderr

    sites = run("inspect", "ada/dense", "--json")["feedforwards"]
    assert len(sites) == 3
    assert hub.count("model.safetensors") == 0 or hub.count("GET /object") == 0, "inspect read weights"
    run(
        "convert",
        "ada/dense",
        "new",
        "--calibration",
        "text.txt",
        "--calibration-tokens",
        "256",
        "--context",
        "32",
        "--json",
    )
    options = ["--data", "text.txt", "--context", "32", "--json"]
    local = run("eval", "out", "--against", "dense", *options)
    remote = run("eval", "ada/dense-peer", "--against", "ada/dense", *options)
    assert remote["perplexity"] == local["perplexity"]
    assert remote["against"]["kl"] == local["against"]["kl"]
    assert hub.leaks == []
    said = run("eval", "ada/none", *options, code=1)
    assert "ada/none: no such directory, and no such model on the Hub" in said
    monkeypatch.setenv("HF_TOKEN", "hf_wrongSecretToken")
    said = run("inspect", "ada/dense-peer", code=1)
    assert "hf_wrongSecretToken" not in said
