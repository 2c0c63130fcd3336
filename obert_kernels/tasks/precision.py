"""The type that gradients, predictions and training are computed in.

``auto`` is a rule on what the processor has and no measurement, so that the same machine computes
the same whatever else it is doing:

* CUDA: bfloat16 where the device has it natively;
* x86 with AMX (matrix units, Xeon from 2023 on): bfloat16;
* AMD with AVX512_BF16 (EPYC and Ryzen from 2022 on): bfloat16, products take about half the time;
* anything else: float32.  A Xeon with AVX512_BF16 but without AMX, which virtual machines often
  hide, takes twice as long in bfloat16.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..gradients.backward import evaluation
from ..gradients.losses import default_loss
from .loaders import Batch
from .model_config import summary

PRECISIONS = ("auto", "float32", "bfloat16")

# Tokens of texts for which attention is written out in bfloat16 on the CPU: the backward pass of
# torch's fused one takes longer there than all the rest of the model.
_SHORT_TEXT = 128


def choose_precision(name: str, device: torch.device | str = "cpu") -> torch.dtype:
    """Return the type to compute in: torch.float32 or torch.bfloat16.

    Args:
        name: "float32", "bfloat16", or "auto" for the rule at the top of this module.
        device: of the model.

    Raises:
        ValueError: another name.
    """
    if name not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {name!r}")
    if name == "auto":
        name = "bfloat16" if _bfloat16_is_faster(torch.device(device)) else "float32"
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def precision_name(dtype: torch.dtype) -> str:
    """Return "float32" or "bfloat16", as reports have it."""
    return str(dtype).removeprefix("torch.")


def _bfloat16_is_faster(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    return _has("amx_tile") or (_has("avx512_bf16") and _vendor() == "AuthenticAMD")


def _has(feature: str) -> bool:
    """Return whether torch finds a feature of the processor; older versions of torch find none."""
    found = getattr(torch.cpu, f"_is_{feature}_supported", None)
    return bool(found is not None and found())


def _vendor() -> str:
    """Return the vendor of the processor as Linux names it, "" where it cannot be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    vendors = (line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id"))
    return next(vendors, "")


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return a context in which products are computed in ``dtype``, float32 or bfloat16."""
    enabled = dtype == torch.bfloat16
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


@contextmanager
def for_backward(batch: Batch, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Autocast, and on the CPU what keeps a backward pass in bfloat16 from being slow."""
    tokens = max((values.shape[1] for values in batch.values() if values.dim() > 1), default=0)
    written_out = dtype == torch.bfloat16 and device.type == "cpu" and tokens <= _SHORT_TEXT
    attention = sdpa_kernel(SDPBackend.MATH) if written_out else nullcontext()
    with autocast(device, dtype), attention:
        yield


def text_loss(model: nn.Module, batch: Batch, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the model's own loss, computed in ``dtype``, as float32."""
    with for_backward(batch, batch["labels"].device, dtype):
        return model(**batch).loss.float()


def prediction_text_loss(
    model: nn.Module, batch: Batch, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return :func:`~obert_kernels.gradients.losses.default_loss`, computed in ``dtype``."""
    with for_backward(batch, batch["labels"].device, dtype):
        return default_loss(model, batch)


# What the commands take gradients of.
LOSSES = {"labels": text_loss, "predictions": prediction_text_loss}


def working_precision(
    name: str,
    model: nn.Module,
    batch: Batch,
    loss_of: Callable[[nn.Module, Batch, torch.dtype], Tensor] = text_loss,
) -> tuple[torch.dtype, str]:
    """Return the type to compute in, and a note where it is not the one of the rule.

    A forward and a backward pass are tried.  A model with constants that bfloat16 does not have,
    such as the first DeBERTa, fails or gives NaN in it; ``auto`` then takes float32.

    Args:
        name: see :func:`choose_precision`.
        model: a classifier.
        batch: some texts, the longest among them.
        loss_of: called with model, batch and type.

    Raises:
        ValueError: the model does not work on these texts, in float32 or the type asked for.
    """
    chosen = choose_precision(name, next(model.parameters()).device)
    problem = _problem(model, batch, loss_of, chosen)
    if not problem:
        return chosen, ""
    if chosen == torch.bfloat16 and name == "auto":
        in_float32 = _problem(model, batch, loss_of, torch.float32)
        if not in_float32:
            return (
                torch.float32,
                f"float32 is used: in bfloat16 the model does not work ({problem})",
            )
        chosen, problem = torch.float32, in_float32
    remedy = ": use --precision float32" if chosen == torch.bfloat16 else ""
    kind = precision_name(chosen)
    raise ValueError(f"the model does not work on the first texts in {kind} ({problem}){remedy}")


def _problem(
    model: nn.Module,
    batch: Batch,
    loss_of: Callable[[nn.Module, Batch, torch.dtype], Tensor],
    dtype: torch.dtype,
) -> str:
    """Return what is wrong with a forward and backward pass, "" if nothing is."""
    # Vectors: there are some in every layer, and their gradients need no memory.
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() == 1]
    try:
        with evaluation(model), torch.enable_grad():
            loss = loss_of(model, batch, dtype)
            found = torch.autograd.grad(loss, vectors, allow_unused=True) if vectors else ()
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        return summary(error)
    if not torch.isfinite(loss):
        return f"its loss is {loss.item()}"
    if not all(torch.isfinite(gradient).all() for gradient in found if gradient is not None):
        return "its gradients are NaN or infinite"
    return ""
