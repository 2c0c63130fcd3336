"""The classes of the data and those of the model: which is which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .labels import canonical, is_number, shorten
from .text_data import TextData


class Matched(NamedTuple):
    """Data whose class indices are those of the model.

    Attributes:
        data: the texts; classes are in the order of the model.
        known: the model has these classes; False: it needs a new head.
        taken_for: how classes without a common name were brought together, "" if by their names.
    """

    data: TextData
    known: bool
    taken_for: str = ""


def model_classes(model: str, written: Mapping[str, Any]) -> list[str] | None:
    """Return the names of a model's classes in its order, None for those called LABEL_0, ...

    Args:
        model: what errors call it.
        written: its config.json.

    Raises:
        ValueError: the names do not say which class each output stands for.
    """
    names = _in_order(model, "id2label", _by_index(model, "id2label", written.get("id2label")))
    back = _by_name(model, written.get("label2id"))
    count = written.get("num_labels")
    if names is not None and count not in (None, len(names)):
        raise ValueError(
            f"config.json of {model} contradicts itself: num_labels is {count}, id2label has "
            f"{len(names)} classes"
        )
    if names is None or names == _numbered("LABEL_", len(names)):
        size = len(names) if names is not None else count or 2
        if back is None or any(name.startswith("LABEL_") for name in back):
            return None
        names = _in_order(model, "label2id", {index: name for name, index in back.items()})
        if len(back) != size or names is None or len(names) != size:
            raise ValueError(
                f"label2id in config.json of {model} has the classes {shorten(list(back))}, but "
                f"the model has {size} outputs"
            )
    elif back is not None and set(back) != set(_numbered("LABEL_", len(back))):
        other = [name for index, name in enumerate(names) if back.get(name) != index]
        if other or len(back) != len(names):
            raise ValueError(
                f"id2label and label2id in config.json of {model} contradict each other"
                + (f" on {shorten(other)}" if other else "")
                + ": correct the wrong one"
            )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"config.json of {model} gives several classes the name {shorten(twice)}: id2label "
            "must tell them apart"
        )
    return names


def match_classes(data: TextData, names: Sequence[str] | None, count: int) -> Matched | None:
    """Return the data with the class indices of the model, None if it has other classes.

    By name where the model has names; where one side has only numbers, or LABEL_0, ..., by number.

    Args:
        data: its classes are in an order of their own.
        names: what :func:`model_classes` returned.
        count: how many classes the model has.
    """
    given = data.label_names
    own = list(names) if names is not None else _numbered("LABEL_", count)
    by_name = _positions(given, own)
    if by_name is not None:
        return Matched(_reindexed(data, by_name, own), True)
    if len(given) != count:
        return None
    numbers = _numbered("", count)
    by_number = _positions(given, numbers)
    if by_number is not None and names is not None and any(map(is_number, names)):
        return None  # the numbers of the data are names of other outputs, or none
    if by_number is not None:
        said = f"0, 1, ... of the data are taken for {shorten(own)}" if names is not None else ""
        return Matched(_reindexed(data, by_number, numbers), True, said)
    # What counts from 0 and leaves one out is not numbered like the model, nor is LABEL_1, LABEL_2.
    shared = {canonical(name) for name in given} & {canonical(name) for name in own}
    if names is None and "0" not in given and not shared:
        return Matched(data, True, f"LABEL_0, LABEL_1, ... of the model are taken for "
                                   f"{shorten(given)}")  # fmt: skip
    return None


def _positions(given: Sequence[str], own: Sequence[str]) -> list[int] | None:
    """Return where each of the given names is among a model's, None if one is not there.

    Case, and how a number is written, count only where they tell names apart.
    """
    if set(given) <= set(own):
        return [list(own).index(name) for name in given]
    known, wanted = [canonical(name) for name in own], [canonical(name) for name in given]
    if len(set(known)) < len(known) or len(set(wanted)) < len(wanted):
        return None
    return [known.index(name) for name in wanted] if set(wanted) <= set(known) else None


def _reindexed(data: TextData, positions: Sequence[int], own: Sequence[str]) -> TextData:
    """Return the data with class i at ``positions[i]``, named as in the data where it is there."""
    names = list(own)
    for name, position in zip(data.label_names, positions, strict=True):
        names[position] = name
    return data.with_label_order(names)


def _by_index(model: str, field: str, found: Any) -> dict[int, str] | None:
    if found is None:
        return None
    if not isinstance(found, dict):
        raise _unreadable(model, field, found)
    try:
        return {int(index): class_name(name) for index, name in found.items()}
    except (ValueError, TypeError):
        raise _unreadable(model, field, found) from None


def _by_name(model: str, found: Any) -> dict[str, int] | None:
    if not found:
        return None
    if not isinstance(found, dict):
        raise _unreadable(model, "label2id", found)
    try:
        return {class_name(name): int(index) for name, index in found.items()}
    except (ValueError, TypeError):
        raise _unreadable(model, "label2id", found) from None


def _in_order(model: str, field: str, names: Mapping[int, str] | None) -> list[str] | None:
    if names is None:
        return None
    if sorted(names) != list(range(len(names))) or not names:
        raise ValueError(
            f"{field} in config.json of {model} numbers its {len(names)} classes "
            f"{shorten([str(index) for index in sorted(names)])}: they must be 0 to "
            f"{max(len(names) - 1, 0)}"
        )
    return [names[index] for index in range(len(names))]


def _unreadable(model: str, field: str, found: object) -> ValueError:
    return ValueError(
        f"{field} in config.json of {model} must be numbers and names of classes, "
        f"got {str(found)[:60]}"
    )


def class_name(value: object) -> str:
    """Return the name of a class: a whole number that was written as 3.0 is 3."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _numbered(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{index}" for index in range(count)]
