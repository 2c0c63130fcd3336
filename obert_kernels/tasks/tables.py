"""Files to columns: every field as the file has it, or an error that names the line."""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from ..files import check_input_file
from .labels import plural

# Endings, without .gz; what fields of a line are divided by, where that is what a file holds.
DIVIDED = {".csv": ",", ".tsv": "\t"}
_JSON = (".json", ".jsonl")
ENDINGS = (*DIVIDED, *_JSON, ".parquet")
_DIVIDERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),  # begins like UTF-16
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Rows by column.

    Attributes:
        columns: name -> what holds a value for each row.
        class_names: column of class indices -> names of its classes, in the data's own order.
        repeated: names that two columns have.
        divider: what divides the fields of a line, "" for files without.
        hides_labels: a column of nothing but -1 holds no values: labels that are hidden.
    """

    columns: Mapping[str, Any]
    class_names: Mapping[str, list[str]] = field(default_factory=dict)
    repeated: frozenset[str] = frozenset()
    divider: str = ""
    hides_labels: bool = False

    def values(self, column: str) -> list[Any]:
        """Return a value for each row, None where there is none; names for class indices."""
        found = self.columns[column]
        values = found.to_pylist() if hasattr(found, "to_pylist") else list(found[:])
        names = self.class_names.get(column)
        if names is None:
            hidden = self.hides_labels and all(
                type(value) is int and value == -1 for value in values
            )
            return [None] * len(values) if hidden else values
        if any(value is not None and value >= len(names) for value in values):
            raise ValueError(f"the column {column!r} holds an index beyond its {len(names)} names")
        # -1 is the mark of data sets for labels that are hidden.
        return [None if value is None or value < 0 else names[int(value)] for value in values]

    def swallowed(self, label: str) -> str | None:
        """Return the start of a field of several lines that look like rows, None if there is none.

        A quotation mark that is not closed makes a field of all lines up to the next one.

        Args:
            label: column of the classes.
        """
        columns = list(self.columns.values())
        at = list(self.columns).index(label)
        several = {i for column in columns for i, value in enumerate(column) if "\n" in value}
        classes = {
            value.strip() for i, value in enumerate(columns[at]) if several and i not in several
        }
        for index in sorted(several):
            text = self.divider.join(column[index] for column in columns)
            rows = [line.split(self.divider) for line in text.split("\n")]
            full = all(len(row) == len(columns) for row in rows)
            if full and (not classes or all(row[at].strip('" \r') in classes for row in rows)):
                return text.partition("\n")[0]
        return None


def ending(path: Path) -> str:
    """Return what kind of file it is: the last part of its name, ``.gz`` aside."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return suffixes[0] if len(suffixes) == 2 and suffixes[1] == ".gz" else "".join(suffixes[-1:])


def read_table(path: Path, serves: Callable[[Sequence[str]], bool]) -> Table:
    """Read a CSV, TSV, JSON, JSON Lines or Parquet file.

    Args:
        path: of the file.
        serves: whether columns of these names are enough; decides what divides the fields of a
            line, where it is not what the ending says.

    Raises:
        OSError: it is no file or cannot be read.
        ValueError: its ending is unknown, or a line cannot be read as what it says.
    """
    check_input_file(path)
    kind = ending(path)
    if kind not in ENDINGS:
        sheet = kind in (".xlsx", ".xls", ".ods")
        hint = "save the sheet as CSV in UTF-8" if sheet else "rename a table to .csv or .tsv"
        raise ValueError(
            f"{path} has an unknown ending: supported are {', '.join(ENDINGS)}; {hint}"
        )
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    if kind == ".parquet":
        return _read_parquet(path)
    encoding = _encoding(path)
    try:
        if kind in _JSON:
            with _open(path, encoding) as stream:
                return _by_column(_json_rows(path, stream.read()))
        return _read_divided(path, encoding, DIVIDED[kind], serves)
    except UnicodeDecodeError as error:
        raise _wrong_encoding(path, encoding, error) from error
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} cannot be unpacked ({error}): is it cut off?") from error


def _open(path: Path, encoding: str) -> TextIO:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding=encoding, newline="")
    return path.open(encoding=encoding, newline="")


def _open_bytes(path: Path) -> Any:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def _encoding(path: Path) -> str:
    """Return the encoding that the first bytes declare; UTF-8 if they declare none."""
    with _open_bytes(path) as stream:
        try:
            start = stream.read(4096)
        except (EOFError, OSError) as error:
            raise ValueError(f"{path} cannot be unpacked ({error}): is it cut off?") from error
    for mark, encoding in _BYTE_ORDER_MARKS:
        if start.startswith(mark):
            return encoding
    if b"\0" in start:
        raise ValueError(
            f"{path} holds zero bytes: it is no text, or text in UTF-16; save it as UTF-8"
        )
    return "utf-8"


def _wrong_encoding(path: Path, encoding: str, error: UnicodeDecodeError) -> ValueError:
    where, byte = "", error.object[error.start]
    if encoding.startswith("utf-8"):
        with _open_bytes(path) as stream:
            for number, line in enumerate(stream, start=1):
                try:
                    line.decode(encoding if number == 1 else "utf-8")
                except UnicodeDecodeError as found:
                    where, byte = f"line {number} of ", found.object[found.start]
                    break
    return ValueError(
        f"{where}{path} is not in {encoding.upper().removesuffix('-SIG')} (byte 0x{byte:02x}): "
        "save the file as UTF-8, or convert it, say with iconv -f WINDOWS-1252 -t UTF-8"
    )


def _read_divided(
    path: Path, encoding: str, usual: str, serves: Callable[[Sequence[str]], bool]
) -> Table:
    with _open(path, encoding) as stream, _long_fields():
        start = next((line for line in stream if line.strip()), "")
    if not start:
        raise ValueError(f"{path} is empty")
    header, divider = _header(path, start, usual, serves)
    plain = divider == "\t" and _has_lone_quotes(path, encoding)
    rows = []
    with _open(path, encoding) as stream, _long_fields():
        reader = csv.reader(
            stream,
            delimiter=divider,
            quoting=csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL,
            # Where a blank follows each comma, quotation marks come after the blank.
            skipinitialspace=len(header) > 1 and all(name.startswith(" ") for name in header[1:]),
            strict=True,
        )
        try:
            for row in reader:
                if len(row) == len(header):
                    rows.append(row)
                elif row and (len(row) > 1 or row[0].strip()):
                    raise _wrong_width(path, reader.line_num, len(row), header, divider)
        except csv.Error as error:
            raise ValueError(
                f"line {reader.line_num} of {path} cannot be read ({error}): a quotation mark that "
                "opens a field must close it, and is doubled inside"
            ) from error
    names = [name.strip() for name in rows[0]]
    repeated = frozenset(name for name, count in Counter(names).items() if count > 1)
    columns: Iterator[Sequence[str]] = zip(*rows[1:], strict=True)
    by_name: dict[str, Sequence[str]] = dict(zip(names, columns, strict=False))
    return Table({name: by_name.get(name, ()) for name in names}, {}, repeated, divider)


def _header(
    path: Path, start: str, usual: str, serves: Callable[[Sequence[str]], bool]
) -> tuple[list[str], str]:
    """Return the names in the first line, and what divides them: the usual, if it serves."""
    dividers = [usual, *(divider for divider in _DIVIDERS if divider != usual)]
    found = {}
    for divider in dividers:
        try:
            found[divider] = next(csv.reader([start.rstrip("\r\n")], delimiter=divider))
        except csv.Error as error:
            raise ValueError(f"line 1 of {path} cannot be read ({error})") from error
    serving = [d for d in dividers if serves([name.strip() for name in found[d]])]
    divider = next(iter(serving), usual)
    return found[divider], divider


def _wrong_width(
    path: Path, line: int, width: int, header: Sequence[str], divider: str
) -> ValueError:
    more = width > len(header)
    return ValueError(
        f"line {line} of {path} has {plural(width, 'field')}, its first line {len(header)} "
        f"({', '.join(name.strip() for name in header)}): "
        + (
            f"put texts that hold {_DIVIDERS[divider]} in quotation marks, and end no line in one"
            if more
            else "put texts of several lines in quotation marks; is the line cut off?"
        )
    )


@contextmanager
def _long_fields() -> Iterator[None]:
    """Without the csv module's limit of 131,072 characters."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _has_lone_quotes(path: Path, encoding: str) -> bool:
    """Return whether quotation marks are nothing but text: read as such they would join lines."""
    with _open(path, encoding) as stream:
        lines = [line for line in stream if line.strip()]
    if len({line.count("\t") for line in lines}) > 1:
        return False
    try:
        with _long_fields():
            read = csv.reader(lines, delimiter="\t", strict=True)
            return len(lines) > sum(1 for row in read if row)
    except csv.Error:  # no writer of quoted fields has made them
        return True


def _json_rows(path: Path, text: str) -> list[Any]:
    """Return rows from a list of objects, from an object on each line, or from columns."""
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    by_lines = bool(lines) and not lines[0][1].lstrip().startswith("[")
    if by_lines and len(lines) > 1:  # is the first line whole, or the start of an object?
        try:
            json.loads(lines[0][1])
        except ValueError:
            by_lines = lines[1][1].lstrip().startswith("{")
        except RecursionError:
            pass
    if by_lines and len(lines) > 1:
        rows: Any = [_parse(path, line, number) for number, line in lines]
    else:
        content = _parse(path, text)
        rows = _rows_of_columns(content) if isinstance(content, dict) else content
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(
            f'{path} does not hold rows: write an object such as {{"text": ..., "label": ...}} for '
            "each text, on a line of its own or in a list"
        )
    return rows


def _parse(path: Path, text: str, line: int | None = None) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_each_once)
    except ValueError as error:
        number = line or getattr(error, "lineno", None)
        where = f"line {number} of {path}" if number else f"{path}"
        raise ValueError(f"{where} is not JSON: {getattr(error, 'msg', error)}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has two values of one name")
    return found


def _rows_of_columns(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return rows of an object that holds columns, as lists or by row; itself if it is a row."""
    columns = list(content.values())
    if columns and all(isinstance(c, dict) and c.keys() == columns[0].keys() for c in columns):
        columns = [list(column.values()) for column in columns]
    lists = all(isinstance(column, list) for column in columns)
    if not columns or not lists or len({len(column) for column in columns}) > 1:
        return [content]
    return [dict(zip(content, row, strict=True)) for row in zip(*columns, strict=True)]


def _by_column(rows: Sequence[dict[str, Any]]) -> Table:
    names = dict.fromkeys(name for row in rows for name in row)
    return Table({name: [row.get(name) for row in rows] for name in names})


def _read_parquet(path: Path) -> Table:
    import pyarrow
    from pyarrow import parquet

    try:
        found = parquet.ParquetFile(path).read()
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} cannot be read as PARQUET: {reason}") from error
    names = found.column_names
    repeated = frozenset(name for name in names if names.count(name) > 1)
    columns = {name: found.column(index) for index, name in enumerate(names)}
    if b"huggingface" not in (found.schema.metadata or {}):
        return Table(columns, {}, repeated)
    import datasets

    return Table(columns, names_of_classes(datasets.Features.from_arrow_schema(found.schema)))


def names_of_classes(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the names of classes by column, for columns of class indices of a data set."""
    return {
        column: list(feature.names)
        for column, feature in features.items()
        if hasattr(feature, "names") and hasattr(feature, "int2str")
    }
