"""A classifier and the order of its classes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from tiny_text import save_model

from obert_kernels.commands.config import Settings
from obert_kernels.tasks import classification
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
    settings = Settings(
        str(save_model(tmp_path, head=True, classes=3)), "news", [0.5], tmp_path, max_length=16
    )
    given = TextData(names, PART, PART, PART)
    _, model, data = classification.load_classifier(settings, given)
    assert data == given
    lines = classification.describe(settings, model, data).splitlines()
    assert lines[1] == "news: 3 classes; 3 texts to train, 3 held back, 3 to test"
    assert lines[2:] == (
        [] if said is None else [f"LABEL_0, LABEL_1, ... of the model are taken for {said}"]
    )


def test_named_classes_are_brought_into_the_order_of_the_model(tmp_path: Path) -> None:
    folder = save_model(tmp_path, head=True, classes=3)
    path = folder / "config.json"
    for index, name in enumerate(("Sports", "World", "Business")):
        path.write_text(path.read_text().replace(f"LABEL_{index}", name))
    settings = Settings(str(folder), "news", [0.5], tmp_path, max_length=16)
    given = TextData(["world", "sports", "business"], PART, PART, PART)
    _, model, data = classification.load_classifier(settings, given)
    assert data.label_names == ["sports", "world", "business"] and data.train.labels == [1, 0, 2]
    assert len(classification.describe(settings, model, data).splitlines()) == 2
    with pytest.raises(ValueError, match="knows the classes Sports, World, Business, but news has"):
        classification.load_classifier(settings, replace(given, label_names=["a", "b", "c"]))
