"""Bytes and flops that the operators need: one function each, with the source of the formula.

Counted is what the formula asks for, not what an implementation wastes: a value is read once
and written once, a multiply-add is two flops, and of a symmetric matrix only one triangle is
worked on.  Blocks are full (n is a multiple of the block size).  The bytes of the CUDA kernels
are checked against the counters of their host execution in tests/cuda/test_gpu_benchmark.py; files
named here are those of csrc/pruning/cuda.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb


@dataclass(frozen=True)
class Cost:
    """What a call moves and computes.

    Attributes:
        bytes: read plus written, device memory.
        flops: in the type ``arithmetic``, "float32" or "float64".
    """

    bytes: int
    flops: int
    arithmetic: str

    def bound_seconds(self, bytes_per_s: float, flops_per_s: float) -> float:
        """The time the slower of memory and arithmetic needs if the other one is free."""
        return max(self.bytes / bytes_per_s, self.flops / flops_per_s)

    def times(self, count: int) -> Cost:
        """That many calls."""
        return Cost(count * self.bytes, count * self.flops, self.arithmetic)


def _triangle(size: int) -> int:
    return size * (size + 1) // 2


def reference_gradient(blocks: int, size: int) -> Cost:
    """One gradient of the reference algorithm; benchmarks/support/contender.py, ``add_grad``.

    einsum reads the inverse, baddbmm reads and writes it: 12 B^2 bytes a block (vectors, 1/B of
    it, left out); F g and the outer product are 2 B^2 flops each.
    """
    return Cost(blocks * 12 * size**2, blocks * 4 * size**2, "float32")


def gram_accumulate(blocks: int, size: int, k: int, gram_bytes: int, gradient_bytes: int) -> Cost:
    """k gradients in one call; gram.cu: B (B+1) sizeof(gram) + k B sizeof(gradient).

    A multiply-add for each entry of the triangle and gradient: k B (B+1) flops.
    """
    moved = 2 * _triangle(size) * gram_bytes + k * size * gradient_bytes
    arithmetic = "float64" if gram_bytes == 8 else "float32"
    return Cost(blocks * moved, blocks * k * 2 * _triangle(size), arithmetic)


def gram_accumulate_living(
    blocks: int, size: int, k: int, gram_bytes: int, gradient_bytes: int
) -> Cost:
    """gram_living.cu, blocks of B living weights: as ``gram_accumulate``, and tables.

    An int32 says which weight stands at a place, three int64 where a block begins and ends.  Memory
    delivers 32 bytes where one gradient is asked for, so that 100 % cannot be had.
    """
    dense = gram_accumulate(blocks, size, k, gram_bytes, gradient_bytes)
    return Cost(dense.bytes + blocks * (4 * size + 24), dense.flops, dense.arithmetic)


def woodbury_update(blocks: int, size: int, k: int, gradient_bytes: int) -> Cost:
    """k gradients in one call; woodbury.cu: 4 B (B+1) + k B sizeof(gradient).

    F g and the outer product: 4 k B^2 flops (the kernel works on both triangles).
    """
    moved = 2 * _triangle(size) * 4 + k * size * gradient_bytes
    return Cost(blocks * moved, blocks * k * 4 * size**2, "float32")


def _factor_flops(size: int) -> int:
    """Cholesky: B^3 / 3."""
    return size**3 // 3


def gram_inverse(blocks: int, size: int, gram_bytes: int, inverse_bytes: int) -> Cost:
    """factor.cu: the Gram read, as many values written.

    Cholesky, inverse of the factor and their product, B^3 / 3 flops each.
    """
    moved = _triangle(size) * (gram_bytes + inverse_bytes)
    return Cost(blocks * moved, blocks * 3 * _factor_flops(size), "float64")


def gram_diagonal(blocks: int, size: int, gram_bytes: int, diagonal_bytes: int) -> Cost:
    """factor.cu: the Gram read, B values written.

    Cholesky, inverse of the factor, squared column lengths (B^2 flops).
    """
    moved = _triangle(size) * gram_bytes + size * diagonal_bytes
    return Cost(blocks * moved, blocks * (2 * _factor_flops(size) + size**2), "float64")


def gram_solve(blocks: int, size: int, gram_bytes: int, vector_bytes: int) -> Cost:
    """factor.cu: the Gram and B values read, B written.

    Cholesky and two triangular solves of B^2 flops.
    """
    moved = _triangle(size) * gram_bytes + 2 * size * vector_bytes
    return Cost(blocks * moved, blocks * (_factor_flops(size) + 2 * size**2), "float64")


def gram_scores(blocks: int, size: int, gram_bytes: int, weight_bytes: int, group: int) -> Cost:
    """factor.cu: the Gram and B weights read, B/c float32 scores written.

    As the diagonal, but (c+1)/2 entries of the inverse a weight; then a Cholesky factorisation
    of each group.
    """
    moved = _triangle(size) * gram_bytes + size * weight_bytes + 4 * size // group
    entries = size**2 * (group + 1) // 2
    flops = 2 * _factor_flops(size) + entries + size * group**2 // 3
    return Cost(blocks * moved, blocks * flops, "float64")


def gram_update(blocks: int, size: int, gram_bytes: int, weight_bytes: int, joint: bool) -> Cost:
    """update.cu: Gram, weights and a byte of mask read, weights and 8 bytes written.

    Joint: F w, Cholesky, two triangular solves.  Sum of single removals: as the diagonal, two
    products with the inverse factor, one triangular solve for the increase.
    """
    moved = _triangle(size) * gram_bytes + size * (2 * weight_bytes + 1) + 8
    joint_flops = _factor_flops(size) + 4 * size**2
    sum_flops = 2 * _factor_flops(size) + 4 * size**2
    return Cost(blocks * moved, blocks * (joint_flops if joint else sum_flops), "float64")


def gram_greedy_scores(
    blocks: int, size: int, gram_bytes: int, weight_bytes: int, group: int
) -> Cost:
    """greedy.cu: Gram, weights and a byte of mask read, B/c float32 scores written.

    The inverse as in ``gram_inverse``.  A removal that leaves n weights changes the n (n+1) / 2
    entries of their inverse by a multiply-add: B^3 / 3 flops for all, if all are there.  Before
    each, a Cholesky factorisation of every group left: c^3 / 3 (B/c)^2 / 2 flops.
    """
    moved = _triangle(size) * gram_bytes + size * (weight_bytes + 1) + 4 * size // group
    flops = 4 * _factor_flops(size) + size**2 * group // 6
    return Cost(blocks * moved, blocks * flops, "float64")


def gram_n_of_m(
    blocks: int, size: int, gram_bytes: int, weight_bytes: int, kept: int, group: int
) -> Cost:
    """n_of_m.cu: Gram, weights and a byte of mask read, a byte written.

    The inverse as in ``gram_inverse``, then removals as in ``gram_greedy_scores`` up to the share
    that is kept.  Of each group of M every set of r = M - N: a Cholesky factorisation, r^3 / 3.
    """
    moved = _triangle(size) * gram_bytes + size * (weight_bytes + 2)
    removals = _factor_flops(size) - _factor_flops(size * kept // group)
    removed = group - kept
    sets = size // group * comb(group, removed) * removed**3 // 3
    return Cost(blocks * moved, blocks * (3 * _factor_flops(size) + removals + sets), "float64")


def inverse_scores(blocks: int, size: int, weight_bytes: int, group: int) -> Cost:
    """inverse_scores.cu: of the inverse only the triangles of the groups, B (c+1)/2 values.

    Memory delivers 32 bytes where a row of a group needs fewer, so that 100 % cannot be had for
    groups; the diagonal, all that single scores read, stands together in each block.
    """
    moved = 4 * size * (group + 1) // 2 + size * weight_bytes + 4 * size // group
    flops = 3 * size if group == 1 else size * group**2 // 3
    return Cost(blocks * moved, blocks * flops, "float64")


def inverse_update(blocks: int, size: int, weight_bytes: int, joint: bool) -> Cost:
    """inverse_update.cu: the inverse, weights and mask read, weights written.

    2 B (B+1) + 9 B bytes for float32 weights, no increase asked for.  F^-1 u is 2 B^2 flops;
    joint adds a Cholesky factorisation and two triangular solves (of all rows, as if none
    were kept).
    """
    moved = 4 * _triangle(size) + size * (2 * weight_bytes + 1)
    flops = 2 * size**2 + (_factor_flops(size) + 2 * size**2 if joint else 0)
    return Cost(blocks * moved, blocks * flops, "float64")


def fit_rows(rows: int, columns: int, support: int) -> Cost:
    """fit_rows.cu, a support of s of n columns for each row: H once, mask, targets, results.

    Cholesky and two triangular solves of s^2 flops.  The factor passes through the workspace, which
    the L2 can hold where it is large; that is not counted, nor is H for every support.
    """
    moved = 8 * columns**2 + rows * (9 * columns + 8 * support)
    return Cost(moved, rows * (_factor_flops(support) + 2 * support**2), "float64")
