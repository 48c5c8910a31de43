"""Where a dense model comes from and under which licence: what a publisher of its conversion has to say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from peerify.checkpoint import frontmatter
from peerify.checkpoint.card import CARRIED_OVER
from peerify.checkpoint.gguf import read_gguf
from peerify.checkpoint.record import Origin
from peerify.errors import PeerifyError

if TYPE_CHECKING:
    from peerify.checkpoint.load import DenseModel

_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]{40})")
_HUB_URL = re.compile(r"https?://huggingface\.co/([\w.-]+/[\w.-]+?)(?:\.git|/)?")


def provenance(dense: DenseModel) -> Origin:
    """What is known of the source model, for peerify.json.

    ``{"model", "revision"}``, and as far as its card, its GGUF header or its place in the Hub's cache tell:
    "base_model" (the Hub id of the dense model), "license", "license_name", "license_link", "language", "pipeline_tag".
    """
    found: Any = {"model": dense.source, "revision": dense.revision}
    if dense.gguf and dense.files:
        return cast(Origin, found | _from_gguf(dense.files / dense.gguf))
    if dense.revision:
        found["base_model"] = dense.source
    elif dense.files and (cached := _CACHED.search(dense.files.resolve().as_posix())):
        found |= {"base_model": f"{cached[1]}/{cached[2]}", "model": cached[2], "revision": cached[3]}
    return cast(Origin, found | _from_card(dense.files / "README.md" if dense.files else None))


def _from_card(path: Path | None) -> dict[str, Any]:
    try:
        metadata = frontmatter.parse(frontmatter.card_text(path, "")).metadata if path else {}
    except PeerifyError:  # no card, or one that nobody could read: nothing is known
        metadata = {}
    return {key: value for key in CARRIED_OVER if _is_text(value := metadata.get(key))}


def _from_gguf(path: Path) -> dict[str, Any]:
    values = read_gguf(path).values
    found = {key: values.get(f"general.{key.replace('_', '.')}") for key in ("license", "license_name", "license_link")}
    for key in ("general.repo_url", "general.source.repo_url", "general.source.url"):
        match = _HUB_URL.fullmatch(str(values.get(key) or ""))
        if match:
            found["base_model"] = match[1]
            break
    return {key: value for key, value in found.items() if _is_text(value)}


def _is_text(value: Any) -> bool:
    """Whether a card's value is a text or, as languages may be, several; whatever else stands there says nothing."""
    texts = value if isinstance(value, list) else [value]
    return bool(texts) and all(isinstance(text, str) and text for text in texts)
