"""Helpers for batches of any structure: mappings, tuples, lists or tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sized
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor


def map_tensors(batch: Any, function: Callable[[Tensor], Any]) -> Any:
    """Apply a function to the tensors of a batch (mapping, tuple, list or tensor)."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(value, function) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        values = [map_tensors(value, function) for value in batch]
        is_named = hasattr(batch, "_fields")  # a namedtuple takes its values one by one
        return type(batch)(*values) if is_named else type(batch)(values)
    return batch


def tensors_in(batch: Any) -> list[Tensor]:
    """Return the tensors of a batch."""
    found: list[Tensor] = []
    map_tensors(batch, found.append)
    return found


def to_device(batch: Any, device: torch.device) -> Any:
    """Move the tensors of a batch to a device; copies of those made inside inference_mode, which
    can have no part in a backward pass."""

    def moved(tensor: Tensor) -> Tensor:
        if not tensor.is_inference():
            return tensor.to(device)
        with torch.inference_mode(False):
            return tensor.clone().to(device)

    return map_tensors(batch, moved)


def how_many(batches: Iterable[Any]) -> int | None:
    """Return the number of batches, None if they do not know it.

    A DataLoader has a length, but of an iterable data set that raises.
    """
    try:
        return len(batches) if isinstance(batches, Sized) else None
    except TypeError:
        return None


def samples_in(batch: Any) -> int | None:
    """Return the common first dimension of a batch's tensors, None if they have none."""
    sizes = {tensor.shape[0] if tensor.dim() else None for tensor in tensors_in(batch)}
    return sizes.pop() if len(sizes) == 1 else None


def split_batch(batch: Any, size: int) -> list[Any]:
    """Cut a batch into batches of ``size`` samples, the last one of what is left.

    Raises:
        ValueError: its tensors have no common first dimension.
    """
    samples = samples_in(batch)
    if samples is None:
        raise ValueError(
            "samples_per_grad needs batches whose tensors all have one row per sample; got a "
            f"{type(batch).__name__} without; leave samples_per_grad out for one gradient per batch"
        )
    return [map_tensors(batch, itemgetter(slice(i, i + size))) for i in range(0, samples, size)]


def spread_out(batches: list[Any], num_samples: int) -> list[Any]:
    """Return so many of the samples, if there are more, from all batches alike: these may be
    sorted.  Of batches without a common first dimension, so many batches."""
    sizes = [samples_in(batch) for batch in batches]
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes):
        return batches[:: max(1, len(batches) // num_samples)]
    total = sum(known)
    if total <= num_samples:
        return batches
    wanted = torch.arange(num_samples, device="cpu") * total // num_samples
    found = []
    first = 0
    for batch, size in zip(batches, known, strict=True):
        rows = wanted[(wanted >= first) & (wanted < first + size)] - first
        if len(rows):
            found.append(map_tensors(batch, itemgetter(rows)))
        first += size
    return found


def split_off(batches: list[Any], share: int) -> tuple[list[Any], list[Any]]:
    """Return the batches without every ``share``-th sample, and those samples.

    Batches without a common first dimension are taken whole; of a single one both have it all.
    """
    sizes = [samples_in(batch) for batch in batches]
    if None in sizes or sum(size or 0 for size in sizes) < 2:
        return [b for i, b in enumerate(batches) if i % share] or batches, batches[::share]
    rest: list[Any] = []
    taken: list[Any] = []
    first = 0
    for batch, size in zip(batches, sizes, strict=True):
        assert size is not None
        numbers = torch.arange(first, first + size, device="cpu")
        first += size
        for is_taken, found in ((False, rest), (True, taken)):
            rows = ((numbers % share == 0) == is_taken).nonzero()[:, 0]
            if len(rows):
                found.append(map_tensors(batch, itemgetter(rows)))
    return rest, taken
