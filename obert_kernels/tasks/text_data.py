"""Labelled texts: the demo's two sets, a local file, or a data set of the hub.

Every source ends as a :class:`TextData`: duplicates removed, and split by a hash of the text,
so that the same text falls into the same part on every machine and in every run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from .labels import in_order, plural, shorten

# Shares of train and dev; the rest is test.
_TRAIN, _DEV = 0.75, 0.10


@dataclass(frozen=True)
class Texts:
    """Labelled texts, or pairs of texts, in a fixed order.

    Attributes:
        texts: the (first) text of each example.
        labels: class index of each example.
        pairs: the second text of each example, or None for single texts.
    """

    texts: list[str]
    labels: list[int]
    pairs: list[str] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def subset(self, indices: Iterable[int]) -> Texts:
        """Return these examples, in this order."""
        indices = list(indices)
        return Texts(
            [self.texts[i] for i in indices],
            [self.labels[i] for i in indices],
            None if self.pairs is None else [self.pairs[i] for i in indices],
        )


@dataclass(frozen=True)
class TextData:
    """A classification task.

    Attributes:
        label_names: name of each class; the position is the class index.
        train: examples to fit to, and to take the gradients of.
        dev: examples to choose settings on.
        test: examples to report on.
        notes: what the user should know, such as how many duplicates were dropped.
    """

    label_names: list[str]
    train: Texts
    dev: Texts
    test: Texts
    notes: tuple[str, ...] = field(default=(), compare=False)

    def with_label_order(self, label_names: Sequence[str]) -> TextData:
        """Return the same task with its classes in the order of ``label_names``.

        Args:
            label_names: all classes of this task; there may be more, of which it has no texts.

        Raises:
            ValueError: a class of this task is missing.
        """
        index = {name: position for position, name in enumerate(label_names)}
        if not index.keys() >= set(self.label_names):
            raise ValueError(f"the classes are {self.label_names}, not {list(label_names)}")
        position = [index[name] for name in self.label_names]
        train, dev, test = (
            replace(part, labels=[position[label] for label in part.labels])
            for part in (self.train, self.dev, self.test)
        )
        return replace(self, label_names=list(label_names), train=train, dev=dev, test=test)

    def with_fewer_tests(self, count: int | None) -> TextData:
        """Return the same task with at most ``count`` test texts: those with the lowest hashes,
        in whatever order the data is and whatever the seed.

        Raises:
            ValueError: ``count`` is less than 1.
        """
        if count is not None and count < 1:
            raise ValueError(f"--max-test-texts must be at least 1, got {count}")
        if count is None or count >= len(self.test):
            return self
        seconds = self.test.pairs or [""] * len(self.test)
        rows = zip(self.test.texts, seconds, strict=True)
        shares = [_hash_share(Example(*row, "").key) for row in rows]
        kept = sorted(sorted(range(len(shares)), key=shares.__getitem__)[:count])
        note = f"accuracies are on {count:,} of the {len(self.test):,} test texts: --max-test-texts"
        return replace(self, test=self.test.subset(kept), notes=(*self.notes, note))


@dataclass(frozen=True)
class Example:
    """A text, or a pair of texts, and the name of its class."""

    text: str
    pair: str | None
    label: str

    @property
    def key(self) -> str:
        """What makes two examples the same text: case and white space aside."""
        parts = (self.text,) if self.pair is None else (self.text, self.pair)
        return "\0".join(" ".join(part.casefold().split()) for part in parts)


def assemble(
    source: str,
    parts: Mapping[str, list[Example]],
    class_names: Sequence[str] | None = None,
    notes: Iterable[str] = (),
) -> TextData:
    """Remove duplicates, index the classes and bring the parts into train, dev and test.

    Args:
        source: what errors call the data.
        parts: examples by the names of the source's parts.
        class_names: all classes, in the source's own order, where it has one.
        notes: what the user should know already.
    """
    train, dev, test = _three_parts({part: rows for part, rows in parts.items() if rows})
    known = _Known()
    # Tests first: a text that is in two parts stays where it is only measured.
    test, dev, train = (known.fresh(part) for part in (test, dev, train))
    present = {row.label for row in (*train, *dev, *test)}
    names = list(class_names or in_order(present))
    total = len(train) + len(dev) + len(test)
    if not total:
        raise ValueError(f"{source} holds no rows with a text and a class")
    if len(present) < 2 or len(present) > max(2, total // 2):
        raise ValueError(
            f"the label column of {source} holds {len(present)} classes over {total} different "
            "texts: that is no classification task, name another column with --label-column"
        )
    if not train or not test:
        raise ValueError(
            f"{source} is too small: {len(train)} texts to train and {len(test)} to test on"
            + "".join(f"; {note}" for note in known.notes())
        )
    index = {name: position for position, name in enumerate(names)}
    said = [*notes, *known.notes()]
    unseen = present - {row.label for row in train}
    if unseen:
        said.append(f"no text to train has the class {shorten(in_order(unseen))}")
    return TextData(
        names, _texts(train, index), _texts(dev, index), _texts(test, index), notes=tuple(said)
    )


class _Known:
    """Texts that were seen, and how many came again."""

    def __init__(self) -> None:
        self._labels: dict[str, str] = {}
        self._repeated = self._elsewhere = self._contradict = 0

    def fresh(self, rows: list[Example]) -> list[Example]:
        """Return the rows of a part whose texts did not come before."""
        fresh: dict[str, Example] = {}
        for row in rows:
            key = row.key
            label = self._labels.get(key)
            if label is None:
                self._labels[key] = row.label
                fresh[key] = row
                continue
            self._repeated += key in fresh
            self._elsewhere += key not in fresh
            self._contradict += label != row.label
        return list(fresh.values())

    def notes(self) -> list[str]:
        """Return what was left out, for the user."""
        found = []
        if self._repeated:
            found.append(f"{plural(self._repeated, 'duplicate')} dropped: every text is used once")
        if self._elsewhere:
            found.append(
                f"{plural(self._elsewhere, 'text')} dropped from train or held back: in a part "
                "that comes later as well"
            )
        if self._contradict:
            found.append(
                f"{plural(self._contradict, 'dropped text')} had another class than the one kept"
            )
        return found


def _three_parts(
    parts: Mapping[str, list[Example]],
) -> tuple[list[Example], list[Example], list[Example]]:
    """Use the source's own parts where it has them, else a hash of the text."""
    if len(parts) <= 1:
        rows = next(iter(parts.values()), [])
        share = [_hash_share(row.key) for row in rows]
        return (
            [row for row, at in zip(rows, share, strict=True) if at < _TRAIN],
            [row for row, at in zip(rows, share, strict=True) if _TRAIN <= at < _TRAIN + _DEV],
            [row for row, at in zip(rows, share, strict=True) if at >= _TRAIN + _DEV],
        )
    dev = next((rows for part, rows in parts.items() if part.startswith(("val", "dev"))), [])
    test = parts.get("test") or dev
    train = parts.get("train", [])
    if test is dev:  # the labels of the test part are hidden, or there is none
        edge = _TRAIN / (_TRAIN + _DEV)
        dev = [row for row in train if _hash_share(row.key) >= edge]
        train = [row for row in train if _hash_share(row.key) < edge]
    return train, dev, test


def _hash_share(key: str) -> float:
    """Return a number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") / 2**48


def _texts(rows: list[Example], index: Mapping[str, int]) -> Texts:
    pairs = [row.pair for row in rows if row.pair is not None]
    return Texts(
        texts=[row.text for row in rows],
        labels=[index[row.label] for row in rows],
        pairs=pairs or None,
    )
