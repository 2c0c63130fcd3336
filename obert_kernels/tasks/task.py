"""What the commands need of a task: a model, and the data it is pruned and judged on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from ..gradients.losses import LossFn
from .evaluate import Evaluation
from .loaders import Batch

# Held-back samples, on which settings are chosen, and those to report on.
Part = Literal["dev", "test"]


class Task(Protocol):
    """A model and its data.

    Attributes:
        model: what is pruned, in place.
        tokenizer: saved beside the model.
    """

    model: Any
    tokenizer: Any

    @property
    def loss_fn(self) -> LossFn:
        """What the gradients for the Fisher are taken of."""

    @property
    def title(self) -> str:
        """Names of model and data, for the title of a plot."""

    def describe(self, params: str | Iterable[str] | None) -> str:
        """Return lines for the user on the model, the matrices to prune and the data."""

    def facts(self) -> dict[str, Any]:
        """Return what a report says of the data and the precision, JSON-ready."""

    def basis(self) -> dict[str, Any]:
        """Return what trials depend on besides how they prune, by name, JSON-ready."""

    def check_samples(self, samples_per_grad: int, option: str) -> None:
        """Raise ValueError, naming ``option``, if a gradient needs more samples than there are."""

    def fisher_batches(self, num_grads: int, samples_per_grad: int, steps: int = 1) -> list[Batch]:
        """Return training batches for ``steps`` Fishers of ``num_grads`` gradients each."""

    def damping_batches(self) -> list[Batch]:
        """Return held-back batches to choose a damping on; the Fisher does not see them."""

    def evaluate(self, model: nn.Module, part: Part) -> Evaluation:
        """Return how well a model does, pruned or not."""

    def doubts(self, accuracy: float) -> list[str]:
        """Return notes on the accuracy of the model as it was given, on the test samples."""

    def fine_tune(
        self,
        epochs: float,
        *,
        learning_rate: float,
        batch_size: int,
        masks: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Fit the model, in place; weights where a mask is False stay zero."""
