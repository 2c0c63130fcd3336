"""A pruned model on disk appears whole or not at all, and replaces nothing foreign."""

from __future__ import annotations

from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")

from tiny_text import save_model

import obert_kernels
from obert_kernels import prune
from obert_kernels.files import check_replaceable


def test_interrupted_save_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        save_model(tmp_path / "model", head=True)
    )
    result = prune(model, sparsity=0.5, selection="magnitude")
    folder = obert_kernels.save_pruned(result, None, tmp_path / "saved" / "half")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    class BrokenTokenizer:
        def save_pretrained(self, folder: Path) -> None:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        obert_kernels.save_pruned(result, BrokenTokenizer(), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(OSError, match="disk full"):
        obert_kernels.save_pruned(result, BrokenTokenizer(), tmp_path / "saved" / "other")
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["half"]


def test_other_folders_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("x")
    save_model(tmp_path / "model", head=True)
    for name in ("thesis", "model"):
        with pytest.raises(FileExistsError, match="was not written by obert_kernels"):
            check_replaceable(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="holds no masks"):
        obert_kernels.load_masks(tmp_path)
