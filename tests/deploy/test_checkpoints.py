"""A pruned model on disk appears whole or not at all, and replaces nothing foreign."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from tiny_text import save_model

import obert_kernels
from obert_kernels import prune
from obert_kernels.files import check_replaceable

pytestmark = pytest.mark.usefixtures("temporary")


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


def bert(folder: Path) -> nn.Module:
    return transformers.AutoModelForSequenceClassification.from_pretrained(
        save_model(folder / "model", head=True)
    )


def compiled_inside(model: nn.Module) -> nn.Module:
    model.bert.encoder.layer[0] = torch.compile(model.bert.encoder.layer[0], backend="eager")
    return model


@pytest.mark.parametrize(
    "wrap",
    [lambda model: torch.compile(model, backend="eager"), nn.DataParallel, compiled_inside],
    ids=["compiled", "parallel", "compiled inside"],
)
def test_of_a_wrapped_model_the_one_inside_is_saved(wrap, tmp_path: Path) -> None:
    expected = prune(bert(tmp_path), sparsity=0.5, selection="magnitude")
    result = prune(wrap(bert(tmp_path)), sparsity=0.5, selection="magnitude")
    folder = obert_kernels.save_pruned(result, None, tmp_path / "saved")
    again, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values())
    for name, value in expected.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    masks = obert_kernels.load_masks(folder)
    assert masks.keys() == expected.masks.keys()
    assert all(torch.equal(again.get_parameter(n) != 0, mask) for n, mask in masks.items())


def test_a_model_that_is_not_what_its_masks_say_is_not_saved(tmp_path: Path) -> None:
    result = prune(bert(tmp_path), sparsity=0.5, selection="magnitude")
    name = "bert.encoder.layer.1.output.dense.weight"
    weight = result.model.get_parameter(name)
    with torch.no_grad():
        weight[:2] = 1.0
    back = int((~result.masks[name][:2]).sum())
    with pytest.raises(ValueError, match=f"^{name} has {back} pruned weights .* not zero any more"):
        obert_kernels.save_pruned(result, None, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with obert_kernels.pruned_weights_kept(*result[:2]):
        pass
    obert_kernels.save_pruned(result, None, tmp_path / "saved")
    with pytest.raises(ValueError, match="masks name parameters the model does not have: other"):
        obert_kernels.save_pruned(
            result._replace(masks={"other": weight != 0}), None, tmp_path / "x"
        )


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT itself
def test_models_that_would_not_be_saved_whole(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    result = prune(bert(tmp_path), sparsity=0.5, selection="magnitude")
    peft.get_peft_model(result.model, peft.LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(ValueError, match="adapters of PEFT"):
        obert_kernels.save_pruned(result, None, tmp_path / "saved")
    with pytest.raises(TypeError, match="save_pruned needs a model with save_pretrained, got a L"):
        obert_kernels.save_pruned((nn.Linear(2, 2), {}, result.report), None, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_damaged_masks_are_named(tmp_path: Path) -> None:
    (tmp_path / "masks.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=r"masks\.safetensors is damaged"):
        obert_kernels.load_masks(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda given: {"result": given["result"].model}, r"prune returned, .* got a BertFor"),
        (lambda given: {"result": given["result"][:2]}, r"\(model, masks, report\) of it"),
        (lambda given: {"tokenizer": "bert-base-uncased"}, r"got a str: load it with AutoTok"),
        (lambda given: {"folder": None}, "folder must be the path .* got None"),
        (lambda given: {"folder": ""}, "folder must be the path .* got ''"),
        (lambda given: {"extra": [0.9]}, "extra must be a mapping, got a list"),
        (lambda given: {"extra": {"best": torch.ones(1)}}, "extra: 'best' cannot be written as"),
    ],
)
def test_wrong_arguments_are_found_before_anything_is_written(
    change: Any, message: str, result: Any, tmp_path: Path, temporary: Path
) -> None:
    given = {"result": result, "tokenizer": None, "folder": tmp_path / "saved"}
    with pytest.raises(TypeError, match=message):
        obert_kernels.save_pruned(**{**given, **change(given)})
    assert not (tmp_path / "saved").exists() and not list(temporary.iterdir())
