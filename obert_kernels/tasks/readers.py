"""Files, folders and data sets of the hub to examples: columns, missing values, classes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..files import expanded
from . import labels
from .demo_sets import DEMO_PREFIX, load_demo_set
from .hub import hub_problem, without_hub
from .tables import DIVIDED, ENDINGS, Table, ending, names_of_classes, read_table
from .text_data import Example, TextData, assemble

_TEXT_NAMES = (
    "text", "sentence", "question", "review", "content", "utterance", "query", "headline",
    "comment", "tweet", "document",
)  # fmt: skip
_PAIR_NAMES = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"),
    ("question", "sentence"), ("text1", "text2"), ("text_a", "text_b"),
)  # fmt: skip
_LABEL_NAMES = (
    "label", "labels", "class", "category", "target", "sentiment", "coarse_label", "intent",
)  # fmt: skip
# Parts of the data in a folder, by their files' names without the ending.
_PARTS = {
    "train": "train", "validation": "dev", "valid": "dev", "val": "dev", "dev": "dev",
    "test": "test",
}  # fmt: skip
# Names of the hub; no path that begins with a dot or ends like a file is one.
_HUB_NAME = re.compile(r"(?!\.)[\w.-]+(/[\w.-]+)?(:[^/\s]+)?")


def load_text_data(
    source: str,
    text_column: str | None = None,
    pair_column: str | None = None,
    label_column: str | None = None,
) -> TextData:
    """Load a classification task.

    Args:
        source: ``"demo:trec"`` or ``"demo:mr"``; a CSV, TSV, JSON, JSONL or Parquet file; a folder
            with such files named train, validation and test; or a name for the ``datasets``
            library (``"name"`` or ``"name:configuration"``).
        text_column: column of the text; found by its name if None.
        pair_column: column of a second text; common pairs are found by name if None and
            ``text_column`` is None too.
        label_column: column of the class; found by its name if None.

    Returns:
        The task.  A file, and a data set that has only one part, is split 75/10/15 % by a hash
        of the text; a data set with parts of its own keeps them.  Classes are in the order of
        the data set, where it has one, or of their numbers or the alphabet.  Numbers are the same
        class however they are written: 3, "3" and 3.0.

    Raises:
        FileNotFoundError: ``source`` is neither an existing file nor a data set.
        OSError: it cannot be read, or is a pipe or a device.
        ValueError: the columns are not found or do not hold a classification task, or a line
            cannot be read; the message names it.
        DownloadError: the demo's texts cannot be downloaded.
        ModuleNotFoundError: a library of the ``cli`` extra is missing.
    """
    if source.startswith(DEMO_PREFIX):
        return load_demo_set(source.removeprefix(DEMO_PREFIX))
    given = (text_column, pair_column, label_column)
    tables = _read(source, given)
    names = list(next(iter(tables.values())).columns)
    columns = _choose_columns(names, source, *given)
    for part, table in tables.items():
        where = source if len(tables) == 1 else f"{source} ({part})"
        _check_columns(table, where, columns, given)
    notes = _other_candidates(names, columns, label_column)
    parts: dict[str, list[Example]] = {}
    for part, table in tables.items():
        parts[part], left_out = _examples(table, columns)
        if len(tables) > 1 and not parts[part] and not left_out:
            notes.append(f"the part {part} of {source} holds no rows: it is left out")
        if left_out:
            where = "" if len(tables) == 1 else f" of {part}"
            rows = labels.plural(left_out, "row")
            notes.append(f"{rows}{where} without a text or a class left out")
    own_order = _own_order(tables.values(), columns[2], source)
    if own_order is None:
        found = (row.label for examples in parts.values() for row in examples)
        named = labels.class_names(found, columns[2])
        parts = {
            part: [Example(row.text, row.pair, named[row.label]) for row in examples]
            for part, examples in parts.items()
        }
    return assemble(source, parts, own_order, notes)


def _read(source: str, given: tuple[str | None, str | None, str | None]) -> dict[str, Table]:
    """Return the parts of the data."""

    def serves(names: Sequence[str]) -> bool:
        try:
            _choose_columns(names, source, *given)
        except ValueError:
            return False
        return True

    if not source.strip():
        raise ValueError("the name of the data is empty: give a file or a name on the hub")
    path = expanded(source)
    if path.is_dir():
        files = _files_of_parts(path)
        return {part: read_table(file, serves) for part, file in files.items()} or _saved(path)
    looks_like_a_file = ending(path) in ENDINGS or not _HUB_NAME.fullmatch(source)
    if looks_like_a_file or path.exists() or path.is_symlink():
        return {"train": read_table(path, serves)}
    return _read_hub(source)


def _files_of_parts(folder: Path) -> dict[str, Path]:
    """Return a file for each part of the data that a folder holds."""
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        part = _PARTS.get(file.name.partition(".")[0].lower())
        if part is not None and ending(file) in ENDINGS:
            if part in found:
                raise ValueError(
                    f"{folder} holds both {found[part].name} and {file.name}: give one of them, or "
                    "keep one"
                )
            found[part] = file
    return found


def _saved(folder: Path) -> dict[str, Table]:
    """Read what ``save_to_disk`` of the ``datasets`` library has written."""
    if not any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        model = (folder / "config.json").is_file()
        hint = "it is a model's folder, and the model comes first; " if model else ""
        raise ValueError(
            f"{folder} is a folder without data: {hint}give a file, or a folder with files such as "
            "train.csv and test.csv"
        )
    import datasets

    try:
        return _tables(datasets.load_from_disk(str(folder)))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{folder} cannot be read as a saved data set: {error}") from error


def _read_hub(source: str) -> dict[str, Table]:
    """Read a data set by name."""
    import datasets

    name, _, configuration = source.partition(":")
    problem = hub_problem()
    try:
        with without_hub() if problem else nullcontext():
            return _tables(datasets.load_dataset(name, configuration or None))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = problem or (str(error) or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"{source} is neither a file nor a data set that could be loaded ({reason}): check "
            "the path or name, and the network"
        ) from error


def _tables(found: Any) -> dict[str, Table]:
    parts = found if isinstance(found, dict) else {"train": found}
    return {
        str(part): Table(
            {column: rows.with_format(None)[column] for column in rows.column_names},
            names_of_classes(rows.features),
            hides_labels=True,
        )
        for part, rows in parts.items()
    }


def _choose_columns(
    present: Sequence[str], source: str, text: str | None, pair: str | None, label: str | None
) -> tuple[str, str | None, str]:
    """Return the columns of the text, the second text (or None) and the label."""
    listing = f"{source} has the columns {labels.shorten(present)}"
    if ending(Path(source)) in DIVIDED:
        listing += " in its first line"
    for option, column in (("text", text), ("pair", pair), ("label", label)):
        if column is not None and column not in present:
            raise ValueError(f"there is no column {column!r} for --{option}-column: {listing}")
    lowered = {column.lower(): column for column in reversed(present)}
    if text is None:
        known_pairs = (two for two in _PAIR_NAMES if set(two) <= lowered.keys())
        found_pair = next(known_pairs, None) if pair is None else None
        if found_pair is not None:
            text, pair = (lowered[name] for name in found_pair)
        else:
            text = _first_known(_TEXT_NAMES, lowered, exclude=(pair, label))
    if text is None:
        raise ValueError(f"no column looks like the text: {listing}; name it with --text-column")
    if label is None:
        label = _first_known(_LABEL_NAMES, lowered, exclude=(text, pair))
    if label is None:
        raise ValueError(f"no column looks like the label: {listing}; name it with --label-column")
    if len({text, pair, label}) < 3:
        raise ValueError(f"text, pair and label must be different columns: {listing}")
    return text, pair, label


def _first_known(
    names: Sequence[str], lowered: Mapping[str, str], exclude: Sequence[str | None]
) -> str | None:
    found = (lowered[name] for name in names if name in lowered)
    return next((column for column in found if column not in exclude), None)


def _other_candidates(
    present: Sequence[str], columns: tuple[str, str | None, str], given: str | None
) -> list[str]:
    """Return a note if other columns have names of labels, too."""
    others = [name for name in present if name.lower() in _LABEL_NAMES and name not in columns]
    if given is not None or not others:
        return []
    return [f"classes are from the column {columns[2]}, not from {labels.shorten(others)}"]


def _check_columns(
    table: Table,
    source: str,
    columns: tuple[str, str | None, str],
    given: tuple[str | None, str | None, str | None],
) -> None:
    """Raise ValueError unless each column is there once, with every line a row of its own."""
    for column in columns:
        if column is None:
            continue
        if column not in table.columns:
            raise ValueError(
                f"{source} has no column {column!r}, as other parts have: it has "
                f"{labels.shorten(list(table.columns))}"
            )
        twins = [name for name in table.columns if name.lower() == column.lower()]
        if column in table.repeated or (len(twins) > 1 and column not in given):
            raise ValueError(f"{source} has two columns named {column!r}: rename one")
    field = table.swallowed(columns[2]) if table.divider else None
    if field is not None:
        raise ValueError(
            f"{source}: a quotation mark makes one field of several lines that look like rows, "
            f"from {field[:60]!r} on: close it, or double it if it is part of the text"
        )


def _own_order(tables: Iterable[Table], label: str, source: str) -> list[str] | None:
    """Return the classes in the data set's own order, None if it has none."""
    orders = [table.class_names.get(label) for table in tables]
    if all(order is None for order in orders):
        return None
    first = orders[0]
    if first is None or any(order != first for order in orders):
        raise ValueError(f"the parts of {source} do not have the same classes in {label!r}")
    if len(set(first)) < len(first):
        raise ValueError(f"two classes of {source} have one name: {labels.shorten(first)}")
    return first


def _examples(table: Table, columns: tuple[str, str | None, str]) -> tuple[list[Example], int]:
    """Turn rows into examples, with labels as they are written; count those left out because the
    text or the label is missing."""
    text, pair, label = columns
    texts = [_text(value, text) for value in table.values(text)]
    pairs = None if pair is None else [_text(value, pair) for value in table.values(pair)]
    names = [labels.written(value, label) for value in table.values(label)]
    seconds: Sequence[str | None] = [None] * len(texts) if pairs is None else pairs
    examples = [
        Example(first, second, name)
        for first, second, name in zip(texts, seconds, names, strict=True)
        if first and name and second != ""
    ]
    return examples, len(texts) - len(examples)


def _text(value: Any, column: str) -> str:
    """Return a text without blanks around it, empty if it is missing."""
    if isinstance(value, str):
        if not value.isascii():
            _check_characters(value, column)
        return value.strip()
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, bytes | list | tuple | dict):
        raise ValueError(
            f"the column {column!r} holds a {type(value).__name__} where a text should be: name "
            "another column with --text-column"
        )
    return str(value)


def _check_characters(value: str, column: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the column {column!r} holds half a character ({value[error.start]!a}) in "
            f"{value[:40]!a}: it was cut or wrongly decoded"
        ) from error
