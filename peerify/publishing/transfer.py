"""Bring files to the Hub in one commit, whatever the network does meanwhile."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peerify import __version__
from peerify.checkpoint import frontmatter
from peerify.checkpoint.card import fresh_card
from peerify.checkpoint.files import CARD, WEIGHTS
from peerify.errors import PublishError
from peerify.hub_calls import Retry, hub_errors, status_of

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

SMALL = 1_000_000  # bytes
OPEN_PULLS = 10  # looked through for one that already holds the same files


@dataclass(frozen=True)
class LocalFile:
    """A file to publish."""

    path: Path
    name: str  # in the repository

    @cached_property
    def size(self) -> int:
        return self.path.stat().st_size

    @cached_property
    def sha256(self) -> str:
        """As large files are named."""
        with self.path.open("rb") as file:
            return _digest(hashlib.sha256(), file)

    @cached_property
    def blob(self) -> str:
        """As git names small files."""
        with self.path.open("rb") as file:
            return _digest(hashlib.sha1(b"blob %d\0" % self.size), file)


@dataclass
class Sent:
    """Where the files are now."""

    commit: str
    revision: str | None  # refs/pr/N for a pull request, else the branch
    url: str
    new: bool  # whether it took a commit
    sent: list[str] = field(default_factory=list)


def transfer(
    folder: Path,
    repo: str,
    files: Sequence[LocalFile],
    *,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Sent:
    """Bring `files` to the Hub in one commit, or find that they are there already.

    Raises PublishError: the card lacks something, or whatever the Hub and the network do that does not pass.
    """
    from huggingface_hub import HfApi

    need_token(repo)
    job = _Transfer(HfApi(), folder, repo, files, private, revision, tag, create_pr, message, progress)
    with hub_errors(repo), _own_bars(progress is not None):
        return job.retry.call(job.attempt)


def need_token(repo: str) -> None:
    """Raise PublishError unless the user is logged in to the Hub."""
    from huggingface_hub import get_token

    if not get_token():
        raise PublishError(f"{repo}: pushing needs a Hub token; log in with `hf auth login`, or set HF_TOKEN")


@contextmanager
def _own_bars(wanted: bool) -> Iterator[None]:
    """Hide the client's progress bars, which would be drawn over ours."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hide = wanted and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()


@dataclass
class _Transfer:
    """One push. `attempt` may be repeated at any time: it looks anew at what the Hub has and sends what is missing."""

    api: HfApi
    folder: Path
    repo: str
    files: Sequence[LocalFile]
    private: bool | None
    revision: str | None
    tag: str | None
    create_pr: bool
    message: str | None
    progress: Callable[[str, int, int], None] | None
    retry: Retry = field(default_factory=Retry)
    uploads: dict[str, CommitOperationAdd] = field(default_factory=dict)  # kept between attempts: what is sent is sent
    uploaded: set[str] = field(default_factory=set)  # large files that the Hub has taken

    def attempt(self) -> Sent:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        head = self._head()
        remote = self._tree(head)
        card = frontmatter.render(self._card(head, CARD in remote))
        if self._same(remote, card):
            self._check_tag(head, changed=False)
            return Sent(head, self.revision, page(self.repo, self.revision), new=False)
        if self.create_pr and (pull := self._same_pull(card)):
            return pull
        self._check_tag(head, changed=True)
        self._check_card(card)
        changed = [file for file in self.files if file.name != CARD and not _equal(file, remote.get(file.name))]
        self._upload(changed)
        names = {file.name for file in self.files}
        stale = [name for name in remote if WEIGHTS.fullmatch(name) and name not in names]
        commit = self.api.create_commit(
            self.repo,
            [
                *(self._operation(file) for file in changed),
                CommitOperationAdd(CARD, card.encode()),
                # Shards of an earlier, differently cut model would be loaded in place of the new ones.
                *(CommitOperationDelete(name) for name in stale),
            ],
            commit_message=self.message or f"Upload PEER model made with peerify {__version__}",
            revision=self.revision,
            create_pr=self.create_pr,
            parent_commit=head,  # so that nothing is committed twice, or on top of what was not looked at
        )
        sent = [file.name for file in changed] + [CARD]
        if self.create_pr:
            return Sent(commit.oid, commit.pr_revision, str(commit.pr_url), new=True, sent=sent)
        return Sent(commit.oid, self.revision, page(self.repo, self.revision), new=True, sent=sent)

    def _check_card(self, card: str) -> None:
        """Raise PublishError where the Hub does not accept the card's metadata."""
        from huggingface_hub.utils import get_session, hf_raise_for_status

        # Not `ModelCard.validate`: in releases before 2 it asks huggingface.co, whatever Hub is published to.
        response = get_session().post(
            f"{self.api.endpoint}/api/validate-yaml",
            json={"repoType": "model", "content": card},
            headers={"Accept": "text/plain"},
        )
        if response.status_code == 400:
            raise PublishError(f"{CARD}: the Hub does not accept its metadata: {_errors(response.text)}")
        hf_raise_for_status(response)

    def _head(self) -> str:
        """The commit to build on; makes the repository and the branch if need be."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        try:
            info = self.api.model_info(self.repo)
        except RepositoryNotFoundError:
            self.api.create_repo(self.repo, private=self.private, exist_ok=True)
            info = self.api.model_info(self.repo)
        if self.private is not None and bool(info.private) != self.private:
            is_, wanted = ("private", "--public") if info.private else ("public", "--private")
            raise PublishError(
                f"{self.repo} exists and is {is_}, so {wanted} cannot be had; change that in its settings on the Hub, "
                "or choose another name"
            )
        if self.revision is not None:
            try:
                info = self.api.model_info(self.repo, revision=self.revision)
            except RevisionNotFoundError:
                self.api.create_branch(self.repo, branch=self.revision, exist_ok=True)
                info = self.api.model_info(self.repo, revision=self.revision)
        return str(info.sha)

    def _tree(self, commit: str) -> dict[str, Any]:
        rows = self.api.list_repo_tree(self.repo, recursive=True, revision=commit)
        return {row.path: row for row in rows if hasattr(row, "blob_id")}

    def _card(self, head: str, exists: bool) -> frontmatter.Card:
        card = fresh_card(self.folder, self.repo)
        if exists:
            with tempfile.TemporaryDirectory() as folder:
                path = self.api.hf_hub_download(self.repo, CARD, revision=head, local_dir=folder)
                text = frontmatter.card_text(Path(path), "mend it on the Hub")
            where = f"{self.repo} on the Hub"
            card = frontmatter.merge(card, frontmatter.parse(text, f"{where}, {CARD}"), where)
        else:
            card = frontmatter.merge(card, frontmatter.Card(), "")
        require(card)
        return card

    def _same(self, remote: dict[str, Any], card: str) -> bool:
        names = {file.name for file in self.files}
        if any(WEIGHTS.fullmatch(name) and name not in names for name in remote) or CARD not in remote:
            return False
        blob = hashlib.sha1(b"blob %d\0" % len(card.encode()) + card.encode()).hexdigest()
        return remote[CARD].blob_id == blob and all(
            _equal(file, remote.get(file.name)) for file in self.files if file.name != CARD
        )

    def _same_pull(self, card: str) -> Sent | None:
        """An open pull request that holds just these files: an earlier push, or one whose answer was lost."""
        pulls = self.api.get_repo_discussions(self.repo, discussion_type="pull_request", discussion_status="open")
        for pull, _ in zip(pulls, range(OPEN_PULLS), strict=False):
            ref = f"refs/pr/{pull.num}"
            commit = str(self.api.model_info(self.repo, revision=ref).sha)
            if self._same(self._tree(commit), card):
                return Sent(commit, ref, f"{page(self.repo)}/discussions/{pull.num}", new=False)
        return None

    def _upload(self, files: Sequence[LocalFile]) -> None:
        """Send the large ones; the small ones travel in the commit."""
        # One by one, so that Ctrl-C is heard and progress seen; create_commit sends the rest all at once.
        files = [file for file in files if file.size > SMALL or WEIGHTS.fullmatch(file.name)]
        total, done = sum(file.size for file in files), 0
        for file in files:
            if self.progress is not None:
                self.progress("Uploading", done, total)
            if file.name not in self.uploaded:
                self.api.preupload_lfs_files(
                    *(self.repo, [self._operation(file)]),
                    revision=self.revision,
                    create_pr=self.create_pr,
                    free_memory=False,
                )
                self.uploaded.add(file.name)
                self.retry.reset()
            done += file.size
        if self.progress is not None:
            self.progress("Uploading", total, total)

    def _operation(self, file: LocalFile) -> CommitOperationAdd:
        from huggingface_hub import CommitOperationAdd

        if file.name not in self.uploads:
            self.uploads[file.name] = CommitOperationAdd(file.name, str(file.path))
        return self.uploads[file.name]

    def _check_tag(self, head: str, *, changed: bool) -> None:
        if self.tag is None:
            return
        for tag in self.api.list_repo_refs(self.repo).tags:
            if tag.name == self.tag and (changed or tag.target_commit != head):
                raise PublishError(
                    f"{self.repo} already has a tag {self.tag}, at {tag.target_commit[:12]}; choose another --tag"
                )


def set_tag(repo: str, tag: str, commit: str) -> None:
    """Tag a commit. Raises PublishError: another commit has that tag."""
    from huggingface_hub import HfApi

    api = HfApi()

    def attempt() -> None:
        try:
            api.create_tag(repo, tag=tag, revision=commit)
        except Exception as error:
            if status_of(error) != 409:
                raise
            # Set a moment ago without an answer, or by an earlier push of the same files.
            at = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo).tags}.get(tag)
            if at != commit:
                raise PublishError(
                    f"{repo} already has a tag {tag}, at {str(at)[:12]}; choose another --tag"
                ) from error

    with hub_errors(repo):
        Retry().call(attempt)


def require(card: frontmatter.Card) -> None:
    """Raise PublishError unless the card says licence and base model."""
    wanted = {
        "license": "the source model's licence, such as apache-2.0",
        "base_model": "the Hub id of the dense model, such as HuggingFaceTB/SmolLM2-135M",
    }
    for key, what in wanted.items():
        if not card.metadata.get(key):
            raise PublishError(
                f"{CARD}: write `{key}: …` between its --- lines ({what}); the source model did not say it"
            )


def _equal(file: LocalFile, remote: Any) -> bool:
    if remote is None or remote.size != file.size:
        return False
    return bool(remote.lfs.sha256 == file.sha256 if remote.lfs else remote.blob_id == file.blob)


def _digest(state: Any, file: Any) -> str:
    while chunk := file.read(1 << 20):
        state.update(chunk)
    return str(state.hexdigest())


def _errors(answer: str) -> str:
    """The messages in the answer to a card that was refused."""
    try:
        return "; ".join(row["message"] for row in json.loads(answer)["errors"])
    except (ValueError, KeyError, TypeError):
        return answer.partition("\n")[0]


def page(repo: str, revision: str | None = None) -> str:
    """Address of the model's page."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo}" + (f"/tree/{revision}" if revision else "")
