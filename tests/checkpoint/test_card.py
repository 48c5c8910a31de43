"""The card of a published model: what it says, and that nobody's edits are lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_client import copy, edit_card, hub_card, record, send
from hub_server import Hub
from huggingface_hub import ModelCard

from peerify.checkpoint import frontmatter
from peerify.checkpoint.card import record_results, write_card
from peerify.config.peer import PeerConfig
from peerify.conversion.sizing import plan_layer
from peerify.errors import PublishError


def test_edits_on_the_hub_survive(folder: Path, hub: Hub) -> None:
    send(folder)
    repo = hub.repos["user/model"]

    def edit(text: str) -> str:
        text = text.replace("language:\n- en\n", "").replace("license: apache-2.0", "license: mit\nwidget: mine  # why")
        return text.replace("# dense with PEER layers", "# My model\n\nHello.") + "\n## Thanks\n\nto all\n"

    edited = repo.edit("README.md", edit)
    assert send(folder).commit == edited, "nothing of ours changed, so nothing is pushed"
    record_results(folder, {"data": "wiki", "context": 64, "tokens": 4096, "perplexity": 9.5, "against": None})
    send(folder)
    card = hub_card(hub)
    assert "| wiki | 4,096 | 9.50 |" in card
    assert card.startswith("---\n")
    assert "# My model\n\nHello.\n" in card
    assert card.endswith("## Thanks\n\nto all\n")
    assert "with PEER layers\n" not in card
    metadata = yaml.safe_load(card.split("---")[1])
    assert (metadata["license"], metadata["widget"], "language" in metadata) == ("mit", "mine", False)
    assert metadata["model-index"][0]["results"][0]["metrics"][0]["value"] == 9.5
    assert not send(folder).new

    # A conversion anew, into a new folder whose card nobody touched.
    fresh = copy(folder, folder.with_name("fresh"))
    (fresh / "README.md").unlink()
    write_card(fresh)
    (fresh / "notes.txt").write_text("x")
    send(fresh)
    card = hub_card(hub)
    assert "# My model\n\nHello.\n" in card
    assert "license: mit" in card


def test_edits_in_the_folder_arrive_and_conflicts_are_named(folder: Path, hub: Hub) -> None:
    edit_card(folder, "# dense with PEER layers", "# Mine")
    send(folder)
    assert "# Mine\n" in hub_card(hub)
    edit_card(folder, "# Mine", "# Mine, better")
    edit_card(folder, "license: apache-2.0", "license: mit")
    send(folder)
    assert "# Mine, better\n" in hub_card(hub)
    hub.repos["user/model"].edit("README.md", lambda text: text.replace("better", "best"))
    (folder / "notes.txt").write_text("x")
    send(folder)
    assert "# Mine, best\n" in hub_card(hub), "edited there since, not here"
    edit_card(folder, "# Mine, better", "# Mine, good enough")
    with pytest.raises(PublishError, match=r"the text was edited both in the folder and in user/model on the Hub"):
        send(folder)
    edit_card(folder, "# Mine, good enough", "# Mine, best")
    send(folder)  # they agree again, from which the next edit starts
    assert not send(folder).new
    edit_card(folder, "# Mine, best", "# Mine, perfect")
    send(folder)
    assert "# Mine, perfect\n" in hub_card(hub)
    hub.repos["user/model"].edit("README.md", lambda text: text.replace("license: mit", "license: cc-by-4.0"))
    edit_card(folder, "license: mit", "license: other")
    with pytest.raises(PublishError, match="`license` was edited both"):
        send(folder)


def test_a_card_that_was_there_first_is_kept(folder: Path, hub: Hub) -> None:
    send(folder)
    hub.repos["user/model"].edit("README.md", lambda _: "---\nlicense: mit\n---\r\n# Old\r\n\r\ntext\r\n")
    send(folder)
    card = hub_card(hub)
    assert "# Old\n\ntext\n" in card
    assert "license: mit\n" in card
    assert "base_model: user/dense" in card
    assert card.count(frontmatter.BEGIN) == 1
    assert not send(folder).new


def test_a_result_on_several_texts_is_a_row_for_each(folder: Path) -> None:
    against = {"model": "./d", "perplexity": 10.0, "ratio": 1.2, "kl": 0.2, "continuation": None}
    row = {"model": "m", "context": 512, "tokens": 4096, "perplexity": 12.0, "against": against, "layers": []}
    record_results(folder, row | {"data": "a.txt", "perplexity": 11.0})
    record_results(
        folder,
        {
            "model": "m",
            "context": 512,
            "against": {"model": "./d"},
            "texts": [row | {"data": "b.txt"}, row | {"data": "a.txt"}],
        },
    )
    noted = record(folder)["evaluation"]
    assert [(row["data"], row["perplexity"]) for row in noted] == [("b.txt", 12.0), ("a.txt", 12.0)]
    assert [row["against"]["model"] for row in noted] == ["d", "d"], "local models by their name only"
    card = (folder / "README.md").read_text()
    for name in ("b.txt", "a.txt"):
        assert card.count(f"| {name} | 4,096 | 12.00 | 10.00 | 1.200 × | 0.2000 |") == 1


def test_card_is_what_the_hub_reads(folder: Path) -> None:
    result = {
        "tokens": 4096,
        "perplexity": 12.25,
        "against": {"model": "d", "perplexity": 10.0, "ratio": 1.225, "kl": 0.2},
    }
    record_results(folder, result | {"data": "wikitext:wikitext-2-raw-v1:test", "context": 512, "layers": []})
    record_results(folder, result | {"data": "other.txt", "context": 512})
    record_results(folder, result | {"data": "other.txt", "context": 512, "perplexity": 13.0})  # measured again
    values = record(folder)
    sources = [{"path": "a:b"}, {"path": "c.txt"}]
    training = {"recipe": {"data": {"sources": sources}}, "tokens": 10**6, "steps": 10}
    (folder / "peerify.json").write_text(json.dumps(values | {"training": training}))
    write_card(folder)
    card = ModelCard((folder / "README.md").read_text())
    data = card.data
    assert data.eval_results is not None
    assert [(row.dataset_name, row.metric_value) for row in data.eval_results] == [
        ("wikitext:wikitext-2-raw-v1:test", 12.25),
        ("other.txt", 13.0),
    ]
    assert (data.library_name, data.pipeline_tag, data.license, data.datasets) == (
        "transformers",
        "text-generation",
        "apache-2.0",
        ["a"],
    )
    for part in (
        "| other.txt | 4,096 | 13.00 | 10.00 | 1.225 × | 0.2000 |",
        "1,000,000 tokens of a:b, c.txt in 10 steps",
        "## Limits",
        "## Environment",
        "convert:\n  layers: all",
        "@article{he2024mixture",
    ):
        assert part in card.text, part
    layers = json.loads((folder / "config.json").read_text())["peer"]["layers"]
    for path, layer in layers.items():
        shares = [row[0] for row in layer["budgets"]]
        budgets = f"{shares[0]:.1%} to {shares[-1]:.1%} of the bytes, or all"
        error = f"{values['layer_errors'][path]:.4f}"
        assert f"| `{path}` | 24 | copies of 4 bits | {budgets} | {error} |" in card.text
    assert "and 24 in each layer, of which a token uses a part" in card.text
    spent = f"reads {values['bytes_fraction']:.1%} of the dense layer's bytes (in bfloat16) and takes "
    assert spent + f"{values['macs_fraction']:.1%} of its multiply-adds" in card.text
    assert "`model.set_active(0.25)`" in card.text
    assert "are the dense layers' neurons, unchanged, with copies in a few bits as keys" in card.text
    before = (folder / "README.md").read_bytes()
    write_card(folder)
    assert (folder / "README.md").read_bytes() == before


def test_what_people_say_of_the_base_model_is_in_the_text(folder: Path) -> None:
    """Push asks for base model and licence where the source does not tell: then the card speaks of those."""
    edit_card(folder, "license: apache-2.0", "license: mit")
    for _ in range(2):
        write_card(folder)
        card = ModelCard((folder / "README.md").read_text())
        assert "Base model: [user/dense](https://huggingface.co/user/dense). " in card.text
        assert "stays under its licence, mit." in card.text
        assert (card.data.base_model_relation, card.data.base_model) == ("finetune", "user/dense")


def test_the_card_of_product_keys_and_of_nothing_to_choose(folder: Path) -> None:
    values, config = record(folder), json.loads((folder / "config.json").read_text())
    shape: dict[str, Any] = {"path": "x", "d_model": 16, "d_ff": 24, "gated": True, "activation": "silu"}
    layer = plan_layer(PeerConfig(active=0.75, keys="product"), **shape)
    grid = {"grid": [4, 6], "num_heads": 1, "topk": 24, "num_shared": 0}
    paths = list(config["peer"]["layers"])

    def text_with(layers: list[dict[str, Any]]) -> str:
        config["peer"]["layers"] = dict(zip(paths, layers, strict=True))
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "peerify.json").write_text(json.dumps(values))
        write_card(folder)
        return (folder / "README.md").read_text()

    text = text_with([layer, *[layer | grid] * (len(paths) - 1)])
    added = layer["num_heads"] * layer["topk"]
    keys = f"product keys, {layer['num_heads']} × ({layer['grid'][0]} × {layer['grid'][1]})"
    assert f"| `{paths[0]}` | 24 | {keys} | {added} | " in text
    assert f"| `{paths[1]}` | 24 | product keys, 1 × (4 × 6) | 24 | " in text
    refined = "fitted in closed form and refined by gradient together with the experts, a layer at a time"
    assert f"{refined}, the experts' output vectors refitted to what it retrieves, on 256 tokens of text.txt." in text
    assert "set_active" not in text

    values["files"] = ["preprocessor_config.json"]
    values["calibration"] = {"inputs": 32}
    text = text_with([layer | grid] * len(paths))
    assert "fitted in closed form, on 32 inputs of text.txt." in text
    assert 'processor = AutoProcessor.from_pretrained("PATH_OR_ID")' in text
    assert "AutoTokenizer" not in text
