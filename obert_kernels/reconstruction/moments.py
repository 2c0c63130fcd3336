"""Means and second moments of a layer's inputs and targets, all that least squares needs."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

# Columns from which on the halves of a symmetric product are worth two calls more.
_LARGEST_WHOLE = 512


class Normal(NamedTuple):
    """The normal equations of a layer; all float64.

    Attributes:
        inputs: second moments ``[n, n]``: centred where the layer has a bias.
        targets: of targets with inputs, ``[m, n]``, likewise.
        input_mean, target_mean: ``[n]``, ``[m]``; zero without a bias.
        target_square: ``[m]``, mean square of the targets, likewise centred.
    """

    inputs: Tensor
    targets: Tensor
    input_mean: Tensor
    target_mean: Tensor
    target_square: Tensor

    def part(self, rows: Tensor) -> Normal:
        """Return the equations of some rows of the matrix."""
        return self._replace(
            targets=self.targets[rows],
            target_mean=self.target_mean[rows],
            target_square=self.target_square[rows],
        )

    def bias(self, weight: Tensor) -> Tensor:
        """Return the best bias ``[m]`` for a matrix ``[m, n]``."""
        return self.target_mean - weight @ self.input_mean

    def errors(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the mean square of ``target - W x - b``, ``[m]``."""
        offset = self.bias(weight) - (0 if bias is None else bias)
        crossed = (weight * (weight @ self.inputs - 2 * self.targets)).sum(dim=1)
        return self.target_square + crossed + offset.square()


class Moments:
    """Adds up those of layers with the same inputs.

    The first rows give a point near the mean that all are counted from, so that float32 products
    lose nothing to it; sums are float64.
    """

    def __init__(self) -> None:
        self.count = 0

    def add(self, inputs: Tensor, targets: list[Tensor]) -> None:
        """Add rows.

        Args:
            inputs: ``[rows, n]``, float32 or float64.
            targets: ``[rows, m]`` of each layer.
        """
        if not len(inputs):
            return
        if not self.count:
            self._origin = inputs.mean(dim=0)
            self._origins = [target.mean(dim=0) for target in targets]
            self._products: list[Tensor] = []
        x = inputs - self._origin
        ts = [t - origin for t, origin in zip(targets, self._origins, strict=True)]
        with torch.autocast(x.device.type, enabled=False):
            new = [_gram(x), x.sum(dim=0)]
            for t in ts:
                new += [t.mT @ x, t.sum(dim=0), t.square().sum(dim=0)]
        if not self.count:
            self._products = [product.double() for product in new]
        else:
            for total, product in zip(self._products, new, strict=True):
                total += product
        self.count += len(x)

    def normal(self, index: int, centred: bool) -> Normal:
        """Return the equations of a layer, by its place among the targets."""
        inputs, first, mean = self._of_inputs
        crossed, target, square = (
            product / self.count for product in self._products[3 * index + 2 : 3 * index + 5]
        )
        target_mean = self._origins[index] + target
        targets = crossed.addr_(target, first, alpha=-1)
        square -= target.square()
        if centred:
            return Normal(inputs, targets, mean, target_mean, square)
        return Normal(
            inputs.addr(mean, mean),
            targets.addr_(target_mean, mean),
            torch.zeros_like(mean),
            torch.zeros_like(target_mean),
            square + target_mean.square(),
        )

    @cached_property
    def _of_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Centred second moments, and the means from the origin and whole, of all rows."""
        second, first = (product / self.count for product in self._products[:2])
        return second.addr_(first, first, alpha=-1), first, self._origin + first


def _gram(x: Tensor) -> Tensor:
    """``x^T x``; of large ones no more than the lower half is computed, in blocks."""
    n = x.shape[1]
    if n <= _LARGEST_WHOLE:
        return x.mT @ x
    half = n // 2
    first, second = x[:, :half], x[:, half:]
    product = x.new_empty(n, n)
    product[:half, :half] = _gram(first)
    product[half:, half:] = _gram(second)
    torch.matmul(second.mT, first, out=product[half:, :half])
    product[:half, half:] = product[half:, :half].mT
    return product
