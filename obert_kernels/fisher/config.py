"""How a Fisher is estimated, as plain values; and what all configurations share."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from typing import Any

import torch

from ..ops.checks import check_block_size, check_positive, require
from .estimators import estimators

VERSION = 1

GRADIENTS_OF = ("predictions", "labels")
_DTYPES = {"float64": torch.float64, "float32": torch.float32}


def at_least_one(name: str, value: object) -> None:
    """Raise TypeError or ValueError unless it is a whole number above zero."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def one_of(name: str, value: object, allowed: Collection[str]) -> None:
    """Raise ValueError unless it is one of the words allowed."""
    if value not in allowed:
        *others, last = (repr(choice) for choice in allowed)
        raise ValueError(f"{name} must be {', '.join(others)} or {last}, got {value!r}")


def positive_or_auto(name: str, value: object) -> float | str:
    """Return a number above zero as a float, or "auto"; raise TypeError or ValueError unless it is
    one of the two."""
    if value == "auto":
        return "auto"
    if isinstance(value, str):
        raise ValueError(f"{name} must be a positive number or 'auto', got {value!r}")
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a positive number or 'auto', got {value!r}")
    check_positive(name, float(value))
    require(math.isfinite(value), f"{name} must be finite, got {value}")
    return float(value)


def read_values(kind: type, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a configuration that :func:`written` gave.

    Names that a later version has added are left out with a warning.

    Raises:
        ValueError: it is of something else, or has names that there never were.
    """
    if content.get("type") != kind.__name__:
        raise ValueError(f"this is no {kind.__name__} but {content.get('type')!r}")
    version = content.get("version")
    if not isinstance(version, int):
        raise ValueError(f"version of a {kind.__name__} must be a whole number, got {version!r}")
    values = {name: value for name, value in content.items() if name not in ("type", "version")}
    unknown = sorted(values.keys() - {known.name for known in fields(kind)})
    if unknown and version <= VERSION:
        raise ValueError(f"a {kind.__name__} has no {', '.join(unknown)}")
    if unknown:
        warnings.warn(
            f"this {kind.__name__} was written by a later version of obert_kernels; left out: "
            f"{', '.join(unknown)}",
            stacklevel=3,
        )
    return {name: value for name, value in values.items() if name not in unknown}


@dataclass(frozen=True, kw_only=True)
class FisherConfig:
    """How the Fisher is estimated.

    Attributes:
        num_grads: m, number of gradients.
        samples_per_grad: g, samples of each; None: each batch gives one gradient.
        block_size: B, weights per block, 1 to 256; None: 50, or the multiple of M below for N:M
            patterns.
        estimator: "gram", or what :func:`obert_kernels.register_fisher` was given.
        dtype: type of the sums over gradients, "float64" or "float32".
        gradients_of: "predictions" of models that give each sample one of several classes (the
            model's own loss for others), or "labels": always the model's own loss.

    Raises:
        ValueError: a value is out of range.
        TypeError: a value is of the wrong type.
    """

    num_grads: int = 1024
    samples_per_grad: int | None = None
    block_size: int | None = None
    estimator: str = "gram"
    dtype: str = "float64"
    gradients_of: str = "predictions"

    def __post_init__(self) -> None:
        at_least_one("num_grads", self.num_grads)
        if self.samples_per_grad is not None:
            at_least_one("samples_per_grad", self.samples_per_grad)
        if self.dtype not in _DTYPES:
            raise TypeError(f"dtype must be 'float64' or 'float32', got {self.dtype!r}")
        one_of("gradients_of", self.gradients_of, GRADIENTS_OF)
        estimators.find(self.estimator)
        if self.block_size is not None:
            check_block_size(self.block_size)
        for name in ("num_grads", "samples_per_grad", "block_size"):  # not numpy's, for JSON
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, int(value))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type as torch has it."""
        return _DTYPES[self.dtype]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with type and version."""
        return {"type": "FisherConfig", "version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> FisherConfig:
        """Undo :meth:`to_dict`; see :func:`read_values`."""
        return cls(**read_values(cls, content))
