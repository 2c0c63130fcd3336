"""Runs the model, pruned and dense, as far as the layers at hand need it.

Blocks that hand a tensor on to each other are run alone, from what each batch has come to before
them; elsewhere the whole model runs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from ..gradients.backward import removed
from ..gradients.batches import to_device
from ..gradients.losses import LossFn
from ..sparsity.values import replaced
from .padding import without_padding
from .remembered import Remembered
from .structure import Chain, Layer, Place, Unit, first_of

Arguments = tuple[tuple, dict[str, Any]]

_ROUNDING = 1e-4  # of the largest value


# What a block leaves as it is (tensors are noted before they may change).
_NEVER_CHANGED = (Tensor, nn.Module, tuple, list, str, int, float, type(None))


class _Enough(Exception):
    """Ends a forward pass that has given all that is wanted of it."""


class _Position:
    """Where one of the two models stands in a chain, for each batch."""

    def __init__(self, chain: Chain, arguments: list[list[Arguments]]) -> None:
        self.chain = chain
        self.index = 0
        self._arguments = arguments
        self._handed_on = [_argument(own[0], chain.place[0]) if own else None for own in arguments]

    def run(self, batch: int) -> Any:
        """Run the block for a batch; return what it hands on, None where it is not called."""
        known = self._arguments[batch]
        if not known:
            return None
        args, kwargs = _to_be_changed(known[min(self.index, len(known) - 1)])
        place, tensor = self.chain.place[self.index], self._handed_on[batch]
        if isinstance(place, int):
            args = (*args[:place], tensor, *args[place + 1 :])
        else:
            kwargs = {**kwargs, place: tensor}
        return first_of(self.chain.blocks[self.index](*args, **kwargs))

    def starting_with(self, other: _Position) -> _Position:
        """The same with what the first block of another one is given."""
        self._handed_on = list(other._handed_on)
        return self

    def try_out(self, batch: int) -> Any:
        """Run the block on a copy of what it is given, which it may change in place."""
        given = self._handed_on[batch]
        self._handed_on[batch] = given.clone() if isinstance(given, Tensor) else given
        try:
            return self.run(batch)
        finally:
            self._handed_on[batch] = given

    def advance(self, batch: int) -> None:
        """Run the block for a batch, and keep what it hands on."""
        self._handed_on[batch] = self.run(batch)


def _to_be_changed(arguments: Arguments) -> Arguments:
    """The arguments for a call that may change them, as it does a cache of keys and values."""
    args, kwargs = arguments
    return tuple(map(_own, args)), {name: _own(value) for name, value in kwargs.items()}


def _own(value: Any) -> Any:
    return value if isinstance(value, _NEVER_CHANGED) else deepcopy(value)


def _argument(arguments: Arguments, place: int | str) -> Any:
    args, kwargs = arguments
    return args[place] if isinstance(place, int) else kwargs[place]


class Replay:
    """A model, its dense weights, and batches.

    Args:
        model: in eval mode.
        loss_fn: ``loss_fn(model, batch)`` calls it.
        batches: what it is run on.
        parameters: name to weight or bias, those of the pruned model.
        dense: name to what they were before.
        of_decoder: see :class:`Structure`.

    Attributes:
        in_dense: for each batch, what showed up at places of the unit entered last.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        batches: Sequence[Any],
        parameters: Mapping[str, nn.Parameter],
        dense: Mapping[str, Tensor],
        of_decoder: Collection[nn.Module] = (),
    ) -> None:
        self.batches = batches
        self._of_decoder = of_decoder
        self._model, self._loss_fn = model, loss_fn
        self._parameters, self._dense = parameters, dense
        self._pruned = {name: parameter.data for name, parameter in parameters.items()}
        self._device = next(iter(parameters.values())).device
        self.in_dense: list[dict[Place, Tensor]] = []
        self._dense_at: _Position | None = None
        self._pruned_at: _Position | None = None
        self._remembered = Remembered()

    def runs_alone(self, chain: Chain) -> bool:
        """Do blocks give the same without the model around them?

        The pruned ones are given the arguments of the dense ones, and run after these: neither
        what earlier blocks compute nor what is left of other passes and batches may count.
        """
        places = [Place(block, True) for block in chain.blocks]
        expected = list(self._whole_runs(False, places))
        try:
            here = self._start(chain, True).starting_with(self._start(chain, False))
            for here.index, place in enumerate(places):
                for batch, found in enumerate(expected):
                    with self._weights(True):
                        here.try_out(batch)
                    with self._weights(False), _tapped([place], stops=False) as again:
                        here.advance(batch)
                    if not _agree(found, self._rows(again, self.batches[batch])):
                        return False
        except Exception:  # then it is the whole model that runs, and may raise it again
            return False
        return True

    def enter(self, unit: Unit, places: Sequence[Place]) -> None:
        """Run both models up to a unit, and the dense one through it.

        Args:
            unit: where to go on.
            places: what shows up there in the dense model is kept, see ``in_dense``.
        """
        self.in_dense.clear()
        if unit.chain is None:
            for found in self._whole_runs(True, places):
                self.in_dense.append(found)
            return
        if any(
            here.chain is not unit.chain or here.index > unit.index
            for here in (self._dense_at, self._pruned_at)
            if here is not None
        ):
            self._dense_at = self._pruned_at = None
            self._remembered.forget()
        self._dense_at = self._at(self._dense_at, unit, True)
        self._pruned_at = self._at(self._pruned_at, unit, False)
        self._remembered.forget()
        with self._weights(True):
            for index, batch in enumerate(self.batches):
                with _tapped(places, stops=False) as found:
                    self._dense_at.advance(index)
                self.in_dense.append(self._rows(found, batch))
            self._dense_at.index += 1

    def _at(self, position: _Position | None, unit: Unit, dense: bool) -> _Position:
        assert unit.chain is not None
        position = position or self._start(unit.chain, dense)
        with self._weights(dense):
            while position.index < unit.index:
                for batch in range(len(self.batches)):
                    with nullcontext() if dense else self._remembered.handed_out(batch):
                        position.advance(batch)
                position.index += 1
                self._remembered.forget()
        return position

    def _start(self, chain: Chain, dense: bool) -> _Position:
        blocks = chain.blocks[:1] if chain.shares_arguments else chain.blocks
        found: list[list[Arguments]] = []

        def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            found[-1].append(_to_be_changed((args, kwargs)))
            if len(found[-1]) == len(blocks):
                raise _Enough

        with ExitStack() as stack:
            stack.enter_context(self._weights(dense))
            for block in blocks:
                handle = block.register_forward_pre_hook(note, with_kwargs=True)
                stack.enter_context(removed(handle))
            for batch in self.batches:
                found.append([])
                self._whole(batch)
        return _Position(chain, [own if len(own) == len(blocks) else [] for own in found])

    def in_pruned(self, unit: Unit, places: Sequence[Place]) -> Iterator[dict[Place, Tensor]]:
        """Yield, for each batch, what shows up at places of a unit that was entered, as far as the
        batch comes to them."""
        if unit.chain is None:
            yield from self._whole_runs(False, places)
            return
        assert self._pruned_at is not None
        for index, batch in enumerate(self.batches):
            with (
                self._weights(False),
                self._remembered.handed_out(index),
                _tapped(places) as found,
                suppress(_Enough),
            ):
                self._pruned_at.try_out(index)
            yield self._rows(found, batch)

    def fitted(self, unit: Unit, layers: Sequence[Layer]) -> None:
        """Layers of a unit, and all that comes to them, do not change any more."""
        if unit.chain is not None:
            self._remembered.add(layer.module for layer in layers)

    def _whole_runs(self, dense: bool, places: Sequence[Place]) -> Iterator[dict[Place, Tensor]]:
        for batch in self.batches:
            with self._weights(dense), _tapped(places) as found:
                self._whole(batch)
            yield self._rows(found, batch)

    def _rows(self, found: Mapping[Place, Tensor], batch: Any) -> dict[Place, Tensor]:
        return {
            place: without_padding(tensor, batch, place.module in self._of_decoder)
            for place, tensor in found.items()
        }

    def _whole(self, batch: Any) -> None:
        with suppress(_Enough):
            self._loss_fn(self._model, to_device(batch, self._device))

    @contextmanager
    def _weights(self, dense: bool) -> Iterator[None]:
        with torch.no_grad(), replaced(self._parameters, self._dense if dense else self._pruned):
            torch.clear_autocast_cache()  # it may hold copies of the other model's weights
            yield
        torch.clear_autocast_cache()


@contextmanager
def _tapped(places: Sequence[Place], *, stops: bool = True) -> Iterator[dict[Place, Tensor]]:
    """Notes what shows up at some places; ends the pass when all is there, unless told not to."""
    found: dict[Place, Tensor] = {}

    def note(place: Place, tensor: Tensor) -> None:
        found[place] = tensor.clone()  # it may be changed in place
        if stops and len(found) == len(places):
            raise _Enough

    def hook(place: Place) -> Any:
        if place.is_output:
            return place.module.register_forward_hook(
                lambda module, args, output: note(place, first_of(output))
            )
        return place.module.register_forward_pre_hook(
            lambda module, args, kwargs: note(place, first_of(args or kwargs)), with_kwargs=True
        )

    with ExitStack() as stack:
        for place in places:
            stack.enter_context(removed(hook(place)))
        yield found


def _agree(found: Mapping[Place, Tensor], again: Mapping[Place, Tensor]) -> bool:
    """Is what was noted again the same as before, but for rounding?"""
    for place, tensor in again.items():
        before = found.get(place)
        if before is None or before.shape != tensor.shape:
            return False
        if not bool((tensor - before).abs().max() <= _ROUNDING * before.abs().max()):
            return False
    return True
