"""Folders and files appear whole or not at all, and replace nothing but what was written here."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from obert_kernels.files import (
    check_replaceable,
    check_room,
    locked,
    read_json,
    recover,
    try_writing,
    whole_folder,
    write_json,
)


def save(folder: Path, content: str = "old") -> Path:
    with whole_folder(folder) as fresh:
        (fresh / "config.json").write_text("{}")
        (fresh / "model.safetensors").write_text(content)
        write_json(fresh / "report.json", {"settings": content, "increase": float("nan")})
    return folder


def content_of(folder: Path) -> str:
    return (folder / "model.safetensors").read_text()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("call", [1, 2])
def test_failures_between_the_renames_leave_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, call: int
) -> None:
    folder = save(tmp_path / "half")
    real, calls = Path.rename, []

    def rename(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) == call:
            raise error
        return real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(type(error)):
            save(folder, "new")
    assert content_of(folder) == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["half"]


def test_the_old_is_never_deleted_while_nothing_is_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rename but the first fails: not even putting it back works."""
    folder = save(tmp_path / "half")
    real, calls = Path.rename, []

    def rename(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) > 1:
            raise OSError("the disk is gone")
        return real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(OSError, match=r"could not be put back .* it is in .*/old"):
            save(folder, "new")
    assert not folder.exists()
    (said,) = recover(tmp_path, "half")
    assert said.startswith(f"put back {folder}")
    assert content_of(folder) == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["half"]


def test_a_save_puts_back_what_a_killed_one_moved_away(tmp_path: Path) -> None:
    folder = save(tmp_path / "half")
    place = tmp_path / ".half-0a_b1c2d"
    (place / "fresh").mkdir(parents=True)
    folder.rename(place / "old")
    (place / "old" / "mine.txt").write_text("of a user")
    with pytest.raises(FileExistsError, match=r"half/mine\.txt was not written by"):
        save(folder, "new")
    assert content_of(folder) == "old" and not place.exists()


def add_file(folder: Path) -> None:
    (folder / "notes.txt").write_text("x")


def add_folder(folder: Path) -> None:
    (folder / "checkpoint-500").mkdir()


def add_link(folder: Path) -> None:
    (folder / "link").symlink_to(folder.parent)


def add_pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe")


def link_to_a_copy(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.rename(folder.parent / "kept")
    weights.symlink_to(folder.parent / "kept")


def train_on(folder: Path) -> None:
    (folder / "model.safetensors").write_text("low")


def write_into_the_report(folder: Path) -> None:
    report = folder / "report.json"
    report.write_text(json.dumps({**json.loads(report.read_text()), "note": "the best"}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_file, r"half/notes\.txt was not written by"),
        (add_folder, r"half/checkpoint-500 was not written by"),
        (add_link, "half/link was not written by"),
        (add_pipe, "half/pipe was not written by"),
        (link_to_a_copy, r"half/model\.safetensors has changed since"),
        (train_on, r"half/model\.safetensors has changed since"),
        (write_into_the_report, r"half/report\.json has changed since"),
        (lambda folder: (folder / "report.json").unlink(), "half exists and was not written by"),
        (lambda folder: (folder / "config.json").unlink(), "half exists and was not written by"),
        (lambda folder: (folder / "report.json").write_text("[" * 99999), "was not written by"),
        (lambda folder: (folder / "report.json").write_text('["files"]'), "was not written by"),
        (lambda folder: (folder / "report.json").write_text('{"a":' * 400 + "1" + "}" * 400),
         "was not written by"),
        (lambda folder: (folder / "report.json").write_text('{"files": {"../x": 3}}'),
         r"config\.json was not written by"),
    ],
)  # fmt: skip
def test_what_a_user_has_added_or_changed_is_not_replaced(
    tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    folder = save(tmp_path / "half")
    check_replaceable(folder)
    change(folder)
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(FileExistsError, match=message):
        save(folder, "new")
    assert sorted(path.name for path in folder.iterdir()) == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_is_added_while_the_save_goes_on_is_kept(tmp_path: Path) -> None:
    folder = save(tmp_path / "half")
    with pytest.raises(FileExistsError, match="notes"), whole_folder(folder) as fresh:
        (fresh / "config.json").write_text("{}")
        add_file(folder)
    assert (folder / "notes.txt").exists() and content_of(folder) == "old"


def test_folders_of_the_first_version_have_no_list(tmp_path: Path) -> None:
    """They are replaced if they hold nothing unknown, and nothing newer than their report."""
    folder = save(tmp_path / "half")
    report = folder / "report.json"
    content = json.loads(report.read_text())
    del content["files"]
    report.write_text(json.dumps(content))
    check_replaceable(folder)
    later = report.stat().st_mtime_ns + 10**9
    os.utime(folder / "model.safetensors", ns=(later, later))
    with pytest.raises(FileExistsError, match=r"model\.safetensors has changed"):
        check_replaceable(folder)
    os.utime(report, ns=(later, later))
    check_replaceable(folder)
    (folder / "plug.py").write_text("")
    with pytest.raises(FileExistsError, match=r"plug\.py was not written"):
        check_replaceable(folder)


def test_links_are_not_lost(tmp_path: Path) -> None:
    (tmp_path / "nowhere").symlink_to("/nonexistent/x")
    with pytest.raises(FileExistsError, match="nowhere is a link to nothing"):
        save(tmp_path / "nowhere")
    real = save(tmp_path / "disk" / "half")
    (tmp_path / "half").symlink_to(real)
    save(tmp_path / "half", "new")
    assert (tmp_path / "half").is_symlink() and content_of(real) == "new"


def test_folders_that_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for folder in (".", tmp_path / "here", "/", "/proc"):
        with pytest.raises(FileExistsError, match="cannot be replaced: choose a folder inside"):
            check_replaceable(folder)


def test_one_save_at_a_time(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "half") as fresh:
        (fresh / "config.json").write_text("{}")
        with pytest.raises(BlockingIOError, match="another process is saving"):
            save(tmp_path / "half")
        save(tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half", "other"]


def test_a_lock_ends_with_its_holder(tmp_path: Path) -> None:
    """Also where it is killed; and there is no file to remove."""
    with locked(tmp_path, "busy"), pytest.raises(BlockingIOError, match="busy"):
        locked(tmp_path, "busy").__enter__()
    code = (
        "import fcntl, os, sys, time; folder = os.open(sys.argv[1], os.O_RDONLY)\n"
        "fcntl.flock(folder, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError):
            locked(tmp_path, "busy").__enter__()
        other.kill()
    with locked(tmp_path, "busy"):
        assert list(tmp_path.iterdir()) == []


def test_leftovers_are_removed_and_others_are_not(tmp_path: Path) -> None:
    for name in (".half-abcdefgh", ".other-abcdefgh", ".half-abcdefghi", ".half"):
        (tmp_path / name / "fresh").mkdir(parents=True)
    (tmp_path / ".half-of_users" / "thesis").mkdir(parents=True)
    for name in (".report.json.incomplete", ".report.json-0123abcd", ".report.json"):
        (tmp_path / name).write_text("")
    assert len(recover(tmp_path, r"half|report\.json")) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".half", ".half-abcdefghi", ".half-of_users", ".other-abcdefgh", ".report.json",
    ]  # fmt: skip


def test_permissions_are_those_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        folder = save(tmp_path / "half")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.iterdir())}
    assert modes == {
        "half": 0o750, "config.json": 0o640, "model.safetensors": 0o640, "report.json": 0o640,
    }  # fmt: skip


def test_files_are_written_through_no_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    for name in ("a.json", ".a.json.incomplete"):
        (tmp_path / name).symlink_to(tmp_path / "precious")
    write_json(tmp_path / "a.json", {"x": 1})
    assert (tmp_path / "precious").read_text() == "kept"
    assert read_json(tmp_path / "a.json") == {"x": 1}


@pytest.mark.parametrize(
    "content", ["", "[" * 200_000, '{"x": NaN}', "1" * 5000, '"\ud800'.encode("utf-8", "replace")]
)
def test_json_of_others_is_refused_in_one_way(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"."):
        read_json(path)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(ValueError, match="is no file"):
            read_json(tmp_path / name)


def test_places_are_tried(tmp_path: Path) -> None:
    try_writing(tmp_path, 10**9)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match=r"."):
        try_writing(Path("/proc"))
    check_room(tmp_path, 1, "a file")
    with pytest.raises(OSError, match=r"has room for .* MB, but .* MB are needed for ten models"):
        check_room(tmp_path, 10**18, "ten models")
