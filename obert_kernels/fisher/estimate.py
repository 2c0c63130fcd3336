"""Model and batches to the block Fishers of its weight matrices."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..gradients.buffers import gradient_buffers
from ..gradients.losses import LossFn
from ..gradients.per_batch import batch_gradients
from ..gradients.per_samples import GroupGradients, NotServed
from ..gradients.source import BatchSource
from ..progress import Clock, Progress
from ..sparsity.patterns import DEFAULT_BLOCK_SIZE, UNSTRUCTURED, Pattern
from ..sparsity.wrappers import listed
from .base import Fisher
from .config import FisherConfig
from .estimators import estimators
from .memory import MemoryPlan


@dataclass
class FisherEstimate:
    """Block Fisher of several matrices, reusable for any sparsity, damping and rule.

    Attributes:
        fishers: parameter name to its block Fisher.
        num_grads: m, number of gradients.
        seconds: "gradients" and "fisher".
        plan: memory and passes.
        notes: what the user should know about the batches.
        samples_per_grad: as given; None: one batch each.
        pattern: the order of the weights in a block, and the groups that can be scored.
        block_size: B, weights per block.
        zeros: weights that were zero then, flat in the order of the pattern, of matrices that had
            some; a Fisher of the remaining weights alone knows itself.
        batches: some of those that were looked at, for a reconstruction.
    """

    fishers: dict[str, Fisher]
    num_grads: int
    seconds: dict[str, float]
    plan: MemoryPlan
    notes: list[str]
    samples_per_grad: int | None = None
    pattern: Pattern = UNSTRUCTURED
    block_size: int = DEFAULT_BLOCK_SIZE
    zeros: dict[str, Tensor] = field(default_factory=dict)
    batches: list[Any] = field(default_factory=list)


class Estimation:
    """How Fishers are estimated from batches; found out on the first of them.

    Args:
        model: the model, in any mode.
        source: of batches, which are taken from where it stands.
        weights: name to matrix.
        config: of the Fisher, with a block size.
        pattern: the order of the weights in a gradient.
        loss_fn: ``loss_fn(model, batch)``, what gradients are taken of.

    Attributes:
        samples: of each gradient where one backward pass gives many; None: a batch gives one.

    Raises:
        ValueError: batches are needed and cannot be cut into samples, or give no loss.
    """

    def __init__(
        self,
        model: nn.Module,
        source: BatchSource,
        weights: Mapping[str, nn.Parameter],
        config: FisherConfig,
        pattern: Pattern,
        loss_fn: LossFn,
    ) -> None:
        self.model, self.source, self.config = model, source, config
        self.pattern, self.loss_fn = pattern, loss_fn
        self.samples = config.samples_per_grad
        if self.samples is None:
            return
        try:
            groups = GroupGradients(model, weights, self.samples, loss_fn, pattern=pattern)
            where, batch = source.look_at_several_samples()
            groups.check(batch, where)
        except NotServed as error:
            source.notes.append(f"every gradient took a backward pass of its own: {error}")
            source.cut(self.samples)
            self.samples = None

    def accumulate(
        self,
        weights: Mapping[str, nn.Parameter],
        plan: MemoryPlan,
        clock: Clock,
        progress: Progress,
        source: BatchSource | None = None,
    ) -> dict[str, Fisher]:
        """Add the gradients of some matrices to Fishers of the weights that are left in them.

        Args:
            weights: name to matrix, those of a pass of the plan.
            plan: memory and passes.
            clock: gets the seconds of "gradients" and "fisher".
            progress: called as ``progress(stage, done, total)``.
            source: of batches, in place of its own.
        """
        create = estimators.find(self.config.estimator).create
        assert self.config.block_size is not None
        fishers: dict[str, Fisher] = {}
        for name, weight in weights.items():
            remaining = self.pattern.flat(weight.detach() != 0)
            fishers[name] = create(
                remaining, self.config.block_size, self.pattern.span,
                dtype=self.config.torch_dtype, name=name,
            )  # fmt: skip
        # Of a pruned weight no gradient is added: its rows and columns stay zero.
        zeros = zero_weights(fishers, weights, self.pattern)
        add_all = self._gather if self.samples is None else self._stream
        progress("gradients", 0, self.config.num_grads)
        add_all(weights, plan, fishers, zeros, clock, progress, source or self.source)
        return fishers

    def _gather(
        self,
        weights: Mapping[str, nn.Parameter],
        plan: MemoryPlan,
        fishers: Mapping[str, Fisher],
        zeros: Mapping[str, Tensor],
        clock: Clock,
        progress: Progress,
        source: BatchSource,
    ) -> None:
        """One gradient a batch, k of them gathered before they are added."""
        k, num_grads = plan.gradients_per_update, self.config.num_grads
        buffers = gradient_buffers(k, weights)
        gathered = 0
        is_part = len(plan.passes) > 1
        with closing(
            batch_gradients(self.model, source, weights, num_grads, self.loss_fn, is_part=is_part)
        ) as gradients:
            for index in range(num_grads):
                with clock.stage("gradients"):
                    for name, gradient in next(gradients).items():
                        row = buffers[name][gathered].copy_(self.pattern.flat(gradient))
                        if name in zeros:
                            row.masked_fill_(zeros[name], 0)
                gathered += 1
                if gathered == k or index == num_grads - 1:
                    with clock.stage("fisher"):
                        for name, fisher in fishers.items():
                            fisher.accumulate(buffers[name][:gathered])
                    gathered = 0
                progress("gradients", index + 1, num_grads)

    def _stream(
        self,
        weights: Mapping[str, nn.Parameter],
        plan: MemoryPlan,
        fishers: Mapping[str, Fisher],
        zeros: Mapping[str, Tensor],
        clock: Clock,
        progress: Progress,
        source: BatchSource,
    ) -> None:
        """Many gradients a batch, added matrix by matrix while its backward pass runs."""

        def add(name: str, gradients: Tensor) -> None:
            if name in zeros:
                gradients.masked_fill_(zeros[name], 0)
            with clock.stage("fisher"):
                fishers[name].accumulate(gradients)

        assert self.samples is not None
        groups = GroupGradients(
            self.model,
            weights,
            self.samples,
            self.loss_fn,
            plan.gradients_per_update,
            self.pattern,
            is_part=len(plan.passes) > 1,
        )
        run = groups.run(source, self.config.num_grads, add)
        with closing(run), clock.stage("gradients"):
            for done in run:
                progress("gradients", done, self.config.num_grads)
        if groups.split:
            self.source.notes.append(
                "some batches took a backward pass for every gradient: samples are left out of the "
                "loss, or cannot be told apart in the input of a layer"
            )
        if groups.largest < self.samples:
            self.source.notes.append(
                f"the batches have fewer than {self.samples} samples, and gradients are of so "
                "many: pass larger ones"
            )


def zero_weights(
    fishers: Mapping[str, Fisher], weights: Mapping[str, nn.Parameter], pattern: Pattern
) -> dict[str, Tensor]:
    """Weights that are zero, where there are some and the Fisher would look at them."""
    looked_at = (name for name, fisher in fishers.items() if fisher.looks_at_pruned)
    zero = ((name, pattern.flat(weights[name].detach() == 0)) for name in looked_at)
    return {name: zeros for name, zeros in zero if bool(torch.any(zeros))}


def note_on_zero_gradients(
    mean_squares: Mapping[str, float], weights: Mapping[str, nn.Parameter]
) -> str | None:
    """Return what the user should know where all gradients of a matrix were zero.

    Args:
        mean_squares: of matrices, :meth:`Fisher.mean_squares`.
        weights: name to matrix; one without remaining weights has no gradients.

    Raises:
        ValueError: no matrix has any other gradient.
    """
    zero = [
        name
        for name, square in mean_squares.items()
        if square == 0 and bool((weights[name].detach() != 0).any())
    ]
    if not zero:
        return None
    names = listed(zero)
    small = (
        "compute it in float32 (float16 loses small gradients, and a float32 Fisher their squares)"
    )
    if not any(square for square in mean_squares.values()):
        raise ValueError(
            f"all gradients of {names} are zero, which says nothing about any weight: give a loss "
            f"that depends on what the model makes of a batch, or {small}"
        )
    return (
        f"all gradients of {names} are zero, so their weights were ranked by size alone, as if the "
        f"model did without them: if it does use them, {small}, or leave them out with params"
    )
