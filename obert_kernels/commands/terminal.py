"""How the commands meet a terminal: output that may end, errors of one line, interrupts."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand

from .progress_bars import ProgressBars


class _Lenient(io.FileIO):
    """A file descriptor that takes everything: what nobody reads any more is dropped."""

    def write(self, content: Any) -> int:
        """Return the number of bytes, written or not; raises nothing that the system says."""
        try:
            return super().write(content) or 0
        except OSError:
            return memoryview(content).nbytes


def outlive_readers() -> None:
    """Let the work go on when stdout or stderr ends: ``| head``, or a log on a full disk.

    Characters that the encoding does not have are written as escapes.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        try:
            if stream is None or stream.closed:
                raise OSError("closed by the caller")
            raw = _Lenient(stream.fileno(), "w", closefd=False)
            with contextlib.suppress(OSError):
                stream.flush()
        except io.UnsupportedOperation:  # no file, but a stream of somebody's who calls this
            continue
        except OSError:
            raw = _Lenient(os.open(os.devnull, os.O_WRONLY), "w", closefd=False)
        lenient = io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding=getattr(stream, "encoding", "utf-8"),
            errors="backslashreplace",
            line_buffering=True,
        )
        setattr(sys, name, lenient)


class PlainCommand(TyperCommand):
    """A command whose usage errors are without the prefix of the library that finds them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse; see the base class."""
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            error.message = error.message.removeprefix("Value error, ")
            raise


@contextmanager
def shown_work() -> Iterator[ProgressBars]:
    """Give bars for the work of a command; an interrupt ends it with what it says and code 130."""
    try:
        with ProgressBars() as bars:
            yield bars
    except KeyboardInterrupt as interrupt:
        typer.echo(f"\n{str(interrupt) or 'interrupted: nothing was written'}", err=True)
        raise typer.Exit(130) from interrupt


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def keep_traceback(error: BaseException) -> str:
    """Write a traceback into a file; return the file's name, or the traceback itself."""
    text = "".join(traceback.format_exception(error))
    try:
        descriptor, path = tempfile.mkstemp(prefix="obert-prune-", suffix=".log")
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(f"{sys.argv}\n\n{text}")
    except OSError:
        return f"this:\n{text}"
    return path
