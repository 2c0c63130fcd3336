"""Saving a pruned model: a normal Hugging Face checkpoint, its masks and a report.

A folder appears under its name only when it is whole: everything is written into a temporary
folder beside it, which is renamed at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..files import REPORT_FILE, whole_folder, write_json

MASKS_FILE = "masks.safetensors"


def save_pruned(
    result: Any, tokenizer: Any, folder: str | Path, extra: Mapping[str, Any] | None = None
) -> Path:
    """Save a pruned Hugging Face model with its tokenizer, masks and report.

    Args:
        result: what :func:`obert_kernels.prune` returned.
        tokenizer: tokenizer to save beside the model, or None.
        folder: where to save; an earlier checkpoint of this function there is replaced.
        extra: further JSON-ready entries of ``report.json``, for example the accuracy.

    Returns:
        The folder, holding ``config.json``, ``model.safetensors``, the tokenizer's files,
        ``masks.safetensors`` (one bool tensor per pruned weight, its shape, True = remains)
        and ``report.json``.

    Raises:
        FileExistsError: ``folder`` holds something else, another checkpoint included.
    """
    model, masks, report = result
    with whole_folder(folder) as fresh:
        save_masks(masks, fresh)
        model.save_pretrained(fresh)
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
        write_json(fresh / REPORT_FILE, {**report.to_dict(), **(extra or {})})
    return Path(folder)


def save_masks(masks: Mapping[str, torch.Tensor], folder: str | Path) -> None:
    """Write ``masks`` (name -> bool tensor, True = remains) to ``folder/masks.safetensors``."""
    from safetensors.torch import save_file

    tensors = {name: mask.detach().to("cpu").contiguous() for name, mask in masks.items()}
    save_file(tensors, Path(folder) / MASKS_FILE)


def load_masks(folder: str | Path) -> dict[str, torch.Tensor]:
    """Return the masks saved in ``folder``: name -> bool tensor, True = remains.

    Raises:
        FileNotFoundError: ``folder`` holds no masks.
    """
    from safetensors.torch import load_file

    path = Path(folder) / MASKS_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {MASKS_FILE}: give a folder that save_pruned wrote, or a "
            "sparsity-... folder that obert-prune run wrote into its output"
        )
    return {name: mask.bool() for name, mask in load_file(path).items()}
