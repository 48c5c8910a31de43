"""Small checkpoints on disk, with a tokenizer whose tokens are bytes: n characters of ASCII are n tokens."""

from __future__ import annotations

import random
import string
from pathlib import Path
from typing import Any

import torch
from tiny import FAMILIES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 260  # 256 bytes and the end-of-text token, rounded up
_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": 256, "pad_token_id": None}

SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {
        **_TOKENS,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "mlp_bias": False,
    },
    "gpt2": {**_TOKENS, "n_embd": 16, "n_head": 2, "n_positions": 64},
    "bert": {**_TOKENS, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2},
    "t5": {**_TOKENS, "pad_token_id": 0, "d_model": 16, "d_ff": 24, "num_heads": 2},
}
"""What makes a family of tiny.py as small as files may be, and gives it the tokenizer's vocabulary."""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", model_max_length=64)


def tiny_model(family: str = "llama", **settings: Any) -> Any:
    """A random model in eval mode, no two calls alike; predictions differ from uniform."""
    return FAMILIES[family](int(torch.randint(2**31, ())), **SETTINGS[family] | settings)


def tiny_checkpoint(folder: Path, family: str = "llama", *, tokenizer: bool = True, **settings: Any) -> Path:
    """`tiny_model` saved in `folder`, made if need be."""
    tiny_model(family, **settings).save_pretrained(folder)
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return folder


def random_text(characters: int) -> str:
    """Words of random letters, no two calls alike."""
    words = ("".join(random.choices(string.ascii_lowercase, k=random.randint(1, 9))) for _ in range(characters))
    return " ".join(words)[:characters]


def text_file(path: Path, characters: int = 4000) -> Path:
    """`random_text` in a file."""
    path.write_text(random_text(characters), encoding="utf-8")
    return path
