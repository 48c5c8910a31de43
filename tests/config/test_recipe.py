"""The recipe: what wins over what, and messages that name file, key and remedy."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from pydantic import ValidationError

from peerify.config.peer import PeerConfig
from peerify.config.recipe import CalibrationConfig, Recipe, describe, valid_keys
from peerify.errors import UsageError
from peerify.hub_calls import ref_fault

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
        "convert.num_heads=6",
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
    by_count = write(tmp_path / "count.yaml", "model: a\noutput: b\nconvert: {topk: 3}\n")
    config = Recipe.load(by_count, ["convert.active=0.75"]).convert
    assert (config.active, config.topk) == (0.75, None)


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


def test_keys_are_copies_unless_something_else_is_asked_for() -> None:
    copies = [{}, {"active": 1.0}, {"max_loss": 1.2}, {"bits": 3}, {"refit": False, "refine_steps": 0}]
    product = [{"keys": "product"}, {"topk": 2}, {"num_shared": 0}, {"preset": "peer-paper"}]
    for settings in [*copies, *product]:
        config = PeerConfig(**settings)  # type: ignore[arg-type]
        assert config.has_copies is (settings in copies), settings
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
        ({"gates": "hard"}, "'unit', 'softmax' or 'sigmoid'"),
        ({"grid": (0, 4)}, "at least one row"),
        ({"grid": (3, 4), "num_experts": 13, "share_pool": True}, "no room for 13"),
        ({"share_keys": True, "share_pool": False}, "share_keys needs share_pool"),
        ({"joint_topk": True, "share_pool": True}, "joint_topk is for heads with parts"),
        ({"num_heads": 4, "topk": 4, "num_experts": 15}, "asks for 16 experts per token, there are 15"),
        ({"num_shared": 5, "num_experts": 4}, r"num_shared \(5\) is above num_experts \(4\)"),
        ({"query_dim": 5}, "multiple of 2"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"preset": "peer-paper", "gates": "unit"}, "peer-paper has gates softmax, not unit"),
        ({"preset": "peer-paper", "query_norm": False}, "peer-paper has query_norm True, not False"),
        ({"preset": "peer"}, "'peer-paper'"),
        ({"layers": ""}, "at least 1 character"),
        ({"keys": "copies", "gates": "unit"}, "gates is for product keys: drop it, or give keys product"),
        ({"refit": True}, "refit and refine_steps are for product keys"),
        ({"keys": "copies", "refine_steps": 5}, "refit and refine_steps are for product keys"),
        ({"keys": "product", "bits": 3}, "bits and group are for copies"),
        ({"num_heads": 2, "group": 32}, "bits and group are for copies"),
        ({"bits": 9}, "less than or equal to 8"),
    ],
)
def test_contradictions_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PeerConfig(**settings)  # type: ignore[arg-type]


def test_the_preset_expands_to_options_that_say_the_same() -> None:
    paper = PeerConfig(preset="peer-paper", num_heads=8, topk=16)
    expanded = paper.expanded()
    assert (expanded.gates, expanded.share_keys, expanded.query_norm) == ("softmax", True, True)
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
        ("convert: {num_shared: 5, num_experts: 4}", NAMES, r"r\.yaml: num_shared \(5\) is above"),
        ("output: b", [], r"r\.yaml: model is missing: Dense model"),
        ("- model", [], r"r\.yaml: a recipe is a mapping"),
        ("model: [a", [], r"r\.yaml, line 2: not valid YAML"),
        ("model: a\nmodel: b", [], r"r\.yaml, line 2: not valid YAML: model is written twice"),
        ("model: {a: 1}", ["output=b"], r"r\.yaml: model: .*string"),
        (
            "max_shard_size: huge",
            NAMES,
            r"r\.yaml: max_shard_size: a size is written as 5GB or 500MB, at least 1KB, not 'huge'",
        ),
        ("", ["model"], r"--set model: write it as key=value"),
        ("", ["model=[a"], r"--set model, line 1: not valid YAML"),
        ("max_shard_size: 0GB", NAMES, r"max_shard_size: a size is .*, not '0GB'"),
        ("convert: {active: true}", NAMES, r"r\.yaml: active is a number, not true"),
        ("convert: {topk: no}", NAMES, r"r\.yaml: topk is a number, not false"),
        ("convert: {grid: [4, yes]}", NAMES, r"r\.yaml: grid is a number, not true"),
        ("train: {tokens: true}", NAMES, r"r\.yaml: .*tokens is a number, not true"),
        (f"calibration: {{tokens: 1{'0' * 200}}}", NAMES, r"r\.yaml: .*tokens is 1000.*000, which is too large"),
        (f"calibration: {{tokens: '1{'0' * 200}'}}", NAMES, r"r\.yaml: .*tokens is '1000.*000', which is too large"),
        ("convert: {grid: [4, '99_999_999_999_999_999_999']}", NAMES, r"grid is '99_9.*', which is too large"),
        (f"calibration: {{tokens: 1{'0' * 400}}}", NAMES, r"r\.yaml, line 1: .*: the number has more than 300 digits"),
        (f"model: 0x{'f' * 5000}", [], r"r\.yaml, line 1: not valid YAML: the number has more than 300 digits"),
        ('a: !!int ""', [], r"r\.yaml: not valid YAML: a value is not of the kind that its tag \(!!\) says"),
        ("", ["model=!!bool x"], r"--set model: not valid YAML: a value is not of the kind that its tag"),
        ("a: !!timestamp x", [], r"r\.yaml: not valid YAML: a value is not of the kind that its tag"),
        ("a: !!set {x, y}", [], r"r\.yaml, line 1: not valid YAML: the tag 'tag:yaml\.org,2002:set' is not read here"),
        ("train: {stages: {²: {share: 1}}}", NAMES, r"r\.yaml: unknown key train\.stages\.0\.²"),
        ("", [*NAMES, f"train.stages.{'9' * 5000}.share=1"], r"r\.yaml: .*train\.stages.*99\.\.\.;"),
        ("convert: {num_experts: 1.0e+12}", NAMES, r"num_experts: .*less than or equal to 2147483648"),
        ("convert: {query_dim: 1_000_000_000_000}", NAMES, r"convert\.query_dim: .*less than or equal to 65536"),
        ("hub: {repo: a/b, tag: 'v 1'}", NAMES, r"hub\.tag: git takes no name such as 'v 1'"),
        ("hub: {repo: a/b, revision: a..b}", NAMES, r"hub\.revision: git takes no name such as 'a\.\.b'"),
        ("model: &a [*a]", [], r"r\.yaml, line 1: not valid YAML: it refers to itself"),
        ("convert: &a {layers: *a}", NAMES, r"r\.yaml, line 1: not valid YAML: it refers to itself"),
        ("model: " + "[" * 60 + "]" * 60, [], r"r\.yaml, line 1: not valid YAML: it is nested more than 50 deep"),
        ("model: " + "[" * 5000, [], r"r\.yaml"),
        ("? [a, b]\n: c", [], r"r\.yaml, line 1: not valid YAML: a list or mapping cannot be a key"),
        ("1: c", NAMES, r"r\.yaml: unknown key 1"),
        ("no: c", NAMES, r"r\.yaml: unknown key no"),
        ("convert: {layers: 2020-13-45}", NAMES, r"r\.yaml: not valid YAML: month must be in 1\.\.12"),
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
    with pytest.raises(UsageError, match=r"^--active: active and topk both set the compute"):
        flags = {"convert.topk": ("--topk", 4), "convert.active": ("--active", 0.5), "convert.seed": ("--seed", 3)}
        Recipe.load(None, NAMES, flags)


def test_the_only_stage_need_not_be_written_down_to_be_changed(tmp_path: Path) -> None:
    """The form in docs/healing.md: --set train.stages.0.optimizer.lr=5e-5."""
    path = write(tmp_path / "r.yaml", "model: a\noutput: b\ntrain: {data: {sources: a.txt}}\n")
    train = Recipe.load(path, ["train.stages.0.optimizer.name=galore", "train.stages.0.optimizer.lr=5e-5"]).train
    assert train is not None
    assert [(stage.optimizer.name, stage.optimizer.lr) for stage in train.stages] == [("galore", 5e-5)]
    with pytest.raises(UsageError, match="there is no element 1 in a list of 1"):
        Recipe.load(path, ["train.stages.1.optimizer.name=galore"])
    with pytest.raises(UsageError, match=r"unknown key train\.stages\.0\.optimiser; did you mean"):
        Recipe.load(path, ["train.stages.0.optimiser.name=galore"])


@pytest.mark.parametrize("name", ["main", "v1", "v1.0-rc.1", "ada/try", "refs/pr/1", "é"])
def test_names_that_git_takes(name: str) -> None:
    assert ref_fault(name) is None


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a b",
        "a..b",
        "-a",
        "/a",
        "a/",
        "a//b",
        "a.lock",
        "a/.b",
        "a:b",
        "a~1",
        "a^",
        "@",
        "a@{1}",
        "a\n",
        "a.",
        "\udcff",
    ],
)
def test_names_that_git_does_not_take(name: str) -> None:
    assert ref_fault(name)


def test_every_key_is_documented() -> None:
    assert len(valid_keys()) > 20
    for key in valid_keys():
        assert describe(key).endswith("."), key
