"""One-shot pruning: model -> gradients -> Fisher -> scores -> masks -> update."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..fisher.config import FisherConfig
from ..fisher.estimate import FisherEstimate
from ..gradients.losses import LossFn
from ..ops.checks import WIDE
from ..progress import Progress
from ..reconstruction.config import ReconstructionConfig
from ..sparsity.layers import find_weights, match_names
from ..sparsity.matrices import find_matrices
from ..sparsity.wrappers import check_no_adapters, unwrapped
from .config import PruningConfig
from .inputs import check_batches, check_estimate
from .pruner import Pruner
from .report import PruneReport
from .rollback import Rollback


class PruneResult(NamedTuple):
    """What :func:`prune` returns.

    Attributes:
        model: the model given, pruned in place.
        masks: parameter name to bool tensor of its shape, True for the weights that remain.
        report: figures per layer, times, memory.
    """

    model: nn.Module
    masks: dict[str, Tensor]
    report: PruneReport


def prune(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    sparsity: float | Mapping[str, float] | None = None,
    pattern: str = "unstructured",
    *,
    num_grads: int = 1024,
    samples_per_grad: int | None = None,
    block_size: int | None = None,
    damping: float | str = "auto",
    calibration: Iterable[Any] | None = None,
    params: str | Iterable[str] | None = None,
    loss_fn: LossFn | None = None,
    selection: str = "greedy",
    update: str | None = None,
    scope: str = "global",
    steps: int = 1,
    schedule: str = "geometric",
    reconstruction: ReconstructionConfig | str | None = "auto",
    estimator: str = "gram",
    fisher: FisherEstimate | None = None,
    fisher_dtype: torch.dtype = torch.float64,
    config: PruningConfig | None = None,
    max_memory: int | None = None,
    progress: Progress | None = None,
) -> PruneResult:
    """Prune a model in place, in one shot, with second-order information (oBERT).

    Args:
        model: any module; nothing of it changes if the call fails or is interrupted.  Of a wrapper
            (``DataParallel``, ``DistributedDataParallel``, ``torch.compile``) the model inside is
            pruned, its names are used, and ``loss_fn`` is given that.
        batches: an iterable of batches, one gradient each; started over when it ends before
            ``num_grads``.  Mappings are passed as ``model(**batch)`` and must give ``.logits`` of
            classes or ``.loss``; anything else needs ``loss_fn``.
        sparsity: share of weights to be zero, counted over all pruned matrices; or a mapping
            from name or ``re:`` pattern to the sparsity of each matrix it matches.  Default 0.8,
            or what an N:M pattern prescribes.
        pattern: "unstructured"; "block4" (any "block<c>"): c consecutive weights along the input
            dimension live or die together; "block4x1" (any "block<c>x1"): c along the output
            dimension, along which the Fisher blocks then run, too; "2:4" (any N:M up to 16): at
            most 2 of every 4 weights along the input dimension remain.
        num_grads: m, number of gradients.
        samples_per_grad: None: each batch gives one gradient.  g: one backward pass gives a
            gradient of every g samples of its batch, so large batches are best (64 g samples);
            the loss must be a mean over samples.
        block_size: B, 1 to 256, weights per Fisher block; a multiple of M for N:M patterns.
            Default 50, or the multiple of M below.
        damping: added to the diagonal of the Fisher.  "auto": chosen by trial prunings, the one
            that moves the probabilities of the classes least on the calibration batches (the loss,
            where there are no classes; :mod:`obert_kernels.pruning.damping`).
        calibration: batches for these trials, which the Fisher should not have seen; None: the
            first of ``batches``, some 256 samples, a quarter at most if their number is known, are
            kept back.
        params: names or ``re:`` patterns of the matrices; None: encoder linear layers.
        loss_fn: ``loss_fn(model, batch)``, a scalar, the mean of something over the samples, that
            gradients are taken of.  None: :func:`prediction_loss` for models that give each sample
            one of several classes, which needs no labels, and the model's own loss for others.
            :func:`model_loss`: always the model's own, as in the papers.
        selection: "greedy" ranks by what exact removals one after the other cost inside each
            block (for N:M: removes from each M-group the set that costs least); "diagonal"
            (oBERT's) by the OBS saliency of each weight or group as if it went alone; "magnitude"
            by size (needs no batches unless an update is asked for); or what
            :func:`register_saliency` was given.
        update: how the remaining weights make up for the pruned: "joint" (exact inside each block),
            "sum" (oBERT's), or "none".  Default: "sum" for the diagonal selection, "none" for
            magnitude and others that use no Fisher, else "joint".
        scope: "global" for one ranking over all matrices, "layer" for one in each.
        steps: sub-steps R; in each the Fisher of the weights that are left is estimated anew,
            from ``num_grads`` further gradients of the model as it is by then; a selection without
            a Fisher is asked anew.
        schedule: "geometric" takes the same share of what is left in each sub-step, "linear"
            the same number of weights.
        reconstruction: after that, fits the remaining weights and the biases of each layer to what
            the dense model computes on the batches; no labels are needed
            (:mod:`obert_kernels.reconstruction.stage`).  "auto": where there are batches; None: not
            at all; or a :class:`ReconstructionConfig`.
        estimator: "gram", or what :func:`register_fisher` was given.
        fisher: an :func:`estimate_fisher` of this model to use instead of gradients; batches then
            serve the reconstruction alone.  What belongs to the estimate (``num_grads``,
            ``samples_per_grad``, ``block_size``, ``estimator``, ``fisher_dtype``, ``max_memory``)
            is the fisher's.  ``damping="auto"`` needs ``calibration`` with it.
        fisher_dtype: type of the Gram, float64 or float32.
        config: all of these but ``sparsity``, ``calibration``, ``loss_fn``, ``fisher`` and what
            follows, in place of the keywords.
        max_memory: bytes the call may use on top of the model; matrices are then worked on in
            several passes over the same batches.
        progress: called as ``progress(stage, done, total)``.

    Returns:
        The model, its masks and a report.

    Raises:
        ValueError: an argument is out of range or does not fit the model, the batches give no
            finite loss or gradient, or they are too few.
        TypeError: no loss could be had from a batch, or an argument, or a matrix, has a type that
            cannot be worked with.
        MemoryError: the call would not fit; the message gives the figures and the remedies.
        NumericalError: a Fisher block is not positive definite, or new weights (with damping
            "auto": what the model makes of the calibration batches) are not finite.
    """
    check_batches(batches)
    check_estimate(fisher)
    if not isinstance(config, PruningConfig | None):
        raise TypeError(f"config must be a PruningConfig, got a {type(config).__name__}")
    keywords = PruningConfig(
        pattern=pattern,
        selection=selection,
        update=update,
        scope=scope,
        damping=damping,
        params=names_of(params),
        steps=steps,
        schedule=schedule,
        reconstruction=reconstruction,
        fisher=FisherConfig(
            num_grads=num_grads,
            samples_per_grad=samples_per_grad,
            block_size=block_size if fisher is None or config is not None else fisher.block_size,
            estimator=estimator,
            dtype=dtype_name(fisher_dtype),
        ),
    )
    if config is None:
        config = keywords
    elif given := [*_changed(keywords), *(["update"] if update is not None else [])]:
        raise ValueError(f"give config or keywords, not both: {', '.join(dict.fromkeys(given))}")
    if config.params is None:
        config = replace(config, params=_implied_names(model, sparsity, fisher))
    elif isinstance(sparsity, Mapping):
        config = replace(config, params=_matched(model, config.params, sparsity))
    pruner = Pruner(model, config, loss_fn=loss_fn, max_memory=max_memory, progress=progress)

    def call(rollback: Rollback) -> PruneResult:
        report = pruner._step(rollback, sparsity, batches, fisher, calibration)
        return PruneResult(model, pruner.masks, report)

    return pruner._all_or_nothing(call)


def _changed(keywords: PruningConfig) -> list[str]:
    """Names of the keywords that are not at their defaults."""
    default = PruningConfig()
    pairs = ((keywords, default), (keywords.fisher, default.fisher))
    return [
        "fisher_dtype" if known.name == "dtype" else known.name
        for config, plain in pairs
        for known in fields(config)
        if known.name != "fisher" and getattr(config, known.name) != getattr(plain, known.name)
    ]


def names_of(params: str | Iterable[str] | None) -> tuple[str, ...] | None:
    """One name or several as a tuple."""
    if params is None:
        return None
    if isinstance(params, str) or not isinstance(params, Iterable):
        return (params,)  # what is no name is refused by the configuration
    return tuple(params)


def dtype_name(dtype: torch.dtype) -> str:
    """Return "float32" for ``torch.float32``, "float64" for ``torch.float64``.

    Raises:
        TypeError: it is neither.
    """
    if dtype not in WIDE:
        raise TypeError(f"fisher_dtype must be torch.float64 or torch.float32, got {dtype!r}")
    return str(dtype).removeprefix("torch.")


def _implied_names(
    model: nn.Module, sparsity: float | Mapping[str, float] | None, fisher: FisherEstimate | None
) -> tuple[str, ...] | None:
    """The matrices that a sparsity of each, or an estimate, speaks of."""
    if isinstance(sparsity, Mapping) and sparsity:
        return _matched(model, None if fisher is None else fisher.fishers, sparsity)
    return None if fisher is None else tuple(fisher.fishers)


def _matched(
    model: nn.Module, params: Iterable[str] | None, sparsity: Mapping[str, float]
) -> tuple[str, ...]:
    check_no_adapters(unwrapped(model))
    names = find_matrices(model).names if params is None else find_weights(model, params)
    return tuple(match_names(names, sparsity, "sparsity"))


def estimate_fisher(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    num_grads: int = 1024,
    samples_per_grad: int | None = None,
    block_size: int | None = None,
    params: str | Iterable[str] | None = None,
    loss_fn: LossFn | None = None,
    fisher_dtype: torch.dtype = torch.float64,
    pattern: str = "unstructured",
    estimator: str = "gram",
    progress: Progress | None = None,
) -> FisherEstimate:
    """Estimate the block Fisher of a model's weight matrices from mini-batch gradients.

    The result serves :func:`prune` for several sparsities, dampings and rules; that of a dense
    model also for all patterns whose groups run along the same dimension (N:M ones if
    ``block_size`` is a multiple of M).

    Args: as for :func:`prune`.

    Raises:
        ValueError, TypeError, MemoryError: as for :func:`prune`.
    """
    check_batches(batches)
    fisher = FisherConfig(
        num_grads=num_grads,
        samples_per_grad=samples_per_grad,
        block_size=block_size,
        estimator=estimator,
        dtype=dtype_name(fisher_dtype),
    )
    config = PruningConfig(pattern=pattern, params=names_of(params), fisher=fisher)
    return Pruner(model, config, loss_fn=loss_fn, progress=progress).fisher(batches)
