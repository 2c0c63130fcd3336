"""Outcomes of trials on disk: a CSV that grows line by line and survives a crash; a table."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..files import read_json, write_json
from ..pruning.config import PruningConfig
from .outcome import GridPoint, Outcome, Scores, at_point, best_by_target, by_rank, number_or_word

CSV_FILE = "sweep.csv"
BASIS_FILE = "sweep.json"
TABLE_FILE = "sweep.md"

_COUNTS = ("num_grads", "texts_per_grad", "block_size")
_FIGURES = [field.name for field in fields(Outcome) if field.name not in ("config", "error")]

_SHARES = ("target", "sparsity", "dev_accuracy", "test_accuracy")

COLUMNS = ("selection", "update", "texts", *_COUNTS, "damping", *_FIGURES, "error")
# Of a table that was begun before remaining weights were fitted.
_EARLIER_COLUMNS = tuple(name for name in COLUMNS if name != "reconstruction_seconds")


class TrialTable:
    """The file ``sweep.csv``, a line for each finished trial.

    A line that was cut off, by a crash while it was written, is dropped.  A table that an earlier
    version began goes on in its own columns; a figure that it has no column for counts as none.

    Args:
        path: of the file; it is made with the first outcome.
        base: what all configurations have in common.

    Raises:
        ValueError: it holds something else.
    """

    def __init__(self, path: str | Path, base: PruningConfig) -> None:
        self.path = Path(path)
        if os.path.lexists(self.path) and not self.path.is_file():  # a pipe would be waited for
            raise ValueError(f"{self.path} is no file: choose another --output")
        self._columns = _drop_torn_line(self.path)
        self.outcomes = _read(self.path, base)

    def append(self, outcome: Outcome) -> None:
        """Add a line; when this returns it is on the disk."""
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, "", "ignore", lineterminator="\n")
        if not self.path.exists() or self.path.stat().st_size == 0:
            writer.writeheader()
        writer.writerow(_to_row(outcome))
        with self.path.open("a", encoding="utf-8", newline="") as stream:
            stream.write(text.getvalue())
            stream.flush()
            os.fsync(stream.fileno())
        self.outcomes.append(outcome)


def _drop_torn_line(path: Path) -> tuple[str, ...]:
    """Cut the file after its last line end, if a sweep wrote it; return its columns."""
    if not path.exists():
        return COLUMNS
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    for columns in (COLUMNS, _EARLIER_COLUMNS):
        header = f"{','.join(columns)}\n".encode()
        if content[: len(header)] == header[: len(content)]:
            if whole < len(content):
                with path.open("r+b") as stream:
                    stream.truncate(whole)
            return columns if whole else COLUMNS
    return COLUMNS


def _read(path: Path, base: PruningConfig) -> list[Outcome]:
    if not path.exists() or path.stat().st_size == 0:
        return []
    outcomes: dict[object, Outcome] = {}  # one of each: two commands may have worked side by side
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        try:
            if tuple(reader.fieldnames or ()) not in (COLUMNS, _EARLIER_COLUMNS):
                raise ValueError("other columns than a sweep writes")
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{path} has {error}: choose another --output") from error
        try:
            for row in reader:
                outcome = _from_row(row, base)
                outcomes[outcome.key] = outcome
        except (ValueError, TypeError, csv.Error) as error:
            raise ValueError(
                f"line {reader.line_num} of {path} cannot be read ({error}): delete it, and its "
                "trial is done again"
            ) from error
    return list(outcomes.values())


def _to_row(outcome: Outcome) -> dict[str, Any]:
    """None becomes an empty cell; numbers keep all their digits."""
    cells = {name: getattr(outcome, name) for name in (*_FIGURES, "error")}
    return {**outcome.point._asdict(), "texts": outcome.point.texts, **cells}


def _from_row(row: Mapping[str, str], base: PruningConfig) -> Outcome:
    counts = {name: int(row[name]) if row[name] else None for name in _COUNTS}
    damping = number_or_word(row["damping"]) if row["damping"] else None
    figures: dict[str, Any] = {
        name: float(row[name]) if row[name] else None for name in _FIGURES if name in row
    }
    for name in _SHARES:
        if figures[name] is not None and not 0 <= figures[name] <= 1:
            raise ValueError(f"{name} is {figures[name]}")
    found = GridPoint(row["selection"], row["update"], **counts, damping=damping)
    return Outcome(at_point(base, found), **figures, error=row["error"])


def check_basis(folder: Path, basis: Mapping[str, Any]) -> dict[str, Any] | None:
    """Compare what the trials of a folder depend on with what those to come do.

    Args:
        folder: the output folder.
        basis: name -> value, JSON-ready.

    Returns:
        What ``sweep.json`` holds, None if there is none yet; "dense" is a :class:`Scores`.

    Raises:
        ValueError: they differ, or there are trials without a basis.
    """
    path = folder / BASIS_FILE
    if not os.path.lexists(path):
        if (folder / CSV_FILE).exists():
            raise ValueError(
                f"{folder} has a {CSV_FILE} without {BASIS_FILE}: choose another --output"
            )
        return None
    try:
        content = read_json(path)
        known = dict(content["basis"])
        dense = content["dense"]
        loss = None if dense["dev_loss"] is None else float(dense["dev_loss"])
        scores = Scores(float(dense["dev_accuracy"]), loss, float(dense["test_accuracy"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not of a sweep: choose another --output") from error
    names = [name for name in {**known, **basis} if known.get(name) != basis.get(name)]
    if names:
        differences = "; ".join(
            _difference(name, known.get(name), basis.get(name)) for name in names
        )
        raise ValueError(
            f"{folder} holds trials of another sweep ({differences}): choose another --output to "
            "keep both"
        )
    return {**content, "dense": scores}


def _difference(name: str, before: Any, now: Any) -> str:
    if isinstance(now, str) and now.startswith("sha256:"):
        return f"{name} is not the same"
    return f"{name} was {before}, now {now}"


def write_basis(folder: Path, basis: Mapping[str, Any], **more: Any) -> None:
    """Write ``sweep.json``: the basis, and more that a later run may want to know."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / BASIS_FILE, {"basis": dict(basis), **more})


_HEADINGS = (
    "sparsity", "best", "selection", "update", "texts", "per gradient", "B", "damping",
    "held back", "loss", "test", "seconds",
)  # fmt: skip
_LEFT = {"selection", "update"}


def format_table(outcomes: Iterable[Outcome]) -> str:
    """Return a Markdown table, also to be read as it is: by sparsity, the best first and marked.

    "held back" and "test" are accuracies, "loss" is on the held-back texts, "seconds" those of
    a trial without its estimate.
    """
    outcomes = by_rank(outcomes)
    best = best_by_target(outcomes)
    rows = [_cells(outcome, outcome is best.get(outcome.target)) for outcome in outcomes]
    widths = [max(3, *map(len, column)) for column in zip(_HEADINGS, *rows, strict=True)]
    rules = [
        "-" * width if heading in _LEFT else "-" * (width - 1) + ":"
        for heading, width in zip(_HEADINGS, widths, strict=True)
    ]
    return "\n".join(_line(cells, widths) for cells in (_HEADINGS, rules, *rows))


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    placed = [
        cell.ljust(width) if heading in _LEFT else cell.rjust(width)
        for heading, cell, width in zip(_HEADINGS, cells, widths, strict=True)
    ]
    return f"| {' | '.join(placed)} |"


def _cells(outcome: Outcome, is_best: bool) -> list[str]:
    found = outcome.point
    return [
        f"{outcome.target:.1%}",
        "*" if is_best else "",
        found.selection,
        found.update,
        *(_count(x) for x in (found.texts, found.texts_per_grad, found.block_size)),
        _damping(outcome),
        "failed" if outcome.dev_accuracy is None else f"{outcome.dev_accuracy:.1%}",
        "" if outcome.dev_loss is None else f"{outcome.dev_loss:.3f}",
        "" if outcome.test_accuracy is None else f"{outcome.test_accuracy:.1%}",
        f"{outcome.trial_seconds:.0f}",
    ]


def _count(number: int | None) -> str:
    return "" if number is None else str(number)


def _damping(outcome: Outcome) -> str:
    asked = outcome.point.damping
    if asked is None:
        return ""
    if isinstance(asked, str):
        return asked if outcome.damping_used is None else f"{asked} {outcome.damping_used:.2g}"
    return f"{asked:g}"
