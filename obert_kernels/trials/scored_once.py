"""Scores that several prunings of the same weights ask of a Fisher, computed once.

Scores depend on weights, mask and damping but not on the sparsity, so that trials at several
sparsities, and the searches for a damping among them, ask for the same again and again.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from ..fisher.base import Fisher
from ..fisher.estimate import FisherEstimate
from ..fisher.memory import available_memory

# Dampings whose scores are kept: a search tries three to five, and begins at the same one.
_KEPT = 6


class ScoredOnce:
    """A Fisher that keeps its last few scores; everything else is the Fisher's own.

    Args:
        fisher: which no longer changes.
    """

    def __init__(self, fisher: Fisher) -> None:
        self._fisher = fisher
        self._asked: tuple[Tensor, ...] = ()
        self._known: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fisher, name)

    @property
    def __class__(self) -> type[Fisher]:
        """What isinstance() sees: a saliency of somebody else may ask what Fisher it is given."""
        return type(self._fisher)

    def scores(self, weight: Tensor, damping: float, group_size: int = 1) -> Tensor:
        """See :meth:`Fisher.scores`."""
        return self._once("scores", (weight,), damping, group_size)

    def greedy_scores(
        self, weight: Tensor, keep: Tensor, damping: float, group_size: int = 1
    ) -> Tensor:
        """See :meth:`Fisher.greedy_scores`."""
        return self._once("greedy_scores", (weight, keep), damping, group_size)

    def _once(self, method: str, vectors: tuple[Tensor, ...], *numbers: float) -> Tensor:
        same = len(vectors) == len(self._asked) and all(map(torch.equal, vectors, self._asked))
        if not same:
            self._known.clear()
            self._asked = tuple(vector.clone() for vector in vectors)
        key = (method, *numbers)
        if key not in self._known:
            self._known[key] = getattr(self._fisher, method)(*vectors, *numbers)
            if len(self._known) > _KEPT:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key].clone()  # who asks may change it


def score_once(estimate: FisherEstimate, device: torch.device, max_memory: int | None) -> None:
    """Give the Fishers of an estimate a memory for their scores, if there is room for it.

    Args:
        estimate: which no longer changes.
        device: of the weights.
        max_memory: bytes, those of the estimate included; None: half of what is free now.
    """
    numbers = sum(fisher.num_weights for fisher in estimate.fishers.values())
    needed = numbers * ((_KEPT + 1) * torch.float32.itemsize + 1)
    if max_memory is not None:
        room = max_memory - estimate.plan.total_bytes
    else:
        room = (available_memory(device) or 0) // 2
    if needed <= room:
        fishers: dict[str, Any] = {n: ScoredOnce(f) for n, f in estimate.fishers.items()}
        estimate.fishers = fishers
