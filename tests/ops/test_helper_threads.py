"""The threads of the CPU kernels: kept between calls, shared by callers, new after a fork."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from problems import gradients

from obert_kernels import GramFisher

SETUP = """
import os, threading
from pathlib import Path
import torch
from obert_kernels import GramFisher

def threads():
    status = Path("/proc/self/status").read_text()
    return int(status.split("Threads:")[1].split()[0])

torch.manual_seed(0)
torch.set_num_threads(1)
fisher = GramFisher(10_000, 50)
fisher.accumulate(torch.randn(60, 10_000))
"""

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def run(script: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", SETUP + script], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@needs_proc
def test_as_many_as_torch_has_and_no_more_with_every_call():
    script = """
started = 0
for count in (1, 2, 4, 4, 2, 1, 4):
    torch.set_num_threads(count)  # which starts threads of torch's own, up to torch 2.5
    before = threads()
    fisher.diagonal(0.1)
    started += threads() - before
    print(started)
"""
    found = [int(extra) for extra in run(script)]
    # torch keeps threads of its own for what it computes, but computes nothing large here
    assert found == [0, 1, 3, 3, 3, 3, 3]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_has_helpers_of_its_own():
    script = """
torch.set_num_threads(3)
expected = fisher.diagonal(0.1)
for _ in range(20):
    child = os.fork()
    if child == 0:
        same = all(torch.equal(fisher.diagonal(0.1), expected) for _ in range(5))
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(fisher.diagonal(0.1), expected)
print("done")
"""
    assert run(script) == ["done"]


def test_helpers_calculate_as_their_caller_does():
    """It may flush subnormal numbers to zero."""
    script = """
gradients = torch.full((1, 200_000), 1e-20)
for flush in (False, True, False):
    torch.set_flush_denormal(flush)
    for count in (1, 2, 2, 2, 2, 2, 2, 2, 2):
        torch.set_num_threads(count)
        fisher = GramFisher(200_000, 50, dtype=torch.float32)
        fisher.accumulate(gradients)
        print(int(fisher.gram.count_nonzero()))
"""
    entries = 4_000 * 50 * 51 // 2
    assert [int(line) for line in run(script)] == 9 * [entries] + 9 * [0] + 9 * [entries]


def test_many_callers_at_once():
    fishers = [GramFisher(5_000, size) for size in (1, 7, 50, 64)]
    for fisher in fishers:
        fisher.accumulate(gradients(80, 5_000))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        expected = [fisher.diagonal(0.1) for fisher in fishers]

        def ask(index: int) -> bool:
            which = index % len(fishers)
            return torch.equal(fishers[which].diagonal(0.1), expected[which])

        with ThreadPoolExecutor(6) as callers:
            assert all(callers.map(ask, range(600)))
    finally:
        torch.set_num_threads(before)
