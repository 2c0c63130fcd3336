"""The packed inverse: where its entries stand, what is refused, what is left alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from devices import CUDA_ON_HOST, INSTRUCTION_SETS
from problems import DAMPING, fresh_inverse, gradients, gram_of, onto_nan, relative_error

import obert_kernels
from obert_kernels import WoodburyFisher, ops
from obert_kernels.ops import native, reference
from obert_kernels.ops.packing import block_size_of, num_blocks, pack_inverse, unpack_inverse

SUPPORT = Path(__file__).parents[1] / "support"
# float64 and float32 results of float64 work, see test_ops.py
TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-7}


def symmetric(blocks: int, size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    square = torch.randn(blocks, size, size, dtype=dtype)
    return square + square.mT


# ---- The layout -----------------------------------------------------------------------


def test_the_diagonal_comes_first_then_the_rows_below_it():
    one = torch.tensor([[[7.0]]])
    assert pack_inverse(one).tolist() == [[7]]
    two = torch.tensor([[[1.0, 3], [3, 2]]])
    assert pack_inverse(two).tolist() == [[1, 2, 3]]
    three = torch.tensor([[[1.0, 4, 5], [4, 2, 6], [5, 6, 3]]])
    assert pack_inverse(three).tolist() == [[1, 2, 3, 4, 5, 6]]
    for dense in (one, two, three):
        assert torch.equal(unpack_inverse(pack_inverse(dense)), dense)


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_every_entry_has_its_place(size):
    dense = symmetric(4, size)
    packed = pack_inverse(dense)
    assert packed.shape == (4, size * (size + 1) // 2) and packed.is_contiguous()
    places = set()
    for i in range(size):
        for j in range(i + 1):
            place = i if i == j else size + i * (i - 1) // 2 + j
            assert torch.equal(packed[:, place], dense[:, i, j])
            places.add(place)
    assert places == set(range(packed.shape[1]))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 17, 50, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packing_and_back(size, dtype):
    dense = symmetric(3, size, dtype)
    packed = pack_inverse(dense)
    assert packed.dtype == dtype and block_size_of(packed) == size
    back = unpack_inverse(packed)
    assert back.dtype == dtype and back.is_contiguous()
    assert torch.equal(back, dense)
    assert torch.equal(pack_inverse(back), packed)
    assert unpack_inverse(packed[:0]).shape == (0, size, size)
    assert pack_inverse(dense[:0]).shape == (0, packed.shape[1])


def test_packing_reads_the_lower_triangle():
    dense = symmetric(2, 9)
    above = torch.ones(9, 9, dtype=torch.bool).triu(1)
    assert torch.equal(pack_inverse(dense.masked_fill(above, float("nan"))), pack_inverse(dense))


@pytest.mark.parametrize("size", [1, 2, 3, 50])
@pytest.mark.parametrize("tail", [0, 1, 2])
def test_operators_use_these_places(isa, size, tail):
    """Against a dense inverse by torch; the last block may be short."""
    n = 2 * size + min(tail, size - 1)
    g = gradients(30, n)
    gram = gram_of(g, size)
    status = ops.new_status()
    dense = torch.linalg.inv(reference.unpack_fisher(gram, 30.0, DAMPING))
    inverse = ops.gram_inverse(gram, n, size, 30.0, DAMPING, torch.float64, status)
    state = fresh_inverse(gram.shape[0], size)
    ops.woodbury_update(state, g, 30.0, status)
    for i in range(size):
        for j in range(i + 1):
            place = i if i == j else size + i * (i - 1) // 2 + j
            scale = float(dense.abs().max())
            assert (inverse[:, place] - dense[:, i, j]).abs().max() < 1e-11 * scale
            assert (state[:, place] - dense[:, i, j]).abs().max() < 1e-5 * scale
    assert status.item() == -1


def test_the_fisher_gives_it_dense():
    n, size = 117, 50
    fisher, exact = WoodburyFisher(n, 30, size, damping=DAMPING), obert_kernels.GramFisher(n, size)
    g = gradients(30, n)
    fisher.accumulate(g)
    exact.accumulate(g)
    assert fisher.packed.shape == (3, 1275) and fisher.packed.dtype == torch.float32
    dense = fisher.inverse()
    assert dense.shape == (3, 50, 50) and torch.equal(dense, dense.mT)
    assert torch.equal(pack_inverse(dense), fisher.packed)
    assert relative_error(dense, exact.inverse(DAMPING, torch.float64)) < 1e-5
    assert torch.equal(fisher.diagonal(), dense.diagonal(dim1=1, dim2=2).flatten()[:n])
    dense.zero_()
    assert fisher.packed[:, :size].all(), "a copy"


# ---- What is refused ------------------------------------------------------------------

LAYOUT = r"^inverse must be \[blocks, B\(B\+1\)/2\] with B from 1 to 256, got "
WRONG = [
    (torch.zeros(5, 4), ValueError, LAYOUT + r"\(5, 4\)$"),  # no triangle number
    (torch.zeros(2, 54), ValueError, LAYOUT + r"\(2, 54\)$"),
    (torch.zeros(2, 56), ValueError, LAYOUT + r"\(2, 56\)$"),
    (torch.zeros(2, 0), ValueError, LAYOUT + r"\(2, 0\)$"),
    (torch.zeros(2, 10, 10), ValueError, LAYOUT + r"\(2, 10, 10\)$"),  # dense
    (torch.zeros(55), ValueError, LAYOUT + r"\(55,\)$"),
    (torch.zeros(1, 257 * 258 // 2), ValueError, LAYOUT + r"\(1, 33153\)$"),
    (torch.zeros(1, 55), ValueError, r"^inverse must have shape \(2, 55\), got \(1, 55\)$"),
    (torch.zeros(3, 55), ValueError, r"^inverse must have shape \(2, 55\), got \(3, 55\)$"),
    (torch.zeros(2, 3), ValueError, r"^inverse must have shape \(10, 3\), got \(2, 3\)$"),
    (torch.zeros(2, 55).double(), TypeError, r"^inverse must be one of float32, got torch.float64"),
    (torch.zeros(2, 55).half(), TypeError, r"^inverse must be one of float32, got torch.float16"),
    (torch.zeros(55, 2).T, ValueError, r"^inverse must be contiguous$"),
    (torch.zeros(2, 110)[:, ::2], ValueError, r"^inverse must be contiguous$"),
]


@pytest.mark.parametrize(
    ("inverse", "error", "message"), WRONG, ids=[f"{tuple(w[0].shape)}-{w[0].dtype}" for w in WRONG]
)
def test_a_wrong_inverse_is_named(inverse, error, message):
    weight, keep, status = torch.zeros(20), torch.ones(20, dtype=torch.bool), ops.new_status()
    before = inverse.clone()
    for call in (
        lambda: ops.woodbury_update(inverse, torch.zeros(1, 20), 1.0, status),
        lambda: ops.inverse_scores(inverse, weight, 1, status),
        lambda: ops.inverse_update(inverse, weight, keep, 1, True, True, status),
    ):
        with pytest.raises(error, match=message):
            call()
    assert torch.equal(inverse, before) and status.item() == -1


def test_the_right_one_is_taken():
    weight, status = torch.ones(20), ops.new_status()
    for size in (1, 2, 3, 10, 19, 20, 21, 256):
        inverse = fresh_inverse(num_blocks(20, size), size)
        scores = ops.inverse_scores(inverse, weight, 1, status)
        assert relative_error(scores, torch.full((20,), DAMPING / 2)) < 1e-6
    assert status.item() == -1


# ---- What is written ------------------------------------------------------------------

ORDINARY, NEGATED, NAN_BUT_KEPT, KEPT, PRUNED, PRUNED_BEFORE, NAN = range(7)


def blocks_of_every_kind(n: int, size: int, dtype: torch.dtype, failure_first: bool):
    """Weights, mask, and the kind of each block; the last block, or the first, is to fail."""
    lengths = [min(size, n - start) for start in range(0, n, size)]
    kinds = [b % 7 for b in range(len(lengths))]
    kinds[-1] = NEGATED
    if failure_first:
        kinds.reverse()
    weight = torch.randn(n, dtype=dtype)
    weight += weight.sign() * 0.1  # none is zero
    keep = torch.rand(n) < 0.5
    for b, kind in enumerate(kinds):
        if kind == NEGATED and lengths[b] == 1:  # the joint rule never looks at a sole weight's F
            kinds[b] = kind = NAN
        inside = slice(b * size, b * size + lengths[b])
        if kind in (ORDINARY, NEGATED, NAN):
            keep[inside][:1] = False  # something to do
            keep[inside][1:2] = True
        elif kind in (KEPT, NAN_BUT_KEPT):
            keep[inside] = True
        elif kind == PRUNED:
            keep[inside] = False
        else:
            weight[inside][~keep[inside]] = 0
    return weight, keep, torch.tensor(kinds)


@pytest.mark.parametrize("size", [1, 3, 4, 8, 16, 50, 64, 100])
@pytest.mark.parametrize("given", ["gram", "inverse"])
def test_updates_write_every_weight(isa, size, given, monkeypatch):
    """Outputs start as NaN.  A block that fails, or has nothing to prune, keeps its weights."""
    # On the CPU one thread takes several blocks of a given inverse at once.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    several = given == "inverse" and isa != CUDA_ON_HOST
    n = 2080 if several else -(-max(280, 7 * size) // 40) * 40
    gram = gram_of(gradients(40, n), size)
    fisher = (size, 40.0, DAMPING)
    good = ops.gram_inverse(gram, n, *fisher, torch.float32, ops.new_status())
    for dtype, failure_first in ((torch.float32, False), (torch.float64, True)):
        weight, keep, kinds = blocks_of_every_kind(n, size, dtype, failure_first)
        state = (gram if given == "gram" else good).clone()
        state[kinds == NEGATED] *= -100
        state[(kinds == NAN) | (kinds == NAN_BUT_KEPT)] = float("nan")
        failed = (kinds == NEGATED) | (kinds == NAN)
        first = int(failed.nonzero()[0])
        usable = ~failed & (kinds != NAN_BUT_KEPT)
        assert failed.any() and usable.any()
        still = failed | (kinds == KEPT) | (kinds == NAN_BUT_KEPT) | (kinds == PRUNED_BEFORE)
        failed, still = (t.repeat_interleave(size)[:n] for t in (failed, still))
        for c in (1, 4, 40):
            for joint in (False, True):
                args = (state, weight, keep, c, joint)
                if given == "gram":
                    operator, oracle, rest = ops.gram_update, reference.gram_update, [fisher]
                else:
                    operator, oracle = ops.inverse_update, reference.inverse_update
                    rest = [(True,), (False,)]  # with or without the increase
                want, costs = oracle(*args, *rest[0], ops.new_status())
                for last in rest:
                    status = ops.new_status()
                    new, increase = onto_nan(operator, *args, *last, status)
                    assert status.item() == first
                    assert torch.equal(new[still], weight[still])
                    assert relative_error(new[~still], want[~still]) < TOLERANCE[dtype]
                    assert not new[~keep & ~failed].any()
                    if increase.numel():
                        assert relative_error(increase[usable], costs[usable]) < 1e-11
                        assert not increase[~usable].any()
                    assert not torch.equal(new[~still], weight[~still])


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("c", [1, 4])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_kept_weight_that_is_no_number_stays_alone(isa, joint, c, bad):
    """Also where nothing else of its block goes."""
    size, n = 12, 36
    state = ops.gram_inverse(
        gram_of(gradients(40, n), size), n, size, 40.0, DAMPING, torch.float32, ops.new_status()
    )
    weight, keep = torch.randn(n), torch.ones(n, dtype=torch.bool)
    keep[[*range(4), *range(12, 16)]] = False
    expected, costs = ops.inverse_update(state, weight, keep, c, joint, True, ops.new_status())
    weight[[6, 30]] = bad
    status = ops.new_status()
    new, increase = ops.inverse_update(state, weight, keep, c, joint, True, status)
    assert status.item() == -1
    torch.testing.assert_close(increase, costs, rtol=1e-12, atol=0)
    numbers = weight.isfinite()
    torch.testing.assert_close(new[numbers], expected[numbers])
    assert not new[~numbers].isfinite().any()


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_pruned_weight_that_is_no_number_fails_its_own_block_alone(isa, joint, bad, one_thread):
    """Of a group that the border of the block cuts, the part behind it is another block's."""
    size, n = 10, 400
    state, weight = fresh_inverse(n // size, size), torch.randn(n)
    keep = torch.ones(n, dtype=torch.bool)
    keep[[8, 15]] = False
    weight[8] = bad
    status = ops.new_status()
    new, increase = ops.inverse_update(state, weight, keep, 4, joint, True, status)
    assert status.item() == 0 and increase[0] == 0
    assert torch.equal(new[:15].nan_to_num(), weight[:15].nan_to_num())
    assert new[15] == 0 and torch.equal(new[16:], weight[16:])


@pytest.mark.parametrize("size", [20, 50, 256])
def test_a_denominator_beyond_float32_is_reported(isa, size):
    """And never taken for one that changes nothing, whichever type its sum is made in."""
    for scale in 10.0 ** torch.arange(12, 22, 0.5):
        state, status = fresh_inverse(1, size), ops.new_status()
        ops.woodbury_update(state, torch.full((1, size), scale), 1.0, status)
        if status.item() == -1:
            diagonal = state[0, :size]
            expected = (1 - 1 / (size + DAMPING / float(scale) ** 2)) / DAMPING
            assert relative_error(diagonal, torch.full((size,), expected)) < 1e-2
        else:
            assert float(scale) ** 2 / DAMPING * size > 1e38


@pytest.mark.parametrize("size", [1, 4, 50, 64])
def test_scores_of_the_good_blocks_survive_a_failed_one(isa, size):
    n = 7 * size
    gram = gram_of(gradients(30, n), size)
    state = ops.gram_inverse(gram, n, size, 30.0, DAMPING, torch.float32, ops.new_status())
    weight, status = torch.randn(n), ops.new_status()
    expected = reference.inverse_scores(state, weight, 1, status)
    state[4], state[5] = float("nan"), -state[5]
    scores = onto_nan(ops.inverse_scores, state, weight, 1, status)
    good = torch.ones(n, dtype=torch.bool)
    good[4 * size : 6 * size] = False
    assert relative_error(scores[good], expected[good]) < TOLERANCE[torch.float32]
    assert status.item() == 4


@pytest.mark.parametrize("isa", INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize("size", [7, 50])
def test_many_scores_are_those_of_few(isa, size):
    """From 2^20 on they are written past the caches, if they begin on a cache line."""
    n = (1 << 20) + 333
    blocks = num_blocks(n, size)
    state, weight = torch.rand(blocks, size * (size + 1) // 2) + 0.5, torch.randn(n)
    status = ops.new_status()
    many = onto_nan(ops.inverse_scores, state, weight, 1, status)
    diagonal = state[:, :size].flatten()[:n].double()
    assert relative_error(many, 0.5 * weight.double() ** 2 / diagonal) < TOLERANCE[torch.float32]
    few = 1000  # blocks
    for first in range(0, blocks, few):
        part = slice(first * size, (first + few) * size)
        scores = ops.inverse_scores(state[first : first + few], weight[part], 1, status)
        assert torch.equal(many[part], scores)
    state[[blocks - 3, 4000], size - 1] = torch.tensor([0.0, float("nan")])
    for offset in (0, 1, 16):
        status = ops.new_status()
        out = torch.full((n + 17,), float("nan"))
        native.core().inverse_scores(
            2, num_weights=n, block_size=size, inverse=state.data_ptr(), weight=weight.data_ptr(),
            weight_type=native.DTYPE_CODES[torch.float32], group_size=1,
            scores=out[offset:].data_ptr(), status=status.data_ptr(),
        )  # fmt: skip
        assert status.item() == 4000
        same = out[offset : offset + n] == many
        assert (~same).sum() == 2 and out.isnan().sum() == 18


# ---- What is left alone ---------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 15, 16, 17, 32, 33, 50, 64, 100])
@pytest.mark.parametrize("before", [0, 1, 3, 256])
def test_nothing_around_the_state_is_used_or_changed(isa, size, before):
    """The state lies between NaN, at any address."""
    n = 2 * size + max(1, size // 3)
    g, weight, keep = gradients(20, n), torch.randn(n), torch.rand(n) < 0.5
    blocks = num_blocks(n, size)
    alone = fresh_inverse(blocks, size)
    storage = torch.full((before + alone.numel() + 300,), float("nan"))
    state = storage[before : before + alone.numel()].view_as(alone).copy_(alone)
    around = torch.ones(storage.numel(), dtype=torch.bool)
    around[before : before + alone.numel()] = False
    bits = storage[around].view(torch.int32).clone()
    status = ops.new_status()

    def same(call):
        actual, expected = call(state), call(alone)
        for a, e in zip(actual, expected, strict=True):
            assert relative_error(a, e) < 1e-6
        assert torch.equal(storage[around].view(torch.int32), bits)
        assert status.item() == -1

    def woodbury(inverse):
        ops.woodbury_update(inverse, g, 20.0, status)
        return (inverse,)

    same(woodbury)
    unchanged = state.clone()
    for c in {1, next(c for c in (4, 3, 2, 1) if n % c == 0)}:
        same(lambda inverse, c=c: (ops.inverse_scores(inverse, weight, c, status),))
        for joint in (False, True):
            same(lambda i, c=c, j=joint: ops.inverse_update(i, weight, keep, c, j, True, status))
    assert torch.equal(state, unchanged), "only Woodbury updates write to it"


@pytest.mark.parametrize("size", [2, 3, 5, 8, 16, 17, 33, 50, 64, 100])
def test_woodbury_leaves_what_is_past_a_short_block(isa, size):
    start = fresh_inverse(2, size)
    for short in {1, size // 2, size - 1}:
        state = start.clone()
        status = ops.new_status()
        ops.woodbury_update(state, gradients(20, size + short), 20.0, status)
        inside = torch.arange(size) < short
        used = pack_inverse((inside[:, None] & inside)[None])[0]
        assert torch.equal(state[1, ~used], start[1, ~used])
        assert not torch.equal(state[1, used], start[1, used])
        assert status.item() == -1


@pytest.mark.parametrize("size", [1, 4, 16, 50, 64])
def test_a_failed_block_keeps_its_state(isa, size, monkeypatch):
    """Bit for bit, while its neighbours are updated."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    blocks = 40 if isa == CUDA_ON_HOST else 300
    n = blocks * size
    g = gradients(20, n)
    for failed in ([0], [blocks - 1], [1, 2], [17]):
        spoiled = g.clone()
        for b in failed:
            spoiled[7, b * size] = float("nan")
        state, expected = fresh_inverse(blocks, size), fresh_inverse(blocks, size)
        start, status = state.clone(), ops.new_status()
        ops.woodbury_update(state, spoiled, 20.0, status)
        ops.woodbury_update(expected, g, 20.0, ops.new_status())
        bad = torch.zeros(blocks, dtype=torch.bool)
        bad[failed] = True
        assert status.item() == failed[0]
        assert torch.equal(state[bad], start[bad])
        assert relative_error(state[~bad], expected[~bad]) < 1e-6
        assert not torch.equal(state[~bad], start[~bad])


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect")
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_no_byte_past_an_end_is_touched(name):
    """On memory whose neighbouring pages are forbidden, so that even a read ends the process."""
    paths = [str(Path(obert_kernels.__file__).parents[1]), str(SUPPORT)]
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "guard_pages.py"), name],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert done.stdout.split() == ["untouched"], f"exit status {done.returncode}\n{done.stderr}"
