"""Batches with a position: kept back, looked at, cut, held for several passes, started over."""

from itertools import islice

import pytest
import torch
from tiny import batches
from torch.utils.data import DataLoader

from obert_kernels.gradients.source import BatchSource


def taken(source: BatchSource, count: int | None = None) -> list:
    return [batch for _, batch in source.take(count)]


def test_batches_are_kept_back():
    data = batches(40, size=10)
    source = BatchSource(data)
    held, rest = source.keep_back(), taken(source, 30)
    assert held == data[:10] and rest == data[10:] and not source.all_notes(30)
    assert len(BatchSource(batches(400, size=10)).keep_back()) == 26, "256 samples are enough"
    source = BatchSource(iter(data))
    assert len(source.keep_back()) == 26 and len(taken(source, 14)) == 14
    loader = DataLoader(torch.arange(64).float().unsqueeze(1), batch_size=4)
    source = BatchSource(loader)
    assert len(source.keep_back()) == 4
    twice = taken(source, 24)
    assert torch.equal(torch.cat(twice[:12]), torch.arange(16.0, 64).unsqueeze(1))
    assert all(map(torch.equal, twice[:12], twice[12:])), "without those kept back"
    (note,) = source.all_notes(24)
    assert note == "24 gradients were taken from 12 batches, gone through 2.0 times"


def test_the_only_batches_serve_twice():
    data = batches(40, size=10)
    source = BatchSource(data[:1])
    assert source.keep_back() == taken(source, 1) == data[:1]
    assert "the batches the Fisher was estimated from" in source.all_notes(1)[0]
    with pytest.raises(ValueError, match="batches is empty"):
        BatchSource([]).keep_back()
    with pytest.raises(
        ValueError, match=r"all 3 batches \(30 samples\) were kept back .* pass more"
    ):
        BatchSource(iter(data[:3])).keep_back()


def test_a_loader_that_shuffles_keeps_back_what_it_keeps_back():
    loader = DataLoader(torch.arange(40.0).unsqueeze(1), shuffle=True)
    source = BatchSource(loader)
    held = source.keep_back()
    others = [float(x) for x in taken(source, 30)]
    assert len(set(others)) == 30 and not set(torch.cat(held).flatten().tolist()) & set(others)


def test_batches_have_the_numbers_that_they_were_given_with():
    source = BatchSource(range(100, 112))
    assert [where for where, _ in source.take(2)] == ["batch 0", "batch 1"]
    held = source.hold(3, None)
    assert held == [102, 103, 104]
    for _ in range(2):  # passes see the same
        assert list(source.again(held).take(3)) == [
            ("batch 2", 102), ("batch 3", 103), ("batch 4", 104),
        ]  # fmt: skip
    assert next(source.take()) == ("batch 5", 105)
    kept = BatchSource([torch.zeros(200, 1)] * 8)
    assert len(kept.keep_back()) == 2
    assert next(kept.take())[0] == "batch 2"


def test_what_is_looked_at_is_still_to_be_taken():
    one, two = torch.zeros(1, 3), torch.zeros(2, 3)
    source = BatchSource([one, one, two, one])
    where, batch = source.look_at_several_samples()
    assert where == "batch 2" and batch is two
    assert [len(batch) for batch in taken(source, 6)] == [1, 1, 2, 1, 1, 1]
    assert BatchSource(iter([one])).look_at_several_samples()[1] is one
    calls = []

    def endless():
        while True:
            calls.append(one)
            yield one

    BatchSource(endless()).look_at_several_samples()
    assert len(calls) == 16, "not for ever"


def test_pieces_are_numbered_by_themselves():
    source = BatchSource([torch.arange(5), torch.arange(5, 8)])
    source.cut(2)
    found = list(source.take(6))
    assert [piece.tolist() for _, piece in found] == [[0, 1], [2, 3], [4], [5, 6], [7], [0, 1]]
    assert [where[-1] for where, _ in found] == list("012345")
    assert not source.all_notes(6), "pieces are not batches"


def test_what_cannot_be_started_over_ends():
    source = BatchSource(iter(range(3)))
    with pytest.raises(ValueError, match="batches ended after 3 of num_grads=4: pass a list"):
        taken(source, 4)

    class Once:
        """Can be iterated once, but is not its own iterator."""

        def __init__(self):
            self.left = iter(range(2))

        def __iter__(self):
            return iter(list(self.left))

    with pytest.raises(ValueError, match="batches ended after 2"):
        taken(BatchSource(Once()), 3)
    with pytest.raises(ValueError, match="batches is empty"):
        taken(BatchSource([]), 1)
    assert list(islice((b for _, b in BatchSource([1, 2]).take()), 5)) == [1, 2, 1, 2, 1]
