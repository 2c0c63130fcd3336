"""Saliencies to masks: how many groups go, and which.

Everything here speaks of groups of c consecutive weights (c = 1: single weights) of a matrix
flattened by its :class:`obert_kernels.sparsity.patterns.Pattern`.  A mask is True where a weight
remains.  Weights that are zero when pruning starts count as pruned and stay so; a group counts
as pruned when all its weights are.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from numbers import Real

import torch
from torch import Tensor, nn

from .wrappers import listed, named_parameters


def check_sparsity(sparsity: float) -> float:
    """Return the sparsity if it lies in [0, 1]; raise ValueError or TypeError otherwise."""
    if not isinstance(sparsity, Real) or isinstance(sparsity, bool):
        raise TypeError(f"sparsity must be a number from 0 to 1, got {sparsity!r}")
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must be between 0 and 1 (0.8 is 80 %), got {sparsity!r}")
    return float(sparsity)


def masked_parameters(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """Return the parameters of a model that masks belong to, by name.

    Raises:
        TypeError: masks are no mapping from name to tensor.
        ValueError: a mask names no parameter of the model inside its wrappers, has another shape,
            or holds something else than 0 and 1.
    """
    _check_masks(masks)
    parameters = named_parameters(model)
    unknown = sorted(masks.keys() - parameters.keys())
    if unknown:
        raise ValueError(
            f"masks name parameters the model does not have: {listed(unknown)}; it has, for "
            f"example, {next(iter(parameters), 'none')}: load it as the class of the model that "
            "was pruned"
        )
    for name, mask in masks.items():
        if mask.shape != parameters[name].shape:
            raise ValueError(
                f"the mask of {name} has shape {list(mask.shape)}, the parameter has "
                f"{list(parameters[name].shape)}"
            )
    return {name: parameters[name] for name in masks}


def _check_masks(masks: object) -> None:
    wanted = "masks must be a mapping from parameter name to bool tensor"
    if not isinstance(masks, Mapping):
        raise TypeError(
            f"{wanted}, got a {type(masks).__name__}: give the masks of what prune returned, or "
            "obert_kernels.load_masks(folder)"
        )
    for name, mask in masks.items():
        if not isinstance(mask, Tensor):
            raise TypeError(
                f"{wanted}, got a {type(mask).__name__} for {name}: make it one, torch.as_tensor"
            )
        if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(
                f"the mask of {name} holds something else than 0 and 1: say which weights remain, "
                "for example mask > 0.5"
            )


def check_pruned_are_zero(model: nn.Module, masks: Mapping[str, Tensor], remedy: str) -> None:
    """Raise ValueError, naming the matrix, for weights that are pruned in the masks but not zero.

    Also as :func:`masked_parameters`.
    """
    for name, parameter in masked_parameters(model, masks).items():
        pruned = ~masks[name].bool().to(parameter.device)
        back = int(((parameter.detach() != 0) & pruned).sum())
        if back:
            raise ValueError(
                f"{name} has {back:,} pruned weights that are not zero any more: {remedy}"
            )


def magnitude_scores(weight: Tensor, group_size: int = 1) -> Tensor:
    """Sum of squares of each group, float32 ``[n / group_size]``."""
    return weight.detach().flatten().float().square().view(-1, group_size).sum(dim=1)


def remaining_groups(keep: Tensor, group_size: int) -> Tensor:
    """Groups with at least one weight left, bool ``[n / group_size]``."""
    return keep.flatten().view(-1, group_size).any(dim=1)


def check_scores(scores: Tensor, name: str) -> None:
    """Raise ValueError for scores that cannot be ranked."""
    if not bool((scores >= 0).all()):  # also false for NaN
        raise ValueError(f"the scores of {name} hold NaN or negative values")


def _sortable(scores: Tensor, name: str) -> Tensor:
    """Non-negative float32 as int32 of the same order (their bit patterns)."""
    check_scores(scores, name)
    return (scores.float() + 0.0).contiguous().view(torch.int32)


def _histogram(values: Tensor, bins: int) -> Tensor:
    return torch.bincount(values.long(), minlength=bins).cpu()


def _bucket(histogram: Tensor, count: int) -> tuple[int, int]:
    """Return the first bucket that reaches ``count`` and how many lie before it."""
    total = torch.cumsum(histogram, 0)
    bucket = int(torch.searchsorted(total, count))
    return bucket, int(total[bucket - 1]) if bucket > 0 else 0


def _smallest(scores: Mapping[str, Tensor], remaining: Mapping[str, Tensor], count: int) -> dict:
    """Mark the ``count`` smallest scores among the remaining groups of all matrices together.

    Radix selection on the bits of the scores, so that no copy of all scores is sorted.  Ties
    go by position: first matrix first, then lowest index.
    """
    keys = {name: _sortable(score, name) for name, score in scores.items()}
    high = torch.zeros(1 << 15, dtype=torch.int64, device="cpu")
    for name, key in keys.items():
        high += _histogram(key[remaining[name]] >> 16, 1 << 15)
    prefix, before = _bucket(high, count)
    low = torch.zeros(1 << 16, dtype=torch.int64, device="cpu")
    for name, key in keys.items():
        low += _histogram(key[remaining[name] & (key >> 16 == prefix)] & 0xFFFF, 1 << 16)
    suffix, inside = _bucket(low, count - before)
    threshold = prefix << 16 | suffix
    ties = count - before - inside
    chosen = {}
    for name, key in keys.items():
        equal = remaining[name] & (key == threshold)
        taken = equal & (torch.cumsum(equal, 0) <= ties)
        ties -= int(taken.sum())
        chosen[name] = (remaining[name] & (key < threshold)) | taken
    return chosen


def _groups_to_prune(remaining: Collection[Tensor], sparsity: float) -> int:
    """How many remaining groups must go to reach a sparsity; not above 0 if it is reached."""
    groups = sum(a.numel() for a in remaining)
    present = groups - sum(int(a.sum()) for a in remaining)
    return round(sparsity * groups) - present


def prunes_anything(
    keep: Mapping[str, Tensor],
    sparsity: float | Mapping[str, float],
    group_size: int = 1,
    scope: str = "global",
) -> bool:
    """Say whether :func:`select_masks` would prune any group, whatever the scores."""
    remaining = {name: remaining_groups(mask, group_size) for name, mask in keep.items()}
    if isinstance(sparsity, Mapping):
        return any(_groups_to_prune([remaining[name]], sparsity[name]) > 0 for name in remaining)
    if scope == "layer":
        return any(_groups_to_prune([a], sparsity) > 0 for a in remaining.values())
    return _groups_to_prune(remaining.values(), sparsity) > 0


def _prune_to(
    scores: Mapping[str, Tensor], keep: Mapping[str, Tensor], sparsity: float, group_size: int
) -> dict[str, Tensor]:
    remaining = {name: remaining_groups(keep[name], group_size) for name in scores}
    count = _groups_to_prune(remaining.values(), sparsity)
    if count <= 0:  # nothing is revived when the target lies below the present sparsity
        return {name: keep[name].clone() for name in scores}
    gone = _smallest(scores, remaining, count)
    return {
        name: keep[name] & ~gone[name].repeat_interleave(group_size).view_as(keep[name])
        for name in scores
    }


def n_of_m_mask(scores: Tensor, keep: Tensor, kept: int, span: int) -> Tensor:
    """Keep the ``kept`` remaining weights of the highest score in every ``span`` consecutive ones.

    Of equal scores the first goes first.

    Args:
        scores: ``[n]``.
        keep: present mask, bool ``[n]``.
        kept: N, weights that stay of each span.
        span: M, consecutive weights.
    """
    left = scores.double().masked_fill(~keep, -math.inf).view(-1, span)
    order = left.argsort(dim=1, stable=True)
    lowest = torch.zeros_like(left, dtype=torch.bool)
    lowest.scatter_(1, order[:, : span - kept], True)
    return keep & ~lowest.flatten()


def select_masks(
    scores: Mapping[str, Tensor],
    keep: Mapping[str, Tensor],
    sparsity: float | Mapping[str, float],
    group_size: int = 1,
    scope: str = "global",
) -> dict[str, Tensor]:
    """Choose the weights that remain.

    Exactly ``round(sparsity * groups)`` groups end up pruned, counted over all matrices
    together (scope "global") or in each (scope "layer"), ties included; where more are pruned
    already, the masks stay as they are.

    Args:
        scores: name to saliency, ``[n / group_size]``, non-negative; smallest go first.
        keep: name to present mask, bool of the weight's shape.
        sparsity: share of the groups to be pruned, or one for each name (implies "layer").
        group_size: c, consecutive weights that go together.
        scope: "global" for one ranking over all matrices, "layer" for one in each.

    Returns:
        name to new mask, in the shape of the present one.

    Raises:
        ValueError: sparsity outside [0, 1], unknown scope, NaN or negative scores.
    """
    if isinstance(sparsity, Mapping):
        return {
            name: _prune_to({name: scores[name]}, keep, check_sparsity(sparsity[name]), group_size)[
                name
            ]
            for name in scores
        }
    check_sparsity(sparsity)
    if scope == "layer":
        return select_masks(scores, keep, dict.fromkeys(scores, sparsity), group_size)
    if scope != "global":
        raise ValueError(f"scope must be 'global' or 'layer', got {scope!r}")
    return _prune_to(scores, keep, sparsity, group_size)
