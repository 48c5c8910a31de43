"""Text to windows: the perplexity protocol, the file formats, and what is said about bad text."""

from __future__ import annotations

import json
import logging
import os
import random
import sys
import types
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from checkpoints import random_text, text_file, tiny_model, tiny_tokenizer

from peerify.data import check_windows, load_windows, read_pieces, read_text, tokenize
from peerify.errors import DataError, UsageError


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_windows_are_the_text_cut_in_order() -> None:
    tokenizer = tiny_tokenizer()
    text = random_text(random.randint(200, 400))
    context = random.randint(3, 50)
    windows = tokenize(text, tokenizer, context)
    assert windows.dtype == torch.int64
    assert windows.shape == (len(text) // context, context), "no overlap, remainder dropped"
    assert tokenizer.decode(windows.flatten()) == text[: windows.numel()]


def test_max_tokens_keeps_the_first_tokens_and_whole_windows() -> None:
    tokenizer, text = tiny_tokenizer(), random_text(300)
    everything = tokenize(text, tokenizer, 10)
    assert torch.equal(tokenize(text, tokenizer, 10, 57), everything[:5])
    assert torch.equal(tokenize(text, tokenizer, 10, 10**6), everything)


class Marking:
    """A tokenizer that puts tokens before and behind every text."""

    def __init__(self, before: list[int], behind: list[int]) -> None:
        self.before, self.behind = before, behind

    def __call__(self, text: str, *, add_special_tokens: bool, **_: Any) -> dict[str, list[int]]:
        letters = [ord(letter) for letter in text]
        return {"input_ids": [*self.before, *letters, *self.behind] if add_special_tokens else letters}


def test_windows_begin_as_every_text_does() -> None:
    """As Llama's and Gemma's; BERT's marks, which enclose a text, and T5's end belong to no window of a longer one."""
    assert tokenize("abcdef", Marking([1], []), 3).tolist() == [[1, 97, 98], [1, 99, 100], [1, 101, 102]]
    assert tokenize("abcdef", Marking([1], []), 3, 8).tolist() == [[1, 97, 98], [1, 99, 100]]
    for marks in ([], []), ([1], [2]), ([], [2]):
        assert tokenize("abcd", Marking(*marks), 2).tolist() == [[97, 98], [99, 100]]


@pytest.mark.parametrize("characters", [0, 9])
def test_less_than_one_window_is_an_error(characters: int) -> None:
    with pytest.raises(DataError, match=f"too short: {characters} tokens, and one window takes 10"):
        tokenize(random_text(characters), tiny_tokenizer(), 10)


def test_asking_for_less_than_one_window_is_wrong_use() -> None:
    with pytest.raises(UsageError, match="9 tokens are less than one window: ask for at least 10"):
        tokenize(random_text(50), tiny_tokenizer(), 10, 9)


def test_every_file_format_gives_its_text(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [random_text(30) + " é漢" for _ in range(5)]
    lines = "\n".join(json.dumps({"id": i, "text": row}) for i, row in enumerate(rows))
    pyarrow.parquet.write_table(pyarrow.table({"id": range(5), "text": rows}), tmp_path / "a.parquet")
    assert read_text(str(write(tmp_path / "a.txt", "\n".join(rows)))) == "\n".join(rows)
    assert read_text(str(write(tmp_path / "a.jsonl", lines + "\n\n"))) == "\n\n".join(rows)
    assert read_text(str(tmp_path / "a.parquet")) == "\n\n".join(rows)
    assert read_text(str(tmp_path / "a.jsonl"), 70) == "\n\n".join(rows)[:70]


def test_hub_datasets_are_streamed_and_only_as_far_as_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        calls.append((name, config, split, streaming))
        return ({"text": "0123456789"} if i < 3 else pytest.fail("read too far") for i in range(100))

    monkeypatch.setattr("peerify.data.reachable", lambda: True)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert read_text("org/name:config-v1", 25) == "0123456789\n\n0123456789\n\n0"
    read_text("name:config:test", 1)
    read_text("name", 1)
    assert calls == [
        ("org/name", "config-v1", "train", True),
        ("name", "config", "test", True),
        ("name", None, "train", True),
    ]


def test_a_hub_dataset_without_a_network_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace())  # is not asked
    with pytest.raises(DataError, match=r"^org/name is no text file here, and the Hub, .*, cannot be reached$"):
        read_text("org/name")


def test_a_hub_dataset_that_fails_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no network\nTraceback")

    monkeypatch.setattr("peerify.data.reachable", lambda: True)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match=r"^org/name is no text file here, and as a Hub dataset .*: no network$"):
        read_text("org/name")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, r"no such text file: .*missing\.txt"),
        ("a.txt", b"", r"a\.txt holds no text"),
        ("a.txt", b" \n\t\n", r"a\.txt holds no text"),
        ("a.txt", "café".encode("latin-1"), r"a\.txt is not UTF-8 text"),
        ("a.csv", b"x,y", r"a\.csv: only \.txt, .*\.parquet files are read"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"a\.jsonl, line 2: not a JSON object"),
        ("a.jsonl", b'{"body": "x", "id": 3}', r'a\.jsonl, line 1: no "text" field .*it has body, id'),
        ("a.jsonl", b'{"text": 3}', r'line 1: no "text" field with a string'),
        ("a.jsonl", b"[1]", r'line 1: no "text" field'),
        ("a.parquet", b"PAR1 not really", r"a\.parquet cannot be read as parquet"),
    ],
)
def test_bad_files_are_named_in_one_sentence(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_text(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_parquet_file_without_text_names_its_columns(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r'no "text" field .*it has body, id'):
        read_text(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("spec", ["no such name", "a/b/c", "a:b:c:d", "what?"])
def test_what_is_neither_file_nor_dataset_asks_no_server(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it would raise ImportError
    with pytest.raises(DataError, match="no such text file, and not the name of a Hub dataset"):
        read_text(spec)


def test_a_folder_is_not_a_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is a folder: name one \.txt"):
        read_text(str(tmp_path))


def test_several_texts_share_the_tokens(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    paths = [text_file(tmp_path / f"{i}.txt", 500) for i in range(3)]
    texts = [path.read_text(encoding="utf-8") for path in paths]
    windows = load_windows([str(path) for path in paths], tokenizer, context=10, max_tokens=110)
    assert windows.shape == (11, 10)
    decoded = [tokenizer.decode(window) for window in windows]
    for text, count in zip(texts, (4, 4, 3), strict=True):
        assert "".join(decoded[:count]) == text[: 10 * count]
        del decoded[:count]


def test_too_little_text_goes_on_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = text_file(tmp_path / "short.txt", 205)
    with caplog.at_level(logging.WARNING):
        windows = load_windows([str(path)], tiny_tokenizer(), context=10, max_tokens=1000)
    assert windows.shape == (20, 10)
    assert "has only 200 of the 1000 tokens asked for" in caplog.text


def test_load_windows_names_the_text_at_fault(tmp_path: Path) -> None:
    good, short = text_file(tmp_path / "good.txt", 500), text_file(tmp_path / "short.txt", 5)
    with pytest.raises(DataError, match=r"short\.txt: the text is too short: 5 tokens"):
        load_windows([str(good), str(short)], tiny_tokenizer(), context=10, max_tokens=100)
    with pytest.raises(UsageError, match=r"19 tokens are less than one window of 10 for each of 2 texts.*20"):
        load_windows([str(good), str(short)], tiny_tokenizer(), context=10, max_tokens=19)
    with pytest.raises(UsageError, match="no text was given"):
        load_windows([], tiny_tokenizer())


def test_windows_that_the_model_cannot_read() -> None:
    model = tiny_model("llama")
    config = model.config
    check_windows(torch.tensor([[0, config.vocab_size - 1]]), model)
    with pytest.raises(DataError, match=f"token {config.vocab_size} and the model knows {config.vocab_size}"):
        check_windows(torch.tensor([[0, config.vocab_size]]), model)
    too_long = torch.zeros(1, config.max_position_embeddings + 1, dtype=torch.long)
    with pytest.raises(UsageError, match="use --context"):
        check_windows(too_long, model)


@pytest.mark.parametrize("name", ["a\0b.txt", "~nosuchuser/x.txt", "x" * 300 + ".txt", "x" * 300])
def test_a_name_that_no_file_can_have(name: str) -> None:
    with pytest.raises(DataError, match="is not a usable path") as caught:
        read_text(name)
    assert "\n" not in str(caught.value)
    assert "\0" not in str(caught.value)


def test_a_pipe_is_no_text(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(DataError, match=r"a\.txt is not a regular file"):
        read_text(str(tmp_path / "a.txt"))


def test_of_a_large_text_only_what_is_wanted_is_read(tmp_path: Path) -> None:
    with (tmp_path / "a.txt").open("wb") as file:
        file.write(b"some text\n")
        file.truncate(1 << 40)  # a terabyte of zeros, which takes no room
    assert read_text(str(tmp_path / "a.txt"), 9) == "some text"


def test_lines_of_json_from_a_stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    for line in ("[" * 200_000, "9" * 5000, "{"):
        path.write_text('{"text": "fine"}\n' + line)
        with pytest.raises(DataError, match=r"a\.jsonl, line 2: not a JSON object"):
            read_text(str(path))
    path.write_text(json.dumps({"text": "half \ud83d of a pair", "more": 1}))
    assert read_text(str(path)) == "half \ufffd of a pair"
    tokenize(read_text(str(path)), tiny_tokenizer(), 4)
    path.write_text(json.dumps({"x" * 10_000: 1}))
    with pytest.raises(DataError, match='no "text" field') as caught:
        read_text(str(path))
    assert len(str(caught.value)) < 400
    monkeypatch.setattr("peerify.data.MAX_DOCUMENT", 100)
    path.write_text(json.dumps({"text": "x" * 100}))
    with pytest.raises(DataError, match=r"line 1: longer than 100 characters"):
        read_text(str(path))


def test_a_few_bytes_of_parquet_that_stand_for_a_flood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """31 kB took 6 GB of memory, 469 bytes 2.6 GB."""
    path = str(tmp_path / "a.parquet")
    monkeypatch.setattr("peerify.data.MAX_DOCUMENT", 100_000)
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["x" * 1_000_000]}), path, compression="zstd", use_dictionary=False
    )
    with pytest.raises(DataError, match=r"a\.parquet has [\d,]+ bytes that stand for more than 1,000,000 of text"):
        read_text(path, 9)
    pyarrow.parquet.write_table(pyarrow.table({"text": [random_text(200_000)]}), path)
    with pytest.raises(DataError, match=r"a\.parquet: a text of 200,000 characters, more than 100,000; split it"):
        read_text(path, 9)
    rows = pyarrow.array([random_text(90_000)]).take(pyarrow.array([0] * 1000))
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), path)
    before = pyarrow.total_allocated_bytes()
    pieces = read_pieces(path)
    assert len(next(pieces)) == 90_000
    with pytest.raises(DataError, match=r"a\.parquet has [\d,]+ bytes that stand for more than"):
        list(pieces)
    pieces = read_pieces(path)
    next(pieces)
    assert pyarrow.total_allocated_bytes() - before < 40_000_000, "of a row group, a few rows at a time"


@pytest.mark.parametrize("tokens", [2**62, 10**30])
def test_more_tokens_than_can_be_counted(tmp_path: Path, tokens: int) -> None:
    windows = load_windows([str(text_file(tmp_path / "a.txt", 300))], tiny_tokenizer(), context=10, max_tokens=tokens)
    assert windows.shape == (30, 10)


def test_names_are_shown_on_one_line(tmp_path: Path) -> None:
    for name in ("missing\n.txt", "a\nb", "x\n.doc"):
        with pytest.raises(DataError) as caught:
            read_text(name)
        assert "\n" not in str(caught.value)
    (tmp_path / "\n.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"\\n\.jsonl, line 1: not a JSON object$"):
        read_text(str(tmp_path / "\n.jsonl"))


def test_a_tokenizer_that_fails_is_named() -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise KeyError("blub")

    with pytest.raises(DataError, match=r"the tokenizer fails on the text \(it has no 'blub'\)"):
        tokenize("text", fails, 4)
