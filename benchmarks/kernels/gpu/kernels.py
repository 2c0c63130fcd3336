"""The operators as benchmarks/gpu.py times them: data, calls, contenders, costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.kernels import costs
from benchmarks.kernels.costs import Cost
from benchmarks.support.contender import ReferenceInverse
from obert_kernels import WoodburyFisher, ops
from obert_kernels.ops import reference
from obert_kernels.ops.packing import gram_shape

M = 1024
DAMPING = 1e-7
SCALE = 1e-4
KEPT = 0.3  # share of weights that survive the timed updates
REFERENCE = "reference"
TORCH = "torch cholesky_inverse"
ALL_WEIGHTS = "Gram of all weights"
LEFT = 10  # one of so many weights is left
# torch may loop over the blocks on the host; its time is scaled up from so many.
_TORCH_BLOCKS = 16384
_TORCH_BYTES = 128 << 20
_SECTOR = 32  # bytes that memory delivers at once


@dataclass(frozen=True)
class Contender:
    """Another way to do the work: its call, and how many calls do as much as one of ours."""

    call: Callable[[], object]
    scale: float


@dataclass(frozen=True)
class Copy:
    """One set of data on the device and what runs on it."""

    ours: Callable[[], object]
    contenders: dict[str, Contender] = field(default_factory=dict)
    status: Tensor | None = None


@dataclass(frozen=True)
class Kernel:
    """One line of the table.

    Attributes:
        cost: of a number of blocks.
        memory: bytes that a copy takes for each weight, contenders and temporaries included.
        build: (n, device) -> a copy with new random data.
        resident: bytes of each weight that pass through the cache; None: half the bytes moved
            (the least, as nothing is moved more than twice).
    """

    operator: str
    variant: str
    block_size: int
    cost: Callable[[int], Cost]
    memory: float
    build: Callable[[int, torch.device], Copy]
    resident: float | None = None

    def bytes_in_cache(self) -> float:
        if self.resident is not None:
            return self.resident
        return self.cost(1).bytes / self.block_size / 2


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def random_gradients(
    k: int, n: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    return torch.randn(k, n, device=device, dtype=dtype).mul_(SCALE)


def gram_kernel(size: int, k: int, gram_type: torch.dtype, gradient_type: torch.dtype) -> Kernel:
    def build(n: int, device: torch.device) -> Copy:
        g = random_gradients(k, n, device, gradient_type)
        gram = torch.zeros(gram_shape(n, size), dtype=gram_type, device=device)
        return Copy(lambda: ops.gram_accumulate(gram, g, size), reference_gradients(n, size, g))

    element, gradient = gram_type.itemsize, gradient_type.itemsize
    return Kernel(
        "gram_accumulate",
        accumulation(gram_type, k, gradient_type),
        size,
        lambda blocks: costs.gram_accumulate(blocks, size, k, element, gradient),
        (size + 1) / 2 * element + k * gradient + 4 * size + 16,
        build,
    )


def accumulation(gram_type: torch.dtype, k: int, gradient_type: torch.dtype) -> str:
    return f"{name_of(gram_type)} Gram, k = {k}, {name_of(gradient_type)} gradients"


def living_kernel(size: int, k: int, gram_type: torch.dtype, gradient_type: torch.dtype) -> Kernel:
    """Full blocks of the weights that are left, against the Gram of all."""

    def build(n: int, device: torch.device) -> Copy:
        g = random_gradients(k, LEFT * n, device, gradient_type)
        first_place = torch.arange(0, n + 1, size, device=device)
        gram_start = first_place[:-1] // size * (size * (size + 1) // 2)
        offset = torch.randint(LEFT, (n,), device=device)
        source = (torch.arange(n, device=device) * LEFT + offset).int()
        gram = torch.zeros(gram_shape(n, size), dtype=gram_type, device=device).view(-1)
        every = torch.zeros(gram_shape(LEFT * n, size), dtype=gram_type, device=device)
        return Copy(
            lambda: ops.gram_accumulate_living(gram, g, gram_start, first_place, source),
            {ALL_WEIGHTS: Contender(lambda: ops.gram_accumulate(every, g, size), 1)},
        )

    element, gradient = gram_type.itemsize, gradient_type.itemsize
    return Kernel(
        "gram_accumulate_living",
        accumulation(gram_type, k, gradient_type),
        size,
        lambda blocks: costs.gram_accumulate_living(blocks, size, k, element, gradient),
        (LEFT + 1) * (size + 1) / 2 * element + LEFT * k * gradient + 64,
        build,
    )


def woodbury_kernel(size: int, k: int, gradient_type: torch.dtype) -> Kernel:
    def build(n: int, device: torch.device) -> Copy:
        g = random_gradients(k, n, device, gradient_type)
        state = WoodburyFisher(n, M, size, damping=DAMPING, device=device).packed
        status = ops.new_status(device)
        return Copy(
            lambda: ops.woodbury_update(state, g, float(M), status),
            reference_gradients(n, size, g),
            status,
        )

    gradient = gradient_type.itemsize
    return Kernel(
        "woodbury_update",
        f"k = {k}, {name_of(gradient_type)} gradients",
        size,
        lambda blocks: costs.woodbury_update(blocks, size, k, gradient),
        k * gradient + 6 * size + 32,
        build,
    )


def reference_gradients(n: int, size: int, g: Tensor) -> dict[str, Contender]:
    """The reference adds gradients one by one, all at the same cost: one is measured."""
    inverse = ReferenceInverse(M, size, n, DAMPING, g.device)
    row = g[0].float()
    return {REFERENCE: Contender(lambda: inverse.add_grad(row), g.shape[0])}


def filled_gram(n: int, size: int, gram_type: torch.dtype, device: torch.device) -> Tensor:
    gram = torch.zeros(gram_shape(n, size), dtype=gram_type, device=device)
    ops.gram_accumulate(gram, random_gradients(8, n, device), size)
    return gram


def torch_factorisation(gram: Tensor, size: int) -> dict[str, Contender]:
    """Batched Cholesky inverse in float64 of dense blocks that already exist."""
    blocks = min(gram.shape[0], _TORCH_BLOCKS, max(1, _TORCH_BYTES // (8 * size**2)))
    fisher = reference.unpack_fisher(gram[:blocks], M, DAMPING)

    # cholesky_ex is torch.linalg.cholesky without waiting for the device to report errors.
    def invert() -> Tensor:
        return torch.cholesky_inverse(torch.linalg.cholesky_ex(fisher).L)

    return {TORCH: Contender(invert, gram.shape[0] / blocks)}


GramCall = Callable[[Tensor, Tensor, Tensor, Tensor], object]  # of Gram, weight, keep, status


def factor_kernel(
    operator: str,
    variant: str,
    size: int,
    gram_type: torch.dtype,
    cost: Callable[[int], Cost],
    call: GramCall,
    against_torch: bool = False,
    group: int = 1,
    all_kept: bool = False,
) -> Kernel:
    """An operator that factors F = damping I + Gram / m."""

    def build(n: int, device: torch.device) -> Copy:
        gram = filled_gram(n, size, gram_type, device)
        weight, keep = random_weights(n, size, group, device)
        if all_kept:
            keep.fill_(True)
        status = ops.new_status(device)
        others = torch_factorisation(gram, size) if against_torch else {}
        return Copy(lambda: call(gram, weight, keep, status), others, status)

    dense = 40 * size if against_torch else 8 * size
    memory = (size + 1) / 2 * gram_type.itemsize + 64 + dense
    label = f"{variant}, " if variant else ""
    return Kernel(operator, f"{label}{name_of(gram_type)} Gram", size, cost, memory, build)


def random_weights(n: int, size: int, group: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weights and a mask by groups that takes something from every block.

    Kernels skip the blocks that lose nothing; at B = 4 a random mask would leave many.
    """
    keep = torch.rand(n // group, device=device) < KEPT
    keep[torch.arange(0, n, size, device=device) // group] = False
    return torch.randn(n, device=device).mul_(0.04), keep.repeat_interleave(group)


def pattern_for(size: int) -> tuple[int, int] | None:
    """N:M for that block size: 2:4, 1:2 where four do not divide it, or none."""
    return (2, 4) if size % 4 == 0 else (1, 2) if size % 2 == 0 else None


def gram_kernels(size: int, gram_type: torch.dtype) -> Iterator[Kernel]:
    """Everything that starts from the Gram; vectors in float32."""
    element = gram_type.itemsize
    fisher = (size, float(M), DAMPING)

    yield factor_kernel(
        "gram_inverse", "", size, gram_type,
        lambda blocks: costs.gram_inverse(blocks, size, element, 4),
        lambda gram, w, keep, status: ops.gram_inverse(
            gram, w.numel(), *fisher, torch.float32, status),
        against_torch=True,
    )  # fmt: skip
    yield factor_kernel(
        "gram_diagonal", "", size, gram_type,
        lambda blocks: costs.gram_diagonal(blocks, size, element, 4),
        lambda gram, w, keep, status: ops.gram_diagonal(
            gram, w.numel(), *fisher, torch.float32, status),
    )  # fmt: skip
    yield factor_kernel(
        "gram_solve", "", size, gram_type,
        lambda blocks: costs.gram_solve(blocks, size, element, 4),
        lambda gram, w, keep, status: ops.gram_solve(gram, w, *fisher, status),
    )  # fmt: skip
    for group in (1, 4):
        yield factor_kernel(
            "gram_scores", f"groups of {group}", size, gram_type,
            lambda blocks, c=group: costs.gram_scores(blocks, size, element, 4, c),
            lambda gram, w, keep, status, c=group: ops.gram_scores(gram, w, c, *fisher, status),
            against_torch=group == 1,
        )  # fmt: skip
        yield factor_kernel(
            "gram_greedy_scores", f"groups of {group}", size, gram_type,
            lambda blocks, c=group: costs.gram_greedy_scores(blocks, size, element, 4, c),
            lambda gram, w, keep, status, c=group: ops.gram_greedy_scores(
                gram, w, keep, c, *fisher, status),
            all_kept=True,
        )  # fmt: skip
    if pattern := pattern_for(size):
        yield factor_kernel(
            "gram_n_of_m", "{}:{}".format(*pattern), size, gram_type,
            lambda blocks: costs.gram_n_of_m(blocks, size, element, 4, *pattern),
            lambda gram, w, keep, status: ops.gram_n_of_m(gram, w, keep, *pattern, *fisher, status),
            all_kept=True,
        )  # fmt: skip
    for joint in (False, True):
        yield factor_kernel(
            "gram_update", "joint" if joint else "sum", size, gram_type,
            lambda blocks, joint=joint: costs.gram_update(blocks, size, element, 4, joint),
            lambda gram, w, keep, status, joint=joint: ops.gram_update(
                gram, w, keep, 1, joint, *fisher, status),
        )  # fmt: skip


def inverse_kernels(size: int) -> Iterator[Kernel]:
    """Scores and updates from an inverse, against the same of the reference from a dense one."""
    for group in (1, 4):
        yield inverse_scores_kernel(size, group)
        yield inverse_update_kernel(size, group, joint=False)
    yield inverse_update_kernel(size, 1, joint=True)


def inverse_scores_kernel(size: int, group: int) -> Kernel:
    def build(n: int, device: torch.device) -> Copy:
        inverse = WoodburyFisher(n, M, size, damping=DAMPING, device=device).packed
        dense = ReferenceInverse(M, size, n, DAMPING, device)
        weight, _ = random_weights(n, size, group, device)
        status = ops.new_status(device)

        def theirs() -> Tensor:
            return dense.scores(weight) if group == 1 else dense.group_scores(weight, group)

        return Copy(
            lambda: ops.inverse_scores(inverse, weight, group, status),
            {REFERENCE: Contender(theirs, 1)} if size % group == 0 else {},
            status,
        )

    # The diagonal, weight and score; a sector for each row of a group below its first.
    resident = 4 + 4 + 4 / group + _SECTOR * (group - 1) / group
    return Kernel(
        "inverse_scores",
        f"groups of {group}",
        size,
        lambda blocks: costs.inverse_scores(blocks, size, 4, group),
        6 * size + 16 * (group + 4),
        build,
        resident,
    )


def inverse_update_kernel(size: int, group: int, joint: bool) -> Kernel:
    def build(n: int, device: torch.device) -> Copy:
        inverse = WoodburyFisher(n, M, size, damping=DAMPING, device=device).packed
        dense = ReferenceInverse(M, size, n, DAMPING, device)
        weight, keep = random_weights(n, size, group, device)
        status = ops.new_status(device)

        def theirs() -> Tensor:
            if group == 1:
                return dense.update(weight, keep)
            return dense.group_update(weight, keep, group)

        # The reference has no joint update.
        comparable = not joint and size % group == 0
        return Copy(
            lambda: ops.inverse_update(inverse, weight, keep, group, joint, False, status),
            {REFERENCE: Contender(theirs, 1)} if comparable else {},
            status,
        )

    return Kernel(
        "inverse_update",
        "joint" if joint else f"sum, groups of {group}",
        size,
        lambda blocks: costs.inverse_update(blocks, size, 4, joint),
        6 * size + 16 * (group + 4),
        build,
    )


def kernels(
    size: int, gradients_per_call: tuple[int, ...], gradient_types: tuple[torch.dtype, ...]
) -> Iterator[Kernel]:
    """All lines of the table for one block size."""
    for gradient_type in gradient_types:
        for k in gradients_per_call:
            yield gram_kernel(size, k, torch.float32, gradient_type)
            yield gram_kernel(size, k, torch.float64, gradient_type)
            yield living_kernel(size, k, torch.float64, gradient_type)
            yield woodbury_kernel(size, k, gradient_type)
    for gram_type in (torch.float32, torch.float64):
        yield from gram_kernels(size, gram_type)
    yield from inverse_kernels(size)
