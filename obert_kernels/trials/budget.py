"""Time for trials."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Budget:
    """Says whether there is time for another piece of work.

    What it cannot know yet counts as no time: only what is sure to take too long is refused.

    Args:
        minutes: from now on; None: any number.
        clock: seconds since whenever.
    """

    def __init__(self, minutes: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = None if minutes is None else clock() + 60 * minutes
        self._least: dict[object, float] = {}

    def allows(self, *work: tuple[object, float]) -> bool:
        """Is there time for this work, each piece of it a kind and an amount?"""
        if self._end is None:
            return True
        expected = sum(self._least.get(kind, 0.0) * amount for kind, amount in work)
        now = self._clock()
        return now < self._end and now + expected <= self._end

    @contextmanager
    def timed(self, kind: object, amount: float = 1.0) -> Iterator[None]:
        """Learn from the body how long a kind of work takes at least, for each unit of it."""
        start = self._clock()
        yield
        took = (self._clock() - start) / amount
        self._least[kind] = min(took, self._least.get(kind, took))
