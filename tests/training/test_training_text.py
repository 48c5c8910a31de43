"""Text for training: windows, mixtures, streams, and where each goes on."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from checkpoints import random_text, text_file, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from peerify.config.train import DataConfig
from peerify.errors import DataError
from peerify.training import data as training_data
from peerify.training.data import PADDING, Windows
from peerify.training.data_selection import most_informative

TOKENIZER = tiny_tokenizer()


def windows(seed: int = 0, **settings: Any) -> Windows:
    return Windows(DataConfig(**{"context": 16, **settings}), TOKENIZER, seed=seed)


def test_windows_hold_the_text_in_order_when_nothing_is_shuffled(tmp_path: Path) -> None:
    text = random_text(200)
    (tmp_path / "a.txt").write_text(text)
    stream = windows(sources=[str(tmp_path / "a.txt")], shuffle=False)
    ids = TOKENIZER(text)["input_ids"] + [TOKENIZER.eos_token_id]
    assert stream.block(12).flatten().tolist() == ids[: 12 * 16]


def test_an_epoch_has_every_window_once_and_the_next_another_order(tmp_path: Path) -> None:
    path = str(text_file(tmp_path / "a.txt", 16 * 40))
    plain = windows(sources=[path], shuffle=False).block(40)
    stream = windows(sources=[path])
    first, second = stream.block(40), stream.block(40)
    assert sorted(map(tuple, first)) == sorted(map(tuple, plain)) == sorted(map(tuple, second))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, plain)
    assert np.array_equal(first, windows(sources=[path]).block(40)), "the seed decides alone"
    assert not np.array_equal(first, windows(1, sources=[path]).block(40))


@settings(max_examples=20, deadline=None)
@given(weights=st.lists(st.floats(0.1, 10), min_size=1, max_size=4), count=st.integers(1, 60))
def test_texts_are_mixed_by_their_weights(
    tmp_path_factory: pytest.TempPathFactory, weights: list[float], count: int
) -> None:
    folder = tmp_path_factory.mktemp("mix")
    sources = []
    for letter, weight in zip("abcd", weights, strict=False):
        (folder / f"{letter}.txt").write_text(letter * 64)
        sources.append({"path": str(folder / f"{letter}.txt"), "weight": weight})
    block = windows(sources=sources, context=8).block(count)
    letters = {letter: TOKENIZER(letter)["input_ids"][0] for letter in "abcd"}
    for letter, weight in zip("abcd", weights, strict=False):
        got = int((block[:, 1] == letters[letter]).sum())
        assert abs(got - count * weight / sum(weights)) < 2


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("cross", [False, True])
def test_a_stream_put_back_goes_on_with_the_same_windows(tmp_path: Path, streaming: bool, cross: bool) -> None:
    rows = [random_text(random_length) for random_length in torch.randint(1, 70, (30,)).tolist()]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    options: dict[str, Any] = {
        "sources": [
            {"path": str(tmp_path / "a.jsonl"), "streaming": streaming},
            {"path": str(text_file(tmp_path / "b.txt", 300)), "weight": 0.4},
        ],
        "cross_documents": cross,
        "buffer": 7,
    }
    whole = windows(**options).block(150)  # several epochs
    for cut in (1, 17, 80):
        before = windows(**options)
        assert np.array_equal(before.block(cut), whole[:cut])
        position = json.loads(json.dumps(before.position()))
        after = windows(**options)
        after.seek(position)
        assert np.array_equal(after.block(150 - cut), whole[cut:])


def test_hub_datasets_are_streamed_and_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": random_text(50)} for _ in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    opened = []

    def hub_dataset(spec: str, *, streaming: bool = True) -> Any:
        opened.append((spec, streaming))
        return datasets.load_dataset(
            "json", data_files=str(tmp_path / "rows.jsonl"), split="train", streaming=streaming, cache_dir=str(tmp_path)
        )

    monkeypatch.setattr(training_data, "hub_dataset", hub_dataset)
    options: dict[str, Any] = {"sources": ["someone/something:config"], "buffer": 5}
    whole = windows(**options).block(300)
    assert opened == [("someone/something:config", True)]
    for cut in (3, 100, 200):  # in the first, the first or second, and the second epoch
        before = windows(**options)
        before.block(cut)
        position = json.loads(json.dumps(before.position()))
        after = windows(**options)
        after.seek(position)
        assert np.array_equal(after.block(300 - cut), whole[cut:])


def test_documents_keep_to_themselves_where_asked(tmp_path: Path) -> None:
    rows = ["a" * 20, "b" * 5, "c", "d" * 16]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    block = windows(sources=[str(tmp_path / "a.jsonl")], cross_documents=False, shuffle=False).block(4)
    lengths = [(int((window != PADDING).sum()), len(set(window[window != PADDING]))) for window in block]
    assert lengths == [(16, 1), (4, 1), (5, 1), (16, 1)], "one token predicts nothing, so c is left out"


def test_entropy_keeps_what_compresses_worst(tmp_path: Path) -> None:
    rng = np.random.default_rng()
    dull = np.tile(np.arange(4, dtype=np.int32), (30, 16))
    rich = rng.integers(0, 250, (10, 64), dtype=np.int32)
    mixed = np.concatenate([dull[:15], rich, dull[15:]])
    assert most_informative(mixed, 0.25).tolist() == list(range(15, 25))
    twice = np.concatenate([rich, rich])  # a second copy says nothing new
    chosen = most_informative(twice, 0.5) % 10
    assert len(set(chosen.tolist())) >= 9
    some = windows(sources=[str(text_file(tmp_path / "a.txt", 1600))], selection="entropy", keep=0.3)
    assert sum(len(part.windows) for part in some._parts) == 30
    size = [len(zlib.compress(part.tobytes())) for part in (mixed[most_informative(mixed, 0.25)], dull[:10])]
    assert size[0] > size[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": []}, "train.data.sources is empty: name a text"),
        ({"sources": ["gone.txt"]}, "no such text file: gone.txt"),
        ({"sources": ["short.txt"]}, "short.txt is too short to train on: 5 tokens, and one window takes 16"),
        ({"sources": [{"path": "short.txt", "streaming": True}]}, "short.txt is too short to train on"),
        (
            {"sources": [{"path": "t.txt", "streaming": True}], "selection": "entropy"},
            "t.txt is streamed, and selection",
        ),
        ({"sources": ["bad.jsonl"]}, 'bad.jsonl, line 1: no "text" field'),
    ],
)
def test_missing_and_empty_texts_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    text_file(tmp_path / "t.txt", 400)
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "bad.jsonl").write_text('{"txt": "a"}\n')
    with pytest.raises(DataError, match=message):
        windows(**options).block(1)


def test_another_text_is_noticed(tmp_path: Path) -> None:
    path = str(text_file(tmp_path / "a.txt", 400))
    position = windows(sources=[path]).position()
    text_file(tmp_path / "a.txt", 400)
    with pytest.raises(DataError, match=r"a.txt is not the text that the checkpoint was made with"):
        windows(sources=[path]).seek(position)
