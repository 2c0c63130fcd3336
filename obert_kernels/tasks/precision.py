"""The type that gradients and predictions are computed in."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..gradients.losses import default_loss
from .loaders import Batch

# Tokens of texts for which attention is written out in bfloat16 on the CPU: the backward pass of
# torch's fused one takes longer there than all the rest of the model.
_SHORT_TEXT = 128


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
    """Return :func:`~obert_kernels.gradients.losses.default_loss`, in bfloat16 where faster."""
    with for_backward(batch, batch["labels"].device):
        return default_loss(model, batch)


# What the commands take gradients of.
LOSSES = {"labels": text_loss, "predictions": prediction_text_loss}
