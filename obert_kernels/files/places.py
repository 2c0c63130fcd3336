"""Places to write to: tried before the work, and held for one process."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform != "win32":
    import fcntl


@contextmanager
def locked(folder: Path, message: str) -> Iterator[None]:
    """Hold a folder for this process; the lock leaves no file and ends with the process.

    Where the file system knows no locks, nothing is held.

    Raises:
        BlockingIOError: another process, or another part of this one, holds it: ``message``.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if sys.platform != "win32":
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BlockingIOError(message) from error
            except OSError:  # NFS without a lock service, for example
                pass
        yield
    finally:
        os.close(descriptor)


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """Make a folder and those above it; at the end those that were made and are empty are removed.

    Raises:
        OSError: it cannot be made.
    """
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()


def try_writing(folder: Path, size: int = 0) -> None:
    """Write a file of ``size`` bytes into a folder, rename it and remove it again.

    The file is sparse: the size meets limits of the process and of the file system, and takes no
    room.

    Raises:
        OSError: one of these is not possible.
    """
    place = Path(tempfile.mkdtemp(dir=folder, prefix=".try-"))
    try:
        with (place / "fresh").open("wb") as stream:
            stream.write(b"tried")
            stream.flush()
            os.fsync(stream.fileno())
            stream.truncate(max(size, 5))
        (place / "fresh").rename(place / "old")
    finally:
        shutil.rmtree(place, ignore_errors=True)


def check_room(folder: Path, size: int, what: str) -> None:
    """Check that the file system of an existing folder has ``size`` bytes left for ``what``.

    Raises:
        OSError: it has not.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(
            f"{folder} has room for {free / 1e6:,.1f} MB, but {size / 1e6:,.1f} MB are needed for "
            f"{what}: free some or choose another folder"
        )
