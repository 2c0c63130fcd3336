"""Fine-tuning a model of texts, pruned or not, by :class:`transformers.Trainer`."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..progress import Progress, silent
from ..training.trainer import KeepPrunedAtZero
from .loaders import Batch
from .precision import for_backward
from .seeds import seeded


def fine_tune(
    model: nn.Module,
    loader: DataLoader[Batch],
    epochs: float,
    learning_rate: float = 2e-5,
    *,
    masks: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    progress: Progress | None = None,
    stage: str = "fine-tune",
) -> None:
    """Fit a model in place: AdamW, linear warm-up and decay, gradients clipped to norm 1.

    The learning rate rises over a tenth of the steps; the weight decay is 0.01, none for vectors
    (biases, norms).  Nothing is written, logged or reported.

    Args:
        model: returns an output with ``.loss`` for ``model(**batch)``; on the CPU, or on the only
            CUDA device.
        loader: training batches.
        epochs: passes over the loader; fractions are allowed.
        learning_rate: at the end of the warm-up.
        masks: parameter name -> bool tensor; weights where it is False are kept at zero.
        dtype: to compute in, float32 or bfloat16; the weights stay as they are.
        seed: of dropout.
        progress: called as ``progress(stage, done, total)``, in steps.
        stage: name given to ``progress``.

    Raises:
        ValueError: the loss became NaN or infinite.
    """
    steps = math.ceil(epochs * len(loader))
    if steps < 1:
        return
    device = next(model.parameters()).device
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.01},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    with TemporaryDirectory() as unused, seeded(seed, device), _put_back(model), _own_precision():
        trainer = _Trainer(
            model,
            TrainingArguments(
                unused,
                max_steps=steps,
                warmup_steps=round(0.1 * steps),
                lr_scheduler_type="linear",
                max_grad_norm=1.0,
                seed=seed,
                use_cpu=device.type == "cpu",
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            optimizers=(torch.optim.AdamW(groups, lr=learning_rate, fused=True), None),
            callbacks=[
                *([KeepPrunedAtZero(masks)] if masks else []),
                _Report(progress or silent, stage),
            ],
        )
        trainer.loader, trainer.dtype, trainer.peak = loader, dtype, learning_rate
        trainer.remove_callback(PrinterCallback)
        trainer.train()


class _Trainer(Trainer):
    """Takes batches as they are, computes in ``dtype``, and stops at a loss that is no number."""

    loader: DataLoader[Batch]
    dtype: torch.dtype
    peak: float

    def get_train_dataloader(self) -> DataLoader[Batch]:
        return self.loader

    def compute_loss(self, model: nn.Module, inputs: Batch, *_: Any, **__: Any) -> Tensor:
        with for_backward(inputs, inputs["labels"].device, self.dtype):
            loss: Tensor = model(**inputs).loss
        if not torch.isfinite(loss):
            raise ValueError(
                f"the loss became {loss.item()} at step {self.state.global_step + 1} of "
                f"{self.state.max_steps}: lower the learning rate (now {self.peak:g})"
            )
        return loss


class _Report(TrainerCallback):
    def __init__(self, progress: Progress, stage: str) -> None:
        self.progress, self.stage = progress, stage

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress(self.stage, state.global_step, state.max_steps)


@contextmanager
def _own_precision() -> Iterator[None]:
    """Without the mixed precision that ``accelerate launch`` asks for: it would wrap the model."""
    name = "ACCELERATE_MIXED_PRECISION"
    before = os.environ.get(name)
    os.environ[name] = "no"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    """Leave mode and configuration as they were: the Trainer changes ``use_cache``."""
    training, config = model.training, getattr(model, "config", None)
    before = dict(vars(config)) if config is not None else {}
    try:
        yield
    finally:
        model.train(training)
        if config is not None:
            vars(config).clear()
            vars(config).update(before)
