"""The settings of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..fisher.config import FisherConfig, one_of
from ..progress import Progress
from ..pruning.config import PruningConfig
from ..reconstruction.config import ReconstructionConfig
from ..tasks.classification import ClassificationTask
from ..tasks.task import Task


@dataclass(frozen=True)
class RunConfig:
    """Everything a run depends on; the options of ``obert-prune run`` explain each."""

    model: str
    data: str
    sparsity: Sequence[float]
    output: Path
    pattern: str = "unstructured"
    block_size: int | None = None
    num_grads: int = 256
    grad_batch_size: int = 16
    damping: float | str = "auto"
    gradients_of: str = "predictions"
    precision: str = "auto"
    fisher_dtype: str = "float64"
    selection: str = "greedy"
    estimator: str = "gram"
    plugin: Sequence[str] | None = None  # loaded by then
    update: str = "auto"
    scope: str = "global"
    steps: int = 1
    schedule: str = "geometric"
    reconstruction: str = "auto"
    fit_texts: int = ReconstructionConfig.num_samples
    params: Sequence[str] | None = None
    text_column: str | None = None
    pair_column: str | None = None
    label_column: str | None = None
    max_test_texts: int | None = None
    finetune_epochs: float = 0.0
    recovery_epochs: float = 0.0
    learning_rate: float = 2e-5
    batch_size: int = 32
    max_length: int = 128
    max_memory: int | None = None
    trust_remote_code: bool = False
    seed: int = 0

    def pruning_config(self) -> PruningConfig:
        """How the model is pruned.

        Raises:
            ValueError, TypeError: a value is out of range.
        """
        return PruningConfig(
            pattern=self.pattern,
            selection=self.selection,
            update=self.update,
            scope=self.scope,
            damping=self.damping,
            params=None if self.params is None else tuple(self.params),
            steps=self.steps,
            schedule=self.schedule,
            reconstruction=self._fit(),
            fisher=FisherConfig(
                num_grads=self.num_grads,
                samples_per_grad=self.grad_batch_size,
                block_size=self.block_size,
                estimator=self.estimator,
                dtype=self.fisher_dtype,
                gradients_of=self.gradients_of,
            ),
        )

    def _fit(self) -> ReconstructionConfig | None:
        one_of("reconstruction", self.reconstruction, ("auto", "none"))
        if self.reconstruction == "none":
            return None
        return ReconstructionConfig(num_samples=self.fit_texts)


def load_task(
    settings: RunConfig, *, hold_back: bool = True, progress: Progress | None = None
) -> Task:
    """Return the model and the data of a run, see :meth:`ClassificationTask.load`."""
    return ClassificationTask.load(
        settings.model,
        settings.data,
        text_column=settings.text_column,
        pair_column=settings.pair_column,
        label_column=settings.label_column,
        max_test_texts=settings.max_test_texts,
        max_length=settings.max_length,
        seed=settings.seed,
        gradients_of=settings.gradients_of,
        precision=settings.precision,
        hold_back=hold_back,
        new_head=settings.finetune_epochs > 0,
        trust_remote_code=settings.trust_remote_code,
        progress=progress,
    )


def plain(settings: RunConfig) -> dict[str, Any]:
    """JSON-ready."""
    return {**asdict(settings), "output": str(settings.output)}
