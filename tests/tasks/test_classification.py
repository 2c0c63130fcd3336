"""Batches of texts and training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tiny_text import save_model

from obert_kernels.tasks.batches import damping_batches, fisher_batches
from obert_kernels.tasks.fine_tune import fine_tune
from obert_kernels.tasks.loaders import make_loader
from obert_kernels.tasks.readers import load_text_data
from obert_kernels.tasks.text_data import Texts

pytestmark = pytest.mark.usefixtures("one_thread")


def test_batches_and_training_are_seeded(tmp_path: Path, data_file: str) -> None:
    folder = save_model(tmp_path / "model", head=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    data = load_text_data(data_file)

    def trained(state: int) -> torch.Tensor:
        torch.manual_seed(state)  # must not matter
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
        loader = make_loader(tokenizer, data.train, 16, shuffle=True, by_length=state > 1, seed=1)
        before = torch.get_rng_state()
        fine_tune(model, loader, 0.5, 1e-3, seed=5)
        assert torch.equal(torch.get_rng_state(), before)
        batches = fisher_batches(tokenizer, data.train, 40, 8, max_tokens=400, seed=2)
        counts = [len(batch["labels"]) for batch in batches]
        assert sum(counts) == 8 * 40 and 1 < len(counts) < 40
        assert all(count % 8 == 0 for count in counts), "no gradient is cut"
        padded = [batch["input_ids"].numel() for batch in batches]
        assert all(size <= 400 or count == 8 for size, count in zip(padded, counts, strict=True))
        texts = torch.cat([batch["input_ids"].sum(dim=1) for batch in batches])
        return torch.cat([texts.float(), *[p.detach().flatten() for p in model.parameters()]])

    assert torch.equal(trained(0), trained(1))
    assert not torch.equal(trained(0), trained(2))


def test_sorted_loader_gives_every_text_once(tmp_path: Path, data_file: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(save_model(tmp_path / "m", head=False))
    data = load_text_data(data_file)
    plain = make_loader(tokenizer, data.train, 8)
    ordered = make_loader(tokenizer, data.train, 8, by_length=True)
    texts = [
        sorted(tuple(ids[ids > 0].tolist()) for batch in loader for ids in batch["input_ids"])
        for loader in (plain, ordered)
    ]
    assert texts[0] == texts[1] and len(texts[0]) == len(data.train)
    widths = [batch["input_ids"].shape[1] for batch in ordered]
    assert widths == sorted(widths)


@pytest.mark.parametrize("by_length", [True, False])
def test_texts_for_gradients_are_drawn_once_and_padded_little(
    tmp_path: Path, by_length: bool
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(save_model(tmp_path / "m", head=False))
    # The label tells one from the other.
    texts = Texts([f"{'good ' * (i % 37)}film" for i in range(203)], list(range(203)))
    batches = fisher_batches(
        tokenizer, texts, 10, 10, max_tokens=600, steps=3, by_length=by_length, seed=1
    )
    drawn = torch.cat([batch["labels"] for batch in batches])
    assert len(drawn) == 300
    epochs = len(drawn[:200].unique()), len(drawn[200:].unique())
    assert epochs == (200, 100), "all texts but three, then others than the hundred before"
    together = fisher_batches(
        tokenizer, texts, 10, 10, max_tokens=600, steps=3, by_length=not by_length, seed=1
    )
    same = torch.cat([batch["labels"] for batch in together])
    assert sorted(same.tolist()) == sorted(drawn.tolist()), "whoever shares a gradient"
    groups = drawn.view(-1, 10)
    assert all(len(group.unique()) == 10 for group in groups)
    wanted = sum(int(batch["attention_mask"].sum()) for batch in batches)
    padded = sum(batch["input_ids"].numel() for batch in batches)
    assert (padded < 1.3 * wanted) == by_length


def test_texts_that_judge_a_damping_are_the_same_for_all_and_not_padded_much(
    tmp_path: Path, data_file: str
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(save_model(tmp_path / "m", head=False))
    data = load_text_data(data_file)
    dev = Texts([f"{'good ' * (i % 40)}film" for i in range(400)], [i % 2 for i in range(400)])
    held = damping_batches(tokenizer, replace(data, dev=dev))
    assert [len(batch["labels"]) for batch in held] == [64] * 4
    widths = [batch["input_ids"].shape[1] for batch in held]
    assert widths == sorted(widths) and widths[0] < widths[-1]
    again = damping_batches(tokenizer, replace(data, dev=dev))
    assert all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(held, again, strict=True)
    )
