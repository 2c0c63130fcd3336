"""Runs the PTX that nvcc makes, unchanged, on the CPU, all thread blocks of a launch side by side.

    program = Program(Path("kernel.ptx").read_text())
    program.launch("name_of_the_entry", grid, block, parameters, buffers, shared_bytes)

Threads that stand at the same instruction take it together, the ones furthest behind first.  Each
of these is a PtxError that names the instruction, the thread block and the thread:
* an access outside every buffer, or not aligned; of shared memory also a read of what no thread of
  the block wrote;
* a race on shared memory: an access that no barrier orders after an earlier one, of another warp
  or of another lane of the same warp; shuffles and votes order no memory;
* a race on global memory between thread blocks, one of the accesses not atomic;
* a barrier that not all threads of a block reach, a warp operation whose mask leaves out the caller
  or names a lane that has exited, a shuffle that reads a lane outside its mask, a deadlock.

Only what nvcc makes of this project's kernels is known, any other instruction is an error: no
function calls, local memory, tensor cores or asynchronous copies.  A fused multiply-add in float64
has a mantissa of 64 bits before it is rounded.  It says nothing about speed, and runs PTX, not the
machine code that ptxas makes of it.
"""

from .machine import Program
from .memory import PtxError

__all__ = ["Program", "PtxError"]
