"""Saving a pruned model: a normal Hugging Face checkpoint, its masks and a report.

A folder appears under its name only when it is whole: everything is written into a temporary
folder beside it, which is renamed at the end.  What cannot be written there is saved in the folder
for temporary files, and the error says where.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch

from ..files import REPORT_FILE, json_text, whole_folder, write_json
from ..sparsity.masks import check_pruned_are_zero
from ..sparsity.wrappers import check_no_adapters, plain_state_dict, unwrapped

MASKS_FILE = "masks.safetensors"
STATE_FILE = "state_dict.pt"


def save_pruned(
    result: Any, tokenizer: Any, folder: str | Path, extra: Mapping[str, Any] | None = None
) -> Path:
    """Save a pruned Hugging Face model with its tokenizer, masks and report.

    Args:
        result: what :func:`obert_kernels.prune` returned; of a wrapped model (``torch.compile``,
            ``DistributedDataParallel``) the one inside is saved.
        tokenizer: tokenizer to save beside the model, or None.
        folder: where to save; an earlier checkpoint of this function there is replaced, if nothing
            was added to it or changed in it.
        extra: further JSON-ready entries of ``report.json``, for example the accuracy.

    Returns:
        The folder, holding ``config.json``, ``model.safetensors``, the tokenizer's files,
        ``masks.safetensors`` (one bool tensor per pruned weight, its shape, True = remains)
        and ``report.json``, which also lists the files with their digests.

    Raises:
        FileExistsError, OSError: ``folder`` holds something else, or it could not be saved there;
            the message says where it was saved instead.
        ValueError: pruned weights are not zero any more, or the model has adapters of PEFT, which
            would be saved alone; nothing was written.
        TypeError: it is no model of Hugging Face, or an argument is of a wrong type; nothing was
            written.
    """
    _check_arguments(result, tokenizer, folder, extra)
    model, masks, report = result
    model = cast(Any, unwrapped(model))
    if not hasattr(model, "save_pretrained"):
        raise TypeError(
            f"save_pruned needs a model with save_pretrained, got a {type(model).__name__}: save "
            "its state_dict() and the masks with torch.save"
        )
    check_no_adapters(model)
    remedy = "train inside obert_kernels.pruned_weights_kept(model, masks), which zeroes them, too"
    check_pruned_are_zero(model, masks, remedy)
    state = plain_state_dict(model)
    # Left to the model itself unless something inside it is wrapped.
    own_names = {} if state.keys() == model.state_dict().keys() else {"state_dict": state}

    def write(fresh: Path) -> None:
        save_masks(masks, fresh)
        model.save_pretrained(fresh, **own_names)
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
        write_json(fresh / REPORT_FILE, {**report.to_dict(), **(extra or {})})

    return save_folder(folder, write, model)


def _check_arguments(result: Any, tokenizer: Any, folder: Any, extra: Any) -> None:
    """Raise TypeError or ValueError for what would fail once weights have been written."""
    is_result = isinstance(result, tuple) and len(result) == 3
    if not is_result or not hasattr(result[2], "to_dict"):
        raise TypeError(
            "save_pruned takes what prune returned, or the tuple (model, masks, report) of it; got "
            f"a {type(result).__name__}"
        )
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise TypeError(
            f"tokenizer must have save_pretrained, or be None; got a {type(tokenizer).__name__}: "
            "load it with AutoTokenizer.from_pretrained"
        )
    if not isinstance(folder, str | PathLike) or not str(folder):
        raise TypeError(f"folder must be the path of the folder to save in, got {folder!r}")
    if not isinstance(extra, Mapping | None):
        raise TypeError(f"extra must be a mapping, got a {type(extra).__name__}")
    for name, value in (extra or {}).items():
        try:
            json_text({name: value})
        except (TypeError, ValueError) as error:
            raise TypeError(f"extra: {name!r} cannot be written as JSON: {error}") from None


def save_folder(folder: str | Path, write: Callable[[Path], object], model: Any) -> Path:
    """Save a folder, or what can be saved of it elsewhere.

    Args:
        folder: see :func:`obert_kernels.files.whole_folder`.
        write: writes the content into the folder it is given.
        model: its weights are saved if ``write`` fails in the other place, too.

    Raises:
        FileExistsError, OSError: ``folder`` holds something else, or it could not be saved there;
            the message says where it was saved instead.
    """
    try:
        with whole_folder(folder) as fresh:
            write(fresh)
    except Exception as error:  # whatever it is: hours of work may be in the model
        kind = FileExistsError if isinstance(error, FileExistsError) else OSError
        raise kind(f"{folder} could not be saved: {error}; {_rescue(write, model)}") from error
    return Path(folder)


def _rescue(write: Callable[[Path], object], model: Any) -> str:
    """Save in the folder for temporary files; say what is where."""
    try:
        place = Path(tempfile.mkdtemp(prefix="obert-saved-"))
    except OSError as error:
        return f"nor is there another place ({error})"
    try:
        write(place)
        return f"the checkpoint is whole in {place} instead: move it to where you want it"
    except Exception as error:
        reason = error
    try:
        torch.save(model.state_dict(), place / STATE_FILE)
        return f"the weights alone are in {place / STATE_FILE} ({reason})"
    except Exception as error:
        return f"nor could it be saved in {place} ({error})"


def save_masks(masks: Mapping[str, torch.Tensor], folder: str | Path) -> None:
    """Write ``masks`` (name -> bool tensor, True = remains) to ``folder/masks.safetensors``."""
    from safetensors.torch import save_file

    tensors = {name: mask.detach().to("cpu").contiguous() for name, mask in masks.items()}
    save_file(tensors, Path(folder) / MASKS_FILE)


def checkpoint_bytes(model: Any, masked: int = 0) -> int:
    """Return the least bytes of a checkpoint: weights, and masks of so many weights."""
    weights = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    return sum(weights.values()) + masked


def load_masks(folder: str | Path) -> dict[str, torch.Tensor]:
    """Return the masks saved in ``folder``: name -> bool tensor, True = remains.

    Raises:
        FileNotFoundError: ``folder`` holds no masks.
        ValueError: they are damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder) / MASKS_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {MASKS_FILE}: give a folder that save_pruned wrote, or a "
            "sparsity-... folder that obert-prune run wrote into its output"
        )
    try:
        return {name: mask.bool() for name, mask in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): save the model again") from error
