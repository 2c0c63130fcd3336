"""Fine-tuning: what it does, and what it leaves alone."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tiny_text import save_model

from obert_kernels.tasks.classification import ClassificationTask
from obert_kernels.tasks.fine_tune import fine_tune
from obert_kernels.tasks.loaders import make_loader
from obert_kernels.tasks.seeds import seeded

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def task(tmp_path: Path, data_file: str) -> ClassificationTask:
    return ClassificationTask.load(str(save_model(tmp_path / "model", head=True)), data_file)


def loader_of(task: ClassificationTask, batch_size: int = 16) -> Any:
    return make_loader(task.tokenizer, task.data.train, batch_size, shuffle=True, seed=1)


def by_hand(model: Any, loader: Any, steps: int, rate: float, masks: dict, seed: int) -> None:
    """The same update, written out."""
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    matrices = [p for p in model.parameters() if p.dim() > 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}],
        fused=True,
    )
    model.train()
    warm, done = round(0.1 * steps), 0
    with seeded(seed):
        while done < steps:
            for batch in loader:
                if done == steps:
                    break
                share = done / warm if done < warm else (steps - done) / (steps - warm)
                for group in optimizer.param_groups:
                    group["lr"] = rate * share
                optimizer.zero_grad()
                model(**batch).loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                with torch.no_grad():
                    for name, mask in masks.items():
                        model.get_parameter(name).mul_(mask)
                done += 1


@pytest.mark.parametrize("masked", [False, True])
def test_it_is_the_update_by_hand(task: ClassificationTask, masked: bool) -> None:
    """Over more than two epochs, with dropout."""
    name = "bert.encoder.layer.0.output.dense.weight"
    masks = {name: task.model.get_parameter(name) > 0} if masked else {}
    with torch.no_grad():  # it comes pruned
        task.model.get_parameter(name).mul_(masks.get(name, True))
    state = {key: value.clone() for key, value in task.model.state_dict().items()}
    seen = []
    fine_tune(
        task.model, loader_of(task), 2.3, 1e-2, masks=masks, seed=5,
        progress=lambda *step: seen.append(step), stage="fit",
    )  # fmt: skip
    steps = math.ceil(2.3 * len(loader_of(task)))
    assert seen == [("fit", done, steps) for done in range(1, steps + 1)]
    found = {key: value.clone() for key, value in task.model.state_dict().items()}
    task.model.load_state_dict(state)
    by_hand(task.model, loader_of(task), steps, 1e-2, masks, 5)
    for key, value in task.model.state_dict().items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-7)
    assert not torch.equal(found[name], state[name])
    if masked:
        assert torch.equal(found[name] != 0, masks[name])


@pytest.mark.parametrize("training", [False, True])
def test_it_leaves_all_else_as_it_was(
    task: ClassificationTask,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    training: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    files = sorted(tmp_path.rglob("*"))
    task.model.train(training)
    config = json.dumps(task.model.config.to_dict(), default=repr)
    states = torch.get_rng_state(), random.getstate(), repr(numpy.random.get_state())
    verbosity = transformers.logging.get_verbosity()
    capfd.readouterr()
    fine_tune(task.model, loader_of(task), 0.3, 1e-3)
    assert capfd.readouterr() == ("", "")
    assert sorted(tmp_path.rglob("*")) == files
    assert task.model.training == training
    assert json.dumps(task.model.config.to_dict(), default=repr) == config
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), repr(numpy.random.get_state())) == states[1:]
    assert transformers.logging.get_verbosity() == verbosity


def test_no_epochs_are_no_steps(task: ClassificationTask) -> None:
    before = {key: value.clone() for key, value in task.model.state_dict().items()}
    fine_tune(task.model, loader_of(task), 0.0)
    assert all(torch.equal(value, before[key]) for key, value in task.model.state_dict().items())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_loss_that_is_no_number_ends_it(task: ClassificationTask, value: float) -> None:
    """At the step at which it becomes so."""
    steps: list[int] = []

    def break_it(stage: str, done: int, total: int) -> None:
        steps.append(done)
        if done == 2:
            with torch.no_grad():
                task.model.classifier.bias[0] = value

    with pytest.raises(ValueError, match=r"loss became (nan|inf) at step 3 of \d+: lower .* 0\.03"):
        fine_tune(task.model, loader_of(task), 1.0, 0.03, progress=break_it)
    assert steps == [1, 2] and not task.model.training


def test_masks_of_another_model_are_refused(task: ClassificationTask) -> None:
    with pytest.raises(ValueError, match="masks name parameters the model does not have: x"):
        fine_tune(task.model, loader_of(task), 1.0, masks={"x": torch.ones(2) > 0})


@pytest.mark.parametrize("asked", [None, "bf16"])
def test_the_precision_of_a_launcher_is_not_taken(
    task: ClassificationTask, monkeypatch: pytest.MonkeyPatch, asked: str | None
) -> None:
    """``accelerate launch`` asks for it by a variable, which would wrap the model for good."""
    name = "ACCELERATE_MIXED_PRECISION"
    monkeypatch.delenv(name, raising=False)
    if asked is not None:
        monkeypatch.setenv(name, asked)
    seen = set()
    layer = task.model.get_encoder() if hasattr(task.model, "get_encoder") else task.model
    layer.register_forward_hook(lambda *_: seen.add(torch.is_autocast_enabled("cpu")))
    fine_tune(task.model, loader_of(task), 0.2)
    assert seen == {False} and os.environ.get(name) == asked
    assert "forward" not in vars(task.model)
