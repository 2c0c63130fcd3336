"""Which of the rows that a layer sees are tokens, and which are padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..gradients.ignored_labels import IGNORED


def without_padding(tensor: Tensor, batch: Any, of_decoder: bool) -> Tensor:
    """Return the rows ``[tokens, features]`` that the batch's masks let count, float32 or float64.

    Args:
        tensor: ``[samples, tokens, features]``, with samples and tokens in either order or as one.
        batch: its masks are looked for by the names that Hugging Face gives them.
        of_decoder: the rows are a decoder's tokens.
    """
    rows = tensor.reshape(-1, tensor.shape[-1])
    mask = _mask(batch, of_decoder) if isinstance(batch, Mapping) else None
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.numel() == len(rows):
        tokens_first = tensor.shape[:-1] == mask.mT.shape != mask.shape
        mask = mask.mT if tokens_first else mask
        rows = rows[mask.to(rows.device).flatten() != 0]
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _mask(batch: Mapping[str, Any], of_decoder: bool) -> Any:
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    if not of_decoder:
        return mask
    if batch.get("decoder_attention_mask") is not None:
        return batch["decoder_attention_mask"]
    if isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point():
        return labels != IGNORED
    # Without tokens of its own, a decoder is given the encoder's.
    return None if batch.get("decoder_input_ids") is not None else mask
