"""The interpreter of PTX in tests/support/ptx: it runs what is right and names what is wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problems import DAMPING, gradients, gram_of, relative_error
from ptx import Program, PtxError
from ptx.arithmetic import compare, convert, fused, high_half, leading_zeros, ones, permute
from ptx_replay import NVCC, off_border, program, program_of_changed, replay

from obert_kernels import ops
from obert_kernels.ops import reference
from obert_kernels.ops.living import gram_accumulate_living

# ---- kernels written by hand ---------------------------------------------------------

HEAD = """
.version 8.0
.target sm_75
.address_size 64
.extern .shared .align 16 .b8 memory[];
.entry kernel(
    .param .u64 out,
    .param .u32 count
)
{
    .reg .pred %p<4>;
    .reg .b32 %r<20>;
    .reg .f32 %f<8>;
    .reg .b64 %rd<8>;
    ld.param.u64 %rd1, [out];
    ld.param.u32 %r1, [count];
    mov.u32 %r2, %tid.x;
    mov.u32 %r3, %ctaid.x;
    mov.u32 %r4, %ntid.x;
    mad.lo.s32 %r5, %r3, %r4, %r2;
    shl.b32 %r6, %r2, 2;                // this thread's word of shared memory
    xor.b32 %r7, %r6, 4;                // that of its neighbour
    mul.wide.s32 %rd2, %r5, 4;
    add.s64 %rd3, %rd1, %rd2;           // its word of the output
"""


def run(body: str, threads: int = 64, blocks: int = 2, words: int = 128, shared: int = 256):
    """What the kernel leaves in its output; count is 10."""
    out = np.full(words, 7, np.uint32)
    parameters = [out.ctypes.data.to_bytes(8, "little"), (10).to_bytes(4, "little")]
    program = Program(HEAD + body + "\nret;\n}\n")
    program.launch("kernel", (blocks, 1, 1), (threads, 1, 1), parameters, [out.view(np.uint8)],
                   shared)  # fmt: skip
    return out


def test_threads_branch_and_loop():
    out = run("""
        mov.u32 %r8, 0;
        mov.u32 %r9, 0;
    $again:
        setp.ge.u32 %p1, %r9, %r2;
        @%p1 bra $done;
        add.s32 %r8, %r8, %r9;
        add.s32 %r9, %r9, 1;
        bra.uni $again;
    $done:
        setp.lt.u32 %p2, %r5, 100;
        @!%p2 mov.u32 %r8, %r1;
        st.global.u32 [%rd3], %r8;
    """)
    threads = np.arange(128) % 64
    assert out.tolist() == np.where(np.arange(128) < 100, threads * (threads - 1) // 2, 10).tolist()


def test_neighbours_exchange_through_shared_memory_and_by_shuffles():
    out = run("""
        st.shared.u32 [%r6], %r2;
        bar.warp.sync -1;
        ld.shared.u32 %r8, [%r7];
        shfl.sync.bfly.b32 %r9|%p1, %r2, 16, 31, -1;
        bar.sync 0;
        {
            .reg .pred %p1;
            setp.eq.u32 %p1, %r2, 40;
            bar.red.or.pred %p2, 0, %p1;
        }
        vote.sync.any.pred %p3, %p1, -1;
        selp.u32 %r10, 1000, 0, %p2;
        mad.lo.s32 %r8, %r8, 100000, %r9;
        add.s32 %r8, %r8, %r10;
        st.global.u32 [%rd3], %r8;
    """)
    threads = np.arange(64)
    expected = (threads ^ 1) * 100000 + (threads ^ 16) + 1000
    assert out.tolist() == [*expected, *expected]


def test_atomics_add_up():
    out = run("""
        atom.global.add.u32 %r8, [%rd1], 1;
        ret;
    """)
    assert out[0] == 7 + 128 and (out[1:] == 7).all()


MISTAKES = {
    "outside every buffer": "st.global.u32 [%rd3+4096], %r2;",
    "misaligned access of 4 bytes": "st.global.u32 [%rd3+2], %r2;",
    "bytes of shared memory": "st.shared.u32 [%r6+4], %r2;",
    "misaligned access of 8 bytes of shared": "st.shared.v2.u32 [%r6], {%r2, %r2};",
    "which nobody wrote": "ld.shared.u32 %r8, [%r6];",
    # Of lanes of one warp, read after write.
    "race on byte 4 of": "st.shared.u32 [%r6], %r2; ld.shared.u32 %r8, [%r7];",
    # A shuffle is no barrier.
    "race on byte": """
        st.shared.u32 [%r6], %r2;
        shfl.sync.bfly.b32 %r9, %r2, 16, 31, -1;
        ld.shared.u32 %r8, [%r7];
    """,
    # Write after read.
    "thread 0; line": """
        st.shared.u32 [%r6], %r2;
        bar.warp.sync -1;
        ld.shared.u32 %r8, [%r7];
        st.shared.u32 [%r6], %r8;
    """,
    # Of two warps: a barrier of one is not enough.
    "race on byte 128": """
        st.shared.u32 [%r6], %r2;
        bar.warp.sync -1;
        xor.b32 %r7, %r6, 128;
        ld.shared.u32 %r8, [%r7];
    """,
    # A barrier of other lanes is not enough.
    "race on": """
        st.shared.u32 [%r6], %r2;
        and.b32 %r8, %r2, 1;
        setp.eq.u32 %p1, %r8, 1;
        selp.u32 %r9, 0xaaaaaaaa, 0x55555555, %p1;
        bar.warp.sync %r9;
        ld.shared.u32 %r8, [%r7];
    """,
    "two lanes write": "st.shared.u32 [%r1+2], %r2;",
    "race between thread blocks": "st.global.u32 [%rd1], %r2;",
    "between thread blocks on": "ld.global.u32 %r8, [%rd1]; st.global.u32 [%rd1], %r8;",
    "deadlock": "setp.lt.u32 %p1, %r2, 32; @%p1 bra $end; bar.sync 0;\n$end:",
    "mask leaves out the caller": "bar.warp.sync 1;",
    "lane that has exited": "setp.eq.u32 %p1, %r2, 3; @%p1 ret; bar.warp.sync -1;",
    "lane outside its mask": """
        and.b32 %r8, %r2, 24;
        shl.b32 %r9, 255, %r8;
        shfl.sync.bfly.b32 %r10, %r2, 8, 31, %r9;
    """,
    "an instruction nobody knows": "lop3.b32 %r8, %r2, %r2, %r2, 42;",
    "division of integers by zero": "mov.u32 %r8, 0; div.u32 %r9, %r2, %r8;",
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_named(message):
    body = MISTAKES[message]
    with pytest.raises(PtxError, match=message):
        run(body.replace("; ", ";\n"))


# ---- what instructions compute -------------------------------------------------------


def test_arithmetic():
    x = np.array([1.0, np.nan, np.inf, -3.7, 3e9, -3e9])
    assert convert(x, np.dtype("i4")).tolist() == [1, 0, 2**31 - 1, -3, 2**31 - 1, -(2**31)]
    nan = np.array([np.nan])
    for how, ordered in {"ltu": True, "neu": True, "lt": False, "ne": False, "geu": True}.items():
        assert compare(how, nan, nan + 1).item() is ordered, how
    a = np.array([0x89ABCDEF], np.uint32)
    assert leading_zeros(a >> 5).item() == 5 and ones(a).item() == 20
    assert permute(a, a, np.array([0x0123], np.uint32)).item() == 0xEFCDAB89
    assert high_half(a.view("i4"), a.view("i4")).item() == (-(0x100000000 - a.item())) ** 2 >> 32
    b = np.float32(1 + 2.0**-12)
    one = np.array([b], np.float32)
    exact = float(b) * float(b) - 1
    assert fused(one, one, np.array([-1], np.float32)).item() == np.float32(exact)
    assert fused(one, one, np.array([-1], np.float32)).item() != one.item() ** 2 // 1 - 1


# ---- kernels that nvcc compiles in seconds -------------------------------------------


def check_living(host, size: int, dtype: torch.dtype, changed: Program | None = None) -> None:
    blocks, entries = 5, size * (size + 1) // 2
    n = blocks * size
    g = off_border(gradients(3, n, 1.0, dtype), 1)
    gram = off_border(torch.randn(blocks * entries), 1)
    tables = (torch.arange(blocks) * entries, torch.arange(blocks + 1) * size,
              off_border(torch.arange(n, dtype=torch.int32), 3))  # fmt: skip
    expected = gram.double()
    reference.gram_accumulate_living(expected, g.float(), *tables)
    for _ in replay(host, lambda: gram_accumulate_living(gram, g, *tables), gram, g, *tables,
                    architectures=(75,), changed=changed):  # fmt: skip
        assert relative_error(gram, expected) < 1e-6


@NVCC
@pytest.mark.parametrize("size", [8, 36])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gram_of_living_weights(cuda_on_host, size, dtype):
    """By a warp, and by a thread block."""
    check_living(cuda_on_host, size, dtype)


# A vote brings the lanes of a warp together without ordering what they wrote: only this notices.
@NVCC
def test_a_vote_without_a_barrier_is_a_race_of_lanes(cuda_on_host, tmp_path):
    statement = "__syncwarp(mask());  // a vote orders no memory"
    changed = program_of_changed(tmp_path, "gram_living", "common.cuh", statement, "")
    with pytest.raises(PtxError, match="race on byte"):
        check_living(cuda_on_host, 8, torch.float32, changed)


@NVCC
@pytest.mark.parametrize(("size", "group"), [(8, 1), (8, 4), (20, 4)])
def test_scores_of_a_given_inverse(cuda_on_host, size, group):
    n = 6 * size
    inverse = reference.gram_inverse(
        gram_of(gradients(40, n), size), n, size, 40.0, DAMPING, torch.float32, ops.new_status()
    )
    inverse, weight, status = (
        off_border(inverse, 1),
        off_border(torch.randn(n), 3),
        ops.new_status(),
    )
    expected = reference.inverse_scores(inverse, weight, group, ops.new_status())
    for scores in replay(cuda_on_host, lambda: ops.inverse_scores(inverse, weight, group, status),
                         inverse, weight, status, architectures=(75,)):  # fmt: skip
        assert relative_error(scores, expected) < 3e-7
        assert status.item() == -1


# Sources whose kernels record failures, and those that add parts of groups besides.
RECORD = ["woodbury", "factor", "update", "greedy", "n_of_m", "inverse_update", "inverse_scores"]
ADD = {"inverse_scores": "group_scores_kernel", "factor": "scores_kernel", "greedy": "greedy"}


@NVCC
@pytest.mark.parametrize("source", [
    pytest.param(source, marks=() if source == "inverse_scores" else pytest.mark.slow)
    for source in RECORD
])  # fmt: skip
@pytest.mark.parametrize("arch", [75, pytest.param(120, marks=pytest.mark.slow)])
def test_atomics_are_atomics(source, arch):
    for name, kernel in program(source, arch).kernels.items():
        written = [
            ".".join(i.opcode) for i in kernel.instructions if i.opcode[0] in ("atom", "red")
        ]
        smallest = [opcode for opcode in written if opcode.endswith("global.min.u64")]
        added = [opcode for opcode in written if opcode.endswith("global.add.f32")]
        assert smallest, name
        assert len(added) == 2 * (source in ADD and ADD[source] in name), name
        assert len(written) == len(smallest) + len(added)
