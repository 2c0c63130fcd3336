"""What instructions compute: functions of arrays, one element for each thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

TYPES = {
    f"{kind}{bits}": np.dtype(f"{letter}{bits // 8}")
    for kind, letter in (("u", "u"), ("b", "u"), ("s", "i"))
    for bits in (8, 16, 32, 64)
} | {"f32": np.dtype("f4"), "f64": np.dtype("f8"), "pred": np.dtype(bool)}
WIDE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


def fused(a: Array, b: Array, c: Array) -> Array:
    """a b + c, rounded once (float64: after it has been rounded to 64 bits)."""
    if a.dtype == np.float64:
        return (a.astype(np.longdouble) * b + c).astype(np.float64)
    # The product is exact in float64.  The sum is rounded to odd, so that rounding it again is
    # as good as rounding once.
    product = a.astype(np.float64) * b
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    bits = total.view(np.int64)
    inexact = (error != 0) & np.isfinite(total) & (total != 0) & (bits & 1 == 0)
    away = (error > 0) == (total > 0)
    return np.where(inexact, np.where(away, bits | 1, bits - 1), bits).view(np.float64).astype("f4")


def shift_left(a: Array, by: Array) -> Array:
    bits = 8 * a.itemsize
    return np.where(by < bits, a << np.minimum(by, bits - 1).astype(a.dtype), a.dtype.type(0))


def shift_right(a: Array, by: Array) -> Array:
    bits = 8 * a.itemsize
    shifted = a >> np.minimum(by, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(by < bits, shifted, a.dtype.type(0))


def divide(a: Array, b: Array) -> Array:
    if a.dtype.kind == "f":
        return a / b
    if (b == 0).any():
        raise ZeroDivisionError("division of integers by zero")
    if a.dtype.kind == "u":
        return a // b
    return a // b + ((a % b != 0) & ((a < 0) != (b < 0)))  # towards zero


def remainder(a: Array, b: Array) -> Array:
    return a - divide(a, b) * b


def high_half(a: Array, b: Array) -> Array:
    wide = np.dtype(f"{a.dtype.kind}{2 * a.itemsize}")
    return (a.astype(wide) * b.astype(wide) >> 8 * a.itemsize).astype(a.dtype)


def leading_zeros(a: Array) -> Array:
    count = np.full(a.shape, 8 * a.itemsize, np.uint32)
    for bit in range(8 * a.itemsize):
        count[a >> a.dtype.type(bit) != 0] = 8 * a.itemsize - 1 - bit
    return count


def ones(a: Array) -> Array:
    by_byte = np.ascontiguousarray(a).view(np.uint8).reshape(a.size, a.itemsize)
    return np.unpackbits(by_byte, axis=1).sum(axis=1).astype(np.uint32)


def permute(a: Array, b: Array, selectors: Array) -> Array:
    """Of the eight bytes of b and a the four that the selectors name."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros_like(both)
    for place in range(4):
        selector = selectors.astype(np.uint64) >> np.uint64(4 * place) & np.uint64(15)
        byte = both >> (selector & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        byte = np.where(selector & np.uint64(8), sign, byte)
        out |= byte << np.uint64(8 * place)
    return out.astype(np.uint32)


def extract(a: Array, begin: Array, length: Array) -> Array:
    """A field of bits, of an unsigned number."""
    begin, length = begin.astype(np.uint64) & 255, length.astype(np.uint64) & 255
    mask = (np.uint64(1) << np.minimum(length, np.uint64(63))) - np.uint64(1)
    return (a.astype(np.uint64) >> np.minimum(begin, np.uint64(63)) & mask).astype(a.dtype)


def select(a: Array, b: Array, condition: Array) -> Array:
    return np.where(condition, a, b)


def larger(a: Array, b: Array) -> Array:
    return np.fmax(a, b) if a.dtype.kind == "f" else np.maximum(a, b)


def smaller(a: Array, b: Array) -> Array:
    return np.fmin(a, b) if a.dtype.kind == "f" else np.minimum(a, b)


# Opcode: takes as many operands of the instruction's type as the function has arguments.
SAME_TYPE: dict[str, Callable[..., Array]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "mul.lo": lambda a, b: a * b,
    "mul.hi": high_half,
    "mad.lo": lambda a, b, c: a * b + c,
    "fma": fused,
    "div": divide,
    "rem": remainder,
    "min": smaller,
    "max": larger,
    "neg": lambda a: -a,
    "abs": np.abs,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a,
    "sqrt": np.sqrt,
    "rcp": lambda a: 1 / a,
    "prmt": permute,
}
# The operands after the first are u32, whatever the type.
COUNTED: dict[str, Callable[..., Array]] = {
    "shl": shift_left,
    "shr": shift_right,
    "bfe": extract,
    "clz": leading_zeros,
    "popc": ones,
}

_COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal,
}  # fmt: skip


def compare(how: str, a: Array, b: Array) -> Array:
    """Of floats: ltu and its kin hold where one of them is NaN, the others do not."""
    if how in _COMPARE:
        found = _COMPARE[how](a, b)
        return found & (a == a) & (b == b) if how == "ne" else found
    return _COMPARE[how[:-1]](a, b) | (a != a) | (b != b)


def convert(a: Array, to: np.dtype[Any]) -> Array:
    """Floats to integers: towards zero, to the nearest that there is, zero for NaN."""
    if a.dtype.kind != "f" or to.kind == "f":
        return a.astype(to)
    least, most = np.iinfo(to).min, np.iinfo(to).max
    wide = np.trunc(np.nan_to_num(a.astype(np.longdouble), nan=0.0))
    return np.clip(wide, least, most).astype(to)
