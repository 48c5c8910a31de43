"""`peerify run`: the stages follow each other, and what is done is not done again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoints import text_file, tiny_checkpoint
from click.testing import CliRunner

from peerify import cli, pipeline
from peerify.config.recipe import Recipe
from peerify.errors import OutputError, PeerifyError, UsageError
from peerify.pipeline import run_recipe
from peerify.training import stage


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A whole recipe for a tiny model, in the working directory as r.yaml."""
    monkeypatch.chdir(tmp_path)
    tiny_checkpoint(tmp_path / "dense")
    text_file(tmp_path / "train.txt", 2000)
    text_file(tmp_path / "test.txt", 300)
    settings = {
        "model": "dense",
        "output": "peer",
        "calibration": {"data": "train.txt", "tokens": 512, "context": 32},
        "train": {
            "data": {"sources": "train.txt", "context": 32},
            "tokens": 512,
            "evaluation": {"data": "test.txt", "tokens": 128},
            "checkpoints": {"every": 2},
            "loggers": [],
        },
        "hub": {"repo": "ada/peer", "tag": "v1"},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(settings))
    return Recipe.load("r.yaml")


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was published, in place of doing so."""
    calls: list[Any] = []

    def push(folder: str, repo: str, **options: Any) -> dict[str, Any]:
        calls.append((folder, repo, options["tag"]))
        return {"repo": repo, "url": f"https://hub/{repo}"}

    monkeypatch.setattr("peerify.publishing.push.push", push)
    monkeypatch.setattr(
        "peerify.publishing.transfer.require", lambda card: None
    )  # licence and base model, which push asks for
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    return calls


def test_a_recipe_is_done_once(recipe: Recipe, pushed: list[Any]) -> None:
    result = run_recipe(recipe)
    assert result["done"] == ["convert", "train", "eval", "push"]
    assert result["skipped"] == []
    assert result["output"] == "peer-healed"
    assert pushed == [("peer-healed", "ada/peer", "v1")]
    assert result["eval"]["against"]["model"] == "dense"
    record = json.loads(Path("peer-healed/peerify.json").read_text())
    assert record["evaluation"][0]["perplexity"] == result["eval"]["perplexity"], "noted for the card"
    again = run_recipe(recipe)
    assert (again["done"], again["skipped"]) == ([], ["convert", "train", "eval", "push"])
    assert again["eval"] == result["eval"]
    assert len(pushed) == 1
    # What comes after a change is done again, what comes before is not.
    other = Recipe.load("r.yaml", ["hub.tag=v2"])
    assert run_recipe(other)["done"] == ["push"]
    shutil.rmtree("peer-healed")
    shutil.rmtree("peer-healed-run")
    assert run_recipe(recipe)["done"] == ["train", "eval", "push"]


def test_it_goes_on_at_the_stage_and_step_where_it_stopped(
    recipe: Recipe, pushed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = stage.Stage.step
    steps: list[int] = []

    def step(self: Any) -> float:
        steps.append(self.now.step)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(stage.Stage, "step", step)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe)
    result = run_recipe(recipe)
    assert (result["done"], result["skipped"]) == (["train", "eval", "push"], ["convert"])
    assert steps == [0, 1, 2, 3, 2, 3], "from the checkpoint after step 2"
    monkeypatch.setattr(pipeline, "_evaluate", lambda *_: (_ for _ in ()).throw(RuntimeError))
    anew = Recipe.load("r.yaml", ["train.tokens=256", "train.output=second"])
    with pytest.raises(RuntimeError):
        run_recipe(anew)
    monkeypatch.undo()


def test_a_stop_in_training_ends_the_run(recipe: Recipe, pushed: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_train", lambda *_: {"stopped": True, "steps": 1})
    result = run_recipe(recipe)
    assert (result["done"], result["stopped"]) == (["convert"], "train")
    assert pushed == []


def test_another_recipe_does_not_pass_for_this_one(recipe: Recipe, pushed: list[Any]) -> None:
    run_recipe(recipe.model_copy(update={"train": None, "hub": None}))
    Path("peer.run.json").unlink()
    assert run_recipe(recipe.model_copy(update={"hub": None}))["skipped"] == ["convert"], "as if converted by hand"
    other = Recipe.load("r.yaml", ["convert.active=0.75"])
    with pytest.raises(OutputError, match=r"peer was converted with another convert\.active: restore it"):
        run_recipe(other)
    assert run_recipe(other, overwrite=True)["done"] == ["convert", "train", "eval", "push"]


def test_it_runs_in_one_process(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="run works in one process"):
        run_recipe(recipe)


def test_the_command_prints_what_was_done(recipe: Recipe, pushed: list[Any]) -> None:
    result = CliRunner().invoke(cli.cli, ["run", "r.yaml"])
    assert result.exit_code == 0, result.output
    assert "perplexity" in result.stdout
    assert "https://hub/ada/peer" in result.stdout
    result = CliRunner().invoke(cli.cli, ["run", "r.yaml", "--json"])
    assert json.loads(result.stdout)["skipped"] == ["convert", "train", "eval", "push"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["calibration.data=gone.txt"], "no such text file: gone.txt"),
        (["train.data.sources=gone.txt"], "no such text file: gone.txt"),
        (["train.evaluation.test=gone.txt"], "no such text file: gone.txt"),
        (["train.output=train.txt/healed"], "train.txt/healed cannot be written: .*train.txt is not a folder"),
        (["output=train.txt/peer"], "train.txt/peer"),
        (["output=dense"], "dense exists"),
        ([], "ada/peer: pushing needs a Hub token"),
    ],
)
def test_what_a_late_stage_would_refuse_is_refused_first(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str
) -> None:
    monkeypatch.setattr(pipeline, "_convert", lambda *_: pytest.fail("it converted first"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(PeerifyError, match=message) as caught:
        run_recipe(Recipe.load("r.yaml", overrides))
    assert "\n" not in str(caught.value)


def test_a_card_without_a_licence_is_refused_before_the_training(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    monkeypatch.setattr(pipeline, "_train", lambda *_: pytest.fail("it trained first"))
    with pytest.raises(PeerifyError, match=r"README\.md: write `license: …` between its --- lines"):
        run_recipe(recipe)
