"""A command that is killed leaves its output absent or whole, and the next one ends as if nothing had happened.

Each command runs in a child that is forked after the imports, so that a moment costs a second and not ten. The moments
are drawn over the time that an undisturbed command takes; PEERIFY_TEST_SEED repeats them.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from checkpoints import text_file, tiny_checkpoint
from hub_client import converted, use
from hub_server import Hub

from peerify import cli
from peerify.checkpoint.load import load_for_eval

pytestmark = pytest.mark.slow
MOMENTS = 25
SHORT = 8  # moments of an interrupt, which other tests look at as well
CONVERT = ["convert", "--recipe", "r.yaml", "--json"]


@dataclass
class End:
    """How a command ended: its exit code (negative: the signal that killed it), stdout, stderr, and seconds."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def sentences(self) -> list[str]:
        """Lines that are no progress."""
        return [line for line in self.err.splitlines() if not re.search(r" …$|: \d+ s$", line)]


def command(*argv: str, after: float | None = None, number: int = signal.SIGKILL) -> End:
    """`peerify ARGV` in a forked child of its own group, which gets the signal `number` `after` so many seconds."""
    out, err = Path(".out").absolute(), Path(".err").absolute()
    out.touch()  # a child may be killed before it does
    err.touch()
    started = time.monotonic()
    child = os.fork()
    if not child:
        _child(argv, out, err)
    if after is not None:
        threading.Event().wait(after)  # tests on the Hub make time.sleep faster
        try:
            os.killpg(child, number)  # as a terminal or a power cut does
        except ProcessLookupError:  # before it had a group
            os.kill(child, number)
    _, status = os.waitpid(child, 0)
    seconds = time.monotonic() - started
    end = End(os.waitstatus_to_exitcode(status), out.read_text(), err.read_text(), seconds)
    out.unlink()
    err.unlink()
    return end


def _child(argv: tuple[str, ...], out: Path, err: Path) -> None:
    """Never returns."""
    code = 99
    try:
        os.setsid()
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        sys.argv = ["peerify", *argv]
        cli.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def moments(seed: int, seconds: float, count: int = MOMENTS) -> list[float]:
    """`count` moments of a command that takes `seconds`, in seconds."""
    rng = random.Random(seed)
    return [rng.uniform(0, 1.05 * seconds) for _ in range(count)]


def contents(folder: str | Path) -> dict[str, str]:
    """The sha256 of every file below a folder, by its name; empty where there is none."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def stale(folder: str | Path = ".") -> list[str]:
    """What begins with a dot below a folder: peerify's unfinished work."""
    return sorted(str(path) for path in Path(folder).rglob(".*"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, texts, and a recipe for all but publishing."""
    folder = tmp_path_factory.mktemp("kills")
    tiny_checkpoint(folder / "dense")
    text_file(folder / "train.txt", 4000)
    text_file(folder / "test.txt", 400)
    settings = {
        "model": "dense",
        "output": "peer",
        "calibration": {"data": "train.txt", "tokens": 512, "context": 32},
        "train": {
            "data": {"sources": "train.txt", "context": 32},
            "tokens": 128 * 12,
            "stages": [{"train": "peer"}, {"train": "full"}],
            "evaluation": {"data": "test.txt", "tokens": 128, "every": 3},
            "checkpoints": {"every": 2},
            "log_every": 1,
            "loggers": [],
        },
    }
    (folder / "r.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    """Import what the commands import, once."""
    for name in (
        *("conversion.checkpoint", "evaluation", "pipeline", "publishing.push", "cli.tables"),
        *("training.dry_run", "training.train"),
    ):
        importlib.import_module(f"peerify.{name}")
    importlib.import_module("transformers.models.llama.modeling_llama")


def test_convert(here: Path, seed: int) -> None:
    first = command(*CONVERT)
    assert first.code == 0, first.err
    other = command(*CONVERT, "--set", "output=other", "--set", "convert.active=0.75")
    assert other.code == 0, other.err
    expected, before = contents("peer"), contents("other")
    load_for_eval("peer")
    for turn, moment in enumerate(moments(seed, first.seconds)):
        shutil.rmtree("peer")
        replace = turn % 2 == 1
        if replace:
            shutil.copytree("other", "peer")
        end = command(*CONVERT, *(["--overwrite"] if replace else []), after=moment)
        assert end.code in (-signal.SIGKILL, 0)
        found = contents("peer")
        moved = [path for path in Path().glob(".peer.old-*") if contents(path) == before]
        assert found in (expected, before if replace else {}) or (not found and moved), f"after {moment:.3f} s"
        again = command(*CONVERT, *(["--overwrite"] if replace or found else []))
        assert again.code == 0, again.err
        assert contents("peer") == expected, f"after {moment:.3f} s"
        assert stale() == []


def test_train(here: Path, seed: int) -> None:
    assert command(*CONVERT).code == 0
    converted_model = contents("peer")
    first = command("train", "r.yaml", "--json")
    assert first.code == 0, first.err
    expected, steps = contents("peer-healed"), checkpoints()
    for moment in moments(seed, first.seconds):
        shutil.rmtree("peer-healed")
        shutil.rmtree("peer-healed-run")
        assert command("train", "r.yaml", "--json", after=moment).code in (-signal.SIGKILL, 0)
        assert contents("peer-healed") in ({}, expected), f"after {moment:.3f} s"
        whole = [path for path in Path("peer-healed-run").glob("step-*") if path.is_dir()]
        if not contents("peer-healed"):
            again = command("train", "r.yaml", "--json", *(["--resume"] if whole else []))
            assert again.code == 0, again.err
        assert contents("peer-healed") == expected, f"after {moment:.3f} s"
        assert checkpoints() == steps
        assert contents("peer") == converted_model
        assert stale() == []


def test_run(here: Path, seed: int) -> None:
    first = command("run", "r.yaml", "--json")
    assert first.code == 0, first.err
    results = ("peer", "peer-healed")
    expected, steps = [contents(folder) for folder in results], checkpoints()
    for moment in moments(seed, first.seconds):
        forget()
        assert command("run", "r.yaml", "--json", after=moment).code in (-signal.SIGKILL, 0)
        assert contents("peer") in ({}, expected[0]), f"after {moment:.3f} s"
        assert all(contents("peer-healed").get(name) in (None, value) for name, value in weights(expected[1]))
        again = command("run", "r.yaml", "--json")
        assert again.code == 0, again.err
        assert [contents(folder) for folder in results] == expected, f"after {moment:.3f} s"
        assert checkpoints() == steps
        assert stale() == []


def test_push(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted(tmp_path / "model", shards="8KB")
    monkeypatch.chdir(tmp_path)
    with Hub() as hub:
        use(hub, monkeypatch, tmp_path)
        first = command("push", str(model), "user/model", "--tag", "v1", "--json")
        assert first.code == 0, first.err
        expected = published(hub)
        for moment in moments(seed, first.seconds):
            hub.repos.clear()
            hub.store.clear()
            assert command("push", str(model), "user/model", "--tag", "v1", after=moment).code in (-signal.SIGKILL, 0)
            assert hub.halves() == [], f"after {moment:.3f} s"
            if "user/model" in hub.repos and hub.writes("user/model"):
                assert published(hub) == expected, f"after {moment:.3f} s"
            again = command("push", str(model), "user/model", "--tag", "v1")
            assert again.code == 0, again.err
            assert published(hub) == expected, f"after {moment:.3f} s"
            assert len(hub.writes("user/model")) == 1, "what was published is not published again"
            assert hub.repos["user/model"].refs["refs/tags/v1"] == hub.repos["user/model"].refs["main"]
            assert list((tmp_path / "home").rglob("peerify-push-*")) == []
        assert hub.leaks == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_eval_that_a_signal_stops(here: Path, seed: int, number: signal.Signals) -> None:
    argv = ["eval", "dense", "--data", "train.txt", "--context", "32", "--json"]
    interrupted(argv, seed, number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_push_that_a_signal_stops(
    tmp_path: Path, seed: int, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = converted(tmp_path / "model", shards="8KB")
    monkeypatch.chdir(tmp_path)
    with Hub() as hub:
        use(hub, monkeypatch, tmp_path)
        interrupted(["push", str(model), "user/model"], seed, number)
        assert (hub.halves(), hub.leaks) == ([], [])
        assert list((tmp_path / "home").rglob("peerify-push-*")) == []


def interrupted(argv: list[str], seed: int, number: signal.Signals) -> None:
    """The command ends with the signal's exit code and one sentence, at whatever moment the signal comes."""
    first = command(*argv)
    assert first.code == 0, first.err
    word = "interrupted" if number == signal.SIGINT else "terminated"
    stopped = 0
    for moment in moments(seed, first.seconds, SHORT):
        end = command(*argv, after=0.05 + moment, number=number)
        if end.code == 0:  # it was done
            continue
        stopped += 1
        assert end.code == 128 + number, (moment, end.err)
        assert len(end.sentences) == 1, (moment, end.err)
        assert end.sentences[0].startswith(f"peerify: {word}"), (moment, end.err)
        assert end.out == ""
    assert stopped > 0


def forget() -> None:
    """Remove what the recipe makes."""
    for folder in ("peer", "peer-healed", "peer-healed-run"):
        shutil.rmtree(folder, ignore_errors=True)
    Path("peer.run.json").unlink(missing_ok=True)


def checkpoints() -> dict[str, str]:
    """What the run's folder holds besides times and memory: checkpoints and the best model, to the bit."""
    found = contents("peer-healed-run")
    return {name: value for name, value in found.items() if name.endswith(("model.safetensors", "run.json"))}


def weights(found: dict[str, str]) -> list[tuple[str, str]]:
    return [(name, value) for name, value in found.items() if name.endswith(".safetensors")]


def published(hub: Hub) -> dict[str, str]:
    """The sha256 of every published file by its name."""
    files = hub.repos["user/model"].files("main")
    return {name: file.sha256 or hashlib.sha256(file.data).hexdigest() for name, file in files.items()}
