"""Which weight matrices are pruned: names, ``re:`` patterns, or the encoder's linear layers."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from .matrices import Matrices, find_matrices
from .values import check_values
from .wrappers import check_no_adapters, unwrapped

# A linear layer inside a numbered layer of the encoder stack: encoder.layer.3.…,
# transformer.layer.3.…, encoder.layers.3.…; embeddings, pooler and head lie outside.
_ENCODER_LAYER = re.compile(r"(^|\.)layers?\.\d+\.")


def match_names(names: Iterable[str], patterns: Iterable[str], option: str = "params") -> list[str]:
    """Return the parameter names that the patterns select, in the order of ``names``.

    Args:
        names: parameter names such as ``bert.encoder.layer.0.output.dense.weight``.
        patterns: each a parameter name, a module name (its ``weight`` is meant), or
            ``re:<expression>`` matched from the start of the parameter name.
        option: where the patterns were given, for errors.

    Raises:
        TypeError: a pattern is no string.
        ValueError: a pattern matches nothing or is not a valid expression.
    """
    names = list(names)
    chosen: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{option}: names and re: patterns are strings, got {pattern!r}")
        if pattern.startswith("re:"):
            try:
                expression = re.compile(pattern[3:])
            except re.error as error:
                raise ValueError(
                    f"{option}: {pattern!r} is not a valid expression: {error}"
                ) from None
            found = {name for name in names if expression.match(name)}
        else:
            found = {name for name in names if name in (pattern, f"{pattern}.weight")}
        if not found:
            raise ValueError(
                f"{option}: {pattern!r} matches no prunable weight matrix of the model; "
                f"there are {_sample(names)}"
            )
        chosen |= found
    return [name for name in names if name in chosen]


def _sample(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{len(names)}, for example {shown}" if names else "none"


def find_weights(
    model: nn.Module, params: str | Iterable[str] | None = None
) -> dict[str, nn.Parameter]:
    """Return the weight matrices to prune by name, in the order of the model.

    Names are those of the model inside wrappers (``DataParallel``, ``DistributedDataParallel``,
    ``torch.compile``).

    Args:
        model: any module.
        params: names or ``re:`` patterns, see :func:`match_names`.  None: the linear layers of
            the encoder of a BERT-like model (BERT, RoBERTa, DistilBERT, ELECTRA, MPNet, …),
            without embeddings, pooler and head.

    Raises:
        ValueError: nothing matches, a matrix holds NaN or infinity, is no parameter of its own
            (quantised, or held by ``torch.nn.utils.prune`` or a parametrization), the model has
            adapters of PEFT, or it shares its layers' weights (ALBERT) and ``params`` does not
            say what to do.
        TypeError: the model is none; as for :func:`obert_kernels.sparsity.values.check_values`.
    """
    check_no_adapters(unwrapped(model))
    found = find_matrices(model)
    if params is not None:
        patterns = [params] if isinstance(params, str) else list(params)
        if not patterns:
            raise ValueError("params is empty: name matrices, or leave it out for the encoder's")
        chosen = match_names(found.names, patterns)
    else:
        chosen = _encoder_linear_names(model, found)
    weights = found.usable(chosen)
    check_values(weights)
    return weights


def _encoder_linear_names(model: nn.Module, found: Matrices) -> list[str]:
    if getattr(getattr(unwrapped(model), "config", None), "model_type", None) == "albert":
        raise ValueError(
            "ALBERT shares one set of weights between all its layers, so pruning by layer has no "
            'meaning; name the matrices yourself, for example params=["re:.*albert_layers"]'
        )
    names = [name for name in found.linear if _ENCODER_LAYER.search(name)]
    if not names:
        raise ValueError(
            "no encoder layers were found in this model; name the weight matrices with params, "
            f"for example params=['re:.*weight']; there are {_sample(list(found.weights))}"
        )
    return names
