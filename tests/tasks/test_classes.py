"""Which class of the data is which of the model: by name, by number, or not at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from obert_kernels.tasks.class_order import check_order
from obert_kernels.tasks.classes import match_classes, model_classes
from obert_kernels.tasks.text_data import TextData, Texts


def numbered(names: list[Any]) -> dict[str, Any]:
    return {str(index): name for index, name in enumerate(names)}


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({}, None),
        ({"id2label": None, "num_labels": 3}, None),
        ({"id2label": numbered(["LABEL_0", "LABEL_1"])}, None),
        ({"id2label": numbered(["b", "a"])}, ["b", "a"]),
        ({"id2label": {"1": "a", "0": "b"}}, ["b", "a"]),
        ({"id2label": numbered([0.0, 2.0, 1])}, ["0", "2", "1"]),
        ({"id2label": numbered([True, False])}, ["True", "False"]),
        ({"id2label": numbered(["LABEL_1", "LABEL_0"])}, ["LABEL_1", "LABEL_0"]),
        # Either side may be left as transformers makes it.
        ({"id2label": numbered(["b", "a"]), "label2id": {"LABEL_0": 0, "LABEL_1": 1}}, ["b", "a"]),
        ({"label2id": {"a": 1, "b": 0}}, ["b", "a"]),
        ({"label2id": {"a": "1", "b": "0"}}, ["b", "a"]),
        (
            {"id2label": numbered(["LABEL_0", "LABEL_1"]), "label2id": {"a": 1, "b": 0}},
            ["b", "a"],
        ),
        ({"label2id": {"LABEL_0": 0, "LABEL_1": 1}}, None),
    ],
)
def test_names_of_a_models_classes(written: dict[str, Any], expected: list[str] | None) -> None:
    assert model_classes("bert", written) == expected


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"id2label": {"1": "a", "2": "b"}}, "numbers its 2 classes 1, 2: they must be 0 to 1"),
        ({"id2label": {"0": "a", "2": "b"}}, "numbers its 2 classes 0, 2"),
        ({"id2label": {"0": "a", "x": "b"}}, "must be numbers and names of classes"),
        ({"id2label": ["a", "b"]}, "must be numbers and names of classes"),
        ({"id2label": {}}, "numbers its 0 classes"),
        ({"id2label": numbered(["a", "a"])}, "gives several classes the name a"),
        ({"id2label": numbered(["a", "b"]), "num_labels": 3}, "num_labels is 3, id2label has 2"),
        ({"id2label": numbered(["a", "b"]), "label2id": {"a": 1, "b": 0}}, "contradict .* on a, b"),
        ({"id2label": numbered(["a", "b"]), "label2id": {"a": 0, "c": 1}}, "contradict .* on b"),
        ({"id2label": numbered(["a", "b"]), "label2id": {"a": 0, "b": 1, "c": 2}}, "contradict"),
        ({"id2label": numbered(["a", "b"]), "label2id": {"a": "x"}}, "label2id .* must be"),
        ({"label2id": {"a": 0, "b": 2}}, "label2id .* numbers its 2 classes 0, 2"),
        ({"label2id": {"a": 0, "b": 1, "c": 1}}, "has the classes a, b, c, but .* has 2 outputs"),
        ({"num_labels": 3, "label2id": {"a": 0, "b": 1}}, "has the classes a, b, but"),
    ],
)
def test_names_that_do_not_say_which_is_which(written: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        model_classes("bert", written)
    assert "bert" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("given", "own", "count", "order", "said"),
    [
        (["a", "b", "c"], ["c", "a", "b"], 3, [1, 2, 0], ""),
        (["A", "b", "C"], ["c", "a", "B"], 3, [1, 2, 0], ""),
        (["a", "c"], ["c", "a", "b"], 3, [1, 0], ""),  # of one class there are no texts
        (["a", "A"], ["A", "a"], 2, [1, 0], ""),
        (["0", "2", "10"], ["0.0", "10.0", "2.0"], 3, [0, 2, 1], ""),
        (["1", "2"], ["02", "01"], 2, [1, 0], ""),
        (["False", "True"], ["true", "false"], 2, [1, 0], ""),
        (["0", "1"], ["1", "0"], 2, [1, 0], ""),  # the model's own names, whatever they are
        (["LABEL_0", "LABEL_1"], None, 2, [0, 1], ""),
        (["0", "1", "2"], None, 3, [0, 1, 2], ""),
        (["0", "1", "2"], ["c", "a", "b"], 3, [0, 1, 2], "0, 1, ... of the data are taken for c,"),
        (["a", "b"], None, 2, [0, 1], "LABEL_0, LABEL_1, ... of the model are taken for a, b"),
        (["1", "2"], None, 2, [0, 1], "LABEL_0, LABEL_1, ... of the model are taken for 1, 2"),
    ],
)
def test_classes_are_brought_into_the_order_of_the_model(
    given: list[str], own: list[str] | None, count: int, order: list[int], said: str
) -> None:
    labels = list(range(len(given)))
    part = Texts(["t"] * len(given), labels)
    found = match_classes(TextData(given, part, part, part, ("a note",)), own, count)
    assert found is not None and found.known and found.data.notes == ("a note",)
    assert found.data.train.labels == found.data.test.labels == order
    assert [found.data.label_names[i] for i in order] == given
    assert len(found.data.label_names) == count
    assert found.taken_for.startswith(said) and bool(said) == bool(found.taken_for)


@pytest.mark.parametrize(
    ("given", "own", "count"),
    [
        (["a", "b"], ["c", "d"], 2),
        (["a", "d"], ["a", "b", "c"], 3),
        (["a", "A"], ["a", "b"], 2),
        (["Ab", "b"], ["aB", "AB"], 2),
        (["0", "1"], None, 3),
        (["0", "1"], ["a", "b", "c"], 3),
        (["0", "2"], None, 2),  # one is missing: of the model's two, which is 2?
        (["0", "1", "3"], None, 3),
        (["1", "2"], ["a", "b"], 2),
        (["0", "1"], ["1", "2"], 2),  # is 1 the model's first or second?
        (["0", "1"], ["0", "0.0"], 2),
        (["a", "b"], None, 3),
        (["LABEL_1", "LABEL_2"], None, 2),  # LABEL_1 is the model's second
    ],
)
def test_classes_in_doubt_are_not_matched(
    given: list[str], own: list[str] | None, count: int
) -> None:
    part = Texts(["t"] * len(given), list(range(len(given))))
    assert match_classes(TextData(given, part, part, part), own, count) is None


class Known(torch.nn.Module):
    """Gives text i of a batch class ``answers[i]``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, answers: torch.Tensor, labels: torch.Tensor) -> Any:
        class Output:
            logits = torch.nn.functional.one_hot(answers, 4) * self.weight

        return Output


@pytest.mark.parametrize(
    ("answers", "refused"),
    [
        ([0, 1, 2, 3], None),
        ([1, 0, 2, 3], "a for b, b for a"),
        ([0, 2, 3, 1], "b for d, d for c, c for b"),
        ([0, 0, 0, 0], None),  # learnt nothing
        ([1, 1, 2, 3], None),  # takes one class for another, as bad models do
        ([0, 2, 1, 3], "b for c, c for b"),
    ],
)
def test_predictions_show_an_order_that_is_wrong(answers: list[int], refused: str | None) -> None:
    labels = torch.arange(4).repeat(20)
    batch = {"answers": torch.tensor(answers).repeat(20), "labels": labels}
    if refused is None:
        check_order("bert", Known(), [batch], list("abcd"))
        return
    with pytest.raises(ValueError, match="in another order than those of the data") as raised:
        check_order("bert", Known(), [batch], list("abcd"))
    assert refused in str(raised.value)


def test_few_texts_show_nothing() -> None:
    batch = {"answers": torch.tensor([1, 0]).repeat(4), "labels": torch.arange(2).repeat(4)}
    check_order("bert", Known(), [batch], list("abcd"))


def test_less_than_chance_shows_an_order_that_is_wrong() -> None:
    """One class was never learnt: there is no circle."""
    answers, labels = torch.tensor([2, 2, 2, 0, 0, 0] * 20), torch.tensor([0, 1, 1, 2, 1, 1] * 20)
    with pytest.raises(ValueError, match="is right about 0 of 120 texts, where chance is 20"):
        check_order("bert", Known(), [{"answers": answers, "labels": labels}], list("abcd"))


def test_chance_shows_nothing() -> None:
    """A head that is random may well be wrong in three of five texts."""
    right, wrong = torch.tensor([0, 1] * 20), torch.tensor([1, 0] * 32)
    answers, labels = torch.cat([right, wrong]), torch.tensor([0, 1] * 52)
    check_order("bert", Known(), [{"answers": answers, "labels": labels}], list("abcd"))
    answers, labels = torch.cat([right, wrong.repeat(3)]), torch.tensor([0, 1] * 116)
    with pytest.raises(ValueError, match="in another order"):
        check_order("bert", Known(), [{"answers": answers, "labels": labels}], list("abcd"))
