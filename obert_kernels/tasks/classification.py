"""A trained classifier and its texts, brought together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..extras import import_extra
from ..sparsity.layers import find_weights
from .demo_sets import DEMO_PREFIX
from .downloads import demo_model_folder
from .fine_tune import seeded
from .text_data import TextData

if TYPE_CHECKING:
    from ..commands.config import Settings

DEMO_MODEL = DEMO_PREFIX + "minilm"


def load_classifier(settings: Settings, data: TextData) -> tuple[Any, Any, TextData]:
    """Return tokenizer, classifier, and the data with its classes in the model's order."""
    transformers = import_extra("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    name = demo_model_folder() if settings.model == DEMO_MODEL else settings.model
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{settings.model} could not be loaded as a model ({reason}): give a folder with "
            "config.json, weights and tokenizer, or a name on the hub (needs the network)"
        ) from error
    limit = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", math.inf))
    if settings.max_length > limit:
        raise ValueError(
            f"--max-length {settings.max_length} is more than {settings.model} takes: at most "
            f"{limit} tokens"
        )
    data, labels_fit = _match_labels(settings, config, data)
    names = (
        {}
        if labels_fit
        else {
            "id2label": dict(enumerate(data.label_names)),
            "label2id": {label: index for index, label in enumerate(data.label_names)},
        }
    )
    with seeded(settings.seed):  # a new head is random
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            name, ignore_mismatched_sizes=not labels_fit, **names
        ).float()  # the argument for the type has two names, by the version of transformers
    return tokenizer, model, data


def _match_labels(settings: Settings, config: Any, data: TextData) -> tuple[TextData, bool]:
    """Return the data in the order of the model's classes, and whether the model has them."""
    architectures = config.architectures or []
    if not any(name.endswith("ForSequenceClassification") for name in architectures):
        problem = f"{settings.model} has no trained classification head"
    else:
        known = [str(config.id2label[index]) for index in range(config.num_labels)]
        lowered = {label.casefold(): label for label in data.label_names}
        if sorted(lowered) == sorted(label.casefold() for label in known):
            return data.with_label_order([lowered[label.casefold()] for label in known]), True
        if len(known) == len(data.label_names) and (
            data.label_names == _numbered("", known) or known == _numbered("LABEL_", known)
        ):
            return data, True
        problem = (
            f"{settings.model} knows the classes {_shorten(known)}, but {settings.data} has "
            f"{_shorten(data.label_names)}"
        )
    if settings.finetune_epochs <= 0:
        raise ValueError(
            f"{problem}: fine-tune it first, for example with "
            "obert-prune run and --finetune-epochs 3"
        )
    return data, False


def _shorten(names: Sequence[str]) -> str:
    shown = ", ".join(names[:6])
    return f"{shown}, … ({len(names)})" if len(names) > 6 else shown


def describe(settings: Settings, model: Any, data: TextData) -> str:
    """Return two lines on the model and the data, and one more if the order of classes is taken
    for granted."""
    weights = sum(weight.numel() for weight in find_weights(model, settings.params).values())
    lines = [
        f"{settings.model}: {weights:,} weights to prune",
        f"{settings.data}: {len(data.label_names)} classes; {len(data.train):,} texts to train, "
        f"{len(data.dev):,} held back, {len(data.test):,} to test",
    ]
    names = data.label_names
    nameless = list(model.config.id2label.values()) == _numbered("LABEL_", names)
    if nameless and names not in (_numbered("LABEL_", names), _numbered("", names)):
        lines.append(f"LABEL_0, LABEL_1, ... of the model are taken for {_shorten(names)}")
    return "\n".join(lines)


def _numbered(prefix: str, names: Sequence[str]) -> list[str]:
    return [f"{prefix}{index}" for index in range(len(names))]
