"""Block Fisher of the weights that are left: pruned rows and columns are not even stored.

The gradient of a pruned weight does not matter any more, and its row of the Fisher block is
zero but for the damping.  So the blocks keep their borders and hold only the weights that are
left; what comes out is the same.  Blocks are sorted into a few sizes by what is left of them,
and each size is a :class:`GramFisher` of its own on its part of the Gram.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.checks import MAX_BLOCK_SIZE
from ..ops.living import gram_accumulate_living
from ..ops.status import NumericalError
from ..sparsity.patterns import DEFAULT_BLOCK_SIZE
from .base import Fisher, as_rows, came_back
from .gram import GramFisher, gram_bytes
from .living_layout import (
    BLOCK_BYTES,
    PLACE_BYTES,
    RemainingLayout,
    layout_bytes,
    layout_of,
    places_by_size,
)

# Tables and a call for each size take time and room of their own: not for less than a quarter.
_WORTHWHILE = 0.75


_MOST_WEIGHTS = 2**31 - 1  # int32 says which weight stands at a place


def _size(
    remaining: Tensor, block_size: int, group_size: int, dtype: torch.dtype
) -> tuple[int, RemainingLayout | None]:
    """Memory of a Fisher, and the remaining weights if it is one of them alone."""
    full = gram_bytes(remaining.numel(), block_size, dtype)
    if remaining.numel() <= _MOST_WEIGHTS and not bool(remaining.all()):
        layout = layout_of(remaining, block_size, group_size)
        live = layout_bytes(layout, group_size, dtype)
        if live < _WORTHWHILE * full:
            return int(live), layout
    return full, None


def fisher_bytes(
    remaining: Tensor,
    block_size: int,
    group_size: int = 1,
    dtype: torch.dtype = torch.float64,
) -> int:
    """Memory that :func:`block_fisher` will take."""
    return _size(remaining, block_size, group_size, dtype)[0]


def block_fisher(
    remaining: Tensor,
    block_size: int,
    group_size: int = 1,
    *,
    dtype: torch.dtype = torch.float64,
    name: str = "weights",
) -> GramFisher | LiveFisher:
    """Return a Fisher of the remaining weights alone if that is worthwhile, else of all weights.

    Args:
        remaining: bool, the weights that are left.
        block_size, group_size, dtype, name: as for :class:`LiveFisher`.
    """
    layout = _size(remaining, block_size, group_size, dtype)[1]
    if layout is not None:
        return LiveFisher(remaining, block_size, group_size, dtype=dtype, name=name, layout=layout)
    return GramFisher(
        remaining.numel(), block_size, dtype=dtype, device=remaining.device, name=name
    )


@dataclass
class _Part:
    """The blocks of one size; its places are a slice of those by part, its Gram one of all."""

    size: int
    places: slice
    gram: slice


class LiveFisher(Fisher):
    """Block Fisher of the remaining weights of a matrix; does what :class:`GramFisher` does
    but for ``inverse`` and ``solve``.

    Args:
        remaining: ``[n]`` bool, True for weights that are not pruned.
        block_size: B, of the blocks that the remaining weights are taken from.
        group_size: c, if groups of consecutive weights are to be scored.
        dtype: type of the Grams.
        name: used in error messages.
        layout: what :func:`layout_of` says of them, if that has been asked.

    Raises:
        ValueError: a block with whole groups is larger than the largest there can be, or there
            are 2^31 weights or more.
    """

    looks_at_pruned = False

    def __init__(
        self,
        remaining: Tensor,
        block_size: int = DEFAULT_BLOCK_SIZE,
        group_size: int = 1,
        *,
        dtype: torch.dtype = torch.float64,
        name: str = "weights",
        layout: RemainingLayout | None = None,
    ) -> None:
        if remaining.numel() > _MOST_WEIGHTS:
            raise ValueError(f"{name} has {remaining.numel()} weights; {_MOST_WEIGHTS} is the most")
        self.num_weights = remaining.numel()
        self.block_size = block_size
        self.group_size = group_size
        self.name = name
        self.device = remaining.device
        self.num_gradients = 0
        if layout is None:
            layout = layout_of(remaining, block_size, group_size)
        places = {size: p for size, p in places_by_size(layout.needed, group_size).items() if p}
        if places and max(places) > MAX_BLOCK_SIZE:
            raise ValueError(
                f"{name}: blocks of {block_size} have up to {max(places)} places in whole groups "
                f"of {group_size}; {MAX_BLOCK_SIZE} is the most: choose a smaller block_size"
            )
        sizes = torch.tensor(list(places), dtype=torch.long, device=self.device)
        self._lay_out(layout, sizes, dtype)

    def _lay_out(self, layout: RemainingLayout, sizes: Tensor, dtype: torch.dtype) -> None:
        """Find a place for every weight, and for the Gram of every block."""
        part = torch.searchsorted(sizes, layout.needed)
        size = sizes[part]
        end = torch.cumsum(size, 0)
        self._first_place = torch.cat([end.new_zeros(1), end])
        places = int(self._first_place[-1])
        self._source = torch.full((places,), -1, dtype=torch.int32, device=self.device)
        at = self._first_place[layout.block] + layout.place
        self._source[at] = layout.weight.int()
        triangle = sizes * (sizes + 1) // 2
        blocks = torch.bincount(part, minlength=len(sizes))
        starts = (torch.cumsum(blocks * triangle, 0) - blocks * triangle).tolist()
        self._gram = torch.zeros(int((blocks * triangle).sum()), dtype=dtype, device=self.device)
        self._gram_start = torch.zeros_like(layout.needed)
        self._parts: list[_Part] = []
        # By part: the weight at each place, and whether there is none.
        self._index = torch.empty_like(self._source)
        self._empty = torch.empty_like(self._source, dtype=torch.bool)
        begin = 0
        for index, s in enumerate(sizes.tolist()):
            mine = (part == index).nonzero().flatten()
            rank = torch.arange(len(mine), device=self.device)
            self._gram_start[mine] = starts[index] + rank * triangle[index]
            within = torch.arange(s, device=self.device)
            source = self._source[self._first_place[mine][:, None] + within].flatten()
            gram = slice(starts[index], starts[index] + len(mine) * int(triangle[index]))
            here = slice(begin, begin + len(source))
            torch.clamp_min(source, 0, out=self._index[here])
            torch.lt(source, 0, out=self._empty[here])
            self._parts.append(_Part(s, here, gram))
            begin = here.stop

    @property
    def num_bytes(self) -> int:
        """Memory it takes."""
        tables = PLACE_BYTES * len(self._source) + BLOCK_BYTES * len(self._gram_start)
        return self._gram.nbytes + tables

    def accumulate(self, gradients: Tensor) -> None:
        """Add gradients ``[n]`` or ``[k, n]``; those of pruned weights are not looked at."""
        rows = as_rows(gradients, self.num_weights)
        gram_accumulate_living(self._gram, rows, self._gram_start, self._first_place, self._source)
        self.num_gradients += rows.shape[0]

    def merge(self, other: LiveFisher) -> None:
        """Add the gradients another process or run has seen of the same weights.

        Raises:
            ValueError: its Fisher is of other weights.
        """
        same = torch.equal(self._source, other._source)
        same = same and torch.equal(self._first_place, other._first_place)
        if not same:
            raise ValueError(f"cannot merge {self.name}: other weights were left there")
        self._gram += other._gram.to(self._gram)
        self.num_gradients += other.num_gradients

    def mean_squares(self) -> float:
        """Sum over the weights of the mean square of their gradients."""
        return sum(self._fisher(part).mean_squares() for part in self._parts)

    def _fisher(self, part: _Part) -> GramFisher:
        """The Fisher of the blocks of one size, on its part of the Gram."""
        gram = self._gram[part.gram].view(-1, part.size * (part.size + 1) // 2)
        count = part.places.stop - part.places.start
        return GramFisher.on(gram, count, part.size, self.num_gradients, self.name)

    def _ask(self, method: str, vectors: tuple[Tensor, ...], *args: Any) -> list[Any]:
        """Call a method of every part's Fisher with its places of some vectors ``[places]``."""
        found = []
        for part in self._parts:
            here = (vector[part.places] for vector in vectors)
            try:
                found.append(getattr(self._fisher(part), method)(*here, *args))
            except NumericalError as error:
                if error.block is None:
                    raise
                block = self._block_in_matrix(part, error.block)
                raise NumericalError.of_block(self.name, block, error.remedy) from None
        return found

    def _block_in_matrix(self, part: _Part, block: int) -> int:
        first = part.places.start + block * part.size
        places = slice(first, first + part.size)
        weight = self._index[places][~self._empty[places]][0]
        return int(weight) // self.block_size

    def _gathered(self, vectors: tuple[Tensor, ...], group_size: int) -> tuple[Tensor, ...]:
        """Weights, then what else belongs to them, ``[n]`` to ``[places]``."""
        here = tuple(vector[self._index].masked_fill_(self._empty, 0) for vector in vectors)
        self._check(vectors[0], here[0], group_size)
        return here

    def _target(self, group_size: int) -> Tensor:
        """Of every ``group_size`` places the group they belong to; ``n / group_size`` for none."""
        group, none = self._index, self._empty
        if group_size > 1:
            group = group.view(-1, group_size).amax(1) // group_size
            none = none.view(-1, group_size).all(1)
        return group.masked_fill(none, self.num_weights // group_size).long()

    def _spread(self, values: list[Tensor], out: Tensor) -> Tensor:
        """Each part's ``[places]`` into ``[n + 1]``, the last for places where no weight stands."""
        if values:
            out.index_copy_(0, self._target(1), torch.cat(values).to(out.dtype))
        return out[:-1]

    def _check(self, weight: Tensor, here: Tensor, group_size: int) -> None:
        if int(here.count_nonzero()) != int(weight.count_nonzero()):
            raise came_back(self.name)
        if self.group_size % group_size:
            raise ValueError(
                f"the weights left of {self.name} are kept in groups of {self.group_size}: "
                f"group_size must divide that, got {group_size}"
            )

    def diagonal(self, damping: float, dtype: torch.dtype = torch.float32) -> Tensor:
        """Diagonal of ``F^-1``, ``[n]``; ``1/damping`` for the pruned."""
        out = torch.full((self.num_weights + 1,), 1.0 / damping, dtype=dtype, device=self.device)
        return self._spread(self._ask("diagonal", (), damping, dtype), out)

    def _scores(self, method: str, inputs: tuple[Tensor, ...], damping: float, c: int) -> Tensor:
        found = self._ask(method, self._gathered(inputs, c), damping, c)
        scores = torch.zeros(self.num_weights // c + 1, dtype=torch.float32, device=self.device)
        if c == 1:
            return self._spread(found, scores)
        if found:  # a group may have weights in two blocks
            scores.index_add_(0, self._target(c), torch.cat(found))
        return scores[:-1]

    def scores(self, weight: Tensor, damping: float, group_size: int = 1) -> Tensor:
        """As :meth:`GramFisher.scores`; zero for groups that are gone."""
        return self._scores("scores", (weight,), damping, group_size)

    def greedy_scores(
        self, weight: Tensor, keep: Tensor, damping: float, group_size: int = 1
    ) -> Tensor:
        """As :meth:`GramFisher.greedy_scores`."""
        return self._scores("greedy_scores", (weight, keep), damping, group_size)

    def n_of_m(self, weight: Tensor, keep: Tensor, damping: float, kept: int, group: int) -> Tensor:
        """As :meth:`GramFisher.n_of_m`."""
        here = self._gathered((weight, keep), group)
        found = self._ask("n_of_m", here, damping, kept, group)
        return self._spread(found, keep.new_zeros(len(keep) + 1))

    def update(
        self,
        weight: Tensor,
        keep: Tensor,
        damping: float,
        group_size: int = 1,
        rule: str = "joint",
    ) -> tuple[Tensor, float]:
        """As :meth:`GramFisher.update`."""
        here = self._gathered((weight, keep), group_size)
        found = self._ask("update", here, damping, group_size, rule)
        new = self._spread([values for values, _ in found], weight.new_zeros(len(weight) + 1))
        return new, sum((increase for _, increase in found), 0.0)
