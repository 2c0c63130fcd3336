"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPORT_FILE = "report.json"


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` as readable JSON; the file appears whole or not at all.

    Numbers that JSON does not have, infinity and NaN, become null.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.incomplete")
    temporary.write_text(
        json.dumps(_finite(content), indent=2, allow_nan=False) + "\n", encoding="utf-8"
    )
    temporary.replace(path)


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def check_replaceable(folder: str | Path) -> None:
    """Check that a checkpoint may be saved as ``folder``.

    Raises:
        FileExistsError: it exists and is neither empty nor a checkpoint that was saved here.
    """
    folder = Path(folder)
    if not folder.exists():
        return
    if folder.is_dir():
        ours = all((folder / name).is_file() for name in ("config.json", REPORT_FILE))
        if ours or not any(folder.iterdir()):
            return
    raise FileExistsError(
        f"{folder} exists and was not written by obert_kernels: choose another output folder or "
        "move it away"
    )


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """Give a temporary folder to write into, renamed to ``folder`` when the block ends well.

    With a ``report.json`` in it, a later call may replace it.

    Raises:
        FileExistsError: ``folder`` exists and is neither empty nor a checkpoint that was saved
            here.
    """
    folder = Path(folder)
    check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        fresh = Path(temporary) / "fresh"
        fresh.mkdir()
        yield fresh
        if folder.exists():
            folder.rename(Path(temporary) / "old")
        fresh.rename(folder)
