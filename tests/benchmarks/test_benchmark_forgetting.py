"""The benchmark of forgetting: it measures every method, goes on where it stopped, and compares at equal learning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import curves
import learn
import pytest
from checkpoints import text_file, tiny_checkpoint

from peerify import perplexity
from peerify.checkpoint.load import load_dense
from peerify.config.recipe import Recipe
from peerify.conversion.checkpoint import convert_checkpoint
from peerify.data import load_windows

RUNS = "full@1e-3,lora@1e-2,peer@1e-3,memory@1e-3,memory+experts=3+tokens=128@1e-3"


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(learn, "PIECE", 500)
    tiny_checkpoint(Path("dense"), num_hidden_layers=2)
    for name, size in (("new", 9000), ("background", 3000), ("watched", 3000)):
        text_file(Path(f"{name}.txt"), size)
    options = ["model=dense", "output=peer", "calibration.data=background.txt", "calibration.context=32"]
    convert_checkpoint(Recipe.load(None, [*options, "calibration.tokens=256"]))
    return [
        *("--dense", "dense", "--converted", "peer", "--learn", "new.txt", "--background", "background.txt"),
        *("--watch", "watched.txt", "--steps", "4", "--points", "2", "--batch-size", "2", "--context", "32"),
        *("--tokens", "128", "--precision", "no", "--out", "out"),
    ]


@pytest.mark.slow
def test_every_method_is_measured_and_none_twice(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert learn.main([*arguments, "--runs", "full@1e-3"]) == 0
    first = json.loads(Path("out/results.json").read_text())
    assert learn.main([*arguments, "--runs", RUNS]) == 0
    results = json.loads(Path("out/results.json").read_text())
    assert results["runs"][0] == first["runs"][0]
    assert [row["run"] for row in results["runs"]] == RUNS.split(",")
    original = results["original"]
    assert original["watched"]["watched.txt"]["kl"] == pytest.approx(0, abs=1e-6)
    for row in results["runs"]:
        assert [point["tokens"] for point in row["points"]] == [128, 256]
        # Not less: four steps of a random model with random text need not help with what is held out.
        assert row["points"][-1]["learned"] != original["learned"], row["run"]
        assert row["points"][-1]["watched"]["watched.txt"]["kl"] > 0
    few, share = (row["trainable"] for row in results["runs"][:2:-1])
    assert few < results["runs"][2]["trainable"] < results["runs"][0]["trainable"]
    assert few != share
    assert "new.txt is learned, up to 256 tokens" in capsys.readouterr().out
    assert Path("out/table.md").exists()
    # The same figure as `peerify eval` has of the whole watched text, of which these windows are all.
    dense = load_dense("dense")
    windows_bt = learn._spread(load_windows(["watched.txt"], dense.tokenizer, context=32), 4)
    assert original["watched"]["watched.txt"]["perplexity"] == pytest.approx(perplexity(dense.model, windows_bt))
    monkeypatch.setattr(learn, "Bench", lambda _: pytest.fail("it measured again"))
    assert learn.main([*arguments, "--runs", RUNS]) == 0
    assert learn.main([*arguments, "--runs", "lora@1e-2", "--steps", "8"]) == 2


@pytest.mark.parametrize("run", ["peft@1e-3", "full", "full+rank=3@1e-3", "lora+rank@1e-3", "memory+expert=3@1e-3"])
def test_a_run_that_there_is_not_is_refused(run: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert learn.main([*arguments, "--runs", run]) == 2
    assert f"learn.py: --runs {run}: " in capsys.readouterr().err
    assert not Path("out").exists()


def point(learned: float, perplexity: float, kl: float) -> dict[str, Any]:
    return {"learned": learned, "watched": {"b": {"perplexity": perplexity, "kl": kl}}}


def test_methods_are_compared_at_equal_learning() -> None:
    results = {
        "settings": {"learn": "a", "steps": 1, "batch_size": 1, "context": 8},
        "original": point(64.0, 20.0, 0.0),
        "runs": [
            {"run": "full@1", "seed": 0, "points": [point(32.0, 30.0, 0.4), point(8.0, 40.0, 0.8)]},
            {"run": "full@2", "seed": 0, "points": [point(8.0, 80.0, 1.2)]},
            {"run": "full@3", "seed": 0, "points": [point(48.0, 20.0, 0.1)]},  # forgets less, but never gets there
            {"run": "memory@1", "seed": 0, "points": [point(16.0, 22.0, 0.2)]},
            {"run": "memory@1", "seed": 1, "points": [point(16.0, 24.0, 0.4)]},
        ],
    }
    assert curves.levels_of(results) == [pytest.approx(32.0), 16.0]
    full, memory = curves.compared(results, 16.0)
    # full@1 is halfway from 32 to 8 in the logarithm; full@2 two thirds of the way: a perplexity of 60, KL of 0.8.
    assert full == {"method": "full", "run": "full@1", "seeds": 1,
                    "texts": {"b": {"rise": pytest.approx(0.75), "kl": pytest.approx(0.6)}}}  # fmt: skip
    assert memory["texts"] == {"b": {"rise": pytest.approx(0.15), "kl": pytest.approx(0.3)}}
    assert "| memory@1 | 2 | +15.0 % | 0.3000 |" in curves.markdown(results)
    assert curves.compared(results, 4.0) == []
    assert curves.compared(results, 64.0)[0]["texts"]["b"]["rise"] == 0
