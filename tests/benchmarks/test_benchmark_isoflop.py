"""Layers at equal compute have the multiply-adds that they say, and the mixture is a plain loop."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import text_file
from torch.utils.flop_counter import FlopCounterMode

FOLDER = Path(__file__).parents[2] / "benchmarks" / "isoflop"
NUMBERS = {"experts": 4096, "heads": 2, "topk": 16, "query_dim": 32, "norm": True}


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    """(layers, train) of the benchmark."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("layers", "train"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import layers  # type: ignore[import-not-found]
    import train  # type: ignore[import-not-found]

    yield layers, train
    for name in ("layers", "train"):
        sys.modules.pop(name, None)


def test_all_take_about_the_same(modules: Any) -> None:
    layers, _ = modules
    made = {kind: layers.make(kind, 64, **NUMBERS) for kind in layers.KINDS}
    for layer in made.values():
        assert layer.macs() == pytest.approx(made["peer"].macs(), rel=0.03)
    parameters = {kind: sum(p.numel() for p in layer.parameters()) for kind, layer in made.items()}
    assert parameters["dense"] == made["dense"].macs()
    assert parameters["moe"] == pytest.approx(parameters["peer"], rel=0.1)


@pytest.mark.parametrize("kind", ["dense", "moe", "pkm"])
def test_multiply_adds_are_what_torch_counts(modules: Any, kind: str) -> None:
    layer, tokens = modules[0].make(kind, 64, **NUMBERS), 96
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer.eval()(torch.randn(1, tokens, 64))
    values = layer.keys.num_heads * layer.topk * 64 if kind == "pkm" else 0  # embedding_bag is not counted
    assert counter.get_total_flops() == 2 * tokens * (layer.macs() - values)


def test_the_mixture_is_its_expert_times_its_gate(modules: Any) -> None:
    layer = modules[0].Mixture(12, 5, 7)
    x = torch.randn(2, 9, 12)
    y_td = layer(x).flatten(0, 1)
    for x_d, y_d in zip(x.flatten(0, 1), y_td, strict=True):
        gate_n = layer.router(x_d).softmax(-1)
        best = int(gate_n.argmax())
        torch.testing.assert_close(y_d, gate_n[best] * layer.experts[best](x_d))
    y_td.sum().backward()
    assert layer.router.weight.grad is not None


def test_runs_are_trained_once(modules: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, train = modules
    text_file(tmp_path / "text.txt", 110_000)
    text, out = str(tmp_path / "text.txt"), str(tmp_path / "out")
    sizes = "--experts 64 --heads 2 --topk 4 --query-dim 8 --d-model 32 --blocks 2 --vocabulary 300 --context 16"
    amounts = "--tokens 256 --batch-size 4 --test-tokens 128"
    command = ["--text", text, text, "--out", out, *sizes.split(), *amounts.split()]
    for _ in range(2):
        train.main([*command, "--seeds", "0,1", "--runs", "dense@1e-3,moe@1e-3,pkm@1e-3,peer+norm=0@1e-3"])
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert [row["seed"] for row in rows] == [0] * 4 + [1] * 4
    assert all(1 < row["perplexity"] < 400 for row in rows)
    assert all(0 < row["usage"] <= 1 for row in rows if not row["run"].startswith("dense"))
    assert "| peer+norm=0@1e-3 | 2 |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        train.main([*command, "--runs", "dense"])
    assert "write kind" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main([*command, "--tokens", "512"])
    assert "name another --out" in capsys.readouterr().err
