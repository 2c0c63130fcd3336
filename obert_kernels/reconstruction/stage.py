"""Layer-wise reconstruction: what remains of each layer is fitted to what the dense model computes.

In the order of the forward pass, the remaining weights of each matrix are solved for by least
squares (Optimal Brain Compression, SparseGPT and others do so one matrix at a time): inputs are
those of the model as it is pruned and fitted so far, targets the outputs that the same layer has
in the dense model.  Where an output is added to a residual stream, the target also makes up for
what the stream has lost.  No labels are needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..fisher.free_memory import available_memory
from ..gradients.backward import evaluation
from ..gradients.batches import samples_in, split_batch, to_device
from ..gradients.losses import LossFn
from ..progress import Progress
from ..sparsity.matrices import find_matrices
from ..sparsity.values import replaced
from ..sparsity.wrappers import listed
from .config import ReconstructionConfig
from .fit import LayerFit, fit_layer
from .memory import planned_bytes, that_fit
from .moments import Moments
from .replay import Replay
from .structure import Layer, Place, Structure, Unit, find_structure, owners

_TRACED_SAMPLES = 2


class Reconstruction(NamedTuple):
    """What the stage did.

    Attributes:
        layers: of each layer that could be followed, in the order of the forward pass.
        notes: what the user should know.
    """

    layers: list[LayerFit]
    notes: list[str]


def biases_of(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return the biases that a reconstruction may change, by the name of their matrix + ".bias"."""
    return {
        f"{layer.name}.bias": layer.bias
        for layer in owners(model, weights, set())
        if isinstance(layer.bias, nn.Parameter)
    }


@torch.no_grad()
def reconstruct(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    masks: Mapping[str, Tensor],
    dense: Mapping[str, Tensor],
    batches: list[Any],
    held_back: list[Any],
    loss_fn: LossFn,
    config: ReconstructionConfig,
    progress: Progress,
    max_memory: int | None = None,
) -> Reconstruction:
    """Fit the remaining weights, and the biases, of a pruned model in place.

    Args:
        model: pruned.
        weights: name to matrix.
        masks: name to bool matrix of its shape, True for what remains.
        dense: the weights, and the biases by the names of :func:`biases_of`, before pruning.
        batches: to fit.
        held_back: others, that a ridge "auto" is chosen on, and that a fit must make better.
        loss_fn: ``loss_fn(model, batch)`` runs the model; its value does not count.
        config: how.
        progress: called as ``progress("reconstruction", done, total)``.
        max_memory: bytes on top of the model; None: what is free.  Fewer samples are fitted where
            all of them would not fit.

    Raises:
        NumericalError: what a layer computes is not finite.
    """
    parameters = {**weights, **biases_of(model, weights)}
    dense = {name: dense[name] for name in parameters}
    with evaluation(model), _every_layer_called():
        structure = _structure(model, weights, parameters, dense, batches, loss_fn)
        fitting = _with_room(weights, structure, batches, held_back, max_memory)
        replays = [
            Replay(model, loss_fn, own, parameters, dense, structure.of_decoder)
            for own in (fitting, held_back)
        ]
        fits: list[LayerFit] = []
        for unit in structure.units:
            places = [_Group.of(group, config) for group in unit.groups]
            for replay in replays:
                replay.enter(unit, [p for place in places for p in place.in_dense(config)])
            for group, place in zip(unit.groups, places, strict=True):
                seen, unseen = (_moments(replay, unit, place, config) for replay in replays)
                if isinstance(seen, str) or isinstance(unseen, str):
                    reason = seen if isinstance(seen, str) else str(unseen)
                    structure.left_out |= {layer.name: reason for layer in group}
                    continue
                for index, layer in enumerate(group):
                    fits.append(_fit(layer, index, masks[layer.name], seen, unseen, config))
                    progress("reconstruction", len(fits), len(structure.layers))
                for replay in replays:
                    replay.fitted(unit, group)
    notes = _notes(structure, fits, config)
    if fitting is not batches:
        notes.append("memory did not hold all samples for the fit: fewer were taken")
    return Reconstruction(fits, notes)


@contextmanager
def _every_layer_called() -> Iterator[None]:
    """``nn.TransformerEncoder`` has a way of its own for inference, past its layers."""
    is_on = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(is_on)


def _structure(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    parameters: Mapping[str, nn.Parameter],
    dense: Mapping[str, Tensor],
    batches: list[Any],
    loss_fn: LossFn,
) -> Structure:
    found = owners(model, weights, find_matrices(model).transposed)
    few = _few_samples(batches)
    first = to_device(few[0], next(iter(parameters.values())).device)
    replay = Replay(model, loss_fn, few, parameters, dense)
    with replaced(parameters, dense):
        return find_structure(
            model, found, list(weights), lambda: loss_fn(model, first), replay.runs_alone
        )


def _few_samples(batches: list[Any]) -> list[Any]:
    """Two small batches, one where there is no more."""
    few = list(batches[:2])
    if samples_in(few[0]) is not None:
        few = [*split_batch(few[0], _TRACED_SAMPLES)[:2], *few[1:]]
    return few[:2]


def _with_room(
    weights: Mapping[str, nn.Parameter],
    structure: Structure,
    batches: list[Any],
    held_back: list[Any],
    max_memory: int | None,
) -> list[Any]:
    """The batches, or some of their samples where memory does not hold what all come to."""
    budget = max_memory
    if budget is None:
        budget = available_memory(next(iter(weights.values())).device)
    if budget is None:
        return batches
    traced = min(_TRACED_SAMPLES, samples_in(batches[0]) or 1)
    room = budget - planned_bytes(weights)
    return that_fit(batches, held_back, room, structure.rows / traced, structure)


class _Group(NamedTuple):
    """Where inputs and targets of layers with the same inputs show up.

    Attributes:
        entry: their inputs.
        outputs, totals: of each layer; None without a residual sum to fit.
    """

    entry: Place
    outputs: list[Place]
    totals: list[Place | None]

    @classmethod
    def of(cls, group: list[Layer], config: ReconstructionConfig) -> _Group:
        with_totals = config.residual and config.inputs == "pruned"
        return cls(
            Place(group[0].module, False),
            [Place(layer.module, True) for layer in group],
            [layer.total if with_totals else None for layer in group],
        )

    def in_dense(self, config: ReconstructionConfig) -> list[Place]:
        """What is wanted of the dense model."""
        targets = [total or own for total, own in zip(self.totals, self.outputs, strict=True)]
        return [*([self.entry] if config.inputs == "dense" else []), *targets]

    def in_pruned(self) -> list[Place]:
        """What is wanted of the pruned one."""
        pairs = zip(self.totals, self.outputs, strict=True)
        return [self.entry, *(p for total, own in pairs if total for p in (own, total))]


def _moments(
    replay: Replay, unit: Unit, group: _Group, config: ReconstructionConfig
) -> Moments | str:
    """Inputs and targets of layers with the same inputs; a reason if they cannot be fitted."""
    moments = Moments()
    wanted = group.in_pruned()
    pruned_runs = replay.in_dense if config.inputs == "dense" else replay.in_pruned(unit, wanted)
    for dense, pruned in zip(replay.in_dense, pruned_runs, strict=True):
        if not (dense.keys() >= {*group.in_dense(config)} and pruned.keys() >= {*wanted}):
            continue  # the batch does not come to them
        if any(len(dense[place]) != len(pruned[group.entry]) for place in group.in_dense(config)):
            return "the pruned model gives its layer other rows than the dense one"
        targets = [
            dense[own] if total is None else dense[total] - (pruned[total] - pruned[own])
            for total, own in zip(group.totals, group.outputs, strict=True)
        ]
        moments.add(pruned[group.entry], targets)
    return moments if moments.count else "no batch comes to its layer"


def _fit(
    layer: Layer,
    index: int,
    mask: Tensor,
    seen: Moments,
    held_back: Moments,
    config: ReconstructionConfig,
) -> LayerFit:
    """Fit one of the layers whose moments these are, and write it."""
    centred = layer.bias is not None
    matrix = layer.weight.detach()
    fitted = fit_layer(
        layer.name,
        matrix.mT if layer.transposed else matrix,
        layer.bias,
        mask.mT if layer.transposed else mask,
        seen.normal(index, centred),
        held_back.normal(index, centred),
        config.ridge,
    )
    new = [(layer.weight, fitted.weight.mT if layer.transposed else fitted.weight)]
    if layer.bias is not None and fitted.bias is not None:
        new.append((layer.bias, fitted.bias))
    if not all(bool(value.to(old.dtype).isfinite().all()) for old, value in new):
        return fitted.report._replace(is_kept=False)  # it left the range of the type
    if fitted.report.is_kept:
        for old, value in new:
            old.copy_(value)
    return fitted.report


def _notes(structure: Structure, fits: list[LayerFit], config: ReconstructionConfig) -> list[str]:
    notes = []
    by_reason: dict[str, list[str]] = {}
    for name, reason in structure.left_out.items():
        by_reason.setdefault(reason, []).append(name)
    notes += [f"{listed(names)} not fitted: {reason}" for reason, names in by_reason.items()]
    if config.residual and fits and all(layer.total is None for layer in structure.layers):
        notes.append(
            "no residual sum was found after the layers fitted: each was fitted to its own output"
        )
    return notes
