"""The weight matrices of a model: those that can be pruned, and why others cannot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .wrappers import joined, listed, named_modules

# Query, key and value projections of nn.MultiheadAttention, [outputs, inputs].
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass
class Matrices:
    """What :func:`find_matrices` returns.

    Attributes:
        weights: name to matrix; one that several layers share has the first of its names.
        linear: names of the weights of linear layers, whether they can be pruned or not.
        obstacles: name to the reason why a matrix cannot be pruned as it is, and the remedy.
        shared: further names of matrices, to the first.
        transposed: names of matrices ``[inputs, outputs]``, those of ``Conv1D`` of transformers.
    """

    weights: dict[str, nn.Parameter] = field(default_factory=dict)
    linear: list[str] = field(default_factory=list)
    obstacles: dict[str, str] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    transposed: set[str] = field(default_factory=set)

    @property
    def names(self) -> list[str]:
        """All names that can be asked for."""
        return list(dict.fromkeys([*self.weights, *self.shared, *self.obstacles]))

    def usable(self, names: Iterable[str]) -> dict[str, nn.Parameter]:
        """Return the matrices of some names, in the order of the model.

        Raises:
            ValueError: one cannot be pruned as it is, or goes by another name.
        """
        chosen = set(names)
        for first in names:
            if (reason := self.obstacles.get(first)) is not None:
                alike = [name for name, why in self.obstacles.items() if why == reason]
                alike = [name for name in alike if name in chosen]
                raise ValueError(f"{listed(alike)} cannot be pruned: {reason}")
            if self.shared.get(first, first) not in chosen:
                raise ValueError(
                    f"{first} is the same matrix as {self.shared[first]}: give params that name"
                )
        return {name: weight for name, weight in self.weights.items() if name in chosen}


def find_matrices(model: nn.Module) -> Matrices:
    """Return all weight matrices of a model, by the names they have where nothing is wrapped."""
    found = Matrices()
    first: dict[int, str] = {}
    for prefix, module in named_modules(model):
        found.obstacles |= {
            joined(prefix, name): reason for name, reason in _held_by_others(module)
        }
        for name, parameter in module.named_parameters(recurse=False):
            if is_lazy(parameter) or parameter.dim() != 2:
                continue
            whole = joined(prefix, name)
            if (known := first.setdefault(id(parameter), whole)) != whole:
                found.shared[whole] = known
                continue
            found.weights[whole] = parameter
            if (reason := _obstacle(parameter)) is not None:
                found.obstacles.setdefault(whole, reason)
        names, reason = _of_linear_layer(module)
        found.linear += [joined(prefix, name) for name in names]
        if reason is not None:
            found.obstacles.setdefault(joined(prefix, "weight"), reason)
        if any(kind.__name__ == "Conv1D" for kind in type(module).__mro__):
            found.transposed.add(joined(prefix, "weight"))
    return found


def _held_by_others(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Matrices that are computed from other parameters at every call, and those parameters."""
    parametrized = getattr(module, "parametrizations", None)
    for name, held in parametrized.items() if isinstance(parametrized, nn.ModuleDict) else ():
        if all(parameter.dim() != 2 for parameter in held.parameters()):
            continue
        remedy = f"torch.nn.utils.parametrize.remove_parametrizations(layer, {name!r})"
        inner = (f"parametrizations.{name}.{own}" for own, _ in held.named_parameters())
        for own in (name, *inner):
            yield own, f"a parametrization computes it; call {remedy} first"
    own_names = {name for name, _ in module.named_parameters(recurse=False)}
    own_names |= {name for name, _ in module.named_buffers(recurse=False)}
    for suffixes, what, remedy in _OLD_WAYS:
        for name, parameter in module.named_parameters(recurse=False):
            base = name.removesuffix(suffixes[0])
            names = [base + suffix for suffix in suffixes]
            is_held = base not in own_names and hasattr(module, base) and own_names >= {*names}
            if is_held and parameter.dim() == 2:
                for own in (base, *names):
                    yield own, f"{what} computes it; call {remedy.format(base)} first"


_OLD_WAYS = (
    (("_orig", "_mask"), "torch.nn.utils.prune", "torch.nn.utils.prune.remove(layer, {!r})"),
    (("_orig", "_u"), "spectral_norm", "torch.nn.utils.remove_spectral_norm(layer, {!r})"),
    (("_v", "_g"), "weight_norm", "torch.nn.utils.remove_weight_norm(layer, {!r})"),
)


def _obstacle(parameter: nn.Parameter) -> str | None:
    if parameter.is_meta:
        return "it is on the meta device, without values; load the model onto a real device first"
    if is_traceable_wrapper_subclass(parameter):
        return (
            f"it is a {type(parameter).__name__}, quantised or spread over several devices; prune "
            "the model before that is done to it"
        )
    return None


def _of_linear_layer(module: nn.Module) -> tuple[list[str], str | None]:
    """Names of the matrices of a linear layer (else none), and why its weight cannot be pruned."""
    if isinstance(module, nn.MultiheadAttention):
        return [name for name in _PROJECTIONS if getattr(module, name, None) is not None], None
    kind = type(module).__name__
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    sizes = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if not isinstance(module, nn.Linear):
        # Not all are: those of I-BERT, and quantised ones of torch.ao, HQQ, AWQ and others.
        if "Linear" not in kind or None in sizes or (weight is not None and weight.shape != sizes):
            return [], None
        if weight is None:
            return ["weight"], f"{kind} holds it in a form of its own; prune before it is quantised"
    if weight is None:
        return ["weight"], f"its layer ({kind}) has no parameter of this name; make it one"
    if is_lazy(weight):
        return ["weight"], "it has no shape yet; run a batch through the model first"
    # Another number of rows or columns alone is what structured pruning leaves.
    if weight.dim() != 2 or weight.shape[1] == 1 != sizes[1]:
        return ["weight"], (
            f"its layer is of shape {list(sizes)}, but the parameter is {list(weight.shape)}: "
            "quantised, or spread over several devices; prune the model before that is done to it"
        )
    return ["weight"], None
