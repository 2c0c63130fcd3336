"""Text classification around pruning: loaders, losses, fine-tuning, accuracy.

Everything random is seeded by an argument; the state of torch's own generator is left alone.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

from .backward import evaluation
from .batches import take_batches, to_device
from .downloads import import_extra
from .estimate import Progress
from .losses import default_loss
from .text_data import Texts

Batch = dict[str, Tensor]

# Tokens of texts for which attention is written out in bfloat16 on the CPU: the backward pass of
# torch's fused one takes longer there than all the rest of the model.
_SHORT_TEXT = 128


def encode(tokenizer: Any, texts: Texts, max_length: int = 128) -> list[dict[str, Any]]:
    """Tokenise texts, without padding.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: what to tokenise.
        max_length: longer texts are cut to this number of tokens.

    Returns:
        One mapping per text: ``input_ids`` and whatever else the tokenizer gives, and
        ``labels``, the class index.
    """
    encoded = tokenizer(texts.texts, texts.pairs, truncation=True, max_length=max_length)
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
    transformers = import_extra("transformers")
    rows = encode(tokenizer, texts, max_length)
    lengths = [len(row["input_ids"]) for row in rows]
    generator = torch.Generator().manual_seed(seed)
    sampler = None
    if by_length and shuffle:
        trainer_utils = import_extra("transformers.trainer_pt_utils")
        sampler = trainer_utils.LengthGroupedSampler(
            batch_size, lengths=lengths, generator=generator
        )
    elif by_length:
        rows = [rows[index] for index in sorted(range(len(rows)), key=lengths.__getitem__)]
    return DataLoader(
        rows,
        batch_size=batch_size,
        shuffle=shuffle and sampler is None,
        sampler=sampler,
        generator=generator,
        collate_fn=collator(transformers, tokenizer),
    )


def collator(transformers: Any, tokenizer: Any) -> Callable[[list[dict[str, Any]]], Batch]:
    """Return what makes a padded batch of the rows of :func:`encode`."""
    pad = transformers.DataCollatorWithPadding(tokenizer)
    return lambda rows: dict(pad(rows))


def bfloat16_is_faster(device: torch.device | str = "cpu") -> bool:
    """Return whether bfloat16 matrix products are faster than float32 on this device."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.device(device).type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # since torch 2.6
    return bool(supported and supported()) and _bfloat16_wins_on_this_cpu()


@cache
def _bfloat16_wins_on_this_cpu() -> bool:
    """Try it: that there are instructions for it says little.  On a Xeon whose matrix units (AMX) a
    virtual machine hides, products in bfloat16 take twice as long as in float32."""
    seconds = {torch.float32: math.inf, torch.bfloat16: math.inf}
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for _, dtype in product(range(4), seconds):
            left, right = (
                torch.ones(shape, dtype=dtype, device="cpu") for shape in ((1024, 768), (768, 768))
            )
            started = time.perf_counter()
            torch.mm(left, right)
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - started)
    return seconds[torch.bfloat16] < seconds[torch.float32]


def _autocast(device: torch.device, bfloat16: bool | None) -> torch.autocast:
    enabled = bfloat16_is_faster(device) if bfloat16 is None else bfloat16
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


@contextmanager
def for_backward(
    batch: Batch, device: torch.device, bfloat16: bool | None = None
) -> Iterator[None]:
    """Autocast, and on the CPU what keeps a backward pass in bfloat16 from being slow."""
    enabled = bfloat16_is_faster(device) if bfloat16 is None else bfloat16
    tokens = max((values.shape[1] for values in batch.values() if values.dim() > 1), default=0)
    written_out = enabled and device.type == "cpu" and tokens <= _SHORT_TEXT
    with _autocast(device, enabled), sdpa_kernel(SDPBackend.MATH) if written_out else nullcontext():
        yield


def text_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the model's own loss, in bfloat16 where that is faster: gradients for a Fisher and
    the losses of trials need no more."""
    with for_backward(batch, batch["labels"].device):
        return model(**batch).loss.float()


def prediction_text_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return :func:`obert_kernels.losses.default_loss`, in bfloat16 where that is faster."""
    with for_backward(batch, batch["labels"].device):
        return default_loss(model, batch)


# What the commands take gradients of.
LOSSES = {"labels": text_loss, "predictions": prediction_text_loss}


def fine_tune(
    model: nn.Module,
    loader: DataLoader[Batch],
    epochs: float,
    learning_rate: float = 2e-5,
    *,
    masks: Mapping[str, Tensor] | None = None,
    bfloat16: bool | None = None,
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
        bfloat16: compute in bfloat16 (the weights stay as they are); None: where the
            processor has it natively.
        seed: of dropout.
        progress: called as ``progress(stage, done, total)``, in steps.
        stage: name given to ``progress``.

    Raises:
        ValueError: the loss became NaN or infinite.
    """
    transformers = import_extra("transformers")
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
            for step, batch in enumerate(take_batches(loader, steps)):
                batch = to_device(batch, device)
                with for_backward(batch, device, bfloat16):
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


class Quality(NamedTuple):
    """How well a model does.

    Attributes:
        accuracy: share of texts whose class it gives right.
        loss: mean over the texts; NaN for a model that returns none.
    """

    accuracy: float
    loss: float


def quality(
    model: nn.Module,
    loader: Iterable[Batch],
    *,
    bfloat16: bool | None = None,
    progress: Progress | None = None,
    stage: str = "evaluate",
) -> Quality:
    """Return accuracy and loss of the model, in eval mode.

    Args:
        model: returns an output with ``.logits``, and ``.loss``, for ``model(**batch)``.
        loader: batches with ``labels``.
        bfloat16: as for :func:`fine_tune`.
        progress: called as ``progress(stage, done, total)``, in batches.
        stage: name given to ``progress``.
    """
    device = next(model.parameters()).device
    batches = loader if isinstance(loader, Sequence | DataLoader) else list(loader)
    right = total = 0
    loss = 0.0
    with evaluation(model), torch.inference_mode(), _autocast(device, bfloat16):
        for index, batch in enumerate(batches):
            batch = to_device(batch, device)
            output = model(**batch)
            found = output.logits.argmax(dim=-1)
            right += int((found == batch["labels"]).sum())
            total += len(found)
            own = getattr(output, "loss", None)
            loss += math.nan if own is None else float(own) * len(found)
            if progress is not None:
                progress(stage, index + 1, len(batches))
    return Quality(right / total, loss / total)


def accuracy(model: nn.Module, loader: Iterable[Batch], **options: Any) -> float:
    """Return the share of texts whose class the model gives right: see :func:`quality`."""
    return quality(model, loader, **options).accuracy
