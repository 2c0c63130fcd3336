"""Folders that appear whole or not at all, and replace nothing but what was written here.

A folder ``NAME`` is written as ``.NAME-xxxxxxxx/fresh`` beside it.  At the end an earlier one
moves to ``.NAME-xxxxxxxx/old``, the fresh one takes its place, and the rest is deleted.  So one of
the two is whole at every moment; where a process was killed between the two renames, the next
one to look there puts the old one back.

``report.json`` lists the files of the folder with their digests.  A folder that holds any other
file, or one that has changed, is not replaced.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .places import locked
from .whole import json_text, read_json, sha256_of, write_json

REPORT_FILE = "report.json"
_FILES = "files"  # the entry of the report

# What a folder without that entry, written by version 0.1.0, may hold.
_KNOWN = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab"
    r"|preprocessor_config)\.json|vocab\.txt|merges\.txt|chat_template\.jinja"
    r"|(spiece|spm|sentencepiece\.bpe|tokenizer)\.model|bpe\.codes"
    r"|(model|masks)(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
)

# Of the folders above, of single files, and of single files in version 0.1.0.
_LEFT = re.compile(r"\.(?P<name>.+)(-[0-9a-z_]{8}|\.incomplete)")


def check_replaceable(folder: str | Path) -> None:
    """Check that a checkpoint may be saved as ``folder``.

    Raises:
        FileExistsError: it exists and is neither empty nor a checkpoint that was saved here and
            holds nothing else; the message names what is in the way.
        PermissionError: it may not be changed.
    """
    folder = Path(folder)
    if folder.is_symlink() and not folder.exists():
        raise FileExistsError(f"{folder} is a link to nothing: remove it or choose another folder")
    if not folder.exists():
        return
    folder = folder.resolve()
    if os.path.samefile(folder, ".") or os.path.ismount(folder):
        raise FileExistsError(f"{folder} itself cannot be replaced: choose a folder inside it")
    if not folder.is_dir():
        raise _foreign(folder)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} is write-protected: choose another output folder")
    if any(folder.iterdir()):
        _check_own(folder)


def _check_own(folder: Path) -> None:
    """Raise FileExistsError unless a folder holds nothing but the unchanged files of a save."""
    report = folder / REPORT_FILE
    if not (folder / "config.json").is_file():
        raise _foreign(folder)
    try:
        content = read_json(report)
        listed = content.pop(_FILES, None)
        own_entry = _report_entry(content)
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise _foreign(folder) from error
    if listed is None and "settings" not in content:  # version 0.1.0 listed no files
        raise _foreign(folder)
    written = report.stat().st_mtime_ns
    for name, is_folder in _names_in(folder):
        path = folder / name
        if not isinstance(listed, dict):
            known = not is_folder and (name == REPORT_FILE or bool(_KNOWN.fullmatch(name)))
            same = _is_regular(path) and path.lstat().st_mtime_ns <= written
        elif is_folder:
            known = same = any(other.startswith(name) for other in listed)
        else:
            known = name in listed
            same = known and listed[name] == (own_entry if path == report else _entry(path))
        if not known:
            raise FileExistsError(
                f"{path} was not written by obert_kernels: move it away, or choose another output "
                "folder"
            )
        if not same:
            raise FileExistsError(
                f"{path} has changed since obert_kernels wrote it: move {folder} away, or choose "
                "another output folder"
            )


def _foreign(folder: Path) -> FileExistsError:
    return FileExistsError(
        f"{folder} exists and was not written by obert_kernels: choose another output folder or "
        "move it away"
    )


def _names_in(folder: Path) -> Iterator[tuple[str, bool]]:
    """All that a folder holds: paths relative to it, those of folders end with a slash."""
    for place, folders, files in os.walk(folder):
        where = Path(place).relative_to(folder)
        for name in sorted(folders):
            yield (where / name).as_posix() + "/", True
        for name in sorted(files):
            yield (where / name).as_posix(), False


def _is_regular(path: Path) -> bool:
    return stat.S_ISREG(path.lstat().st_mode)


def _entry(path: Path) -> dict[str, Any] | None:
    """Size and digest of a file; None of anything else, which equals no entry."""
    if not _is_regular(path):
        return None
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _report_entry(report: Mapping[str, Any]) -> dict[str, Any]:
    """Size and digest of what a report says beside its list of files."""
    text = json_text(report).encode()
    return {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}


def _seal(folder: Path) -> None:
    """List the files in the report, if there is one, and see to it that all are on the disk."""
    report = folder / REPORT_FILE
    paths = [folder / name for name, is_folder in _names_in(folder) if not is_folder]
    content = None
    with contextlib.suppress(FileNotFoundError, ValueError):  # then nothing may ever replace it
        content = read_json(report)
    if isinstance(content, dict):
        listed = {p.relative_to(folder).as_posix(): _entry(p) for p in paths if p != report}
        listed[REPORT_FILE] = _report_entry(content)
        write_json(report, {**content, _FILES: listed})
    for path in (*paths, folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """Give a temporary folder to write into, renamed to ``folder`` when the block ends well.

    With a ``report.json`` and a ``config.json`` in it, a later call may replace it as long as
    nothing is added or changed.

    Raises:
        FileExistsError: ``folder`` exists and is neither empty nor a checkpoint that was saved
            here and holds nothing else.
        BlockingIOError: another process is saving it.
    """
    folder = Path(folder)
    if not folder.is_symlink():
        recover(folder.parent, re.escape(folder.name))
    check_replaceable(folder)
    folder = folder.resolve()  # where a link stands, what it points to is replaced
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    with locked(place, _busy(folder)):
        try:
            fresh = place / "fresh"
            fresh.mkdir()
            yield fresh
            _seal(fresh)
            check_replaceable(folder)  # again: the block may have taken hours
            if folder.exists():
                folder.rename(place / "old")
            fresh.rename(folder)
        finally:
            _settle(place, folder)


def _busy(folder: Path) -> str:
    return f"another process is saving {folder}: wait until it ends"


def _settle(place: Path, folder: Path) -> bool:
    """Put back an old folder that was moved away for nothing; delete the rest of the place."""
    old = place / "old"
    back = old.is_dir() and not os.path.lexists(folder)
    if back:
        try:
            old.rename(folder)
        except OSError as error:
            raise OSError(f"{folder} could not be put back ({error}): it is in {old}") from error
    shutil.rmtree(place, ignore_errors=True)
    return back


def recover(parent: Path, names: str) -> list[str]:
    """Tidy up after processes that were killed while they wrote something in ``parent``.

    Args:
        parent: the folder above what was written.
        names: regular expression of the names of what was written.

    Returns:
        A sentence on each thing that was put back or removed.

    Raises:
        BlockingIOError: a process is still writing.
        OSError: something cannot be put back.
    """
    said = []
    for path in sorted(parent.iterdir()) if parent.is_dir() else ():
        match = _LEFT.fullmatch(path.name)
        if match is None or not re.fullmatch(names, match["name"]) or path.is_symlink():
            continue
        folder = parent / match["name"]
        if path.is_file():
            path.unlink(missing_ok=True)
            said.append(f"removed {path}")
        elif path.is_dir() and {inside.name for inside in path.iterdir()} <= {"fresh", "old"}:
            with locked(path, _busy(folder)):
                back = _settle(path, folder)
            said.append(f"put back {folder}" if back else f"removed {path}")
    return [f"{what}, which a stopped process had left" for what in said]
