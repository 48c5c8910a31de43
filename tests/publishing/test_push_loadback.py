"""A push is loaded back by processes that do not have peerify, and whatever differs is said."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_client import send
from hub_server import Hub
from safetensors.torch import load_file, save_file

from peerify.config.grow import GrowConfig
from peerify.config.recipe import CalibrationConfig, Recipe
from peerify.conversion.growth_checkpoint import grow_checkpoint
from peerify.errors import PublishError
from peerify.publishing import push as publishing
from peerify.publishing import verify


def killed_process() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_push_and_load_back(folder: Path, hub: Hub, tmp_path: Path) -> None:
    """Pushed, loaded back in a process of its own, and tagged; what a killed push left behind is gone."""
    stages: list[str] = []
    stale = tmp_path / "home" / "HF_HOME" / f"peerify-push-{platform.node()}-{killed_process()}-x"
    stale.mkdir(parents=True)
    result = publishing.push(
        folder, "user/model", tag="v1", private=True, progress=lambda stage, *_: stages.append(stage)
    )
    repo = hub.repos["user/model"]
    assert result["verified"]
    assert (result["commit"], result["new_commit"]) == (repo.refs["main"], True)
    assert repo.refs["refs/tags/v1"] == result["commit"]
    assert hub.count(f"GET /user/model/resolve/{result['commit']}/config.json") == 1
    assert dict.fromkeys(stages) == dict.fromkeys(
        ["Loading the folder without peerify", "Uploading", "Loading it back from the Hub"]
    )
    assert not list((tmp_path / "home" / "HF_HOME").glob("peerify-push-*"))


@pytest.mark.slow
def test_a_pool_that_layers_share_arrives(model: Path, hub: Hub, tmp_path: Path) -> None:
    """It is sent once, and both layers have it when loaded back."""
    calibration = CalibrationConfig(data=str(model.parent / "text.txt"), tokens=256, context=32)
    growth = GrowConfig(num_experts=64, num_heads=2, topk=4, layers="0,2", share_pool=True)
    out = tmp_path / "grown"
    grow_checkpoint(Recipe(model=str(model), output=str(out), grow=growth, calibration=calibration))
    assert publishing.push(out, "user/model", tag="v1")["verified"]
    sent = load_file(out / "model.safetensors")
    assert [name for name in sent if name.endswith("memory.pool.u")] == ["model.layers.0.mlp.memory.pool.u"]


@pytest.mark.slow
def test_what_differs_is_said(folder: Path, hub: Hub, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    verify.load_locally(folder, scratch)
    commit = send(folder).commit
    files = hub.repos["user/model"].files()
    names = [path.name for path in folder.iterdir()]
    oid = str(files["model.safetensors"].sha256)
    good = hub.store[oid]

    def refused(message: str) -> None:
        shutil.rmtree(scratch / "hub", ignore_errors=True)
        with pytest.raises(PublishError, match=message):
            verify.load_back("user/model", commit, commit, scratch, files=names)

    tensors = load_file(folder / "model.safetensors")
    key = "model.layers.1.mlp.pool.u"
    for change, message in (
        (lambda: tensors[key].view(-1)[3].add_(1e-3), rf"is not what was sent: the weights differ: {key}"),
        (lambda: tensors[key].view(-1)[3].fill_(float("nan")), f"the weight {key} has NaN"),
        (lambda: tensors.update({key[:-1] + "x": tensors.pop(key)}), f"missing keys while loading: {key}"),
    ):
        change()
        save_file(tensors, tmp_path / "bad", metadata={"format": "pt"})
        hub.store[oid] = (tmp_path / "bad").read_bytes()
        refused(message)
    hub.store[oid] = good
    config = json.loads(files["config.json"].data)
    files["config.json"].data = json.dumps(config | {"rms_norm_eps": 0.1}).encode()
    refused("the weights are the same, but its logits differ by up to")
    files["config.json"].data = json.dumps(config).encode()
    names.remove("peer_keys.py")
    del files["peer_keys.py"]
    shutil.rmtree(scratch / "modules-hub", ignore_errors=True)  # transformers keeps code by its commit, too
    refused("could not be loaded back")
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 18}))
    with pytest.raises(PublishError, match="does not load"):
        verify.load_locally(folder, scratch)
    hub.repos.clear()  # what was made of it here is no push


@pytest.mark.slow
def test_a_pull_request_is_loaded_back_by_its_own_name(folder: Path, hub: Hub) -> None:
    send(folder)
    (folder / "notes.txt").write_text("x")
    result = publishing.push(folder, "user/model", create_pr=True)
    assert (result["verified"], result["revision"]) == (True, "refs/pr/1")
    assert hub.count("GET /api/models/user/model/revision/refs%2Fpr%2F1") > 0
    assert hub.count(f"GET /user/model/resolve/{result['commit']}/config.json") == 1
    assert hub.repos["user/model"].refs["refs/pr/1"] == result["commit"]
