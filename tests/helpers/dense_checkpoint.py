"""A tiny dense checkpoint in two shards, ways to change it, and the sentence that refuses it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from peerify.checkpoint.load import load_dense
from peerify.errors import CheckpointError

WORDS = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(29))]


def tiny_llama() -> LlamaForCausalLM:
    """A random model for the vocabulary of WORDS."""
    model: LlamaForCausalLM = tiny_model(
        vocab_size=len(WORDS), num_hidden_layers=2, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2
    )
    return model


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A small model in two shards, with tokenizer, as save_pretrained leaves it."""
    folder = tmp_path / "dense"
    tiny_llama().save_pretrained(folder, max_shard_size="8KB")
    word_tokenizer().save_pretrained(folder)
    assert len(shards(folder)) > 1
    return folder


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def one_sentence(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert not text.endswith(".")
    return text


def refusal(source: str | Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as error:
        load_dense(source, **options)
    return one_sentence(error)


def edit_json(path: Path, **changes: object) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
