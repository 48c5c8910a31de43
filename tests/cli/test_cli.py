"""The command line: complete help, and what goes to which stream."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click
import pytest
from checkpoints import tiny_model
from command_line import CONVERT, files, run, spawn  # noqa: F401

from peerify import cli
from peerify.cli.base import PROMOTED
from peerify.config.recipe import valid_keys

COMMANDS = cli.cli.commands


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
        assert (read["dense"], flops["dense"]) == (2 * weights, 2 * weights), "two bytes, and two operations"
        assert read["converted"] == pytest.approx(weights / 2, rel=0.2), "a quarter of the bytes"
        assert flops["converted"] > weights / 4
    for key in ("dense", "converted"):
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
    assert len({row["bytes_fraction"] for row in rows}) > 1
    assert plan["bytes_fraction"] == pytest.approx(sum(row["bytes_fraction"] for row in rows) / 3)
    assert 0.4 < plan["bytes_fraction"] <= 0.52
    assert plan["predicted_ratio"] > 1
    done = json.loads(run("convert", "llama", "out", "--json", *asked).stdout)
    assert done["bytes_fraction"] == pytest.approx(plan["bytes_fraction"])
    assert done["macs_fraction"] == pytest.approx(plan["macs_fraction"])
    (here / "r.yaml").write_text(
        "model: llama\noutput: never\nconvert: {layers: auto, active: 0.5}\n"
        "calibration: {data: text.txt, context: 32, tokens: 512}\n"
    )
    price = 1.001 * plan["predicted_ratio"]
    result = run("inspect", "--plan", "--recipe", "r.yaml", "--max-loss", str(price))
    assert result.exit_code == 0, result.stderr
    predicted = re.search(r"predicted perplexity: (\d\.\d{3})× the dense model's", result.stdout)
    assert predicted is not None
    assert 1 <= float(predicted[1]) <= price + 5e-4
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
    assert both["against"]["continuation"] == {"mean": 32, "of": 32, "prompts": 6}, "of 64 positions half are continued"


def test_eval_on_several_texts(here: Path) -> None:
    (here / "other.txt").write_text((here / "text.txt").read_text()[::-1])
    argv = ["eval", "llama", "--against", "gpt2", "--context", "32", "--max-tokens", "200"]
    texts = ["text.txt", "other.txt"]
    alone = [json.loads(run(*argv, "--data", text, "--json").stdout) for text in texts]
    both = [part for text in texts for part in ("--data", text)]
    result = run(*argv, *both, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found == {"model": "llama", "context": 32, "against": {"model": "gpt2"}, "texts": alone}
    for_people = run(*argv, *both).stdout
    for text, row in zip(texts, alone, strict=True):
        assert re.search(rf"{text} +{row['perplexity']:.2f} +{row['against']['perplexity']:.2f}", for_people)
    again = run(*argv, "--data", "text.txt", "--data", "text.txt")
    assert (again.exit_code, again.stdout) == (2, "")
    assert "two texts have the name text.txt" in again.stderr


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
    assert done.keys() >= {"output", "layers", "bytes_fraction", "macs_fraction", "seconds", "peak_rss_mb"}
    assert done["predicted_ratio"] > 0
    assert list(done["layer_errors"]) == [f"model.layers.{i}.mlp" for i in (1, 2)]
    assert 0 < done["bytes_fraction"] <= 0.52
    assert not [path for path in here.iterdir() if ".tmp-" in path.name]
    evaluated = run(
        "eval", "out", "--against", "llama", "--data", "text.txt", "--context", "32", "--max-tokens", "256", "--json"
    )
    assert evaluated.exit_code == 0, evaluated.stderr
    found = json.loads(evaluated.stdout)
    assert found["against"]["kl"] > 0
    assert [row["path"] for row in found["layers"]] == list(done["layer_errors"])
    assert found["budgets"][0]["continuation"] == found["against"]["continuation"]
    assert 0 <= found["against"]["continuation"]["mean"] <= 32
    for row in found["layers"]:
        assert row["num_experts"] == 24
        assert 1 <= row["effective_experts"] <= 24
        assert 0 < row["bytes_per_token"]["p5"] <= row["bytes_per_token"]["p50"] <= row["bytes_per_token"]["p95"]
        assert 0 < row["bytes_fraction"] <= 1
        assert 0 < row["usage"] <= 1
    again = run(*CONVERT, *argv)
    assert (again.exit_code, again.stdout) == (1, "")
    assert "out exists" in again.stderr
    for_people = run(*CONVERT, *argv, "--overwrite")
    assert for_people.exit_code == 0, for_people.stderr
    assert re.search(r"model\.layers\.2\.mlp +24 +\d+ +[\d.]+% +[\d.]+%", for_people.stdout)
    assert "2 layers converted" in for_people.stdout
