"""Files and data sets of the hub to examples: columns, missing values, names of classes."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .demo_sets import DEMO_PREFIX, load_demo_set
from .text_data import Example, TextData, assemble

if TYPE_CHECKING:
    import pandas

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
_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("read_csv", {"keep_default_na": False}),
    ".tsv": ("read_csv", {"keep_default_na": False, "sep": "\t"}),
    ".jsonl": ("read_json", {"lines": True}),
    ".json": ("read_json", {}),
    ".parquet": ("read_parquet", {}),
}


def load_text_data(
    source: str,
    text_column: str | None = None,
    pair_column: str | None = None,
    label_column: str | None = None,
) -> TextData:
    """Load a classification task.

    Args:
        source: ``"demo:trec"`` or ``"demo:mr"``, a CSV, TSV, JSON, JSONL or Parquet file, or a
            name for the ``datasets`` library (``"name"`` or ``"name:configuration"``).
        text_column: column of the text; found by its name if None.
        pair_column: column of a second text; common pairs are found by name if None and
            ``text_column`` is None too.
        label_column: column of the class; found by its name if None.

    Returns:
        The task.  A file, and a data set that has only one part, is split 75/10/15 % by a hash
        of the text; a data set with parts of its own keeps them.  Classes are in the order of
        the data set, where it has one, or of their numbers or the alphabet.

    Raises:
        FileNotFoundError: ``source`` is neither an existing file nor a data set.
        ValueError: the columns are not found or do not hold a classification task.
        DownloadError: the demo's texts cannot be downloaded.
        ModuleNotFoundError: a library of the ``cli`` extra is missing.
    """
    if source.startswith(DEMO_PREFIX):
        return load_demo_set(source.removeprefix(DEMO_PREFIX))
    path = Path(source).expanduser()
    class_names: dict[str, list[str]] = {}
    if path.is_file():
        frames = {"train": _read_file(path)}
    elif path.suffix.lower() in _READERS:
        raise FileNotFoundError(f"there is no file {source}: check the path")
    else:
        frames, class_names = _read_hub(source)
    columns = _choose_columns(frames, source, text_column, pair_column, label_column)
    parts = {part: _examples(frame, columns) for part, frame in frames.items()}
    return assemble(source, parts, class_names.get(columns[2]))


def _read_file(path: Path) -> pandas.DataFrame:
    import pandas

    try:
        reader, options = _READERS[path.suffix.lower()]
    except KeyError:
        raise ValueError(
            f"{path} has an unknown ending: supported are {', '.join(_READERS)}"
        ) from None
    try:
        if path.suffix.lower() == ".tsv" and _has_lone_quotes(path):
            options = {**options, "quoting": csv.QUOTE_NONE}
        return getattr(pandas, reader)(path, **options)
    except ValueError as error:  # the parsers' own errors are ValueErrors
        raise ValueError(f"{path} cannot be read as {path.suffix[1:].upper()}: {error}") from error


def _has_lone_quotes(path: Path) -> bool:
    """Return whether quotation marks are nothing but text: read as such they would join lines."""
    with path.open(encoding="utf-8", newline="") as stream:
        lines = [line for line in stream if line.strip()]
    if len({line.count("\t") for line in lines}) > 1:
        return False
    try:
        read = csv.reader(lines, delimiter="\t", strict=True)
        return len(lines) > sum(1 for row in read if row)
    except csv.Error:  # no writer of quoted fields has made them
        return True


def _read_hub(source: str) -> tuple[dict[str, pandas.DataFrame], dict[str, list[str]]]:
    """Read a data set by name; class indices become class names where it knows them.

    Returns:
        Its parts, and for each column of classes their names, in its own order.
    """
    import datasets

    name, _, configuration = source.partition(":")
    try:
        parts = datasets.load_dataset(name, configuration or None)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"{source} is neither a file nor a data set that could be loaded ({reason}): check "
            "the path or name, and the network"
        ) from error
    frames, class_names = {}, {}
    for part, rows in parts.items():
        frame = rows.to_pandas()
        for column, feature in rows.features.items():
            numbers = frame[column].dtype.kind in "iu"
            if numbers and (frame[column] == -1).all():  # the hub's mark for hidden labels
                frame[column] = None
            elif hasattr(feature, "names") and hasattr(feature, "int2str"):
                class_names[column] = list(feature.names)
                frame[column] = [  # NaN, where an index is missing, is not above 0 either
                    feature.names[int(index)] if index >= 0 else None for index in frame[column]
                ]
        frames[str(part)] = frame
    return frames, class_names


def _choose_columns(
    frames: Mapping[str, pandas.DataFrame],
    source: str,
    text: str | None,
    pair: str | None,
    label: str | None,
) -> tuple[str, str | None, str]:
    """Return the columns of the text, the second text (or None) and the label."""
    present = [str(column) for column in next(iter(frames.values())).columns]
    listing = f"{source} has the columns {', '.join(present)}"
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


def _examples(frame: pandas.DataFrame, columns: tuple[str, str | None, str]) -> list[Example]:
    """Turn rows into examples; rows without a text or a label are left out."""
    text, pair, label = columns
    seconds = [None] * len(frame) if pair is None else _values(frame[pair])
    examples = []
    for first, second, name in zip(
        _values(frame[text]), seconds, _values(frame[label]), strict=True
    ):
        if _is_missing(first) or _is_missing(name) or (pair is not None and _is_missing(second)):
            continue
        if isinstance(name, float):
            if not name.is_integer():
                raise ValueError(
                    f"the label column {label!r} holds the number {name}: only classes are "
                    "supported, name another column with --label-column"
                )
            name = int(name)
        examples.append(
            Example(str(first).strip(), None if pair is None else str(second).strip(), str(name))
        )
    return examples


def _values(column: pandas.Series) -> list[Any]:
    """Return them with None for what is missing, whatever marks it."""
    return [
        None if missing else value
        for value, missing in zip(column.tolist(), column.isna(), strict=True)
    ]


def _is_missing(value: Any) -> bool:
    return value is None or str(value).strip() == ""
