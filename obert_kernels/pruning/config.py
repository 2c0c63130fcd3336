"""How a model is pruned, as plain values: what a recipe, a report or a sweep can hold.

Model, batches, loss function and memory are no part of it; nor is the sparsity, which every step is
given anew.  All values are checked here: those that need no model when a configuration is made,
those that do by :meth:`PruningConfig.check`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import nn

from ..fisher.config import (
    VERSION,
    FisherConfig,
    at_least_one,
    one_of,
    positive_or_auto,
    read_values,
)
from ..reconstruction.config import ReconstructionConfig
from ..sparsity.layers import find_weights
from ..sparsity.matrices import find_matrices
from ..sparsity.patterns import UNSTRUCTURED, Pattern, find_pattern
from ..sparsity.schedules import SCHEDULES
from .saliencies import default_update, saliencies, uses_fisher

SCOPES = ("global", "layer")
UPDATES = ("sum", "joint", "none")


@dataclass(frozen=True, kw_only=True)
class PruningConfig:
    """How a model is pruned, at whatever sparsity.

    Attributes:
        pattern: which weights go together: "unstructured"; "block4" (any "block<c>"), c consecutive
            weights along the input dimension; "block4x1", along the output dimension; "2:4" (any
            N:M up to 16), at most N of every M weights along the input dimension stay; or what
            :func:`obert_kernels.register_pattern` was given.
        selection: how weights are ranked: "greedy", "diagonal" (oBERT's), "magnitude", or what
            :func:`obert_kernels.register_saliency` was given.
        update: how remaining weights make up for the pruned: "joint" (exact inside each block),
            "sum" (oBERT's), "none"; None or "auto": "sum" for the diagonal selection, "none" for
            those that use no Fisher, else "joint".  It is never None once a configuration is made.
        scope: "global" for one ranking over all matrices, "layer" for one in each.
        damping: added to the diagonal of the Fisher; "auto": chosen by trial prunings.
        params: names or ``re:`` patterns of the matrices; None: linear layers of the encoder.
        steps: sub-steps R of a step, each with a Fisher of its own.
        schedule: "geometric" takes the same share of what is left in each sub-step, "linear" the
            same number of weights.
        fisher: how the Fisher is estimated.  Its block size is never None in here.
        reconstruction: how the remaining weights are then fitted to what the model computed before
            the step; "auto": with the defaults, where there are batches; None: not at all.

    Raises:
        ValueError: a value is out of range, or two do not go together.
        TypeError: a value is of the wrong type.
    """

    pattern: str = "unstructured"
    selection: str = "greedy"
    update: str | None = None
    scope: str = "global"
    damping: float | str = "auto"
    params: tuple[str, ...] | None = None
    steps: int = 1
    schedule: str = "geometric"
    fisher: FisherConfig = field(default_factory=FisherConfig)
    reconstruction: ReconstructionConfig | str | None = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.fisher, FisherConfig):
            raise TypeError(f"fisher must be a FisherConfig, got {self.fisher!r}")
        if not (
            self.reconstruction in ("auto", None)
            or isinstance(self.reconstruction, ReconstructionConfig)
        ):
            raise TypeError(
                "reconstruction must be 'auto', None or a ReconstructionConfig, got "
                f"{self.reconstruction!r}"
            )
        params = _names(self.params)
        saliencies.find(self.selection)
        shape = self.shape
        update = self.update
        if update in (None, "auto"):
            update = default_update(self.selection)
        one_of("update", update, UPDATES)
        one_of("scope", self.scope, SCOPES)
        at_least_one("steps", self.steps)
        one_of("schedule", self.schedule, SCHEDULES)
        shape.check_steps(self.steps)
        block_size = shape.block_size(self.fisher.block_size)
        self._settle(
            update=update,
            damping=positive_or_auto("damping", self.damping),
            params=params,
            steps=int(self.steps),
            fisher=replace(self.fisher, block_size=block_size),
        )

    def _settle(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def shape(self) -> Pattern:
        """The pattern itself."""
        return find_pattern(self.pattern)

    @property
    def uses_fisher(self) -> bool:
        """Do selection or update need a Fisher?"""
        return uses_fisher(self.selection, self.update or "none")

    @property
    def fit(self) -> ReconstructionConfig | None:
        """How the remaining weights are fitted, where there are batches; None: not at all."""
        wanted = self.reconstruction
        return ReconstructionConfig() if isinstance(wanted, str) else wanted

    def check(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the matrices to prune by name.

        Raises:
            ValueError: as for :func:`obert_kernels.find_weights`, or the pattern does not
                divide a matrix or would run along its outputs.
            TypeError: a matrix is not of a floating type.
        """
        weights = find_weights(model, self.params)
        is_plain = self.shape == UNSTRUCTURED
        turned = set() if is_plain else find_matrices(model).transposed & weights.keys()
        if turned:
            raise ValueError(
                f"pattern {self.pattern}: {min(turned)} is [inputs, outputs], a Conv1D of "
                "transformers, along whose rows a pattern would join outputs; put nn.Linear layers "
                "in their place, leave them out with params, or take pattern='unstructured'"
            )
        for name, weight in weights.items():
            self.shape.check(name, weight)
        return weights

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with type and version."""
        values = {known.name: getattr(self, known.name) for known in fields(self)}
        values["params"] = None if self.params is None else list(self.params)
        values["fisher"] = self.fisher.to_dict()
        if isinstance(self.reconstruction, ReconstructionConfig):
            values["reconstruction"] = self.reconstruction.to_dict()
        return {"type": "PruningConfig", "version": VERSION, **values}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> PruningConfig:
        """Undo :meth:`to_dict`; see :func:`obert_kernels.fisher.config.read_values`."""
        values = read_values(cls, content)
        if isinstance(values.get("fisher"), Mapping):
            values["fisher"] = FisherConfig.from_dict(values["fisher"])
        if isinstance(values.get("reconstruction"), Mapping):
            values["reconstruction"] = ReconstructionConfig.from_dict(values["reconstruction"])
        return cls(**values)


def _names(params: object) -> tuple[str, ...] | None:
    if params is None:
        return None
    names = (
        tuple(params) if isinstance(params, Iterable) and not isinstance(params, str) else (params,)
    )
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"params must be names or re: patterns, got {params!r}")
    return names
