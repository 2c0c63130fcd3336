"""Global and shared memory, every access checked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]
UNSIGNED = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}
NOBODY, SEVERAL = -1, -2


class PtxError(Exception):
    """What a device would answer with undefined behaviour."""


def first(wrong: NDArray[np.bool_]) -> int:
    """The first place where something is wrong."""
    return int(np.nonzero(wrong)[0][0])


class Buffer:
    """Memory of the process that a kernel may touch, at its own address."""

    def __init__(self, memory: Bytes) -> None:
        self.memory = memory
        self.begin = memory.ctypes.data
        self.end = self.begin + memory.size
        self.base = self.begin & ~15
        # A copy as far from a 16-byte border, so that aligned addresses are aligned in it.
        self.data = np.zeros(-(-(self.end - self.base) // 16) * 16, np.uint8)
        self.data[self.begin - self.base :][: memory.size] = memory
        # By byte: the thread block that wrote it, or read it; a plain access, or an atomic one.
        self.writer = np.full(self.data.size, NOBODY, np.int32)
        self.reader = self.writer.copy()
        self.adder = self.writer.copy()

    def copy_back(self) -> None:
        self.memory[:] = self.data[self.begin - self.base :][: self.memory.size]


class Global:
    """All buffers of a launch."""

    def __init__(self, memories: Iterable[Bytes]) -> None:
        self.buffers = sorted((Buffer(m) for m in memories if m.size), key=lambda b: b.begin)
        self.begins = np.array([buffer.begin for buffer in self.buffers], np.int64)

    def find(self, address: Ints, size: int, block: Ints) -> list[tuple[Any, Buffer, Ints]]:
        """Which accesses go to which buffer, and where in it."""
        if (address % size).any():
            raise PtxError(f"misaligned access of {size} bytes")
        which = np.searchsorted(self.begins, address, "right") - 1
        found = []
        for index in np.unique(which):
            here: Any = slice(None) if (which == index).all() else np.nonzero(which == index)[0]
            at = address[here]
            buffer = self.buffers[index]
            if index < 0 or (at + size > buffer.end).any():
                past = at if index < 0 else at + size - buffer.end
                raise PtxError(
                    f"access of {size} bytes outside every buffer, thread block "
                    f"{block[here].max()}, {int(past.max())} bytes past one"
                )
            found.append((here, buffer, at - buffer.base))
        return found

    @staticmethod
    def check_races(buffer: Buffer, at: Ints, size: int, block: Ints, kind: str) -> None:
        """No thread block may touch what another one writes, unless both are atomic."""
        cells = at[:, None] + np.arange(size)
        mine = np.broadcast_to(block[:, None], cells.shape).astype(np.int32)
        others = [buffer.writer, buffer.adder]
        if kind == "read":
            own = buffer.reader
        elif kind == "write":
            own, others = buffer.writer, [*others, buffer.reader]
        else:
            own, others = buffer.adder, [buffer.writer, buffer.reader]
        for other in others:
            seen = other[cells]
            if ((seen != NOBODY) & (seen != mine)).any():
                raise PtxError("race between thread blocks on global memory")
        own[cells] = np.where((own[cells] == NOBODY) | (own[cells] == mine), mine, SEVERAL)
        at_once = (own[cells] != mine) & (own[cells] != SEVERAL)
        if kind == "write" and at_once.any():
            raise PtxError("race between thread blocks on global memory")
        own[cells[at_once]] = SEVERAL

    def load(self, address: Ints, size: int, count: int, block: Ints) -> Bytes:
        """Of each address ``count`` values of ``size`` bytes: ``[addresses, count * size]``."""
        whole = size * count
        out = np.empty((address.size, whole), np.uint8)
        for here, buffer, at in self.find(address, whole, block):
            self.check_races(buffer, at, whole, block[here], "read")
            out[here] = buffer.data[at[:, None] + np.arange(whole)]
        return out

    def store(self, address: Ints, values: Bytes, block: Ints) -> None:
        whole = values.shape[1]
        for here, buffer, at in self.find(address, whole, block):
            self.check_races(buffer, at, whole, block[here], "write")
            buffer.data[at[:, None] + np.arange(whole)] = values[here]

    def update(self, address: Ints, size: int, block: Ints, step: Any) -> NDArray[Any]:
        """Atomically ``step(k, old)`` for one address after the other; the old values."""
        old = np.empty(address.size, UNSIGNED[size])
        for k in range(address.size):
            here = slice(k, k + 1)
            [(_, buffer, at)] = self.find(address[here], size, block[here])
            self.check_races(buffer, at, size, block[here], "atomic")
            place = buffer.data[int(at[0]) : int(at[0]) + size].view(UNSIGNED[size])
            old[k] = place[0]
            place[0] = step(k, place[0])
        return old


class Shared:
    """The shared memory of all thread blocks of a launch: ``[blocks, bytes]``.

    Of every word (and of every byte that is accessed alone) it keeps the last write and the last
    two threads that read, with what orders them: the barriers that their thread block had passed,
    and those of the warp that the thread had.
    """

    def __init__(self, blocks: int, size: int, threads: int) -> None:
        self.size = size
        room = -(-max(size, 1) // 16) * 16
        self.data = np.full((blocks, room), 0xFF, np.uint8)
        self.written = np.zeros_like(self.data)
        self.last_write = np.full((blocks, room), NOBODY, np.int64)
        self.last_reads = [self.last_write.copy(), self.last_write.copy()]
        self.warp_read = np.full((blocks, room), NOBODY, np.int64)  # warp or several, and phase
        self.phase = np.zeros(blocks, np.int64)  # barriers passed by the block
        self.syncs = np.zeros((blocks, threads), np.int64)  # of the warp passed by the thread
        self.mask = np.zeros((blocks, threads), np.int64)  # of the last of them

    def pass_barrier(self, block: int) -> None:
        self.phase[block] += 1
        self.syncs[block] = 0

    def pass_warp_barrier(self, block: Ints, thread: Ints, mask: NDArray[np.uint32]) -> None:
        self.syncs[block, thread] += 1
        self.mask[block, thread] = mask

    def check_place(self, address: Ints, size: int) -> None:
        if (address % size).any():
            raise PtxError(f"misaligned access of {size} bytes of shared memory")
        if (outside := (address < 0) | (address + size > self.size)).any():
            at = int(address[first(outside)])
            raise PtxError(f"access of byte {at} of {self.size} bytes of shared memory")

    def unordered(self, event: Ints, block: Ints, thread: Ints) -> NDArray[np.bool_]:
        """Whether what happened to some places is not known to have happened before now."""
        phase, syncs, other = event >> 40, event >> 16 & 0xFFFFFF, event & 0xFFFF
        there = (event != NOBODY) & (phase == self.phase[block]) & (other != thread)
        together = (self.mask[block, thread] >> (other & 31) & 1).astype(bool)
        behind = together & (self.syncs[block, thread] > syncs)
        return there & ~((other >> 5 == thread >> 5) & behind)

    def check_order(
        self, address: Ints, size: int, block: Ints, thread: Ints, writes: bool
    ) -> None:
        cells = (address[:, None] + np.arange(0, size, 4)).ravel()
        per = cells.size // address.size
        b, t = np.repeat(block, per), np.repeat(thread, per)
        now = self.phase[b] << 40 | self.syncs[b, t] << 16 | t
        wrong = self.unordered(self.last_write[b, cells], b, t)
        warp = self.phase[b] << 16 | t >> 5
        if writes:
            for reads in self.last_reads:
                wrong |= self.unordered(reads[b, cells], b, t)
            seen = self.warp_read[b, cells]
            wrong |= (seen != NOBODY) & (seen >> 16 == self.phase[b]) & (seen != warp)
        if wrong.any():
            k = first(wrong)
            raise PtxError(f"race on byte {cells[k]} of shared memory, thread block {b[k]}, "
                           f"thread {t[k]}")  # fmt: skip
        if writes:
            self.last_write[b, cells] = now
            if (self.last_write[b, cells] != now).any():
                k = first(self.last_write[b, cells] != now)
                raise PtxError(f"two lanes write byte {cells[k]} of shared memory at once")
            return
        newest, before = self.last_reads
        for latest in range(2):  # the second time for lanes that read the same place at once
            new = newest[b, cells] != now
            before[b[new], cells[new]] = (newest[b, cells] if latest == 0 else now)[new]
            if latest == 0:
                newest[b[new], cells[new]] = now[new]
        seen = self.warp_read[b, cells]
        other = (seen != NOBODY) & (seen >> 16 == self.phase[b]) & (seen != warp)
        self.warp_read[b, cells] = np.where(other, self.phase[b] << 16 | 0xFFFF, warp)
        clash = self.warp_read[b, cells] != warp
        if (clash & ~other).any():  # several warps in one step
            self.warp_read[b[clash], cells[clash]] = self.phase[b[clash]] << 16 | 0xFFFF

    def load(self, address: Ints, size: int, count: int, block: Ints, thread: Ints) -> Bytes:
        whole = size * count
        self.check_place(address, whole)
        places = block[:, None], address[:, None] + np.arange(whole)
        if not self.written[places].all():
            k = first(~self.written[places].all(axis=1))
            raise PtxError(f"read of byte {address[k]} of shared memory, which nobody wrote, "
                           f"thread block {block[k]}, thread {thread[k]}")  # fmt: skip
        self.check_order(address, whole, block, thread, writes=False)
        return self.data[places]

    def store(self, address: Ints, values: Bytes, block: Ints, thread: Ints) -> None:
        whole = values.shape[1]
        self.check_place(address, whole)
        self.check_order(address, whole, block, thread, writes=True)
        places = block[:, None], address[:, None] + np.arange(whole)
        self.data[places] = values
        self.written[places] = 1
