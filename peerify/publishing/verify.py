"""Load a model as a stranger would, in a fresh process without peerify, and compare what it answers."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from peerify.checkpoint.card import loader
from peerify.errors import PublishError
from peerify.hub_calls import redact

INPUTS_TRIED = 64


def load_locally(folder: Path, scratch: Path) -> None:
    """Load the folder and keep what the model answers in `scratch`, for `load_back`.

    Raises PublishError: it does not load, or has weights that are not finite.
    """
    _write_inputs(folder, scratch / "inputs.pt")
    said = _run(scratch, "local", source=str(folder.resolve()), offline=True)
    if said.get("error"):
        raise PublishError(f"{folder} does not load without peerify: {said['error']}; nothing was sent")


def load_back(repo: str, revision: str, commit: str, scratch: Path, *, files: Sequence[str]) -> None:
    """Load `revision` of `repo` from the Hub into an empty cache; it must be `commit`, and answer as the folder did.

    Raises PublishError, saying what differs.
    """
    said = _run(scratch, "hub", source=repo, revision=revision, reference=str(scratch / "local"), files=list(files))
    pushed = f"{repo} was pushed as commit {commit[:12]}, but "
    if said.get("error"):
        reason = redact(said["error"])
        full = any(words in reason for words in ("File too large", "No space left", "Disk quota"))
        why = f"the disk at {scratch.parent} is full" if full else reason
        raise PublishError(f"{pushed}could not be loaded back: {why}; push again to repeat the check")
    loaded = {path.name for path in (scratch / "hub").glob("models--*/snapshots/*")}
    if loaded != {commit}:
        names = ", ".join(sorted(name[:12] for name in loaded)) or "none"
        raise PublishError(f"{pushed}the Hub gave commit {names} for {revision}; push again")
    if said["differs"]:
        raise PublishError(f"{pushed}is not what was sent: {said['differs']}; do not use it, and push again")


def _write_inputs(folder: Path, path: Path) -> None:
    """What the model may take, most likely first: the same that conversion tries, as long as one of them fits."""
    import torch
    import transformers

    from peerify.discovery.example_inputs import candidates

    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = getattr(transformers, loader(config.to_dict())).from_config(config, dtype=config.dtype)
        torch.save(list(itertools.islice(candidates(model), INPUTS_TRIED)), path)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PublishError(f"{folder} does not load: {reason}; nothing was sent") from error


def _run(scratch: Path, name: str, *, offline: bool = False, **job: Any) -> dict[str, Any]:
    """Have clean_process.py do `job` and return what it wrote down."""
    empty = scratch / "empty"
    empty.mkdir(exist_ok=True)
    defaults = {"revision": None, "reference": None, "files": None, "inputs": str(scratch / "inputs.pt")}
    settings = defaults | job | {"out": str(scratch / name)}
    environment = os.environ | {
        "HF_HUB_CACHE": str(scratch / "hub"),
        "HF_XET_CACHE": str(scratch / "xet"),
        "HF_MODULES_CACHE": str(scratch / f"modules-{name}"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "TRANSFORMERS_OFFLINE": "1" if offline else "0",
    }
    code = (resources.files("peerify.publishing") / "clean_process.py").read_text(encoding="utf-8")
    # -c and an empty working directory: no path leads to peerify's files, and an import of it is refused besides.
    run = subprocess.run(
        [sys.executable, "-c", code, json.dumps(settings)],
        cwd=empty,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    try:
        result: dict[str, Any] = json.loads((scratch / f"{name}.json").read_text())
    except (OSError, ValueError):
        last = run.stderr.strip().splitlines()[-1:] or [f"it ended with code {run.returncode}"]
        result = {"error": last[0]}
    return result
