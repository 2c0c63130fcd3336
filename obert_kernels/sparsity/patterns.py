"""What a mask may look like: which weights go together, or compete, and along which dimension."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..ops.checks import MAX_PATTERN, check_block_size
from ..plugins import Registry
from .masks import check_scores, n_of_m_mask, prunes_anything, select_masks

DEFAULT_BLOCK_SIZE = 50  # the papers'

_BLOCK = re.compile(r"block(?:([1-9]\d*)x)?([1-9]\d*)")
_N_OF_M = re.compile(r"([1-9]\d*):([1-9]\d*)")


@dataclass(frozen=True)
class Pattern:
    """A shape of masks.

    Matrices are flattened so that weights that go together, and the Fisher blocks, are runs of
    consecutive weights: row by row, or column by column for groups along the output dimension.

    A subclass may put the weights in another order: it overrides :meth:`flat`, :meth:`matrix` and
    ``order``.

    Attributes:
        name: as users write it.
        group_size: c, consecutive weights that live or die together.
        order: "rows", "columns", or the name of a subclass's own; Fishers of one order serve no
            other.
        span: consecutive weights that belong together in some way: c, or M of N:M.
    """

    name: str = "unstructured"
    group_size: int = 1
    order: str = "rows"
    span: int = 1

    # The mask of a matrix depends on no other matrix, whatever the scope.
    ranks_alone = False

    @property
    def by_column(self) -> bool:
        """Do groups and Fisher blocks run along the output dimension?"""
        return self.order == "columns"

    def flat(self, matrix: Tensor) -> Tensor:
        """``[..., rows, columns]`` to ``[..., n]`` in the order of the groups."""
        return (matrix.mT if self.by_column else matrix).flatten(-2)

    def matrix(self, flat: Tensor, like: Tensor) -> Tensor:
        """``[n]`` back to the shape of ``like``."""
        if self.by_column:
            return flat.view(like.mT.shape).mT.contiguous()
        return flat.view(like.shape)

    def check(self, name: str, matrix: Tensor) -> None:
        """Raise ValueError if the groups do not divide a matrix."""
        along, length = (
            ("rows", matrix.shape[0]) if self.by_column else ("columns", matrix.shape[1])
        )
        if length % self.span:
            raise ValueError(
                f"pattern {self.name}: the {length} {along} of {name} are not divisible by "
                f"{self.span}; use another pattern or leave it out with params"
            )

    def check_steps(self, steps: int) -> None:
        """Raise ValueError if it cannot be reached in so many sub-steps."""

    def target_sparsity(
        self, sparsity: float | Mapping[str, float] | None
    ) -> float | Mapping[str, float]:
        """Return the sparsity asked for, 0.8 where none is, or what the pattern itself gives.

        Raises:
            ValueError: these differ.
        """
        return 0.8 if sparsity is None else sparsity

    def block_size(self, wanted: int | None) -> int:
        """Return the size of Fisher blocks, about 50 by default; borders cut no M-group.

        Raises:
            ValueError: they would.
        """
        if wanted is None:
            return DEFAULT_BLOCK_SIZE
        check_block_size(wanted)
        return wanted

    def select(
        self,
        scores: Mapping[str, Tensor],
        keep: Mapping[str, Tensor],
        sparsity: float | Mapping[str, float],
        scope: str,
    ) -> dict[str, Tensor]:
        """Return new masks of the matrices scored, flat, in this order of the weights.

        Args: as for :func:`obert_kernels.select_masks`.
        """
        return select_masks(scores, keep, sparsity, self.group_size, scope)

    def prunes_anything(
        self, keep: Mapping[str, Tensor], sparsity: float | Mapping[str, float], scope: str
    ) -> bool:
        """Say whether :meth:`select` would prune any weight, whatever the scores."""
        return prunes_anything(keep, sparsity, self.group_size, scope)


@dataclass(frozen=True)
class NofM(Pattern):
    """At most ``kept`` of every ``span`` consecutive weights stay (N:M).

    Attributes:
        kept: N, weights that stay of every M.
    """

    kept: int = 2

    ranks_alone = True

    def check_steps(self, steps: int) -> None:
        """Raise ValueError for more than one."""
        if steps > 1:
            raise ValueError(f"pattern {self.name} takes one step, got steps={steps}")

    def target_sparsity(
        self, sparsity: float | Mapping[str, float] | None
    ) -> float | Mapping[str, float]:
        """Return 1 - N/M; raise ValueError if another is asked for."""
        own = 1 - self.kept / self.span
        values = sparsity.values() if isinstance(sparsity, Mapping) else [sparsity]
        if any(value is not None and not math.isclose(value, own) for value in values):
            raise ValueError(
                f"pattern {self.name} prunes to a sparsity of {own:g}; leave sparsity out, got "
                f"{sparsity!r}"
            )
        return dict.fromkeys(sparsity, own) if isinstance(sparsity, Mapping) else own

    def block_size(self, wanted: int | None) -> int:
        """Return the multiple of M at or below 50, or the size wanted if it is one."""
        size = super().block_size(wanted)
        if wanted is None:
            return size // self.span * self.span
        if wanted % self.span:
            nearest = max(self.span, wanted // self.span * self.span)
            raise ValueError(
                f"pattern {self.name} needs a block_size that is a multiple of {self.span}, such "
                f"as {nearest}; got {wanted}"
            )
        return size

    def select(
        self,
        scores: Mapping[str, Tensor],
        keep: Mapping[str, Tensor],
        sparsity: float | Mapping[str, float],
        scope: str,
    ) -> dict[str, Tensor]:
        """Return masks with the weights of the highest scores in every M consecutive ones."""
        for name, found in scores.items():
            check_scores(found, name)
        return {
            name: n_of_m_mask(found, keep[name], self.kept, self.span)
            for name, found in scores.items()
        }

    def prunes_anything(
        self, keep: Mapping[str, Tensor], sparsity: float | Mapping[str, float], scope: str
    ) -> bool:
        """Say whether any M consecutive weights have more than N left."""
        groups = (mask.view(-1, self.span) for mask in keep.values())
        return any(bool((group.sum(dim=1) > self.kept).any()) for group in groups)


UNSTRUCTURED = Pattern()

_patterns: Registry[Pattern] = Registry("pattern")
_patterns.add(UNSTRUCTURED.name, UNSTRUCTURED)


def register_pattern(pattern: Pattern) -> Pattern:
    """Register a pattern by the name it has."""
    return _patterns.add(pattern.name, pattern)


def find_pattern(name: str) -> Pattern:
    """Return the pattern of a name.

    "unstructured"; "block4" (or "block1x4"): groups along the input dimension; "block4x1": along
    the output dimension; "2:4" (any N:M): at most 2 of every 4 weights along the input dimension.

    Others as :func:`register_pattern` was given them.

    Raises:
        ValueError: no such pattern.
        TypeError: it is no name.
    """
    if not isinstance(name, str):
        raise TypeError(f"pattern must be a name such as 'block4' or '2:4', got {name!r}")
    if name in _patterns:
        return _patterns.find(name)
    if match := _N_OF_M.fullmatch(name):
        kept, span = int(match[1]), int(match[2])
        if kept < span <= MAX_PATTERN:
            return NofM(name, span=span, kept=kept)
        raise ValueError(
            f"pattern N:M keeps N of every M weights, N < M and M at most {MAX_PATTERN}, "
            f"got {name!r}"
        )
    match = _BLOCK.fullmatch(name)
    rows, columns = (int(match[1] or 1), int(match[2])) if match else (0, 0)
    if min(rows, columns) != 1:
        raise ValueError(
            "pattern must be 'unstructured', 'block<c>' such as 'block4' for c weights of a row, "
            "'block<c>x1' for c weights of a column, '<N>:<M>' such as '2:4', or a registered "
            f"name, got {name!r}"
        )
    size = max(rows, columns)
    return Pattern(name, group_size=size, order="columns" if rows > 1 else "rows", span=size)
