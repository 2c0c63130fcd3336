"""Which layers a model calls one after the other, with which inputs, and where their outputs go.

Found by running a few samples and comparing tensors, so that no architecture has to be known: two
layers that get the same tensor share their inputs, and a tensor that equals a layer's output plus
another one is a residual sum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..gradients.backward import removed
from ..sparsity.wrappers import joined, named_modules

_TOLERANCE = 1e-2  # of a layer's output against its matrix: bfloat16, or another order of sums


class Place(NamedTuple):
    """The first input of a module, or its first output."""

    module: nn.Module
    is_output: bool


@dataclass(frozen=True)
class Layer:
    """A linear layer whose matrix is pruned.

    Attributes:
        name: of the matrix.
        module: the layer.
        weight: ``[outputs, inputs]``, or ``[inputs, outputs]`` if transposed (``Conv1D``).
        bias: ``[outputs]``, if there is one.
        transposed: the matrix is.
        total: where its output shows up with a residual added, if it does.
    """

    name: str
    module: nn.Module
    weight: nn.Parameter
    bias: nn.Parameter | None
    transposed: bool = False
    total: Place | None = None

    @property
    def outputs(self) -> int:
        """Rows of the matrix as the formulas have it."""
        return self.weight.shape[int(self.transposed)]

    @property
    def inputs(self) -> int:
        """Columns of it."""
        return self.weight.shape[1 - int(self.transposed)]


@dataclass(frozen=True)
class Chain:
    """Modules that hand a tensor on, each to the next.

    Attributes:
        blocks: in the order of the forward pass.
        place: the argument of each that this tensor is: its number or its name.
        shares_arguments: they have the same arguments beside it.
    """

    blocks: list[nn.Module]
    place: list[int | str]
    shares_arguments: bool


@dataclass
class Unit:
    """Layers that are replayed together.

    Attributes:
        chain: of the block they are in; None: all of the model is replayed.
        index: of the block in it.
        groups: layers with the same inputs, in the order in which they are called.
    """

    chain: Chain | None = None
    index: int = 0
    groups: list[list[Layer]] = field(default_factory=list)


@dataclass
class Structure:
    """What :func:`find_structure` returns.

    Attributes:
        units: in the order of the forward pass.
        left_out: name of a matrix to the reason why it cannot be followed.
        rows: tokens that came to the first layer.
        of_decoder: modules that see the tokens of a decoder, where there is an encoder, too.
    """

    units: list[Unit]
    left_out: dict[str, str]
    rows: int
    of_decoder: set[nn.Module] = field(default_factory=set)

    @property
    def layers(self) -> list[Layer]:
        """All that can be fitted."""
        return [layer for unit in self.units for group in unit.groups for layer in group]


class Call(NamedTuple):
    """A module that was called: its arguments, and its first output.

    Attributes:
        x, y: what first input and output held then, as they may be changed in place later.
    """

    module: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    x: Any = None
    output: Any = None
    y: Any = None

    @property
    def first_input(self) -> Any:
        """The tensor that a layer multiplies."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()), None)


def first_of(output: Any) -> Any:
    """Return a tensor, or the first of several."""
    if isinstance(output, Mapping):
        output = tuple(output.values())
    return output[0] if isinstance(output, tuple | list) and output else output


def owners(
    model: nn.Module, weights: Mapping[str, nn.Parameter], transposed: set[str]
) -> list[Layer]:
    """Return the modules that own the matrices; what several own comes several times."""
    names = {id(weight): name for name, weight in weights.items()}
    found = []
    for prefix, module in named_modules(model):
        weight = module._parameters.get("weight")
        if weight is not None and id(weight) in names:
            bias = module._parameters.get("bias")
            is_transposed = joined(prefix, "weight") in transposed
            found.append(Layer(names[id(weight)], module, weight, bias, is_transposed))
    return found


def find_structure(
    model: nn.Module,
    found: list[Layer],
    names: list[str],
    run: Callable[[], object],
    runs_alone: Callable[[Chain], bool] = lambda chain: True,
) -> Structure:
    """Follow a forward pass.

    Args:
        model: in eval mode.
        found: its layers, see :func:`owners`.
        names: of all matrices.
        run: calls the model with a few samples.
        runs_alone: can the blocks of a chain be replayed without the model around them?
    """
    calls = _record(model, run)
    counts = Counter(call.module for call in calls)
    left_out = dict.fromkeys(names, "no linear layer owns it")
    of_module: dict[nn.Module, Layer] = {}
    for layer in found:
        if _is_shared(model, layer):
            left_out[layer.name] = "other modules share it, or its bias"
        else:
            left_out[layer.name] = "its layer is not called"
            of_module[layer.module] = layer
    chains = [chain for chain in _chains(model, calls) if runs_alone(chain)]
    of_block = {
        inner: (chain, index)
        for chain in reversed(chains)
        for index, block in enumerate(chain.blocks)
        for inner in block.modules()
    }
    units: list[Unit] = []
    inputs: list[tuple[Call, list[Layer]]] = []
    rows = 0
    for call in calls:
        if call.module not in of_module:
            continue
        layer = of_module[call.module]
        if (reason := _obstacle(layer, call, counts)) is not None:
            left_out[layer.name] = reason
            continue
        del left_out[layer.name]
        rows = rows or len(_by_row(call.x))
        chain, at = of_block.get(call.module, (None, 0))
        if not units or (units[-1].chain, units[-1].index) != (chain, at):
            units.append(Unit(chain, at))
            inputs.clear()
        block = None if chain is None else chain.blocks[at]
        layer = replace(layer, total=_total(call, calls, counts, block))
        known = next((group for other, group in inputs if _same_input(call, other)), None)
        if known is not None:
            known.append(layer)
            continue
        units[-1].groups.append([layer])
        inputs.append((call, units[-1].groups[-1]))
    return Structure(units, left_out, rows, _decoder_side(model, calls))


def _record(model: nn.Module, run: Callable[[], object]) -> list[Call]:
    """All calls of modules, in the order in which they began."""
    calls: list[Call] = []
    begun: list[int] = []

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        begun.append(len(calls))
        call = Call(module, args, kwargs)
        calls.append(call._replace(x=_copy(call.first_input)))

    def after(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        index, output = begun.pop(), first_of(output)
        calls[index] = calls[index]._replace(output=output, y=_copy(output))

    with ExitStack() as stack:
        for module in model.modules():
            stack.enter_context(removed(module.register_forward_pre_hook(before, with_kwargs=True)))
            stack.enter_context(removed(module.register_forward_hook(after, with_kwargs=True)))
        run()
    return calls


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _same_input(ours: Call, theirs: Call) -> bool:
    """Do two layers get one tensor, and was it not changed in between?"""
    return ours.first_input is theirs.first_input and torch.equal(ours.x, theirs.x)


def _is_shared(model: nn.Module, layer: Layer) -> bool:
    """Is the matrix, or the bias, that of other modules, too?"""
    own = {id(layer.weight), id(layer.bias)} - {id(None)}
    return sum(bool(own & {id(p) for p in m._parameters.values()}) for m in model.modules()) > 1


def _obstacle(layer: Layer, call: Call, counts: Counter[nn.Module]) -> str | None:
    """Why the outputs of a layer cannot be fitted, if they cannot."""
    x, y = call.x, call.y
    if counts[layer.module] > 1:
        return "its layer is called several times in a forward pass"
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return "its layer takes or gives no tensor"
    if not x.numel():
        return "its layer is given no rows"
    matrix = layer.weight.detach().mT if layer.transposed else layer.weight.detach()
    if x.shape[-1] != matrix.shape[1] or y.shape != (*x.shape[:-1], matrix.shape[0]):
        return "its layer's output has another shape"
    with torch.autocast(x.device.type, enabled=False):
        expected = x.float() @ matrix.float().mT
    if layer.bias is not None:
        expected = expected + layer.bias.detach().float()
    if (expected - y.float()).abs().max() > _TOLERANCE * (1 + expected.abs().max()):
        return "its layer computes more than its matrix and bias"
    return None


def _chains(model: nn.Module, calls: list[Call]) -> list[Chain]:
    """Those of elements of a ModuleList that are called once, each with what the one before has
    returned among its arguments; outer ones first."""
    of_module: dict[nn.Module, list[Call]] = {}
    for call in calls:
        of_module.setdefault(call.module, []).append(call)
    found = []
    for module in model.modules():
        if not isinstance(module, nn.ModuleList) or len(module) < 2:
            continue
        rows = [of_module.get(block, []) for block in module]
        if any(len(row) != 1 for row in rows):
            continue
        own = [row[0] for row in rows]
        places = [
            place
            for before, after in pairwise(own)
            if (place := _place_of(before.output, after)) is not None
        ]
        if len(places) == len(own) - 1:
            shares = all(_share_arguments(*pair) for pair in pairwise(own))
            found.append(Chain(list(module), [places[0], *places], shares))
    return found


def _place_of(tensor: Any, call: Call) -> int | str | None:
    """The argument of a call that is a tensor: its number or its name."""
    for index, value in enumerate(call.args):
        if value is tensor:
            return index
    return next((name for name, value in call.kwargs.items() if value is tensor), None)


def _share_arguments(ours: Call, theirs: Call) -> bool:
    """Do two calls differ in one argument at most?"""
    if len(ours.args) != len(theirs.args) or ours.kwargs.keys() != theirs.kwargs.keys():
        return False
    pairs = [*zip(ours.args, theirs.args, strict=True)]
    pairs += [(value, theirs.kwargs[name]) for name, value in ours.kwargs.items()]
    return sum(_differ(*pair) for pair in pairs) < 2


def _differ(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, tuple) and isinstance(theirs, tuple) and len(ours) == len(theirs):
        return any(map(_differ, ours, theirs))
    is_plain = isinstance(ours, str | int | float) and type(ours) is type(theirs)
    return ours != theirs if is_plain else ours is not theirs


def _decoder_side(model: nn.Module, calls: list[Call]) -> set[nn.Module]:
    """Modules whose rows are the tokens of a decoder, where there is an encoder, too.

    Layers of the decoder that are given what the encoder returns see the encoder's tokens.
    """
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return set()
    encoder: Any = getattr(model, "get_encoder", lambda: model)()
    encoded = [call.output for call in calls if call.module is encoder]
    fed = {call.module for call in calls if any(call.first_input is out for out in encoded)}
    return {*model.modules()} - {*encoder.modules()} - fed


def _total(
    layer: Call, calls: list[Call], counts: Counter[nn.Module], block: nn.Module | None
) -> Place | None:
    """Where the output of a layer, plus another tensor, shows up first."""
    own = _by_row(layer.y)
    inner = None if block is None else set(block.modules())
    seen: list[tuple[Place, Tensor]] = []
    for call in calls:
        if counts[call.module] > 1 or (inner is not None and call.module not in inner):
            continue
        for tensor, is_output in ((call.x, False), (call.y, True)):
            if isinstance(tensor, Tensor) and tensor.dim() and tensor.is_floating_point():
                seen.append((Place(call.module, is_output), _by_row(tensor)))
    seen = [(place, tensor) for place, tensor in seen if tensor.shape == own.shape]
    first = torch.stack([_first_values(tensor) for _, tensor in seen])
    expected = first + _first_values(own)
    rounding = _TOLERANCE * (first.abs() + _first_values(own).abs())
    for (place, total), values in zip(seen, first, strict=True):
        if place.module is layer.module or torch.equal(total, own):
            continue
        likely = ((expected - values).abs() <= rounding).all(dim=1).nonzero()[:, 0].tolist()
        others = (seen[i][1] for i in likely)
        if any(torch.equal(total, own + x) and not torch.equal(x, own) for x in others):
            return place
    return None


def _first_values(tensor: Tensor) -> Tensor:
    """A few of its values, float64: enough to see that two tensors differ."""
    return tensor[0, :8].double()


def _by_row(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
