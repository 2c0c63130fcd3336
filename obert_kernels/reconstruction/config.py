"""How the remaining weights are fitted to the dense model, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..fisher.config import VERSION, at_least_one, one_of, positive_or_auto, read_values

INPUTS = ("pruned", "dense")


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """How the remaining weights of each layer are fitted to what the dense model computes.

    Attributes:
        num_samples: of the batches that gradients are taken of, this many samples at most.
        ridge: keeps the weights near those that pruning left, over the mean square of an input;
            "auto": for each layer what fits held-back batches best.
        inputs: of a layer: "pruned", those it has in the pruned model, whose errors it then makes
            up for; "dense", those it has in the dense model.
        residual: where a layer's output is added to a residual stream, fit the sum.

    Raises:
        ValueError: a value is out of range.
        TypeError: a value is of the wrong type.
    """

    num_samples: int = 512
    ridge: float | str = "auto"
    inputs: str = "pruned"
    residual: bool = True

    def __post_init__(self) -> None:
        at_least_one("num_samples", self.num_samples)
        one_of("inputs", self.inputs, INPUTS)
        if not isinstance(self.residual, bool):
            raise TypeError(f"residual must be True or False, got {self.residual!r}")
        positive_or_auto("ridge", self.ridge)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with type and version."""
        return {"type": "ReconstructionConfig", "version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ReconstructionConfig:
        """Undo :meth:`to_dict`; see :func:`obert_kernels.fisher.config.read_values`."""
        return cls(**read_values(cls, content))
