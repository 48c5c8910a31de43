"""Models from the Hub, through its real client and a small server."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from dense_checkpoint import shards

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

    # No waiting between the client's retries.
    def load(source: str, options: str = "", before: str = "import time\ntime.sleep = abs\n", **changes: str) -> str:
        # open_source is all that touches the Hub, and needs no torch: each process takes half a second.
        code = (
            f"{before}from peerify.checkpoint.source import open_source\nfrom peerify.errors import CheckpointError\n"
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
        if "cannot be reached" in run.stdout:
            assert run.stderr == "", "no line for every try"
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


def test_no_network_is_found_out_at_once(dense: Path, hub: SimpleNamespace) -> None:
    """The client itself would try six times, half a minute in all, with a line for each."""
    shutil.copytree(dense, hub.root / "user" / "model")
    hub.load("user/model")
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    impatient = "import time\ndef sleep(seconds): raise SystemExit('slept')\ntime.sleep = sleep\n"
    assert "the Hub cannot be reached" in hub.load("user/other", before=impatient, **nowhere)
    assert hub.load("user/model", before=impatient, **nowhere) == f"ok user/model {COMMIT}"  # from the cache
