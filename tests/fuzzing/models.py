"""Model folders and GGUF files, as a stranger may hand them out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from checkpoints import text_file, tiny_checkpoint, tiny_model, tiny_tokenizer
from dense_checkpoint import tiny_llama
from fuzzing.harness import Corpus
from gguf_files import write_gguf

from peerify.checkpoint.load import load_dense
from peerify.config.recipe import Recipe
from peerify.conversion.checkpoint import convert_checkpoint
from peerify.conversion.inspection import inspect_model
from peerify.evaluation import evaluate_checkpoint


def shards(folder: Path) -> None:
    tiny_model().save_pretrained(folder, max_shard_size="8KB")
    tiny_tokenizer().save_pretrained(folder)


def converted(folder: Path, keys: str = "copies") -> None:
    """A converted model in `folder`, its dense one beside it."""
    beside = folder.parent / "dense"
    tiny_checkpoint(beside)
    calibration = {"data": str(text_file(beside / "text.txt", 1000)), "tokens": 256, "context": 32}
    options = {"keys": keys, "refine_steps": 0}
    recipe = {"model": str(beside), "output": str(folder), "calibration": calibration, "convert": options}
    folder.rmdir()
    convert_checkpoint(Recipe.model_validate(recipe))


def tokens(folder: Path) -> None:
    tokenizer = load_dense(folder).tokenizer
    tokenizer("Some text, <eos> and é.", add_special_tokens=False)["input_ids"]


def gguf(folder: Path) -> None:
    write_gguf(folder / "m.gguf", tiny_llama())


def opened(folder: Path) -> None:
    load_dense(folder / "m.gguf").tokenizer("Some text.")


def look(folder: Path) -> None:
    inspect_model(str(folder))


def with_text(family: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        tiny_checkpoint(folder, family)
        text_file(folder / "text.txt", 600)

    return make


def convert(folder: Path) -> None:
    """The whole way, so that what loads but does not run counts, too."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    calibration = {"data": str(folder / "text.txt"), "tokens": 128, "context": 32}
    options = {"refine_steps": 0, "allocation": "uniform"}
    recipe = {"model": str(folder), "output": str(folder / "out"), "calibration": calibration, "convert": options}
    convert_checkpoint(Recipe.model_validate(recipe))


def evaluated(folder: Path) -> None:
    evaluate_checkpoint(str(folder), data=str(text_file(folder / "text.txt", 300)), context=32, max_tokens=64)


CORPORA: dict[str, Corpus] = {
    "safetensors": Corpus(tiny_checkpoint, "model.safetensors", load_dense),
    "index": Corpus(shards, "model.safetensors.index.json", load_dense, as_json=True),
    "config-llama": Corpus(tiny_checkpoint, "config.json", look, as_json=True),
    "config-gpt2": Corpus(lambda folder: tiny_checkpoint(folder, "gpt2"), "config.json", look, as_json=True),
    "config-bert": Corpus(lambda folder: tiny_checkpoint(folder, "bert"), "config.json", look, as_json=True),
    "config-t5": Corpus(lambda folder: tiny_checkpoint(folder, "t5"), "config.json", look, as_json=True),
    "config-converted": Corpus(with_text("llama"), "config.json", convert, as_json=True),
    "generation-config": Corpus(with_text("llama"), "generation_config.json", convert, as_json=True),
    "tokenizer": Corpus(tiny_checkpoint, "tokenizer.json", tokens, as_json=True),
    "tokenizer-config": Corpus(tiny_checkpoint, "tokenizer_config.json", tokens, as_json=True),
    "gguf": Corpus(gguf, "m.gguf", opened),
    "gguf-inspect": Corpus(gguf, "m.gguf", lambda folder: inspect_model(str(folder / "m.gguf"))),
    "peer-config": Corpus(converted, "config.json", evaluated, as_json=True),
    "product-config": Corpus(lambda folder: converted(folder, "product"), "config.json", evaluated, as_json=True),
}
