"""Folders that hold no whole model: said in one line that names the file, before any work."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

from obert_kernels.tasks.classification import ClassificationTask
from obert_kernels.tasks.model_files import find_model
from obert_kernels.tasks.readers import load_text_data

pytestmark = pytest.mark.usefixtures("one_thread")

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 104936\n"
WEIGHTS = "model.safetensors"


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: folder.joinpath(name).write_bytes(content)


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: write(name, (folder / name).read_bytes()[:size])(folder)


def rename(name: str, other: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / other).parent.mkdir(exist_ok=True)
        (folder / name).rename(folder / other)

    return change


def pipe(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def link_to_nothing(name: str) -> Callable[[Path], None]:
    """As in a snapshot of the hub's cache that was copied without what it links to."""

    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to("../../blobs/0123")

    return change


def settings(**more: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **more}))

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return changed


def sharded(folder: Path) -> None:
    """Names two files of weights, of which one is there."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    names = {name: f"model-0000{1 + (name[0] == 'c')}-of-00002.safetensors" for name in tensors}
    content = {"metadata": {"total_size": 1}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (write(WEIGHTS, POINTER), f"{WEIGHTS} is a pointer of Git LFS.*git lfs pull"),
        (cut(WEIGHTS, 5000), f"{WEIGHTS} is damaged or no safetensors file"),
        (write(WEIGHTS, b"PK" * 900), f"{WEIGHTS} is damaged or no safetensors file"),
        (write(WEIGHTS, b""), f"{WEIGHTS} is empty"),
        (lambda f: f.joinpath(WEIGHTS).unlink(), "model holds no weights that can be loaded"),
        (rename(WEIGHTS, "model.fp16.safetensors"), "fp16.safetensors has another name than"),
        (rename(WEIGHTS, "model.onnx"), "model.onnx is of ONNX"),
        (rename(WEIGHTS, "model-q4.gguf"), "model-q4.gguf is of GGUF"),
        (rename(WEIGHTS, "tf_model.h5"), "tf_model.h5 is of TensorFlow"),
        (sharded, "names 2 files of weights, but model-00002-of-00002.safetensors is missing"),
        (
            weights(lambda t: t.update({"classifier.weight": torch.zeros(2, 16).to(torch.int8)})),
            r"holds quantised weights \(classifier.weight: I8\)",
        ),
        (write("config.json", POINTER), "config.json is a pointer of Git LFS"),
        (write("config.json", b""), "config.json is empty"),
        (cut("config.json", 100), "config.json is damaged: "),
        (write("config.json", b"[1]"), "config.json is damaged: it holds no names and values"),
        (write("config.json", b"\xff\xfe{"), "config.json is damaged: "),
        (write("config.json", b"[" * 100_000), "config.json is damaged: "),
        (rename("config.json", "dense/config.json"), "no config.json; perhaps .*/dense is meant"),
        (rename("config.json", "x.json"), "no config.json: is it the folder of a model?"),
        (write("adapter_config.json", b"{}"), "holds an adapter .*merge_and_unload"),
        (cut("tokenizer_config.json", 9), "tokenizer_config.json is damaged: "),
        (write("tokenizer.json", POINTER), "tokenizer.json is a pointer of Git LFS"),
        (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "model holds no tokenizer"),
        (pipe("tokenizer.json"), "tokenizer.json is a named pipe"),
        (pipe("vocab.txt"), "vocab.txt is a named pipe"),
        (pipe(WEIGHTS), f"{WEIGHTS} is a named pipe"),
        (link_to_nothing("config.json"), "config.json is a link to nothing: copy the file"),
        (link_to_nothing("tokenizer.json"), "tokenizer.json is a link to nothing"),
        (link_to_nothing(WEIGHTS), f"{WEIGHTS} is a link to nothing"),
    ],
)
def test_damaged_folders(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises((ValueError, OSError)) as raised:
        find_model(str(folder))
    assert re.search(message, str(raised.value)) and "\n" not in str(raised.value)


def other_prefix(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[f"module.{name}"] = tensors.pop(name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (weights(other_prefix), "lack 37 of a BertForSequenceClassification .*they have module"),
        (weights(lambda t: t.pop("classifier.weight")), "no trained .* head .*classifier.weight"),
        (weights(lambda t: t.pop("bert.pooler.dense.weight")), "no trained .* head .*pooler"),
        (
            weights(lambda t: t.pop("bert.encoder.layer.1.output.dense.weight")),
            "lack 1 of a .*for example bert.encoder.layer.1.output.dense.weight",
        ),
        (settings(num_hidden_layers=1), "hold 16 that .* leaves out, for example .*layer.1"),
        (settings(num_hidden_layers=3), "lack 16 of a .*for example bert.encoder.layer.2"),
        (settings(intermediate_size=48), r"lack 6 of .*dense.bias \(\[32\] in the file, \[48\] by"),
        (
            settings(id2label={"0": "0", "1": "1", "2": "2"}),
            r"lack classifier.bias \(\[2\] in the file, \[3\] by",
        ),
        (settings(vocab_size=20), r"word_embeddings.weight \(\[15, 16\] in the file, \[20, 16\]"),
        (
            weights(lambda t: t["bert.embeddings.LayerNorm.bias"].fill_(torch.nan)),
            "hold NaN or infinity, in bert.embeddings.LayerNorm.bias",
        ),
        (settings(model_type="roberta"), "lack .* of a RobertaForSequenceClassification"),
        (settings(model_type="unheard"), "could not be loaded as a model .*`unheard`"),
        (settings(hidden_act="unheard"), "weights of .* could not be loaded .*unheard"),
        (settings(hidden_size=0), "weights of .* could not be loaded .*correct its config.json"),
        (settings(pad_token_id=99), "weights of .* could not be loaded .*[Pp]adding_idx"),
        (settings(hidden_size="16"), "could not be loaded as a model .*hidden_size"),
        (settings(num_attention_heads=3), "could not be loaded .*attention heads"),
        (settings(dtype="unheard"), "could not be loaded .*unheard"),
        (settings(quantization_config={"quant_method": "gptq"}), "is quantised"),
        (settings(model_type="vit"), "of type vit, of which transformers has no text classifier"),
        (settings(problem_type="regression"), "for regression: only models that give one of"),
        (settings(problem_type="multi_label_classification"), "for multi label classification"),
        (settings(id2label={"0": "LABEL_0"}), "has one output, as for regression"),
        (settings(auto_map={"AutoConfig": "mine.Config"}), "auto_map in config.json.*--trust-rem"),
        (settings(attn_implementation="someone/kernel"), "attn_implementation in config.json.*--t"),
        (write("tokenizer.json", b"{}"), "tokenizer of .* could not be loaded"),
        (
            write("tokenizer_config.json", b'{"auto_map": {"AutoTokenizer": ["mine.T", null]}}'),
            "auto_map in tokenizer_config.json.*--trust-remote-code",
        ),
    ],
)
def test_models_that_are_not_what_they_seem(
    folder: Path, data_file: str, damage: Callable[[Path], None], message: str
) -> None:
    damage(folder)
    with pytest.raises((ValueError, OSError)) as raised:
        ClassificationTask.load(str(folder), data_file)
    assert re.search(message, str(raised.value)) and "\n" not in str(raised.value)


def test_pickled_weights_run_no_code(folder: Path, data_file: str) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (folder / "ran",))  # type: ignore[return-value]

    (folder / WEIGHTS).unlink()
    for content in (Evil(), None):
        path = folder / "pytorch_model.bin"
        torch.save(content, path) if content else path.write_bytes(b"nothing" * 99)
        message = r"weights of .* could not be loaded \(more than tensors, or damaged; pickled code"
        with pytest.raises(ValueError, match=message) as raised:
            ClassificationTask.load(str(folder), data_file)
        assert "\n" not in str(raised.value) and not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/nowhere/model", "there is no folder /nowhere/model"),
        ("./model", "there is no folder ./model"),
        ("~/no/model", "there is no folder ~/no/model"),
        ("a/b/c", "there is no folder a/b/c"),
        ("", "the name of the model is empty"),
        ("my model", "there is no folder my model"),
        ("tests/no-model", "there is no folder tests/no-model"),
        ("~nobody-here/model", "there is no folder ~nobody-here/model: check the path"),
        ("no-model", "no-model could not be loaded as a model: it is no folder, and HF_HUB_OFF"),
        (__file__, "is a file: give the folder"),
    ],
)
def test_what_is_no_folder_fails_at_once(
    monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(Path(__file__).parents[2])
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        find_model(name)


def test_folders_named_like_files_of_a_tokenizer_are_passed_over(folder: Path) -> None:
    for name in ("tokenizer", "vocab_files", "old.model"):
        (folder / name).mkdir()
    assert find_model(str(folder)).folder == folder


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    import datasets  # takes a second

    started = time.monotonic()
    for load in (find_model, load_text_data):
        with pytest.raises(FileNotFoundError, match=r"the hub cannot be reached .*check the path"):
            load("someone/nothing")
    assert time.monotonic() - started < 5
    assert not datasets.config.HF_HUB_OFFLINE


def test_a_model_in_the_cache_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: str(tmp_path))
    source = find_model("someone/model")
    assert source.in_cache and source.options["local_files_only"]
    assert source.folder is None and not source.options["trust_remote_code"]
