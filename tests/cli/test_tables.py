"""Tables and JSON on stdout, progress on stderr."""

from __future__ import annotations

import io
import json
import re
import time
from typing import Any

import pytest
from rich.console import Console

from peerify.cli import evaluation_tables, progress_report, tables


def test_tables_in_a_pipe_are_plain_and_whole(capsys: pytest.CaptureFixture[str]) -> None:
    path = "model." + "very_long_name." * 12 + "mlp"
    layer = {"path": path, "num_experts": 1536, "usage": 0.998, "kl_uniform": 0.35}
    layer |= {"bytes_fraction": 0.5, "macs_fraction": 1.1, "effective_experts": 1082.4}
    layer["bytes_per_token"] = {"p5": 0.384, "p50": 0.5, "p95": 0.617}
    result = {"model": "m", "perplexity": 45.1, "tokens": 16384, "against": None, "layers": [layer] * 30}
    evaluation_tables.print_evaluation(result)
    out = capsys.readouterr().out
    assert out.count(path) == 30
    assert re.search(r"mlp +1,536 +50\.0% +38–62% +110\.0% +99\.8% +1,082$", out, re.MULTILINE)
    assert "\x1b" not in out
    assert len(out.splitlines()) < 45, "one line for each layer"
    evaluation_tables.print_evaluation(result | {"layers": [layer | {"path": "model.layers.29.mlp"}]})
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def evaluation(data: str, *, budgets: int) -> dict[str, Any]:
    """Figures as wide as they come."""
    layer = {"path": "model.layers.29.mlp", "num_experts": 1536, "usage": 1.0, "kl_uniform": 0.35}
    layer |= {"bytes_fraction": 0.503, "macs_fraction": 1.104, "effective_experts": 1082.4}
    layer["bytes_per_token"] = {"p5": 0.384, "p50": 0.5, "p95": 1.017}
    compared = {"ratio": 1.1304, "kl": 0.12344, "agreement": 0.8765}
    compared["continuation"] = {"mean": 41.25, "of": 64, "prompts": 16}
    row = {"bytes_fraction": 0.503, "macs_fraction": 1.104, "perplexity": 1234.56, "after_prefill": 1.05}
    result = {"model": "m", "data": data, "context": 512, "perplexity": 1234.56, "tokens": 16384, "layers": [layer]}
    result["against"] = {"model": "dense", "perplexity": 13.25, **compared}
    if budgets:
        result["budgets"] = [{"active": 0.125 * (i + 1), **row, **compared} for i in range(budgets)]
    return result


def test_the_evaluation_at_several_budgets_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    evaluation_tables.print_evaluation(evaluation("a.txt", budgets=2))
    out = capsys.readouterr().out
    cells = r"1\.130× +0\.1234 +87\.6% +41\.2/64"
    assert re.search(rf"^m +1234\.56 +{cells}$", out, re.MULTILINE)
    assert re.search(r"^dense +13\.25 *$", out, re.MULTILINE)
    for active in (r"0\.125", r"0\.25"):
        assert re.search(rf"^ *{active} +50\.3% +110\.4% +1234\.56 +{cells} +1\.050×$", out, re.MULTILINE)
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("budgets", [0, 1, 3])
@pytest.mark.parametrize("compared", [True, False])
def test_several_texts_are_one_table(capsys: pytest.CaptureFixture[str], budgets: int, compared: bool) -> None:
    texts = [evaluation(name, budgets=budgets) for name in ("a.txt", "other.txt")]
    if not compared:
        for text in texts:
            text["against"] = None
            for row in text.get("budgets", []):
                row |= dict.fromkeys(("ratio", "kl", "agreement", "continuation", "after_prefill"))
    evaluation_tables.print_evaluation({"model": "m", "context": 512, "against": None, "texts": texts})
    out = capsys.readouterr().out
    assert out.startswith("m beside dense\n" if compared else "m\n")
    cells = r" +13\.25 +1\.130× +0\.1234 +87\.6% +41\.2/64" if compared else ""
    after = r" +1\.050×" if compared and budgets else ""
    for name in ("a.txt", "other.txt"):
        active = r" +0\.125" if budgets else ""
        assert len(re.findall(rf"^{name}{active} +1234\.56{cells}{after}$", out, re.MULTILINE)) == 1
        assert re.search(rf"^{name} +50\.3% +110\.4% +100\.0% +1,082$", out, re.MULTILINE)
    assert out.count("1234.56") == 2 * max(1, budgets)
    assert "16,384, 16,384 tokens" in out
    assert max(map(len, out.splitlines())) <= 80


def test_inspection_says_what_stays_dense_and_folds_equal_neighbours(
    capsys: pytest.CaptureFixture[str],
) -> None:
    cost = {"dense": 4000, "converted": 2000}
    site = {"kind": "gated", "d_model": 8, "d_ff": 32, "activation": "silu", "parameters": 768}
    site |= {"convertible": True, "reason": None, "bytes_per_token": cost, "flops_per_token": cost}
    sites = [site | {"path": f"h.{i}.mlp"} for i in range(12)]
    sites[7] |= {"convertible": False, "reason": "its weights are shared"}
    sites[9] |= {"d_ff": 64}
    totals = {"convertible": 11, "bytes_per_token": cost, "flops_per_token": cost}
    result = {"model": "m", "model_type": "t", "parameters": 1234567, "active": 0.5, "feedforwards": sites}
    tables.print_inspection(result | {"totals": totals})
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "h." in line]
    assert [row[:2] for row in rows] == [
        ["0–6", "h.0–6.mlp"],
        ["7", "h.7.mlp"],
        ["8", "h.8.mlp"],
        ["9", "h.9.mlp"],
        ["10–11", "h.10–11.mlp"],
    ]
    assert " ".join(rows[1]).endswith("8×32 because its weights are shared")
    assert " ".join(rows[3]).endswith("8×64 4 kB 2 kB 4 k 2 k")


def test_json_holds_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    tables.print_json({"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": (True, None, "é")}})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1.5, None], "c": {"d": [True, None, "é"]}}


def test_the_plan_shows_what_stays_dense(capsys: pytest.CaptureFixture[str]) -> None:
    cost = {"bytes_fraction": 0.25, "macs_fraction": 0.3}
    layer = {"sensitivity": 0.0123, "num_heads": 1, "topk": 18} | cost
    dense = dict.fromkeys(("num_heads", "topk")) | {"sensitivity": 4.5} | dict.fromkeys(cost, 1.0)
    layers = [layer | {"path": "a.0.mlp", "converted": True}, dense | {"path": "a.1.mlp", "converted": False}]
    result = {"model": "m", "layers": layers, "converted": 1, "bytes_fraction": 0.625, "macs_fraction": 0.65}
    tables.print_plan(result | {"predicted_ratio": 1.0987, "seconds": 3.0})
    out = capsys.readouterr().out
    assert re.search(r"a\.0\.mlp +0\.0123 +25\.0% +30\.0% +1 × 18\b", out)
    assert re.search(r"a\.1\.mlp +4\.5000 +dense *$", out, re.MULTILINE)
    assert "1 of 2 layers would be converted; of all 2 a token would read 62.5% of the bytes" in out
    assert "predicted perplexity: 1.099×" in out


def test_the_conversion_table(capsys: pytest.CaptureFixture[str]) -> None:
    layer = {"path": "a.mlp", "num_experts": 1536, "grid": [6, 8], "num_heads": 32, "topk": 18}
    # as config.json has them: sorted as text
    layers = [
        layer | {"path": "a.10.mlp", "bytes_fraction": 1.0, "macs_fraction": 1.0},
        layer | {"path": "a.9.mlp", "bytes_fraction": 0.5, "macs_fraction": 0.625},
    ]
    result = {
        "layers": ["a.9.mlp", "a.10.mlp"],
        "output": "OUT",
        "bytes_fraction": 0.75,
        "macs_fraction": 0.8125,
        "seconds": 61.4,
        "peak_rss_mb": 1234.5,
    }
    tables.print_conversion(result | {"layer_errors": {"a.9.mlp": 0.01234}}, layers)
    out = capsys.readouterr().out
    first = r"a\.9\.mlp +1,536 +6×8 +32 × 18 +50\.0% +62\.5% +0\.0123"
    second = r"a\.10\.mlp +1,536 +6×8 +32 × 18 +100\.0% +100\.0% +–"
    assert re.search(rf"{first}\s+{second}", out), "in the order in which they run"
    assert "2 layers converted; a token reads 75.0% of their bytes and takes 81.2% of their multiply-adds" in out
    assert "in 61 s" in out
    assert "next: peerify eval OUT" in out


def test_short_work_shows_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_report.progress_on_stderr() as progress:
        for done in range(5):
            progress("Counting", done, 5)
    assert capsys.readouterr() == ("", "")


def test_long_work_outside_a_terminal_shows_two_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_report, "PATIENCE_S", 0.02)
    with progress_report.progress_on_stderr() as progress:
        for done in range(4):
            progress("Counting [red] sheep", done, 4)
            time.sleep(0.03)
        progress("Counting [red] sheep", 4, 4)
        progress("Sleeping", 0, 1)
        time.sleep(0.1)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "Counting [red] sheep …",
        "Counting [red] sheep: 0 s",
        "Sleeping …",
        "Sleeping: 0 s",
    ]


def test_very_long_work_outside_a_terminal_shows_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_report, "PATIENCE_S", 0.01)
    monkeypatch.setattr(progress_report, "LINE_S", 0.1)
    with progress_report.progress_on_stderr() as progress:
        for done in range(1200):
            progress("Converting layers", done, 1200)
            time.sleep(0.001)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Converting layers …"
    between = [re.fullmatch(r"Converting layers: ([\d,]+) of 1,200, 0:00:0\d left", line) for line in lines[1:-1]]
    assert all(between)
    assert 2 <= len(between) <= 20, "one every tenth of a second, not one each call"


def test_on_a_terminal_there_is_a_bar_with_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(progress_report, "PATIENCE_S", 0.01)
    monkeypatch.setattr(
        progress_report, "Console", lambda **_: Console(file=screen, force_terminal=True, width=100, color_system=None)
    )

    def wait_for(words: str) -> None:
        end = time.monotonic() + 20
        while not re.search(words, screen.getvalue()):
            assert time.monotonic() < end, screen.getvalue()[-200:]
            time.sleep(0.01)

    with progress_report.progress_on_stderr() as progress:
        progress("Counting", 1, 4)
        wait_for("Counting .*25 %")
        progress("Counting", 3, 4)
        wait_for(r"Counting .*75 % 0:00:0\d 0:00:0\d left")
        assert "100 %" not in screen.getvalue()
        progress("Sleeping", 0, 1)
        wait_for("Counting .*100 %.*\n.*Sleeping .* 0 %")
    assert screen.getvalue().rsplit("Sleeping", 1)[1].count("100 %") == 1, "the end is the end of all stages"


def test_starting_leaves_nothing_on_the_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(progress_report, "PATIENCE_S", 0.01)
    monkeypatch.setattr(
        progress_report, "Console", lambda **_: Console(file=screen, force_terminal=True, width=100, color_system=None)
    )
    with progress_report.progress_on_stderr() as progress:
        for stage in (progress_report.STARTING, "Counting"):
            progress(stage, 0, 1)
            time.sleep(0.2)
    assert "Starting" in screen.getvalue()
    assert "Starting" not in screen.getvalue().rsplit("Counting", 1)[0][-200:]
    assert "Starting" not in screen.getvalue().rsplit("Counting", 1)[1]


def test_time_left_is_at_the_mean_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    task = types.SimpleNamespace(total=30, completed=10, elapsed=150.0, fields={"spent": 100.0})
    assert progress_report._TimeLeft().render(task).plain == "0:02:30 left"  # 100 s for 10 of 30, and 50 s more since
    task.elapsed = 1000.0
    assert progress_report._TimeLeft().render(task).plain == "0:00:00 left"
    task.completed = 0
    assert progress_report._TimeLeft().render(task).plain == ""


def test_a_failing_library_call_takes_its_bar_away() -> None:
    def divide() -> None:
        with progress_report.progress_on_stderr() as progress:
            reports.append(progress)
            progress("Dividing", 0, 1)
            raise ZeroDivisionError

    reports: list[progress_report.ProgressReport] = []
    with pytest.raises(ZeroDivisionError):
        divide()
    assert reports[0]._timer is None
