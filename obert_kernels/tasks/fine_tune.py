"""Text classification around pruning: loaders, losses, fine-tuning, accuracy.

Everything random is seeded by an argument; the state of torch's own generator is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..gradients.batches import to_device
from ..gradients.source import BatchSource
from ..progress import Progress
from .loaders import Batch
from .precision import for_backward


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
    (biases, norms).

    Args:
        model: returns an output with ``.loss`` for ``model(**batch)``.
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
    import transformers

    steps = math.ceil(epochs * len(loader))
    if steps < 1:
        return
    device = next(model.parameters()).device
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.01},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, fused=True)
    schedule = transformers.get_linear_schedule_with_warmup(
        optimizer, num_warmup_steps=round(0.1 * steps), num_training_steps=steps
    )
    kept_at_zero = _masked_parameters(model, masks or {})
    was_training = model.training
    model.train()
    try:
        with seeded(seed, device):
            for step, (_, batch) in enumerate(BatchSource(loader).take(steps)):
                batch = to_device(batch, device)
                with for_backward(batch, device, dtype):
                    loss = model(**batch).loss
                if not torch.isfinite(loss):
                    raise ValueError(
                        f"the loss became {loss.item()} at step {step + 1} of {steps}: lower the "
                        f"learning rate (now {learning_rate:g})"
                    )
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
                with torch.no_grad():
                    for parameter, mask in kept_at_zero:
                        parameter.mul_(mask)
                if progress is not None:
                    progress(stage, step + 1, steps)
    finally:
        model.train(was_training)


def _masked_parameters(
    model: nn.Module, masks: Mapping[str, Tensor]
) -> list[tuple[nn.Parameter, Tensor]]:
    parameters = dict(model.named_parameters())
    unknown = sorted(masks.keys() - parameters.keys())
    if unknown:
        raise ValueError(f"masks name parameters the model does not have: {', '.join(unknown)}")
    return [(parameters[name], mask.to(parameters[name].device)) for name, mask in masks.items()]


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seed torch inside the block and put its generators back afterwards."""
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
