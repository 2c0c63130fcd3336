"""What a mask may look like: which weights go together, or compete, and along which dimension."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..ops.checks import MAX_PATTERN, check_block_size
from ..plugins import Registry

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
        kept: N of N:M, how many weights survive in every ``span``; None: any number.
        span: M of N:M, else c; consecutive weights that belong together in some way.
    """

    name: str = "unstructured"
    group_size: int = 1
    order: str = "rows"
    kept: int | None = None
    span: int = 1

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
        if self.kept is not None and steps > 1:
            raise ValueError(f"pattern {self.name} takes one step, got steps={steps}")

    def prescribed(
        self, sparsity: float | Mapping[str, float] | None
    ) -> float | Mapping[str, float]:
        """Return the sparsity asked for, or what the pattern itself prescribes.

        Raises:
            ValueError: these differ.
        """
        if self.kept is None:
            return 0.8 if sparsity is None else sparsity
        own = 1 - self.kept / self.span
        values = sparsity.values() if isinstance(sparsity, Mapping) else [sparsity]
        if any(value is not None and not math.isclose(value, own) for value in values):
            raise ValueError(
                f"pattern {self.name} prunes to a sparsity of {own:g}; leave sparsity out, got "
                f"{sparsity!r}"
            )
        if isinstance(sparsity, Mapping):
            return dict.fromkeys(sparsity, own)
        return own

    def block_size(self, wanted: int | None) -> int:
        """Return the size of Fisher blocks, about 50 by default; borders cut no M-group.

        Raises:
            ValueError: they would.
        """
        whole = 1 if self.kept is None else self.span
        if wanted is None:
            return 50 // whole * whole
        check_block_size(wanted)
        if wanted % whole:
            nearest = max(whole, wanted // whole * whole)
            raise ValueError(
                f"pattern {self.name} needs a block_size that is a multiple of {whole}, such as "
                f"{nearest}; got {wanted}"
            )
        return wanted


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
    """
    if name in _patterns:
        return _patterns.find(name)
    if match := _N_OF_M.fullmatch(name):
        kept, span = int(match[1]), int(match[2])
        if kept < span <= MAX_PATTERN:
            return Pattern(name, kept=kept, span=span)
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
