"""Second-order pruning of Transformers (Optimal BERT Surgeon) on hand-written kernels.

:func:`prune` does the common case; its parts can be used one by one, in the order of the
data: :func:`batch_gradients` or :class:`GroupGradients`, :class:`GramFisher` (or
:class:`LiveFisher`, :class:`WoodburyFisher`), :func:`select_masks`.  :func:`run_grid` tries many
settings; ``register_...`` adds other Fishers, saliencies and patterns.
"""

from importlib.metadata import version as _version

from .deploy.checkpoints import load_masks, save_pruned
from .fisher.base import Fisher
from .fisher.config import FisherConfig
from .fisher.estimate import FisherEstimate
from .fisher.estimators import register_fisher
from .fisher.gram import GramFisher
from .fisher.living import LiveFisher
from .fisher.sparseml import EmpiricalBlockFisherInverse
from .fisher.woodbury import WoodburyFisher
from .gradients.embeddings import embedding_loss
from .gradients.losses import model_loss, prediction_loss
from .gradients.per_batch import batch_gradients
from .gradients.per_samples import GroupGradients
from .ops.status import NotFiniteError, NumericalError
from .plugins import load_plugin
from .pruning.config import PruningConfig
from .pruning.oneshot import PruneResult, estimate_fisher, prune
from .pruning.pruner import Pruner
from .pruning.report import LayerReport, PruneReport
from .pruning.saliencies import Problem, ScoringInputs, register_saliency
from .reconstruction.config import ReconstructionConfig
from .sparsity.layers import find_weights
from .sparsity.masks import magnitude_scores, select_masks
from .sparsity.patterns import Pattern, register_pattern
from .training.masks import pruned_weights_kept
from .trials.grid import run_grid
from .trials.outcome import Outcome, Scores, make_grid

__version__ = _version("obert-kernels")

__all__ = [
    "EmpiricalBlockFisherInverse",
    "Fisher",
    "FisherConfig",
    "FisherEstimate",
    "GramFisher",
    "GroupGradients",
    "LayerReport",
    "LiveFisher",
    "NotFiniteError",
    "NumericalError",
    "Outcome",
    "Pattern",
    "Problem",
    "PruneReport",
    "PruneResult",
    "Pruner",
    "PruningConfig",
    "ReconstructionConfig",
    "Scores",
    "ScoringInputs",
    "WoodburyFisher",
    "batch_gradients",
    "embedding_loss",
    "estimate_fisher",
    "find_weights",
    "load_masks",
    "load_plugin",
    "magnitude_scores",
    "make_grid",
    "model_loss",
    "prediction_loss",
    "prune",
    "pruned_weights_kept",
    "register_fisher",
    "register_pattern",
    "register_saliency",
    "run_grid",
    "save_pruned",
    "select_masks",
]
