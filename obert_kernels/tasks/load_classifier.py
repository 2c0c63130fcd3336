"""A trained classifier from its files, with the classes of the data in its order."""

from __future__ import annotations

import pickle
import re
from typing import Any, NamedTuple

import torch
from torch import nn

from .classes import Matched, match_classes, model_classes
from .labels import shorten
from .model_config import check_architecture, has_trained_head, load_config, loading_errors, summary
from .model_files import ModelSource
from .seeds import seeded
from .text_data import TextData
from .tokenizers import check_tokenizer, load_tokenizer

_NUMBERED_LAYER = re.compile(r"(^|\.)(layers?|h|blocks?)\.\d+\.")


class LoadedClassifier(NamedTuple):
    """What :func:`load_classifier` returns.

    Attributes:
        tokenizer: Hugging Face tokenizer.
        model: Hugging Face sequence classifier, in float32.
        data: with the class indices of the model.
        taken_for: how classes without a common name were brought together, "" if by name.
        notes: what the user should know.
    """

    tokenizer: Any
    model: Any
    data: TextData
    taken_for: str
    notes: list[str]


def load_classifier(
    source: ModelSource,
    data: TextData,
    *,
    data_name: str,
    max_length: int = 128,
    seed: int = 0,
    new_head: bool = False,
) -> LoadedClassifier:
    """Load a classifier and its tokenizer, and bring the classes of the data into its order.

    Args:
        source: where it is, see :func:`~obert_kernels.tasks.model_files.find_model`.
        data: what it is to classify.
        data_name: what errors call it.
        max_length: tokens of the longest texts.
        seed: of a new head.
        new_head: a model without a head for these classes gets a random one, for fine-tuning.

    Raises:
        FileNotFoundError: the model cannot be loaded.
        ValueError: it takes no texts of that length, has no head for these classes, its files
            are damaged or another model's, or its tokenizer does not belong to it.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config, written, notes = load_config(source)
    check_architecture(source, config)
    matched = _match(source.name, written, config.num_labels, data, data_name, new_head)
    tokenizer = load_tokenizer(source)
    if not matched.known:
        config.id2label = dict(enumerate(data.label_names))
        config.label2id = {label: index for index, label in enumerate(data.label_names)}
    with seeded(seed):  # a new head is random
        model = _load_weights(source, config, may_lack_head=new_head)
    notes += check_tokenizer(source.name, tokenizer, model, written, matched.data.train, max_length)
    if matched.taken_for:
        notes.append(matched.taken_for)
    parts = (matched.data.train, matched.data.dev, matched.data.test)
    present = {label for part in parts for label in part.labels}
    absent = [n for i, n in enumerate(matched.data.label_names) if i not in present]
    if absent:
        notes.append(f"no text is of the class {shorten(absent)}")
    return LoadedClassifier(tokenizer, model, matched.data, matched.taken_for, notes)


def _match(
    name: str,
    written: dict[str, Any],
    count: int,
    data: TextData,
    data_name: str,
    new_head: bool,
) -> Matched:
    """Return the data in the order of the model's classes, and whether the model has them."""
    if has_trained_head(written):
        names = model_classes(name, written)
        matched = match_classes(data, names, count)
        if matched is not None:
            return matched
        known = names or [f"LABEL_{index}" for index in range(count)]
        problem = (
            f"{name} knows the classes {shorten(known)}, but {data_name} has "
            f"{shorten(data.label_names)}"
        )
        remedy = "; or, if it was, write the names of its classes into id2label of its config.json"
    else:
        problem, remedy = f"{name} has no trained classification head", ""
    if not new_head:
        raise ValueError(
            f"{problem}: fine-tune it first, for example with "
            f"obert-prune run and --finetune-epochs 3{remedy}"
        )
    return Matched(data, known=False)


def _load_weights(source: ModelSource, config: Any, may_lack_head: bool) -> Any:
    import transformers

    also = (RuntimeError, EOFError, pickle.UnpicklingError, ArithmeticError, AssertionError)
    errors: tuple[type[Exception], ...] = (*loading_errors(), *also)
    try:
        model, loaded = transformers.AutoModelForSequenceClassification.from_pretrained(
            source.place,
            config=config,
            ignore_mismatched_sizes=True,  # they are told, and judged below
            output_loading_info=True,
            weights_only=True,
            **source.options,
        )
    except errors as error:
        pickled = isinstance(error, pickle.UnpicklingError)
        reason = "more than tensors, or damaged; pickled code is not run" if pickled else ""
        raise ValueError(
            f"the weights of {source.name} could not be loaded ({reason or summary(error)}): "
            "correct its config.json, or copy or download the model again"
        ) from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(f"{source.name} is an adapter: merge it into its model first")
    lacking = {name: name for name in loaded["missing_keys"]}
    lacking |= {
        name: f"{name} ({list(found)} in the file, {list(wanted)} by config.json)"
        for name, found, wanted in loaded["mismatched_keys"]
    }
    _check_complete(source, model, lacking, set(loaded["unexpected_keys"]), may_lack_head)
    model = model.float()  # the argument for the type has two names, by the version
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(
                f"the weights of {source.name} hold NaN or infinity, in {name}: they are of a "
                "training that failed, or damaged"
            )
    return model


def _check_complete(
    source: ModelSource, model: Any, lacking: dict[str, str], other: set[str], may_lack_head: bool
) -> None:
    """Raise ValueError if weights of the model were not found in its files, and are random.

    Args:
        source: of the model.
        model: as it was loaded.
        lacking: name of each such weight -> what an error says of it.
        other: names in the files that are none of the model's.
        may_lack_head: those of the head may be random.
    """
    encoder = sorted(name for name in lacking if not is_of_head(model, name))
    left_out = sorted(name for name in other if _NUMBERED_LAYER.search(name))
    kind = f"a {type(model).__name__} as config.json has it"
    if encoder:
        has = f"; they have {min(left_out or other)}" if other else ""
        raise ValueError(
            f"the weights of {source.name} lack {len(encoder)} of {kind}, for example "
            f"{lacking[encoder[0]]}{has}"
        )
    if left_out:
        raise ValueError(
            f"the weights of {source.name} hold {len(left_out)} that {kind} leaves out, for "
            f"example {left_out[0]}"
        )
    if lacking and not may_lack_head:
        raise ValueError(
            f"{source.name} has no trained classification head (its weights lack "
            f"{min(lacking.values())}): fine-tune it first, for example with obert-prune run and "
            "--finetune-epochs 3"
        )


def is_of_head(model: nn.Module, name: str) -> bool:
    """Return whether a weight is new wherever an encoder gets a head: outside of it, or pooling."""
    prefix = str(getattr(model, "base_model_prefix", ""))
    if "pooler." in name:
        return True
    if prefix and hasattr(model, prefix):
        return not name.startswith(prefix + ".")
    return not _NUMBERED_LAYER.search(name) and "embed" not in name
