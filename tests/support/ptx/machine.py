"""Runs kernels: who is where, control flow, barriers, and what instructions do to registers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arithmetic import TYPES
from .memory import Bytes, Global, PtxError, Shared
from .steps import AT_BARRIER, CONTROL, IN_WARP_OPERATION, LANES, READY, Step, step_of
from .text import Kernel, kernels

Array = NDArray[Any]
NOWHERE = 1 << 40
MOST_THREADS = 1 << 15  # that run side by side


class Program:
    """The kernels of one PTX module."""

    def __init__(self, text: str) -> None:
        self.kernels = kernels(text)
        self._steps: dict[str, list[Step]] = {}

    def steps(self, name: str) -> list[Step]:
        """What each instruction of a kernel does, made when the kernel is first launched."""
        if name not in self._steps:
            kernel = self.kernels[name]
            self._steps[name] = [step_of(kernel, i) for i in kernel.instructions]
        return self._steps[name]

    def launch(
        self,
        name: str,
        grid: Sequence[int],
        block: Sequence[int],
        parameters: Sequence[bytes],
        buffers: Iterable[Bytes],
        shared_bytes: int,
    ) -> None:
        """Run a kernel to its end.

        Args:
            name: of the entry, as in the text.
            grid: thread blocks, x alone.
            block: threads, x alone.
            parameters: the bytes of each.
            buffers: the memory that the parameters point to, at its own address.
            shared_bytes: dynamic shared memory.
        """
        if max(*grid[1:], *block[1:]) > 1:
            raise PtxError("grids and thread blocks of one dimension only")
        kernel, memory = self.kernels[name], Global(buffers)
        constants = np.zeros(sum(n for _, n in kernel.parameters.values()) + 64, np.uint8)
        for (begin, size), given in zip(kernel.parameters.values(), parameters, strict=True):
            if len(given) != size:
                raise PtxError(f"a parameter of {size} bytes, given {len(given)}")
            constants[begin : begin + size] = np.frombuffer(given, np.uint8)
        together = max(1, MOST_THREADS // block[0])
        with np.errstate(all="ignore"):
            for begin in range(0, grid[0], together):
                blocks = np.arange(begin, min(grid[0], begin + together))
                Machine(self, kernel, blocks, block[0], constants, memory, shared_bytes).run()
        for buffer in memory.buffers:
            buffer.copy_back()


class Machine:
    """Some thread blocks of a launch; every array has an element for each thread."""

    def __init__(
        self, program: Program, kernel: Kernel, blocks: Array, threads: int, constants: Bytes,
        memory: Global, shared_bytes: int,
    ) -> None:  # fmt: skip
        if threads % LANES:
            raise PtxError("thread blocks of whole warps only")
        self.kernel, self.steps = kernel, program.steps(kernel.name)
        self.joins = set(kernel.labels.values())
        self.threads, self.total = threads, len(blocks) * threads
        self.constants, self.memory = constants, memory
        self.shared = Shared(len(blocks), shared_bytes, threads)
        self.block = np.repeat(np.arange(len(blocks)), threads)
        self.global_block = np.repeat(blocks, threads)
        self.who = np.arange(self.total)
        self.thread = np.tile(np.arange(threads), len(blocks))
        self.lane = self.thread % LANES
        self.warp = np.arange(self.total) // LANES
        self.bit = np.uint32(1) << self.lane.astype(np.uint32)
        self.special = {  # see SPECIAL_REGISTERS
            "%tid.x": self.thread.astype(np.uint32),
            "%ctaid.x": self.global_block.astype(np.uint32),
            "%ntid.x": np.full(self.total, threads, np.uint32),
        }
        self.registers: dict[str, Array] = {}
        self.at = np.zeros(self.total, np.int64)  # the next instruction
        self.state = np.full(self.total, READY)
        self.gone = np.zeros(self.total, bool)
        self.waiting_masks = np.zeros(self.total, np.uint32)
        self.warp_starts = np.arange(0, self.total, LANES)

    def register(self, name: str) -> Array:
        found = self.registers.get(name)
        if found is None:
            kind = TYPES[self.kernel.registers[name]]
            bits = kind if kind.kind == "b" else np.dtype(f"u{kind.itemsize}")
            found = self.registers[name] = np.zeros(self.total, bits)
        return found

    def run(self) -> None:
        while not self.gone.all():
            front = np.where((self.state == READY) & ~self.gone, self.at, NOWHERE)
            here = int(front.min())
            if here == NOWHERE:
                self.release_barriers()
                continue
            chosen = front == here
            self.run_from(here, slice(None) if chosen.all() else np.nonzero(chosen)[0])

    def run_from(self, here: int, ix: Any) -> None:
        """Takes threads from an instruction to where others may join them, or they part."""
        instructions = self.kernel.instructions
        while True:
            if here >= len(instructions):
                raise PtxError(f"{self.kernel.name}: ran past the last instruction")
            instruction, taken = instructions[here], ix
            is_control = instruction.opcode[0] in CONTROL
            if is_control:
                self.at[ix] = here
            if instruction.guard:
                holds = self.register(instruction.guard)[ix] != instruction.negated
                if not holds.all():
                    taken = np.arange(self.total)[ix][holds]
                    if is_control:
                        self.at[ix] = here + 1
                        self.at[taken] = here
            try:
                if isinstance(taken, slice) or taken.size:
                    self.steps[here](self, taken)
            except (PtxError, ArithmeticError) as error:
                raise PtxError(f"{self.kernel.name}: {error}; {instruction}") from error
            here += 1
            if is_control:
                return
            if here in self.joins:
                self.at[ix] = here
                return

    def indices(self, ix: Any) -> Array:
        return np.arange(self.total)[ix]

    def of_warps(self, threads: Array) -> Array:
        """Of each warp the set of lanes that are among these threads."""
        return np.bitwise_or.reduceat(np.where(threads, self.bit, 0), self.warp_starts)

    def release_barriers(self) -> None:
        """Lets the thread blocks go on whose threads all stand at one barrier."""
        released = False
        for block in np.unique(self.block[~self.gone]):
            all_of = slice(block * self.threads, (block + 1) * self.threads)
            if not (self.state[all_of] == AT_BARRIER).all():
                continue
            places = np.unique(self.at[all_of])
            barrier = self.kernel.instructions[places[0]]
            if places.size > 1:
                raise PtxError(f"{self.kernel.name}: thread block {block} at several barriers, "
                               f"{barrier} and others")  # fmt: skip
            if "red" in barrier.opcode:  # bar.red.or.pred result, barrier, predicate
                predicate = barrier.operands[-1]
                held = self.register(predicate.lstrip("!"))[all_of] != predicate.startswith("!")
                self.register(barrier.operands[0])[all_of] = held.any()
            self.shared.pass_barrier(block)
            self.state[all_of] = READY
            self.at[all_of] += 1
            released = True
        if not released:
            left = ~self.gone
            waiting = [str(self.kernel.instructions[i]) for i in np.unique(self.at[left])]
            raise PtxError(f"{self.kernel.name}: deadlock, {left.sum()} threads wait at {waiting}; "
                           f"{self.gone.sum()} have exited")  # fmt: skip

    def meet(self, ix: Any, masks: Array, work: Callable[[Array, Array], None]) -> bool:
        """Runs ``work(threads, masks)`` for the teams that are complete; the others wait."""
        arrived = self.indices(ix)
        place = self.at[arrived[0]]
        if not (masks & self.bit[arrived]).all():
            raise PtxError("a warp operation whose mask leaves out the caller")
        alive = self.of_warps(~self.gone)
        if (masks & ~alive[self.warp[arrived]]).any():
            raise PtxError("a warp operation whose mask names a lane that has exited")
        self.state[arrived] = IN_WARP_OPERATION
        self.waiting_masks[arrived] = masks
        there = (self.state == IN_WARP_OPERATION) & (self.at == place) & ~self.gone
        present = self.of_warps(there)
        team = np.nonzero(there)[0]
        team = team[(self.waiting_masks[team] & ~present[self.warp[team]]) == 0]
        if team.size:
            work(team, self.waiting_masks[team])
            self.state[team] = READY
            self.at[team] = place + 1
        return True
