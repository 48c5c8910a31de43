"""Runs of the quality benchmark: they stop, resume and grow, and no measured cell is lost."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import matrix
import pytest
import run
from checkpoints import random_text, text_file, tiny_checkpoint
from methods import Maker
from summary import markdown

from peerify import PeerConfig, convert, perplexity
from peerify.evaluation import evaluate


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """A command line without methods, shares and output."""
    tiny_checkpoint(tmp_path / "model", intermediate_size=48, num_hidden_layers=2)
    texts = [str(text_file(tmp_path / f"{name}.txt")) for name in ("calibration", "test", "ood")]
    return [
        *("--model", str(tmp_path / "model"), "--calibration", texts[0], "--test", texts[1], "--ood", texts[2]),
        *("--context", "32", "--calibration-tokens", "256", "--max-tokens", "128"),
    ]


def read(out: Path) -> Any:
    return json.loads((out / "results.json").read_text())


def figures(results: Any) -> Any:
    """All that does not depend on the clock."""
    return sorted(
        (cell["method"], cell["active"], cell["bytes"], cell["test"]["ratio"], cell["ood"]["kl"])
        for cell in results["cells"]
    )


def test_a_run_stops_resumes_and_grows(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures: list[Path] = []
    monkeypatch.setattr(run, "draw", lambda results, path: pictures.append(path))
    whole, out = tmp_path / "whole", tmp_path / "out"
    methods = "static,product-keys+refine_steps=0,product-keys+refine_steps=0+allocation=uniform"
    asked = [*arguments, "--methods", methods, "--active", "0.5,1"]
    assert run.main([*asked, "--out", str(whole), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert figures(printed) == figures(read(whole))
    assert len(printed["cells"]) == 6
    for cell in printed["cells"]:
        for key in ("test", "ood"):
            assert cell[key]["ratio"] == pytest.approx(cell[key]["perplexity"] / printed["dense"][key])
        assert cell["active"] != 1 or cell["test"]["ratio"] == pytest.approx(1, abs=1e-4)

    make, made = Maker.make, []

    def stopping(self: Maker, method: Any, *rest: Any) -> Any:
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append(method.name)
        return make(self, method, *rest)

    monkeypatch.setattr(Maker, "make", stopping)
    assert run.main([*asked, "--out", str(out)]) == 130
    assert [cell["method"] for cell in read(out)["cells"]] == ["static"]
    assert "static" in (out / "table.md").read_text()
    monkeypatch.setattr(Maker, "make", make)
    assert run.main([*asked, "--out", str(out)]) == 0
    assert figures(read(out)) == figures(read(whole))
    assert pictures == [whole / "ratio.svg", out / "ratio.svg"]

    def never(*_: Any) -> Any:
        raise AssertionError("a cell was measured again")

    monkeypatch.setattr(Maker, "make", never)
    assert run.main([*asked, "--out", str(out)]) == 0
    monkeypatch.setattr(Maker, "make", make)
    assert run.main([*asked[:-4], "--methods", "oracle", "--active", "0.5", "--out", str(out)]) == 0
    assert len(read(out)["cells"]) == 7
    capsys.readouterr()
    assert run.main([*asked, "--max-tokens", "64", "--out", str(out)]) == 1
    assert "tokens" in capsys.readouterr().err
    assert len(read(out)["cells"]) == 7


def test_cells_of_changed_code_are_measured_again(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "draw", lambda results, path: None)
    asked = [*arguments, "--methods", "static,uniform", "--active", "0.5", "--out", str(tmp_path)]
    assert run.main(asked) == 0
    results = read(tmp_path)
    cell = next(cell for cell in results["cells"] if cell["method"] == "uniform")
    cell["identity"]["code"] = "older"
    (tmp_path / "results.json").write_text(json.dumps(results))
    make, made = Maker.make, []

    def noting(self: Maker, method: Any, *rest: Any) -> Any:
        made.append(method.name)
        return make(self, method, *rest)

    monkeypatch.setattr(Maker, "make", noting)
    assert run.main(asked) == 0
    assert made == ["uniform"]
    assert len(read(tmp_path)["cells"]) == 2


def test_a_cell_holds_what_the_library_measures(arguments: list[str], tmp_path: Path) -> None:
    from peerify import load_dense
    from peerify.data import load_windows

    assert run.main([*arguments, "--methods", "peerify", "--active", "0.5", "--out", str(tmp_path)]) == 0
    dense = load_dense(arguments[1])
    calibration = load_windows([arguments[3]], dense.tokenizer, context=32, max_tokens=256)
    for key, text in (("test", arguments[5]), ("ood", arguments[7])):
        windows = load_windows([text], dense.tokenizer, context=32, max_tokens=128)
        model = load_dense(arguments[1]).model
        expected = perplexity(model, windows)
        assert read(tmp_path)["dense"][key] == pytest.approx(expected)
        conversion = convert(model, PeerConfig(active=0.5), calibration)
        assert read(tmp_path)["cells"][0][key]["perplexity"] == pytest.approx(perplexity(conversion.model, windows))
        if key == "test":
            layers = evaluate(conversion.model, windows)["layers"]
            spent = sum(layer["bytes_fraction"] for layer in layers) / len(layers)
            assert read(tmp_path)["cells"][0]["bytes"] == pytest.approx(spent)


def test_a_method_without_room_says_why_and_the_others_go_on(arguments: list[str], tmp_path: Path) -> None:
    asked = ["--methods", "peerify+num_shared=40,static", "--active", "0.5", "--out", str(tmp_path)]
    assert run.main([*arguments, *asked]) == 0
    cells = read(tmp_path)["cells"]
    assert "num_shared" in cells[0]["error"]
    assert cells[1]["test"]["ratio"] > 0
    assert "Not possible" in (tmp_path / "table.md").read_text()


def test_wrong_use_is_refused_in_one_sentence(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for extra in (["--active", "1.5"], ["--active", "x"], ["--methods", "none"], ["--test", arguments[3]]):
        assert run.main([*arguments, "--out", str(tmp_path / "o"), *extra]) == 2
        assert extra[0] in capsys.readouterr().err
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "results.json").write_text("[]")
    assert run.main([*arguments, "--methods", "static", "--out", str(tmp_path / "o")]) == 1


def made_up_results(methods: int) -> dict[str, Any]:
    def text() -> dict[str, float]:
        return {
            "perplexity": 30.0,
            "ratio": math.exp(6 * random.random()),
            "kl": random.random(),
            "agreement": random.random(),
        }

    names = [random_text(random.randint(3, 12)).replace(" ", "-") + str(i) for i in range(methods)]
    cells = [
        {
            "method": names[i],
            "active": active,
            "identity": {},
            "bytes": active,
            "macs": 1.5 * active,
            "seconds": 100 * random.random(),
            "test": text(),
            "ood": text(),
        }
        for i in range(methods)
        for active in (0.125, 0.5, 1.0)
    ]
    settings = {"model": "m", "texts": {"test": "a", "calibration": ["b"]}, "tokens": {"test": 5}, "context": 2}
    return {"settings": settings, "dense": {"test": 20.0, "ood": 30.0}, "cells": cells}


def test_the_table_is_aligned_and_complete() -> None:
    results = made_up_results(4)
    text = markdown(results)
    blocks = [[line for line in part.splitlines() if line.startswith("|")] for part in text.split("\n\n")]
    tables = [block for block in blocks if block]
    assert [len(block) for block in tables] == [2 + 4, 2 + 12]
    for block in tables:
        assert len({len(line) for line in block}) == 1
        assert len({line.count("|") for line in block}) == 1
    for cell in results["cells"]:
        assert f"{cell['test']['kl']:.4f}" in text


def test_the_picture_has_every_method_and_is_the_same_each_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from plot import draw

    results = made_up_results(3)
    results["cells"].append({"method": "broken", "active": 0.5, "identity": {}, "error": "no room"})
    for name in ("a.svg", "b.svg"):
        draw(results, tmp_path / name)
    picture = (tmp_path / "a.svg").read_text()
    assert picture == (tmp_path / "b.svg").read_text()
    for cell in results["cells"]:
        assert (cell["method"] in picture) is ("error" not in cell)


def test_results_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "results.json"
    matrix.write_whole(path, "first")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(matrix.os, "replace", fail)
    with pytest.raises(matrix.OutputError, match="No space left"):
        matrix.write_whole(path, "second")
    assert path.read_text() == "first"
