"""YAML from a stranger: what it stands for is counted before it is made, and no more than values is made of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from test_recipe import write

from peerify.config.recipe import Recipe
from peerify.errors import UsageError


def test_unreadable_recipes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the recipe .*no\.yaml cannot be read: No such file"):
        Recipe.load(tmp_path / "no.yaml")
    with pytest.raises(UsageError, match=r"the recipe .* is not a regular file; give a YAML file"):
        Recipe.load(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("model: café".encode("latin-1"))
    with pytest.raises(UsageError, match=r"latin\.yaml is not UTF-8"):
        Recipe.load(tmp_path / "latin.yaml")


def test_a_recipe_that_stands_for_billions_is_refused_at_once(tmp_path: Path) -> None:
    """Nine lines of aliases took 38 seconds and 10 GB, because the message showed the value."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    bomb = write(tmp_path / "r.yaml", "\n".join(lines))
    with pytest.raises(UsageError, match=r"r\.yaml, line 4: not valid YAML: it stands for more than 10,000 values"):
        Recipe.load(bomb)
    with pytest.raises(UsageError, match=r"--set model, line 1: .*more than 10,000 values"):
        Recipe.load(None, ["model={" + ", ".join(lines) + "}"])
    large = write(tmp_path / "large.yaml", "# " + "x" * 1_000_000)
    with pytest.raises(UsageError, match=r"large\.yaml has 1,000,002 bytes, more than 1,000,000"):
        Recipe.load(large)
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(UsageError, match=r"pipe\.yaml is not a regular file"):
        Recipe.load(tmp_path / "pipe.yaml")
    with pytest.raises(UsageError, match=r"wide\.yaml, line 1: .*more than 10,000 values"):
        Recipe.load(write(tmp_path / "wide.yaml", f"[{'1,' * 450_000}]"))
    with pytest.raises(UsageError) as caught:
        Recipe.load(write(tmp_path / "long.yaml", "model: [" + "x" * 100_000 + "]"))
    assert len(str(caught.value)) < 300


def test_merge_keys_of_yaml(tmp_path: Path) -> None:
    text = (
        "model: a\noutput: b\ntrain:\n  data: {sources: a.txt}\n  stages:\n"
        "  - &first {optimizer: &o {lr: 1e-4}, warmup: 0.5}\n"
        "  - {<<: *first, warmup: 0.25, optimizer: {<<: *o, router_scale: 0}}\n"
    )
    train = Recipe.load(write(tmp_path / "r.yaml", text)).train
    assert train is not None
    assert [(stage.warmup, stage.optimizer.lr) for stage in train.stages] == [(0.5, 1e-4), (0.25, 1e-4)]
    assert train.stages[1].optimizer.router_scale == 0
    with pytest.raises(UsageError, match="warmup is written twice"):
        Recipe.load(write(tmp_path / "r.yaml", text.replace("warmup: 0.25", "warmup: 0.25, warmup: 1")))


def test_yaml_cannot_make_python_objects(tmp_path: Path) -> None:
    marker = tmp_path / "made"
    evil = write(tmp_path / "r.yaml", f"model: !!python/object/apply:os.mkdir ['{marker}']\noutput: b\n")
    with pytest.raises(UsageError, match="not valid YAML"):
        Recipe.load(evil)
    assert not marker.exists()
