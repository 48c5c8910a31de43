"""Pushes while others push: both are whole, and neither undoes the other."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from hub_client import converted, send
from hub_server import Hub


def test_two_pushes_at_once(model: Path, folder: Path, hub: Hub) -> None:
    """Another push is done between our last look and our commit; ours then goes on top, and both are whole."""
    (folder / "notes.txt").write_text("the other one")
    weights = folder / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-3] ^= 1
    weights.write_bytes(raw)
    done: list[Any] = []
    hub.before("POST", "/commit/", lambda: done.append(send(folder)))
    ours = send(model)
    repo = hub.repos["user/model"]
    assert (done[0].new, ours.new, repo.refs["main"]) == (True, True, ours.commit)
    assert [commit for commit, _, title in repo.log[1:]] == [done[0].commit, ours.commit]
    stored = {name: hub.store.get(file.sha256 or "") for name, file in repo.files().items()}
    assert stored["model.safetensors"] == (model / "model.safetensors").read_bytes()
    assert hub.repos["user/model"].commits[done[0].commit]["model.safetensors"].sha256 in hub.store


def test_what_others_change_meanwhile_is_seen(model: Path, tmp_path: Path, hub: Hub) -> None:
    """Between our last look and our commit, shards arrive that would be loaded in place of ours, and an edited card."""
    sharded = converted(tmp_path / "sharded", shards="8KB")

    def others() -> None:
        send(sharded)
        hub.repos["user/model"].edit("README.md", lambda text: text + "\n## Thanks\n")

    hub.before("POST", "/commit/", others)
    send(model)
    files = hub.repos["user/model"].files()
    assert [name for name in files if name.startswith("model") and "safetensors" in name] == ["model.safetensors"]
    assert files["README.md"].data.decode().endswith("## Thanks\n")


def test_the_same_push_twice_at_once(model: Path, hub: Hub) -> None:
    results: list[Any] = []
    hub.before("POST", "/api/repos/create", lambda: results.append(send(model)))
    results.append(send(model))
    assert len(hub.writes("user/model")) == 1
    assert results[0].commit == results[1].commit


def test_threads_at_once(model: Path, folder: Path, hub: Hub) -> None:
    (folder / "notes.txt").write_text("x")
    results: list[Any] = []

    def work(path: Path) -> None:
        results.append(send(path))

    threads = [threading.Thread(target=work, args=[path]) for path in (model, folder, model, folder)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(result.commit in hub.repos["user/model"].commits for result in results)
