"""What a report draws of an evaluation: use of single experts, and bytes of single tokens, against sums by hand."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch
from checkpoints import VOCABULARY, tiny_model, tiny_tokenizer
from command_line import files, run  # noqa: F401

from peerify.config.peer import PeerConfig
from peerify.continuations import continue_greedily
from peerify.conversion.model import convert
from peerify.details import CELLS, PARTS, Continuations, continue_with_bytes, use_of
from peerify.evaluation import evaluate
from peerify.modules import peer_layers
from peerify.usage import Used


@pytest.fixture
def elastic() -> Any:
    model = tiny_model()
    convert(model, PeerConfig(active=0.6, layers="1,2"), torch.randint(VOCABULARY, (8, 32)))
    return model.eval()


def test_use_is_of_experts_from_the_most_to_the_least(elastic: Any) -> None:
    layers, seen = peer_layers(elastic), {}  # type: ignore[var-annotated]
    for path, layer in layers.items():
        layer.register_forward_hook(lambda _, args, __, path=path: seen.setdefault(path, []).append(args[0][0]))
    windows = torch.randint(VOCABULARY, (3, 12))
    result = evaluate(elastic, windows, batch_size=1, details=True)
    for path, row in zip(layers, result["layers"], strict=True):
        mask_tn = layers[path].usage(torch.cat(seen[path]))[0]
        assert row["ranked"] == pytest.approx(sorted(mask_tn.double().mean(0).tolist(), reverse=True)), (
            "24 experts, 24 parts"
        )
        assert row["grid"] is None
    assert "ranked" not in evaluate(elastic, windows)["layers"][0]


def test_parts_and_cells_are_means() -> None:
    class Keys:
        grid = (48, 40)

    class Layer:
        num_experts, num_shared, keys = 3 + 48 * 40, 3, Keys()

    used = Used(Layer())
    used.tokens = 7
    used.count_n = torch.randint(8, (Layer.num_experts,)).double()
    found = use_of(Layer(), used)
    assert len(found["ranked"]) == PARTS
    assert found["ranked"] == sorted(found["ranked"], reverse=True)
    size = Layer.num_experts // PARTS + 1
    assert found["ranked"][0] == pytest.approx(sum(sorted(used.count_n.tolist())[-size:]) / size / 7)
    assert (len(found["grid"]), len(found["grid"][0])) == (CELLS, CELLS)
    flat = [share for row in found["grid"] for share in row]
    cells = (used.count_n[3:] / 7).view(48, 40)
    assert found["grid"][0][0] == pytest.approx(cells[:2, :2].mean().item())
    assert min(flat) >= cells.min()
    assert max(flat) <= cells.max()


@pytest.mark.parametrize("active", [0.6, 1.0])
def test_bytes_are_those_of_each_token(elastic: Any, active: float) -> None:
    elastic.set_active(active)
    prompts, following = torch.randint(VOCABULARY, (2, random.choice([1, 5]))), 6
    inputs: dict[str, list[torch.Tensor]] = {}
    layers = peer_layers(elastic)
    hooks = [
        layer.register_forward_hook(lambda _, args, __, path=path: inputs.setdefault(path, []).append(args[0]))
        for path, layer in layers.items()
    ]
    found, read = continue_with_bytes(elastic, prompts, following)
    for hook in hooks:
        hook.remove()
    plain = continue_greedily(elastic, prompts, following)
    assert plain is not None
    assert torch.equal(found, plain)
    assert read[:, 0].isnan().all()
    for step in range(1, following):
        for row in range(2):
            each = [layers[path].usage(given[step][row])[1] for path, given in inputs.items()]
            assert read[row, step] == pytest.approx(sum(each) / len(each))


def test_pieces_make_the_text() -> None:
    tokenizer, text = tiny_tokenizer(), "a word, another one"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    told = Continuations(tokenizer, ids[:, :6], ids[:, 6:]).told()
    assert told[0]["prompt"] + "".join(told[0]["dense"]) == text


def test_the_command_line_tells_them(here: Any) -> None:
    convert = ["convert", "llama", "out", "--calibration", "text.txt", "--context", "32", "--layers", "1"]
    assert run(*convert).exit_code == 0
    asked = [
        "eval",
        "out",
        "--data",
        "text.txt",
        "--context",
        "32",
        "--max-tokens",
        "320",
        "--active",
        "0.6,1",
        "--json",
    ]
    found = json.loads(run(*asked, "--against", "llama", "--details").stdout)
    assert {"ranked", "grid"} <= found["layers"][0].keys()
    for row in found["continuations"]:
        assert [budget["active"] for budget in row["budgets"]] == [0.6, 1]
        assert row["budgets"][1]["tokens"] == row["dense"], "everything is on"
        for budget in row["budgets"]:
            assert len(budget["tokens"]) == len(budget["bytes"]) == len(row["dense"]) == 32
            assert budget["bytes"][0] is None
        assert set(row["budgets"][1]["bytes"][1:]) == {1.0}
    assert "continuations" not in json.loads(run(*asked, "--details").stdout), "there is nothing to set them beside"
    plain = json.loads(run(*asked, "--against", "llama").stdout)
    assert plain == {key: value for key, value in found.items() if key != "continuations"} | {"layers": plain["layers"]}
