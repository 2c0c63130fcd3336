"""Saving a pruned model: a normal Hugging Face checkpoint, its masks and a report.

A folder appears under its name only when it is whole: everything is written into a temporary
folder beside it, which is renamed at the end.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .downloads import import_extra

MASKS_FILE = "masks.safetensors"
REPORT_FILE = "report.json"


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
        ``masks.safetensors`` (one bool tensor per pruned weight, its shape, True = survives)
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
    """Write ``masks`` (name -> bool tensor, True = survives) to ``folder/masks.safetensors``."""
    safetensors = import_extra("safetensors.torch")
    tensors = {name: mask.detach().to("cpu").contiguous() for name, mask in masks.items()}
    safetensors.save_file(tensors, Path(folder) / MASKS_FILE)


def load_masks(folder: str | Path) -> dict[str, torch.Tensor]:
    """Return the masks saved in ``folder``: name -> bool tensor, True = survives.

    Raises:
        FileNotFoundError: ``folder`` holds no masks.
    """
    safetensors = import_extra("safetensors.torch")
    path = Path(folder) / MASKS_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {MASKS_FILE}: give a folder that save_pruned wrote, or a "
            "sparsity-... folder that obert-prune run wrote into its output"
        )
    return {name: mask.bool() for name, mask in safetensors.load_file(path).items()}


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` as readable JSON; the file appears whole or not at all.

    Numbers that JSON does not have, infinity and NaN, become null.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.incomplete")
    temporary.write_text(
        json.dumps(_finite(content), indent=2, allow_nan=False) + "\n", encoding="utf-8"
    )
    temporary.replace(path)


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def check_replaceable(folder: str | Path) -> None:
    """Check that a checkpoint may be saved as ``folder``.

    Raises:
        FileExistsError: it exists and is neither empty nor a checkpoint that was saved here.
    """
    folder = Path(folder)
    if not folder.exists():
        return
    if folder.is_dir():
        ours = all((folder / name).is_file() for name in ("config.json", REPORT_FILE))
        if ours or not any(folder.iterdir()):
            return
    raise FileExistsError(
        f"{folder} exists and was not written by obert_kernels: choose another output folder or "
        "move it away"
    )


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """Give a temporary folder to write into, renamed to ``folder`` when the block ends well.

    With a ``report.json`` in it, a later call may replace it.

    Raises:
        FileExistsError: ``folder`` exists and is neither empty nor a checkpoint that was saved
            here.
    """
    folder = Path(folder)
    check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        fresh = Path(temporary) / "fresh"
        fresh.mkdir()
        yield fresh
        if folder.exists():
            folder.rename(Path(temporary) / "old")
        fresh.rename(folder)
