"""A device that does not exist, for the logic of benchmarks/kernels/gpu."""

from __future__ import annotations

import itertools

import torch

from benchmarks.kernels.gpu import fit, kernels, rows, whole_runs
from benchmarks.kernels.gpu.settings import Settings

TINY = Settings(
    block_sizes=(4, 50),
    gradient_types=(torch.float32, torch.bfloat16),
    gradients_per_call=(3,),
    validation_blocks=2,
    least_copy_bytes=1000,
    ceiling_bytes=4000,
    matrix_size=10,
    fits=((70, 0.2),),
    work=whole_runs.Work(models=()),
)
TIMES = {
    "copy": 1e-6,
    "float32 product": 1e-6,
    "float64 product": 2e-6,
    rows.OURS: 5e-6,
    kernels.REFERENCE: 20e-6,
    kernels.TORCH: 30e-6,
    kernels.ALL_WEIGHTS: 40e-6,
    fit.TORCH: 50e-6,
    whole_runs.SAME_RULES: 2e-6,
    whole_runs.DEFAULT: 4e-6,
}
TINY_WORK = whole_runs.Work(
    models=(whole_runs.Model("tiny", 1, 8, 2, vocabulary=30),),
    gradients=4,
    texts_per_gradient=2,
    tokens=5,
    texts_at_once=4,
    rounds=2,
)


class FakeTimer:
    """Runs every call once and returns the times it was told, one of them an outlier."""

    device = torch.device("cpu")
    name = "Fake GPU (1 GB)"

    def __init__(self, times=TIMES, l2_bytes=2000, free=1 << 20):
        self.times, self.l2_bytes, self.free = times, l2_bytes, free
        self.asked = []

    def free_bytes(self):
        return self.free

    def once(self, name, call):
        call()
        return self.times[name], 3 << 30

    def alternate(self, contenders, rounds, limit=None):
        self.asked.append({name: len(calls) for name, calls in contenders.items()})
        for call in itertools.chain.from_iterable(contenders.values()):
            call()
        return {name: [self.times[name]] * (rounds - 1) + [1.0] for name in contenders}

    def describe(self):
        return {"L2": "tiny"}
