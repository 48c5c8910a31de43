"""`peerify grow`, and recipes with a `grow:` section."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from checkpoints import tiny_checkpoint
from command_line import CONVERT, files, run  # noqa: F401
from safetensors.torch import load_file

from peerify.checkpoint.load import load_for_eval
from peerify.modules import peer_layers

GROW = ["grow", "out", "grown", "--calibration", "text.txt", "--context", "32", "--calibration-tokens", "1024"]
GROW += ["--num-experts", "64", "--heads", "2", "--topk", "4"]


@pytest.fixture(scope="module")
def converted(files: Path) -> Path:  # noqa: F811
    """The tiny Llama, converted."""
    target = files / "out"
    argv = [str(files / word) if word in ("llama", "text.txt", "out") else word for word in CONVERT]
    result = run(*argv, "--calibration-tokens", "512")
    assert result.exit_code == 0, result.output
    return target


@pytest.fixture
def at(converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the dense model, the converted one and the text."""
    for path in converted.parent.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def logits(folder: str, **options: Any) -> torch.Tensor:
    model = load_for_eval(folder, dtype="auto").model
    with torch.no_grad():
        answer: torch.Tensor = model(torch.arange(40)[None]).logits
    return answer


def test_a_grown_folder_answers_as_before_and_says_what_it_has(at: Path) -> None:
    said = json.loads(run(*GROW, "--layers", "1-2", "--share-pool", "--json").stdout)
    assert list(said["layers"]) == ["model.layers.1.mlp", "model.layers.2.mlp"]
    assert said["layers"]["model.layers.2.mlp"]["pool_of"] == "model.layers.1.mlp"
    assert torch.equal(logits("grown"), logits("out"))
    before, after = (json.loads((at / name / "peerify.json").read_text()) for name in ("out", "grown"))
    assert {key for key in after if after[key] != before.get(key)} == {"bytes_fraction", "macs_fraction", "growth"}
    assert after["bytes_fraction"] == said["bytes_fraction"] > before["bytes_fraction"]
    assert [growth["data"] for growth in after["growth"]] == [["text.txt"]]
    assert after["growth"][0]["recipe"]["num_experts"] == 64
    card = (at / "grown/README.md").read_text()
    assert "| `model.layers.2.mlp` | 64, in the pool of `model.layers.1.mlp` | 8 × 8 | 2 × 4 |" in card
    assert "evaluates every copied neuron in full" in card
    assert "## How it was grown" not in (at / "out/README.md").read_text()
    parameters = sum(tensor.numel() for tensor in load_file(at / "grown/model.safetensors").values())
    assert parameters == said["parameters"]
    shown = run("eval", "grown", "--data", "text.txt", "--context", "32").stdout
    assert "its memory" in shown
    layers = json.loads(run("eval", "grown", "--data", "text.txt", "--context", "32", "--json").stdout)["layers"]
    assert [layer.get("memory", {}).get("num_experts") for layer in layers] == [None, 64, 64]
    assert layers[1]["memory"]["usage"] == 1
    assert 0 < layers[1]["memory"]["kl_uniform"] < 0.5


def test_the_table_and_the_number_type(at: Path) -> None:
    result = run(*GROW, "--dtype", "bfloat16", "--layers", "all")
    assert result.exit_code == 0, result.output
    assert [line.split()[0] for line in result.stdout.splitlines() if "8×8" in line] == [
        f"model.layers.{i}.mlp" for i in range(3)
    ]
    assert "it computes what it did" in result.stdout
    assert {tensor.dtype for tensor in load_file(at / "grown/model.safetensors").values()} == {torch.bfloat16}


def test_densify_takes_a_memory_that_has_learned_nothing_only(at: Path) -> None:
    assert run(*GROW).exit_code == 0
    assert run("densify", "grown", "dense").exit_code == 0
    one, other = (load_file(at / name / "model.safetensors") for name in ("llama", "dense"))
    assert one.keys() == other.keys()
    taught = load_for_eval("grown", dtype="auto").model
    next(layer.memory for layer in peer_layers(taught).values() if layer.memory).pool.v.data.fill_(0.1)
    shutil.copytree("grown", "taught")
    taught.save_pretrained("taught")
    refused = run("densify", "taught", "again")
    assert refused.exit_code == 1
    assert refused.stderr == (
        "peerify: model.layers.1.mlp cannot become dense: its memory of 64 experts has learned, which neurons of a "
        "dense layer have no place for\n"
    )


def test_convert_and_run_grow_right_after_converting(at: Path) -> None:
    recipe = {
        "model": "llama",
        "output": "whole",
        "calibration": {"data": "text.txt", "context": 32, "tokens": 1024},
        "grow": {"num_experts": 64, "num_heads": 2, "topk": 4, "layers": [0, 2]},
    }
    Path("r.yaml").write_text(yaml.safe_dump(recipe))
    result = run("run", "r.yaml")
    assert result.exit_code == 0, result.output
    assert "new experts" in result.stdout
    assert json.loads(run("run", "r.yaml", "--json").stdout)["skipped"] == ["convert"]
    record = json.loads(Path("whole/peerify.json").read_text())
    assert record["growth"][0]["recipe"]["layers"] == "0,2"
    assert "grow" not in record["recipe"]
    said = json.loads(run("convert", "--recipe", "r.yaml", "--set", "output=plain", "--json").stdout)
    assert list(said["grown"]) == ["model.layers.0.mlp", "model.layers.2.mlp"]
    assert torch.equal(logits("plain"), logits("whole"))
    Path("whole.run.json").unlink()
    refused = run("run", "r.yaml", "--set", "grow.topk=3")
    assert refused.stderr.startswith("peerify: whole was converted with another grow.topk: restore it")


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no number": ([], "how far to grow is not said: give --num-experts, or `grow:` with num_experts below it"),
    "no grid": (
        ["--num-experts", "65000"],
        "--num-experts: num_experts 65,000 is no square grid: give 64,516 or 65,025, or set grid to rows and columns",
    ),
    "another grid": (
        ["--num-experts", "64", "--set", "grow.grid=[8,9]"],
        "a grid of 8 x 9 has 72 cells, and num_experts is 64: give a cell to each expert",
    ),
    "fewer than neurons": (
        ["--num-experts", "16", "--heads", "1", "--topk", "1"],
        "model.layers.1.mlp has 24 experts, and a memory of 16 is no growth: raise num_experts",
    ),
    "more than there are": (
        ["--num-experts", "64", "--topk", "20"],
        "num_heads x topk asks for 160 experts per token, and num_experts is 64",
    ),
    "no such layer": (
        ["--num-experts", "144", "--layers", "9"],
        "layers '9': the model has PEER layers 0-2; config.json lists them",
    ),
    "no text": (["--num-experts", "144", "--calibration", "none.txt"], "no such text file: none.txt"),
    "larger than memory": (
        ["--num-experts", str(30000**2)],
        "the model with 900,000,000 new experts takes 172.8 GB, and this machine has 8.0 GB free: lower num_experts, "
        "take fewer layers, share_pool or dtype bfloat16",
    ),
    "larger than disk": (
        ["--num-experts", str(6000**2)],
        "grown needs 6.91 GB and its disk has 5.00 GB free; free some space or choose another place",
    ),
}


@pytest.mark.parametrize("name", sorted(MISTAKES))
def test_what_cannot_be_is_said_in_a_sentence_before_work_starts(
    name: str, at: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags, message = MISTAKES[name]
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("M", (), {"available": 8 * 10**9, "total": 10**10})())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("D", (), {"free": 5 * 10**9})())

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("work has begun")

    monkeypatch.setattr("peerify.conversion.growth_checkpoint.load_for_eval", load)
    calibration = [] if "--calibration" in flags else ["--calibration", "text.txt"]
    result = run("grow", "out", "grown", *calibration, *flags)
    assert result.exit_code in (1, 2)
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not Path("grown").exists()


def test_what_is_not_converted_does_not_grow(at: Path) -> None:
    argv = [word if word != "out" else "llama" for word in GROW]
    assert "LlamaForCausalLM has no PEER layer to grow: convert the model first" in run(*argv).stderr
    assert "growth needs calibration text: pass --calibration" in run("grow", "out", "x", "--num-experts", "144").stderr
    assert run(*GROW).exit_code == 0
    again = ["grow", "grown", "more", *GROW[3:]]
    assert "model.layers.1.mlp has a memory of 64 experts already: leave it out" in run(*again).stderr
    assert run(*again, "--layers", "0").exit_code == 0
    assert len(json.loads(Path("more/peerify.json").read_text())["growth"]) == 2
    assert "Keys were fitted on 1,024 tokens of text.txt." in Path("more/README.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": [8, 9]}, "a memory of 64 experts has a cell for each, and its grid is 8x9"),
        ({"pool_of": "model.layers.0.mlp"}, "the memory of model.layers.1.mlp has the pool of model.layers.0.mlp"),
        (
            {"topk": "4"},
            "peer: layers.model.layers.1.mlp.elastic.memory.topk: input should be a valid integer, not '4'",
        ),
        (
            {"num_experts": 2**30, "grid": [2**15, 2**15]},
            "×8 in the file, and its config.json asks for",
        ),
    ],
)
def test_a_config_that_says_nonsense_of_a_memory_is_refused(at: Path, change: dict[str, Any], message: str) -> None:
    """Of a folder that a stranger hands out."""
    assert run(*GROW).exit_code == 0
    config = json.loads(Path("grown/config.json").read_text())
    config["peer"]["layers"]["model.layers.1.mlp"]["memory"] |= change
    Path("grown/config.json").write_text(json.dumps(config))
    result = run("eval", "grown", "--data", "text.txt")
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_recipe_that_cannot_grow_is_refused_before_anything_is_converted(at: Path) -> None:
    tiny_checkpoint(at / "wide", intermediate_size=100)
    argv = ["convert", "wide", "x", "--calibration", "text.txt"]
    result = run(*argv, "--set", "grow.num_experts=64", "--set", "grow.topk=4")
    assert "model.layers.1.mlp has 100 experts, and a memory of 64 is no growth" in result.stderr
