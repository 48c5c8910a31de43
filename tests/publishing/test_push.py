"""Publishing: what is sent, what a second push does, tokens, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hub_client import converted, hub_card, record, send, use
from hub_repos import READER, WRITER
from hub_server import Hub
from safetensors.torch import load_file, save_file

from peerify import cli
from peerify.config.recipe import HubConfig
from peerify.errors import PublishError, UsageError
from peerify.publishing import push as publishing
from peerify.publishing import verify

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


def test_a_checkpoint_goes_to_its_branch(
    folder: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "load_locally", lambda *_: None)
    loaded: list[Any] = []
    monkeypatch.setattr(verify, "load_back", lambda *args, **_: loaded.append(args))
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
    monkeypatch.setattr(verify, "load_locally", lambda *_: None)
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
    monkeypatch.setattr(verify, "load_locally", lambda *_: None)
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
        "trust_remote_code": False,
    }
    assert record(folder)["evaluation"] == [{"data": "t", "tokens": 9, "perplexity": 2.5, "against": None}]
    rows = [{"data": name, "tokens": 9, "perplexity": 3.5, "against": None} for name in "ut"]
    results.write_text(json.dumps({"model": "m", "context": 9, "against": None, "texts": rows}))
    assert "enough" in CliRunner().invoke(cli.cli, ["push", str(folder), "user/a", "--results", str(results)]).stderr
    assert record(folder)["evaluation"] == rows, "each text has a row, and the newest result"
    recipe.write_text(text)
    assert "has no `hub:` section" in CliRunner().invoke(cli.cli, ["push", "--recipe", str(recipe)]).stderr
    results.write_text("[]")
    run = CliRunner().invoke(cli.cli, ["push", str(folder), "user/a", "--results", str(results)])
    assert (run.exit_code, "give what `peerify eval --json` writes" in run.stderr) == (2, True)
