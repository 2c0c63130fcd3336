"""A classifier and the order of its classes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from tiny_text import save_model

from obert_kernels.tasks.classification import ClassificationTask
from obert_kernels.tasks.load_classifier import load_classifier
from obert_kernels.tasks.model_files import find_model
from obert_kernels.tasks.text_data import TextData, Texts

PART = Texts(["a film", "the plot", "good"], [0, 1, 2])


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["world", "sports", "business"], "world, sports, business"),
        (["0", "1", "2"], None),
        (["LABEL_0", "LABEL_1", "LABEL_2"], None),
        (["1", "2", "3"], "1, 2, 3"),
    ],
)
def test_classes_without_names_are_taken_in_the_order_of_the_data(
    tmp_path: Path, names: list[str], said: str | None
) -> None:
    folder = str(save_model(tmp_path, head=True, classes=3))
    given = TextData(names, PART, PART, PART)
    loaded = load_classifier(find_model(folder), given, data_name="news", max_length=16)
    assert loaded.data == given
    task = ClassificationTask(
        folder, "news", loaded.model, loaded.tokenizer, loaded.data, notes=loaded.notes
    )
    lines = task.describe(None).splitlines()
    assert re.fullmatch(rf"{folder}: [0-9,]+ weights to prune", lines[0])
    assert lines[1] == "news: 3 classes; 3 texts to train, 3 held back, 3 to test"
    assert lines[2:] == (
        [] if said is None else [f"note: LABEL_0, LABEL_1, ... of the model are taken for {said}"]
    )


def test_named_classes_are_brought_into_the_order_of_the_model(tmp_path: Path) -> None:
    folder = save_model(tmp_path, head=True, classes=3)
    path = folder / "config.json"
    for index, name in enumerate(("Sports", "World", "Business")):
        path.write_text(path.read_text().replace(f"LABEL_{index}", name))
    given = TextData(["world", "sports", "business"], PART, PART, PART)
    how = {"data_name": "news", "max_length": 16}
    source = find_model(str(folder))
    loaded = load_classifier(source, given, **how)
    data = loaded.data
    assert data.label_names == ["sports", "world", "business"] and data.train.labels == [1, 0, 2]
    assert not loaded.notes and not loaded.taken_for
    task = ClassificationTask(str(folder), "news", loaded.model, loaded.tokenizer, data)
    assert len(task.describe(None).splitlines()) == 2
    with pytest.raises(ValueError, match="knows the classes Sports, World, Business, but news has"):
        load_classifier(source, replace(given, label_names=["a", "b", "c"]), **how)
