"""Labels as files have them, to classes: how numbers are written does not matter, doubt does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from obert_kernels.tasks.labels import class_names, in_order, shorten, written
from obert_kernels.tasks.readers import load_text_data


def lines(labels: Sequence[object], count: int = 60) -> str:
    rows = (f"text {index},{labels[index % len(labels)]}\n" for index in range(count))
    return "text,label\n" + "".join(rows)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["0.0", "1.0", "10.0", "2.0"], ["0", "1", "2", "10"]),
        (["0", "1.0", "1"], ["0", "1"]),
        (["01", "02", "10"], ["1", "2", "10"]),
        ([" 1", "0 "], ["0", "1"]),
        (["+1", "-1", "0"], ["-1", "0", "1"]),
        (["1e0", "2.00e+00"], ["1", "2"]),
        (["9007199254740993", "9007199254740992"], ["9007199254740992", "9007199254740993"]),
        (["9007199254740993.0", "1"], ["1", "9007199254740993"]),
        (["true", "FALSE"], ["False", "True"]),
        (["NA", "None", "yes"], ["NA", "None", "yes"]),
        (["1", "2", "other"], ["1", "2", "other"]),
        (["class10", "class2", "class1"], ["class1", "class2", "class10"]),
    ],
)
def test_classes_of_a_file(tmp_path: Path, labels: list[str], classes: list[str]) -> None:
    path = tmp_path / "a.csv"
    path.write_text(lines(labels))
    data = load_text_data(str(path))
    assert data.label_names == classes
    expected = class_names([label.strip() for label in labels], "label")
    for text, label in zip(data.train.texts, data.train.labels, strict=True):
        wanted = labels[int(text.split()[1]) % len(labels)].strip()
        assert data.label_names[label] == expected[wanted]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["01", "1", "2"], "the class 1 written as 01 and 1"),
        (["0.5", "1.0"], "the number 0.5: only classes are supported"),
        (["nan", "0", "1"], "numbers and 'nan': leave the field empty"),
        (["True", "1", "0"], "numbers and 'True'"),
    ],
)
def test_labels_in_doubt_are_refused(tmp_path: Path, labels: list[str], message: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(lines(labels))
    with pytest.raises(ValueError, match=f"the label column 'label' holds {message}"):
        load_text_data(str(path))


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([0.0, 1.0, 10.0, 2.0], ["0", "1", "2", "10"]),
        ([True, False], ["False", "True"]),
        ([1, None, "0", float("nan")], ["0", "1"]),
    ],
)
def test_classes_that_are_no_texts(tmp_path: Path, labels: list[Any], classes: list[str]) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"text": f"text {i}", "label": labels[i % len(labels)]} for i in range(60)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    data = load_text_data(str(path))
    assert data.label_names == classes
    missing = sum(label is None or label != label for label in labels) * 60 // len(labels)
    assert len(data.train) + len(data.dev) + len(data.test) == 60 - missing
    wanted = (f"{missing} rows without a text or a class left out",) if missing else ()
    assert data.notes == wanted


def test_what_is_no_class_is_refused() -> None:
    assert written(Decimal("3.0"), "label") == "3.0"
    for value, message in (
        (2.0**53, "which stands for several whole numbers"),
        ([1, 2], "values of the type list: only one class for each text"),
        (b"a", "values of the type bytes"),
    ):
        with pytest.raises(ValueError, match=message):
            written(value, "label")


def test_a_number_nobody_can_hold_is_a_name() -> None:
    assert class_names(["1e999999999", "1"], "label") == {"1e999999999": "1e999999999", "1": "1"}
    assert in_order(["b", "a10", "a9", "10", "9", "-1"]) == ["-1", "9", "10", "a9", "a10", "b"]


def test_names_send_no_escapes_to_a_terminal() -> None:
    assert shorten(["\x1b[31mred", "größe"]) == "'\\x1b[31mred', größe"
