"""What a pruning call will need, before it starts, and layer passes where that is too much."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..gradients.buffers import GRADIENTS_PER_UPDATE, STREAMED_PER_UPDATE, row_bytes
from ..sparsity.patterns import Pattern
from .config import FisherConfig
from .estimators import estimators
from .free_memory import available_memory, readable

# Of a weight while masks are chosen: float32 score, int32 sort key, and four bool masks (present,
# present group, to be pruned, new).  Later, new weights take the place of scores and keys.
_SELECTION_BYTES = 12
_SCORE_BYTES, _MASK_BYTES = 4, 1
# Dampings tried in the same passes: a search always looks at its start and both sides of it.
_MOST_TRIALS = 3


@dataclass(frozen=True)
class MemoryPlan:
    """Which matrices are worked on together, and the memory of the largest pass in bytes.

    Attributes:
        passes: names of the matrices of each pass, in model order.
        gram_bytes: Gram of the largest pass.
        buffer_bytes: gathered gradients of the largest pass, or of the largest matrix where
            gradients are streamed.
        other_bytes: scores and masks, later masks and new weights (all matrices), and the weights
            before the first step where they are kept; masks and new weights of trials.
        gradients_per_update: k, gradients added at once.
        trials_held: trial prunings there is room for in several passes, beside the one at work:
            the best so far, and others that are made in the same passes.
        later_bytes: of what follows when the Fisher is gone, the reconstruction.
    """

    passes: list[list[str]]
    gram_bytes: int
    buffer_bytes: int
    other_bytes: int
    gradients_per_update: int
    trials_held: int = 0
    later_bytes: int = 0

    def to_dict(self) -> dict[str, int]:
        """As reports have it."""
        return {
            "gram": self.gram_bytes,
            "gathered gradients": self.buffer_bytes,
            "other": self.other_bytes,
            "reconstruction": self.later_bytes,
            "passes": len(self.passes),
        }

    @property
    def total_bytes(self) -> int:
        """The most that will be held at any time."""
        return max(self.gram_bytes + self.buffer_bytes + self.other_bytes, self.later_bytes)


def plan_passes(
    weights: Mapping[str, nn.Parameter],
    config: FisherConfig,
    pattern: Pattern,
    max_memory: int | None,
    *,
    streamed: bool,
    can_split: bool = True,
    keeps_weights: bool = False,
    has_trials: bool = False,
    later_bytes: int = 0,
) -> MemoryPlan:
    """Split the matrices into passes that fit.

    Args:
        weights: the matrices to prune.
        config: of the Fisher, with a block size.
        pattern: whose groups the Fisher is to score.
        max_memory: bytes the call may use on top of the model; None: one pass, if that fits
            what is free now.
        streamed: gradients come one matrix at a time and need not be gathered.
        can_split: there may be several passes.
        keeps_weights: a copy of the weights is kept, to be put back if a later sub-step fails.
        has_trials: the damping is chosen by trial prunings; in several passes some are made at
            once, and the best is kept.
        later_bytes: of what follows when the Fisher is gone.

    Raises:
        MemoryError: it does not fit; the message gives the figures and the remedies.
    """
    budget = max_memory
    if budget is None:
        budget = available_memory(next(iter(weights.values())).device)
    k = min(STREAMED_PER_UPDATE if streamed else GRADIENTS_PER_UPDATE, config.num_grads)
    num_bytes = estimators.find(config.estimator).num_bytes
    assert config.block_size is not None
    size, dtype = config.block_size, config.torch_dtype
    gram = {
        name: num_bytes(pattern.flat(w.detach() != 0), size, pattern.span, dtype)
        for name, w in weights.items()
    }

    def plan(k: int, trials: int = 0) -> MemoryPlan:
        # Gathered, one gradient of the batch at hand stands beside the buffer of k.
        held = {
            name: w.numel() * w.element_size() * k
            if streamed
            else k * row_bytes(w.numel(), w.element_size()) + w.numel() * w.element_size()
            for name, w in weights.items()
        }
        together = max if streamed else sum
        other = sum(
            w.numel() * (_SELECTION_BYTES + keeps_weights * w.element_size())
            + w.numel() * trials * max(_SCORE_BYTES, _MASK_BYTES + w.element_size())
            for w in weights.values()
        )
        if max_memory is None or not can_split:
            passes = [list(weights)]
        else:
            passes = _fill(gram, held, together, max_memory - other)
        return MemoryPlan(
            passes,
            max(sum(gram[name] for name in names) for names in passes),
            max(together(held[name] for name in names) for names in passes),
            other,
            k,
            trials,
            later_bytes,
        )

    def fits(plan: MemoryPlan) -> bool:
        return budget is None or plan.total_bytes <= budget

    def best_plan(k: int) -> MemoryPlan:
        plain = plan(k)
        if not has_trials or len(plain.passes) == 1:
            return plain
        plans = [plain, *(plan(k, trials) for trials in range(1, _MOST_TRIALS + 1))]
        # Some five rounds of passes, one less for each trial that another's passes serve.
        return min(
            filter(fits, plans),
            key=lambda one: len(one.passes) * (5 - one.trials_held),
            default=plain,
        )

    found = best_plan(k)
    while not fits(found) and k > 1:
        k //= 2  # slower, but it may fit
        found = best_plan(k)
    if budget is not None and not fits(found):
        remedies = _remedies(found, max_memory is None, can_split, size, dtype)
        raise MemoryError(
            f"pruning needs {readable(found.total_bytes)} (Gram {readable(found.gram_bytes)}, "
            f"gathered gradients {readable(found.buffer_bytes)}, the rest "
            f"{readable(found.other_bytes)}; later the reconstruction "
            f"{readable(found.later_bytes)}) but "
            f"{'free memory' if max_memory is None else 'max_memory'} is {readable(budget)}. "
            f"Remedies: {'; '.join(remedies)}"
        )
    return found


def _fill(
    gram: Mapping[str, int],
    held: Mapping[str, int],
    together: Callable[[Iterable[int]], int],
    budget: int,
) -> list[list[str]]:
    """Cut the matrices, in order, into as few runs as fit the budget; a run has at least one."""
    passes: list[list[str]] = [[]]
    for name in gram:
        names = [*passes[-1], name]
        needed = sum(gram[n] for n in names) + together(held[n] for n in names)
        if passes[-1] and needed > budget:
            passes.append([name])
        else:
            passes[-1].append(name)
    return passes


def _remedies(
    plan: MemoryPlan, is_free: bool, can_split: bool, block_size: int, dtype: torch.dtype
) -> list[str]:
    """What can be done about a plan that does not fit, in words for Python and command line."""
    remedies = []
    several = sum(map(len, plan.passes)) > 1
    if is_free and can_split and several:
        remedies.append("set max_memory to work on the layers in several passes")
    if plan.later_bytes == plan.total_bytes:
        remedies.append("leave the reconstruction out (None in Python, none on the command line)")
    if not is_free:
        remedies.append(f"raise max_memory to at least {plan.total_bytes} bytes")
    if not can_split and several:
        remedies.append("name fewer matrices with params")
    if block_size > 1:
        remedies.append(f"a smaller block_size (now {block_size}; memory is proportional to it)")
    if dtype == torch.float64:
        remedies.append("fisher_dtype float32 (half the Gram)")
    return remedies or ["free some memory"]
