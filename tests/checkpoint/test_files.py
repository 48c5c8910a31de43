"""Only a folder's own files are read, copied and sent: links out of it, pipes and circles are named."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from checkpoints import text_file, tiny_checkpoint
from click.testing import CliRunner

from peerify import cli
from peerify.checkpoint import files
from peerify.checkpoint import load as checkpoint
from peerify.config.recipe import Recipe
from peerify.conversion.checkpoint import convert_checkpoint
from peerify.errors import CheckpointError, OutputError, PeerifyError, PublishError
from peerify.publishing import push as publishing

SECRET = "-----BEGIN PRIVATE KEY-----"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A person's file, and beside it a folder, that no model has any business with."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "more.txt").write_text(SECRET)
    path = tmp_path / "secret.txt"
    path.write_text(SECRET)
    return path


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dense")
    tiny_checkpoint(root / "dense")
    text_file(root / "text.txt", 1000)
    return root


@pytest.fixture
def dense(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original / "dense", tmp_path / "models" / "dense"))


def convert(model: Path, out: Path, text: Path, **more: Any) -> dict[str, Any]:
    settings = {"data": str(text), "tokens": 256, "context": 32}
    recipe = {"model": str(model), "output": str(out), "calibration": settings, "convert": {"refine_steps": 0}}
    return convert_checkpoint(Recipe.model_validate(recipe | more))


def holds_the_secret(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


# What is put into the folder under a name, and the words that refuse it.
HOSTILE = {
    "link": "is a link to a file outside the folder",
    "folder": "is a link to a folder",
    "nowhere": "is a link that leads nowhere",
    "circle": "is a link that leads in a circle",
    "pipe": "is not a regular file",
    "socket": "is not a regular file",
    "device": "is a link to a file outside the folder|is not a regular file",
}


def plant(kind: str, path: Path, secret: Path) -> None:
    path.unlink(missing_ok=True)
    if kind == "link":
        path.symlink_to(os.path.relpath(secret, path.parent))
    elif kind == "folder":
        path.symlink_to(secret.parent / "outside")
    elif kind == "nowhere":
        path.symlink_to("gone")
    elif kind == "circle":
        path.symlink_to(path.name)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        here = Path.cwd()
        os.chdir(path.parent)  # its path must be short
        try:
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(path.name)
        finally:
            os.chdir(here)
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("name", ["LICENSE.txt", "tokenizer.json", "config.json", "model.safetensors", "README.md"])
def test_a_model_folder_cannot_bring_other_files_into_the_output(
    dense: Path, secret: Path, tmp_path: Path, name: str, kind: str
) -> None:
    plant(kind, dense / name, secret)
    with pytest.raises(CheckpointError, match=rf"{name} in .*dense ({HOSTILE[kind]})") as caught:
        checkpoint.load_dense(dense)
    assert "\n" not in str(caught.value)
    result = CliRunner().invoke(cli.cli, ["inspect", str(dense)])
    assert (result.exit_code, SECRET in result.output) == (1, False), result.output
    assert "unexpected" not in result.output


def test_what_a_link_led_to_was_copied_before(dense: Path, original: Path, secret: Path, tmp_path: Path) -> None:
    """The whole way: a licence that is a link to a private key, a model, and what would be published of it."""
    (dense / "LICENSE.txt").symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"LICENSE\.txt in .*outside the folder; put the file itself there"):
        convert(dense, tmp_path / "out", original / "text.txt")
    assert not (tmp_path / "out").exists()
    loaded = checkpoint.DenseModel(None, "dense", None, dense)  # type: ignore[arg-type]
    (tmp_path / "copy").mkdir()
    with pytest.raises(CheckpointError, match="outside the folder"):
        loaded.save_processor(tmp_path / "copy")
    assert not holds_the_secret(tmp_path / "copy")


def test_links_inside_the_folder_and_to_it_are_fine(dense: Path, original: Path, tmp_path: Path) -> None:
    (dense / "model.safetensors").rename(dense / "the-weights")
    (dense / "model.safetensors").symlink_to("the-weights")
    (dense / "NOTICE").symlink_to(dense / "config.json")
    (tmp_path / "alias").symlink_to(dense)
    convert(tmp_path / "alias", tmp_path / "out", original / "text.txt")
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert (tmp_path / "out" / "NOTICE").read_bytes() == (dense / "config.json").read_bytes()


def cached(dense: Path, root: Path) -> Path:
    """`dense` as the Hub's cache keeps it: links to blobs."""
    snapshot = root / "models--ada--dense" / "snapshots" / ("a" * 40)
    blobs = root / "models--ada--dense" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(dense.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_the_cache_of_the_hub_is_made_of_links(dense: Path, secret: Path, tmp_path: Path) -> None:
    snapshot = cached(dense, tmp_path / "hub")
    (tmp_path / "alias").symlink_to(tmp_path / "hub")
    checkpoint.load_dense(snapshot)
    checkpoint.load_dense(tmp_path / "alias" / "models--ada--dense" / "snapshots" / ("a" * 40))
    (snapshot / "LICENSE").symlink_to("../../blobs/key")
    (snapshot / "../../blobs/key").symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"LICENSE in .* is a link to a file outside the folder"):
        checkpoint.load_dense(snapshot)
    (snapshot / "LICENSE").unlink()
    shutil.move(snapshot.parents[1] / "blobs", tmp_path / "elsewhere")
    (snapshot.parents[1] / "blobs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="outside the folder"):
        checkpoint.load_dense(snapshot)


def test_templates_in_a_linked_folder(dense: Path, secret: Path) -> None:
    (dense / "additional_chat_templates").symlink_to(secret.parent / "outside")
    with pytest.raises(CheckpointError, match=r"additional_chat_templates/more\.txt in .* outside the folder"):
        checkpoint.load_dense(dense)


def test_a_tokenizer_config_cannot_name_files_elsewhere(
    dense: Path, original: Path, secret: Path, tmp_path: Path
) -> None:
    """Whatever transformers makes of such a name, nothing of the file is in the output."""
    path = dense / "tokenizer_config.json"
    named = dict.fromkeys(("vocab_file", "merges_file", "spm_file", "special_tokens_map_file", "chat_template"), "")
    named = {key: str(secret) for key in named}
    path.write_text(json.dumps(json.loads(path.read_text()) | named | {"name_or_path": str(secret)}))
    try:
        convert(dense, tmp_path / "out", original / "text.txt")
    except PeerifyError:
        assert not (tmp_path / "out").exists()
    else:
        assert not holds_the_secret(tmp_path / "out")


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("name", ["notes.txt", "sub/notes.txt", "tokenizer.json", "modeling_peer.py", "README.md"])
def test_push_sends_nothing_from_outside_the_folder(folder: Path, secret: Path, name: str, kind: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    plant(kind, folder / name, secret)
    with pytest.raises(PeerifyError, match=HOSTILE[kind] + "|is missing|is not the one of this peerify") as caught:
        publishing.push(folder, "ada/p", dry_run=True)
    assert "\n" not in str(caught.value)
    if name.endswith("notes.txt"):  # the model is whole without it
        sent = publishing.check_folder(folder, exclude=["*notes.txt"])
        assert not [file for file in sent if "notes" in file.name]


def test_push_does_not_follow_a_link_to_a_folder(folder: Path, secret: Path) -> None:
    (folder / "sub").symlink_to(secret.parent / "outside")
    with pytest.raises(PublishError, match=r"sub in .* is a link to a folder; .* or leave it out with --exclude"):
        publishing.check_folder(folder)
    assert "sub" not in [file.name for file in publishing.check_folder(folder, exclude=["sub"])]


def test_push_runs_no_code_of_a_stranger(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a folder with trust runs what its configs name, and generate.py without any being named."""
    ran = tmp_path / "ran"
    evil = f"from pathlib import Path\nPath({str(ran)!r}).write_text('x')\n"

    def refused(message: str) -> None:
        with pytest.raises(PublishError, match=message):
            publishing.push(folder, "ada/p", dry_run=True)
        assert not ran.exists()

    def edit(name: str, **values: Any) -> str:
        before = (folder / name).read_text()
        (folder / name).write_text(json.dumps(json.loads(before) | values))
        return before

    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(evil)
    refused(r"holds custom_generate/generate\.py, code that peerify did not write; read it, then pass --trust-remote")
    shutil.move(folder / "custom_generate", tmp_path / "code")
    (folder / "custom_generate").symlink_to(tmp_path / "code")
    with pytest.raises(PublishError, match=r"custom_generate in .* is a link to a folder"):
        publishing.push(folder, "ada/p", dry_run=True, exclude=["custom_generate"])
    (folder / "custom_generate").unlink()
    config = json.loads((folder / "config.json").read_text())
    for reference in ("evil.Model", "ada/other--modeling_peer.Model", 5):
        before = edit("config.json", auto_map=config["auto_map"] | {"AutoModelForCausalLM": reference})
        refused(r"config\.json names code other than modeling_peer\.py in its auto_map")
        (folder / "config.json").write_text(before)
    before = edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["ada/other--evil.T", None]})
    refused(r"tokenizer_config\.json names code of its own \(auto_map\)")
    (folder / "tokenizer_config.json").write_text(before)
    publishing._refuse_code(folder)


def test_the_files_of_a_folder_that_are_not_peerifys(folder: Path) -> None:
    assert files.foreign(folder) == []
    (folder / "sub").mkdir()
    for name in ("mine.txt", ".hidden", "sub/model.safetensors", "model-1.safetensors"):
        (folder / name).touch()
    assert sorted(files.foreign(folder)) == [".hidden", "mine.txt", "model-1.safetensors", "sub/model.safetensors"]
    (folder / "model-1.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    assert "model-00001-of-00002.safetensors" not in files.foreign(folder)


def test_what_people_wrote_into_the_card_stays_when_the_folder_is_replaced(
    dense: Path, original: Path, tmp_path: Path
) -> None:
    out, text = tmp_path / "out", original / "text.txt"
    convert(dense, out, text)
    first = (out / "README.md").read_text()
    convert(dense, out, text, overwrite=True)
    assert (out / "README.md").read_text() == first
    edited = first.replace("---\n", "---\nlicense: mit\n", 1).replace(
        "<!-- peerify:end -->", "<!-- peerify:end -->\nMine."
    )
    (out / "README.md").write_text(edited)
    convert(dense, out, text, overwrite=True)
    card = (out / "README.md").read_text()
    assert "license: mit" in card
    assert card.endswith("Mine.\n")
    shutil.copytree(dense, tmp_path / "another")
    with pytest.raises(OutputError, match=r"README\.md was edited, and is about another model; move it away"):
        convert(tmp_path / "another", out, text, overwrite=True)
    assert (out / "README.md").read_text() == card


def test_a_conversion_does_not_replace_what_it_reads(dense: Path, original: Path, tmp_path: Path) -> None:
    """`convert p/dense p --overwrite` left neither."""
    out = tmp_path / "models"
    (out / "peerify.json").write_text('{"peerify": "0.1.0", "source": {}}')
    before = sorted(out.rglob("*"))
    with pytest.raises(
        OutputError, match=r"models/dense is read and lies in .*models, which --overwrite would replace"
    ):
        convert(dense, out, original / "text.txt", overwrite=True)
    assert sorted(out.rglob("*")) == before
