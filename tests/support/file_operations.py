"""Processes that end, or operations that fail, at the n-th change to a folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_CHANGES = {
    "open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link",
    "os.symlink", "os.chmod",
}  # fmt: skip
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Killed(BaseException):
    """The process has ended: nothing that runs afterwards changes a file."""


class _Watch:
    """Counts changes below a folder, and raises at one of them."""

    root = ""
    at = 0
    error: BaseException | None = None
    count = 0
    installed = False

    @classmethod
    def hook(cls, event: str, arguments: tuple[Any, ...]) -> None:
        if cls.error is None or event not in _CHANGES:
            return
        path = arguments[0]
        if isinstance(path, int) or (event == "open" and not arguments[2] & _WRITING):
            return
        path = os.fsdecode(path)
        if os.path.isabs(path) and not path.startswith(cls.root):
            return
        cls.count += 1
        if cls.count == cls.at or (cls.count > cls.at and isinstance(cls.error, Killed)):
            raise cls.error


@contextmanager
def failing(folder: Path, at: int, error: BaseException) -> Iterator[type[_Watch]]:
    """Raise ``error`` before change number ``at`` in ``folder``, from 1; if it is Killed, before
    each later one as well."""
    if not _Watch.installed:
        sys.addaudithook(_Watch.hook)
        _Watch.installed = True
    _Watch.root, _Watch.at, _Watch.count, _Watch.error = str(folder), at, 0, error
    try:
        yield _Watch
    finally:
        _Watch.error = None
