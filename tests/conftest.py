"""What every test gets: one thread, fresh seeds that are printed, no network, a home of its own."""

from __future__ import annotations

import os
import random
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before anything imports transformers or huggingface_hub, which read these once. Subprocesses inherit them.
_HOME = tempfile.TemporaryDirectory(prefix="peerify-tests-")
os.environ.update(
    HOME=_HOME.name,
    HF_HOME=os.path.join(_HOME.name, "huggingface"),
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    PYTHONPATH=os.pathsep.join(filter(None, [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")])),
)

import pytest  # noqa: E402
import torch  # noqa: E402
from dense_checkpoint import dense  # noqa: E402, F401
from hub_client import folder, hub, model  # noqa: E402, F401
from report_pages import pages  # noqa: E402, F401

torch.set_num_threads(1)
# Where the tests run in the background of a script, Ctrl-C is ignored, and their subprocesses would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def here(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh working directory in which the module's `files` can be named without a path."""
    for path in files.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """A fresh seed each run, shown when the test fails; PEERIFY_TEST_SEED=n repeats it."""
    value = int(os.environ.get("PEERIFY_TEST_SEED") or random.SystemRandom().randrange(2**31))
    random.seed(value)
    torch.manual_seed(value)
    request.node.user_properties.append(("seed", value))
    return value


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Name the seed beside a failure."""
    report = (yield).get_result()
    seeds = dict(item.user_properties)
    if report.failed and "seed" in seeds:
        report.sections.append(("seed", f"PEERIFY_TEST_SEED={seeds['seed']} repeats this run"))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise at every connection that leaves this machine."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        host = str(address[0]) if isinstance(address, tuple) else ""
        if self.family != socket.AF_UNIX and host not in ("127.0.0.1", "::1", "localhost"):
            raise RuntimeError(f"a test tried to reach {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
