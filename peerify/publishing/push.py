"""Publish a converted model on the Hub: check it, send it in one commit, and load back what arrived."""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peerify import __version__
from peerify.checkpoint import frontmatter
from peerify.checkpoint.atomic import alive
from peerify.checkpoint.card import fresh_card, write_card
from peerify.checkpoint.files import CARD, CODE, CODE_FOLDER, ENTRY, MARKER, WEIGHTS, everything, require_own
from peerify.checkpoint.record import read_record, write_record
from peerify.checkpoint.source import open_source
from peerify.checkpoint.weights import INDEX, check_weights, weight_files
from peerify.config.recipe import HubConfig
from peerify.errors import PublishError, UsageError
from peerify.hub_calls import need_hub, ref_fault
from peerify.progress import Progress, teller
from peerify.publishing import verify
from peerify.publishing.transfer import LocalFile, need_token, page, require, set_tag, transfer
from peerify.reading import local_path, printable, read_object

# Left behind unless asked for: what belongs to a training run, not to the model.
NOT_THE_MODEL = (
    *("checkpoint-*/*", "optimizer*", "scheduler*", "sampler*", "random_states*", "rng_state*", "trainer_state*"),
    *("*.pt", "*.pth", "*.pkl", "*.bin", "*.distcp", "*.tmp", "*.lock", "runs/*", "wandb/*"),
)


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dry_run: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Publish the converted model in `folder` as `repo` (user/name), and prove that it arrived.

    All changes are one commit, so the repository never holds half a model. What is already there is not sent again,
    so an interrupted push goes on where it was, and pushing twice changes nothing. Then a fresh process without
    peerify loads that commit and must get the same answers to the bit; the tag is set only after that.

    Args:
        private: of a repository that is made; one that exists must be so already. None: the Hub's default.
        revision: branch to push to, made if need be. Default: main.
        tag: name for the pushed commit.
        create_pr: open a pull request against main instead.
        message: title of the commit.
        include, exclude: patterns of file names to send and to leave out; what the model needs cannot be left out.
        dry_run: check everything here, send nothing.
        trust_remote_code: the folder may hold code that peerify did not write, and the check runs it.
        progress: called with (stage, done, total).

    Returns:
        ``{"repo", "commit", "url", "revision", "tag", "files": [{"path", "bytes", "sent"}], "new_commit",
        "verified"}``; of a dry run also "card" and "dry_run", and no commit.

    Raises:
        UsageError: options that contradict each other.
        CheckpointError, PublishError: the folder is incomplete, the Hub refuses, or what arrived differs.
    """
    _check_options(repo, revision, tag, create_pr)
    folder = local_path(folder, PublishError)
    tell = teller(progress)
    files = check_folder(folder, include, exclude)
    if not trust_remote_code:
        _refuse_code(folder)
    if not dry_run:
        need_token(repo)
        need_hub(repo)
    total = sum(file.size for file in files)
    result: dict[str, Any] = {"repo": repo, "commit": None, "url": page(repo), "revision": revision, "tag": tag}
    with _scratch(2 * total if not dry_run else 0) as scratch:
        tell("Loading the folder without peerify", 0, 1)
        verify.load_locally(folder, scratch)
        tell("Loading the folder without peerify", 1, 1)
        if dry_run:
            card = fresh_card(folder, repo)
            require(card)
            rows = [{"path": file.name, "bytes": file.size, "sent": False} for file in files]
            text = frontmatter.render(card)
            return result | {"files": rows, "verified": False, "new_commit": False, "card": text, "dry_run": True}
        sent = transfer(
            *(folder, repo, files),
            private=private,
            revision=revision,
            tag=tag,
            create_pr=create_pr,
            message=message,
            progress=progress,
        )
        try:
            tell("Loading it back from the Hub", 0, 1)
            # A pull request is loaded by the name that its readers use; everything else by the commit itself.
            at = sent.revision if create_pr and sent.revision else sent.commit
            verify.load_back(repo, at, sent.commit, scratch, files=[file.name for file in files])
            tell("Loading it back from the Hub", 1, 1)
            if tag:
                set_tag(repo, tag, sent.commit)
        except KeyboardInterrupt as interrupt:
            raise type(interrupt)(f"{repo} was pushed as commit {sent.commit[:12]}, but not verified") from None
    rows = [{"path": file.name, "bytes": file.size, "sent": file.name in sent.sent} for file in files]
    where = {"commit": sent.commit, "url": sent.url, "revision": sent.revision}
    return result | where | {"files": rows, "new_commit": sent.new, "verified": True}


def push_checkpoint(
    checkpoint: Path,
    converted: Path,
    hub: HubConfig,
    *,
    steps: int,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Publish a training checkpoint: its model.safetensors in the converted model's folder, on a branch of its own.

    Goes to the branch that `hub` names, or `checkpoints`. Returns and raises as `push` does; where training should go
    on without it, catch PeerifyError.
    """
    with tempfile.TemporaryDirectory(prefix=".push-", dir=checkpoint.parent) as name:
        folder = Path(name) / converted.name
        for file in check_folder(converted):
            if not WEIGHTS.fullmatch(file.name):
                (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file.path, folder / file.name)
        try:
            os.link(checkpoint / "model.safetensors", folder / "model.safetensors")
        except OSError:  # a file system without hard links
            shutil.copyfile(checkpoint / "model.safetensors", folder / "model.safetensors")
        record = read_record(folder, PublishError)
        record["training"], record["evaluation"] = {"steps": steps, "unfinished": True}, []
        write_record(folder, record)
        write_card(folder)
        return push(
            *(folder, hub.repo),
            private=hub.private,
            revision=hub.revision or "checkpoints",
            message=hub.message or f"Checkpoint at step {steps}",
            include=hub.include,
            exclude=hub.exclude,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )


def check_folder(folder: Path, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[LocalFile]:
    """The files to publish from a converted model's folder, which is complete. Loads nothing.

    Raises:
        CheckpointError: shards are missing or damaged.
        PublishError: something else is missing or was changed, or a file holds the user's Hub token.
    """
    if not folder.is_dir():
        raise PublishError(f"{printable(folder)}: no such folder")
    if not (folder / MARKER).is_file():
        raise PublishError(
            f"{printable(folder)} is not a converted model: it has no {MARKER}; `peerify convert` makes one"
        )
    if not open_source(folder, weights=False).converted:
        raise PublishError(f"{folder} is not a converted model: its config.json has no `peer` entry")
    check_weights(folder, str(folder))
    _check_code(folder)
    weights = weight_files(folder, str(folder))
    index = [INDEX] if weights != ["model.safetensors"] else []
    record = read_record(folder, PublishError)
    needed = ["config.json", MARKER, CARD, *CODE, *index, *weights, *record.get("files", [])]
    for name in needed:
        if not (folder / name).is_file():
            raise PublishError(
                f"{folder}/{printable(name)} is missing, which the converted model came with; convert again"
            )
    files = _select(folder, include, exclude)
    chosen = {file.name for file in files}
    for name in needed:
        if name not in chosen:
            raise PublishError(f"--include and --exclude leave out {name}, which the model needs")
    _check_token(files)
    return files


def _check_options(repo: str, revision: str | None, tag: str | None, create_pr: bool) -> None:
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except ValueError:
        repo = ""
    if repo.count("/") != 1:
        raise UsageError("the repository is written user/name, such as ada/smollm2-peer")
    for option, name in (("--revision", revision), ("--tag", tag)):
        if name is not None and (fault := ref_fault(name)):
            raise UsageError(f"{option}: {fault}")
    if create_pr and revision not in (None, "main"):
        raise UsageError("--create-pr opens a pull request against main: drop --revision")
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        raise UsageError("--revision names a branch to push to, not a commit")


def _check_code(folder: Path) -> None:
    for name in CODE:
        path = folder / name
        if not path.is_file():
            raise PublishError(
                f"{path} is missing: nobody could load the model; convert again with this peerify ({__version__}), or "
                f"copy {', '.join(CODE)} from {CODE_FOLDER}"
            )
        if path.read_bytes() != (CODE_FOLDER / name).read_bytes():
            raise PublishError(
                f"{path} is not the one of this peerify ({__version__}); convert again with this version, or replace "
                f"it with {CODE_FOLDER / name}"
            )


def _refuse_code(folder: Path) -> None:
    """Refuse code of a stranger's, which loading the folder would run: files of it, and names of it in the configs."""
    auto_map = read_object(folder / "config.json", PublishError).get("auto_map")
    named = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    ours = ENTRY.removesuffix(".py") + "."
    if not all(isinstance(name, str) and name.startswith(ours) and "--" not in name for name in named):
        raise PublishError(f"{folder}/config.json names code other than {ENTRY} in its auto_map; convert again")
    remedy = "read it, then pass --trust-remote-code"
    for name in everything(folder):
        if (folder / name).is_dir():  # a link, behind which there may be code
            raise PublishError(f"{printable(name)} in {folder} is a link to a folder; put the folder itself there")
        if name.endswith(".py") and name not in CODE:
            raise PublishError(f"{folder} holds {printable(name)}, code that peerify did not write; {remedy}")
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.exists() and "auto_map" in read_object(tokenizer, PublishError):
        raise PublishError(f"{tokenizer} names code of its own (auto_map), which loading it would run; {remedy}")


def _select(folder: Path, include: Sequence[str], exclude: Sequence[str]) -> list[LocalFile]:
    from huggingface_hub.utils import filter_repo_objects

    names = everything(folder)
    asked = set(filter_repo_objects(names, allow_patterns=list(include))) if include else set()
    usual = asked if include else set(filter_repo_objects(names, ignore_patterns=list(NOT_THE_MODEL)))
    chosen = set(filter_repo_objects(sorted(usual | asked), ignore_patterns=list(exclude) or None))
    remedy = "put the file itself there, or leave it out with --exclude"
    require_own(folder, sorted(chosen), str(folder), PublishError, remedy)
    return [LocalFile(folder / name, name) for name in names if name in chosen]


def _check_token(files: Sequence[LocalFile]) -> None:
    from huggingface_hub import get_token

    token = (get_token() or "").encode()
    for file in files:
        if token and file.size < 20_000_000 and not WEIGHTS.fullmatch(file.name) and token in file.path.read_bytes():
            raise PublishError(f"{file.path} holds your Hub token; remove it there, and revoke the token on the Hub")


@contextmanager
def _scratch(needed: int) -> Iterator[Path]:
    """A temporary folder on the disk of the Hub's cache, with room for `needed` bytes."""
    from huggingface_hub import constants

    home = Path(constants.HF_HOME)
    home.mkdir(parents=True, exist_ok=True)
    mine = f"peerify-push-{platform.node()}-"  # the disk may be shared by several machines
    for left in home.glob(f"{mine}*"):  # by killed runs
        process = left.name.removeprefix(mine).partition("-")[0]
        if process.isdigit() and not alive(int(process)):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{mine}{os.getpid()}-", dir=home, ignore_cleanup_errors=True) as name:
        free = shutil.disk_usage(name).free
        if free < needed:
            raise PublishError(
                f"loading the model back needs {needed / 1e9:.2f} GB and the disk at {home} has {free / 1e9:.2f} GB "
                "free; free some space, or set HF_HOME to another place"
            )
        yield Path(name)
