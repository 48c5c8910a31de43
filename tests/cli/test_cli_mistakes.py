"""The command line when something is wrong: one sentence, an exit code, and nothing left behind."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from command_line import CONVERT, files, run, spawn, stand_in  # noqa: F401

from peerify import errors

PRODUCT = ["--set", "convert.keys=product"]
PLAN = ["inspect", "llama", "--plan"]
EVAL = ["eval", "llama", "--context", "32", "--data"]


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        ([], 2, "Usage: "),
        (["inspect"], 2, "Missing argument 'MODEL'"),
        (["inspekt", "llama"], 2, "No such command 'inspekt'"),
        (["inspect", "./missing"], 1, r"\./missing.*no such file or directory"),
        (["inspect", "text.txt"], 1, r"text\.txt is neither"),
        (["inspect", "."], 1, r"config\.json"),
        (["inspect", "llama", "--active", "1.5"], 2, r"--active 1\.5 is not a share"),
        (["inspect", "llama", "--active", "lots"], 2, "'lots' is not a valid float"),
        (["inspect", "llama", "--layers", "auto"], 2, "--layers is for a plan: add --plan"),
        (["inspect", "llama", "--set", "convert.gates=sigmoid"], 2, "--set is for a plan: add --plan"),
        (["inspect", "--plan"], 2, "Missing argument 'MODEL'"),
        ([*PLAN], 2, "needs calibration text: pass --calibration"),
        ([*PLAN, "--active", "0.5", "--max-loss", "1.1"], 2, "active and max_loss both set the compute"),
        (
            [
                *PLAN,
                "--calibration",
                "text.txt",
                "--context",
                "32",
                "--layers",
                "auto",
                "--active",
                "0.99",
                "--set",
                "convert.keys=product",
            ],
            1,
            r"no layer can be converted within active 0\.99",
        ),
        ([*EVAL], 2, "--data' requires an argument"),
        (["eval", "llama"], 2, "Missing option '--data'"),
        ([*EVAL, "missing.txt"], 1, r"no such text file: missing\.txt"),
        ([*EVAL, "empty.txt"], 1, r"empty\.txt holds no text"),
        ([*EVAL, "short.txt"], 1, r"short\.txt: the text is too short: 5 tokens, and one window takes 32"),
        ([*EVAL, "text.txt", "--max-tokens", "20"], 2, "20 tokens are less than one window"),
        ([*EVAL, "text.txt", "--context", "65"], 2, "longer than the model's 64 positions"),
        ([*EVAL, "text.txt", "--context", str(2**31)], 2, "longer than the model's 64 positions"),
        ([*EVAL, "text.txt", "--context", "1" + "0" * 30], 2, "is not in the range 2<=x<="),
        ([*EVAL, "text.txt", "--batch-size", "1" + "0" * 30], 2, "is not in the range 1<=x<="),
        ([*EVAL, "text.txt", "--max-tokens", "1" + "0" * 30], 2, "is not in the range 1<=x<="),
        ([*EVAL, "missing\n.txt"], 1, r"no such text file: missing\\n\.txt"),
        ([*EVAL, "text.txt", "--context", "1"], 2, "1 is not in the range 2<=x<="),
        ([*EVAL, "text.txt", "--dtype", "int8"], 2, "'int8' is not one of"),
        ([*EVAL, "text.txt", "--device", "tpu9"], 2, "device 'tpu9' cannot be used"),
        (["eval", "bert", "--context", "32", "--data", "text.txt"], 1, "BertForMaskedLM is not one"),
        (["eval", "mute", "--context", "32", "--data", "text.txt"], 1, "mute has no .*tokenizer"),
        ([*EVAL, "text.txt", "--against", "./missing"], 1, r"\./missing.*no such file or directory"),
        # What costs nothing to see is told before a model is looked for.
        (["eval", "./missing", "--data", "gone.txt"], 1, r"no such text file: gone\.txt"),
        (["convert", "./missing", "out", "--calibration", "gone.txt"], 1, r"no such text file: gone\.txt"),
        (["convert"], 2, "model is missing: Dense model"),
        (["convert", "llama"], 2, "output is missing: Folder"),
        (
            ["convert", "llama", "out"],
            2,
            "needs calibration text: pass --calibration with a .txt file or a Hub",
        ),
        ([*CONVERT, "--active", "0.5", "--topk", "4"], 2, "active and topk both set the compute"),
        ([*CONVERT, "--active", "0"], 2, "--active: input should be greater than 0, not 0"),
        ([*CONVERT, "--preset", "paper"], 2, "--preset: input should be 'peer-paper', not 'paper'"),
        ([*CONVERT, "--set", "convert.gate=unit"], 2, r"--set: unknown key convert\.gate; did you mean"),
        ([*CONVERT, "--set", "gates"], 2, "--set gates: write it as key=value"),
        ([*CONVERT, "--recipe", "missing.yaml"], 2, r"the recipe missing\.yaml cannot be read"),
        (
            [*CONVERT, "--recipe", "bad.yaml"],
            2,
            r"bad\.yaml: unknown key convert\.sead; did you mean convert\.seed\?",
        ),
        (
            [*CONVERT, "--max-shard-size", "big"],
            2,
            "--max-shard-size: a size is written as 5GB or 500MB, at least 1KB, not 'big'",
        ),
        ([*CONVERT, "--max-shard-size", "0GB"], 2, "--max-shard-size: a size is written as"),
        ([*CONVERT, "--num-experts", "1000000000000"], 2, "--num-experts: .*less than or equal to 2147483648"),
        (
            [*CONVERT, "--num-experts", str(2**31)],
            1,
            r"2,147,483,648 experts of width 16 take 412 GB, and this machine",
        ),
        (
            [*CONVERT, "--active", "1e-9"],
            1,
            r"active 1e-09 cannot be reached: .* takes 0\.\d+ of the bytes; raise active",
        ),
        (
            [*CONVERT, "--active", "1e-9", "--set", "convert.keys=product"],
            1,
            r"active 1e-09 of 24 neurons is less than 1 of them and",
        ),
        ([*CONVERT, "--calibration", "\udcff.txt"], 2, r"--calibration: data '\\udcff\.txt' is not UTF-8: rename it"),
        (["convert", "\udcff", "out"], 2, r"MODEL: model '\\udcff' is not UTF-8: rename it"),
        (["convert", "llama", "\udcff"], 2, r"OUT: output '\\udcff' is not UTF-8: rename it"),
        ([*CONVERT, "--set", "train.tokens=!!int ''"], 2, "--set train.tokens: not valid YAML: a value is not of the"),
        (
            [*CONVERT, "--set", "calibration.tokens='99999999999999999999'"],
            2,
            "--set: tokens is '9+', which is too large",
        ),
        ([*CONVERT, "--recipe", "~nosuchuser/x.yaml"], 2, r"~nosuchuser/x\.yaml is not a usable path"),
        ([*CONVERT, "--recipe", "."], 2, r"the recipe \. is not a regular file; give a YAML file"),
        ([*CONVERT, "--num-experts", "1e12"], 2, "'1e12' is not a valid integer"),
        ([*CONVERT, "--set", "convert.active=true"], 2, "--set: active is a number, not true"),
        ([*CONVERT, "--device", "meta"], 2, r"device 'meta' cannot be used \(it holds no numbers\); this machine has"),
        (["push", "llama", "a/b", "--tag", "v 1"], 2, "--tag: git takes no name such as 'v 1'"),
        (["push", "x" * 300, "a/b"], 1, "xxx is not a usable path: File name too long"),
        (["push", "missing\n", "a/b"], 1, r"missing\\n: no such folder"),
        (
            ["push", "llama", "a/b", "--results", "text.txt"],
            1,
            r"llama is not a converted model: it has no peerify\.json",
        ),
        (["push", "~nosuchuser/x", "a/b", "--results", "text.txt"], 1, "~nosuchuser/x is not a usable path"),
        (["push", "llama", "a/b", "--revision", "a..b"], 2, r"--revision: git takes no name such as 'a\.\.b'"),
    ],
)
def test_mistakes_get_one_sentence_and_an_exit_code(here: Path, argv: list[str], code: int, message: str) -> None:
    (here / "empty.txt").touch()
    (here / "short.txt").write_text("short")
    (here / "bad.yaml").write_text("convert: {sead: 3}\n")
    before = sorted(path.name for path in here.iterdir())
    result = run(*argv)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert re.search(message, result.stderr), result.stderr
    assert "Traceback" not in result.stderr
    if result.stderr.startswith("peerify: "):
        assert result.stderr.count("\n") == 1
    assert sorted(path.name for path in here.iterdir()) == before, "nothing may be left behind"


def fail(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> Result:
    def raising(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr("peerify.conversion.inspection.inspect_model", raising)
    return run("inspect", "x")


def test_every_error_class_has_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CheckpointError", "ConversionError", "DataError", "OutputError"):
        result = fail(monkeypatch, getattr(errors, name)("the sentence"))
        assert (result.exit_code, result.stderr) == (1, "peerify: the sentence\n")
    assert fail(monkeypatch, errors.UsageError("the sentence")).exit_code == 2


def test_a_bug_is_one_line_unless_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    result = fail(monkeypatch, RuntimeError("shapes differ\nat 0x7f"))
    assert result.exit_code == 1
    assert result.stderr == "peerify: unexpected RuntimeError: shapes differ (--debug shows where)\n"
    result = run("inspect", "x", "--debug")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "in raising" in result.stderr


def test_an_interrupt_is_one_line_and_130(monkeypatch: pytest.MonkeyPatch) -> None:
    result = fail(monkeypatch, KeyboardInterrupt())
    assert (result.exit_code, result.stderr) == (130, "peerify: interrupted\n")

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    stand_in(monkeypatch, interrupted)
    result = run(*CONVERT)
    assert (result.exit_code, result.stderr) == (130, "peerify: interrupted; out left as it was\n")

    def terminated(*_: Any, **__: Any) -> Any:
        raise errors.Terminated

    stand_in(monkeypatch, terminated)
    result = run(*CONVERT)
    assert (result.exit_code, result.stderr) == (143, "peerify: terminated; out left as it was\n")


@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_training_that_a_signal_stopped_prints_its_result_and_is_no_success(
    here: Path, monkeypatch: pytest.MonkeyPatch, number: int, word: str
) -> None:
    stopped = {"steps": 7, "stopped": True, "signal": int(number)}
    monkeypatch.setattr("peerify.training.train.train_checkpoint", lambda *_, **__: stopped)
    monkeypatch.setattr("peerify.pipeline._convert", lambda *_: {})
    (here / "r.yaml").write_text(
        "model: llama\noutput: out\ncalibration: {data: text.txt}\ntrain: {data: {sources: text.txt}}\n"
    )
    result = run("train", "r.yaml", "--json")
    assert (result.exit_code, json.loads(result.stdout)) == (128 + number, stopped)
    assert result.stderr == f"peerify: {word}; the same command with --resume goes on after step 7\n"
    result = run("run", "r.yaml", "--json")
    assert (result.exit_code, json.loads(result.stdout)["train"]) == (128 + number, stopped)
    assert result.stderr.endswith(f"peerify: {word}; the same command goes on with training after step 7\n")


# The command line without torch: what inspect does is `work`, and its results are long.
LIGHT = """
import contextlib, sys, time, types, peerify.cli, peerify.cli.inspect
def work(*_, **__):
    print('ready', file=sys.stderr, flush=True)
    time.sleep(SECONDS)
    return {'feedforwards': ['x'] * 100000}
peerify.cli.inspect.library = lambda as_json: contextlib.nullcontext()
sys.modules['peerify.conversion.inspection'] = types.SimpleNamespace(inspect_model=work)
sys.argv[1:] = ['inspect', 'x', '--json']
peerify.cli.main()
"""


def test_a_reader_that_leaves_causes_no_traceback() -> None:
    with spawn("-c", LIGHT.replace("SECONDS", "0")) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "{\n"
        process.stdout.close()
        assert process.stderr.read() == "ready\n"


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, 130, "peerify: interrupted\n"), (signal.SIGTERM, 143, "peerify: terminated\n")],
)
def test_signals_end_a_run_quietly(number: int, code: int, said: str) -> None:
    process = spawn("-c", LIGHT.replace("SECONDS", "60"))
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (code, "", said)
