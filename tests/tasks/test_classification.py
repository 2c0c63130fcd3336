"""Batches of texts, training, and what is computed in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tiny_text import save_model

from obert_kernels.tasks import precision
from obert_kernels.tasks.batches import calibration_batches, held_back
from obert_kernels.tasks.fine_tune import fine_tune
from obert_kernels.tasks.loaders import make_loader
from obert_kernels.tasks.precision import (
    _bfloat16_wins_on_this_cpu,
    bfloat16_is_faster,
    for_backward,
)
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
        batches = calibration_batches(tokenizer, data.train, 40, 8, max_tokens=400, seed=2)
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
    batches = calibration_batches(
        tokenizer, texts, 10, 10, max_tokens=600, steps=3, by_length=by_length, seed=1
    )
    drawn = torch.cat([batch["labels"] for batch in batches])
    assert len(drawn) == 300
    epochs = len(drawn[:200].unique()), len(drawn[200:].unique())
    assert epochs == (200, 100), "all texts but three, then others than the hundred before"
    together = calibration_batches(
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
    held = held_back(tokenizer, replace(data, dev=dev))
    assert [len(batch["labels"]) for batch in held] == [64] * 4
    widths = [batch["input_ids"].shape[1] for batch in held]
    assert widths == sorted(widths) and widths[0] < widths[-1]
    again = held_back(tokenizer, replace(data, dev=dev))
    assert all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(held, again, strict=True)
    )


@pytest.mark.parametrize(
    ("tokens", "bfloat16", "fused"), [(128, True, False), (129, True, True), (128, False, True)]
)
def test_attention_is_written_out_for_short_texts_in_bfloat16(tokens, bfloat16, fused):
    """There the backward pass of the fused one is slow."""
    batch = {"input_ids": torch.zeros(2, tokens), "labels": torch.zeros(2)}
    with for_backward(batch, torch.device("cpu"), bfloat16):
        assert torch.backends.cuda.flash_sdp_enabled() == fused
        assert torch.is_autocast_enabled("cpu") == bfloat16
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.fixture
def tried_anew() -> Iterator[None]:
    """The trial on this processor, forgotten before and after."""
    _bfloat16_wins_on_this_cpu.cache_clear()
    yield
    _bfloat16_wins_on_this_cpu.cache_clear()


@pytest.mark.usefixtures("tried_anew")
@pytest.mark.parametrize(("float32", "bfloat16", "expected"), [(4, 2, True), (2, 4, False)])
def test_bfloat16_is_used_where_a_product_takes_less_time(
    monkeypatch: pytest.MonkeyPatch, float32: int, bfloat16: int, expected: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    monkeypatch.setattr(precision.platform, "machine", lambda: "x86_64")
    now, types = 0, []

    def timed_product(left: torch.Tensor, right: torch.Tensor) -> None:
        nonlocal now
        now += {torch.float32: float32, torch.bfloat16: bfloat16}[left.dtype]
        now += 10 * (len(types) < 2)  # the first of each takes longer
        types.append(left.dtype)

    monkeypatch.setattr(torch, "mm", timed_product)
    monkeypatch.setattr(precision.time, "perf_counter", lambda: now)
    assert bfloat16_is_faster() == expected
    assert types == [torch.float32, torch.bfloat16] * 4
    assert bfloat16_is_faster() == expected and len(types) == 8, "tried once"


@pytest.mark.usefixtures("tried_anew")
def test_trying_bfloat16_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    before, product, seen = torch.get_rng_state(), torch.mm, set()

    def seen_product(left: torch.Tensor, right: torch.Tensor) -> None:
        found = product(left, right)
        seen.add((found.device.type, found.dtype))

    monkeypatch.setattr(torch, "mm", seen_product)
    with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
        _bfloat16_wins_on_this_cpu()
        assert torch.is_autocast_enabled("cpu")
    assert seen == {("cpu", torch.float32), ("cpu", torch.bfloat16)}, "whatever the caller set"
    assert torch.equal(torch.get_rng_state(), before)


def test_without_the_instructions_bfloat16_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    monkeypatch.setattr(precision, "_bfloat16_wins_on_this_cpu", lambda: 1 / 0)
    assert not bfloat16_is_faster()
