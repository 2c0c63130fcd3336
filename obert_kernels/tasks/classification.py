"""Text classification: a trained classifier and its texts, brought together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..gradients.losses import LossFn
from ..progress import Progress
from ..sparsity.layers import find_weights
from . import batches
from .demo_sets import DEMO_PREFIX
from .digests import config_digest, data_digest, tokenizer_digest, weights_digest
from .downloads import demo_model_folder
from .evaluate import EVALUATION_BATCH, Evaluation, evaluate
from .loaders import Batch, make_loader
from .precision import LOSSES, choose_precision, precision_name
from .readers import load_text_data
from .seeds import seeded
from .task import Part
from .text_data import TextData

DEMO_MODEL = DEMO_PREFIX + "minilm"


@dataclass
class ClassificationTask:
    """A text classifier and its texts: a :class:`~obert_kernels.tasks.task.Task`.

    Attributes:
        model_name, data_name: as they were given.
        model, tokenizer, data: what they stand for.
        max_length: longer texts are cut to this number of tokens.
        seed: of the order of texts, and of dropout.
        gradients_of: "predictions" or "labels".
        dtype: gradients, evaluations and training are computed in it.
        progress: called as ``progress(stage, done, total)``.
    """

    model_name: str
    data_name: str
    model: Any
    tokenizer: Any
    data: TextData
    max_length: int = 128
    seed: int = 0
    gradients_of: str = "predictions"
    dtype: torch.dtype = torch.float32
    progress: Progress | None = None
    _loaders: dict[Part, DataLoader[Batch]] = field(default_factory=dict, repr=False)

    @classmethod
    def load(
        cls,
        model: str,
        data: str,
        *,
        text_column: str | None = None,
        pair_column: str | None = None,
        label_column: str | None = None,
        max_length: int = 128,
        seed: int = 0,
        gradients_of: str = "predictions",
        precision: str = "auto",
        hold_back: bool = True,
        new_head: bool = False,
        progress: Progress | None = None,
    ) -> ClassificationTask:
        """Load a classifier and its texts.

        Args:
            model: see :func:`load_classifier`.
            data, text_column, pair_column, label_column: see
                :func:`~obert_kernels.tasks.readers.load_text_data`.
            precision: see :func:`~obert_kernels.tasks.precision.choose_precision`.
            hold_back: keep some training texts back where the data has no held-back texts.
            new_head: see :func:`load_classifier`.
            max_length, seed, gradients_of, progress: see the attributes.

        Raises:
            ValueError, OSError, DownloadError: something about model or data; the message names it
                and the remedy.
        """
        texts = load_text_data(data, text_column, pair_column, label_column)
        tokenizer, classifier, texts = load_classifier(
            model, texts, data_name=data, max_length=max_length, seed=seed, new_head=new_head
        )
        if hold_back:
            texts = batches.with_held_back(texts, seed)
        return cls(
            model_name=model,
            data_name=data,
            model=classifier,
            tokenizer=tokenizer,
            data=texts,
            max_length=max_length,
            seed=seed,
            gradients_of=gradients_of,
            dtype=choose_precision(precision, next(classifier.parameters()).device),
            progress=progress,
        )

    @property
    def loss_fn(self) -> LossFn:
        """What the gradients for the Fisher are taken of."""
        return partial(LOSSES[self.gradients_of], dtype=self.dtype)

    @property
    def title(self) -> str:
        """Names of model and data, for the title of a plot."""
        model, data = (
            Path(name.removeprefix(DEMO_PREFIX)).name for name in (self.model_name, self.data_name)
        )
        return f"{model} on {data}"

    def describe(self, params: str | Iterable[str] | None) -> str:
        """Return two lines on the model and the data, and one more if the order of classes is
        taken for granted."""
        weights = sum(weight.numel() for weight in find_weights(self.model, params).values())
        names = self.data.label_names
        lines = [
            f"{self.model_name}: {weights:,} weights to prune",
            f"{self.data_name}: {len(names)} classes; {len(self.data.train):,} texts to train, "
            f"{len(self.data.dev):,} held back, {len(self.data.test):,} to test",
        ]
        nameless = list(self.model.config.id2label.values()) == _numbered("LABEL_", names)
        if nameless and names not in (_numbered("LABEL_", names), _numbered("", names)):
            lines.append(f"LABEL_0, LABEL_1, ... of the model are taken for {_shorten(names)}")
        return "\n".join(lines)

    def facts(self) -> dict[str, Any]:
        """Return what a report says of the data and the precision, JSON-ready."""
        return {
            "classes": self.data.label_names,
            "texts": {part: len(getattr(self.data, part)) for part in ("train", "dev", "test")},
            "precision": precision_name(self.dtype),
        }

    def basis(self) -> dict[str, Any]:
        """Return what trials depend on besides how they prune, by name, JSON-ready."""
        return {
            "the model's weights": weights_digest(self.model.state_dict()),
            "the model's configuration": config_digest(self.model.config.to_dict()),
            "the tokenizer": tokenizer_digest(self.tokenizer, self.data),
            "the data": data_digest(self.data),
            "gradients-of": self.gradients_of,
            "precision": precision_name(self.dtype),
            "max-length": self.max_length,
            "seed": self.seed,
        }

    def check_samples(self, samples_per_grad: int, option: str) -> None:
        """Raise ValueError, naming ``option``, if one gradient needs more texts than there are."""
        batches.check_texts(samples_per_grad, self.data.train, option)

    def fisher_batches(self, num_grads: int, samples_per_grad: int, steps: int = 1) -> list[Batch]:
        """Return training batches for ``steps`` Fishers of ``num_grads`` gradients each, see
        :func:`~obert_kernels.tasks.batches.fisher_batches`."""
        return batches.fisher_batches(
            self.tokenizer,
            self.data.train,
            num_grads,
            samples_per_grad,
            max_length=self.max_length,
            max_tokens=batches.tokens_at_once(self.model.config.hidden_size),
            steps=steps,
            by_length=self.gradients_of == "predictions",
            seed=self.seed,
        )

    def damping_batches(self) -> list[Batch]:
        """Return held-back batches to choose a damping on; the Fisher does not see them."""
        return batches.damping_batches(self.tokenizer, self.data, max_length=self.max_length)

    def evaluate(self, model: nn.Module, part: Part) -> Evaluation:
        """Return how well a model does on the held-back texts ("dev") or the test texts."""
        if part not in self._loaders:
            self._loaders[part] = make_loader(
                self.tokenizer,
                getattr(self.data, part),
                EVALUATION_BATCH,
                max_length=self.max_length,
                by_length=True,
            )
        return evaluate(model, self._loaders[part], dtype=self.dtype, progress=self.progress)

    def fine_tune(
        self,
        epochs: float,
        *,
        learning_rate: float = 2e-5,
        batch_size: int = 32,
        masks: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Fit the classifier to the training texts, in place, see
        :func:`~obert_kernels.tasks.fine_tune.fine_tune`."""
        from .fine_tune import fine_tune  # takes seconds: the Trainer

        loader = make_loader(
            self.tokenizer,
            self.data.train,
            batch_size,
            max_length=self.max_length,
            shuffle=True,
            seed=self.seed,
        )
        fine_tune(
            self.model,
            loader,
            epochs,
            learning_rate,
            masks=masks,
            dtype=self.dtype,
            seed=self.seed,
            progress=self.progress,
            stage="fine-tune" if masks is None else "recover",
        )


def load_classifier(
    model: str,
    data: TextData,
    *,
    data_name: str,
    max_length: int = 128,
    seed: int = 0,
    new_head: bool = False,
) -> tuple[Any, Any, TextData]:
    """Return tokenizer, classifier, and the data with its classes in the model's order.

    Args:
        model: a folder, a name on the hub, or :data:`DEMO_MODEL`.
        data: what it is to classify.
        data_name: what errors call it.
        max_length: tokens of the longest texts.
        seed: of a new head.
        new_head: a model without a head for these classes gets a random one, for fine-tuning.

    Raises:
        FileNotFoundError: the model cannot be loaded.
        ValueError: it takes no texts of that length, or has no head for these classes.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    name = demo_model_folder() if model == DEMO_MODEL else model
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{model} could not be loaded as a model ({reason}): give a folder with "
            "config.json, weights and tokenizer, or a name on the hub (needs the network)"
        ) from error
    limit = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", math.inf))
    if max_length > limit:
        raise ValueError(
            f"--max-length {max_length} is more than {model} takes: at most {limit} tokens"
        )
    data, labels_fit = _match_labels(model, config, data, data_name, new_head)
    names = (
        {}
        if labels_fit
        else {
            "id2label": dict(enumerate(data.label_names)),
            "label2id": {label: index for index, label in enumerate(data.label_names)},
        }
    )
    with seeded(seed):  # a new head is random
        classifier = transformers.AutoModelForSequenceClassification.from_pretrained(
            name, ignore_mismatched_sizes=not labels_fit, **names
        ).float()  # the argument for the type has two names, by the version of transformers
    return tokenizer, classifier, data


def _match_labels(
    model: str, config: Any, data: TextData, data_name: str, new_head: bool
) -> tuple[TextData, bool]:
    """Return the data in the order of the model's classes, and whether the model has them."""
    architectures = config.architectures or []
    if not any(name.endswith("ForSequenceClassification") for name in architectures):
        problem = f"{model} has no trained classification head"
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
            f"{model} knows the classes {_shorten(known)}, but {data_name} has "
            f"{_shorten(data.label_names)}"
        )
    if not new_head:
        raise ValueError(
            f"{problem}: fine-tune it first, for example with "
            "obert-prune run and --finetune-epochs 3"
        )
    return data, False


def _shorten(names: Sequence[str]) -> str:
    shown = ", ".join(names[:6])
    return f"{shown}, … ({len(names)})" if len(names) > 6 else shown


def _numbered(prefix: str, names: Sequence[str]) -> list[str]:
    return [f"{prefix}{index}" for index in range(len(names))]
