"""The tokenizer of a model: loaded, and held against the model and the texts."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .model_config import loading_errors, refuse_untrusted_tokenizer, summary
from .model_files import ModelSource
from .text_data import Texts

# Texts that are tokenised to see what becomes of them.
_SAMPLE = 1000
# Of the tokens of texts: from the first share on it is said, from the second on refused.
_SOME_UNKNOWN, _MOST_UNKNOWN = 0.05, 0.5
# Vocabularies are filled up to round sizes, by less than a hundredth.
_FILLED_UP = 0.99
_OTHER_SPECIAL = ("bos", "eos", "cls", "sep", "mask")


def load_tokenizer(source: ModelSource) -> Any:
    """Return the tokenizer of a model.

    Raises:
        ValueError: it cannot be loaded, or is code of its own that is not trusted.
    """
    import transformers

    refuse_untrusted_tokenizer(source)
    try:
        return transformers.AutoTokenizer.from_pretrained(source.place, **source.options)
    except Exception as error:  # the tokenizers library raises nothing more special
        if type(error) is not Exception and not isinstance(error, loading_errors()):
            raise
        raise ValueError(
            f"the tokenizer of {source.name} could not be loaded ({summary(error)}): it needs "
            "the files of the tokenizer it was trained with"
        ) from error


def check_tokenizer(
    name: str,
    tokenizer: Any,
    model: nn.Module,
    written: Mapping[str, Any],
    texts: Texts,
    max_length: int,
) -> list[str]:
    """Check that a tokenizer and a model belong together, as far as it can be seen.

    Args:
        name: of the model.
        tokenizer: from then on it returns only what the model takes.
        model: a classifier.
        written: its config.json.
        texts: for training.
        max_length: longer texts are cut to this number of tokens.

    Returns:
        Notes on what is odd or lost.

    Raises:
        ValueError: they do not belong together, or the model takes no texts of that length.
    """
    _return_only_what_is_taken(tokenizer, model)
    notes = [
        *_vocabulary(name, tokenizer, model),
        *_special_tokens(name, tokenizer, model, written),
    ]
    _check_length(name, tokenizer, model, texts, max_length)
    return [*notes, *_sample(name, tokenizer, texts, max_length)]


def _return_only_what_is_taken(tokenizer: Any, model: nn.Module) -> None:
    """Token types, say, are no argument of DistilBERT."""
    taken = inspect.signature(model.forward).parameters
    if "input_ids" in taken:
        kept = [name for name in tokenizer.model_input_names if name in taken]
        tokenizer.model_input_names = kept


def _vocabulary(name: str, tokenizer: Any, model: Any) -> list[str]:
    rows, known = _embedding_rows(model), max(tokenizer.get_vocab().values(), default=-1) + 1
    if rows is None:
        return []
    if known > rows:
        raise ValueError(
            f"the tokenizer of {name} knows {known:,} tokens, the model has embeddings for "
            f"{rows:,}: it is another model's, or tokens were added without "
            "resize_token_embeddings"
        )
    if known < rows / 2:
        raise ValueError(
            f"the tokenizer of {name} knows {known:,} tokens, the model has embeddings for "
            f"{rows:,}: it is another model's, or its files are missing"
        )
    if known < _FILLED_UP * rows:
        return [
            f"the tokenizer knows {known:,} tokens, the model has embeddings for {rows:,}: do "
            "they belong together?"
        ]
    return []


def _embedding_rows(model: Any) -> int | None:
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except (AttributeError, NotImplementedError):  # of models without a table, say of characters
        return None
    return len(weight) if weight is not None and weight.dim() == 2 else None


def _special_tokens(name: str, tokenizer: Any, model: Any, written: Mapping[str, Any]) -> list[str]:
    padding, own = tokenizer.pad_token_id, getattr(model.config, "pad_token_id", None)
    if padding is None:
        raise ValueError(
            f"the tokenizer of {name} has no token for padding: set pad_token in its "
            "tokenizer_config.json and pad_token_id in config.json"
        )
    if own is not None and own != padding:
        raise ValueError(
            f"the tokenizer of {name} pads with token {padding}, config.json says "
            f"pad_token_id {own}: the tokenizer is another model's, or pad_token_id is wrong"
        )
    other = [
        f"{token}_token_id {written[f'{token}_token_id']} ({ours} in the tokenizer)"
        for token in _OTHER_SPECIAL
        if (ours := getattr(tokenizer, f"{token}_token_id", None)) is not None
        and written.get(f"{token}_token_id") not in (None, ours)
    ]
    return [f"config.json and the tokenizer differ on {', '.join(other)}"] if other else []


def _check_length(
    name: str, tokenizer: Any, model: nn.Module, texts: Texts, max_length: int
) -> None:
    most = _most_tokens(tokenizer, model)
    if max_length > most:
        raise ValueError(
            f"--max-length {max_length} is more than {name} takes: at most {most} tokens"
        )
    around = tokenizer.num_special_tokens_to_add(pair=texts.pairs is not None)
    if max_length <= around:
        raise ValueError(
            f"--max-length {max_length} leaves no room for a text: {around} tokens stand around it"
        )


def _most_tokens(tokenizer: Any, model: Any) -> float:
    """Return how many tokens a model takes at most."""
    limits = [tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None)]
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa and its like count positions from behind the one that stands for padding.
            before = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - before)
    return min((limit for limit in limits if limit and limit > 0), default=math.inf)


def _sample(name: str, tokenizer: Any, texts: Texts, max_length: int) -> list[str]:
    """Tokenise some texts and say what is lost of them."""
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    some = texts.subset(order[:_SAMPLE])
    rows = tokenizer(some.texts, some.pairs)["input_ids"]
    special, unknown = set(tokenizer.all_special_ids), tokenizer.unk_token_id
    missed = sum(token == unknown for row in rows for token in row)
    read = sum(token not in special for row in rows for token in row)
    if missed >= _MOST_UNKNOWN * (missed + read):  # nothing was read, among others
        raise ValueError(
            f"the tokenizer of {name} does not know the texts: it makes {missed:,} unknown and "
            f"{read:,} known tokens of {len(rows):,} texts; it is not the one the model was "
            "trained with, or its files are missing"
        )
    notes = []
    if missed >= _SOME_UNKNOWN * (missed + read):
        notes.append(
            f"{missed / (missed + read):.0%} of the tokens in training texts are unknown: do "
            "tokenizer and texts belong together?"
        )
    cut = sum(len(row) > max_length for row in rows)
    if cut:
        notes.append(
            f"{cut:,} of {len(rows):,} training texts have more than {max_length} tokens and are "
            "cut (--max-length)"
        )
    return notes
