"""Publishing: what is checked, what is sent, what a second push does, and what becomes of people's edits."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoints import tiny_checkpoint
from click.testing import CliRunner
from hub_client import converted, copy, edit_card, record, send, use
from hub_server import READER, WRITER, Hub
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from peerify import cli, frontmatter, loadback, publishing
from peerify.card import record_results, write_card
from peerify.errors import PeerifyError, PublishError, UsageError
from peerify.recipe import HubConfig


def hub_card(hub: Hub, revision: str = "main") -> str:
    return hub.repos["user/model"].files(revision)["README.md"].data.decode()


# What is sent


def test_one_commit_then_none(folder: Path, hub: Hub) -> None:
    (folder / "optimizer.pt").write_bytes(b"x")
    (folder / ".secret").write_text("x")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "model.safetensors").write_bytes(b"x")
    (folder / "notes.txt").write_text("mine")
    first = send(folder)
    assert first.new
    files = hub.repos["user/model"].files()
    assert set(files) == {
        path.name for path in folder.iterdir() if path.name not in ("optimizer.pt", ".secret", "checkpoint-5")
    } | {".gitattributes"}
    for name, file in files.items():
        if name not in (".gitattributes", "README.md"):
            assert (hub.store[file.sha256] if file.sha256 else file.data) == (folder / name).read_bytes()
    assert len(hub.writes("user/model")) == 1
    sent = hub.count("PUT|/commit/")
    again = send(folder)
    assert (again.new, again.commit) == (False, first.commit)
    assert hub.count("PUT|/commit/") == sent
    assert "PATH_OR_ID" not in hub_card(hub)
    assert 'from_pretrained("user/model"' in hub_card(hub)


def test_only_what_changed_is_sent(folder: Path, hub: Hub) -> None:
    send(folder)
    (folder / "notes.txt").write_text("new")
    puts = hub.count("^PUT")
    assert send(folder).sent == ["notes.txt", "README.md"]
    assert hub.count("^PUT") == puts
    assert len(hub.writes("user/model")) == 2


def test_old_shards_go_with_the_commit_that_brings_new_ones(tmp_path: Path, model: Path, hub: Hub) -> None:
    sharded = converted(tmp_path / "sharded", shards="8KB")
    send(model)
    assert "model.safetensors" in hub.repos["user/model"].files()
    send(sharded)
    files = hub.repos["user/model"].files()
    assert "model.safetensors" not in files, "it would be loaded instead of the shards"
    assert len([name for name in files if name.startswith("model-")]) > 2
    send(model)
    assert [name for name in hub.repos["user/model"].files() if name.startswith("model")] == [
        "modeling_peer.py",
        "model.safetensors",
    ]
    assert len(hub.writes("user/model")) == 3


def test_multipart_and_xet(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with Hub(part=9_000) as hub:
        use(hub, monkeypatch, tmp_path)
        send(model)
        assert hub.count(r"^PUT /part/\w+/\d+$") > 2
        assert (hub.leaks, hub.halves()) == ([], [])
    with Hub(xet=tmp_path / "cas") as hub:
        (tmp_path / "cas").mkdir()
        use(hub, monkeypatch, tmp_path)
        commit = send(model).commit
        assert hub.count("xet-write-token") > 0
        assert hub.count("^PUT") == 0
        assert (hub.leaks, hub.halves()) == ([], [])
        assert len(hub.writes("user/model")) == 1, "with Xet, too, it is one commit"
        from huggingface_hub import hf_hub_download

        path = hf_hub_download("user/model", "model.safetensors", revision=commit, local_dir=tmp_path / "back")
        assert Path(path).read_bytes() == (model / "model.safetensors").read_bytes()
        assert hub.count("GET /object/") == 0, "it came back through Xet"
        assert not send(model).new


def test_branch_tag_and_pull_request(folder: Path, hub: Hub) -> None:
    main = send(folder).commit
    (folder / "notes.txt").write_text("1")
    branch = send(folder, revision="trial", tag="v1")
    repo = hub.repos["user/model"]
    assert (repo.refs["trial"], repo.refs["main"]) == (branch.commit, main)
    assert branch.url == f"{hub.endpoint}/user/model/tree/trial"
    publishing.set_tag("user/model", "v1", branch.commit)
    publishing.set_tag("user/model", "v1", branch.commit)  # already so
    assert repo.refs["refs/tags/v1"] == branch.commit
    with pytest.raises(PublishError, match=r"already has a tag v1, at .*choose another --tag"):
        publishing.set_tag("user/model", "v1", main)
    (folder / "notes.txt").write_text("2")
    commits = len(repo.commits)
    with pytest.raises(PublishError, match="already has a tag v1"):
        send(folder, revision="trial", tag="v1")
    assert len(repo.commits) == commits, "a tag that cannot be had is noticed before anything is sent"

    pull = send(folder, create_pr=True)
    assert (pull.revision, repo.refs["refs/pr/1"], repo.refs["main"]) == ("refs/pr/1", pull.commit, main)
    assert pull.url.endswith("/user/model/discussions/1")
    again = send(folder, create_pr=True)
    assert (again.new, again.commit, again.revision) == (False, pull.commit, "refs/pr/1")
    (folder / "notes.txt").write_text("3")
    assert send(folder, create_pr=True).revision == "refs/pr/2"


@pytest.mark.parametrize("private", [True, False, None])
def test_visibility(folder: Path, hub: Hub, private: bool | None) -> None:
    send(folder, private=private)
    assert hub.repos["user/model"].private is bool(private)
    commits = len(hub.writes("user/model"))
    (folder / "notes.txt").write_text("x")
    with pytest.raises(PublishError, match="change that in its settings"):
        send(folder, private=not private)
    assert len(hub.writes("user/model")) == commits
    send(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repo": "model"}, "user/name"),
        ({"repo": "a/b/c"}, "user/name"),
        ({"repo": "user/mod el"}, "user/name"),
        ({"create_pr": True, "revision": "trial"}, "drop --revision"),
        ({"revision": "a" * 40}, "not a commit"),
    ],
)
def test_options_that_cannot_be(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        publishing.push(folder, **{"repo": "user/model"} | options)


def test_patterns(folder: Path) -> None:
    def names(*args: Any) -> set[str]:
        return {file.name for file in publishing.check_folder(folder, *args)}

    (folder / "more").mkdir()
    for name in ("notes.txt", "more/a.md", "more/b.md", "scheduler.pt"):
        (folder / name).write_text("x")
    usual = names()
    assert {"notes.txt", "more/a.md"} <= usual
    assert "scheduler.pt" not in usual
    assert names([], ["more/*"]) == usual - {"more/a.md", "more/b.md"}
    assert "scheduler.pt" in names(["*"])
    with pytest.raises(PublishError, match=r"leave out model\.safetensors, which the model needs"):
        names([], ["*.safetensors"])
    with pytest.raises(PublishError, match=r"leave out tokenizer\.json"):
        names(["*.safetensors", "*.py", "*.md", "config.json", "peerify.json", "gen*", "tokenizer_config.json"])


# What is checked before


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "peerify.json",
        "README.md",
        "modeling_peer.py",
        "model.safetensors",
        "tokenizer.json",
        "generation_config.json",
    ],
)
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(PeerifyError, match=r"is missing|has no|is not a converted"):
        publishing.check_folder(folder)


def test_folders_that_are_not_ready(folder: Path, tmp_path: Path) -> None:
    def refused(message: str, path: Path = folder) -> None:
        with pytest.raises(PeerifyError, match=message):
            publishing.check_folder(path)

    refused("no such folder", tmp_path / "nowhere")
    refused(r"not a converted model: it has no peerify\.json", tiny_checkpoint(tmp_path / "tiny"))
    (folder / "modeling_peer.py").write_text((folder / "modeling_peer.py").read_text() + "\n")
    refused(r"modeling_peer\.py is not the one of this peerify")
    shutil.copy(Path(publishing.__file__).parent / "modeling_peer.py", folder)
    publishing.check_folder(folder)
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[:-10])
    refused("truncated")


def test_a_missing_shard(tmp_path: Path) -> None:
    folder = converted(tmp_path, shards="8KB")
    next(folder.glob("model-00002*")).unlink()
    with pytest.raises(PeerifyError, match=r"the shard model-00002-of-.* is missing"):
        publishing.check_folder(folder)


def test_the_card_must_say_licence_and_base_model_and_be_valid(folder: Path, hub: Hub) -> None:
    edit_card(folder, "base_model: user/dense\n", "")
    with pytest.raises(PublishError, match="write `base_model: …`"):
        send(folder)
    edit_card(folder, "license: apache-2.0\n", "base_model: user/dense\n")
    with pytest.raises(PublishError, match="write `license: …`"):
        send(folder)
    edit_card(folder, "base_model: user/dense", "base_model: user/dense\nlicense: sold")
    with pytest.raises(PublishError, match=r'does not accept its metadata: "license" must be one of'):
        send(folder)
    edit_card(folder, "license: sold", "license: [")
    with pytest.raises(PublishError, match=r"README\.md \(line \d+\): the YAML between the --- lines is not valid"):
        send(folder)
    assert hub.count("^PUT") == 0, "found before the weights were sent"


def test_licence_and_base_model_come_from_the_source(tmp_path: Path, hub: Hub) -> None:
    """The dense model is on the Hub: its card says the licence, its id is the base model."""
    from peerify.folder import convert_checkpoint
    from peerify.recipe import Recipe

    out = converted(tmp_path)
    upload(hub, "ada/dense", tmp_path / "dense")
    calibration = {"data": str(tmp_path / "text.txt"), "tokens": 256, "context": 32}
    convert_checkpoint(
        Recipe.model_validate({"model": "ada/dense", "output": str(tmp_path / "b"), "calibration": calibration})
    )
    source = record(tmp_path / "b")["source"]
    assert source == {
        "model": "ada/dense",
        "revision": hub.repos["ada/dense"].refs["main"],
        "base_model": "ada/dense",
        "license": "apache-2.0",
        "language": ["en"],
    }
    card = ModelCard((tmp_path / "b" / "README.md").read_text())
    assert (card.data.license, card.data.base_model, card.data.base_model_relation) == (
        "apache-2.0",
        "ada/dense",
        "finetune",
    )
    send(tmp_path / "b")
    assert "base_model" not in record(out)["source"], "a folder has no address"


def upload(hub: Hub, repo: str, folder: Path) -> None:
    """Put a plain folder on the Hub with the Hub's own client."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo)
    api.upload_folder(repo_id=repo, folder_path=folder)


def test_commands_take_hub_ids(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """inspect, convert and eval as in the README, with ids instead of folders, public and private."""
    out = converted(tmp_path)
    upload(hub, "ada/dense", tmp_path / "dense")
    send(out, "ada/dense-peer", private=True)
    monkeypatch.chdir(tmp_path)

    def run(*argv: str, code: int = 0) -> Any:
        result = CliRunner().invoke(cli.cli, list(argv))
        assert result.exit_code == code, result.output
        return json.loads(result.stdout) if code == 0 else result.stderr

    sites = run("inspect", "ada/dense", "--json")["feedforwards"]
    assert len(sites) == 3
    assert hub.count("model.safetensors") == 0 or hub.count("GET /object") == 0, "inspect read weights"
    run(
        "convert",
        "ada/dense",
        "new",
        "--calibration",
        "text.txt",
        "--calibration-tokens",
        "256",
        "--context",
        "32",
        "--json",
    )
    options = ["--data", "text.txt", "--context", "32", "--json"]
    local = run("eval", "out", "--against", "dense", *options)
    remote = run("eval", "ada/dense-peer", "--against", "ada/dense", *options)
    assert remote["perplexity"] == local["perplexity"]
    assert remote["against"]["kl"] == local["against"]["kl"]
    assert hub.leaks == []
    said = run("eval", "ada/none", *options, code=1)
    assert "ada/none: no such directory, and no such model on the Hub" in said
    monkeypatch.setenv("HF_TOKEN", "hf_wrongSecretToken")
    said = run("inspect", "ada/dense-peer", code=1)
    assert "hf_wrongSecretToken" not in said


def test_a_checkpoint_goes_to_its_branch(
    folder: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loadback, "load_locally", lambda *_: None)
    loaded: list[Any] = []
    monkeypatch.setattr(loadback, "load_back", lambda *args, **_: loaded.append(args))
    main = send(folder).commit
    step = tmp_path / "steps" / "step-000120"
    step.mkdir(parents=True)
    tensors = {name: tensor + 1 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, step / "model.safetensors", metadata={"format": "pt"})
    (step / "optimizer.pt").write_bytes(b"x")
    publishing.push_checkpoint(step, folder, HubConfig(repo="user/model", every=2), steps=120)
    repo = hub.repos["user/model"]
    files = repo.files("checkpoints")
    assert repo.refs["main"] == main
    assert loaded[0][:3] == ("user/model", repo.refs["checkpoints"], repo.refs["checkpoints"])
    assert hub.store[str(files["model.safetensors"].sha256)] == (step / "model.safetensors").read_bytes()
    assert "optimizer.pt" not in files
    assert "a checkpoint at step 120 of a training run" in hub_card(hub, "checkpoints")
    assert [path.name for path in step.parent.iterdir()] == ["step-000120"]


# Edits of people


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
        rows, columns = layer["grid"]  # shares, and with them the form of the router, depend on the random model
        router = f"a key each, rank {layer['query_dim']}"
        if not layer["share_query"]:
            router = f"product keys, {layer['num_heads']} × ({rows} × {columns})"
        added = layer["num_heads"] * layer["topk"]
        assert f"| `{path}` | {layer['num_experts']} | {router} | {added} of" in card.text
    few = sorted({layer["num_heads"] * layer["topk"] + layer["num_shared"] for layer in layers.values()})
    assert f"{' to '.join(map(str, few[:1] + few[1:][-1:]))} of 24 are retrieved" in card.text
    assert "fitted in closed form and refined by gradient" in card.text
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
    for path in config["peer"]["layers"]:
        config["peer"]["layers"][path] |= {"share_query": False, "grid": [4, 6], "num_heads": 1, "topk": 24}
    values["files"] = ["preprocessor_config.json"]
    values["calibration"] = {"inputs": 32}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "peerify.json").write_text(json.dumps(values))
    write_card(folder)
    text = (folder / "README.md").read_text()
    assert "| product keys, 1 × (4 × 6) | 24 of " in text
    assert "and 24 of 24 are retrieved" in text
    assert "fitted in closed form, on 32 inputs of text.txt." in text
    assert 'processor = AutoProcessor.from_pretrained("PATH_OR_ID")' in text
    assert "AutoTokenizer" not in text


# Tokens


def test_no_token_no_push(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PublishError, match=r"log in with `hf auth login`, or set HF_TOKEN"):
        send(folder)
    with pytest.raises(PublishError, match=r"log in with `hf auth login`, or set HF_TOKEN"):
        publishing.push(folder, "user/model", progress=lambda *_: pytest.fail("it began before it looked for a token"))
    assert hub.requests == []


def test_a_file_with_the_token_in_it_is_not_sent(folder: Path, hub: Hub) -> None:
    (folder / "notes.txt").write_text(f"do not forget {WRITER}!")
    with pytest.raises(PublishError, match=r"notes\.txt holds your Hub token") as caught:
        send(folder)
    assert WRITER not in str(caught.value)
    assert hub.requests == []


@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_a_hub_that_repeats_the_token_is_not_quoted(
    folder: Path, hub: Hub, debug: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loadback, "load_locally", lambda *_: None)
    hub.fail("GET", "/api/models/", 403, body=f"the token {WRITER} is bad", times=9)
    result = CliRunner().invoke(cli.cli, ["push", str(folder), "user/model", *debug])
    assert result.exit_code == 1
    assert "the token <token> is bad" in result.stderr
    assert ("Traceback" in result.stderr) == bool(debug)
    assert WRITER not in result.output + result.stderr


def test_a_token_that_may_only_read(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", READER)
    with pytest.raises(PublishError, match=r"your token may not write there \(You don't have the rights"):
        send(folder)
    assert hub.repos == {}


# The command


def test_dry_run_sends_nothing(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loadback, "load_locally", lambda *_: None)
    result = CliRunner().invoke(cli.cli, ["push", str(folder), "user/model", "--dry-run", "--json"])
    said = json.loads(result.stdout)
    assert (said["commit"], said["verified"], said["dry_run"]) == (None, False, True)
    assert {row["path"]: row["bytes"] for row in said["files"]} == {
        path.name: path.stat().st_size for path in folder.iterdir()
    }
    people = CliRunner().invoke(cli.cli, ["push", str(folder), "user/model", "--dry-run"]).stdout
    assert "nothing was sent" in people
    assert said["card"] in people
    assert all(path.name in people for path in folder.iterdir())
    assert hub.requests == []


def test_a_recipe_says_where(folder: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def note(*args: Any, **options: Any) -> Any:
        calls.append((args, options))
        raise PublishError("enough")

    monkeypatch.setattr(publishing, "push", note)
    recipe = tmp_path / "recipe.yaml"
    text = f"model: m\noutput: {folder}\n"
    recipe.write_text(text + "hub: {repo: user/a, private: true, tag: v1, exclude: ['*.txt'], every: 3}\n")
    results = tmp_path / "eval.json"
    results.write_text(json.dumps({"data": "t", "tokens": 9, "perplexity": 2.5, "against": None}))
    run = CliRunner().invoke(cli.cli, ["push", "--recipe", str(recipe), "--tag", "v2", "--results", str(results)])
    assert "enough" in run.stderr
    (args, options) = calls[0]
    del options["progress"]
    assert args == (str(folder), "user/a")
    assert options == {
        "private": True,
        "revision": None,
        "tag": "v2",
        "create_pr": False,
        "message": None,
        "include": [],
        "exclude": ["*.txt"],
        "dry_run": False,
    }
    assert record(folder)["evaluation"] == [{"data": "t", "tokens": 9, "perplexity": 2.5, "against": None}]
    recipe.write_text(text)
    assert "has no `hub:` section" in CliRunner().invoke(cli.cli, ["push", "--recipe", str(recipe)]).stderr
    results.write_text("[]")
    run = CliRunner().invoke(cli.cli, ["push", str(folder), "user/a", "--results", str(results)])
    assert (run.exit_code, "is not what `peerify eval --json` writes" in run.stderr) == (2, True)


def killed_process() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


# The whole way, with processes that do not have peerify


def test_push_and_load_back(folder: Path, hub: Hub, tmp_path: Path) -> None:
    """Pushed and loaded back; then what lies on the Hub changes behind our back, and is found out."""
    stages: list[str] = []
    stale = tmp_path / "home" / "HF_HOME" / f"peerify-push-{platform.node()}-{killed_process()}-x"
    stale.mkdir(parents=True)
    result = publishing.push(
        folder, "user/model", tag="v1", private=True, progress=lambda stage, *_: stages.append(stage)
    )
    repo = hub.repos["user/model"]
    assert result["verified"]
    assert (result["commit"], result["new_commit"]) == (repo.refs["main"], True)
    assert repo.refs["refs/tags/v1"] == result["commit"]
    assert hub.count(f"GET /user/model/resolve/{result['commit']}/config.json") == 1
    assert dict.fromkeys(stages) == dict.fromkeys(
        ["Loading the folder without peerify", "Uploading", "Loading it back from the Hub"]
    )
    assert not list((tmp_path / "home" / "HF_HOME").glob("peerify-push-*"))


@pytest.mark.slow
def test_what_differs_is_said(folder: Path, hub: Hub, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    loadback.load_locally(folder, scratch)
    commit = send(folder).commit
    files = hub.repos["user/model"].files()
    names = [path.name for path in folder.iterdir()]
    oid = str(files["model.safetensors"].sha256)
    good = hub.store[oid]

    def refused(message: str) -> None:
        shutil.rmtree(scratch / "hub", ignore_errors=True)
        with pytest.raises(PublishError, match=message):
            loadback.load_back("user/model", commit, commit, scratch, files=names)

    tensors = load_file(folder / "model.safetensors")
    key = "model.layers.1.mlp.pool.u"
    for change, message in (
        (lambda: tensors[key].view(-1)[3].add_(1e-3), rf"is not what was sent: the weights differ: {key}"),
        (lambda: tensors[key].view(-1)[3].fill_(float("nan")), f"the weight {key} has NaN"),
        (lambda: tensors.update({key[:-1] + "x": tensors.pop(key)}), f"missing keys while loading: {key}"),
    ):
        change()
        save_file(tensors, tmp_path / "bad", metadata={"format": "pt"})
        hub.store[oid] = (tmp_path / "bad").read_bytes()
        refused(message)
    hub.store[oid] = good
    config = json.loads(files["config.json"].data)
    files["config.json"].data = json.dumps(config | {"rms_norm_eps": 0.1}).encode()
    refused("the weights are the same, but its logits differ by up to")
    files["config.json"].data = json.dumps(config).encode()
    names.remove("modeling_peer.py")
    del files["modeling_peer.py"]
    refused("could not be loaded back")
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 18}))
    with pytest.raises(PublishError, match="does not load"):
        loadback.load_locally(folder, scratch)
    hub.repos.clear()  # what was made of it here is no push


@pytest.mark.slow
def test_a_pull_request_is_loaded_back_by_its_own_name(folder: Path, hub: Hub) -> None:
    send(folder)
    (folder / "notes.txt").write_text("x")
    result = publishing.push(folder, "user/model", create_pr=True)
    assert (result["verified"], result["revision"]) == (True, "refs/pr/1")
    assert hub.count("GET /api/models/user/model/revision/refs%2Fpr%2F1") > 0
    assert hub.count(f"GET /user/model/resolve/{result['commit']}/config.json") == 1
    assert hub.repos["user/model"].refs["refs/pr/1"] == result["commit"]
