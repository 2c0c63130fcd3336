"""What a user names as a file: looked at before it is opened."""

from __future__ import annotations

import os
import stat
from pathlib import Path

_KINDS = (
    (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
)  # fmt: skip


def expanded(path: str | Path) -> Path:
    """Return a path with the home folder in place of ``~``; a user nobody knows stays as it is."""
    return Path(os.path.expanduser(path))


def check_input_file(path: str | Path) -> None:
    """Check that a path leads to a file; pipes and devices may wait forever, or never end.

    Raises:
        FileNotFoundError: there is nothing.
        OSError: it is something else, or cannot be reached.
    """
    try:
        mode = Path(path).stat().st_mode
    except FileNotFoundError as error:
        if Path(path).is_symlink():  # as in a snapshot of the hub's cache that was copied alone
            raise FileNotFoundError(
                f"{path} is a link to nothing: copy the file it stands for"
            ) from error
        raise FileNotFoundError(f"there is no file {path}: check the path") from error
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror}") from error
    kind = next((name for is_kind, name in _KINDS if is_kind(mode)), None)
    if kind is not None:
        raise OSError(f"{path} is {kind}, not a file: give a file")
