"""Texts to the batches that gradients are taken from, and that the damping is chosen on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from .loaders import Batch, collator, encode, make_loader
from .text_data import TextData, Texts

Rows = list[dict[str, Any]]

# Tokens of a backward pass, for layers of 768: as much memory as a training step with 32 texts of
# 128 tokens.
_TOKENS_AT_ONCE = 4096
# Texts that a damping is judged on, and of them in a batch.
_TRIAL_TEXTS, _TRIAL_BATCH = 256, 64
# Texts that a model is tried on before anything is done with it, and those that its classes are.
_FIRST_TEXTS, _TEXTS_FOR_CLASSES = 8, 512
# Held back from the training texts where the data holds none back: a tenth, and no more than this.
_MOST_HELD_BACK = 2000


def tokens_at_once(hidden_size: int) -> int:
    """Return how many tokens a backward pass takes through layers of that size."""
    return max(1, _TOKENS_AT_ONCE * 768 // hidden_size)


def check_texts(samples_per_grad: int, texts: Texts, option: str = "samples_per_grad") -> None:
    """Raise ValueError if there are fewer texts than one gradient needs."""
    if samples_per_grad > len(texts):
        raise ValueError(
            f"a gradient of {samples_per_grad} texts cannot be taken from {len(texts)} texts: "
            f"use fewer texts per gradient ({option}) or more data"
        )


def fisher_batches(
    tokenizer: Any,
    texts: Texts,
    num_grads: int,
    samples_per_grad: int,
    *,
    max_length: int = 128,
    max_tokens: int = _TOKENS_AT_ONCE,
    steps: int = 1,
    by_length: bool = True,
    seed: int = 0,
) -> list[Batch]:
    """Return batches of texts for the Fisher, drawn at random, every text used once before any is
    used twice.

    Each batch holds the texts of several gradients, those of one gradient together, for
    ``samples_per_grad``.  Texts of about the same length share a batch, so that
    little is padded.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: the texts the model was fitted to.
        num_grads: number of gradients, of each step.
        samples_per_grad: texts in each; 4 to 16 cost less than single texts for the same
            number of texts and serve as well.
        max_length: longer texts are cut to this number of tokens.
        max_tokens: of a batch, padding included; one gradient at least.
        steps: estimates that will be made, one after the other, each from its own texts.
        by_length: texts of about the same length share a gradient, too, so that hardly anything is
            padded: a third to two fifths less time.  The mean square of a gradient stays what it
            was where gradients of single texts have mean 0 whatever the text, as those of
            predictions do.  False: which texts share a gradient is random.
        seed: of the order.

    Raises:
        ValueError: there are fewer texts than one gradient needs.
    """
    check_texts(samples_per_grad, texts)
    rows = encode(tokenizer, texts, max_length)
    collate = collator(tokenizer)
    draw = _Draw(rows, samples_per_grad, by_length, seed)
    batches: list[Rows] = []
    for _ in range(steps):
        batches += _together(draw(num_grads), max_tokens)
    return [collate(batch) for batch in batches]


class _Draw:
    """Hands out texts at random, in groups: all of them before any comes again."""

    def __init__(self, rows: Rows, group: int, by_length: bool, seed: int) -> None:
        self.rows = rows
        self.group = group
        self.by_length = by_length
        self.generator = torch.Generator().manual_seed(seed)
        self.left: list[int] = []

    def __call__(self, groups: int) -> list[Rows]:
        found: list[Rows] = []
        while len(found) < groups:
            if not self.left:
                order = torch.randperm(len(self.rows), generator=self.generator).tolist()
                self.left = order[: len(order) // self.group * self.group]
            count = min(len(self.left), (groups - len(found)) * self.group)
            drawn = [self.rows[i] for i in self.left[:count]]
            self.left = self.left[count:]
            if self.by_length:
                drawn.sort(key=_length)
            found += [drawn[start : start + self.group] for start in range(0, count, self.group)]
        return found


def _together(gradients: list[Rows], max_tokens: int) -> list[Rows]:
    """Gradients of about the same length in one batch."""
    batches: list[Rows] = [[]]
    for gradient in sorted(gradients, key=_longest):
        together = [*batches[-1], *gradient]
        if batches[-1] and len(together) * _longest(gradient) > max_tokens:
            batches.append(gradient)
        else:
            batches[-1] = together
    return batches


def _length(row: dict[str, Any]) -> int:
    return len(row["input_ids"])


def _longest(rows: Rows) -> int:
    return max(map(_length, rows))


def with_held_back(data: TextData, seed: int) -> TextData:
    """Return the data with some texts kept from the Fisher to choose settings on: its own, or some
    of ``train``, decided by ``seed``, where it has none."""
    if len(data.dev):
        return data
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(_MOST_HELD_BACK, max(1, len(order) // 10))
    dev, train = map(data.train.subset, (order[:count], sorted(order[count:])))
    return replace(data, train=train, dev=dev)


def damping_batches(tokenizer: Any, data: TextData, *, max_length: int = 128) -> list[Batch]:
    """Return batches of texts to choose the damping on, always the same ones, by length.

    Args:
        tokenizer: a Hugging Face tokenizer.
        data: its ``dev`` texts are taken, see :func:`with_held_back`.
        max_length: longer texts are cut to this number of tokens.
    """
    return _some_batches(tokenizer, data.dev, _TRIAL_TEXTS, max_length)


def class_batches(tokenizer: Any, texts: Texts, *, max_length: int = 128) -> list[Batch]:
    """Return batches of texts to see on which class a model means, always the same ones."""
    return _some_batches(tokenizer, texts, _TEXTS_FOR_CLASSES, max_length)


def first_batch(tokenizer: Any, texts: Texts, *, max_length: int = 128) -> Batch:
    """Return a few texts to try a model on: the first ones and the longest."""
    by_length = sorted(range(len(texts)), key=lambda i: len(texts.texts[i]))
    longest = by_length[-_FIRST_TEXTS // 2 :]
    some = dict.fromkeys([*range(min(len(texts), _FIRST_TEXTS // 2)), *longest])
    return collator(tokenizer)(encode(tokenizer, texts.subset(some), max_length))


def _some_batches(tokenizer: Any, texts: Texts, count: int, max_length: int) -> list[Batch]:
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    some = texts.subset(order[:count])
    return list(make_loader(tokenizer, some, _TRIAL_BATCH, max_length=max_length, by_length=True))
