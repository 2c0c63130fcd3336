"""What each instruction does to the registers and the memory of a machine."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .arithmetic import COUNTED, SAME_TYPE, TYPES, WIDE, compare, convert, select
from .memory import Bytes, PtxError, as_bytes
from .text import Instruction, Kernel, split_operands

if TYPE_CHECKING:
    from .machine import Machine

Array = NDArray[Any]
LANES = 32
READY, AT_BARRIER, IN_WARP_OPERATION = range(3)
SPECIAL_REGISTERS = ("%tid.x", "%ctaid.x", "%ntid.x")
ADDRESS = re.compile(r"\[\s*([^+\]\s]+)\s*(?:\+\s*(-?\d+))?\s*\]")
# These say where their threads go on and return True; they find them at the instruction.
CONTROL = ("bra", "bar", "barrier", "shfl", "vote", "ret", "exit")
Step = Callable[["Machine", Any], "bool | None"]

# ---- operands ------------------------------------------------------------------------


def literal(text: str, kind: np.dtype[Any]) -> Any:
    """A number as PTX writes it; floats by their bits."""
    if text[:2] in ("0f", "0d"):
        bits = np.array(int(text[2:], 16), "u4" if text[1] == "f" else "u8")
        return bits.view("f4" if text[1] == "f" else "f8").astype(kind)[()]
    if kind.kind == "b":
        return text not in ("0", "false")
    if kind.kind == "f":
        return kind.type(int(text, 0))
    value = int(text.rstrip("U"), 0) & ((1 << 8 * kind.itemsize) - 1)
    return np.array(value, f"u{kind.itemsize}").view(kind)[()]


def reader(kernel: Kernel, operand: str, kind: np.dtype[Any]) -> Callable[[Machine, Any], Array]:
    """Reads an operand as a type: a register's bits, or its lower ones."""
    negated = operand.startswith("!")
    name = operand.lstrip("!")
    if name in kernel.registers:

        def read(machine: Machine, ix: Any) -> Array:
            value = machine.register(name)[ix]
            if kind.kind == "b":
                return ~value if negated else value
            if value.itemsize != kind.itemsize:
                value = value.astype(f"u{kind.itemsize}")
            return value.view(kind)

        return read
    if name in SPECIAL_REGISTERS:

        def read_special(machine: Machine, ix: Any) -> Array:
            return machine.special[name][ix].astype(kind)

        return read_special
    if name in kernel.parameters:
        constant = kind.type(kernel.parameters[name][0])
    else:  # the dynamic shared memory begins at 0
        constant = literal("0" if name in kernel.shared else name, kind)
    return lambda machine, ix: np.full(machine.at[ix].shape, constant, kind)


def writer(kernel: Kernel, operand: str) -> Callable[[Machine, Any, Array], None]:
    """Writes a register; what is narrower is extended by its sign."""
    if operand == "_":
        return lambda machine, ix, value: None

    def write(machine: Machine, ix: Any, value: Array) -> None:
        register = machine.register(operand)
        if register.dtype != bool and value.itemsize < register.itemsize:
            value = value.astype(f"{value.dtype.kind}{register.itemsize}")
        register[ix] = value.view(register.dtype) if register.dtype != value.dtype else value

    return write


def components(operand: str) -> list[str]:
    return split_operands(operand.strip("{} ")) if operand.startswith("{") else [operand]


def address_of(kernel: Kernel, operand: str) -> Callable[[Machine, Any], Array]:
    found = ADDRESS.fullmatch(operand)
    if not found:
        raise PtxError(f"an address of a form nobody knows: {operand}")
    read, offset = reader(kernel, found[1], TYPES["u64"]), int(found[2] or 0)
    if kernel.registers.get(found[1], "b64")[1:] == "32":
        read = reader(kernel, found[1], TYPES["u32"])
    return lambda machine, ix: read(machine, ix).astype(np.int64) + offset


# ---- instructions --------------------------------------------------------------------


def of_one(value: Array) -> Bytes:
    return as_bytes(value, value.itemsize)


def load(kernel: Kernel, i: Instruction) -> Step:
    kind, address = TYPES[i.opcode[-1]], address_of(kernel, i.operands[1])
    writes = [writer(kernel, name) for name in components(i.operands[0])]
    space = next(part for part in i.opcode if part in ("param", "shared", "global"))

    def step(machine: Machine, ix: Any) -> None:
        at, whole = address(machine, ix), kind.itemsize * len(writes)
        if space == "param":
            values = machine.constants[at[:, None] + np.arange(whole)]
        elif space == "shared":
            values = machine.shared.load(
                at, kind.itemsize, len(writes), machine.block[ix], machine.who[ix]
            )
        else:
            block = machine.global_block[ix]
            values = machine.memory.load(at, kind.itemsize, len(writes), block)
        split = np.ascontiguousarray(values).view(kind)
        for k, write in enumerate(writes):
            write(machine, ix, np.ascontiguousarray(split[:, k]))

    return step


def store(kernel: Kernel, i: Instruction) -> Step:
    kind, address = TYPES[i.opcode[-1]], address_of(kernel, i.operands[0])
    reads = [reader(kernel, name, kind) for name in components(i.operands[1])]

    def step(machine: Machine, ix: Any) -> None:
        values = np.concatenate([of_one(read(machine, ix)) for read in reads], axis=1)
        if "shared" in i.opcode:
            machine.shared.store(address(machine, ix), values, machine.block[ix], machine.who[ix])
        else:
            machine.memory.store(address(machine, ix), values, machine.global_block[ix])

    return step


def atomic(kernel: Kernel, i: Instruction) -> Step:
    """atom.global.operation.type result, address, value"""
    kind, operation = TYPES[i.opcode[-1]], i.opcode[-2]
    returns = i.opcode[0] == "atom"
    address = address_of(kernel, i.operands[1 if returns else 0])
    read, work = reader(kernel, i.operands[-1], kind), SAME_TYPE[operation]

    def step(machine: Machine, ix: Any) -> None:
        values, at = read(machine, ix), address(machine, ix)

        def one(k: int, old: Any) -> Any:
            new = work(np.array([old]).view(kind), values[k : k + 1])
            return new.view(f"u{kind.itemsize}")[0]

        old = machine.memory.update(at, kind.itemsize, machine.global_block[ix], one)
        if returns:
            writer(kernel, i.operands[0])(machine, ix, old)

    return step


def move(kernel: Kernel, i: Instruction) -> Step:
    """Also from several registers to one twice as wide, and back."""
    kind = TYPES[i.opcode[-1]]
    to, given = components(i.operands[0]), components(i.operands[1])
    part = np.dtype(f"u{kind.itemsize // max(len(to), len(given))}") if kind.kind != "b" else kind
    whole = kind if len(given) == 1 else part
    reads = [reader(kernel, name, whole) for name in given]
    writes = [writer(kernel, name) for name in to]

    def step(machine: Machine, ix: Any) -> None:
        if len(given) == len(to) == 1:
            return writes[0](machine, ix, reads[0](machine, ix))
        values = np.concatenate([of_one(read(machine, ix)) for read in reads], axis=1)
        split = values.view(part if len(to) > 1 else f"u{kind.itemsize}")
        for k, write in enumerate(writes):
            write(machine, ix, np.ascontiguousarray(split[:, k]))
        return None

    return step


def computed(kernel: Kernel, i: Instruction) -> Step:
    """A result from operands, all of types that the opcode tells."""
    name, kind = i.opcode[0], TYPES[i.opcode[-1]]
    work: Callable[..., Array]
    kinds: list[np.dtype[Any]]
    if name == "setp":
        how = i.opcode[1]
        work, kinds = (lambda a, b: compare(how, a, b)), [kind] * 2
    elif name == "selp":
        work, kinds = select, [kind, kind, TYPES["pred"]]
    elif name == "cvt":
        kinds, to = [kind], TYPES[i.opcode[-2]]
        work = lambda a: convert(a, to)  # noqa: E731
    elif name == "cvta":
        work, kinds = (lambda a: a), [kind]  # global addresses are generic ones
    elif i.opcode[:2] == ["mul", "wide"]:
        wide = TYPES[WIDE[i.opcode[-1]]]
        work, kinds = (lambda a, b: a.astype(wide) * b.astype(wide)), [kind] * 2
    elif name in COUNTED:
        work, kinds = COUNTED[name], [kind, TYPES["u32"], TYPES["u32"]]
    else:
        known = next((n for n in (".".join(i.opcode[:2]), name) if n in SAME_TYPE), None)
        if known is None:
            raise PtxError(f"an instruction nobody knows: {i}")
        work = SAME_TYPE[known]
        count = work.nin if isinstance(work, np.ufunc) else len(inspect.signature(work).parameters)
        kinds = [kind] * count
    reads = [reader(kernel, o, k) for o, k in zip(i.operands[1:], kinds, strict=False)]
    write = writer(kernel, i.operands[0])

    def step(machine: Machine, ix: Any) -> None:
        write(machine, ix, work(*(read(machine, ix) for read in reads)))

    return step


def shuffle(kernel: Kernel, i: Instruction) -> Step:
    """shfl.sync.bfly.b32 result|in_range, value, lane_mask, clamp, mask"""
    if i.opcode[2] != "bfly":
        raise PtxError(f"an instruction nobody knows: {i}")
    result, _, predicate = i.operands[0].partition("|")
    write = writer(kernel, result.strip())
    value, by, clamp, mask = (reader(kernel, o, TYPES["u32"]) for o in i.operands[1:])

    def step(machine: Machine, ix: Any) -> bool:
        def work(threads: Array, masks: Array) -> None:
            control = clamp(machine, threads).astype(np.int64)
            lane, segment = machine.lane[threads], control >> 8 & 31
            source = lane ^ by(machine, threads).astype(np.int64) & 31
            in_range = source <= (lane & segment | control & 31 & ~segment)
            source = np.where(in_range, source, lane)
            if not (masks >> source.astype(np.uint32) & 1).all():
                raise PtxError("a shuffle reads a lane outside its mask")
            values = np.zeros(machine.total, np.uint32)
            values[threads] = value(machine, threads)
            write(machine, threads, values[threads - lane + source])
            if predicate:
                writer(kernel, predicate.strip())(machine, threads, in_range)

        return machine.meet(ix, mask(machine, ix), work)

    return step


def vote(kernel: Kernel, i: Instruction) -> Step:
    """vote.sync.any.pred result, predicate, mask"""
    if i.opcode[2] not in ("any", "all"):
        raise PtxError(f"an instruction nobody knows: {i}")
    write, mask = writer(kernel, i.operands[0]), reader(kernel, i.operands[2], TYPES["u32"])
    predicate, opposite = reader(kernel, i.operands[1], TYPES["pred"]), i.opcode[2] == "all"

    def step(machine: Machine, ix: Any) -> bool:
        def work(threads: Array, masks: Array) -> None:
            held = np.zeros(machine.total, bool)
            held[threads] = predicate(machine, threads) ^ opposite
            some = (machine.of_warps(held)[machine.warp[threads]] & masks) != 0
            write(machine, threads, some ^ opposite)

        return machine.meet(ix, mask(machine, ix), work)

    return step


def barrier(kernel: Kernel, i: Instruction) -> Step:
    if "warp" not in i.opcode:

        def wait(machine: Machine, ix: Any) -> bool:
            machine.state[ix] = AT_BARRIER
            return True

        return wait
    mask = reader(kernel, i.operands[0], TYPES["u32"])

    def step(machine: Machine, ix: Any) -> bool:
        def work(threads: Array, masks: Array) -> None:
            machine.shared.pass_warp_barrier(threads, masks)

        return machine.meet(ix, mask(machine, ix), work)

    return step


def branch(kernel: Kernel, i: Instruction) -> Step:
    target = kernel.labels[i.operands[0]]

    def step(machine: Machine, ix: Any) -> bool:
        machine.at[ix] = target
        return True

    return step


def leave(kernel: Kernel, i: Instruction) -> Step:
    def step(machine: Machine, ix: Any) -> bool:
        machine.gone[ix] = True
        return True

    return step


SPECIAL: dict[str, Callable[[Kernel, Instruction], Step]] = {
    "ld": load, "st": store, "atom": atomic, "red": atomic, "mov": move, "shfl": shuffle,
    "vote": vote, "bar": barrier, "barrier": barrier, "bra": branch, "ret": leave, "exit": leave,
}  # fmt: skip


def step_of(kernel: Kernel, instruction: Instruction) -> Step:
    return SPECIAL.get(instruction.opcode[0], computed)(kernel, instruction)
