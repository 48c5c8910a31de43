"""A small Hugging Face Hub over HTTP on this machine, for the unmodified huggingface_hub to talk to.

    with Hub() as hub:
        hub.environment   # for a process: HF_ENDPOINT, HF_TOKEN, a cache of its own
        hub.fail("POST", "/commit/", 503, times=2)
        hub.repos["user/model"].files("main")

Two servers: the Hub at 127.0.0.1 and, under the other name `localhost`, the store that large files are sent to and
fetched from. The store must never see a token: `hub.leaks` holds what it saw.
"""

from __future__ import annotations

import http.server
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hub_handler import Handler
from hub_repos import WRITER, Repo

from peerify.checkpoint.files import CODE


@dataclass
class Fault:
    """What to do to the next `times` requests that match."""

    method: str
    path: str  # regular expression, searched in path and query
    act: Callable[[Handler], bool]  # True: the request is dealt with
    times: int


class Hub:
    """The server; a context manager. Faults come in the order they were added."""

    def __init__(self, *, xet: Path | None = None, large: int = 20_000, part: int | None = None) -> None:
        self.repos: dict[str, Repo] = {}
        self.store: dict[str, bytes] = {}  # sha256 -> bytes
        self.parts: dict[str, dict[int, bytes]] = {}
        self.requests: list[str] = []
        self.leaks: list[str] = []
        self.faults: list[Fault] = []
        self.xet, self.large, self.part = xet, large, part
        self.lock = threading.Lock()
        self.down = False
        self.servers: list[http.server.ThreadingHTTPServer] = []
        self.ports = [0, 0]

    def __enter__(self) -> Hub:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen, on the same ports as before."""
        self.down = False
        for i, is_store in enumerate((False, True)):
            handler = type("Handler", (Handler,), {"hub": self, "is_store": is_store})
            server = http.server.ThreadingHTTPServer(("127.0.0.1", self.ports[i]), handler)
            server.daemon_threads = True
            server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that hang up are meant
            self.ports[i] = server.server_port
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
            self.servers.append(server)

    def stop(self) -> None:
        """Refuse connections and drop the open ones."""
        self.down = True
        for server in self.servers:
            server.shutdown()
            server.server_close()
        self.servers.clear()

    def gone_for(self, seconds: float) -> None:
        """Stop now, come back later."""
        self.stop()
        threading.Timer(seconds, self.start).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}"

    @property
    def store_url(self) -> str:
        return f"http://localhost:{self.ports[1]}"

    def environment(self, home: Path, token: str | None = WRITER) -> dict[str, str]:
        """Variables for a process that is to use this Hub."""
        values = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "" if self.xet else "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        return values | ({"HF_TOKEN": token} if token else {})

    # Faults

    def fail(self, method: str, path: str, status: int, *, times: int = 1, body: str = "", **headers: str) -> None:
        """Answer with an error; `Retry_After="2"` becomes a header."""

        def act(handler: Handler) -> bool:
            handler.read()
            handler.answer(status, {"error": body or f"injected {status}"}, **headers)
            return True

        self.faults.append(Fault(method, path, act, times))

    def cut(self, method: str, path: str, *, after: int = 0, times: int = 1) -> None:
        """Take or give `after` bytes of the body, then drop the connection."""

        def act(handler: Handler) -> bool:
            if handler.command == "GET":
                handler.cut_after = after
                return False
            handler.rfile.read(min(after, int(handler.headers.get("Content-Length") or 0)))
            handler.hang_up()
            return True

        self.faults.append(Fault(method, path, act, times))

    def swallow(self, method: str, path: str, *, times: int = 1) -> None:
        """Do what is asked, but never answer."""

        def act(handler: Handler) -> bool:
            handler.mute = True
            return False

        self.faults.append(Fault(method, path, act, times))

    def before(self, method: str, path: str, do: Callable[[], None], *, times: int = 1) -> None:
        """Run `do` before the request is answered."""
        self.faults.append(Fault(method, path, lambda _: do() is not None, times))

    # What tests ask

    def count(self, pattern: str) -> int:
        """Requests so far whose "METHOD /path" matches."""
        return sum(bool(re.search(pattern, request)) for request in self.requests)

    def writes(self, repo: str) -> list[str]:
        """Titles of the commits made to `repo` by its users."""
        return [title for _, _, title in self.repos[repo].log if title != "initial commit"]

    def halves(self) -> list[str]:
        """Commits that have a config but lack weights, code or bytes: there must never be one."""
        found = []
        for name, repo in self.repos.items():
            for commit, files in repo.commits.items():
                if "config.json" not in files:
                    continue
                weights = [path for path in files if path.endswith(".safetensors")]
                lost = [f.sha256 for f in files.values() if f.sha256 and not self.has(f.sha256)]
                index = files.get("model.safetensors.index.json")
                wanted = set(json.loads(index.data)["weight_map"].values()) if index else {"model.safetensors"}
                coded = b"modeling_peer" not in files["config.json"].data or files.keys() >= set(CODE)
                if not wanted <= set(weights) or lost or not coded:
                    found.append(f"{name}@{commit}")
        return found

    def has(self, sha256: str) -> bool:
        return sha256 in self.store or sha256 in self.xet_files()

    def xet_files(self) -> dict[str, str]:
        """sha256 -> Xet hash of every file in the local Xet store, read from its shards."""
        found: dict[str, str] = {}
        for path in (self.xet / "xet" / "xorbs" / "shards").glob("*.mdb") if self.xet else []:
            raw, at = path.read_bytes(), 48
            while raw[at : at + 32] != b"\xff" * 32 and at + 48 <= len(raw):
                file_hash, flags = raw[at : at + 32], int.from_bytes(raw[at + 32 : at + 36], "little")
                rows = int.from_bytes(raw[at + 36 : at + 40], "little") * (2 if flags & 1 << 31 else 1)
                at += 48 * (1 + rows)
                if flags & 1 << 30:
                    found[_merkle(raw[at : at + 32])] = _merkle(file_hash)
                    at += 48
        return found


def _merkle(raw: bytes) -> str:
    """How Xet writes its hashes: four little-endian 64-bit numbers."""
    return "".join(raw[i : i + 8][::-1].hex() for i in range(0, 32, 8))
