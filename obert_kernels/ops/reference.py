"""Every operator in plain torch: the oracle of the tests and the fallback of other devices.

The signatures are those of the operators in :mod:`obert_kernels.ops`, which checks the
arguments.  All work is done in float64 on dense blocks, a bounded number of them at a time,
except the Woodbury recursion, whose point is its float32 state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations

import torch
from torch import Tensor

from .packing import block_size_of, pack_inverse, to_blocks, unpack_inverse
from .reference_fit import fit_rows as fit_rows
from .status import record_failure

_BYTES_AT_ONCE = 256 << 20


def _chunks(blocks: int, block_size: int) -> Iterator[slice]:
    step = max(1, _BYTES_AT_ONCE // (8 * 4 * block_size * block_size))
    for start in range(0, blocks, step):
        yield slice(start, min(start + step, blocks))


def unpack_fisher(gram: Tensor, num_gradients: float, damping: float) -> Tensor:
    """Dense ``F = damping I + gram / m`` as float64 ``[blocks, B, B]``."""
    size = block_size_of(gram)
    row, column = torch.tril_indices(size, size, device=gram.device)
    lower = gram.new_zeros((gram.shape[0], size, size), dtype=torch.float64)
    lower[:, row, column] = gram.double() / num_gradients
    dense = lower + lower.tril(-1).mT
    return dense + damping * torch.eye(size, dtype=torch.float64, device=gram.device)


def _factor(fisher: Tensor, gram_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cholesky factors, and which blocks have a pivot that rounding alone could explain."""
    factor, info = torch.linalg.cholesky_ex(fisher)
    pivots = factor.diagonal(dim1=1, dim2=2).square()
    tolerance = torch.finfo(gram_dtype).eps * fisher.shape[-1]
    good = (pivots > tolerance * fisher.diagonal(dim1=1, dim2=2)) & pivots.isfinite()
    bad = (info != 0) | ~good.all(dim=1)
    identity = torch.eye(fisher.shape[-1], dtype=fisher.dtype, device=fisher.device)
    return torch.where(bad[:, None, None], identity, factor), bad


def _inverses(
    gram: Tensor, num_gradients: float, damping: float, status: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Yield (blocks, F, F^-1, failed) for a bounded number of blocks at a time."""
    for blocks in _chunks(gram.shape[0], block_size_of(gram)):
        fisher = unpack_fisher(gram[blocks], num_gradients, damping)
        factor, bad = _factor(fisher, gram.dtype)
        record_failure(status, bad, blocks.start)
        yield blocks, fisher, torch.cholesky_inverse(factor), bad


def gram_accumulate(gram: Tensor, gradients: Tensor, block_size: int) -> None:
    """``gram += sum_i g_i g_i^T`` per block, packed lower triangles."""
    row, column = torch.tril_indices(block_size, block_size, device=gram.device)
    for blocks in _chunks(gram.shape[0], block_size):
        columns = gradients[:, blocks.start * block_size : blocks.stop * block_size]
        g = to_blocks(columns.double(), block_size).transpose(0, 1)
        gram[blocks] += torch.bmm(g.mT, g)[:, row, column].to(gram.dtype)


def gram_accumulate_living(
    gram: Tensor,
    gradients: Tensor,
    gram_start: Tensor,
    first_place: Tensor,
    weight_at_place: Tensor,
) -> None:
    """Add ``sum_i g_i g_i^T`` to every block's triangle; some blocks of one size at a time."""
    sizes = first_place.diff()
    for size in sizes.unique().tolist():
        if size == 0:
            continue
        within = torch.arange(size, device=gram.device)
        row, column = torch.tril_indices(size, size, device=gram.device)
        entries = torch.arange(len(row), device=gram.device)
        same = (sizes == size).nonzero().flatten()
        for some in _chunks(len(same), size):
            blocks = same[some]
            index = weight_at_place[first_place[blocks][:, None] + within].long()
            g = gradients[:, index.clamp_min(0)].double().masked_fill(index < 0, 0)
            added = torch.einsum("kbi,kbj->bij", g, g)
            gram[gram_start[blocks][:, None] + entries] += added[:, row, column].to(gram.dtype)


def gram_inverse(
    gram: Tensor,
    num_weights: int,
    block_size: int,
    num_gradients: float,
    damping: float,
    dtype: torch.dtype,
    status: Tensor,
) -> Tensor:
    """``F^-1``, packed (:func:`unpack_inverse`); ``I / damping`` past a short last block."""
    out = gram.new_empty(gram.shape, dtype=dtype)
    for blocks, _, inverse, _ in _inverses(gram, num_gradients, damping, status):
        out[blocks] = pack_inverse(inverse.to(dtype))
    return out


def gram_diagonal(
    gram: Tensor,
    num_weights: int,
    block_size: int,
    num_gradients: float,
    damping: float,
    dtype: torch.dtype,
    status: Tensor,
) -> Tensor:
    """Diagonal of ``F^-1``, ``[num_weights]``."""
    out = gram.new_empty((gram.shape[0], block_size), dtype=dtype)
    for blocks, _, inverse, _ in _inverses(gram, num_gradients, damping, status):
        out[blocks] = inverse.diagonal(dim1=1, dim2=2).to(dtype)
    return out.flatten()[:num_weights].clone()


def gram_solve(
    gram: Tensor,
    right_hand_side: Tensor,
    block_size: int,
    num_gradients: float,
    damping: float,
    status: Tensor,
) -> Tensor:
    """``F^-1 v``, ``[num_weights]``."""
    v = to_blocks(right_hand_side, block_size)
    out = torch.empty_like(v)
    for blocks, _, inverse, _ in _inverses(gram, num_gradients, damping, status):
        out[blocks] = (inverse @ v[blocks].double().unsqueeze(-1)).squeeze(-1).to(v.dtype)
    return out.flatten()[: right_hand_side.numel()].clone()


def _same_group(blocks: slice, block_size: int, group_size: int, device: torch.device) -> Tensor:
    """``[blocks, B, B]``: are the two weights of a block in the same group?"""
    start, stop = blocks.start * block_size, blocks.stop * block_size
    group = torch.arange(start, stop, device=device).view(-1, block_size) // group_size
    return group[:, :, None] == group[:, None, :]


def _solve_restricted(inverse: Tensor, weight: Tensor, allowed: Tensor) -> Tensor:
    """Solve ``S u = w`` for S = F^-1 where ``allowed``, the identity elsewhere.

    ``allowed`` couples the weights of one removal; S then splits into the blocks
    [F^-1]_QQ and u holds ([F^-1]_QQ)^-1 w_Q for all of them at once.
    """
    identity = torch.eye(inverse.shape[-1], dtype=torch.bool, device=inverse.device)
    alone = identity & ~allowed.diagonal(dim1=1, dim2=2)[:, :, None]
    system = torch.where(allowed, inverse, 0.0) + alone.to(inverse.dtype)
    factor, _ = torch.linalg.cholesky_ex(system)  # positive definite like F^-1
    return torch.cholesky_solve(weight.unsqueeze(-1), factor).squeeze(-1)


def _group_scores(
    inverse: Tensor, weight: Tensor, blocks: slice, group_size: int, scores: Tensor
) -> None:
    size = inverse.shape[-1]
    same = _same_group(blocks, size, group_size, inverse.device)
    cost = 0.5 * weight * _solve_restricted(inverse, weight, same)
    start = blocks.start * size
    group = torch.arange(start, start + cost.numel(), device=scores.device) // group_size
    inside = group < scores.numel()
    scores.index_add_(0, group[inside], cost.flatten()[inside].to(scores.dtype))


def gram_scores(
    gram: Tensor,
    weight: Tensor,
    group_size: int,
    block_size: int,
    num_gradients: float,
    damping: float,
    status: Tensor,
) -> Tensor:
    """OBS saliency ``1/2 w_Q^T ([F^-1]_QQ)^-1 w_Q`` of every group, float32."""
    w = to_blocks(weight.double(), block_size)
    scores = weight.new_zeros(weight.numel() // group_size, dtype=torch.float64)
    for blocks, _, inverse, _ in _inverses(gram, num_gradients, damping, status):
        _group_scores(inverse, w[blocks], blocks, group_size, scores)
    return scores.float()


def gram_greedy_scores(
    gram: Tensor,
    weight: Tensor,
    keep: Tensor,
    group_size: int,
    block_size: int,
    num_gradients: float,
    damping: float,
    status: Tensor,
) -> Tensor:
    """Scores in the order in which exact removals take the groups of a block, float32.

    At each step the group with the least cost ``1/2 w_Q^T ([F_SS^-1]_QQ)^-1 w_Q`` goes, S the
    weights left and w as they have adapted; its score is the largest cost so far.  Everything is
    worked out anew from F at each step.
    """
    w, k = to_blocks(weight.double(), block_size), to_blocks(keep, block_size)
    scores = weight.new_zeros(weight.numel() // group_size + 1, dtype=torch.float64)
    identity = torch.eye(block_size, dtype=torch.float64, device=gram.device)
    for blocks in _chunks(gram.shape[0], block_size):
        fisher = unpack_fisher(gram[blocks], num_gradients, damping)
        first = torch.arange(blocks.start, blocks.stop, device=gram.device) * block_size
        group = (first[:, None] + torch.arange(block_size, device=gram.device)) // group_size
        same = group[:, :, None] == group[:, None, :]
        start = w[blocks] * k[blocks]
        present, most = k[blocks].clone(), start.new_zeros(start.shape[0])
        while bool(present.any()):
            both = present[:, :, None] & present[:, None, :]
            factor, bad = _factor(torch.where(both, fisher, identity), gram.dtype)
            record_failure(status, bad, blocks.start)
            inverse = torch.cholesky_inverse(factor)
            gone = (k[blocks] & ~present) * start
            pull = (fisher @ gone.unsqueeze(-1)).squeeze(-1) * present
            now = present * (start + (inverse @ pull.unsqueeze(-1)).squeeze(-1))
            shares = 0.5 * now * _solve_restricted(inverse, now, same & both)
            costs = (same * shares[:, None, :]).sum(dim=2).masked_fill(~present, math.inf)
            least, index = costs.min(dim=1)
            left = present.any(dim=1)
            most = torch.where(left, torch.maximum(most, least), most)
            chosen = group.gather(1, index[:, None])
            scores.index_add_(0, chosen[left, 0].clamp(max=len(scores) - 1), most[left])
            present &= group != chosen
    return scores[:-1].float()


def gram_n_of_m(
    gram: Tensor,
    weight: Tensor,
    keep: Tensor,
    kept: int,
    group: int,
    block_size: int,
    num_gradients: float,
    damping: float,
    status: Tensor,
) -> Tensor:
    """Mask under which of every ``group`` consecutive weights at most ``kept`` remain, bool.

    The groups of a block take their turn from the first to the last.  Of each the set Q goes whose
    removal costs least, ``1/2 w_Q^T ([F_SS^-1]_QQ)^-1 w_Q``, S the weights left by then and w as
    they have adapted.  Groups with ``kept`` weights or fewer stay as they are.
    """
    w, new = to_blocks(weight.double(), block_size), to_blocks(keep, block_size).clone()
    sets = torch.tensor(
        list(combinations(range(group), group - kept)), dtype=torch.long, device=gram.device
    )
    identity = torch.eye(block_size, dtype=torch.float64, device=gram.device)
    entries = max(block_size**2, len(sets) * (group - kept) ** 2 // 4)
    for blocks in _chunks(gram.shape[0], math.isqrt(entries)):
        fisher = unpack_fisher(gram[blocks], num_gradients, damping)
        first, left = new[blocks].clone(), new[blocks]
        start = torch.where(first, w[blocks], 0.0)
        failed = ~start.isfinite().all(1)
        for begin in range(0, block_size, group):
            both = left[:, :, None] & left[:, None, :]
            factor, bad = _factor(torch.where(both, fisher, identity), gram.dtype)
            inverse = torch.cholesky_inverse(factor)
            gone = (first & ~left) * start
            pull = (fisher @ gone.unsqueeze(-1)).squeeze(-1) * left
            now = left * (start + (inverse @ pull.unsqueeze(-1)).squeeze(-1))
            q = begin + sets
            solved = torch.linalg.solve(inverse[:, q[:, :, None], q[:, None, :]], now[:, q])
            # Weights that are gone already are part of every set, and cost nothing in it.
            here = left[:, begin : begin + group]
            other = here.sum(1, keepdim=True) - here[:, sets].sum(2) != kept
            costs = (0.5 * now[:, q] * solved).sum(2).masked_fill(other, math.inf)
            least, index = costs.min(1)
            failed |= bad | ((here.sum(1) > kept) & ~least.isfinite())
            choice = q[index]
            prunes = (here.sum(1) > kept) & ~failed
            left.scatter_(1, choice, left.gather(1, choice) & ~prunes[:, None])
        record_failure(status, failed, blocks.start)
        left[failed] = first[failed]
    return new.flatten()[: weight.numel()]


def _change(
    inverse: Tensor, weight: Tensor, keep: Tensor, blocks: slice, group_size: int, joint: bool
) -> Tensor:
    """Change of the weights of some blocks, pruned ones to zero."""
    pruned = ~keep
    allowed = pruned[:, :, None] & pruned[:, None, :]
    if not joint:
        allowed &= _same_group(blocks, inverse.shape[-1], group_size, inverse.device)
    u = _solve_restricted(inverse, weight * pruned, allowed)
    change = -(inverse @ u.unsqueeze(-1)).squeeze(-1)
    return torch.where(keep, change, -weight)


def gram_update(
    gram: Tensor,
    weight: Tensor,
    keep: Tensor,
    group_size: int,
    joint: bool,
    block_size: int,
    num_gradients: float,
    damping: float,
    status: Tensor,
) -> tuple[Tensor, Tensor]:
    """New weights and the increase ``1/2 d^T F d`` predicted for each block."""
    w, k = to_blocks(weight.double(), block_size), to_blocks(keep, block_size)
    new, increase = w.clone(), w.new_zeros(w.shape[0])
    for blocks, fisher, inverse, bad in _inverses(gram, num_gradients, damping, status):
        d = _change(inverse, w[blocks], k[blocks], blocks, group_size, joint)
        d = torch.where(bad[:, None], 0.0, d)
        new[blocks] += d
        increase[blocks] = 0.5 * torch.einsum("bi,bij,bj->b", d, fisher, d)
    return new.flatten()[: weight.numel()].to(weight.dtype), increase


def woodbury_update(
    inverse: Tensor, gradients: Tensor, num_gradients: float, status: Tensor
) -> None:
    """One rank-1 Woodbury step per gradient on the float32 ``inverse``, in place."""
    packed, inverse = inverse, unpack_inverse(inverse)
    bad = torch.zeros(inverse.shape[0], dtype=torch.bool, device=inverse.device)
    for gradient in gradients:
        g = to_blocks(gradient.float(), inverse.shape[-1])
        # In float64, as products of float32 matrices may be in TF32 on CUDA.
        v = torch.bmm(inverse.double(), g.double().unsqueeze(-1)).squeeze(-1).float()
        curvature = (g * v).sum(dim=1)
        bad |= ~(curvature > -0.5 * num_gradients) | curvature.isinf()
        v /= (num_gradients + curvature).sqrt().unsqueeze(-1)
        inverse -= v.unsqueeze(2) * v.unsqueeze(1)
    diagonal = inverse.diagonal(dim1=1, dim2=2)
    bad |= ~((diagonal > 0) & diagonal.isfinite()).all(dim=1)
    packed.copy_(torch.where(bad[:, None], packed, pack_inverse(inverse)))
    record_failure(status, bad)


def _dense_blocks(
    inverse: Tensor, status: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Yield (blocks, Cholesky factor of F^-1, F^-1, failed) in float64."""
    for blocks in _chunks(inverse.shape[0], block_size_of(inverse)):
        dense = unpack_inverse(inverse[blocks]).double()
        factor, info = torch.linalg.cholesky_ex(dense)
        bad = (info != 0) | ~dense.isfinite().all(dim=2).all(dim=1)
        identity = torch.eye(dense.shape[-1], dtype=dense.dtype, device=dense.device)
        record_failure(status, bad, blocks.start)
        good = ~bad[:, None, None]
        yield blocks, torch.where(good, factor, identity), torch.where(good, dense, identity), bad


def inverse_scores(inverse: Tensor, weight: Tensor, group_size: int, status: Tensor) -> Tensor:
    """:func:`gram_scores` from an inverse that exists."""
    w = to_blocks(weight.double(), block_size_of(inverse))
    scores = weight.new_zeros(weight.numel() // group_size, dtype=torch.float64)
    for blocks, _, dense, _ in _dense_blocks(inverse, status):
        _group_scores(dense, w[blocks], blocks, group_size, scores)
    return scores.float()


def inverse_update(
    inverse: Tensor,
    weight: Tensor,
    keep: Tensor,
    group_size: int,
    joint: bool,
    with_increase: bool,
    status: Tensor,
) -> tuple[Tensor, Tensor]:
    """:func:`gram_update` from an inverse that exists; no increase unless asked (``[0]``)."""
    size = block_size_of(inverse)
    w, k = to_blocks(weight.double(), size), to_blocks(keep, size)
    new, increase = w.clone(), w.new_zeros(w.shape[0])
    for blocks, factor, dense, bad in _dense_blocks(inverse, status):
        d = _change(dense, w[blocks], k[blocks], blocks, group_size, joint)
        d = torch.where(bad[:, None], 0.0, d)
        new[blocks] += d
        root = torch.linalg.solve_triangular(factor, d.unsqueeze(-1), upper=False)
        increase[blocks] = 0.5 * root.square().sum(dim=(1, 2))
    increase = increase if with_increase else increase.new_empty(0)
    return new.flatten()[: weight.numel()].to(weight.dtype), increase
