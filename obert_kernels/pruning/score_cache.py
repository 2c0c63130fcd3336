"""Scores that several prunings of the same weights with the same Fisher ask for, computed once.

Scores depend on the damping but not on the sparsity, so that trials at several sparsities, and the
searches for a damping among them, ask for the same again and again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping

import torch
from torch import Tensor, nn

from ..fisher.free_memory import available_memory

# Dampings whose scores are kept: a search tries three to five, and begins at the same one.
_KEPT = 6

Scores = dict[str, Tensor]


class ScoreCache:
    """The last few scores, for as long as weights, masks and Fisher stay what they are.

    Nobody changes what comes out of it in place.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, Scores] = OrderedDict()

    @classmethod
    def if_room(
        cls, weights: Mapping[str, nn.Parameter], estimate_bytes: int, max_memory: int | None
    ) -> ScoreCache | None:
        """Return one if there is room for it.

        Args:
            weights: the matrices to be scored.
            estimate_bytes: what the estimate takes, scores at hand included.
            max_memory: bytes, those of the estimate included; None: half of what is free now.
        """
        numbers = sum(weight.numel() for weight in weights.values())
        if max_memory is not None:
            room = max_memory - estimate_bytes
        else:
            room = (available_memory(next(iter(weights.values())).device) or 0) // 2
        return cls() if _KEPT * numbers * torch.float32.itemsize <= room else None

    def once(self, key: Hashable, compute: Callable[[], Scores]) -> Scores:
        """Return what is known under a key; else what ``compute`` gives, from now on known."""
        if key not in self._known:
            self._known[key] = compute()
            if len(self._known) > _KEPT:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]
