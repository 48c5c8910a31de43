"""A folder is written whole or not at all, whatever happens in between."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from peerify.checkpoint import atomic as output
from peerify.checkpoint.atomic import atomic_folder
from peerify.errors import OutputError

WRITER = """
import sys, time
from peerify.checkpoint.atomic import atomic_folder
with atomic_folder(sys.argv[1], overwrite=True) as folder:
    (folder / "half").write_text("written")
    print("ready", flush=True)
    time.sleep(60)
"""


RECORD = '{"peerify": "0.1.0", "source": {}, "files": ["old"]}'


def tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def tree_bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """An output folder of an earlier run."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "peerify.json").write_text(RECORD)
    (folder / "old").write_text("old")
    return folder


def test_success(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "a" / "out") as folder:
        assert folder.parent == tmp_path / "a"
        (folder / "sub").mkdir()
        (folder / "sub" / "x").write_text("1")
        (folder / "private").touch(0o600)
        assert not (tmp_path / "a" / "out").exists()
    assert tree(tmp_path) == {"a/out/sub/x": "1", "a/out/private": ""}
    assert oct((tmp_path / "a" / "out" / "private").stat().st_mode) == oct(
        0o100000 | (tmp_path / "a").stat().st_mode & 0o666
    )


def test_relative_path_survives_chdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with atomic_folder("out") as folder:
        monkeypatch.chdir("/")
        (folder / "x").write_text("1")
    assert tree(tmp_path) == {"out/x": "1"}


def test_existing_folder_is_kept(old: Path) -> None:
    before = tree(old.parent)
    with pytest.raises(OutputError, match="--overwrite"), atomic_folder(old):
        pytest.fail("the work must not start")
    assert tree(old.parent) == before


def test_overwrite(old: Path) -> None:
    with atomic_folder(old, overwrite=True) as folder:
        (folder / "new").write_text("new")
        assert (old / "old").exists()
    assert tree(old.parent) == {"out/new": "new"}


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(errno.EPERM, "x")])
def test_failure_keeps_the_old_folder(old: Path, error: BaseException) -> None:
    before = tree(old.parent)
    with pytest.raises(type(error)) as raised, atomic_folder(old, overwrite=True) as folder:
        (folder / "new").write_text("new")
        raise error
    assert raised.value is error
    assert tree(old.parent) == before
    assert [path.name for path in old.parent.iterdir()] == ["out"]


def test_failure_removes_folders_it_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x"), atomic_folder(tmp_path / "a" / "b" / "out"):
        raise ValueError("x")
    assert list(tmp_path.iterdir()) == []


def test_overwrite_spares_what_peerify_did_not_write(old: Path) -> None:
    (old / "peerify.json").unlink()
    with pytest.raises(OutputError, match="not written by peerify"), atomic_folder(old, overwrite=True):
        pytest.fail("the work must not start")
    (old / "old").unlink()
    with atomic_folder(old, overwrite=True) as folder:  # an empty folder is no loss
        (folder / "x").write_text("1")
    assert tree(old) == {"x": "1"}


def test_target_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("file", "link"):
        with pytest.raises(OutputError, match="not a folder"), atomic_folder(tmp_path / name, overwrite=True):
            pytest.fail("the work must not start")


@pytest.mark.parametrize("place", ["file/out", "file/deep/out", "/proc/nothing/out", "x" * 300])
def test_unwritable_place(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=r"cannot be written|not a usable path"), atomic_folder(tmp_path / place):
        pytest.fail("the work must not start")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_parent(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"), atomic_folder(tmp_path / "out"):
        pytest.fail("the work must not start")


def test_disk_full(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(old.parent)
    with (
        pytest.raises(OutputError, match="disk is full"),
        atomic_folder(old, overwrite=True) as folder,
    ):
        (folder / "x").write_text("1")
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "y"))
    huge = atomic_folder(old, overwrite=True, expected_bytes=10**18)
    with pytest.raises(OutputError, match="free some space"), huge:
        pytest.fail("the work must not start")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(output.os, "fsync", full)
    with pytest.raises(OutputError, match="disk is full"), atomic_folder(old, overwrite=True) as folder:
        (folder / "x").write_text("1")
    assert tree(old.parent) == before


def test_disk_really_full(tmp_path: Path) -> None:
    """safetensors reports a full disk in an error type of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        with pytest.raises(OutputError, match="disk is full"), atomic_folder(disk / "out") as folder:
            save_file({"x": torch.zeros(100_000)}, folder / "model.safetensors")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_killed_run(old: Path, kill: signal.Signals) -> None:
    before = tree(old)
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(old)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    process.send_signal(kill)
    process.wait()
    process.stdout.close()
    assert tree(old) == before
    left = [path.name for path in old.parent.iterdir() if path != old]
    assert left == ([f".out.tmp-{process.pid}"] if kill == signal.SIGKILL else [])
    with atomic_folder(old, overwrite=True) as folder:
        assert [path for path in old.parent.iterdir() if path not in (old, folder)] == []
        (folder / "new").write_text("new")
    assert tree(old.parent) == {"out/new": "new"}


def test_killed_between_the_two_renames(old: Path) -> None:
    """The old folder had been moved aside and the new one was not yet there: the old one comes back."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    old.rename(old.with_name(f".out.old-{process.pid}"))
    old.with_name(f".out.tmp-{process.pid}").mkdir()
    with pytest.raises(OutputError, match="exists"), atomic_folder(old):
        pytest.fail("the work must not start")
    assert tree(old.parent) == {"out/peerify.json": RECORD, "out/old": "old"}


def test_other_live_run_is_left_alone(old: Path) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(old)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert other.stdout
        assert other.stdout.readline() == "ready\n"
        with atomic_folder(old, overwrite=True) as folder:
            (folder / "peerify.json").write_text("mine")
        assert (old.parent / f".out.tmp-{other.pid}" / "half").exists()
    finally:
        other.send_signal(signal.SIGINT)
        other.wait()
        if other.stdout:
            other.stdout.close()
    assert tree(old.parent) == {"out/peerify.json": "mine"}


def test_what_was_made_is_kept_where_something_else_appeared_meanwhile(tmp_path: Path) -> None:
    kept = f"out-{os.getpid()}"
    with (
        pytest.raises(OutputError, match=rf"out exists; .*; what was made lies in .*{kept}"),
        atomic_folder(tmp_path / "out") as folder,
    ):
        (folder / "x").write_text("1")
        (tmp_path / "out").mkdir()
    assert tree(tmp_path) == {f"{kept}/x": "1"}


@pytest.mark.parametrize("marker", ["", "{}", "[]", "{bad", '{"peerify": 1, "source": {}}', "[" * 100_000, "\udcff"])
def test_a_marker_that_peerify_did_not_write_counts_for_nothing(old: Path, marker: str) -> None:
    (old / "peerify.json").write_bytes(os.fsencode(marker))
    before = tree_bytes(old)
    with pytest.raises(OutputError, match=r"no valid peerify\.json"), atomic_folder(old, overwrite=True):
        pytest.fail("the work must not start")
    assert tree_bytes(old) == before


@pytest.mark.parametrize("name", ["notes.txt", "sub/notes.txt", ".git/config", ".env"])
def test_overwrite_names_files_of_other_people(old: Path, name: str) -> None:
    (old / name).parent.mkdir(exist_ok=True)
    (old / name).write_text("mine")
    before = tree(old)
    with pytest.raises(OutputError, match=rf"holds {name}, which peerify did not write"):
        output.check_target(old, overwrite=True)
    with pytest.raises(OutputError, match="move it away"), atomic_folder(old, overwrite=True):
        pytest.fail("the work must not start")
    assert tree(old) == before


def test_overwrite_does_not_take_a_link_for_a_file_of_its_own(old: Path) -> None:
    (old / "README.md").symlink_to(old / "old")
    with pytest.raises(OutputError, match=r"holds README\.md, which"):
        output.check_target(old, overwrite=True)


@pytest.mark.parametrize("place", [".", "..", "/", "~", "", "sub/.."])
def test_an_output_that_is_or_holds_where_one_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "here" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(OutputError, match="working directory or your home"), atomic_folder(place, overwrite=True):
        pytest.fail("the work must not start")


@pytest.mark.parametrize("place", ["a\0b", "~nosuchuser/x", "out/" + "x" * 300])
def test_an_output_that_no_file_can_be(place: str) -> None:
    with pytest.raises(OutputError, match=r"not a usable path|cannot be written") as caught, atomic_folder(place):
        pytest.fail("the work must not start")
    assert "\n" not in str(caught.value)
    assert "\0" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "dense", "dense/text.txt"])
def test_an_input_inside_the_output_is_not_replaced(old: Path, name: str) -> None:
    (old / "dense").mkdir()
    (old / "dense" / "text.txt").write_text("text")
    with pytest.raises(OutputError, match=r"is read and lies in .*, which --overwrite would replace"):
        output.check_target(old, overwrite=True, inputs=["elsewhere", old / name])


def test_a_process_that_runs_is_alive_and_one_that_ended_is_not() -> None:
    """A probe by signal 0 would end the process on Windows."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert output.alive(process.pid)
    process.communicate(b"\n")
    assert not output.alive(process.pid)
    assert not output.alive(os.getpid()), "an earlier process of the same number left it"
