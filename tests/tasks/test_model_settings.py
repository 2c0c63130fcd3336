"""Settings of a model: code of its own, the form of its outputs, zeros it came with."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("typer")

from tiny_text import save_model

from obert_kernels.tasks.classification import ClassificationTask
from obert_kernels.tasks.sparse_start import zeros_of

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ("--num-grads", 8, "--grad-batch-size", 4, "--block-size", 8, "--max-length", 16)
CODE = """
from pathlib import Path
from transformers import BertConfig, BertForSequenceClassification
Path({ran!r}).touch()
class MyConfig(BertConfig):
    model_type = "mine"
class MyModel(BertForSequenceClassification):
    config_class = MyConfig
"""


def change(folder: Path, **more: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))


@pytest.mark.parametrize("name", ["run", "sweep"])
def test_code_of_a_model_runs_only_when_it_is_trusted(
    tmp_path: Path, data_file: str, command: Callable[..., tuple[int, str, str]], name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    model, out, ran = save_model(tmp_path / "model", head=True), tmp_path / "out", tmp_path / "ran"
    (model / f"code_{name}.py").write_text(CODE.format(ran=str(ran)))
    own = {"AutoConfig": f"code_{name}.MyConfig",
           "AutoModelForSequenceClassification": f"code_{name}.MyModel"}  # fmt: skip
    arguments = (name, model, data_file, "-s", 0.5, "-o", out, *map(_renamed(name), QUICK))
    for kind in ("mine", "bert"):  # also where transformers has a class of that name
        change(model, model_type=kind, auto_map=own)
        code, _, stderr = command(*arguments)
        assert code == 1 and re.fullmatch("error: .*auto_map.*--trust-remote-code.*\n", stderr)
        assert not ran.exists() and not out.exists()
    code, _, stderr = command(*arguments, "--trust-remote-code")
    assert code == 0, stderr
    assert ran.exists()
    if name == "run":
        report = json.loads((out / "report.json").read_text())
        assert report["settings"]["trust_remote_code"] is True
        pruned = transformers.AutoModelForSequenceClassification.from_pretrained(
            out / "sparsity-0.5", trust_remote_code=True
        )
        assert type(pruned).__name__ == "MyModel"
    else:  # other code, other trials
        (model / f"code_{name}.py").write_text(CODE.format(ran=str(ran)) + "# changed\n")
        code, _, stderr = command(*arguments, "--trust-remote-code")
        assert code == 1 and "the model's own code" in stderr


def _renamed(name: str) -> Callable[[object], object]:
    other = {"--num-grads": "--texts", "--grad-batch-size": "--texts-per-grad"}
    return lambda option: other.get(str(option), option) if name == "sweep" else option


@pytest.mark.parametrize(
    "flags",
    [
        {"return_dict": False},
        {"torchscript": True},
        {"output_attentions": True, "output_hidden_states": True},
        {"chunk_size_feed_forward": 7},
        {"gradient_checkpointing": True, "use_cache": True, "is_decoder": True},
    ],
)
def test_settings_that_change_outputs_are_left_out_or_harmless(
    tmp_path: Path, data_file: str, command: Callable[..., tuple[int, str, str]],
    flags: dict[str, object],
) -> None:  # fmt: skip
    model, out = save_model(tmp_path / "model", head=True), tmp_path / "out"
    change(model, **flags)
    options = ("-s", 0.5, "-o", out, *QUICK, "--damping", 1e-3, "--recovery-epochs", 0.1)
    code, stdout, stderr = command("run", model, data_file, *options)
    assert code == 0, stderr
    said = f"note: {', '.join(flags)} of config.json: left out, in what is saved as well\n"
    assert (said in stdout) == ("use_cache" not in flags)
    notes = json.loads((out / "report.json").read_text())["notes"]
    assert [note for note in notes if f"note: {note}\n" not in stdout] == []
    pruned = transformers.AutoModelForSequenceClassification.from_pretrained(out / "sparsity-0.5")
    assert pruned(input_ids=torch.tensor([[2, 3, 4]])).attentions is None


def test_fine_tuning_keeps_the_zeros_of_a_sparse_model(tmp_path: Path, data_file: str) -> None:
    folder = save_model(tmp_path / "model", head=True)
    dense = ClassificationTask.load(str(folder), data_file)
    assert zeros_of(dense.model) == (0.0, {}) and "zero already" not in dense.describe(None)
    with torch.no_grad():
        for name, weight in dense.model.named_parameters():
            if "layer.0" in name and weight.dim() == 2:
                weight[::2] = 0.0
            if name == "classifier.weight":  # a head often begins at zero
                weight.zero_()
    dense.model.save_pretrained(folder)
    task = ClassificationTask.load(str(folder), data_file)
    assert "note: 25.0% of the encoder's weights are zero already" in task.describe(None)
    before = {name: weight == 0 for name, weight in task.model.named_parameters()}
    task.fine_tune(1.0, learning_rate=1e-2)
    for name, weight in task.model.named_parameters():
        if "layer" in name and weight.dim() == 2:
            assert torch.equal(weight == 0, before[name])
    assert task.model.classifier.weight.all()


def test_zeros_of_a_head_and_of_embeddings_do_not_count(tmp_path: Path, data_file: str) -> None:
    task = ClassificationTask.load(str(save_model(tmp_path / "model", head=True)), data_file)
    with torch.no_grad():
        task.model.classifier.weight.zero_()
        task.model.bert.pooler.dense.weight.zero_()
        task.model.bert.embeddings.word_embeddings.weight.zero_()
        task.model.bert.encoder.layer[0].output.dense.weight[0, 0] = 0.0
    assert zeros_of(task.model) == (0.0, {})


@pytest.mark.parametrize("name", ["run", "sweep"])
def test_a_model_that_only_guesses_is_doubted(
    tmp_path: Path, data_file: str, command: Callable[..., tuple[int, str, str]], name: str
) -> None:
    model, out = save_model(tmp_path / "model", head=True), tmp_path / "out"
    task = ClassificationTask.load(str(model), data_file)
    right, texts = sum(task.data.test.labels), len(task.data.test)
    most = max(right, texts - right) / texts
    assert task.doubts(most + 0.01) == []
    with torch.no_grad():
        task.model.classifier.weight.zero_()
        task.model.classifier.bias.copy_(torch.tensor([0.0, 1.0]))
    task.model.save_pretrained(model)
    options = ("-s", 0.5, "-o", out, "--selection", "magnitude")
    code, stdout, stderr = command(name, model, data_file, *options)
    assert code == 0, stderr
    assert f"note: the model is right about {right / texts:.1%} of the test texts, and" in stdout
    assert f"is that of {most:.1%}: was it trained for these classes" in stdout
