"""The logic of benchmarks/gpu.py with invented times, and of benchmarks/kernels/roofline.py.

No number here is a time of a device: the timer is a fake, the kernels run on the host.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from fake_timer import TIMES, TINY, TINY_WORK, FakeTimer

from benchmarks.kernels import costs, roofline
from benchmarks.kernels.gpu import fit as gpu_fit
from benchmarks.kernels.gpu import kernels as gpu_kernels
from benchmarks.kernels.gpu import report as gpu_report
from benchmarks.kernels.gpu import rows as gpu_rows
from benchmarks.kernels.gpu import run as gpu
from benchmarks.kernels.gpu import settings as gpu_settings
from benchmarks.kernels.gpu import timer as gpu_timer
from benchmarks.kernels.gpu import validation as gpu_validation
from benchmarks.kernels.gpu import whole_runs
from obert_kernels import ops
from obert_kernels.ops import native

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
OPERATORS = [
    "gram_accumulate", "gram_accumulate_living", "gram_inverse", "gram_diagonal", "gram_solve",
    "gram_scores", "gram_greedy_scores", "gram_n_of_m", "gram_update", "woodbury_update",
    "inverse_scores", "inverse_update", "fit_rows",
]  # fmt: skip
TOP = gpu_rows.Ceilings(1e9, {"float32": 4e9, "float64": 2e9})


@pytest.fixture
def document(cuda_on_host, tmp_path):
    return gpu.run(FakeTimer(), replace(TINY, work=TINY_WORK), tmp_path, "the command")


def test_a_whole_run(document, tmp_path):
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {f"fake_gpu_1_gb.{suffix}" for suffix in ("json", "md", "png")}
    assert json.loads((tmp_path / "fake_gpu_1_gb.json").read_text()) == document
    assert (tmp_path / "fake_gpu_1_gb.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "fake_gpu_1_gb.md").read_text()
    assert "`the command`" in text and "Fake GPU (1 GB)" in text and "L2 tiny" in text

    rows = document["rows"]
    assert {row["operator"] for row in rows} == set(OPERATORS)
    assert {row["block_size"] for row in rows} == {4, 50, 70}
    assert sum("bfloat16 gradients" in row["variant"] for row in rows) == 2 * 4
    assert document["refused"] == document["left_out"] == [] and document["finished"]
    (pruned,) = document["whole_runs"]
    assert whole_runs.table_row(pruned) in text
    assert document["checks"] > 2 * 2 * len(OPERATORS)
    for row in rows:
        assert gpu_report.table_row(row) in text
        assert row["seconds"] == row["fastest"] == 5e-6 and row["slowest"] == 1.0
        assert row["rounds"] == 20
        k = 3 if row["operator"] in ("gram_accumulate", "woodbury_update") else 1
        if gpu_kernels.REFERENCE in row["ratios"]:
            assert row["ratios"][gpu_kernels.REFERENCE] == pytest.approx(4 * k)
    # All accumulations, all factorisations that torch offers, what the reference can do.
    compared = [row["operator"] for row in rows if row["ratios"]]
    assert compared.count("gram_accumulate") == 8 and compared.count("woodbury_update") == 4
    assert compared.count("gram_inverse") == 4 and compared.count("gram_scores") == 4
    assert compared.count("inverse_scores") == 3 and compared.count("inverse_update") == 3
    assert compared.count("fit_rows") == 1


def test_figures_by_hand():
    kernel = gpu_kernels.gram_kernel(4, 3, torch.float64, torch.bfloat16)
    times = {gpu_rows.OURS: [3e-6, 1e-6, 2e-6], "other": [9e-6, 1e-6, 5e-6]}
    row = gpu_rows.figures(kernel, 10, times, {"other": 8}, TOP)
    bytes_moved = 10 * (2 * 10 * 8 + 3 * 4 * 2)  # triangles both ways, gradients
    flops = 10 * 3 * 2 * 10
    assert (row["bytes"], row["flops"], row["arithmetic"]) == (bytes_moved, flops, "float64")
    assert row["seconds"] == 2e-6
    assert row["gb_per_s"] == pytest.approx(bytes_moved / 2e-6 / 1e9)
    assert row["tflop_per_s"] == pytest.approx(flops / 2e-6 / 1e12)
    assert row["of_memory"] == pytest.approx(bytes_moved / 2e-6 / 1e9)
    assert row["of_arithmetic"] == pytest.approx(flops / 2e-6 / 2e9)
    assert row["ratios"] == {"other": pytest.approx(8 * 5 / 2)}


def test_ceilings_by_hand():
    top = gpu_rows.measure_ceilings(FakeTimer(), TINY)
    assert top.bytes_per_s == pytest.approx(2 * 4000 / 1e-6)
    assert top.flops_per_s["float32"] == pytest.approx(2 * 10**3 / 1e-6)
    assert top.flops_per_s["float64"] == pytest.approx(2 * 10**3 / 2e-6)


def test_the_numbers_come_from_the_timer(cuda_on_host):
    kernel = gpu_kernels.woodbury_kernel(4, 2, torch.float32)
    slow = {**TIMES, gpu_rows.OURS: 7.0}
    row = gpu_rows.measure(kernel, FakeTimer(slow), TINY, TOP)
    assert row["seconds"] == 7.0
    assert row["ratios"] == {gpu_kernels.REFERENCE: pytest.approx(2 * 20e-6 / 7)}


def test_every_contender_rotates_over_copies_larger_than_the_cache(cuda_on_host):
    timer = FakeTimer(l2_bytes=2000)
    kernel = gpu_kernels.gram_kernel(4, 2, torch.float32, torch.float32)
    row = gpu_rows.measure(kernel, timer, TINY, TOP)
    assert timer.asked == [{gpu_rows.OURS: gpu_rows.COPIES, gpu_kernels.REFERENCE: gpu_rows.COPIES}]
    # A copy: Gram and two gradients.
    assert 4 * 2000 <= row["blocks"] * (10 + 2 * 4) * 4 < 20 * 2000
    assert row["past_the_cache"]
    assert "in cache" not in gpu_report.table_row(row)


def test_sizes_shrink_to_the_memory(cuda_on_host):
    kernel = gpu_kernels.gram_kernel(4, 2, torch.float32, torch.float32)
    wanted = replace(TINY, least_copy_bytes=1 << 40)
    for free in (1 << 16, 1 << 20, 1 << 30):
        blocks = gpu_rows.blocks_to_time(kernel, FakeTimer(free=free), wanted)
        assert 0.4 * free < gpu_rows.COPIES * kernel.memory * 4 * blocks <= 0.5 * free
    row = gpu_rows.measure(kernel, FakeTimer(l2_bytes=1 << 20, free=1 << 16), TINY, TOP)
    assert not row["past_the_cache"]
    assert "too little memory free" in gpu_report.table_row(row)


@pytest.mark.parametrize("size", [50, 128])
def test_a_copy_takes_the_memory_it_says(size):
    """Data only: what calls allocate for themselves comes on top, so `memory` must be more."""
    for kernel in gpu_kernels.kernels(size, (5,), (torch.float32, torch.bfloat16)):
        n = 4 * size
        copy = kernel.build(n, torch.device("cpu"))
        calls = [copy.ours, *(other.call for other in copy.contenders.values())]
        tensors = {t.data_ptr(): t for call in calls for t in tensors_of(call)}
        held = sum(t.numel() * t.itemsize for t in tensors.values())
        assert held <= kernel.memory * n, kernel


def tensors_of(thing, depth=4):
    """Tensors that a call keeps alive through its closure."""
    if isinstance(thing, torch.Tensor):
        yield thing
    elif depth > 0:
        cells = [cell.cell_contents for cell in getattr(thing, "__closure__", None) or ()]
        for part in [*cells, *getattr(thing, "__dict__", {}).values()]:
            yield from tensors_of(part, depth - 1)


@pytest.mark.parametrize("size", [4, 32, 50, 128])
def test_bytes_are_those_the_kernels_move(cuda_on_host, size):
    """What passes through the streaming loads and stores of the sources, counted."""
    for kernel in gpu_kernels.kernels(size, (3,), (torch.float32, torch.bfloat16)):
        if "groups of 4" in kernel.variant and size % 4:
            continue  # the formula is for groups that no border cuts
        if kernel.operator == "gram_accumulate_living" and size > 60:
            continue  # more tiles than threads: the gradients pass several times
        blocks = 4
        copy = kernel.build(blocks * size, torch.device("cpu"))
        cuda_on_host.reset_counters()
        copy.ours()
        counted = cuda_on_host.counters()
        moved = counted["load_bytes"] + counted["store_bytes"]
        assert moved == kernel.cost(blocks).bytes, (kernel.operator, kernel.variant)


def test_a_fit_by_hand(cuda_on_host):
    """Ours and torch solve the same systems; memory and cost are those of the data."""
    kernel, rows = gpu_fit.fit_kernel(70, 0.3), 90
    copy = kernel.build(70 * rows, torch.device("cpu"))
    fitted, theirs = copy.ours(), copy.contenders[gpu_fit.TORCH]
    solved = theirs.call()
    assert theirs.scale == rows / len(solved) == 1
    assert copy.status.item() == -1
    assert torch.equal((fitted != 0).sum(dim=1), torch.full((rows,), 21))
    sums = solved.sum(dim=(1, 2))
    torch.testing.assert_close(fitted.sum(dim=1), sums, rtol=1e-10, atol=1e-10)
    held = sum(t.nbytes for t in {t.data_ptr(): t for t in tensors_of(copy.ours)}.values())
    assert held <= kernel.memory * 70 * rows
    cost = kernel.cost(rows)
    assert cost.bytes == 8 * 70 * 70 + rows * (70 + 21 * 8 + 70 * 8)
    assert (cost.flops, cost.arithmetic) == (rows * (21**3 // 3 + 2 * 21**2), "float64")


def slightly_wrong(operator, dtypes=(torch.float32, torch.float64)):
    def call(*arguments):
        result = operator(*arguments)
        if arguments[0].dtype not in dtypes:
            return result
        changed = arguments[0] if result is None else result
        for tensor in changed if isinstance(changed, tuple) else (changed,):
            if tensor.dtype == torch.bool:
                tensor[-1] ^= True
            else:
                tensor *= 1.001
        return result

    return call


@pytest.mark.parametrize("name", OPERATORS)
def test_a_wrong_operator_stops_the_run(cuda_on_host, monkeypatch, tmp_path, name):
    monkeypatch.setattr(ops, name, slightly_wrong(getattr(ops, name)))
    timer = FakeTimer()
    tiny = replace(TINY, block_sizes=(4,))
    with pytest.raises(gpu_validation.Mismatch, match=f"{name}.*block size 4.*nothing was timed"):
        gpu.run(timer, tiny, tmp_path, "")
    assert timer.asked == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["gram_accumulate", "gram_accumulate_living"])
def test_a_wrong_operator_of_one_type_is_found(cuda_on_host, monkeypatch, tmp_path, name, dtype):
    monkeypatch.setattr(ops, name, slightly_wrong(getattr(ops, name), (dtype,)))
    tiny = replace(TINY, block_sizes=(4,))
    with pytest.raises(gpu_validation.Mismatch, match=f"{name} {dtype}"):
        gpu.run(FakeTimer(), tiny, tmp_path, "")


@pytest.mark.parametrize("name", ["gram_accumulate", "gram_accumulate_living"])
def test_an_operator_that_forgets_what_was_there_is_found(
    cuda_on_host, monkeypatch, tmp_path, name
):
    real = getattr(ops, name)
    monkeypatch.setattr(ops, name, lambda gram, *others: real(gram.zero_(), *others))
    with pytest.raises(gpu_validation.Mismatch, match=name):
        gpu.run(FakeTimer(), replace(TINY, block_sizes=(4,)), tmp_path, "")


def test_nan_is_a_mismatch():
    nan, one = torch.tensor([float("nan")]), torch.ones(1)
    assert gpu_validation.Check("", nan, one, 1).error() == float("inf")
    assert not gpu_validation.Check("", one, nan, 1).error() <= 1


def test_a_breakdown_is_an_error(cuda_on_host):
    kernel = gpu_kernels.woodbury_kernel(4, 2, torch.float32)

    def build(n, device):
        copy = kernel.build(n, device)
        copy.status.fill_(3)
        return copy

    with pytest.raises(RuntimeError, match="woodbury_update: block 3 broke down"):
        gpu_rows.measure(replace(kernel, build=build), FakeTimer(), TINY, TOP)


def test_a_block_size_that_does_not_fit_is_reported(cuda_on_host, tmp_path):
    """A device with 48 KiB of shared memory: blocks of 128 do not fit in float64."""
    settings = replace(TINY, block_sizes=(128,), gradient_types=(torch.float32,))
    cuda_on_host.set_shared_memory_limit(48 * 1024)
    try:
        document = gpu.run(FakeTimer(), settings, tmp_path, "")
    finally:
        cuda_on_host.set_shared_memory_limit(232448 - 1024)
    timed = {row["operator"] for row in document["rows"]}
    assert timed == {
        "gram_accumulate", "woodbury_update", "inverse_scores", "inverse_update", "fit_rows",
    }  # fmt: skip
    text = (tmp_path / "fake_gpu_1_gb.md").read_text()
    assert "Not on this device: float32 Gram: gram_inverse: block size 128 needs" in text
    assert "float32 gradients: gram_accumulate: block size 128 needs" in text


@pytest.mark.parametrize("command", [["benchmarks/gpu.py"], ["-m", "benchmarks.kernels.gpu"]])
def test_refusal_without_a_device(command):
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *command, "--minutes", "8"],
        capture_output=True, text=True, env=env, cwd=BENCHMARKS.parent,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("benchmarks/gpu.py: needs a CUDA device; torch")


def test_refusal_without_kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(native, "_core", object())
    assert "built without CUDA kernels" in gpu_timer.reason_to_refuse()
    monkeypatch.setattr(native, "_failure", "broken\nfound: nothing")
    assert gpu_timer.reason_to_refuse() == "broken"


def test_arguments(tmp_path):
    arguments = ["--block", "8", "50", "--type", "bfloat16", "-k", "5", "--results", str(tmp_path)]
    found, folder = gpu_settings.parse(arguments, "")
    assert found == gpu_settings.Settings((8, 50), (torch.bfloat16,), (5,))
    assert folder == tmp_path
    assert gpu_settings.parse([], "") == (gpu_settings.Settings(), BENCHMARKS / "results" / "gpu")
    limited, _ = gpu_settings.parse(["--minutes", "8"], "")
    assert (limited.minutes, limited.row_seconds) == (8, gpu_settings.ROW_SECONDS)
    for wrong in (["--rounds", "19"], ["--minutes", "0"], ["--minutes", "nan"]):
        with pytest.raises(SystemExit):
            gpu_settings.parse(wrong, "")


class FakeEvent:
    """Stands for torch.cuda.Event: the time between two is the calls logged in between."""

    log: ClassVar[list[str]] = []

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.log.append("event")
        self.at = len(self.log)

    def synchronize(self):
        self.log.append("wait")

    def elapsed_time(self, end):
        return 1000.0 * (end.at - self.at - 1)


def test_events_surround_each_call_and_nothing_else(monkeypatch):
    log = FakeEvent.log = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    timer = object.__new__(gpu_timer.CudaTimer)
    timer._scratch = SimpleNamespace(sum=lambda: log.append("evict"))
    ours = [lambda name=name: log.append(name) for name in ("first copy", "second copy")]
    theirs = [lambda: log.extend(["theirs", "theirs"])]
    assert timer.alternate({"ours": ours, "theirs": theirs}, 3) == {
        "ours": [1.0, 1.0, 1.0],
        "theirs": [2.0, 2.0, 2.0],
    }
    calls = [what for what in log if what not in ("evict", "event", "wait")]
    rounds = gpu_timer.WARM_UP + 3
    assert len(calls) == 3 * rounds
    assert calls[0] != calls[3] and calls[0] == calls[6]
    around = ["evict", "event", calls[0], "event", "wait"]
    assert log[:5] == around
    assert log[5:11] == ["evict", "event", "theirs", "theirs", "event", "wait"]


@pytest.mark.gpu
def test_a_small_run_on_a_device(tmp_path):
    if gpu_timer.reason_to_refuse() is not None:
        pytest.skip(gpu_timer.reason_to_refuse())
    settings = replace(TINY, block_sizes=(50,), least_copy_bytes=1 << 20)
    settings = replace(settings, work=TINY_WORK)
    document = gpu.run(gpu_timer.CudaTimer(), settings, tmp_path, "")
    assert all(0 < row["seconds"] < 10 for row in document["rows"])
    assert len(document["whole_runs"]) == 1 and not document["left_out"]


# ---- the calculation ----------------------------------------------------------------


def test_a_row_of_the_calculation_by_hand():
    # 768 x 768 / 50 = 11796.48 and 768 x 3072 / 50 = 47185.92 blocks, rounded up.
    blocks = 12 * (4 * 11797 + 2 * 47186)
    assert roofline.WEIGHTS == 84_934_656
    assert blocks == roofline.BLOCKS
    found = {(r["device"], r["route"], r["k"]): r for r in roofline.rows()}
    row = found["A100 SXM 80 GB", "Gram float32", 64]
    accumulated = blocks * 16 * (50 * 51 * 4 + 64 * 50 * 4)
    scored = blocks * (50 * 51 // 2 * 4 + 50 * 4 + 50 * 4)
    reference = blocks * (1024 * 12 * 50**2 + 3 * 50 * 4)
    assert row["bytes"] == accumulated + scored
    assert row["traffic_ratio"] == pytest.approx(reference / (accumulated + scored))
    assert row["limit"] == "bytes"
    factor_flops = blocks * (2 * (50**3 // 3) + 50**2 + 16)
    bound = accumulated / 2039e9 + max(scored / 2039e9, factor_flops / 9.7e12)
    assert row["bound_s"] == pytest.approx(bound, rel=1e-3)
    assert row["traffic_ratio"] > 80


def test_which_routes_move_thirty_times_less():
    found = roofline.rows()
    roofline.check_goal(found)
    short = {(r["route"], r["k"]) for r in found if r["traffic_ratio"] < 30}
    assert short == {("reference", 1), ("Gram float64", 16)}


def test_the_written_calculation_is_current():
    results = BENCHMARKS / "results" / "roofline"
    document = json.loads((results / "calculated.json").read_text())
    assert document["outcomes"] == roofline.rows()
    text = (results / "calculated.md").read_text()
    assert text == roofline.markdown(document)
    assert "a calculation, not a measurement" in text


def test_a_bound_is_the_larger_time():
    cost = costs.Cost(100, 30, "float32")
    assert cost.bound_seconds(10, 10) == 10
    assert cost.bound_seconds(100, 10) == 3
    assert cost.times(3) == costs.Cost(300, 90, "float32")
