"""Batches with a position: taken one after the other, kept back, started over when they end."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import count as numbers
from typing import Any

import torch

from .batches import how_many, samples_in, split_batch, tensors_in

# Samples kept back to choose the damping on, unless there are fewer than four times that.
_KEPT_BACK_SAMPLES = 256
# Of the samples wanted, so many times as many are noted at most.
_MOST_REMEMBERED = 8
# At most this many batches are read to find one with more than one sample.
_LOOKED_AT = 16

_END = object()


class BatchSource:
    """Batches that are taken one after the other, and started over when they end.

    Args:
        batches: an iterable; an iterator cannot be started over.
        first: number of the first batch, for messages.
        unit: what messages call a batch.

    Attributes:
        taken: how many have been taken.
        notes: what the user should know about the batches.
        remembered: some of those taken, from all of them alike, see :meth:`remember`.
    """

    def __init__(self, batches: Iterable[Any], *, first: int = 0, unit: str = "batch") -> None:
        self.taken = 0
        self.notes: list[str] = []
        self._batches = batches
        self._under_way: Iterator[Any] | None = None
        self._ahead: deque[Any] = deque()  # looked at and not taken yet
        self._pieces: deque[Any] = deque()  # of the batch at hand
        self._size: int | None = None
        self._kept_back: list[Any] = []
        self._has_new_order = False
        self._first = first
        self._unit = unit
        self.remembered: list[Any] = []
        self._samples = 0  # in those remembered
        self._remember = 0
        self._every = 1

    @classmethod
    def of(cls, batches: Iterable[Any] | BatchSource) -> BatchSource:
        """Return batches as a source, a source as it is."""
        return batches if isinstance(batches, BatchSource) else cls(batches)

    def take(self, count: int | None = None) -> Iterator[tuple[str, Any]]:
        """Yield the next ``count`` batches (None: without end), each with its name for messages.

        Raises:
            ValueError: there are none, or they cannot be started over and end too early.
        """
        for _ in numbers() if count is None else range(count):
            if not self._pieces:
                batch = self._ahead.popleft() if self._ahead else self._next_of_pass()
                if batch is _END:
                    batch = self._next_after_restart(count)
                self._pieces += [batch] if self._size is None else split_batch(batch, self._size)
            where = f"{self._unit} {self._first + self.taken}"
            self._note(self._pieces[0])
            self.taken += 1
            yield where, self._pieces.popleft()

    def remember(self, num_samples: int) -> None:
        """From now on note so many samples or more of what is taken; batches may be sorted, so
        that they come from all of them alike."""
        self._remember = num_samples

    def look_back(self) -> list[Any]:
        """Return what has been noted; of a source that nothing was taken of, one pass, which ends
        early where it may have no end.

        Raises:
            ValueError: there are no batches.
        """
        if not self.remembered:
            samples, most = 0, _MOST_REMEMBERED * self._remember
            while (batch := self._next_of_pass()) is not _END:
                self._note(batch)
                self.taken += 1
                samples += samples_in(batch) or 1
                if how_many(self._batches) is None and samples >= most:
                    break
        if not self.remembered:
            raise _no_batches()
        return self.remembered

    def _note(self, batch: Any) -> None:
        """Remember the next batch, if its turn has come."""
        if not self._remember or self.taken % self._every:
            return
        self.remembered.append(batch)
        self._samples += samples_in(batch) or 1
        is_even = len(self.remembered) % 2 == 0
        if is_even and self._samples > _MOST_REMEMBERED * self._remember:
            self.remembered = self.remembered[::2]
            self._samples = sum(samples_in(known) or 1 for known in self.remembered)
            self._every *= 2

    def _next_of_pass(self) -> Any:
        if self._under_way is None:
            self._under_way = iter(self._batches)
        return next(self._under_way, _END)

    def _next_after_restart(self, count: int | None) -> Any:
        if not self.taken and not self._kept_back:
            raise _no_batches()
        fresh = iter(self._batches)
        batch = _END
        if fresh is not self._batches:
            self._under_way = fresh
            for index, known in enumerate(self._kept_back):
                again = next(fresh, _END)
                self._has_new_order |= index == 0 and not _are_equal(again, known)
            batch = next(fresh, _END)
        if batch is _END:
            wanted = "" if count is None or self.taken >= count else f" of num_grads={count}"
            raise ValueError(
                f"batches ended after {self.taken}{wanted}: pass a list or a DataLoader, which can "
                "be iterated again, or a smaller num_grads"
            )
        return batch

    def keep_back(self) -> list[Any]:
        """Return the first batches, some 256 samples or a quarter, and never take them.

        Where they are all there is, they are taken, too, and a note says so.

        Raises:
            ValueError: there are none, or none would be left and they cannot be started over.
        """
        available = how_many(self._batches)
        most = _KEPT_BACK_SAMPLES if available is None else max(1, available // 4)
        held: list[Any] = []
        samples = 0
        while samples < _KEPT_BACK_SAMPLES and len(held) < most:
            if (batch := self._next_of_pass()) is _END:
                break
            held.append(batch)
            samples += samples_in(batch) or 1
        if not held:
            raise _no_batches()
        if (batch := self._next_of_pass()) is not _END:
            self._ahead.append(batch)
            self._kept_back = held
            self._first += len(held)
        elif isinstance(self._batches, Iterator):
            raise ValueError(
                f"all {len(held)} batches ({samples} samples) were kept back to choose the damping "
                "on, and none is left for gradients: pass more batches, calibration= or a number "
                "as damping"
            )
        else:
            self._under_way = None
            self.notes.append("the damping was chosen on the batches the Fisher was estimated from")
        return held

    def look_at_several_samples(self) -> tuple[str, Any]:
        """Return the next batch with more than one sample, if there is one soon, and its name.

        It is still to be taken, as are those before it: of a single sample nothing can be told
        apart.

        Raises:
            ValueError: there are no batches.
        """
        if not self._ahead:
            self._look_ahead()
        while (samples_in(self._ahead[-1]) or 2) < 2 and len(self._ahead) < _LOOKED_AT:
            if not self._look_ahead():
                break
        return f"{self._unit} {self._first + len(self._ahead) - 1}", self._ahead[-1]

    def _look_ahead(self) -> bool:
        batch = self._next_of_pass()
        if batch is _END and not self._ahead:
            raise _no_batches()
        if batch is not _END:
            self._ahead.append(batch)
        return batch is not _END

    def cut(self, size: int) -> None:
        """From now on every batch is taken in pieces of ``size`` samples, which are numbered."""
        self._size = size
        self._first, self._unit = 0, f"{size} samples for the Fisher, number"

    def hold(self, num_grads: int, size: int | None) -> list[Any]:
        """Take as many batches as give ``num_grads`` gradients of ``size`` samples (None: one a
        batch), to be gone through several times: see :meth:`again`."""
        held: list[Any] = []
        grads = 0
        for _, batch in self.take():
            held.append(batch)
            grads += 1 if size is None else len(split_batch(batch, size))
            if grads >= num_grads:
                break
        return held

    def again(self, held: list[Any]) -> BatchSource:
        """Return a source of the batches last taken, with the names they had."""
        return BatchSource(held, first=self._first + self.taken - len(held), unit=self._unit)

    def all_notes(self, num_grads: int) -> list[str]:
        """Notes, also on batches that had to serve several times for so many gradients."""
        notes = list(dict.fromkeys(self.notes))
        if self._has_new_order:
            notes.append(
                "the batches come in another order every time, so that the Fisher has seen those "
                "kept back for the damping: pass calibration, or a smaller num_grads"
            )
        available = (how_many(self._batches) or 0) - len(self._kept_back)
        if self._size is None and 0 < available < self.taken:
            notes.append(
                f"{num_grads} gradients were taken from {available} batches, gone through "
                f"{self.taken / available:.1f} times"
            )
        return notes


def _no_batches() -> ValueError:
    return ValueError("batches is empty: pass at least one (an iterator may be used up)")


def _are_equal(first: Any, second: Any) -> bool:
    if first is _END:
        return False
    ours, theirs = tensors_in(first), tensors_in(second)
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))
