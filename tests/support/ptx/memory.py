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


def as_bytes(values: NDArray[Any], size: int) -> Bytes:
    """``[values, size]``"""
    return np.ascontiguousarray(values).view(np.uint8).reshape(-1, size)


class Shared:
    """The shared memory of all thread blocks of a launch, one after the other.

    Of every word (and of every byte that is accessed alone) it keeps the last write and the last
    two threads that read, with what orders them: the barriers that their thread block had passed,
    and those of the warp that the thread had.
    """

    def __init__(self, blocks: int, size: int, threads: int) -> None:
        self.size = size
        self.room = -(-max(size, 1) // 16) * 16
        everything = blocks * self.room
        self.data = np.full(everything, 0xFF, np.uint8)
        self.written = np.zeros(everything, np.uint8)
        # Events: the phase of the block, the barriers of the warp, the thread; or nothing yet.
        self.last_write = np.full(everything, NOBODY, np.int64)
        self.newest_read, self.read_before = self.last_write.copy(), self.last_write.copy()
        self.warp_read = self.last_write.copy()  # phase and warp, or several
        self.phase = np.zeros(blocks, np.int64)  # barriers passed by the block
        self.threads = threads
        self.syncs = np.zeros(blocks * threads, np.int64)  # of the warp passed by the thread
        self.mask = np.zeros(blocks * threads, np.int64)  # of the last of them

    def pass_barrier(self, block: int) -> None:
        self.phase[block] += 1
        self.syncs[block * self.threads : (block + 1) * self.threads] = 0

    def pass_warp_barrier(self, threads: Ints, mask: NDArray[np.uint32]) -> None:
        self.syncs[threads] += 1
        self.mask[threads] = mask

    def places(self, address: Ints, size: int, block: Ints) -> Ints:
        """Where accesses go, of all thread blocks."""
        if (address & size - 1).any():
            raise PtxError(f"misaligned access of {size} bytes of shared memory")
        if address.min() < 0 or address.max() + size > self.size:
            at = int(address[first((address < 0) | (address + size > self.size))])
            raise PtxError(f"access of byte {at} of {self.size} bytes of shared memory")
        return block * self.room + address

    def unordered(self, event: Ints, now: Ints, who: Ints) -> NDArray[np.bool_]:
        """Whether what happened to some places is not known to have happened before now."""
        recent = (event >> 40 == now >> 40) & (event != NOBODY) & (event & 0xFFFF != now & 0xFFFF)
        if not recent.any():
            return recent
        other = event & 0xFFFF
        behind = (self.syncs[who] > event >> 16 & 0xFFFFFF) & (
            self.mask[who] >> (other & 31) & 1 == 1
        )
        return recent & ~((other >> 5 == (now & 0xFFFF) >> 5) & behind)

    def check_order(self, places: Ints, size: int, block: Ints, who: Ints, writes: bool) -> None:
        if size > 4:
            per = size // 4
            places = (places[:, None] + np.arange(0, size, 4)).ravel()
            block, who = np.repeat(block, per), np.repeat(who, per)
        thread, phase = who - block * self.threads, self.phase[block]
        now = phase << 40 | self.syncs[who] << 16 | thread
        warp, seen = phase << 16 | thread >> 5, self.warp_read[places]
        wrong = self.unordered(self.last_write[places], now, who)
        if writes:
            wrong |= self.unordered(self.newest_read[places], now, who)
            wrong |= self.unordered(self.read_before[places], now, who)
            wrong |= (seen >> 16 == phase) & (seen != NOBODY) & (seen != warp)
        if wrong.any():
            k = first(wrong)
            raise PtxError(f"race on byte {places[k] % self.room} of shared memory, thread block "
                           f"{block[k]}, thread {thread[k]}")  # fmt: skip
        if writes:
            self.last_write[places] = now
            if (lost := self.last_write[places] != now).any():
                at = places[first(lost)] % self.room
                raise PtxError(f"two lanes write byte {at} of shared memory at once")
            return
        several = (seen >> 16 == phase) & (seen != NOBODY) & (seen != warp)
        self.warp_read[places] = np.where(several, phase << 16 | 0xFFFF, warp)
        if (at_once := (self.warp_read[places] != warp) & ~several).any():
            self.warp_read[places[at_once]] = phase[at_once] << 16 | 0xFFFF
        newest = self.newest_read[places]
        if (new := newest != now).any():
            self.read_before[places[new]] = newest[new]
            self.newest_read[places[new]] = now[new]
            # Of lanes that read the same place at once the one before the last.
            if (lost := self.newest_read[places] != now).any():
                self.read_before[places[lost]] = now[lost]

    def load(self, address: Ints, size: int, count: int, block: Ints, who: Ints) -> Bytes:
        whole = size * count
        places = self.places(address, whole, block)
        word = min(whole, 8)
        if not (
            there := self.written.view(f"u{word}")[places // word] == 2 ** (8 * word) - 1
        ).all():
            k = first(~there)
            raise PtxError(f"read of byte {address[k]} of shared memory, which nobody wrote, "
                           f"thread block {block[k]}, thread {who[k] % self.threads}")  # fmt: skip
        self.check_order(places, whole, block, who, writes=False)
        return as_bytes(self.data.view(f"V{whole}")[places // whole], whole)

    def store(self, address: Ints, values: Bytes, block: Ints, who: Ints) -> None:
        whole = values.shape[1]
        places = self.places(address, whole, block)
        self.check_order(places, whole, block, who, writes=True)
        self.data.view(f"V{whole}")[places // whole] = values.view(f"V{whole}")[:, 0]
        self.written.view(f"V{whole}")[places // whole] = np.full(whole, 0xFF, np.uint8).view(
            f"V{whole}"
        )
