"""Texts to padded batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .text_data import Texts

Batch = dict[str, Tensor]


def encode(tokenizer: Any, texts: Texts, max_length: int = 128) -> list[dict[str, Any]]:
    """Tokenise texts, without padding.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: what to tokenise.
        max_length: longer texts are cut to this number of tokens.

    Returns:
        One mapping per text: ``input_ids`` and whatever else the tokenizer gives, and
        ``labels``, the class index.

    Raises:
        ValueError: nothing is left of a text.
    """
    encoded = tokenizer(texts.texts, texts.pairs, truncation=True, max_length=max_length)
    empty = [i for i, tokens in enumerate(encoded["input_ids"]) if not tokens]
    if empty:
        raise ValueError(
            f"the tokenizer makes no tokens of {len(empty)} of {len(texts)} texts, the first is "
            f"{texts.texts[empty[0]][:60]!r}: leave them out"
        )
    columns = {**encoded, "labels": texts.labels}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def make_loader(
    tokenizer: Any,
    texts: Texts,
    batch_size: int,
    *,
    max_length: int = 128,
    shuffle: bool = False,
    by_length: bool = False,
    seed: int = 0,
) -> DataLoader[Batch]:
    """Return a DataLoader of padded batches: int64 ``[batch, longest text]``, labels ``[batch]``.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: the examples.
        batch_size: texts per batch.
        max_length: longer texts are cut to this number of tokens.
        shuffle: another order in every epoch, decided by ``seed``.
        by_length: put texts of similar length together, which saves padding; with ``shuffle``
            the batches stay random, without it the order is by length.
        seed: of the order.
    """
    rows = encode(tokenizer, texts, max_length)
    lengths = [len(row["input_ids"]) for row in rows]
    generator = torch.Generator().manual_seed(seed)
    sampler = None
    if by_length and shuffle:
        from transformers.trainer_pt_utils import LengthGroupedSampler

        sampler = LengthGroupedSampler(batch_size, lengths=lengths, generator=generator)
    elif by_length:
        rows = [rows[index] for index in sorted(range(len(rows)), key=lengths.__getitem__)]
    return DataLoader(
        cast(Dataset[Any], rows),
        batch_size=batch_size,
        shuffle=shuffle and sampler is None,
        sampler=sampler,
        generator=generator,
        collate_fn=collator(tokenizer),
    )


def collator(tokenizer: Any) -> Callable[[list[dict[str, Any]]], Batch]:
    """Return what makes a padded batch of the rows of :func:`encode`."""
    from transformers import DataCollatorWithPadding

    pad = DataCollatorWithPadding(tokenizer)
    return lambda rows: dict(pad(rows))
