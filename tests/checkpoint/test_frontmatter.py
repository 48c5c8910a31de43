"""Cards as text and YAML: nothing anybody wrote is lost, and nothing changes by itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import tiny_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from peerify.checkpoint.frontmatter import BEGIN, END, Card, merge, parse, regenerate, render
from peerify.checkpoint.load import DenseModel, load_dense
from peerify.checkpoint.provenance import provenance
from peerify.errors import PublishError

few = settings(max_examples=40, deadline=None)
KEYS = st.sampled_from(["license", "tags", "language", "widget", "base_model"])
WORDS = st.text("abc é#:-'\"[]{}\n", max_size=12)
VALUES = st.one_of(WORDS, st.integers(), st.booleans(), st.lists(WORDS, max_size=3), st.dictionaries(KEYS, WORDS))
METADATA = st.dictionaries(KEYS, VALUES, max_size=4)
# Text of people: anything that is not one of the two comments or the line that ends the YAML.
TEXT = st.text("abc #é\n`-", max_size=30).map(lambda text: text.replace("---", "- -").strip())


@st.composite
def generated(draw: st.DrawFn) -> Card:
    """A card as peerify writes it."""
    return regenerate(Card(), draw(METADATA), draw(TEXT), "generated " + draw(st.text("abc\n", max_size=9)).strip())


@st.composite
def edited(draw: st.DrawFn, card: Card) -> Card:
    """The same with changes by a person."""
    metadata = {key: value for key, value in card.metadata.items() if draw(st.booleans())} | draw(METADATA)
    return replace(card, metadata=metadata, before=draw(TEXT), after=draw(TEXT), front=None)


def fields(card: Card) -> tuple[Any, ...]:
    return card.metadata, card.before.strip(), card.block.strip(), card.after.strip(), card.generated, card.pushed


@few
@given(generated())
def test_what_is_written_is_read(card: Card) -> None:
    assert fields(parse(render(card))) == fields(card)
    assert render(parse(render(card))) == render(card)


@few
@given(generated())
def test_a_second_push_changes_nothing(card: Card) -> None:
    first = merge(card, Card(), "the Hub")
    assert render(merge(card, parse(render(first)), "the Hub")) == render(first)


@few
@given(st.data())
def test_edits_on_the_hub_survive_any_number_of_pushes(data: st.DataObject) -> None:
    card = data.draw(generated())
    remote = data.draw(edited(merge(card, Card(), "the Hub")))
    mine = {key: remote.values().get(key) for key in [*remote.values(), *remote.generated] if remote.edited(key)}
    for _ in range(2):
        card = regenerate(card, data.draw(METADATA), "# title", "new block")  # another conversion, nobody edits it here
        remote = parse(render(merge(card, remote, "the Hub")))
        assert remote.block.strip() == "new block"
        assert {key: remote.values().get(key) for key in mine} == mine
        # What peerify itself says now counts as its own from here on.
        mine = {key: value for key, value in mine.items() if remote.edited(key)}


@few
@given(st.data())
def test_edits_in_the_folder_arrive(data: st.DataObject) -> None:
    local = data.draw(edited(data.draw(generated())))
    sent = merge(local, Card(), "the Hub")
    assert sent.values() == local.values()
    changed = data.draw(edited(local))
    arrived = merge(changed, parse(render(sent)), "the Hub").values()
    again = regenerate(parse(render(changed)), {"license": "new"}, "# new", "new").values()
    for key in changed.values():
        if changed.edited(key):
            assert arrived[key] == changed.values()[key]
            assert again[key] == changed.values()[key]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("---\na: [\n---\n", r"README\.md, between the --- lines, line \d: not valid YAML"),
        ("---\n- a\n---\n", "there are no `key: value` lines"),
    ],
)
def test_yaml_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(PublishError, match=message):
        parse(text)


def test_comments_in_the_yaml_and_foreign_cards_are_kept() -> None:
    card = parse("---\nlicense: mit  # as agreed\n---\n# Title\n\n---\n\nrule above\n")
    assert (card.metadata, card.before.strip()) == ({"license": "mit"}, "# Title\n\n---\n\nrule above")
    assert render(card).startswith("---\nlicense: mit  # as agreed\n---\n")
    assert parse("").metadata == {}
    assert parse("# only text").before == "# only text"
    broken = render(regenerate(Card(), {"license": "mit"}, "# t", "b")).replace('{"generated"', '{"other"')
    assert parse(broken).edited("license"), "whoever changed the comment has written everything"


# What the source model says of itself


def test_provenance_of_a_snapshot_in_the_cache(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tiny_checkpoint(tmp_path / "models--ada--little-model" / "snapshots" / commit)
    (folder / "README.md").write_text(
        "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\ntags: [a]\n---\n"
    )
    assert provenance(load_dense(folder)) == {
        "model": "little-model",
        "revision": commit,
        "base_model": "ada/little-model",
        "license": "other",
        "license_name": "mine",
        "license_link": "LICENSE",
    }


def test_provenance_of_a_folder_and_of_a_card_nobody_can_read(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "plain")
    assert provenance(load_dense(folder)) == {"model": "plain", "revision": None}
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    assert provenance(load_dense(folder)) == {"model": "plain", "revision": None}
    (folder / "README.md").write_bytes(b"\xff\xfe")
    assert provenance(load_dense(folder)) == {"model": "plain", "revision": None}


def test_provenance_of_a_gguf_file(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_license("apache-2.0")
    writer.add_string("general.repo_url", "https://huggingface.co/ada/model")
    writer.add_array("general.languages", ["en"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    dense = DenseModel(None, "m.gguf", None, tmp_path, gguf="m.gguf")  # type: ignore[arg-type]
    assert provenance(dense) == {
        "model": "m.gguf",
        "revision": None,
        "license": "apache-2.0",
        "base_model": "ada/model",
    }
    assert json.dumps(provenance(dense))


@pytest.mark.parametrize(
    "pattern",
    [f"{BEGIN} {{", f"{BEGIN} {{}} -->\n", f"{BEGIN} {{}}\n"],
)
def test_a_card_of_many_beginnings_is_taken_apart_at_once(pattern: str) -> None:
    """A regular expression took minutes for 10 kB."""
    text = f"{BEGIN} {{" + pattern * 20_000
    card = parse(text)
    assert (card.before, card.block) == (text, "")


def test_keys_are_names_whatever_yaml_makes_of_them() -> None:
    card = parse("---\n1: a\nno: b\nx: {2020-01-01: a, yes: b, 1: c}  # mine\n---\nText\n")
    assert card.metadata == {"1": "a", "no": "b", "x": {"2020-01-01": "a", "yes": "b", "1": "c"}}
    pushed = merge(card, Card(), "")
    assert "# mine" in render(pushed)
    assert parse(render(pushed)).digests() == card.digests()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("!!binary aGk=", "the tag .*binary' is not read here"),
        ("0x" + "f" * 5000, "the number has more than 300 digits"),
        ("!!float ''", "a value is not of the kind that its tag"),
        ("x" * 1_000_001, "it has more than 1,000,000 characters"),
        ("&a [*a]", "it refers to itself"),
    ],
)
def test_yaml_that_no_card_needs(value: str, message: str) -> None:
    with pytest.raises(PublishError, match=rf"^README\.md, between the --- lines.*{message}"):
        parse(f"---\nx: {value}\n---\nText\n")


@pytest.mark.parametrize(
    "digests",
    ['{"generated": {"license": [1]}}', '{"generated": {"license": 5}}', '{"generated": {}, "pushed": {"": {}}}', "{}"]
    + [f'{{"generated": {{"a": {"[" * depth}{"]" * depth}}}}}' for depth in (50, 900, 100_000)],
)
def test_digests_that_are_none_count_as_edits(digests: str) -> None:
    card = parse(f"{BEGIN} {digests} -->\nGenerated\n{END}\n")
    assert (card.block, card.generated, card.pushed) == ("Generated\n", {}, {})


def test_a_name_cannot_end_the_generated_part() -> None:
    card = regenerate(Card(), {}, "# A", f"Made from {END} of a stranger.")
    again = parse(render(card))
    assert again.after.strip() == ""
    assert "of a stranger" in again.block
