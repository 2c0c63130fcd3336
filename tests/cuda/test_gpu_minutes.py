"""The benchmark of a GPU within a time, and its whole prunings; the times are invented."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_timer import TIMES, TINY, TINY_WORK, FakeTimer

from benchmarks.kernels.gpu import rows, whole_runs
from benchmarks.kernels.gpu import run as gpu
from benchmarks.kernels.gpu import timer as gpu_timer
from benchmarks.kernels.gpu.validation import Mismatch
from benchmarks.support.contender import prune_as_reference
from obert_kernels.ops import fallback

FILE = "fake_gpu_1_gb.json"
ROOT = Path(__file__).parents[2]


class SlowTimer(FakeTimer):
    """Its clock goes on by some seconds with everything that is timed."""

    def __init__(self, seconds=4.0, **more):
        super().__init__(**more)
        self.now, self.step = 1000.0, seconds

    def clock(self):
        return self.now

    def alternate(self, contenders, rounds, limit=None):
        self.now += self.step
        return super().alternate(contenders, rounds, limit)

    def once(self, name, call):
        self.now += self.step
        call()
        return self.step, 3 << 30


def limited(minutes, work=TINY_WORK):
    return replace(TINY, block_sizes=(50, 4), minutes=minutes, work=work)


@pytest.mark.parametrize("minutes", [1, 3, 8])
def test_a_run_ends_in_time_with_what_matters_most(cuda_on_host, tmp_path, minutes):
    timer = SlowTimer()
    document = gpu.run(timer, limited(minutes), tmp_path, "", timer.clock)
    assert timer.now - 1000 < 60 * minutes
    assert timer.now - 1000 > 60 * minutes - gpu_timer.RESERVE - 30 or not document["left_out"]
    assert json.loads((tmp_path / FILE).read_text()) == document and document["finished"]
    first = [(row["block_size"], row["operator"]) for row in document["rows"][:14]]
    assert {size for size, _ in first} == {50}
    assert {operator for _, operator in first} <= set(gpu.MATTER_MOST)
    text = (tmp_path / FILE).with_suffix(".md").read_text()
    if minutes == 1:
        assert 3 < len(document["rows"]) < 14 and document["whole_runs"] == []
        assert "tiny: too little time" in document["left_out"]
        assert "Left out in 1 minutes" in text
    if minutes >= 3:
        assert len(document["whole_runs"]) == 1
    if minutes == 8:
        assert document["left_out"] == []
        assert {row["block_size"] for row in document["rows"]} == {50, 4, 70}


def test_a_run_that_is_stopped_leaves_what_it_has(cuda_on_host, tmp_path):
    class Stopped(FakeTimer):
        def alternate(self, contenders, rounds, limit=None):
            if len(self.asked) == 9:
                raise KeyboardInterrupt
            return super().alternate(contenders, rounds, limit)

    with pytest.raises(KeyboardInterrupt):
        gpu.run(Stopped(), TINY, tmp_path, "")
    document = json.loads((tmp_path / FILE).read_text())
    assert len(document["rows"]) == 9 - 3  # ceilings are asked for first
    text = (tmp_path / FILE).with_suffix(".md").read_text()
    assert "The run was stopped before its end." in text and "gram_accumulate" in text


def test_block_sizes_that_are_not_validated_in_time_are_not_timed(
    cuda_on_host, monkeypatch, tmp_path
):
    timer = FakeTimer()
    now = iter(range(0, 100_000, 7))
    settings = replace(TINY, block_sizes=(4, 8, 16, 50), minutes=1.2)
    document = gpu.run(timer, settings, tmp_path, "", lambda: float(next(now)))
    timed = {row["block_size"] for row in document["rows"]}
    assert timed <= {4, 8, 70} and "B = 50" in document["left_out"]


def test_whole_prunings(cuda_on_host):
    """Every round from the same weights; medians, ratios and peaks from the timer."""
    model = TINY_WORK.models[0]
    times = {**TIMES, whole_runs.REFERENCE: 8.0, whole_runs.SAME_RULES: 2.0}
    deadline = gpu_timer.Deadline(None)
    found = list(whole_runs.measure_model(model, TINY_WORK, FakeTimer(times), deadline))
    assert [row["rounds"] for row in found] == [1, 2]
    row = found[-1]
    assert row["seconds"][whole_runs.SAME_RULES] == 2.0
    assert row["ratios"][whole_runs.SAME_RULES] == 4.0
    assert row["peak_gib"][whole_runs.REFERENCE] == 3.0
    assert row["agreement"] == 1.0 and row["update_error"] < 1e-3 and row["refused"] == {}
    assert row["weights"] == 4 * 8 * 8 + 2 * 8 * 32
    text = whole_runs.table_row(row)
    assert text.count("|") == whole_runs.HEADER.splitlines()[0].count("|")


def test_contenders_prune_and_take_the_same_texts(cuda_on_host):
    size, work = TINY_WORK.models[0], TINY_WORK
    prunings = whole_runs.PrunedAgainAndAgain(size, work, FakeTimer())
    calls = whole_runs.contenders(prunings.model, size, work, 4, torch.device("cpu"))
    for name, call in calls.items():
        prunings.restore()
        call()
        zeros = sum(int((weight == 0).sum()) for weight in prunings.weights.values())
        assert zeros == round(0.8 * 768), name
    alone, together = (work.batches(size, torch.device("cpu"), texts, 4) for texts in (2, 4))
    assert len(alone) == 4 and len(together) == 2
    for key in ("input_ids", "labels"):
        assert torch.equal(
            torch.cat([batch[key] for batch in alone]),
            torch.cat([batch[key] for batch in together]),
        )


def other_damping(model, batches, loss_fn, sparsity, damping):
    return prune_as_reference(model, batches, loss_fn, sparsity, 1e6 * damping)


def other_sparsity(model, batches, loss_fn, sparsity, damping):
    return prune_as_reference(model, batches, loss_fn, sparsity - 0.02, damping)


def not_finite(model, *arguments):
    prune_as_reference(model, *arguments)
    next(iter(model.bert.encoder.parameters())).data.fill_(float("nan"))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (other_damping, r"updates differ by \d"),
        (other_sparsity, r"9[78]\.\d+% of the weights are pruned or kept"),
        (not_finite, "not finite"),
    ],
)
def test_prunings_that_disagree_end_the_run(
    cuda_on_host, monkeypatch, tmp_path, reference, message
):
    monkeypatch.setattr(whole_runs, "prune_as_reference", reference)
    with pytest.raises(Mismatch, match=message):
        gpu.run(FakeTimer(), replace(TINY, block_sizes=(4,), work=TINY_WORK), tmp_path, "")
    document = json.loads((tmp_path / FILE).read_text())
    assert document["whole_runs"] == [] and document["rows"]


def test_a_reference_that_needs_too_much_memory_is_left_out(cuda_on_host, monkeypatch):
    def too_large(*arguments):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(whole_runs, "prune_as_reference", too_large)
    deadline = gpu_timer.Deadline(None)
    model = TINY_WORK.models[0]
    row = list(whole_runs.measure_model(model, TINY_WORK, FakeTimer(), deadline))[-1]
    assert row["refused"] == {whole_runs.REFERENCE: "out of memory"}
    assert row["ratios"] == {} and row["agreement"] is None
    assert "out of memory" in whole_runs.table_row(row)


def test_a_kernel_without_memory_is_left_out(cuda_on_host, monkeypatch, tmp_path):
    real = gpu.measure

    def measure(kernel, *arguments):
        if kernel.operator == "gram_inverse":
            raise torch.OutOfMemoryError
        return real(kernel, *arguments)

    monkeypatch.setattr(gpu, "measure", measure)
    document = gpu.run(FakeTimer(), replace(TINY, block_sizes=(4,)), tmp_path, "")
    assert document["refused"] == ["float32 Gram: out of memory", "float64 Gram: out of memory"]
    assert len(document["rows"]) > 20


def test_models_are_left_out_without_transformers(cuda_on_host, monkeypatch, tmp_path):
    monkeypatch.setattr(whole_runs, "find_spec", lambda name: None)
    settings = replace(TINY, block_sizes=(4,), work=TINY_WORK)
    document = gpu.run(FakeTimer(), settings, tmp_path, "")
    assert document["left_out"] == ["tiny: transformers is not installed"]


def test_torch_is_not_timed_in_place_of_the_kernels(cuda_on_host, monkeypatch, tmp_path):
    monkeypatch.setattr(fallback, "_without_kernels", set())
    monkeypatch.setattr(fallback, "_said", set())
    monkeypatch.setattr(gpu, "reason_to_refuse", lambda: None)
    monkeypatch.setattr(gpu, "CudaTimer", FakeTimer)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--block", "4", "--results", str(tmp_path)])
    cuda_on_host.set_launch_error(209)
    try:
        with pytest.raises(SystemExit, match=r"^benchmarks/gpu.py: no CUDA kernel .* can run"):
            gpu.main()
    finally:
        cuda_on_host.set_launch_error(0)
    assert list(tmp_path.iterdir()) == []


def test_rounds_end_with_the_time_of_a_row(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    timer = object.__new__(gpu_timer.CudaTimer)

    def seconds(call):
        clock.now += 1.0
        return 1.0

    timer._seconds = seconds
    monkeypatch.setattr(gpu_timer.time, "monotonic", lambda: clock.now)
    for limit, rounds, spent in ((None, 20, 23), (10.5, 8, 11), (0.5, gpu_timer.LEAST_ROUNDS, 6)):
        clock.now = 0.0
        times = timer.alternate({rows.OURS: [lambda: None]}, 20, limit)
        assert (len(times[rows.OURS]), clock.now) == (rounds, spent)


@pytest.mark.parametrize(("no_build", "failing"), [("0", "pytest"), ("1", "nothing")])
def test_the_command_for_a_gpu_machine(tmp_path, no_build, failing):
    """Failing tests do not keep it from measuring, but are not forgotten."""
    python, said = tmp_path / "python", tmp_path / "said"
    python.write_text(f'#!/bin/sh\necho "$@" >> {said}\n[ "$2" != {failing} ]\n')
    python.chmod(0o755)
    env = {**os.environ, "PYTHON": str(python), "NO_BUILD": no_build}
    done = subprocess.run([ROOT / ".ci" / "gpu", "8", tmp_path], env=env, capture_output=True)
    assert (done.returncode == 0) == (failing == "nothing")
    asked = [line.split()[1] for line in said.read_text().splitlines()]
    rest = ["obert_kernels", "pytest", "benchmarks.kernels.gpu"]
    assert asked == (rest if no_build == "1" else ["pip", *rest])
    minutes = said.read_text().splitlines()[-1].split()[3]
    assert minutes in ("7", "8")
