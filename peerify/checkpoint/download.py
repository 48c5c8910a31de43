"""Fetch an input model from the Hub into its cache: config first, then only the safetensors in use."""

from __future__ import annotations

import errno
from contextlib import suppress
from pathlib import Path

from peerify.checkpoint.files import PROCESSOR_FILES
from peerify.checkpoint.weights import no_safetensors, weight_files
from peerify.errors import CheckpointError
from peerify.hub_calls import reachable


def download(repo: str, *, revision: str | None = None, weights: bool = True, code: bool = False) -> tuple[Path, str]:
    """Return the cached snapshot folder of `repo` and its commit.

    Raises CheckpointError in one sentence: unknown, private or gated repository, unknown revision, no
    network and not in the cache, no safetensors, full disk.
    """
    from huggingface_hub import errors, hf_hub_download, snapshot_download
    from huggingface_hub.utils import validate_repo_id

    at = f" at revision {revision}" if revision else ""
    try:
        validate_repo_id(repo)
    except ValueError as error:
        raise CheckpointError(f"{repo}: no such directory, and not a Hub id (user/name)") from error
    local = not reachable()  # whatever the cache holds must do
    try:
        config = hf_hub_download(repo, "config.json", revision=revision, local_files_only=local)
        folder = Path(config).parent
        commit = folder.name  # every call below uses the commit, so a push meanwhile changes nothing
        # The card tells licence and language, which a converted model takes over.
        patterns = [*PROCESSOR_FILES, "README.md", *(["*.py"] if code else [])]
        with suppress(errors.LocalEntryNotFoundError):
            snapshot_download(
                repo,
                revision=commit,
                allow_patterns=patterns,
                ignore_patterns=["*.bin"],
                local_files_only=local,
            )
        if weights:
            not_cached: Exception | None = None
            for name in ("model.safetensors", "model.safetensors.index.json"):
                try:
                    hf_hub_download(repo, name, revision=commit, local_files_only=local)
                    break
                except errors.LocalEntryNotFoundError as error:
                    not_cached = error
                except errors.EntryNotFoundError:
                    continue
            else:
                raise not_cached or CheckpointError(no_safetensors(repo, list_files(repo, commit)))
            for name in weight_files(folder, repo):
                hf_hub_download(repo, name, revision=commit, local_files_only=local)
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{repo} is gated: accept its terms at https://huggingface.co/{repo} and log in with `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{repo} has no revision {revision}") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repo}: no such directory, and no such model on the Hub (if it is private, log in with `hf auth login`)"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            raise CheckpointError(_status(repo, error.__cause__)) from error
        raise CheckpointError(
            f"{repo}{at}: no such directory, not in the local cache, and the Hub cannot be reached"
        ) from error
    except errors.EntryNotFoundError as error:
        names = list_files(repo, revision)
        if any(name.lower().endswith(".gguf") for name in names):
            raise CheckpointError(
                f"{repo} holds GGUF files only: download one with `hf download {repo} FILE.gguf` and give its path"
            ) from error
        raise CheckpointError(f"{repo}{at} has no config.json, so it is not a transformers model") from error
    except errors.HfHubHTTPError as error:
        raise CheckpointError(_status(repo, error)) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise CheckpointError(f"{repo}: the disk of the Hub cache is full (see HF_HOME)") from error
        raise CheckpointError(f"{repo}: could not be downloaded: {str(error).splitlines()[0]}") from error
    return folder, commit


def _status(repo: str, error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", "unknown")
    return f"{repo}: the Hub answered with status {status}; try again later"


def list_files(repo: str, revision: str | None) -> list[str]:
    """File names of the repository; none when the Hub does not tell."""
    from huggingface_hub import list_repo_files

    try:
        return [] if not reachable() else list_repo_files(repo, revision=revision)
    except Exception:
        return []
