"""What a push does when the Hub or the network fails, and that nothing half-done is ever called done."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hub_client import driver, nothing_published, send, use, wait_until
from hub_repos import EXPIRED, READER, WRITER
from hub_server import Fault, Hub

from peerify.errors import PublishError
from peerify.publishing import push as publishing

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
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waited for a Hub that was never there"))
    with pytest.raises(PublishError, match=r"user/model: the Hub at http.* cannot be reached; push again later"):
        publishing.push(model, "user/model", progress=lambda *_: pytest.fail("it began before it looked for the Hub"))


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
