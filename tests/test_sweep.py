"""The price curve: the same figures as convert, eval and bench give one by one, and the share that is recommended."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from command_line import files, run  # noqa: F401

from peerify.choice import Wish, choose
from peerify.errors import UsageError

FIGURES = "active", "bytes_fraction", "macs_fraction", "ratio", "kl", "agreement"
TEXT = ["--data", "text.txt", "--context", "32", "--max-tokens", "640"]
SWEEP = ["sweep", "llama", "--calibration", "text.txt", *TEXT]
QUICK = ["--no-speed", "--active", "0.5,1,0.75"]


def swept(*argv: str) -> dict[str, Any]:
    done = run(*argv, "--json")
    assert done.exit_code == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_sweep_says_what_convert_and_eval_say(here: Path) -> None:
    before = sorted(here.iterdir())
    found = swept(*SWEEP, *QUICK, "--max-loss", "1.5", "--layers", "1-2")
    assert sorted(here.iterdir()) == before, "nothing is kept"
    assert (found["speed"], found["converted"], found["against"]) == (None, False, "llama")
    assert [row["active"] for row in found["rows"]] == [0.5, 1, 0.75]
    assert (found["choice"]["active"], found["choice"]["met"]) == (0.5, True)
    command = found["choice"]["command"]
    assert command == "peerify convert llama OUT --active 0.5 --layers 1-2 --calibration text.txt --context 32"
    assert run(*shlex.split(command)[1:]).exit_code == 0
    asked = ["--against", "llama", *TEXT, "--active", "0.5,1,0.75"]
    evaluated = json.loads(run("eval", "OUT", *asked, "--json").stdout)
    for row, budget in zip(found["rows"], evaluated["budgets"], strict=True):
        for key in FIGURES:
            assert row[key] == pytest.approx(budget[key], rel=1e-4, abs=1e-7), key
    assert found["evaluation"]["budgets"][0].keys() == evaluated["budgets"][0].keys()
    # The folder, which is converted already, has the same curve; the dense model comes out of it.
    again = swept("sweep", "OUT", *TEXT, *QUICK)
    for row, other in zip(again["rows"], found["rows"], strict=True):
        for key in FIGURES:
            assert row[key] == pytest.approx(other[key], rel=1e-4, abs=1e-7), key
    assert again["choice"]["command"] == "AutoModelForCausalLM.from_pretrained('OUT', peer_active=0.5)"
    named = swept("sweep", "OUT", *TEXT, *QUICK, "--against", "llama")
    assert named["against"] == "llama"
    assert [row["ratio"] for row in named["rows"]] == pytest.approx([row["ratio"] for row in found["rows"]], rel=1e-5)


def test_of_several_texts_the_one_that_loses_most_counts(here: Path) -> None:
    (here / "other.txt").write_text((here / "text.txt").read_text()[::-1])
    found = swept(*SWEEP, *QUICK, "--data", "other.txt", "--layers", "1")
    for i, row in enumerate(found["rows"]):
        assert row["ratio"] == max(text["budgets"][i]["ratio"] for text in found["evaluation"]["texts"])


def test_speed_is_that_of_one_token_at_a_time(here: Path) -> None:
    pytest.importorskip("matplotlib")
    argv = [
        *SWEEP,
        *["--active", "0.05,0.75", "--layers", "1", "--repeats", "2", "--min-speed", "1000", "--plot", "sweep.png"],
    ]
    found = swept(*argv)
    (row,) = found["rows"]
    (timed,) = found["speed"]["decode"]
    assert (row["speed"], row["limit"], row["tokens_per_s"]) == (timed["ratio"], timed["limit"], timed["converted"])
    assert (timed["batch"], found["speed"]["prefill"], found["speed"]["train"]) == (1, [], [])
    assert found["unreachable"] == [0.05]
    assert not found["choice"]["met"]
    assert found["wish"] == {"max_loss": None, "min_speed": 1000}
    assert (here / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    shown = run(*argv).stdout
    assert re.search(r"^ 0\.75 +\d+\.\d% +\d+\.\d% +\d\.\d{3}× +\d+\.\d% +\d+\.\d +\d\.\d\d× +\d\.\d\d×$", shown, re.M)
    assert "not measured, since these layers cannot read so little: 0.05" in shown
    assert re.search(r"^No share that was measured has a speed of at least 1000 ×; 0\.75 comes nearest: ", shown, re.M)
    assert max(map(len, shown.split("\n\n")[1].splitlines())) <= 80


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["sweep", "llama", *TEXT], 2, "llama is dense, and converting it needs calibration text: pass --calibration"),
        (["sweep", "llama"], 2, "Missing option '--data'"),
        ([*SWEEP, "--active", "1"], 2, "at least one of them below 1"),
        ([*SWEEP, "--active", "0,0.5"], 2, "give shares above 0 and up to 1"),
        ([*SWEEP, "--active", "a"], 2, "a is no list of shares"),
        ([*SWEEP, "--no-speed", "--min-speed", "2"], 2, "--min-speed needs speeds: leave out --no-speed"),
        ([*SWEEP, "--max-loss", "0"], 2, "0.0 is not in the range x>0"),
        ([*SWEEP, "--against", "llama"], 2, "--against is for converted models: llama is dense itself"),
        ([*SWEEP, "--layers", "auto"], 2, "--layers auto chooses layers for one share"),
        ([*SWEEP, "--set", "convert.keys=product"], 2, "a sweep needs layers that have budgets"),
        ([*SWEEP, "--data", "gone.txt"], 1, "no such text file: gone.txt"),
        ([*SWEEP, "--plot", "sweep.txt"], 2, "name a file that ends in .png"),
        ([*SWEEP, "--active", "0.01", "--layers", "1"], 2, "these layers can read no less than a share of 0."),
        (["sweep", "./missing", *TEXT], 1, "no such file or directory"),
    ],
)
def test_mistakes(here: Path, argv: list[str], code: int, message: str) -> None:
    done = run(*argv)
    assert (done.exit_code, done.stdout) == (code, ""), done.output
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_pictures_need_matplotlib(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = run(*SWEEP, "--plot", "sweep.png")
    assert done.exit_code == 2
    assert done.stderr == "peerify: --plot needs matplotlib: pip install 'peerify[plots]'\n"


def random_rows() -> list[dict[str, float]]:
    shares = random.sample(range(1, 100), random.randint(1, 8))
    return [
        {
            "active": share / 100,
            "bytes_fraction": share / 100 + random.uniform(-0.004, 0.004),
            "ratio": random.uniform(1, 2),
            "speed": random.uniform(0.5, 2),
        }
        for share in shares
    ] + [{"active": 1, "bytes_fraction": 1.0, "ratio": 1.0, "speed": random.choice([0.9, 3.0])}]


def test_the_share_that_is_chosen() -> None:
    for _ in range(200):
        rows, loss, speed = random_rows(), random.uniform(0.9, 2.1), random.uniform(0.4, 2.1)
        below = [row for row in rows if row["active"] < 1]
        within = [row for row in below if row["ratio"] <= loss]
        fast = [row for row in below if row["speed"] >= speed]
        both = [row for row in within if row in fast]
        chosen = choose(rows, Wish(max_loss=loss))
        assert chosen.met == bool(within)
        if within:
            assert chosen.active == min(row["active"] for row in within)
        else:
            assert chosen.active == min(below, key=lambda row: row["ratio"])["active"]
        chosen = choose(rows, Wish(min_speed=speed))
        assert chosen.met == bool(fast)
        best = min(fast, key=lambda row: row["ratio"]) if fast else max(below, key=lambda row: row["speed"])
        assert chosen.active == best["active"]
        chosen = choose(rows, Wish(loss, speed))
        assert chosen.met == bool(both)
        if both:
            assert chosen.active == min(row["active"] for row in both)
        assert f"{chosen.active:g}" in chosen.said


def test_what_cannot_be_chosen() -> None:
    one = {"active": 1.0, "bytes_fraction": 1.0, "ratio": 1.0}
    with pytest.raises(UsageError, match="at least one share below 1"):
        choose([one], Wish(max_loss=2))
    with pytest.raises(UsageError, match="none was measured"):
        choose([one | {"active": 0.5}], Wish(min_speed=2))
    assert choose([one | {"active": 0.5}], Wish(max_loss=2)).said.endswith("100.0% of the bytes")
