"""The output folder of a command: tried, held for this process and tidied up before the work."""

from __future__ import annotations

import contextlib
import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..files import locked, made, recover, try_writing

Echo = Callable[[str], object]


class Notes:
    """Says each note once."""

    def __init__(self, echo: Echo) -> None:
        self._echo, self._said = echo, set[str]()

    def __call__(self, *notes: str) -> None:
        """Say those that have not been said."""
        for note in notes:
            if note not in self._said:
                self._said.add(note)
                self._echo(f"note: {note}")


@contextmanager
def opened_output(folder: Path, names: str, note: Callable[[str], object]) -> Iterator[None]:
    """Make the output folder, try to write there, hold it, and tidy up after killed processes.

    A folder that is empty at the end is removed again if it was made here.

    Args:
        folder: of all that is written.
        names: regular expression of what is written into it.
        note: called with what was tidied up.

    Raises:
        OSError: it cannot be made or written, or another process works on it; the message names
            it and the remedy.
    """
    check_output(folder)
    with ExitStack() as stack:
        try:
            stack.enter_context(made(folder))
            busy = (
                f"another obert-prune works on --output {folder}: wait until it ends, or choose "
                "another folder"
            )
            stack.enter_context(locked(folder, busy))
            try_writing(folder)
        except BlockingIOError:
            raise
        except OSError as error:
            raise _not_writable(folder, error) from error
        for what in recover(folder, f"try|{names}"):
            note(what)
        yield


def check_output(folder: Path) -> None:
    """Check what can be checked of the output folder without touching it.

    Raises:
        NotADirectoryError: it or one above it is a file or a broken link.
        ValueError: no model can be saved under its name.
    """
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"--output {str(folder)!a} is not UTF-8: choose another name") from error
    for path in (folder, *folder.parents):
        if os.path.lexists(path) and not path.is_dir():
            what = "a file" if path.exists() else "a link to nothing"
            raise NotADirectoryError(f"--output {folder}: {path} is {what}, choose another folder")


def try_size(folder: Path, size: int) -> None:
    """Raise OSError if no file of ``size`` bytes may be written into the output folder."""
    try:
        try_writing(folder, size)
    except OSError as error:
        raise _not_writable(folder, error, f" a file of {size / 1e6:,.1f} MB") from error


def _not_writable(folder: Path, error: OSError, what: str = "") -> OSError:
    reason = error.strerror or str(error)
    return OSError(f"--output {folder} does not take{what or ' files'} ({reason}): choose another")


@contextmanager
def decoration(picture: Path, note: Callable[[str], object]) -> Iterator[None]:
    """Draw a picture in the body; whatever goes wrong is a note, for no result depends on it.

    There is none then: an earlier one, of other results, is removed.
    """
    with contextlib.suppress(OSError):
        picture.unlink(missing_ok=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        note(f"{picture.name} was not drawn ({type(error).__name__}: {reason})")


def check_drawing() -> None:
    """Raise ImportError if nothing can be drawn because matplotlib is missing."""
    with contextlib.suppress(ValueError, OSError):  # of its settings: a note once it draws
        importlib.import_module("matplotlib")
