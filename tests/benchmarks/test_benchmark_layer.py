"""The benchmark of one layer runs, at a size at which it measures nothing."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "speed" / "layer.py"
TINY = ["--cases", "32:64", "--tokens", "5", "--heads", "2", "--topk", "2", "--query-dim", "8", "--rounds", "2"]


@pytest.mark.parametrize("as_json", [False, True])
def test_it_measures_every_layer(
    as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *TINY, *(["--json"] if as_json else [])])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    out = capsys.readouterr().out
    if not as_json:
        assert "d_model 32, 64 experts" in out
        return
    (case,) = json.loads(out)["results"]
    assert case["layers"].keys() >= {"peerify", "peerify, no kernels", "dense", "Qwen3 MoE"}
    for found in case["layers"].values():
        for what in ("forward", "step"):
            assert found[what]["ms"] > 0
            assert found[what]["of_ours"] > 0
    assert case["layers"]["peerify"]["step"]["of_ours"] == 1
