"""The recipe: what wins over what, and messages that name file, key and remedy."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from pydantic import ValidationError

from peerify.config import PeerConfig
from peerify.errors import UsageError
from peerify.recipe import CalibrationConfig, Recipe, describe, valid_keys

NAMES = ["model=a", "output=b"]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_later_sources_win_key_by_key(tmp_path: Path) -> None:
    file_seed, set_seed, flag_seed = random.sample(range(10**6), 3)
    recipe = write(
        tmp_path / "r.yaml",
        f"model: a\noutput: b\nconvert: {{seed: {file_seed}, gates: sigmoid}}\ncalibration: {{tokens: 9}}\n",
    )
    assert Recipe.load(recipe).convert.seed == file_seed
    assert Recipe.load(recipe, [f"convert.seed={set_seed}"]).convert.seed == set_seed
    both = Recipe.load(recipe, [f"convert.seed={set_seed}"], {"convert.seed": ("--seed", flag_seed)})
    assert both.convert.seed == flag_seed
    assert (both.convert.gates, both.calibration.tokens, both.calibration.context) == ("sigmoid", 9, 512)


def test_a_recipe_survives_being_written_and_read(tmp_path: Path) -> None:
    import yaml

    overrides = [
        "convert.topk=4",
        "convert.candidates=6",
        "convert.grid=[3, 5]",
        "calibration.data=[x.txt, y]",
    ]
    recipe = Recipe.load(None, NAMES + overrides)
    again = Recipe.load(write(tmp_path / "r.yaml", yaml.safe_dump(recipe.model_dump(mode="json"))))
    assert again == recipe


@pytest.mark.parametrize(
    ("written", "read"),
    [("0", "0"), ("[0, 4, 12-18]", "0,4,12-18"), ("first-last", "first-last"), ("'*.mlp'", "*.mlp")],
)
def test_layers_may_be_written_as_yaml_numbers_and_lists(written: str, read: str) -> None:
    assert Recipe.load(None, [*NAMES, f"convert.layers={written}"]).convert.layers == read


def test_empty_sections_and_files_mean_defaults(tmp_path: Path) -> None:
    recipe = Recipe.load(write(tmp_path / "r.yaml", "convert:\ncalibration:\n"), NAMES)
    assert recipe.convert == PeerConfig()
    assert recipe.calibration == CalibrationConfig()
    assert Recipe.load(write(tmp_path / "empty.yaml", "# nothing yet\n"), NAMES) == recipe


def test_topk_on_the_command_line_replaces_active_in_the_file_and_the_other_way_round(tmp_path: Path) -> None:
    by_share = write(tmp_path / "share.yaml", "model: a\noutput: b\nconvert: {active: 0.25}\n")
    config = Recipe.load(by_share, [], {"convert.topk": ("--topk", 3)}).convert
    assert (config.active, config.topk) == (None, 3)
    by_count = write(tmp_path / "count.yaml", "model: a\noutput: b\nconvert: {topk: 3, candidates: 5}\n")
    config = Recipe.load(by_count, ["convert.active=0.75"]).convert
    assert (config.active, config.topk, config.candidates) == (0.75, None, None)


def test_active_yields_to_topk_only_as_a_default() -> None:
    assert PeerConfig().active == 0.5
    assert PeerConfig(topk=2).active is None
    assert PeerConfig(active=0.5, num_heads=4).num_heads == 4
    with pytest.raises(ValidationError, match="active and topk"):
        PeerConfig(active=0.5, topk=2)


def test_allocation_and_active_yield_to_topk_and_max_loss_only_as_defaults() -> None:
    assert PeerConfig().allocation == "sensitivity"
    assert PeerConfig(topk=2).allocation == "uniform"
    assert PeerConfig(max_loss=1.2).active is None
    for config in (PeerConfig(topk=2), PeerConfig(max_loss=1.2), PeerConfig(layers="auto")):
        assert PeerConfig(**config.model_dump()) == config, "what was written can be read"


def test_the_compute_on_the_command_line_replaces_that_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", "model: a\noutput: b\nconvert: {active: 0.25}\n")
    config = Recipe.load(path, ["convert.max_loss=1.1"]).convert
    assert (config.active, config.max_loss) == (None, 1.1)
    path = write(tmp_path / "r.yaml", "model: a\noutput: b\nconvert: {max_loss: 1.3}\n")
    assert Recipe.load(path, ["convert.active=0.75"]).convert.max_loss is None
    assert Recipe.load(path, ["convert.topk=4"]).convert.max_loss is None
    with pytest.raises(UsageError, match="active and max_loss both set the compute"):
        Recipe.load(path, ["convert.active=0.75", "convert.max_loss=1.1"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"topk": 4, "allocation": "sensitivity"}, "active shares: give active or max_loss, not topk"),
        ({"topk": 4, "layers": "auto"}, "active shares: give active or max_loss, not topk"),
        ({"topk": 4, "max_loss": 1.1}, "does not go with topk"),
        ({"layers": "auto", "allocation": "uniform"}, "drop allocation uniform"),
        ({"max_loss": 1.1, "allocation": "uniform"}, "drop allocation uniform"),
        ({"active": 0}, "greater than 0"),
        ({"active": 1.01}, "less than or equal to 1"),
        ({"active": float("nan")}, "finite"),
        ({"active": None}, "give active .* or topk"),
        ({"topk": 0}, "greater than or equal to 1"),
        ({"candidates": 4}, "candidates needs topk"),
        ({"topk": 5, "candidates": 4}, r"candidates \(4\) must be at least topk \(5\)"),
        ({"topk": 4, "candidates": 5, "rerank": "none"}, "rerank cannot be none"),
        ({"shortlist": 4}, "shortlist needs topk"),
        ({"topk": 5, "shortlist": 4}, r"shortlist \(4\) must be at least topk \(5\)"),
        ({"topk": 3, "shortlist": 5, "candidates": 4}, r"candidates \(4\) must be at least shortlist \(5\)"),
        ({"topk": 4, "shortlist": 5, "rerank": "none"}, "rerank cannot be none"),
        ({"gates": "softmax", "rerank": "up"}, "normalised over what is retrieved"),
        ({"gates": "softmax", "topk": 4, "candidates": 5}, "normalised over what is retrieved"),
        ({"gates": "hard"}, "'unit', 'softmax' or 'sigmoid'"),
        ({"grid": (0, 4)}, "at least one row"),
        ({"grid": (3, 4), "num_experts": 13, "share_pool": True}, "no room for 13"),
        ({"share_keys": True, "share_pool": False}, "share_keys needs share_pool"),
        ({"joint_topk": True, "share_pool": True}, "joint_topk is for heads with parts"),
        ({"num_heads": 4, "topk": 4, "num_experts": 15}, "asks for 16 experts per token, there are 15"),
        ({"num_shared": 5, "num_experts": 4}, r"num_shared \(5\) is above num_experts \(4\)"),
        ({"query_dim": 5}, "multiple of 2"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"preset": "peer-paper", "rerank": "gate"}, "peer-paper has rerank none, not gate"),
        ({"preset": "peer-paper", "gates": "unit"}, "peer-paper has gates softmax, not unit"),
        ({"preset": "peer-paper", "query_norm": False}, "peer-paper has query_norm True, not False"),
        ({"preset": "peer-paper", "topk": 4, "candidates": 8}, "takes no candidates"),
        ({"preset": "peer-paper", "topk": 4, "shortlist": 8}, "takes no candidates"),
        ({"preset": "peer"}, "'peer-paper'"),
        ({"layers": ""}, "at least 1 character"),
    ],
)
def test_contradictions_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PeerConfig(**settings)  # type: ignore[arg-type]


def test_the_preset_expands_to_options_that_say_the_same() -> None:
    paper = PeerConfig(preset="peer-paper", rerank="none", num_heads=8, topk=16)
    expanded = paper.expanded()
    assert (expanded.gates, expanded.share_keys, expanded.query_norm, expanded.rerank) == (
        "softmax",
        True,
        True,
        "none",
    )
    assert (expanded.num_heads, expanded.topk) == (8, 16)
    assert PeerConfig(**expanded.model_dump()) == expanded, "an expanded preset is a valid configuration"
    assert PeerConfig(gates="unit").expanded() == PeerConfig(gates="unit")


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("convert: {topkk: 3}", NAMES, r"r\.yaml: unknown key convert\.topkk; did you mean convert\.topk\?"),
        ("topk: 3", NAMES, r"r\.yaml: unknown key topk; did you mean convert\.topk\?"),
        (
            "",
            [*NAMES, "convert.gate=unit"],
            r"--set: unknown key convert\.gate; did you mean convert\.gates\?",
        ),
        ("convert: {wibble: 3}", NAMES, r"valid keys are convert\.layers, convert\.active"),
        ("wibble: 3", NAMES, r"unknown key wibble; valid keys are model, output"),
        ("convert: {active: 2}", NAMES, r"r\.yaml: convert\.active: .*less than or equal to 1, not 2"),
        ("convert: {active: 2}", [*NAMES, "convert.active=3"], r"--set: convert\.active: .*not 3"),
        ("convert: 4", NAMES, r"r\.yaml: convert: .*dictionary"),
        ("convert: {topk: 5, candidates: 4}", NAMES, r"r\.yaml: candidates \(4\) must be"),
        ("output: b", [], r"r\.yaml: model is missing: Dense model"),
        ("- model", [], r"r\.yaml: a recipe is a mapping"),
        ("model: [a", [], r"r\.yaml, line 2: not valid YAML"),
        ("model: a\nmodel: b", [], r"r\.yaml, line 2: not valid YAML: model is written twice"),
        ("model: {a: 1}", ["output=b"], r"r\.yaml: model: .*string"),
        ("max_shard_size: huge", NAMES, r"r\.yaml: max_shard_size: .*pattern"),
        ("", ["model"], r"--set model: write it as key=value"),
        ("", ["model=[a"], r"--set model=\[a: .*not valid YAML"),
    ],
)
def test_messages_name_the_place_the_key_and_the_remedy(
    tmp_path: Path, text: str, overrides: list[str], message: str
) -> None:
    recipe = write(tmp_path / "r.yaml", text + "\n")
    with pytest.raises(UsageError, match=message) as caught:
        Recipe.load(recipe, overrides)
    assert "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)


def test_messages_name_the_flag() -> None:
    with pytest.raises(UsageError, match=r"^--topk: .*greater than or equal to 1, not 0$"):
        Recipe.load(None, NAMES, {"convert.topk": ("--topk", 0)})
    with pytest.raises(UsageError, match=r"^--candidates: candidates needs topk"):
        Recipe.load(None, NAMES, {"convert.candidates": ("--candidates", 4), "convert.active": ("--active", 0.5)})


def test_unreadable_recipes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read the recipe .*no\.yaml: No such file"):
        Recipe.load(tmp_path / "no.yaml")
    with pytest.raises(UsageError, match=r"cannot read the recipe .*directory"):
        Recipe.load(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("model: café".encode("latin-1"))
    with pytest.raises(UsageError, match=r"latin\.yaml: not UTF-8"):
        Recipe.load(tmp_path / "latin.yaml")


def test_yaml_cannot_make_python_objects(tmp_path: Path) -> None:
    marker = tmp_path / "made"
    evil = write(tmp_path / "r.yaml", f"model: !!python/object/apply:os.mkdir ['{marker}']\noutput: b\n")
    with pytest.raises(UsageError, match="not valid YAML"):
        Recipe.load(evil)
    assert not marker.exists()


def test_every_key_is_documented() -> None:
    assert len(valid_keys()) > 20
    for key in valid_keys():
        assert describe(key).endswith("."), key
