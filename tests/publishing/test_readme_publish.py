"""The README's quick start and docs/publishing.md, followed word by word against a Hub of ours."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from checkpoints import text_file, tiny_checkpoint
from hub_client import DENSE_CARD
from hub_repos import WRITER, File
from hub_server import Hub

ROOT = Path(__file__).parents[2]
QUICK_START = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Quick start\n")[1].split("\n## ")[0]
PUBLISHING = (ROOT / "docs" / "publishing.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of one language; "" is the command line's. Names on the Hub are the test's own."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [code.replace("you/", "user/") for name, code in found if name == language]


def log_in(environment: dict[str, str], folder: Path) -> None:
    """`hf auth login` at a terminal, the token pasted."""
    main, terminal = pty.openpty()
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / "hf"), "auth", "login"],
        env=environment,
        cwd=folder,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    said, end = b"", time.monotonic() + 300
    answers = {b"Paste an access token": "\x1b[B\r", b"will not be visible): ": f"{WRITER}\n", b"(y/n)": "n\n"}
    try:
        while process.poll() is None and time.monotonic() < end:
            if select.select([main], [], [], 0.2)[0]:
                try:
                    said += os.read(main, 4096)
                except OSError:  # the terminal is gone with the process
                    break
            for prompt in [prompt for prompt in answers if prompt in said]:
                # The menu is drawn before it listens to single keys, and what was typed until then is lost.
                listens = "\n" in answers[prompt] or not termios.tcgetattr(main)[3] & termios.ICANON
                if listens:
                    os.write(main, answers.pop(prompt).encode())
        assert process.wait(30) == 0, said.decode()
    finally:
        process.kill()
        process.wait()
        os.close(main)


@pytest.mark.slow
def test_quick_start_and_publishing(tmp_path: Path) -> None:
    work, bin_folder = tmp_path / "work", tmp_path / "bin"
    work.mkdir()
    bin_folder.mkdir()
    (bin_folder / "peerify").write_text(f'#!/bin/sh\nexec {sys.executable} -m peerify "$@"\n')
    (bin_folder / "peerify").chmod(0o755)
    for name in ("text.txt", "other.txt"):
        text_file(work / name, 17_000)
    (work / "recipes").symlink_to(ROOT / "recipes")
    dense = tiny_checkpoint(tmp_path / "dense", max_position_embeddings=512)
    (dense / "README.md").write_text(DENSE_CARD)
    with Hub() as hub:
        from hub_server import Repo

        files = {path.name: File(path.read_bytes(), size=path.stat().st_size) for path in dense.iterdir()}
        for name in ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct"):
            hub.repos[name] = Repo()
            hub.repos[name].commit("main", files, "model")
        environment = os.environ | hub.environment(tmp_path / "home", token=None)
        environment["PATH"] = f"{bin_folder}{os.pathsep}{environment['PATH']}"
        environment.pop("HF_TOKEN", None)

        def run(line: str) -> str:
            done = subprocess.run(
                ["bash", "-c", line], cwd=work, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
            return done.stdout

        assert "`hf auth login`" in QUICK_START
        assert "`hf auth login`" in PUBLISHING
        log_in(environment, work)
        convert, train = blocks(QUICK_START, "")
        for line in convert.splitlines():
            said = run(line)
        assert "nothing was sent" in said, "the last line is a push's dry run"
        assert "user/smollm2-peer" not in hub.repos
        for line in train.splitlines():
            run(f"{line.partition('#')[0]} --set train.tokens=4096")  # for less time only
        assert (work / "smollm2-135m-peer-own-healed" / "peerify.json").exists()
        evaluate, dry_run, push = blocks(PUBLISHING, "")[0].splitlines()
        run(evaluate)
        before = len(hub.requests)
        said = run(dry_run)
        assert "nothing was sent" in said
        assert "license: apache-2.0" in said
        assert "base_model: HuggingFaceTB/SmolLM2-135M" in said
        assert "| other.txt |" in said
        assert not [request for request in hub.requests[before:] if not request.startswith(("GET", "HEAD"))]
        said = run(push)
        published = hub.repos["user/smollm2-peer"]
        assert published.refs["main"] == published.refs["refs/tags/v1"]
        assert "to the bit" in said
        assert f"model: {hub.endpoint}/user/smollm2-peer" in said
        assert not [request for request in hub.requests[before:] if re.search("resolve/.*SmolLM2-135M", request)]
        card = published.files()["README.md"].data.decode()
        load_back, from_python = blocks(QUICK_START, "python")
        for snippet in [*blocks(card, "python"), load_back]:
            code = snippet + "print(type(model).__name__, tokenizer('a')['input_ids'])"
            loaded = subprocess.run(
                [sys.executable, "-I", "-c", code],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert loaded.stdout.startswith("PeerLlamaForCausalLM"), loaded.stderr
        for name, characters in (("long", 17_000), ("short", 900)):
            folder = tmp_path / name
            folder.mkdir()
            text_file(folder / "text.txt", characters)
            written = subprocess.run(
                [sys.executable, "-c", from_python],
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert written.returncode == 0, written.stderr
            assert (folder / "smollm2-peer" / "peerify.json").exists()
        assert (hub.leaks, [half for half in hub.halves() if "peer" in half]) == ([], [])
