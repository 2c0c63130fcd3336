"""Bars that show the progress of stages, or lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from typing import Any

SECONDS_BETWEEN_LINES = 30.0


class ProgressBars:
    """A ``progress(stage, done, total)`` callable that draws a bar with the time left.

    Stages shorter than a second draw none.  Where stderr is no terminal there is a line now and
    then.  At the end of a ``with`` statement the bar is removed.  What cannot be drawn is left out.

    Args:
        prefix: stands before the name of each stage.
    """

    def __init__(self, prefix: str = "") -> None:
        from tqdm import tqdm

        self._tqdm, self._prefix = tqdm, prefix
        self._stage: str | None = None
        self._bar: Any = None
        self._last_line = time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` steps of ``stage`` are done."""
        try:
            self._show(stage, done, total)
        except Exception:  # of a terminal with odd properties: no reason to stop the work
            self._stage, self._bar = stage, None

    def _show(self, stage: str, done: int, total: int) -> None:
        name = f"{self._prefix} {stage}".strip()
        if not sys.stderr.isatty():
            now = time.monotonic()
            if now - self._last_line >= SECONDS_BETWEEN_LINES:
                self._last_line = now
                print(f"{name}: {done} of {total}", file=sys.stderr, flush=True)
            return
        if stage != self._stage:
            self.close()
            self._stage = stage
            self._bar = self._tqdm(total=total, desc=name, delay=1, leave=False)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
        if done >= total:
            self.close()

    def close(self) -> None:
        """Remove the bar, if there is one."""
        bar, self._stage, self._bar = self._bar, None, None
        if bar is not None:
            bar.close()

    def __enter__(self) -> ProgressBars:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
