"""The recipes in recipes/: they load, fit together, and plan on a skeleton of the real model's size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from peerify.config.recipe import Recipe
from peerify.training.dry_run import plan_training

RECIPES = Path(__file__).parents[2] / "recipes"
# Values of the models' own config.json, and their sizes.
CONFIGS: dict[str, tuple[dict[str, Any], float]] = {
    "smollm2-135m": (
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
        134.5e6,
    ),
    "llama-3.2-1b": (
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
        },
        1.236e9,
    ),
    "qwen3-0.6b": (
        {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": True,
        },
        0.596e9,
    ),
    "gemma-3-270m": (
        {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "hidden_size": 640,
            "intermediate_size": 2048,
            "num_hidden_layers": 18,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "vocab_size": 262144,
            "max_position_embeddings": 32768,
            "sliding_window": 512,
            "tie_word_embeddings": True,
        },
        0.268e9,
    ),
}


@pytest.mark.parametrize(
    "path",
    sorted({*RECIPES.glob("*/heal-*.yaml"), *RECIPES.glob("smollm2*/*.yaml")}),
    ids=lambda p: f"{p.parent.name}/{p.stem}",
)
def test_recipes_load_and_plan(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config, parameters = CONFIGS[path.parent.name]
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense/config.json").write_text(json.dumps(config))
    for name in ("text.txt", "other.txt", "background.txt"):  # recipes for own text read files
        (tmp_path / name).write_text("some text\n")
    recipe = Recipe.load(path)
    assert recipe.output.startswith(path.parent.name.split("-instruct")[0]), "a folder of its own"
    if recipe.train is None:
        return
    plan = plan_training(Recipe.load(path, ["model=dense"]))
    assert plan["parameters"] == pytest.approx(parameters, rel=0.15), "the router comes on top"
    assert plan["tokens"] <= recipe.train.tokens
    assert plan["steps"] == sum(recipe.train.steps_of_stages())
    assert 4 < plan["flops"] / plan["tokens"] / plan["parameters"] < 12
    stage = plan["stages"][-1]
    assert 0 < stage["trainable"] <= plan["parameters"]
    assert stage["memory"]["total"] > 4 * plan["parameters"]
    assert recipe.train.evaluation.data not in [source.path for source in recipe.train.data.sources]
    assert recipe.train.evaluation.test not in [source.path for source in recipe.train.data.sources]


def test_no_two_recipes_write_to_one_place() -> None:
    outputs = [
        yaml.safe_load(path.read_text())["output"]
        for path in RECIPES.glob("*/*.yaml")
        if path.parent.name != "accelerate"
    ]
    twice = {output for output in outputs if outputs.count(output) > 1}
    assert twice <= {"smollm2-135m-peer-50"}, "convert-50 is the first part of heal-50"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("accelerate/*.yaml")), ids=lambda p: p.stem)
def test_accelerate_reads_its_configurations(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert str(config.distributed_type).split(".")[-1] in ("MULTI_GPU", "FSDP")
    assert config.num_processes in (2, 8)
