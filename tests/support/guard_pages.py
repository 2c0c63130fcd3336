"""Runs operators with all they read and write next to forbidden memory.

    python tests/guard_pages.py avx2

A program of its own, because touching that memory ends it.  Prints "untouched" otherwise.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from problems import DAMPING, fresh_inverse, gradients
from torch import Tensor

from obert_kernels import ops
from obert_kernels.ops import living, native
from obert_kernels.ops.packing import gram_shape

PAGE = mmap.PAGESIZE
GRADIENTS = 20
# Groups: single weights, small ones, ones that do not divide the blocks, one above 16.
GROUPS = (1, 4, 5, 20)


def forbid(address: int) -> None:
    """Take all rights from one page."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")


def guarded(values: Tensor, at_end: bool) -> Tensor:
    """Copy to where a forbidden page begins right behind the last value, or ends right before
    the first."""
    size = values.numel() * values.element_size()
    room = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, room + 2 * PAGE)
    first = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    start = PAGE + (room - size if at_end else 0)
    copy = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=start)
    copy.copy_(values.flatten())
    forbid(first)
    forbid(first + PAGE + room)
    assert copy.data_ptr() == first + start
    return copy.view(values.shape)


def same(actual: Tensor, expected: Tensor) -> None:
    assert not actual.isnan().any()
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


def check(block_size: int, n: int, at_end: bool) -> None:
    """Every operator with an inverse, against what it gives in ordinary memory."""
    core, threads = native.core(), torch.get_num_threads()
    g = gradients(GRADIENTS, n)
    gram = torch.zeros(gram_shape(n, block_size), dtype=torch.float64)
    ops.gram_accumulate(gram, g, block_size)
    fisher = (n, block_size, float(GRADIENTS), DAMPING)
    status = ops.new_status()
    nan = float("nan")

    for dtype, code in ((torch.float32, 0), (torch.float64, 1)):
        out = guarded(torch.full(gram.shape, nan, dtype=dtype), at_end)
        fisher_of_gram = native.fisher_parameters(core, gram, *fisher, status)
        core.gram_inverse(threads, fisher=fisher_of_gram, inverse=out.data_ptr(), inverse_type=code)
        same(out, ops.gram_inverse(gram, *fisher, dtype, status))

    for dtype in (torch.float32, torch.bfloat16):
        state = guarded(fresh_inverse(gram.shape[0], block_size), at_end)
        expected = state.clone()
        rows = g.to(dtype)
        ops.woodbury_update(state, guarded(rows, at_end), float(GRADIENTS), status)
        ops.woodbury_update(expected, rows, float(GRADIENTS), status)
        same(state, expected)

    for weight_code, weight in enumerate((torch.randn(n), torch.randn(n, dtype=torch.float64))):
        keep = torch.rand(n) < 0.5
        near = [guarded(t, at_end) for t in (weight, keep)]
        for c in GROUPS:
            scores = guarded(torch.zeros(n // c), at_end)
            given = {"num_weights": n, "block_size": block_size, "inverse": state.data_ptr()}
            given["status"] = status.data_ptr()
            core.inverse_scores(
                threads,
                **given,
                weight=near[0].data_ptr(),
                weight_type=weight_code,
                group_size=c,
                scores=scores.data_ptr(),
            )
            same(scores, ops.inverse_scores(expected, weight, c, status))
            for joint in (False, True):
                new = guarded(torch.full_like(weight, nan), at_end)
                increase = guarded(torch.zeros(gram.shape[0], dtype=torch.float64), at_end)
                update = core.Update(
                    weight=near[0].data_ptr(),
                    weight_type=weight_code,
                    keep=near[1].data_ptr(),
                    group_size=c,
                    rule=int(joint),
                    new_weight=new.data_ptr(),
                    predicted_increase=increase.data_ptr(),
                )
                core.inverse_update(threads, **given, update=update)
                wanted = ops.inverse_update(expected, weight, keep, c, joint, True, status)
                same(new, wanted[0])
                same(increase, wanted[1])
    assert status.item() == -1


def check_living(block_size: int, at_end: bool) -> None:
    """Blocks of this size and of all smaller ones, some places of which have no weight."""
    sizes = torch.arange(block_size, -1, -1)
    first_place = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    places = int(first_place[-1])
    source = torch.randperm(places).int()
    source[torch.rand(places) < 0.1] = -1
    triangles = sizes * (sizes + 1) // 2
    tables = triangles.cumsum(0) - triangles, first_place, source
    near = [guarded(table, at_end) for table in tables]
    for dtype in (torch.float32, torch.float64):
        for k in (1, 9, 33):
            for rows in (gradients(k, places), gradients(k, places).bfloat16()):
                gram = torch.ones(int(triangles.sum()), dtype=dtype)
                state = guarded(gram, at_end)
                living.gram_accumulate_living(state, guarded(rows, at_end), *near)
                living.gram_accumulate_living(gram, rows, *tables)
                same(state, gram)


def check_fit(n: int, at_end: bool) -> None:
    """Supports of every size, some with several rows."""
    g = gradients(2 * n, n).double()
    keep = torch.rand(n + 1, n).argsort(1) < torch.arange(n + 1)[:, None]
    first_row = torch.cat([torch.zeros(1), torch.arange(n + 1) % 3]).cumsum(0).long()
    targets = torch.randn(int(first_row[-1]), n, dtype=torch.float64)
    given = g.T @ g + torch.eye(n), targets, keep, first_row
    fitted = guarded(torch.full_like(targets, float("nan")), at_end)
    near = [guarded(tensor, at_end) for tensor in given]
    names = ("moments", "targets", "keep", "first_row")
    status = ops.new_status()
    native.core().fit_rows(
        torch.get_num_threads(),
        num_supports=len(keep),
        num_rows=len(targets),
        num_columns=n,
        **{name: tensor.data_ptr() for name, tensor in zip(names, near, strict=True)},
        workspace=0,
        num_workspaces=0,
        workspace_size=0,
        fitted=fitted.data_ptr(),
        status=status.data_ptr(),
    )
    same(fitted, ops.fit_rows(*given, status))
    assert status.item() == -1


def main(name: str) -> None:
    assert native.core().select_instruction_set(name)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for block_size in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 50, 64, 65, 128, 256):
        # One block and several, full and short, and so many that a few are taken at once; all of
        # them multiples of the groups.
        for n in {20, 160, -(-3 * block_size // 20) * 20, 2080 if block_size < 64 else 160}:
            for at_end in (False, True):
                check(block_size, n, at_end)
        for at_end in (False, True):
            check_living(block_size, at_end)
            if block_size <= 65:
                check_fit(block_size, at_end)
    print("untouched")


if __name__ == "__main__":
    main(sys.argv[1])
