"""What is no model, no batches, no loss: found before the work, in words that name the remedy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Real

from torch import Tensor, nn

from ..fisher.estimate import FisherEstimate
from ..sparsity.layers import match_names
from ..sparsity.masks import check_sparsity
from ..sparsity.patterns import Pattern
from .config import PruningConfig


def check_batches(batches: object, name: str = "batches") -> None:
    """Raise TypeError for what is no iterable of batches; None is left to others."""
    if isinstance(batches, Mapping):
        raise TypeError(f"{name} must be an iterable of batches, got a mapping: pass [batch]")
    if isinstance(batches, str | bytes):
        raise TypeError(
            f"{name} must be an iterable of batches, got the text {batches[:40]!r}: read and "
            "tokenise it first"
        )
    if isinstance(batches, Tensor):
        raise TypeError(f"{name} must be an iterable of batches, got a tensor: pass [tensor]")
    if isinstance(batches, nn.Module):
        raise TypeError(f"{name} must be an iterable of batches, got a model: pass the model first")
    is_iterable = isinstance(batches, Iterable) or hasattr(batches, "__getitem__")
    if batches is not None and (isinstance(batches, type) or not is_iterable):
        hint = ": call it" if callable(batches) else ""
        raise TypeError(f"{name} must be an iterable of batches, got {_kind(batches)}{hint}")


def check_loss_fn(loss_fn: object) -> None:
    """Raise TypeError unless it can be called as ``loss_fn(model, batch)``."""
    wanted = "loss_fn is called as loss_fn(model, batch) and returns a scalar tensor"
    if isinstance(loss_fn, nn.Module):
        raise TypeError(
            f"{wanted}; {type(loss_fn).__name__} takes outputs and labels: pass, for example, "
            "lambda model, batch: criterion(model(batch[0]), batch[1])"
        )
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(f"{wanted}; got {loss_fn!r}")


def check_progress(progress: object) -> None:
    """Raise TypeError unless it can be called."""
    if progress is not None and not callable(progress):
        raise TypeError(f"progress is called as progress(stage, done, total); got {progress!r}")


def check_max_memory(max_memory: object) -> None:
    """Raise TypeError or ValueError unless it is a number of bytes."""
    if max_memory is None:
        return
    if not isinstance(max_memory, Real) or isinstance(max_memory, bool):
        raise TypeError(f"max_memory is a number of bytes, such as 8 * 2**30; got {max_memory!r}")
    if float(max_memory) <= 0:
        raise ValueError(f"max_memory must be positive, got {max_memory!r}")


def check_estimate(fisher: object) -> None:
    """Raise TypeError for what is no result of :func:`obert_kernels.estimate_fisher`."""
    if fisher is not None and not isinstance(fisher, FisherEstimate):
        raise TypeError(
            f"fisher must be what estimate_fisher or Pruner.fisher returned, got {_kind(fisher)}"
        )


def check_estimate_serves(
    fisher: FisherEstimate, config: PruningConfig, weights: Mapping[str, Tensor]
) -> None:
    """Raise ValueError for an estimate that matrices cannot be pruned with."""
    for name, weight in weights.items():
        known = fisher.fishers.get(name)
        if known is None or known.num_weights != weight.numel():
            raise ValueError(f"fisher has no estimate for {name}; estimate it with this model")
    if config.steps != 1:
        raise ValueError("steps needs batches for a new Fisher in each; leave fisher out")
    config.shape.block_size(fisher.block_size)
    if fisher.pattern.order != config.shape.order:
        raise ValueError(
            "the blocks of fisher have their weights in another order than pattern "
            f"{config.pattern}; call estimate_fisher with pattern={config.pattern!r}"
        )


def sparsity_targets(
    pattern: Pattern, names: Iterable[str], sparsity: float | Mapping[str, float] | None
) -> float | dict[str, float]:
    """Return the sparsity of all matrices together, or of each by name.

    Raises:
        ValueError: it is out of range, names no matrix, or one twice with different values.
    """
    wanted = pattern.target_sparsity(sparsity)
    if not isinstance(wanted, Mapping):
        return check_sparsity(wanted)
    targets: dict[str, float] = {}
    for expression, value in wanted.items():
        for name in match_names(names, [expression], "sparsity"):
            if targets.setdefault(name, check_sparsity(value)) != value:
                raise ValueError(f"sparsity: {name} is matched twice, with different values")
    if not targets:
        raise ValueError("sparsity is empty: give a number, or one for each matrix by name")
    return targets


def _kind(thing: object) -> str:
    if isinstance(thing, type):
        return f"the class {thing.__name__}"
    return f"a {type(thing).__name__}"
