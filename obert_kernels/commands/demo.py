"""``obert-prune demo``: a run with settings of its own on data out of Python packages.

MiniLM-L6 (6 layers of 384, 10.6 M weights to prune) on TREC questions (6 classes) or film
reviews (2 classes), see :mod:`obert_kernels.tasks.downloads`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..tasks.demo_sets import DEMO_PREFIX, DEMO_SETS
from ..tasks.model_files import DEMO_MODEL
from .config import RunConfig

# For 2 CPU cores and five minutes.
_DEMO_SETTINGS: dict[str, Any] = {
    "sparsity": (0.5, 0.6, 0.7, 0.8, 0.9),
    "finetune_epochs": 2.0,
    "learning_rate": 2e-4,
    "max_length": 64,
}


def demo_settings(dataset: str, output: Path, seed: int = 0) -> RunConfig:
    """Return the settings of the demo on ``"trec"`` or ``"mr"``.

    Raises:
        ValueError: another data set.
    """
    if dataset not in DEMO_SETS:
        raise ValueError(f"there is no demo set {dataset!r}: choose {' or '.join(DEMO_SETS)}")
    data = DEMO_PREFIX + dataset
    return RunConfig(model=DEMO_MODEL, data=data, output=output, seed=seed, **_DEMO_SETTINGS)
