"""What a push does when the Hub, the network or the disk fails, and that nothing half-done is ever called done."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_client import converted, send, use
from hub_server import EXPIRED, READER, WRITER, Fault, Hub

from peerify import hub_calls, publishing
from peerify.errors import PublishError

MODEL = "/api/models/user/model"
CALLS = {
    "info": ("GET", f"{MODEL}$"),
    "create": ("POST", "/api/repos/create"),
    "tree": ("GET", "/tree/"),
    "card rules": ("POST", "/api/validate-yaml"),
    "preupload": ("POST", "/preupload/"),
    "large files": ("POST", "objects/batch"),
    "upload": ("PUT", "/object/"),
    "verify": ("POST", "objects/verify"),
    "commit": ("POST", "/commit/main"),
}
"""Every call of a first push."""


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the client asked to sleep."""
    asked: list[float] = []
    sleep = time.sleep

    def note(seconds: float) -> None:
        if threading.current_thread() is threading.main_thread():
            asked.append(seconds)
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", note)
    return asked


def nothing_published(hub: Hub) -> bool:
    repo = hub.repos.get("user/model")
    return repo is None or hub.writes("user/model") == []


def test_the_list_of_calls_is_complete(model: Path, hub: Hub) -> None:
    send(model)
    for request in hub.requests:
        assert sum(bool(hub_match(call, request)) for call in CALLS.values()) == 1, request
    for call in CALLS.values():
        assert any(hub_match(call, request) for request in hub.requests), call


def hub_match(call: tuple[str, str], request: str) -> Any:
    method, path = request.split(" ", 1)
    return method == call[0] and re.search(call[1], path)


# Faults that pass


@pytest.mark.parametrize(
    ("call", "status"),
    [*zip(CALLS, [503, 500, 429] * 3, strict=False), ("commit", 503), ("info", 500), ("upload", 500)],
)
def test_a_call_that_fails_twice_is_repeated(model: Path, hub: Hub, call: str, status: int) -> None:
    hub.fail(*CALLS[call], status, times=2)
    assert send(model).new
    assert len(hub.writes("user/model")) == 1


@pytest.mark.parametrize("call", [call for call in CALLS if call != "info"])
@pytest.mark.parametrize("fault", ["cut", "swallow"])
def test_a_connection_that_breaks(model: Path, hub: Hub, call: str, fault: str) -> None:
    """Before the request is read whole, or after it was carried out: an answer that never comes."""
    if fault == "cut":
        hub.cut(*CALLS[call], after=20_000)
    else:
        hub.swallow(*CALLS[call])
    send(model)
    assert len(hub.writes("user/model")) == 1, "carried out once, whatever became of the answers"
    assert not send(model).new


def test_a_pull_request_whose_answer_was_lost_is_not_opened_twice(folder: Path, hub: Hub) -> None:
    send(folder)
    (folder / "notes.txt").write_text("x")
    hub.swallow("POST", "/commit/main.create_pr=1")
    pull = send(folder, create_pr=True)
    refs = hub.repos["user/model"].refs
    assert [ref for ref in refs if ref.startswith("refs/pr/")] == ["refs/pr/1"]
    assert (pull.commit, pull.revision) == (refs["refs/pr/1"], "refs/pr/1")


def test_a_tag_whose_answer_was_lost(model: Path, hub: Hub) -> None:
    commit = send(model).commit
    hub.swallow("POST", "/tag/")
    publishing.set_tag("user/model", "v1", commit)
    assert hub.repos["user/model"].refs["refs/tags/v1"] == commit


def test_a_part_of_a_large_file_is_cut_off(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with Hub(part=9_000) as hub:
        use(hub, monkeypatch, tmp_path)
        hub.cut("PUT", "/part/.*/3$", after=4_000, times=2)
        hub.fail("PUT", "/part/.*/2$", 500)
        send(model)
        assert (hub.leaks, hub.halves()) == ([], [])
        assert len(hub.writes("user/model")) == 1


@pytest.mark.parametrize("call", ["commit", "upload"])
def test_retry_after_is_waited_for(model: Path, hub: Hub, waits: list[float], call: str) -> None:
    hub.fail(*CALLS[call], 429, Retry_After="17")
    assert send(model).new
    assert [wait for wait in waits if wait >= 17]
    assert sum(waits) < 40


@pytest.mark.parametrize("call", ["upload", "commit"])
def test_a_server_that_is_gone_for_a_while(
    model: Path, hub: Hub, waits: list[float], monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Until the client has waited for 20 seconds, at the speed of these tests."""
    sleep = time.sleep

    def wait(seconds: float) -> None:
        sleep(seconds)
        if hub.down and sum(waits) >= 20:
            hub.start()

    def go(handler: Any) -> bool:
        hub.stop()
        handler.hang_up()
        return True

    monkeypatch.setattr(time, "sleep", wait)
    hub.faults.append(Fault(*CALLS[call], go, 1))
    send(model)
    assert sum(waits) >= 20
    assert len(hub.writes("user/model")) == 1


@pytest.mark.slow
def test_a_server_that_is_gone_for_20_seconds(model: Path, tmp_path: Path) -> None:
    with Hub() as hub:
        process = driver(hub, model, tmp_path)
        wait_until(lambda: hub.count("^PUT") > 0)
        hub.stop()
        time.sleep(20)
        hub.start()
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out.strip()) == (0, "True"), err
        assert len(hub.writes("user/model")) == 1


@pytest.mark.slow
def test_a_hub_that_fails_while_loading_back(model: Path, hub: Hub) -> None:
    """Busy, cut off in the middle of the weights, then gone for 20 seconds."""
    address = "/user/model/resolve/"
    hub.fail("GET", "/api/models/user/model/revision/", 503)
    hub.fail("GET", "/api/models/user/model/revision/", 429, Retry_After="1")
    hub.cut("GET", "/object/", after=1000)
    before: list[int] = []

    def go() -> None:
        before.append(len(hub.requests))
        threading.Thread(target=hub.gone_for, args=[20]).start()

    hub.before("HEAD", address + ".*modeling_peer.py", go)
    result = publishing.push(model, "user/model")
    assert result["verified"]
    assert before, "the Hub was not gone while loading back"


# Faults that stay


@pytest.mark.parametrize(
    ("call", "status", "message"),
    [
        ("commit", 401, "does not accept your token"),
        ("upload", 403, "your token may not write there"),
        ("commit", 403, "your token may not write there"),
        ("preupload", 404, "does not find it"),
        ("commit", 409, "other changes are being made"),
        ("commit", 429, r"too many requests from you \(429\); push again later"),
        ("upload", 500, "failed with status 500"),
        ("commit", 503, "failed with status 503"),
    ],
)
def test_a_call_that_always_fails(model: Path, hub: Hub, call: str, status: int, message: str) -> None:
    hub.fail(*CALLS[call], status, times=1000)
    with pytest.raises(PublishError, match=message) as caught:
        send(model)
    assert str(caught.value).startswith("user/model: ")
    assert nothing_published(hub)
    hub.faults.clear()
    assert send(model).new


@pytest.mark.parametrize(
    ("status", "times", "message"),
    [
        (401, 99, "does not accept your token"),
        (403, 99, "your token may not write there"),
        pytest.param(503, 1, None, marks=pytest.mark.slow),  # its own waits cannot be made shorter
    ],
)
def test_xet_refuses(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int, times: int, message: str | None
) -> None:
    (tmp_path / "cas").mkdir()
    with Hub(xet=tmp_path / "cas") as hub:
        use(hub, monkeypatch, tmp_path)
        hub.fail("GET", "xet-write-token", status, times=times)
        if message is None:
            assert send(model).new
        else:
            with pytest.raises(PublishError, match=message):
                send(model)
            assert nothing_published(hub)


def test_a_long_wait_is_left_to_the_user(model: Path, hub: Hub, waits: list[float]) -> None:
    hub.fail(*CALLS["commit"], 429, Retry_After="3600")
    with pytest.raises(PublishError, match=r"push again in 3600 s"):
        send(model)
    assert sum(waits) < 10
    assert nothing_published(hub)


@pytest.mark.parametrize("call", ["upload", "commit", "create"])
def test_a_connection_that_always_breaks(model: Path, hub: Hub, call: str) -> None:
    hub.cut(*CALLS[call], after=100, times=1000)
    with pytest.raises(PublishError, match=r"cannot be reached; push again later, and it goes on where it was"):
        send(model)
    assert nothing_published(hub)


def test_no_server(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = Hub()
    hub.start()
    hub.stop()
    use(hub, monkeypatch, tmp_path)
    with pytest.raises(PublishError, match="cannot be reached"):
        send(model)


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [
        (EXPIRED, "user/model", r"does not accept your token \(Invalid credentials"),
        (READER, "user/model", "may not write there"),
        (WRITER, "stranger/model", r"may not write there .* or --create-pr"),
    ],
)
def test_rights(model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, token: str, repo: str, message: str) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(PublishError, match=message) as caught:
        send(model, repo)
    assert token not in str(caught.value)
    assert hub.repos == {}


# Others at work


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


# Here


def test_a_disk_without_room_to_load_back(model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(path.stat().st_size for path in model.iterdir())
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": size}))
    with pytest.raises(PublishError, match=r"loading the model back needs 0\.00 GB .* free some space, or set HF_HOME"):
        publishing.push(model, "user/model")
    assert hub.requests == []


def test_a_disk_full_error_is_named() -> None:
    with pytest.raises(PublishError, match=r"a/b: the disk is full; free some space"), hub_calls.hub_errors("a/b"):
        raise OSError(28, "No space left on device")


def driver(hub: Hub, folder: Path, tmp_path: Path, **environment: str) -> subprocess.Popen[str]:
    """A process that pushes `folder` and prints whether it took a commit."""
    code = (
        "import sys; from pathlib import Path; from peerify import publishing, transfer\n"
        "folder = Path(sys.argv[1])\n"
        "print(transfer.transfer(folder, 'user/model', publishing.check_folder(folder)).new)\n"
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
        # modeling_peer.py is large for this Hub, too; what had arrived is not sent again.
        assert hub.count("^PUT") - puts <= large + 1 - 2
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
