"""peerify.json from a stranger: what is not as peerify writes it is named, and nothing is lost when it is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hub_client import record as raw

from peerify.checkpoint.layer_options import check_layers
from peerify.checkpoint.record import check_result, read_record, write_record
from peerify.errors import OutputError, PublishError


def test_what_peerify_writes_is_read_and_written_as_it_was(folder: Path) -> None:
    before = (folder / "peerify.json").read_bytes()
    content = read_record(folder, PublishError)
    content["later"] = {"of": ["another", "version"]}  # type: ignore[typeddict-unknown-key]
    write_record(folder, content)
    assert read_record(folder, PublishError) == raw(folder) == content
    del content["later"]  # type: ignore[typeddict-item]
    write_record(folder, content)
    assert (folder / "peerify.json").read_bytes() == before
    assert not list(folder.glob(".peerify*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peerify": None}, r"peerify: field required"),
        ({"peerify": 1}, r"peerify: input should be a valid string, not 1"),
        ({"source": {"model": ["x"]}}, r"source\.model: input should be a valid string"),
        ({"source": {"model": "x", "license": {"a": 1}}}, r"source\.license: .*string"),
        ({"recipe": {"convert": {}, "calibration": {"data": "x"}}}, r"recipe\.calibration\.data: .*list"),
        ({"calibration": {}}, "calibration has neither tokens nor inputs"),
        ({"bytes_fraction": "0.5"}, r"bytes_fraction: .*number"),
        ({"layer_errors": {"a": "x"}}, r"layer_errors\.a"),
        ({"evaluation": [{"tokens": 3}]}, r"evaluation\.0\.perplexity: field required"),
        ({"training": {"steps": 3}}, "training has no tokens or no recipe"),
        ({"files": ["../secret"]}, r"files names '\.\./secret', which is no file of the folder"),
        ({"files": ["/etc/passwd"]}, r"files names '/etc/passwd'"),
        ({"files": ["a/../../b"]}, r"files names"),
        ({"files": ["x" * 300]}, r"files names 'xxx.*\.\.\."),
        ({"files": [""]}, "files names ''"),
        ({"note": "\ud800"}, "holds text that is no Unicode"),
    ],
)
def test_what_peerify_does_not_write(folder: Path, changes: dict[str, Any], message: str) -> None:
    content = {key: value for key, value in (raw(folder) | changes).items() if value is not None}
    (folder / "peerify.json").write_text(json.dumps(content))
    with pytest.raises(PublishError, match=rf"peerify\.json:? .*{message}") as caught:
        read_record(folder, PublishError)
    assert str(caught.value).endswith("; convert again")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, ""),
        ({"kind": "product"}, r"product\.grid: field required"),
        ({"kind": "linear"}, "'linear'"),
        ({"bits": 9}, r"bits: .*less than or equal to 8, not 9"),
        ({"num_experts": "24"}, r"num_experts: .*integer"),
        ({"budgets": [[0.5, 1.0, 0.1]]}, r"budgets\.0: .*at least 5 items"),
        ({"budgets": [[0.5, 1.0, 0.1, 0.5, float("inf")]]}, r"budgets\.0\.4: .*finite number"),
    ],
)
def test_layers_that_peerify_does_not_write(folder: Path, changes: dict[str, Any], message: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    layer = next(iter(config["peer"]["layers"].values()))
    assert layer["kind"] == "elastic"
    layer |= changes
    if not message:
        check_layers(config, "config.json", PublishError)
        return
    with pytest.raises(PublishError, match=rf"config\.json: peer.*{message}.*; convert again$"):
        check_layers(config, "config.json", PublishError)


@pytest.mark.parametrize("text", ["{bad", "[]", "{}", "", "[" * 100_000, "\ufeff{}", "NaN"])
def test_what_is_no_record_at_all(folder: Path, text: str) -> None:
    (folder / "peerify.json").write_text(text)
    with pytest.raises(OutputError, match=r"peerify\.json.*; convert again$"):
        read_record(folder, OutputError)


@pytest.mark.parametrize("depth", [97, 98, 450, 600, 900])
def test_what_is_nested_deeper_than_anything_that_reads_it(folder: Path, depth: int) -> None:
    """Python reads 900 levels, and then whatever called itself for each of them gave RecursionError."""
    content = raw(folder)
    content["recipe"]["convert"]["x"] = "HERE"
    (folder / "peerify.json").write_text(json.dumps(content).replace('"HERE"', "[" * depth + "]" * depth))
    if depth > 97:
        with pytest.raises(PublishError, match="is nested too deeply to be read; convert again"):
            read_record(folder, PublishError)
    else:
        read_record(folder, PublishError)


def test_numbers_that_are_not_finite(folder: Path) -> None:
    (folder / "peerify.json").write_text(json.dumps(raw(folder) | {"later": float("nan")}))
    with pytest.raises(PublishError, match="holds a number that is not finite"):
        read_record(folder, PublishError)
    with pytest.raises(PublishError, match=r"eval\.json: perplexity: .*finite"):
        check_result({"tokens": 3, "perplexity": float("inf")}, "eval.json", PublishError)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], r"eval\.json: texts: .*at least 1 item"),
        ({}, r"eval\.json: texts: .*valid list"),
        ([{"tokens": 3, "perplexity": 2.0}, {"tokens": 3}], r"eval\.json: texts\.1\.perplexity: field required"),
        ([{"texts": []}], r"eval\.json: texts\.0\.tokens: field required"),
    ],
)
def test_results_on_several_texts_are_checked_each(texts: Any, message: str) -> None:
    valid = {"texts": [{"tokens": 3, "perplexity": 2.0}], "model": "m"}
    assert check_result(valid, "eval.json", PublishError) == valid
    with pytest.raises(PublishError, match=message):
        check_result({"texts": texts}, "eval.json", PublishError)
