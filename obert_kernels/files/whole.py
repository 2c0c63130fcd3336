"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_LARGEST_JSON = 100_000_000  # bytes; a report of a large model has some hundred thousand


def write_whole(path: str | Path, content: bytes) -> None:
    """Write a file that appears whole or not at all; a link in its place is replaced.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    # O_EXCL follows no link, and the mode leaves the permissions to the umask.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with open(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` as readable JSON; the file appears whole or not at all.

    Numbers that JSON does not have, infinity and NaN, become null.
    """
    write_whole(path, json_text(content).encode())


def json_text(content: Mapping[str, Any]) -> str:
    """Return what :func:`write_json` writes."""
    return json.dumps(_finite(content), indent=2, allow_nan=False) + "\n"


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def read_json(path: str | Path) -> Any:
    """Return what a JSON file holds that somebody else may have changed.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no file, too large, nested too deeply, or no JSON.
        OSError: it cannot be read.
    """
    path = Path(path)
    if not path.is_file():  # a pipe would be waited for
        if os.path.lexists(path):
            raise ValueError(f"{path} is no file")
        raise FileNotFoundError(f"there is no {path}")
    if path.stat().st_size > _LARGEST_JSON:
        raise ValueError(f"{path} is too large")
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error


def _refuse(name: str) -> None:
    raise ValueError(f"JSON has no {name}")


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
