"""Second-order pruning of Transformers (Optimal BERT Surgeon) on hand-written kernels.

:func:`prune` does the common case; its parts can be used one by one, in the order of the
data: :func:`batch_gradients` or :class:`GroupGradients`, :class:`GramFisher` (or
:class:`LiveFisher`, :class:`WoodburyFisher`), :func:`select_masks`.  :func:`run_grid` tries many
settings; ``register_...`` adds other Fishers, saliencies and patterns.
"""

from importlib.metadata import version as _version

from .compat import EmpiricalBlockFisherInverse
from .estimate import FisherEstimate, estimate_fisher
from .estimators import register_fisher
from .fisher import Fisher, GramFisher, WoodburyFisher
from .gradients import batch_gradients
from .grid import run_grid
from .group_gradients import GroupGradients
from .layers import find_weights
from .live import LiveFisher
from .losses import model_loss, prediction_loss
from .masks import magnitude_scores, select_masks
from .ops import NumericalError
from .patterns import Pattern, register_pattern
from .pruner import PruneResult, prune
from .registry import load_plugin
from .report import LayerReport, PruneReport
from .saliencies import Problem, register_saliency
from .trials import make_grid

__version__ = _version("obert-kernels")

__all__ = [
    "EmpiricalBlockFisherInverse",
    "Fisher",
    "FisherEstimate",
    "GramFisher",
    "GroupGradients",
    "LayerReport",
    "LiveFisher",
    "NumericalError",
    "Pattern",
    "Problem",
    "PruneReport",
    "PruneResult",
    "WoodburyFisher",
    "batch_gradients",
    "estimate_fisher",
    "find_weights",
    "load_plugin",
    "magnitude_scores",
    "make_grid",
    "model_loss",
    "prediction_loss",
    "prune",
    "register_fisher",
    "register_pattern",
    "register_saliency",
    "run_grid",
    "select_masks",
]
