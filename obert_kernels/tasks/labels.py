"""Labels of data to names of classes, and their order.

Numbers are one class however they are written: 3, "3", "3.0" and " 3" are the class "3".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

_NUMBER = re.compile(r"[+-]?(\d{1,40}\.?\d{0,40}|\.\d{1,40})(e[+-]?\d{1,2})?", re.IGNORECASE)
_BOOLEAN = ("false", "true")
# What programs write where a number is missing.
_MISSING = ("nan", "na", "n/a", "<na>", "null", "none", "nat", "?", "-", "nil", "#n/a")
# From here on not every whole number is a float.
_FIRST_GAP = 2**53


def written(value: Any, column: str) -> str:
    """Return a label as text; empty if it is missing.

    Raises:
        ValueError: it is neither a text, a number nor a truth value.
    """
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, float) and abs(value) >= _FIRST_GAP:
        raise ValueError(
            f"the label column {column!r} holds the float {value!r}, which stands for several "
            "whole numbers: write the classes as integers or names"
        )
    if isinstance(value, str | bool | int | float | Decimal):
        return str(value).strip()
    raise ValueError(
        f"the label column {column!r} holds values of the type {type(value).__name__}: only one "
        "class for each text is supported, as a name or a number"
    )


def class_names(labels: Iterable[str], column: str) -> dict[str, str]:
    """Return the class of each label as it is written.

    Numbers, if all are, lose leading zeros, signs and ".0"; truth values become "False" and
    "True"; names stay as they are.

    Raises:
        ValueError: a number is a fraction, or it is not clear which labels are one class.
    """
    distinct = sorted(set(labels))
    numbers = {label: Decimal(label) for label in distinct if _NUMBER.fullmatch(label)}
    others = [label for label in distinct if label not in numbers]
    what = f"the label column {column!r} holds"
    if distinct and all(label.casefold() in _BOOLEAN for label in distinct):
        return {label: label.capitalize() for label in distinct}
    doubtful = [label for label in others if label.casefold() in (*_MISSING, *_BOOLEAN, "inf")]
    if numbers and others and others == doubtful:
        raise ValueError(
            f"{what} numbers and {doubtful[0]!r}: leave the field empty where a text has no class, "
            "or give every class a name"
        )
    if others:
        return {label: label for label in distinct}
    fraction = next((label for label, number in numbers.items() if number % 1), None)
    if fraction is not None:
        raise ValueError(
            f"{what} the number {fraction}: only classes are supported, name another column with "
            "--label-column"
        )
    classes = {label: str(int(number)) for label, number in numbers.items()}
    spellings: dict[str, set[str]] = {}
    for label, name in classes.items():
        spellings.setdefault(name, set()).add(re.split(r"[.eE]", label.lstrip("+-"))[0])
    for name, ways in spellings.items():
        if len(ways) > 1 and any(re.match("0[0-9]", digits) for digits in ways):
            raise ValueError(
                f"{what} the class {name} written as {' and '.join(sorted(ways))}: write it in one "
                "way, or give the classes names"
            )
    return classes


def canonical(name: str) -> str:
    """Return a number as :func:`class_names` writes it, another name in small letters."""
    number = Decimal(name) if _NUMBER.fullmatch(name) else None
    return name.casefold() if number is None or number % 1 else str(int(number))


def is_number(name: str) -> bool:
    """Return whether a name is a number."""
    return _NUMBER.fullmatch(name) is not None


def in_order(names: Iterable[str]) -> list[str]:
    """Return names in the order of the alphabet, numbers in them in that of numbers."""
    return sorted(set(names), key=_order)


def _order(name: str) -> tuple[int, int, list[tuple[int, str]], str]:
    if re.fullmatch(r"-?[0-9]+", name):
        return 0, int(name), [], name
    pieces = re.split(r"([0-9]+)", name)
    return 1, 0, [(int(p[:40]) if i % 2 else 0, p) for i, p in enumerate(pieces)], name


def shorten(names: Sequence[str]) -> str:
    """Return the first names, and how many there are."""
    # Escapes of a terminal are shown, not sent there.
    shown = ", ".join(name if name.isprintable() else ascii(name) for name in names[:6])
    return f"{shown}, … ({len(names)})" if len(names) > 6 else shown


def plural(count: int, thing: str) -> str:
    """Return how many things there are, "1 text" or "2 texts"."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"
