"""Which files of a folder are its own: to read, to copy, to replace and to send. Decided here and nowhere else.

Folders come from strangers. A link in one of them may lead to a person's private key; a pipe or a device has no end.
So only regular files count, and links to regular files of the same folder. Needs nothing but the standard library.
"""

from __future__ import annotations

import ast
import errno
import os
import re
import stat
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from peerify.errors import OutputError, PeerifyError
from peerify.reading import printable, read_object, reason

MARKER = "peerify.json"  # in every folder peerify writes; `overwrite` replaces no other
CARD = "README.md"
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
# What a folder needs besides its weights to be used with text, images or sound. Licences travel along.
PROCESSOR_FILES = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("*.model", "*.tiktoken", "*processor*.json", "feature_extractor*.json", "generation_config.json"),
    *("additional_chat_templates/*", "LICENSE*", "NOTICE*", "USE_POLICY*"),
)
# What is read of a model folder, by peerify and by transformers.
MODEL_FILES = ("*.json", "*.safetensors", CARD, *PROCESSOR_FILES)
# The code beside the weights of a converted model: what its auto_map names, and all that this imports.
ENTRY = "modeling_peer.py"
CODE_FOLDER = Path(__file__).parents[1] / "modeling"
# Named there, since it must know them without peerify; read and not imported, since importing it takes seconds.
CODE: tuple[str, ...] = ast.literal_eval(
    (CODE_FOLDER / ENTRY).read_text(encoding="utf-8").partition("\nFILES = ")[2].partition("\n")[0]
)
# What peerify writes beside the files that it copies from the source model, which peerify.json lists.
_WRITTEN = {
    *("config.json", "generation_config.json", *CODE, MARKER, CARD),
    *("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/README.md"),
}
_CHECKPOINT = {"run.json", "optimizer.pt", MARKER}


def fault_of(path: Path, folder: Path) -> str | None:
    """Why `path`, which is named inside `folder`, is no file of that folder; None where it is one.

    A link counts as what it leads to. The Hub's cache keeps the files of a snapshot as links to the blobs beside it,
    which belong to the snapshot.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        if os.path.islink(path):
            circle = isinstance(error, OSError) and error.errno == errno.ELOOP
            return "is a link that leads in a circle" if circle else "is a link that leads nowhere"
        if isinstance(error, FileNotFoundError):
            return "is not there"
        return f"cannot be read ({reason(error)})"
    if stat.S_ISDIR(status.st_mode):
        return "is a link to a folder" if path.is_symlink() else "is a folder"
    if not stat.S_ISREG(status.st_mode):
        return "is not a regular file (a pipe, socket or device)"
    real = path.resolve()
    if not any(real.is_relative_to(home) for home in _homes(folder)):
        return "is a link to a file outside the folder"
    return None


def _homes(folder: Path) -> list[Path]:
    """Where the files of `folder` may lie: in it, and for a snapshot of the Hub's cache among its blobs."""
    root = folder.resolve()
    cached = [
        parent.parent.parent / "blobs"
        for parent in (root, *root.parents)
        if parent.parent.name == "snapshots" and parent.parent.parent.name.startswith("models--")
    ]
    return [root, *cached]


def matching(folder: Path, patterns: Sequence[str]) -> list[str]:
    """Names of the entries of `folder` that match one of `patterns`, sorted; folders that really are there left out.

    A pattern may name one folder, as in "additional_chat_templates/*".
    """
    names = []
    for place in sorted({pattern.rpartition("/")[0] for pattern in patterns}):
        inside = folder / place
        entries = sorted(os.listdir(inside)) if inside.is_dir() else []
        prefix = f"{place}/" if place else ""
        names += [
            f"{prefix}{entry}"
            for entry in entries
            if (inside / entry).is_symlink() or not (inside / entry).is_dir()
            if any(fnmatch(f"{prefix}{entry}", pattern) for pattern in patterns if pattern.count("/") == bool(place))
        ]
    return names


def everything(folder: Path, *, hidden: bool = False) -> list[str]:
    """Names of all entries below `folder` but real folders. No link is followed; Python's caches do not count.

    `hidden` takes in what begins with a dot.
    """
    names = []
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if Path(parent, name).is_symlink()]
        folders[:] = sorted(
            name for name in folders if name not in links and name != "__pycache__" and (hidden or name[0] != ".")
        )
        found = sorted(name for name in [*files, *links] if hidden or name[0] != ".")
        names += [Path(parent, name).relative_to(folder).as_posix() for name in found]
    return names


def require_own(folder: Path, names: Iterable[str], label: str, fault: type[PeerifyError], remedy: str) -> None:
    """Raise `fault`, naming the first of `names` that is no file of `folder`."""
    for name in names:
        wrong = fault_of(folder / name, folder)
        if wrong:
            raise fault(f"{printable(name)} in {printable(label)} {wrong}; {remedy}")


def is_ours(folder: Path) -> bool:
    """Whether peerify wrote `folder`: it holds a peerify.json with what peerify writes into one."""
    return _marker(folder) is not None


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` is a checkpoint of a training run, and no link to one."""
    return not folder.is_symlink() and "checkpoint" in (_marker(folder) or {})


def foreign(folder: Path) -> list[str]:
    """Names of the files below a folder that peerify wrote which peerify did not write, hidden ones included."""
    marker = _marker(folder) or {}
    listed = marker.get("files")
    copied = {name for name in listed if isinstance(name, str)} if isinstance(listed, list) else set()
    ours = copied | (_CHECKPOINT if "checkpoint" in marker else _WRITTEN)
    return [
        name
        for name in everything(folder, hidden=True)
        if (folder / name).is_symlink() or not (name in ours or WEIGHTS.fullmatch(name))
    ]


def _marker(folder: Path) -> dict[str, Any] | None:
    path = folder / MARKER
    if fault_of(path, folder) is not None:
        return None
    try:
        found = read_object(path, OutputError)
    except OutputError:
        return None
    converted = isinstance(found.get("peerify"), str) and isinstance(found.get("source"), dict)
    return found if converted or isinstance(found.get("checkpoint"), int) else None
