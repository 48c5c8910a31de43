"""What a Hub of ours holds: repositories with their commits and files, and the tokens it knows."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field

WRITER, READER, EXPIRED = "hf_writerSecretToken", "hf_readerSecretToken", "hf_expiredSecretToken"


@dataclass
class File:
    """One file of a commit: its bytes, or the sha256 of a large file in the store."""

    data: bytes = b""
    sha256: str | None = None
    size: int = 0

    @property
    def blob(self) -> str:
        """The name git would give it; for a large file, its pointer's."""
        data = self.data
        if self.sha256:
            data = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repo:
    """Commits by id, and refs by name: branches as they are, `refs/tags/T`, `refs/pr/N`."""

    private: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    log: list[tuple[str, str, str]] = field(default_factory=list)  # commit, ref, title
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, File], title: str) -> str:
        """A new commit with exactly `files`, and `ref` moved to it."""
        name = hashlib.sha1(f"{len(self.log)} {title} {time.time_ns()}".encode()).hexdigest()
        self.commits[name], self.refs[ref] = files, name
        self.log.append((name, ref, title))
        return name

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch, tag, PR ref or commit id names."""
        for ref in (revision, f"refs/tags/{revision}", revision.removeprefix("refs/heads/")):
            if ref in self.refs:
                return self.refs[ref]
        return revision if revision in self.commits else None

    def files(self, revision: str = "main") -> dict[str, File]:
        """The files at a revision."""
        return self.commits[self.resolve(revision) or ""]

    def edit(self, path: str, change: Callable[[str], str], revision: str = "main") -> str:
        """What a person does in the web editor: change one file, in a commit of its own."""
        files = dict(self.files(revision))
        data = change(files[path].data.decode()).encode()
        files[path] = File(data, size=len(data))
        return self.commit(revision, files, f"Update {path}")
