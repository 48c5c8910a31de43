"""Recipes, texts, records, cards and results, as a stranger may hand them out."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pyarrow
import pyarrow.parquet
import yaml
from checkpoints import text_file, tiny_tokenizer
from fuzzing.harness import Corpus
from fuzzing.models import converted

from peerify.checkpoint import frontmatter
from peerify.checkpoint.card import record_results, write_card
from peerify.checkpoint.record import check_result
from peerify.config.recipe import Recipe
from peerify.config.train import DataConfig
from peerify.data import load_windows
from peerify.errors import PublishError, UsageError
from peerify.pipeline import _Notes
from peerify.publishing.push import check_folder
from peerify.reading import read_object, read_text
from peerify.training.data import Windows

RECIPE = """\
model: &m dense
output: out  # a comment
convert: {layers: "0,2", active: 0.25, gates: unit, refine_steps: 3, grid: [4, 8], seed: 7}
calibration: {data: [a.txt, b.jsonl], tokens: 4096, context: 128}
train:
  data: {sources: [{path: a.txt, weight: 0.6}, b.txt], context: 64, shuffle: true}
  tokens: 10_000
  stages:
  - &first {share: 0.5, train: peer, objectives: {kl: 1.0}, optimizer: {lr: 1e-4, betas: [0.9, 0.98]}}
  - {<<: *first, train: peer+lora, lora: {rank: 4, alpha: 8}}
  evaluation: {data: test.txt, every: 10}
hub: {repo: ada/smol, private: true, tag: v1, exclude: ["*.txt"]}
device: cpu
max_shard_size: 2GB
"""
CARD = """\
---
license: apache-2.0
language: &l [en, de]
base_model: ada/dense
tags: *l
---
# A model
<!-- peerify:begin {"generated":{"license":"0123456789ab"},"pushed":{"":"0123456789ab"}} note -->
Generated.
<!-- peerify:end -->
Mine.
"""
OVERRIDES = [
    "convert.active=0.25",
    "train.stages.0.optimizer.name=galore",
    "calibration.data=[a.txt, b.txt]",
    "hub={repo: ada/smol, tag: !!str 1}",
    "convert.grid=[4, 0x8]",
    "train.stages=[&a {share: 0.5}, {<<: *a, warmup: 1e-1}]",
]
RESULT = {
    "model": "out",
    "data": "test.txt",
    "context": 512,
    "tokens": 4096,
    "perplexity": 12.5,
    "against": {
        "model": "ada/dense",
        "perplexity": 11.0,
        "ratio": 1.13,
        "kl": 0.1,
        "agreement": 0.9,
        "continuation": None,
    },
    "layers": [
        {
            "path": "model.layers.0.mlp",
            "num_experts": 4,
            "bytes_fraction": 0.5,
            "macs_fraction": 0.7,
            "usage": 1.0,
            "kl_uniform": 0.1,
            "effective_experts": 3.6,
            "bytes_per_token": {"p5": 0.4, "p50": 0.5, "p95": 0.7},
        }
    ],
    "budgets": [
        {
            "active": 0.5,
            "bytes_fraction": 0.5,
            "macs_fraction": 0.7,
            "perplexity": 12.5,
            "ratio": 1.13,
            "kl": 0.1,
            "agreement": 0.9,
            "continuation": {"mean": 41.5, "of": 64, "prompts": 16},
            "after_prefill": 1.1,
        }
    ],
}
RESULTS = {
    "model": "out",
    "context": 512,
    "against": {"model": "ada/dense"},
    "texts": [RESULT, RESULT | {"data": "b.txt", "layers": []}],
}
NOTES = {"convert": {"fingerprint": "ab", "result": {"output": "out"}}, "train": {"fingerprint": "cd", "result": {}}}


@cache
def _tokenizer() -> object:
    return tiny_tokenizer()


def _writes(name: str, text: str) -> object:
    return lambda folder: (folder / name).write_text(text, encoding="utf-8")


def _json_recipe(folder: Path) -> None:
    """The same as JSON, which is YAML."""
    (folder / "r.yaml").write_text(json.dumps(yaml.safe_load(RECIPE)))


def _overrides(folder: Path) -> None:
    lines = (folder / "set.txt").read_bytes().decode("utf-8", "surrogateescape").split("\n")
    Recipe.load(None, ["model=dense", "output=out", "train.data.sources=a.txt", *lines])


def _jsonl(folder: Path) -> None:
    rows = [{"id": number, "text": text_file(folder / "a.txt", 60).read_text() + " é 漢"} for number in range(30)]
    (folder / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def _parquet(folder: Path) -> None:
    rows = [text_file(folder / "a.txt", 60).read_text() for _ in range(30)]
    pyarrow.parquet.write_table(pyarrow.table({"id": range(30), "text": rows}), folder / "a.parquet")


def _calibrate(name: str) -> object:
    def read(folder: Path) -> None:
        load_windows([str(folder / name)], _tokenizer(), context=32, max_tokens=128)
        Windows(DataConfig(sources=[str(folder / name)], context=32), _tokenizer(), seed=0).block(2)

    return read


def _card(folder: Path) -> None:
    card = frontmatter.parse(read_text(folder / "README.md", PublishError, ""))
    again = frontmatter.parse(frontmatter.render(frontmatter.merge(card, frontmatter.Card(), "there")))
    frontmatter.render(frontmatter.merge(again, card, "there"))


def _front(folder: Path) -> None:
    front = yaml.safe_load(CARD.split("---")[1]) | {"model-index": [{"name": "a", "results": [{"metrics": []}]}]}
    (folder / "front.json").write_text(json.dumps(front))


def _card_values(folder: Path) -> None:
    """JSON is YAML."""
    text = (folder / "front.json").read_text(encoding="utf-8", errors="replace")
    (folder / "README.md").write_text(f"---\n{text}\n---\n{CARD.partition('---')[2].partition('---')[2]}")
    _card(folder)
    _source_card(folder)


def _record(folder: Path) -> None:
    check_folder(folder)
    write_card(folder)
    record_results(folder, RESULT)


def _result(folder: Path) -> None:
    path = folder / "eval.json"
    check_result(read_object(path, UsageError), str(path), UsageError)
    record_results(folder, json.loads(path.read_text()))


def _with(result: object) -> object:
    def make(folder: Path) -> None:
        converted(folder)
        (folder / "eval.json").write_text(json.dumps(result))

    return make


def _source_card(folder: Path) -> None:
    """Of a dense model, whose licence and languages a conversion takes over."""
    from peerify.checkpoint.load import DenseModel
    from peerify.checkpoint.provenance import provenance

    json.dumps(provenance(DenseModel(None, "dense", None, folder)))  # type: ignore[arg-type]


def _notes(folder: Path) -> None:
    notes = _Notes(folder / "out.run.json", fresh=False)
    for stage in ("convert", "train", "eval", "push"):
        if notes.holds(stage, "ab"):
            notes.result(stage)


CORPORA: dict[str, Corpus] = {
    "recipe": Corpus(_writes("r.yaml", RECIPE), "r.yaml", lambda folder: Recipe.load(folder / "r.yaml")),
    "recipe-values": Corpus(_json_recipe, "r.yaml", lambda folder: Recipe.load(folder / "r.yaml"), as_json=True),
    "set": Corpus(_writes("set.txt", "\n".join(OVERRIDES)), "set.txt", _overrides),
    "text": Corpus(lambda folder: text_file(folder / "a.txt", 4000), "a.txt", _calibrate("a.txt")),
    "jsonl": Corpus(_jsonl, "a.jsonl", _calibrate("a.jsonl")),
    "parquet": Corpus(_parquet, "a.parquet", _calibrate("a.parquet")),
    "record": Corpus(converted, "peerify.json", _record, as_json=True),
    "config-of-a-card": Corpus(converted, "config.json", write_card, as_json=True),
    "card": Corpus(_writes("README.md", CARD), "README.md", _card),
    "card-values": Corpus(_front, "front.json", _card_values, as_json=True),
    "card-of-a-folder": Corpus(converted, "README.md", _record),
    "card-of-a-source": Corpus(_writes("README.md", CARD), "README.md", _source_card),
    "result": Corpus(_with(RESULT), "eval.json", _result, as_json=True),
    "result-on-texts": Corpus(_with(RESULTS), "eval.json", _result, as_json=True),
    "notes-of-a-run": Corpus(_writes("out.run.json", json.dumps(NOTES)), "out.run.json", _notes, as_json=True),
}
