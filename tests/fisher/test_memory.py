"""The memory estimate, and that a call keeps to it."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from obert_kernels import FisherConfig, estimate_fisher
from obert_kernels.fisher import memory
from obert_kernels.fisher.gram import gram_bytes
from obert_kernels.fisher.memory import plan_passes
from obert_kernels.gradients.buffers import (
    GRADIENTS_PER_UPDATE,
    STREAMED_PER_UPDATE,
    gradient_buffer,
    gradient_buffers,
)
from obert_kernels.sparsity.patterns import UNSTRUCTURED

CONFIG = FisherConfig(block_size=50)
PLAN = {"streamed": False}

MEASURE = """
import gc, resource, sys
import torch
from torch import nn
import obert_kernels

model = nn.Sequential(*[nn.Linear(512, 512, bias=False) for _ in range(12)])
data = [torch.randn(4, 512) for _ in range(32)]
loss_fn = lambda m, b: m(b).square().mean()
weights = obert_kernels.find_weights(model, "re:.*")
# A first call on a small part pays for threads, libraries and caches.
obert_kernels.prune(model, data, 0.1, params="0", num_grads=2, loss_fn=loss_fn, damping=1e-6)
gc.collect()
rss = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
open("/proc/self/clear_refs", "w").write("5")  # restart the peak
limit, group = map(int, sys.argv[1:3])
damping = sys.argv[3] if sys.argv[3] == "auto" else float(sys.argv[3])
options = dict(max_memory=limit or None, samples_per_grad=group or None)
report = obert_kernels.prune(model, data, 0.5, params="re:.*", num_grads=32, loss_fn=loss_fn,
                             damping=damping, **options).report
status = open("/proc/self/status").read()
high = int(status.split("VmHWM:")[1].split()[0]) * 1024
weights_bytes = sum(w.numel() * 4 for w in weights.values())
print(high - rss, report.memory["gram"], report.memory["gathered gradients"],
      report.memory["passes"], weights_bytes)
"""


def measure(limit: int = 0, samples_per_grad: int = 0, damping: str = "1e-6") -> list[int]:
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(limit), str(samples_per_grad), damping],
        capture_output=True, text=True,
    )  # fmt: skip
    if "clear_refs" in result.stderr:
        pytest.skip("this system cannot restart the peak of resident memory")
    assert result.returncode == 0, result.stderr
    return [int(x) for x in result.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_is_the_gram_and_ten_per_cent_and_one_buffer():
    used, gram, _, passes, weights = measure()
    assert passes == 1
    buffer = GRADIENTS_PER_UPDATE * weights
    assert used <= 1.1 * gram + buffer


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_of_streamed_gradients_is_the_gram_and_ten_per_cent_and_those_of_one_layer():
    used, gram, _, passes, weights = measure(samples_per_grad=1)
    assert passes == 1
    assert used <= 1.1 * gram + STREAMED_PER_UPDATE * weights / 12 + weights
    assert STREAMED_PER_UPDATE * weights > 0.5 * gram, "those of all layers would show"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("damping", ["1e-6", pytest.param("auto", marks=pytest.mark.slow)])
def test_passes_keep_to_the_limit(damping):
    limit = 300 << 20
    used, _, _, passes, _ = measure(limit, damping=damping)
    assert passes > 1
    assert used <= limit + 0.1 * limit


def test_estimate():
    weights = {"a": nn.Parameter(torch.ones(30, 40)), "b": nn.Parameter(torch.ones(7, 8))}
    plan = plan_passes(weights, CONFIG, UNSTRUCTURED, None, **PLAN)
    assert plan.gram_bytes == (24 + 2) * 1275 * 8
    assert gram_bytes(101, 50, torch.float32) == 3 * 1275 * 4
    assert plan.buffer_bytes == (16 + 1) * 1256 * 4
    assert plan.passes == [["a", "b"]]
    whole = plan_passes(weights, CONFIG, UNSTRUCTURED, plan.total_bytes, **PLAN)
    assert whole.passes == [["a", "b"]]
    split = plan_passes(weights, CONFIG, UNSTRUCTURED, plan.total_bytes - 1, **PLAN)
    assert split.passes == [["a"], ["b"]]


def test_trials_are_held_where_there_is_room():
    weights = {name: nn.Parameter(torch.ones(50, 50)) for name in "abcd"}
    gram, numbers = 50 * 1275 * 8, 4 * 2500
    held = PLAN | {"streamed": True, "has_trials": True}
    whole = plan_passes(weights, CONFIG, UNSTRUCTURED, None, **held)
    assert whole.trials_held == 0 and whole.other_bytes == 12 * numbers
    least = gram + whole.buffer_bytes + 12 * numbers
    assert plan_passes(weights, CONFIG, UNSTRUCTURED, least, **held).trials_held == 0
    for trials in (1, 2, 3):
        plan = plan_passes(weights, CONFIG, UNSTRUCTURED, least + 5 * trials * numbers, **held)
        assert plan.trials_held == trials and plan.total_bytes == least + 5 * trials * numbers
        assert len(plan.passes) == 4
    # One pass is better than any number of trials in two.
    assert len(plan_passes(weights, CONFIG, UNSTRUCTURED, whole.total_bytes, **held).passes) == 1


def test_refusal_gives_the_figures():
    weights = {"a": nn.Parameter(torch.ones(300, 400))}
    with pytest.raises(MemoryError, match=r"needs \d+\.\d MiB .* max_memory is 1.0 MiB"):
        plan_passes(weights, CONFIG, UNSTRUCTURED, 1 << 20, **PLAN)


def test_a_refused_estimate_names_what_it_can_take(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda device: 1 << 20)
    model = nn.Sequential(nn.Linear(300, 400), nn.Linear(400, 10))
    with pytest.raises(MemoryError, match=r"free memory is 1\.0 MiB.*fewer matrices") as error:
        estimate_fisher(model, [], params="re:.*weight", num_grads=4, loss_fn=lambda m, b: b)
    assert "max_memory" not in str(error.value)


@pytest.mark.parametrize("n", [1, 50, 65_536, 70_001, 768 * 768, 768 * 3072])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gathered_gradients_do_not_begin_a_power_of_two_apart(n, dtype):
    buffer = gradient_buffer(2, n, dtype)
    assert buffer.shape == (2, n)
    assert buffer.dtype == dtype
    size, distance = n * dtype.itemsize, buffer.stride(0) * dtype.itemsize
    assert size <= distance <= 1.05 * size
    if size >= 2**18:  # smaller ones stay in the caches anyway
        assert distance // 4096 % 2 == 1
        assert distance % 4096 == 5 * 64


def test_gathered_gradients_of_all_matrices_stand_in_one_piece():
    weights = {
        "a": torch.zeros(768, 768), "b": torch.zeros(7, 9, dtype=torch.bfloat16),
        "c": torch.zeros(3, 5, dtype=torch.float64), "d": torch.zeros(300, 300),
    }  # fmt: skip
    elsewhere = {"e": torch.zeros(20, 30, device="meta")}
    buffers = gradient_buffers(3, elsewhere | weights)
    assert buffers.pop("e").device.type == "meta"
    assert len({buffer.untyped_storage().data_ptr() for buffer in buffers.values()}) == 1
    for index, (name, weight) in enumerate(weights.items()):
        alone = gradient_buffer(3, weight.numel(), weight.dtype)
        assert buffers[name].shape == alone.shape and buffers[name].dtype == alone.dtype
        assert buffers[name].stride() == alone.stride()
        buffers[name].fill_(index)
    for index, name in enumerate(weights):
        assert (buffers[name] == index).all()


def test_the_plan_counts_the_room_between_gathered_gradients():
    weight = {"w": nn.Parameter(torch.ones(768, 768))}
    plan = plan_passes(weight, CONFIG, UNSTRUCTURED, None, **PLAN)
    buffer = gradient_buffer(GRADIENTS_PER_UPDATE, 768 * 768)
    room = buffer.stride(0) * GRADIENTS_PER_UPDATE * 4
    assert plan.buffer_bytes == room + 768 * 768 * 4


def test_what_is_held_beside_the_gram():
    weights = {name: nn.Parameter(torch.ones(30, 40)) for name in "ab"}
    streamed = PLAN | {"streamed": True}
    plan = plan_passes(weights, CONFIG, UNSTRUCTURED, None, **streamed)
    assert plan.gradients_per_update == 32
    assert plan.buffer_bytes == 32 * 1200 * 4, "of the largest matrix"
    kept = plan_passes(weights, CONFIG, UNSTRUCTURED, None, keeps_weights=True, **streamed)
    assert kept.other_bytes - plan.other_bytes == 2 * 1200 * 4
    alone = {"a": weights["a"]}
    tight = plan_passes(alone, CONFIG, UNSTRUCTURED, None, **streamed).total_bytes - 1
    half = plan_passes(alone, CONFIG, UNSTRUCTURED, tight, **streamed)
    assert half.gradients_per_update == 16 and half.total_bytes <= tight
