"""Pruned weights stay zero through training."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from obert_kernels.training.masks import MaskedWeights


def test_pruned_weights_stay_zero_where_an_optimizer_would_move_them() -> None:
    model = nn.Linear(6, 4)
    mask = torch.rand(4, 6) > 0.5
    weights = MaskedWeights(model, {"weight": mask})
    weights.zero_pruned()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    before = model.weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 6)).square().sum().backward()
        optimizer.step()
        assert (model.weight[~mask] != 0).any(), "or there would be nothing to do"
        weights.zero_pruned()
        assert not model.weight[~mask].any() and (model.weight[mask] != before[mask]).all()
    with torch.no_grad():
        model.weight.fill_(torch.nan)
    weights.zero_pruned()
    assert not model.weight[~mask].any(), "whatever they were"


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"kernel": torch.ones(4, 6) > 0}, "the model does not have: kernel"),
        (
            {"weight": torch.ones(6, 4) > 0},
            r"weight has shape \[6, 4\], the parameter has \[4, 6\]",
        ),
    ],
)
def test_masks_of_another_model_are_refused(masks: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskedWeights(nn.Linear(6, 4), masks)


@pytest.mark.parametrize(
    ("how", "options"),
    [
        ("masks", {}),
        ("zeros", {}),
        ("block", {}),
        ("masks", {"gradient_accumulation_steps": 2, "weight_decay": 0.1}),
        ("block", {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}),
    ],
)
def test_a_trainer_of_the_users_own(how: str, options: dict, tmp_path: Path) -> None:
    """By the callback or inside the block; also in the checkpoints it writes on the way."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from safetensors.torch import load_file
    from tiny_text import save_model

    from obert_kernels import prune, pruned_weights_kept
    from obert_kernels.training.trainer import KeepPrunedAtZero

    model, masks, _ = prune(
        transformers.AutoModelForSequenceClassification.from_pretrained(
            save_model(tmp_path / "model", head=True)
        ),
        sparsity=0.5,
        selection="magnitude",
    )
    rows = [{"input_ids": torch.arange(2, 8), "labels": torch.tensor(i % 2)} for i in range(8)]
    callbacks = {"masks": [KeepPrunedAtZero(masks)], "zeros": [KeepPrunedAtZero()], "block": []}

    def trainer(steps: int) -> transformers.Trainer:
        return transformers.Trainer(
            model,
            transformers.TrainingArguments(
                str(tmp_path / "out"), max_steps=steps, save_steps=2, learning_rate=0.01,
                use_cpu=True, report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
                **options,
            ),
            train_dataset=rows,
            eval_dataset=rows,
            callbacks=callbacks[how],
        )  # fmt: skip

    with pruned_weights_kept(model, masks) if how == "block" else nullcontext():
        trainer(4).train()
        trainer(6).train(resume_from_checkpoint=True)
    saved = [load_file(tmp_path / "out" / f"checkpoint-{step}" / "model.safetensors")
             for step in (2, 4, 6)]  # fmt: skip
    for name, mask in masks.items():
        for weight in (*(state[name] for state in saved), model.get_parameter(name).detach()):
            assert torch.equal(weight != 0, mask)
    assert not torch.equal(saved[0][name], saved[2][name]), "it was trained"
