"""For tests that publish: a tiny converted model, and this process's huggingface_hub on a Hub of ours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from checkpoints import text_file, tiny_checkpoint
from hub_repos import WRITER
from hub_server import Hub
from huggingface_hub import constants

from peerify.config.recipe import CalibrationConfig, Recipe
from peerify.conversion.checkpoint import convert_checkpoint
from peerify.publishing import push as publishing
from peerify.publishing import transfer

SPEED = 1000  # how much faster than the real ones the waits of these tests are
DENSE_CARD = "---\nlicense: apache-2.0\nlanguage:\n- en\n---\n# A dense model\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model that no test changes."""
    return converted(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return copy(model, tmp_path / "out")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub that this process talks to, where nothing may leak and nothing be half-published."""
    with Hub() as hub:
        use(hub, monkeypatch, tmp_path)
        yield hub
        assert hub.leaks == [], "the token went to the store of large files"
        assert hub.halves() == []


def converted(root: Path, *, shards: str = "5GB", **settings: Any) -> Path:
    """A tiny converted model whose card says everything; its dense model beside it."""
    dense = tiny_checkpoint(root / "dense", **settings)
    (dense / "README.md").write_text(DENSE_CARD)
    calibration = CalibrationConfig(data=str(text_file(root / "text.txt", 1000)), tokens=256, context=32)
    out = root / "out"
    convert_checkpoint(Recipe(model=str(dense), output=str(out), calibration=calibration, max_shard_size=shards))
    edit_card(out, "license: apache-2.0", "license: apache-2.0\nbase_model: user/dense")
    return out


def edit_card(folder: Path, old: str, new: str) -> None:
    """Replace `old`, which must be there, in the folder's card."""
    card = (folder / "README.md").read_text()
    assert old in card
    (folder / "README.md").write_text(card.replace(old, new, 1))


def use(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, token: str | None = WRITER) -> None:
    """Point this process's client at `hub`, with a home of its own and waits that take a small part of their time."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(seconds / SPEED))
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", hub.xet is None)
    for name in ("HF_HOME", "HF_HUB_CACHE", "HF_XET_CACHE", "HF_TOKEN_PATH", "HF_STORED_TOKENS_PATH"):
        monkeypatch.setattr(constants, name, str(tmp_path / "home" / name))
    for key, value in hub.environment(tmp_path / "home", token).items():
        monkeypatch.setenv(key, value)
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    huggingface_hub.close_session()


def send(folder: Path, repo: str = "user/model", **options: Any) -> transfer.Sent:
    """`push` without loading anything."""
    return transfer.transfer(folder, repo, publishing.check_folder(folder), **options)


def copy(folder: Path, to: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(folder, to))


def record(folder: Path) -> dict[str, Any]:
    """peerify.json."""
    return dict(json.loads((folder / "peerify.json").read_text()))


def hub_card(hub: Hub, revision: str = "main") -> str:
    return hub.repos["user/model"].files(revision)["README.md"].data.decode()


def nothing_published(hub: Hub) -> bool:
    repo = hub.repos.get("user/model")
    return repo is None or hub.writes("user/model") == []


def driver(hub: Hub, folder: Path, tmp_path: Path, **environment: str) -> subprocess.Popen[str]:
    """A process that pushes `folder` and prints whether it took a commit."""
    code = (
        "import sys; from pathlib import Path; from peerify.publishing import push, transfer\n"
        "folder = Path(sys.argv[1])\n"
        "print(transfer.transfer(folder, 'user/model', push.check_folder(folder)).new)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        env=os.environ | hub.environment(tmp_path / "home") | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
