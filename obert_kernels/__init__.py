"""Second-order pruning of Transformers (Optimal BERT Surgeon) on hand-written kernels.

:func:`prune` does the common case; its parts can be used one by one, in the order of the
data: :func:`batch_gradients`, :class:`GramFisher` (or :class:`WoodburyFisher`),
:func:`select_masks`.
"""

from importlib.metadata import version as _version

from .compat import EmpiricalBlockFisherInverse
from .estimate import FisherEstimate, estimate_fisher
from .fisher import GramFisher, WoodburyFisher
from .gradients import batch_gradients
from .layers import find_weights
from .masks import magnitude_scores, select_masks
from .ops import NumericalError
from .pruner import PruneResult, prune
from .report import LayerReport, PruneReport

__version__ = _version("obert-kernels")

__all__ = [
    "EmpiricalBlockFisherInverse",
    "FisherEstimate",
    "GramFisher",
    "LayerReport",
    "NumericalError",
    "PruneReport",
    "PruneResult",
    "WoodburyFisher",
    "batch_gradients",
    "estimate_fisher",
    "find_weights",
    "magnitude_scores",
    "prune",
    "select_masks",
]
