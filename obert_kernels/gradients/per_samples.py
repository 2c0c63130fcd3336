"""Gradients of groups of samples, many from one backward pass.

For a linear layer ``y = x W^T`` the gradient of the loss of some samples is ``D^T A`` over their
tokens, A the input of the layer and D the gradient at its output.  So one backward pass over a
batch, with A and D taken at every layer, gives the gradients of all groups of samples in it.  They
are handed on layer by layer while the pass runs; the whole of them never exists.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..sparsity.patterns import UNSTRUCTURED, Pattern
from ..sparsity.wrappers import unwrapped
from .backward import Tap, anchor_of, backward, frozen, grads_of, removed
from .batches import samples_in, split_batch, tensors_in, to_device
from .buffers import STREAMED_PER_UPDATE
from .ignored_labels import (
    all_labels_ignored,
    has_ignored_labels,
    require_some_label,
    without_ignored_samples,
)
from .losses import LossFn, model_loss
from .per_batch import check_loss, check_reached, not_finite
from .source import BatchSource

Receive = Callable[[str, Tensor], None]


class NotServed(ValueError):
    """Inputs and outputs of layers do not give these gradients; says why."""


class _Recorder:
    """Collects A and D of one batch and hands on the gradients of its groups."""

    def __init__(self, wanted: GroupGradients, receive: Receive) -> None:
        self.weights = wanted.weights
        self.samples_per_grad = wanted.samples_per_grad
        self.groups_at_once = wanted.groups_at_once
        self.pattern = wanted.pattern
        self.is_part = wanted.is_part
        self.receive = receive
        self.space: Tensor | None = None
        self.is_listening = False
        self._start([], 0, "")

    @contextmanager
    def listening(self, batch: Any, most: int, where: str) -> Iterator[None]:
        """A pass of a batch of which at most ``most`` groups are wanted; what the caller does with
        the model between two of them, say to make a batch, is not recorded."""
        self._start(batch, most, where)
        self.is_listening = True
        try:
            yield
        finally:
            self.is_listening = False

    def _start(self, batch: Any, most: int, where: str) -> None:
        samples = samples_in(batch) or 0
        # A single group is taken whole, whatever its layers make of its samples.
        is_whole = samples <= self.samples_per_grad
        self.samples, self.size = (1, 1) if is_whole else (samples, self.samples_per_grad)
        # Rows of two dimensions are whole samples, or the parts of all of them, such as tokens.
        widths = {tensor.shape[1] for tensor in tensors_in(batch) if tensor.dim() > 1}
        self.rows = {samples, samples * widths.pop()} if len(widths) == 1 else {samples}
        self.most = most
        self.where = where
        self.in_forward = True
        self.uses = dict.fromkeys(self.weights, 0)
        self.pairs: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self.weights}
        self.missing = set(self.weights)  # the loss does not depend on them: their gradients are 0

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass; every weight is handed on as soon as all its uses are known."""
        if not any(self.uses.values()):
            if self.is_part:
                return self.hand_on_zeros()
            raise NotServed("none of the layers is called as a module")
        check_loss(loss, self.where)
        self.in_forward = False  # a checkpoint runs layers again: no new uses
        backward(loss, ())
        for name, pairs in self.pairs.items():  # a use that the loss does not depend on
            if pairs:
                self._hand_on(name)
        if not self.is_part:
            check_reached(len(self.missing) < len(self.weights), self.where)
        return self.hand_on_zeros()

    def hand_on_zeros(self) -> None:
        """Of the weights that the loss does not depend on."""
        for name in self.missing.copy():
            self._hand_on(name)

    def hook(self, name: str, anchor: Tensor) -> Callable:
        def tap(
            module: nn.Module, args: tuple, kwargs: dict[str, Tensor], output: Tensor
        ) -> Tensor | None:
            if not self.is_listening:
                return None
            inputs = args[0] if args else kwargs["input"]
            if self.in_forward:
                self.uses[name] += 1
                self._check_rows(name, inputs, output)
            if not torch.is_grad_enabled():
                return None
            return Tap.apply(output, anchor, inputs, lambda a, d: self._collect(name, a, d))

        return tap

    def _collect(self, name: str, inputs: Tensor, grad: Tensor) -> None:
        # A sum is finite if all is; much faster than a look at every number.
        wide = torch.promote_types(grad.dtype, torch.float32)
        if not torch.isfinite(grad.sum(dtype=wide) + inputs.sum(dtype=wide)):
            raise not_finite(name, self.where)
        self.pairs[name].append((self._by_sample(inputs.to(grad.dtype)), self._by_sample(grad)))
        if len(self.pairs[name]) == self.uses[name]:
            self._hand_on(name)

    def _check_rows(self, name: str, inputs: Tensor, output: Tensor) -> None:
        """Raise NotServed, before anything is handed on, unless samples can be told apart."""
        if output.shape != (*inputs.shape[:-1], self.weights[name].shape[0]):
            raise NotServed(f"the output of {name} has shape {tuple(output.shape)}")
        count = inputs.shape[0] if inputs.dim() > 1 else 1
        packed = inputs.dim() == 2 and count not in self.rows
        if self.samples > 1 and (packed or count % self.samples):
            raise NotServed(
                f"the input of {name} has shape {tuple(inputs.shape)} for {self.samples} samples"
            )

    def _by_sample(self, x: Tensor) -> Tensor:
        return x.reshape(self.samples, -1, x.shape[-1])

    def _hand_on(self, name: str) -> None:
        pairs, self.pairs[name] = self.pairs[name], []
        self.missing.discard(name)
        whole = min(self.samples // self.size, self.most)
        for first in range(0, whole, self.groups_at_once):
            count = min(self.groups_at_once, whole - first)
            self._send(name, pairs, first * self.size, count, self.size)
        rest = self.samples - whole * self.size
        if whole < self.most and rest:
            self._send(name, pairs, whole * self.size, 1, rest)

    def _send(self, name: str, pairs: list, first: int, groups: int, size: int) -> None:
        """Gradients of the mean loss of ``groups`` groups of ``size`` samples from ``first`` on."""
        # The loss is a mean over all samples of the batch, so each has a share of 1 in it.
        scale = self.samples / size
        rows, columns = self.weights[name].shape
        by_column = self.pattern.by_column
        shape = (columns, rows) if by_column else (rows, columns)
        gradient = self._space(groups, shape, pairs[0][1] if pairs else self.weights[name])
        if not pairs:
            gradient.zero_()
        for use, (inputs, grad) in enumerate(pairs):
            a, d = (
                x[first : first + groups * size].reshape(groups, -1, x.shape[-1])
                for x in (inputs, grad)
            )
            left, right = (a, d) if by_column else (d, a)
            torch.baddbmm(gradient, left.mT, right, beta=min(use, 1), alpha=scale, out=gradient)
        order = UNSTRUCTURED if by_column else self.pattern  # which the product gave already
        self.receive(name, order.flat(gradient))

    def _space(self, groups: int, shape: tuple[int, int], like: Tensor) -> Tensor:
        """Room for gradients; the same for all layers: fresh memory costs as much as the sum."""
        size = groups * shape[0] * shape[1]
        space = self.space
        kind = like.dtype, like.device
        if space is None or space.numel() < size or (space.dtype, space.device) != kind:
            self.space = space = None  # freed first
            self.space = space = like.new_empty(size)
        return space[:size].view(groups, *shape)


class GroupGradients:
    """Gradients of the mean loss of groups of samples, handed on layer by layer.

    Args:
        model: any module; runs in eval mode and is put back afterwards.
        weights: name to parameter, the gradients wanted.
        samples_per_grad: g, samples of a group; what is left of a batch makes a smaller one.
        loss_fn: ``loss_fn(model, batch)``, the mean of a loss of each sample; None:
            :func:`model_loss` (where :func:`obert_kernels.prune` takes :func:`prediction_loss`
            for classifiers).
        groups_at_once: gradients of a matrix that exist together.
        pattern: says in which order the gradients of a matrix are handed on.
        is_part: there are other weights, so that a batch may reach none of these.

    Attributes:
        split: batches that took a pass for every group.
        largest: samples of the largest batch so far.
        any_counts: the loss of some batch of this run did not leave out all samples.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, nn.Parameter],
        samples_per_grad: int,
        loss_fn: LossFn | None = None,
        groups_at_once: int = STREAMED_PER_UPDATE,
        pattern: Pattern = UNSTRUCTURED,
        is_part: bool = False,
    ) -> None:
        self.is_part = is_part
        self.split = self.largest = 0
        self.any_counts = False
        self.model = unwrapped(model)
        self.pattern = pattern
        self.weights = weights
        self.samples_per_grad = samples_per_grad
        self.groups_at_once = groups_at_once
        self.loss_fn = loss_fn or model_loss
        self.device = next(iter(weights.values())).device

    def run(
        self, batches: Iterable[Any] | BatchSource, num_grads: int, receive: Receive
    ) -> Generator[int, None, None]:
        """Hand on ``num_grads`` gradients; yield how many there are after each batch.

        Args:
            batches: an iterable of batches, started over when it ends early.
            num_grads: groups in all.
            receive: called as ``receive(name, gradients)`` with ``[k, n]`` for each weight, k
                groups of a batch at a time; it may change them in place.

        Raises:
            ValueError: as for :func:`batch_gradients`, or a batch cannot be cut into samples.
            NotServed: the layers are not called as modules.
        """
        done, self.any_counts = 0, False
        with self._recording(receive) as recorder:
            for where, batch in BatchSource.of(batches).take():
                done += self._gradients_of(recorder, batch, num_grads - done, where)
                if done == num_grads:
                    require_some_label(self.any_counts)
                yield done
                if done == num_grads:
                    return

    def _gradients_of(self, recorder: _Recorder, batch: Any, most: int, where: str) -> int:
        """Those of a batch, from one pass if that can tell them apart; how many they are."""
        samples = samples_in(batch)
        self.largest = max(self.largest, samples or 0)
        # Samples left out of the loss have no share in its mean over the batch.
        if samples is not None and not has_ignored_labels(batch):
            try:
                return self._pass(recorder, batch, most, where)
            except NotServed:
                if samples <= self.samples_per_grad:
                    raise
        self.split += 1
        done = 0
        for part in split_batch(batch, self.samples_per_grad):
            if done < most:
                done += self._pass(recorder, part, most - done, where)
        return done

    @contextmanager
    def _recording(self, receive: Receive) -> Iterator[_Recorder]:
        """Hooks on every linear layer that owns one of the weights; the model frozen, in eval
        mode."""
        recorder = _Recorder(self, receive)
        names: dict[Tensor, str] = {weight: name for name, weight in self.weights.items()}
        anchor = anchor_of(self.weights)
        with ExitStack() as stack:
            stack.enter_context(frozen(self.model, anchor))
            for module in self.model.modules():
                if isinstance(module, nn.Linear) and module.weight in names:
                    hook = recorder.hook(names[module.weight], anchor)
                    handle = module.register_forward_hook(hook, with_kwargs=True)
                    stack.enter_context(removed(handle))
            yield recorder

    def _pass(self, recorder: _Recorder, batch: Any, most: int, where: str) -> int:
        """Run forward and backward once; return how many gradients came of it."""
        listening = recorder.listening(batch, most, where)
        with listening, torch.inference_mode(False), torch.enable_grad():
            loss = self.loss_fn(self.model, to_device(batch, self.device))
            if all_labels_ignored(batch, loss):
                recorder.hand_on_zeros()
            else:
                self.any_counts = True
                recorder.backward(loss)
        return min(-(-(samples_in(batch) or 0) // self.samples_per_grad), most)

    def check(self, batch: Any, where: str = "batch 0") -> None:
        """Compare the first group's gradients with those of autograd for that group alone.

        They differ where a layer's weight is used without calling the layer, where samples do
        not lie along the first dimension, or where the loss is not a mean over samples.

        Raises:
            NotServed: they do, or the batch does not reach a matrix; the message names it.
        """
        batch = without_ignored_samples(to_device(batch, self.device))
        # A group that is all of the batch has the same gradient in it, whatever the loss.
        half = max(1, (samples_in(batch) or 0) // 2)
        if half < self.samples_per_grad:
            return self._with_group(half).check(batch, where)
        alone = split_batch(batch, self.samples_per_grad)[0]
        expected = self._from_autograd(alone, where)
        found: dict[str, Tensor] = {}
        tolerance = 1e-3

        def compare(name: str, gradients: Tensor) -> None:
            nonlocal tolerance
            if gradients.dtype.itemsize < 4:
                tolerance = 5e-2
            found[name] = _projection(self.pattern.matrix(gradients[0], self.weights[name]))

        with self._recording(compare) as recorder:
            self._pass(recorder, batch, 1, where)
            unknown = [name for name, count in recorder.uses.items() if not count]
        if unknown:
            raise NotServed(f"{unknown[0]} is not used in {where}, or not by its module")
        for name, known in expected.items():
            error = (found.get(name, torch.zeros_like(known)) - known).norm()
            if not error <= tolerance * known.norm():
                raise NotServed(
                    f"the first {self.samples_per_grad} samples of a batch have another gradient "
                    f"of {name} when they are alone, or its layer is not called as a module"
                )
        return None

    def _with_group(self, size: int) -> GroupGradients:
        how = self.loss_fn, self.groups_at_once, self.pattern, self.is_part
        return GroupGradients(self.model, self.weights, size, *how)

    def _from_autograd(self, batch: Any, where: str) -> dict[str, Tensor]:
        """Projected gradients of a batch; only one of them exists at a time."""
        zero = torch.zeros(16, dtype=torch.float64, device="cpu")
        found = dict.fromkeys(self.weights, zero)

        def take(name: str, parameter: Tensor) -> None:
            assert parameter.grad is not None
            # Checkpoints may bring it in parts.
            found[name] = found[name] + _projection(parameter.grad)
            parameter.grad = None

        with ExitStack() as stack:
            stack.enter_context(grads_of(self.model, self.weights))
            for name, weight in self.weights.items():
                handle = weight.register_post_accumulate_grad_hook(partial(take, name))
                stack.enter_context(removed(handle))
            loss = self.loss_fn(self.model, batch)
            if not all_labels_ignored(batch, loss):
                check_loss(loss, where)
                backward(loss, self.weights.values())
        return found


def _projection(gradient: Tensor) -> Tensor:
    """Sixteen numbers that tell one matrix from another."""
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.randn((4, size), generator=generator, device="cpu", dtype=torch.float32).to(
            gradient.device
        )
        for size in gradient.shape
    )
    return (left @ gradient.float() @ right.T).flatten().double().cpu()
