"""A push that this machine cuts short, by a full disk or a signal, is never called done and goes on where it was."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hub_client import converted, driver, nothing_published, send, use, wait_until
from hub_repos import EXPIRED, READER, WRITER
from hub_server import Hub

from peerify import hub_calls
from peerify.errors import PublishError
from peerify.publishing import push as publishing


def test_a_disk_without_room_to_load_back(model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(path.stat().st_size for path in model.iterdir())
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": size}))
    with pytest.raises(PublishError, match=r"loading the model back needs 0\.00 GB .* free some space, or set HF_HOME"):
        publishing.push(model, "user/model")
    assert hub.requests == ["HEAD /"], "whether it is there"


def test_a_disk_full_error_is_named() -> None:
    with pytest.raises(PublishError, match=r"a/b: the disk is full; free some space"), hub_calls.hub_errors("a/b"):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_push_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    folder = converted(tmp_path / "model", shards="8KB")
    hold = threading.Event()
    with Hub() as hub:
        seen: list[str] = []

        def wait() -> None:
            seen.append("third")
            hold.wait(30)

        hub.before("PUT", "/object/", lambda: seen.append("first"))
        hub.before("PUT", "/object/", lambda: seen.append("second"))
        hub.before("PUT", "/object/", wait)
        process = driver(hub, folder, tmp_path)
        wait_until(lambda: "third" in seen)
        process.send_signal(number)
        _, err = process.communicate(timeout=20)
        hold.set()
        assert process.returncode == -number, err
        assert nothing_published(hub)
        stored, puts = len(hub.store), hub.count("^PUT")
        assert stored >= 2
        use(hub, monkeypatch, tmp_path)
        assert send(folder).new
        large = sum(path.stat().st_size > 0 and path.suffix == ".safetensors" for path in folder.iterdir())
        # What had arrived is not sent again.
        assert hub.count("^PUT") - puts <= large - 2
        assert hub.halves() == []


@pytest.mark.slow
def test_the_whole_command_under_fire(tmp_path: Path) -> None:
    """Ctrl-C and a full disk while loading back; --debug and the client's own logging never show the token."""
    folder = converted(tmp_path / "model", hidden_size=64, intermediate_size=256)
    with Hub() as hub:
        home = tmp_path / "home"
        hub.environment(home)

        def run(*argv: str, limit: int | None = None, interrupt: str = "") -> tuple[int, str]:
            process = subprocess.Popen(
                [sys.executable, "-m", "peerify", *argv],
                env=os.environ | hub.environment(home) | {"HF_DEBUG": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
                preexec_fn=(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None,
            )
            if interrupt:
                wait_until(lambda: hub.count(interrupt) > 0, 200)
                os.killpg(process.pid, signal.SIGINT)  # as a terminal does
            said = process.communicate(timeout=400)[0]
            for token in (WRITER, READER, EXPIRED):
                assert token not in said
            return process.returncode, said

        size = (folder / "model.safetensors").stat().st_size
        code, said = run("push", str(folder), "user/full", "--tag", "v1", "--debug", limit=size // 2)
        assert (code, "is full" in said, "could not be loaded back" in said) == (1, True, True), said
        assert "refs/tags/v1" not in hub.repos["user/full"].refs, "the tag is for what was loaded back"

        code, said = run("push", str(folder), "user/model", interrupt=r"GET /user/model/resolve/\w+/config.json")
        assert code == 130, said
        assert "was pushed as commit" in said
        assert "but not verified" in said

        code, said = run("push", str(folder), "user/model", "--tag", "v1", "--debug")
        assert (code, "nothing had changed" in said, "to the bit" in said) == (0, True, True), said
        for repo in hub.repos.values():
            for files in repo.commits.values():
                assert not [name for name, file in files.items() if b"SecretToken" in file.data]
        assert (hub.leaks, hub.halves()) == ([], [])
        assert b"SecretToken" not in b"".join(path.read_bytes() for path in folder.iterdir())
