"""A pruned model on disk appears whole or not at all, and replaces nothing foreign."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tiny_text import save_model

import obert_kernels
from obert_kernels import prune
from obert_kernels.files import check_replaceable


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where models go that cannot be saved."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


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


@pytest.fixture
def result(tmp_path: Path) -> Any:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        save_model(tmp_path / "model", head=True)
    )
    return prune(model, sparsity=0.5, selection="magnitude")


def place_in(error: BaseException) -> Path:
    return Path(re.search(r" in (\S*obert-saved-\S+?)[ :]", f"{error} ")[1])


@pytest.mark.parametrize("obstacle", ["a file above", "a folder of a user", "a link to nothing"])
def test_a_model_that_cannot_be_saved_is_saved_elsewhere(
    tmp_path: Path, result: Any, obstacle: str
) -> None:
    folder = tmp_path / "out" / "half"
    if obstacle == "a file above":
        folder.parent.write_text("mine")
    elif obstacle == "a folder of a user":
        folder.mkdir(parents=True)
        (folder / "thesis.tex").write_text("mine")
    else:
        folder.parent.mkdir()
        folder.symlink_to(tmp_path / "missing")
    kind = FileExistsError if "file" not in obstacle else OSError
    with pytest.raises(kind, match=r"half could not be saved.*checkpoint is whole") as error:
        obert_kernels.save_pruned(result, None, folder, {"note": "hours of work"})
    place = place_in(error.value)
    saved = transformers.AutoModelForSequenceClassification.from_pretrained(place)
    for name, weight in result.model.state_dict().items():
        assert torch.equal(saved.state_dict()[name], weight)
    assert obert_kernels.load_masks(place).keys() == result.masks.keys()
    assert not (tmp_path / "missing").exists()


def test_of_a_model_that_cannot_be_written_at_all_the_weights_are_saved(
    tmp_path: Path, result: Any
) -> None:
    result.model.save_pretrained = None  # as where its configuration cannot be written
    with pytest.raises(OSError, match="the weights alone are in") as error:
        obert_kernels.save_pruned(result, None, tmp_path / "half")
    weights = torch.load(place_in(error.value), weights_only=True)
    assert weights.keys() == result.model.state_dict().keys()
    assert not (tmp_path / "half").exists()


def test_interrupts_are_not_held_up_by_another_save(
    tmp_path: Path, result: Any, temporary: Path
) -> None:
    def interrupted(folder: Path) -> None:
        raise KeyboardInterrupt

    result.model.save_pretrained = interrupted
    with pytest.raises(KeyboardInterrupt):
        obert_kernels.save_pruned(result, None, tmp_path / "half")
    assert list(temporary.iterdir()) == []


def test_other_folders_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("x")
    save_model(tmp_path / "model", head=True)
    for name in ("thesis", "model"):
        with pytest.raises(FileExistsError, match="was not written by obert_kernels"):
            check_replaceable(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="holds no masks"):
        obert_kernels.load_masks(tmp_path)
