"""Progress and the time that stages take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]


class Clock:
    """Adds up wall-clock seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the body of a ``with`` statement."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @contextmanager
    def stage_without(self, name: str, inner: str) -> Iterator[None]:
        """Time the body, less what stage ``inner`` takes in it."""
        before = self.seconds.get(inner, 0.0)
        with self.stage(name):
            yield
        self.seconds[name] -= self.seconds.get(inner, 0.0) - before


def silent(stage: str, done: int, total: int) -> None:
    """Show no progress."""
