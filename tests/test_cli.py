"""The command line: what goes to which stream, exit codes, one sentence for every mistake, complete help."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from checkpoints import text_file, tiny_checkpoint, tiny_model
from click.testing import CliRunner, Result

from peerify import cli, errors
from peerify.cli.base import PROMOTED
from peerify.recipe import valid_keys

COMMANDS = cli.cli.commands


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dense tiny checkpoints of several families and some text."""
    folder = tmp_path_factory.mktemp("cli")
    for family in ("llama", "gpt2", "bert"):
        tiny_checkpoint(folder / family, family)
    tiny_checkpoint(folder / "mute", tokenizer=False)
    text_file(folder / "text.txt", 3000)
    return folder


def run(*argv: str) -> Result:
    return CliRunner().invoke(cli.cli, list(argv))


def spawn(*argv: str, cwd: Path | None = None, **environment: str) -> subprocess.Popen[str]:
    package = Path(cli.__file__).parents[2]
    settings = os.environ | {"PYTHONPATH": str(package), "HF_HUB_OFFLINE": "1"} | environment
    return subprocess.Popen(
        [sys.executable, *argv],
        cwd=cwd,
        env=settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# Help


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_and_option_is_documented(name: str) -> None:
    command = COMMANDS[name]
    assert command.help
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help, f"peerify {name} {option.opts[0]} has no help"
            assert option.help.rstrip("]")[-1] != " "
    arguments = [p.name.upper() for p in command.params if isinstance(p, click.Argument) and p.name]
    assert all(argument in command.help for argument in arguments)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_examples_that_its_parser_accepts(name: str) -> None:
    help_text = run(name, "--help").output
    examples = [line.split()[1:] for line in help_text.splitlines() if re.match(r"\s+peerify ", line)]
    assert "Examples:" in help_text
    assert len(examples) >= 2
    for example in examples:
        assert example[0] == name
        COMMANDS[name].make_context(name, example[1:])  # raises a click.UsageError if it does not parse


def test_json_and_debug_are_everywhere() -> None:
    for command in COMMANDS.values():
        assert {"--json", "--debug"} <= {name for option in command.params for name in option.opts}


def test_promoted_flags_are_keys_of_the_recipe() -> None:
    assert set(PROMOTED.values()) <= set(valid_keys())


def test_help_starts_without_torch() -> None:
    code = (
        "import sys; sys.argv[1:] = ['convert', '--help']\n"
        "heavy = lambda: sorted({'torch', 'transformers', 'rich'} & set(sys.modules))\n"
        "import atexit; atexit.register(lambda: print('heavy:', heavy()))\n"
        "import runpy; runpy.run_module('peerify', run_name='__main__')"
    )
    process = spawn("-c", code)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert "--calibration-tokens" in out
    assert "heavy: []" in out


def test_version() -> None:
    assert re.fullmatch(r"peerify, version \d+\.\d+\S*\n", run("--version").output)


# Results


def test_inspect_as_json(here: Path) -> None:
    result = run("inspect", "llama", "--json", "--active", "0.25")
    found = json.loads(result.stdout)
    assert result.exit_code == 0
    assert found["model_type"] == "llama"
    assert found["parameters"] == sum(p.numel() for p in tiny_model().parameters())
    assert [row["path"] for row in found["feedforwards"]] == [f"model.layers.{i}.mlp" for i in range(3)]
    for row in found["feedforwards"]:
        weights = 3 * 16 * 24
        assert (row["kind"], row["d_model"], row["d_ff"], row["activation"]) == ("gated", 16, 24, "silu")
        assert (row["convertible"], row["reason"], row["parameters"]) == (True, None, weights)
        read, flops = row["bytes_per_token"], row["flops_per_token"]
        assert (read["dense"], flops["dense"]) == (4 * weights, 2 * weights)
        assert flops["converted"] == pytest.approx(weights / 2, rel=0.2), "whole experts: 6 of 24, or near it"
        assert read["converted"] == 2 * flops["converted"]
        assert read["router"] == 2 * flops["router"] > 0
    for key in ("dense", "converted", "router"):
        assert found["totals"]["flops_per_token"][key] == 3 * flops[key]


def test_inspect_reads_no_weights(here: Path) -> None:
    (here / "bare").mkdir()
    (here / "bare" / "config.json").write_bytes((here / "gpt2" / "config.json").read_bytes())
    result = run("inspect", "bare")
    assert result.exit_code == 0
    assert re.search(r"0–1 +transformer\.h\.0–1\.mlp +plain gelu_pytorch_tanh +16×64", result.stdout)
    assert "2 of 2 layers can be converted" in result.stdout


def test_inspect_shows_the_plan_that_convert_follows(here: Path) -> None:
    before = sorted(here.iterdir())
    asked = ["--calibration", "text.txt", "--context", "32", "--calibration-tokens", "512", "--active", "0.5"]
    result = run("inspect", "llama", "--plan", "--json", *asked)
    assert result.exit_code == 0, result.stderr
    plan = json.loads(result.stdout)
    assert sorted(here.iterdir()) == before
    rows = plan["layers"]
    assert [row["path"] for row in rows] == [f"model.layers.{i}.mlp" for i in range(3)]
    assert len({row["active"] for row in rows}) > 1
    assert sorted(rows, key=lambda row: row["sensitivity"]) == sorted(rows, key=lambda row: row["active"])
    assert plan["active_fraction"] == pytest.approx(sum(row["active"] for row in rows) / 3)
    assert 0.4 < plan["active_fraction"] <= 0.5
    assert plan["predicted_ratio"] > 1
    done = json.loads(run("convert", "llama", "out", "--json", *asked).stdout)
    assert done["active_fraction"] == pytest.approx(plan["active_fraction"], abs=0.03)
    (here / "r.yaml").write_text(
        "model: llama\noutput: never\nconvert: {layers: auto, active: 0.5}\n"
        "calibration: {data: text.txt, context: 32, tokens: 512}\n"
    )
    result = run("inspect", "--plan", "--recipe", "r.yaml", "--max-loss", "1.0002")
    assert result.exit_code == 0, result.stderr
    assert "predicted perplexity: 1.000× the dense model's" in result.stdout
    assert re.search(r"\d of 3 layers would be converted", result.stdout)


def test_eval_as_json_of_a_dense_model_against_itself(here: Path) -> None:
    argv = ["eval", "llama", "--data", "text.txt", "--context", "32", "--max-tokens", "200", "--json"]
    alone = json.loads(run(*argv).stdout)
    assert alone["tokens"] == 192
    assert (alone["model"], alone["against"], alone["layers"]) == ("llama", None, [])
    both = json.loads(run(*argv, "--against", "llama").stdout)
    assert both["perplexity"] == alone["perplexity"]
    assert both["against"]["model"] == "llama"
    assert (both["against"]["ratio"], both["against"]["perplexity"]) == (1, alone["perplexity"])


def test_eval_for_people(here: Path) -> None:
    result = run("eval", "gpt2", "--data", "text.txt", "--context", "32", "--against", "gpt2", "--max-tokens", "1024")
    assert result.exit_code == 0
    assert re.search(r"gpt2 +\d+\.\d\d +1\.000× +0\.0000", result.stdout)
    assert "1,024 tokens" in result.stdout


def test_in_a_subprocess_stdout_is_one_json_object_and_stderr_is_plain(here: Path) -> None:
    argv = [
        "-m",
        "peerify",
        "eval",
        "llama",
        "--data",
        "text.txt",
        "--context",
        "64",
        "--max-tokens",
        "100000",
    ]
    process = spawn(*argv, "--json", cwd=here)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert json.loads(out)["tokens"] == 2944
    assert "has only 2944 of the 99968 tokens asked for" in err
    assert "\x1b" not in out + err
    assert "Traceback" not in err


def test_convert_then_eval(here: Path) -> None:
    argv = ["--active", "0.5", "--calibration-tokens", "256", "--layers", "1-2"]
    result = run(*CONVERT, *argv, "--json")
    assert result.exit_code == 0, result.stderr
    done = json.loads(result.stdout)
    assert done.keys() >= {"output", "layers", "active_fraction", "seconds", "peak_rss_mb", "layer_errors"}
    assert done["predicted_ratio"] > 0
    assert list(done["layer_errors"]) == [f"model.layers.{i}.mlp" for i in (1, 2)]
    assert 0 < done["active_fraction"] <= 0.5
    assert not [path for path in here.iterdir() if ".tmp-" in path.name]
    evaluated = run(
        "eval", "out", "--against", "llama", "--data", "text.txt", "--context", "32", "--max-tokens", "256", "--json"
    )
    assert evaluated.exit_code == 0, evaluated.stderr
    found = json.loads(evaluated.stdout)
    assert found["against"]["kl"] > 0
    assert [row["path"] for row in found["layers"]] == list(done["layer_errors"])
    for row in found["layers"]:
        assert row["num_experts"] == 24
        assert 0 < row["active"] <= 1
        assert 0 < row["usage"] <= 1
    again = run(*CONVERT, *argv)
    assert (again.exit_code, again.stdout) == (1, "")
    assert "out exists" in again.stderr
    for_people = run(*CONVERT, *argv, "--overwrite")
    assert for_people.exit_code == 0, for_people.stderr
    assert re.search(r"model\.layers\.2\.mlp +24 +\d+×\d+ +\d+ × \d+", for_people.stdout)
    assert "2 layers converted" in for_people.stdout


# Mistakes

CONVERT = ["convert", "llama", "out", "--calibration", "text.txt", "--context", "32"]
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
            [*PLAN, "--calibration", "text.txt", "--context", "32", "--layers", "auto", "--active", "0.99"],
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
        ([*EVAL, "text.txt", "--context", "1"], 2, "1 is not in the range x>=2"),
        ([*EVAL, "text.txt", "--dtype", "int8"], 2, "'int8' is not one of"),
        ([*EVAL, "text.txt", "--device", "tpu9"], 2, "device 'tpu9' cannot be used"),
        (["eval", "bert", "--context", "32", "--data", "text.txt"], 1, "BertForMaskedLM is not one"),
        (["eval", "mute", "--context", "32", "--data", "text.txt"], 1, "mute has no .*tokenizer"),
        ([*EVAL, "text.txt", "--against", "./missing"], 1, r"\./missing.*no such file or directory"),
        (["convert"], 2, "model is missing: Dense model"),
        (["convert", "llama"], 2, "output is missing: Folder"),
        (
            ["convert", "llama", "out"],
            2,
            "needs calibration text: pass --calibration with a .txt file or a Hub",
        ),
        ([*CONVERT, "--active", "0.5", "--topk", "4"], 2, "active and topk/candidates both set the compute"),
        ([*CONVERT, "--active", "0.5", "--candidates", "4"], 2, "--candidates: candidates needs topk"),
        ([*CONVERT, "--active", "0"], 2, "--active: input should be greater than 0, not 0"),
        ([*CONVERT, "--topk", "5", "--candidates", "4"], 2, r"candidates \(4\) must be at least topk \(5\)"),
        ([*CONVERT, "--preset", "paper"], 2, "--preset: input should be 'peer-paper', not 'paper'"),
        ([*CONVERT, "--set", "convert.gate=unit"], 2, r"--set: unknown key convert\.gate; did you mean"),
        ([*CONVERT, "--set", "gates"], 2, "--set gates: write it as key=value"),
        ([*CONVERT, "--recipe", "missing.yaml"], 2, r"cannot read the recipe missing\.yaml"),
        (
            [*CONVERT, "--recipe", "bad.yaml"],
            2,
            r"bad\.yaml: unknown key convert\.sead; did you mean convert\.seed\?",
        ),
        ([*CONVERT, "--max-shard-size", "big"], 2, "--max-shard-size: .*pattern"),
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


def stand_in(monkeypatch: pytest.MonkeyPatch, convert_checkpoint: Callable[..., Any]) -> None:
    """Put a function in the place of the conversion."""
    module = types.SimpleNamespace(convert_checkpoint=convert_checkpoint)
    monkeypatch.setitem(sys.modules, "peerify.folder", module)


def fail(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> Result:
    def raising(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr("peerify.inspection.inspect_model", raising)
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


# The command line without torch: what inspect does is `work`, and its results are long.
LIGHT = """
import contextlib, sys, time, types, peerify.cli, peerify.cli.inspect
def work(*_, **__):
    print('ready', file=sys.stderr, flush=True)
    time.sleep(SECONDS)
    return {'feedforwards': ['x'] * 100000}
peerify.cli.inspect.library = lambda as_json: contextlib.nullcontext()
sys.modules['peerify.inspection'] = types.SimpleNamespace(inspect_model=work)
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
    ("number", "code", "said"), [(signal.SIGINT, 130, "peerify: interrupted\n"), (signal.SIGTERM, 143, "")]
)
def test_signals_end_a_run_quietly(number: int, code: int, said: str) -> None:
    process = spawn("-c", LIGHT.replace("SECONDS", "60"))
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (code, "", said)


# What convert hands on


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The recipes that `convert` hands to the library, in place of a conversion."""
    seen: list[Any] = []

    def convert_checkpoint(recipe: Any, *, progress: Any) -> dict[str, Any]:
        seen.append(recipe)
        print("a library that prints")  # noqa: T201
        return {"output": recipe.output, "layers": 0}

    stand_in(monkeypatch, convert_checkpoint)
    return seen


def test_flags_override_set_overrides_the_recipe_file(here: Path, recipes: list[Any]) -> None:
    (here / "r.yaml").write_text(
        "model: from-file\noutput: file-out\nconvert: {seed: 1, active: 0.25, layers: middle}\n"
        "calibration: {data: file.txt, tokens: 99}\n"
    )
    argv = [
        "convert",
        "gpt2",
        "--recipe",
        "r.yaml",
        "--set",
        "convert.seed=2",
        "--set",
        "convert.gates=sigmoid",
    ]
    argv += [
        "--topk",
        "3",
        "--layers",
        "0,4,12-18",
        "--calibration",
        "a.txt",
        "--calibration",
        "b.txt",
        "--json",
    ]
    result = run(*argv)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"output": "file-out", "layers": 0}
    assert result.stderr == "a library that prints\n"
    recipe = recipes[0]
    assert (recipe.model, recipe.output) == ("gpt2", "file-out")
    assert (recipe.convert.seed, recipe.convert.gates, recipe.convert.layers) == (2, "sigmoid", "0,4,12-18")
    assert (recipe.convert.topk, recipe.convert.active) == (3, None)
    assert (recipe.calibration.sources, recipe.calibration.tokens) == (["a.txt", "b.txt"], 99)
    assert (recipe.overwrite, recipe.trust_remote_code) == (False, False)
    run("convert", "--recipe", "r.yaml", "--seed", "0", "--json")
    assert recipes[1].convert.seed == 0, "0 is something said"


def test_every_promoted_flag_arrives_at_its_key(here: Path, recipes: list[Any]) -> None:
    values: dict[str, tuple[str, Any]] = {
        "--layers": ("1", "1"),
        "--active": ("0.75", 0.75),
        "--allocation": ("sensitivity", "sensitivity"),
        "--num-heads": ("2", 2),
        "--num-experts": ("12", 12),
        "--preset": ("peer-paper", "peer-paper"),
        "--calibration": ("t.txt", ["t.txt"]),
        "--calibration-tokens": ("64", 64),
        "--context": ("32", 32),
        "--seed": ("7", 7),
        "--device": ("meta", "meta"),
        "--dtype": ("bfloat16", "bfloat16"),
        "--revision": ("123", "123"),
        "--max-shard-size": ("1MB", "1MB"),
        "--overwrite": ("", True),
        "--trust-remote-code": ("", True),
    }
    argv = [word for flag, (word, _) in values.items() for word in (flag, word) if word]
    assert run("convert", "m", "o", "--json", *argv).exit_code == 0
    argv = ["--topk", "3", "--candidates", "4", "--calibration", "t.txt"]
    assert run("convert", "m", "o", "--json", *argv).exit_code == 0
    assert (recipes[1].convert.topk, recipes[1].convert.candidates) == (3, 4)
    assert run("convert", "m", "o", "--json", "--max-loss", "1.2", "--calibration", "t.txt").exit_code == 0
    assert recipes[2].convert.max_loss == 1.2
    assert values.keys() | {"--topk", "--candidates", "--max-loss"} == PROMOTED.keys()
    for flag, (_, value) in values.items():
        found = recipes[0]
        for name in PROMOTED[flag].split("."):
            found = getattr(found, name)
        assert found == value, flag
