"""What a CUDA graph needs of the operators, shown with launches that are recorded on the host.

The kernels' sources compile against tests/support/host_cuda, which knows no function that
allocates, copies, waits or makes a stream: they cannot call one. What is left to show is that
every launch goes to the caller's stream, and that it can be kept and run again later on the same
memory.
"""

from __future__ import annotations

import pytest
import torch
from problems import DAMPING, gradients, gram_of, relative_error

from obert_kernels import ops
from obert_kernels.ops import native, reference
from obert_kernels.ops.living import gram_accumulate_living

STREAM = 0x5EED
M = 30


@pytest.fixture
def recording(cuda_on_host):
    """Operators keep their launches instead of running them, on a stream with a known name."""
    cuda_on_host.set_recording(True)
    with native.using(cuda_on_host, STREAM):
        yield cuda_on_host
    cuda_on_host.set_recording(False)


def operators(size: int) -> dict:
    """Name to a call that returns the tensors it changes or makes."""
    n = (5 * size + size // 2) // 4 * 4  # groups of four, a short last block
    g, status = gradients(M, n), ops.new_status()
    gram = gram_of(g, size)
    inverse = reference.gram_inverse(gram, n, size, M, DAMPING, torch.float32, status)
    weight, keep = torch.randn(n), torch.rand(n) < 0.4
    whole = torch.ones(n, dtype=torch.bool)
    fisher = (size, float(M), DAMPING, status)
    made = (gram, n, size, float(M), DAMPING, torch.float32, status)
    target, living = torch.zeros_like(gram), torch.zeros(gram.numel(), dtype=gram.dtype)
    tables = (torch.arange(6) * gram.shape[1], torch.arange(7) * size, torch.arange(n).int())
    tables[1][-1] = n  # the last block is short
    calls = {
        "gram_accumulate": lambda: (ops.gram_accumulate(target, g, size), target)[1:],
        "gram_accumulate_living": lambda: (gram_accumulate_living(living, g, *tables), living)[1:],
        "gram_inverse": lambda: (ops.gram_inverse(*made),),
        "gram_diagonal": lambda: (ops.gram_diagonal(*made),),
        "gram_solve": lambda: (ops.gram_solve(gram, weight, *fisher),),
        "gram_n_of_m": lambda: (ops.gram_n_of_m(gram, weight, whole, 1, 2, *fisher),),
        "woodbury_update": lambda: (
            ops.woodbury_update(inverse, g, float(M), status), inverse)[1:],
    }  # fmt: skip
    for c in (1, 4):
        calls |= {
            f"gram_scores {c}": lambda c=c: (ops.gram_scores(gram, weight, c, *fisher),),
            f"inverse_scores {c}": lambda c=c: (ops.inverse_scores(inverse, weight, c, status),),
            f"gram_greedy_scores {c}": lambda c=c: (
                ops.gram_greedy_scores(gram, weight, keep, c, *fisher),
            ),
        }
        for joint in (False, True):
            calls |= {
                f"gram_update {c} {joint}": lambda c=c, j=joint: ops.gram_update(
                    gram, weight, keep, c, j, *fisher
                ),
                f"inverse_update {c} {joint}": lambda c=c, j=joint: ops.inverse_update(
                    inverse, weight, keep, c, j, True, status
                ),
            }
    return calls


NAMES = list(operators(4))


@pytest.mark.parametrize("size", [4, 50, 100])
@pytest.mark.parametrize("name", NAMES)
def test_launches_go_to_the_callers_stream_and_can_be_run_again(recording, name, size):
    call = operators(size)[name]
    outputs = call()
    assert recording.launch_streams() == [STREAM]  # nothing else was asked of the device

    # In a graph torch's own zeroing of outputs would be run again, too.
    adds_up = name in ("gram_accumulate", "gram_accumulate_living", "woodbury_update")
    before = [output.clone() if adds_up else torch.zeros_like(output) for output in outputs]
    results = []
    for _ in range(2):
        for output in outputs:
            if not adds_up:
                output.zero_()
        recording.replay()
        results.append([output.clone() for output in outputs])
    assert any(not torch.equal(a, b) for a, b in zip(before, results[0], strict=True))

    # The same calls, run at once.
    recording.set_recording(False)
    for output, start in zip(outputs, before, strict=True):
        output.copy_(start)
    for result in results:
        for a, b in zip(result, call(), strict=True):
            assert torch.equal(a, b)


def test_a_kept_launch_keeps_its_shared_memory(recording):
    """Another of the same kernel, which asks for less, comes before it is run."""
    kept, status = [], ops.new_status()
    for size in (160, 130):
        gram, v = gram_of(gradients(M, size), size), torch.randn(size)
        fisher = (size, float(M), DAMPING, status)
        kept.append((gram, v, fisher, ops.gram_solve(gram, v, *fisher)))
    recording.replay()
    for gram, v, fisher, found in kept:
        expected = reference.gram_solve(gram, v.double(), *fisher)
        assert relative_error(found, expected) < 1e-6
