"""Bars that show the progress of stages."""

from __future__ import annotations

from typing import Any


class ProgressBars:
    """A ``progress(stage, done, total)`` callable that draws a bar with the time left.

    Stages shorter than a second draw none, and nothing is drawn where stderr is no terminal.  At
    the end of a ``with`` statement the bar is removed.

    Args:
        prefix: stands before the name of each stage.
    """

    def __init__(self, prefix: str = "") -> None:
        from tqdm import tqdm

        self._tqdm, self._prefix = tqdm, prefix
        self._stage: str | None = None
        self._bar: Any = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` steps of ``stage`` are done."""
        if stage != self._stage:
            self.close()
            self._stage = stage
            name = f"{self._prefix} {stage}".strip()
            self._bar = self._tqdm(total=total, desc=name, delay=1, leave=False, disable=None)
        self._bar.update(done - self._bar.n)
        if done >= total:
            self.close()

    def close(self) -> None:
        """Remove the bar, if there is one."""
        if self._bar is not None:
            self._bar.close()
        self._stage = self._bar = None

    def __enter__(self) -> ProgressBars:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
