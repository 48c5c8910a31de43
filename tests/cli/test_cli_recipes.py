"""What `convert` hands on: flags override --set, which overrides the recipe file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import files, run, stand_in  # noqa: F401

from peerify.cli.base import PROMOTED


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The recipes that `convert` hands to the library, in place of a conversion."""
    seen: list[Any] = []

    def convert_checkpoint(recipe: Any, *, progress: Any) -> dict[str, Any]:
        seen.append(recipe)
        print("a library that prints")  # noqa: T201
        return {"output": recipe.output, "layers": 0}

    stand_in(monkeypatch, convert_checkpoint)
    return seen


def test_flags_override_set_overrides_the_recipe_file(here: Path, recipes: list[Any]) -> None:
    (here / "r.yaml").write_text(
        "model: from-file\noutput: file-out\nconvert: {seed: 1, active: 0.25, layers: middle}\n"
        "calibration: {data: file.txt, tokens: 99}\n"
    )
    argv = [
        "convert",
        "gpt2",
        "--recipe",
        "r.yaml",
        "--set",
        "convert.seed=2",
        "--set",
        "convert.gates=sigmoid",
    ]
    argv += [
        "--topk",
        "3",
        "--layers",
        "0,4,12-18",
        "--calibration",
        "a.txt",
        "--calibration",
        "b.txt",
        "--json",
    ]
    result = run(*argv)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"output": "file-out", "layers": 0}
    assert result.stderr == "a library that prints\n"
    recipe = recipes[0]
    assert (recipe.model, recipe.output) == ("gpt2", "file-out")
    assert (recipe.convert.seed, recipe.convert.gates, recipe.convert.layers) == (2, "sigmoid", "0,4,12-18")
    assert (recipe.convert.topk, recipe.convert.active) == (3, None)
    assert (recipe.calibration.sources, recipe.calibration.tokens) == (["a.txt", "b.txt"], 99)
    assert (recipe.overwrite, recipe.trust_remote_code) == (False, False)
    run("convert", "--recipe", "r.yaml", "--seed", "0", "--json")
    assert recipes[1].convert.seed == 0, "0 is something said"


def test_every_promoted_flag_arrives_at_its_key(here: Path, recipes: list[Any]) -> None:
    values: dict[str, tuple[str, Any]] = {
        "--layers": ("1", "1"),
        "--active": ("0.75", 0.75),
        "--allocation": ("sensitivity", "sensitivity"),
        "--num-heads": ("2", 2),
        "--num-experts": ("12", 12),
        "--preset": ("peer-paper", "peer-paper"),
        "--calibration": ("t.txt", ["t.txt"]),
        "--calibration-tokens": ("64", 64),
        "--context": ("32", 32),
        "--seed": ("7", 7),
        "--device": ("meta", "meta"),
        "--dtype": ("bfloat16", "bfloat16"),
        "--revision": ("123", "123"),
        "--max-shard-size": ("1MB", "1MB"),
        "--overwrite": ("", True),
        "--trust-remote-code": ("", True),
    }
    argv = [word for flag, (word, _) in values.items() for word in (flag, word) if word]
    assert run("convert", "m", "o", "--json", *argv).exit_code == 0
    argv = ["--topk", "3", "--calibration", "t.txt"]
    assert run("convert", "m", "o", "--json", *argv).exit_code == 0
    assert recipes[1].convert.topk == 3
    assert run("convert", "m", "o", "--json", "--max-loss", "1.2", "--calibration", "t.txt").exit_code == 0
    assert recipes[2].convert.max_loss == 1.2
    assert values.keys() | {"--topk", "--max-loss"} == PROMOTED.keys()
    for flag, (_, value) in values.items():
        found = recipes[0]
        for name in PROMOTED[flag].split("."):
            found = getattr(found, name)
        assert found == value, flag
