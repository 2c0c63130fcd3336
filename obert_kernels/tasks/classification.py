"""Text classification: a trained classifier and its texts, brought together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
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
from .class_order import check_order
from .demo_sets import DEMO_PREFIX
from .digests import code_digest, config_digest, data_digest, tokenizer_digest, weights_digest
from .evaluate import EVALUATION_BATCH, Evaluation, evaluate
from .load_classifier import load_classifier
from .loaders import Batch, make_loader
from .model_files import find_model
from .precision import LOSSES, precision_name, working_precision
from .readers import load_text_data
from .sparse_start import zeros_of
from .task import Part
from .text_data import TextData


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
        notes: what was odd about model, tokenizer or texts; the report has them as well.
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
    notes: list[str] = field(default_factory=list)
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
        max_test_texts: int | None = None,
        max_length: int = 128,
        seed: int = 0,
        gradients_of: str = "predictions",
        precision: str = "auto",
        hold_back: bool = True,
        new_head: bool = False,
        trust_remote_code: bool = False,
        progress: Progress | None = None,
    ) -> ClassificationTask:
        """Load a classifier and its texts.

        Args:
            model, trust_remote_code: see :func:`~obert_kernels.tasks.model_files.find_model`.
            data, text_column, pair_column, label_column: see
                :func:`~obert_kernels.tasks.readers.load_text_data`.
            max_test_texts: no more test texts than this are used, always the same ones.
            precision: see :func:`~obert_kernels.tasks.precision.working_precision`.
            hold_back: keep some training texts back where the data has no held-back texts.
            new_head: see :func:`~obert_kernels.tasks.load_classifier.load_classifier`.
            max_length, seed, gradients_of, progress: see the attributes.

        Raises:
            ValueError, OSError, DownloadError: something about model or data; the message names it
                and the remedy.
        """
        source = find_model(model, trust_remote_code)
        texts = load_text_data(data, text_column, pair_column, label_column)
        texts = texts.with_fewer_tests(max_test_texts)
        loaded = load_classifier(
            source, texts, data_name=data, max_length=max_length, seed=seed, new_head=new_head
        )
        texts = loaded.data
        notes = [*texts.notes, *loaded.notes]
        first = batches.first_batch(loaded.tokenizer, texts.train, max_length=max_length)
        dtype, note = working_precision(precision, loaded.model, first, LOSSES[gradients_of])
        notes += [note] if note else []
        numbered = set(loaded.model.config.id2label.values()) != set(texts.label_names)
        if loaded.taken_for or (numbered and not new_head):
            check_order(
                model,
                loaded.model,
                batches.class_batches(loaded.tokenizer, texts.train, max_length=max_length),
                texts.label_names,
                dtype,
            )
        sparse, _ = zeros_of(loaded.model)
        if sparse:
            notes.append(
                f"{sparse:.1%} of the encoder's weights are zero already and stay so, in "
                "fine-tuning as well"
            )
        if hold_back:
            texts = batches.with_held_back(texts, seed)
        return cls(
            model_name=model,
            data_name=data,
            model=loaded.model,
            tokenizer=loaded.tokenizer,
            data=texts,
            max_length=max_length,
            seed=seed,
            gradients_of=gradients_of,
            dtype=dtype,
            progress=progress,
            notes=notes,
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
        """Return two lines on the model and the data, and one for each note."""
        weights = sum(weight.numel() for weight in find_weights(self.model, params).values())
        lines = [
            f"{self.model_name}: {weights:,} weights to prune",
            f"{self.data_name}: {len(self.data.label_names)} classes; {len(self.data.train):,} "
            f"texts to train, {len(self.data.dev):,} held back, {len(self.data.test):,} to test",
            *(f"note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)

    def facts(self) -> dict[str, Any]:
        """Return what a report says of the data and the precision, and notes, JSON-ready."""
        return {
            "classes": self.data.label_names,
            "texts": {part: len(getattr(self.data, part)) for part in ("train", "dev", "test")},
            "precision": precision_name(self.dtype),
            "notes": self.notes,
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
            "the model's own code": code_digest(type(self.model)),
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

    def doubts(self, accuracy: float) -> list[str]:
        """Return a note where a model that is not pruned does no better than guessing: a tokenizer
        of another model, say, shows nowhere else."""
        labels = self.data.test.labels
        most = Counter(labels).most_common(1)[0][1] / len(labels)
        if accuracy > most:
            return []
        return [
            f"the model is right about {accuracy:.1%} of the test texts, and the most frequent "
            f"class is that of {most:.1%}: was it trained for these classes, with this tokenizer?"
        ]

    def fine_tune(
        self,
        epochs: float,
        *,
        learning_rate: float = 2e-5,
        batch_size: int = 32,
        masks: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Fit the classifier to the training texts, in place, see
        :func:`~obert_kernels.tasks.fine_tune.fine_tune`.

        Without ``masks``, the zeros of a model that was given sparse stay.
        """
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
            masks=zeros_of(self.model)[1] if masks is None else masks,
            dtype=self.dtype,
            seed=self.seed,
            progress=self.progress,
            stage="fine-tune" if masks is None else "recover",
        )
