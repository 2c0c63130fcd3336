"""Experiments as data: ``experiments/<name>.json``.

``runs`` lists what is measured, ``defaults`` what all of it has in common.  In an entry of ``runs``
a list is an axis, the first of them the outermost; a dictionary on an axis stands for its entries,
whatever the axis is called.  The result is a list of flat points:

    model, data, seed      the model fine-tuned on the data, with this seed (of the texts, too)
    model_seed             another seed of fine-tuning
    texts, texts_per_grad  of an estimate; of each, where ``steps`` asks for several
    gradients_of           "predictions" (default) or "labels"
    by_length              whether texts of about the same length share a gradient; by default of
                           predictions only
    pattern, block_size, selection, update, damping, sparsity, steps, schedule, estimator,
    fisher_dtype
                           as for :func:`obert_kernels.prune`; a selection can be "wanda" or
                           "sparsegpt", too, and where each point is a process "reference"
    reconstruction         how the remaining weights are then fitted: "none" (default), "auto", or a
                           dictionary for :class:`obert_kernels.ReconstructionConfig`, which on an
                           axis stands in one of its own: [{"reconstruction": {"ridge": 0.1}}, ...].
                           SparseGPT and the reference are measured without

A row of a point with a fit has ``reconstruction_seconds``, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from obert_kernels import ReconstructionConfig

FOLDER = Path(__file__).parent / "experiments"
Point = dict[str, Any]


def reconstruction(point: Mapping[str, Any]) -> ReconstructionConfig | str | None:
    """How the remaining weights of a point are fitted, as :func:`obert_kernels.prune` takes it.

    Raises:
        SystemExit: it is none of what an experiment may say.
    """
    wanted = point.get("reconstruction", "none")
    if wanted == "none":
        return None
    if point["selection"] in ("sparsegpt", "reference"):
        raise SystemExit(f"{point['selection']} is measured without a reconstruction")
    if isinstance(wanted, Mapping):
        return ReconstructionConfig(**wanted)
    if wanted == "auto":
        return "auto"
    raise SystemExit(f'reconstruction is "none", "auto" or a dictionary, got {wanted!r}')


def load(name: str) -> dict[str, Any]:
    """Read an experiment by its name, or from a file.

    Raises:
        SystemExit: there is none.
    """
    path = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.json")))
        raise SystemExit(f"no experiment {name}: give a file, or one of {known}")
    return {"name": path.stem, **json.loads(path.read_text(encoding="utf-8"))}


def expand(entry: Mapping[str, Any]) -> Iterator[Point]:
    """All points of an entry of ``runs``."""
    axis = next((name for name, value in entry.items() if isinstance(value, list)), None)
    if axis is None:
        yield dict(entry)
        return
    rest = {name: value for name, value in entry.items() if name != axis}
    for value in entry[axis]:
        more = value if isinstance(value, dict) else {axis: value}
        yield from expand({**rest, **more})


def points(experiment: Mapping[str, Any]) -> list[Point]:
    """What is measured, without the defaults."""
    return [point for entry in experiment["runs"] for point in expand(entry)]


def key(axes: Iterable[str], row: Mapping[str, Any]) -> str:
    """The same for a point and for the outcome measured there."""
    return json.dumps([row.get(name) for name in sorted(axes)])
