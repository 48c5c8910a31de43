"""A model card as text and YAML, and how edits made by people survive when the card is written anew.

The generated part of a card stands between two comments. The first one also holds digests of everything that people
may edit (the YAML keys, and under the empty key the text around the generated part): as peerify generated it, and as it
was when it was last pushed. What differs from these was edited, which settles who wins without keeping old cards.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from peerify.checkpoint.files import CARD
from peerify.config.yamlfile import parse_yaml
from peerify.errors import PublishError
from peerify.reading import read_text

BEGIN, END = "<!-- peerify:begin", "<!-- peerify:end -->"
NOTE = "peerify rewrites what stands between this line and peerify:end; edits anywhere else stay"
_FRONT = re.compile(r"\A---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)
MAX_BYTES = 10_000_000  # of a card
TEXT = ""  # the key of the text around the generated part, beside the YAML keys


@dataclass(frozen=True)
class Card:
    """README.md, taken apart."""

    metadata: dict[str, Any] = field(default_factory=dict)
    before: str = ""
    block: str = ""  # the generated part
    after: str = ""
    generated: dict[str, str] = field(default_factory=dict)  # digests of what peerify wrote, by key
    pushed: dict[str, str] = field(default_factory=dict)  # digests of what was last pushed
    front: str | None = None  # the YAML as someone wrote it, comments and all

    def values(self) -> dict[str, Any]:
        """Everything that people may edit, by key."""
        text = [self.before.strip(), self.after.strip()]
        return {**self.metadata, **({TEXT: text} if any(text) else {})}

    def edited(self, key: str) -> bool:
        """Whether a person wrote the value of `key`, or removed it."""
        return digest(self.values().get(key)) != self.generated.get(key, digest(None))

    def digests(self) -> dict[str, str]:
        """Of all values."""
        return {key: digest(value) for key, value in self.values().items()}


def digest(value: Any) -> str:
    """Twelve hexadecimal digits that tell one value from another."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def card_text(path: Path, remedy: str) -> str:
    """The text of a card. Raises PublishError as `reading.read_text` does."""
    return read_text(path, PublishError, remedy, limit=MAX_BYTES)


def parse(text: str, name: str = CARD) -> Card:
    """Take a card apart. Raises PublishError, naming `name`, when its YAML cannot be read."""
    text = text.replace("\r\n", "\n")
    front = _FRONT.match(text)
    metadata: Any = {}
    written = front[1] if front else None
    if front:
        metadata = parse_yaml(front[1], f"{name}, between the --- lines", PublishError, first_line=2) or {}
        if not isinstance(metadata, dict):
            raise PublishError(f"{name}: between the --- lines there are no `key: value` lines")
        text = text[front.end() :]
    place = _block(text)
    if place is None:
        return Card(metadata, before=text, front=written)
    begin, line, end = place
    try:
        digests = json.loads(text[text.index("{", begin) : text.rindex("}", begin, line) + 1])
        generated, pushed = dict(digests["generated"]), dict(digests.get("pushed") or {})
        if not all(isinstance(said, str) for said in (*generated.values(), *pushed.values())):
            raise ValueError("a digest is a text")
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ):  # someone edited the comment itself: everything counts as edited
        generated, pushed = {}, {}
    before, block, after = text[:begin], text[line + 1 : end], text[end + len(END) :]
    return Card(metadata, before, block, after, generated, pushed, written)


def _block(text: str) -> tuple[int, int, int] | None:
    """Where the generated part of a card begins, the first line of it ends, and its last line begins.

    One pass, whatever stands there: a pattern takes minutes for what a stranger may write.
    """
    begin = text.find(f"{BEGIN} {{")
    while begin >= 0:
        line = text.find("\n", begin)
        if line < 0:
            return None
        if text.endswith("-->", begin, line) and "}" in text[begin:line]:
            end = text.find(END, line)
            return (begin, line, end) if end >= 0 else None
        begin = text.find(f"{BEGIN} {{", line)
    return None


def render(card: Card) -> str:
    """The card as text."""
    digests = {"generated": card.generated, **({"pushed": card.pushed} if card.pushed else {})}
    front = yaml.safe_dump(card.metadata, sort_keys=False, allow_unicode=True, width=10_000).strip()
    if card.front is not None and (parse_yaml(card.front, CARD, PublishError) or {}) == card.metadata:
        front = card.front.strip()
    parts = [
        f"---\n{front}\n---",
        card.before.strip(),
        f"{BEGIN} {json.dumps(digests, separators=(',', ':'))} {NOTE} -->\n{card.block.strip()}\n{END}",
        card.after.strip(),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def regenerate(old: Card, metadata: Mapping[str, Any], title: str, block: str) -> Card:
    """`old` with a new generated part, and its new YAML and title as far as nobody edited them."""
    block = block.replace("<!--", "&lt;!--")  # a name in it may not end the generated part
    fresh = Card(dict(metadata), before=title, block=block)
    merged = _assemble(old, fresh, dict.fromkeys(_keys(old, fresh), True))
    return replace(merged, block=block, generated=fresh.digests(), pushed=old.pushed)


def merge(local: Card, remote: Card, where: str) -> Card:
    """The card to push: the generated part of `local`, and of the rest what people wrote, here or on the Hub.

    Raises:
        PublishError: the same thing was edited in both places, in different ways, since the last push.
    """
    ours, theirs, last = local.values(), remote.values(), remote.pushed
    from_remote = {}
    for key in _keys(local, remote):
        here, there = digest(ours.get(key)), digest(theirs.get(key))
        if here == there or not remote.edited(key):
            from_remote[key] = False
        elif not local.edited(key) or here == last.get(key, digest(None)):
            from_remote[key] = True
        elif there == last.get(key, digest(None)):
            from_remote[key] = False
        else:
            what = f"`{key}`" if key != TEXT else "the text"
            raise PublishError(
                f"README.md: {what} was edited both in the folder and in {where} since the last push; "
                "copy what you want to keep from the Hub into the folder's README.md, so that the two agree"
            )
    merged = _assemble(remote, local, from_remote)
    return replace(merged, block=local.block, generated=local.generated, pushed=local.digests())


def _keys(*cards: Card) -> list[str]:
    return list(dict.fromkeys(key for card in cards for key in (*card.values(), *card.generated, TEXT)))


def _assemble(edited: Card, base: Card, edited_wins: Mapping[str, bool]) -> Card:
    """`base`, with the values from `edited` where it wins (and was edited at all)."""
    metadata = {}
    wanted, values = edited.values(), base.values()
    for key in dict.fromkeys([*values, *wanted]):
        chosen = wanted if edited_wins.get(key) and edited.edited(key) else values
        if key != TEXT and key in chosen:
            metadata[key] = chosen[key]
    text = edited if edited_wins.get(TEXT) and edited.edited(TEXT) else base
    front = edited.front if edited.metadata == metadata else base.front
    return Card(metadata, text.before, base.block, text.after, front=front)
