"""The README's Use and Publish sections, followed word by word against a Hub of ours."""

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

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def commands(section: str) -> list[str]:
    """Lines of the first code block of a section."""
    return README.split(f"\n## {section}\n")[1].split("```\n")[1].strip().splitlines()


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
def test_use_and_publish(tmp_path: Path) -> None:
    work, bin_folder = tmp_path / "work", tmp_path / "bin"
    work.mkdir()
    bin_folder.mkdir()
    (bin_folder / "peerify").write_text(f'#!/bin/sh\nexec {sys.executable} -m peerify "$@"\n')
    (bin_folder / "peerify").chmod(0o755)
    for name in ("text.txt", "other.txt"):
        text_file(work / name, 17_000)
    dense = tiny_checkpoint(tmp_path / "dense", max_position_embeddings=512)
    (dense / "README.md").write_text(DENSE_CARD)
    with Hub() as hub:
        from hub_server import Repo

        repo = hub.repos["HuggingFaceTB/SmolLM2-135M"] = Repo()
        files = {path.name: File(path.read_bytes(), size=path.stat().st_size) for path in dense.iterdir()}
        repo.commit("main", files, "model")
        environment = os.environ | hub.environment(tmp_path / "home", token=None)
        environment["PATH"] = f"{bin_folder}{os.pathsep}{environment['PATH']}"
        environment.pop("HF_TOKEN", None)

        def run(line: str) -> str:
            done = subprocess.run(
                ["bash", "-c", line], cwd=work, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
            return done.stdout

        for line in commands("Use"):
            run(line)
        assert "`hf auth login`" in README
        log_in(environment, work)
        evaluate, dry_run, push = (line.replace("you/", "user/") for line in commands("Publish"))
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
        assert hub.count("resolve/.*SmolLM2-135M") == 0
        snippet = re.findall(r"```python\n(.*?)```", published.files()["README.md"].data.decode(), re.DOTALL)[0]
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
        assert (hub.leaks, [half for half in hub.halves() if "peer" in half]) == ([], [])
