"""The benchmark of training grown models: a few steps of a tiny one, and the figures it prints."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from training_runs import files, grown  # noqa: F401

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "growth" / "training.py"


def test_it_trains_beside_the_dense_model(
    grown: Path,  # noqa: F811
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = ["grown", "--dense", "dense", "--text", "train.txt", "--test", "test.txt", "--test-tokens", "96"]
    asked += ["--tokens", "512", "--context", "32", "--window", "256", "--every", "1", "--out", "out"]
    main = runpy.run_path(str(SCRIPT))["main"]
    for more in (["--json"], ["--tables", "same", "--active", "1"]):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *asked, *more])
        main()
        printed = capsys.readouterr().out
        if more == ["--json"]:
            result = json.loads(printed)
            assert [row["what"] for row in result["training"]] == ["training, to 256", "training, to 512"]
            assert result["test"][0]["tokens"] == 96
            assert result["test"][0]["reachable"] == 96 * 2 * 2 * 4
            assert result["over_dense"] == pytest.approx(result["tokens_per_s"] / result["dense_tokens_per_s"])
            assert len(result["perplexity"]) == 2
        else:
            assert "x the dense model's" in printed
    assert (Path("out") / "log.jsonl").exists()
