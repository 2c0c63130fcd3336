"""Fisher blocks that hold only the weights that are left: the same results from less."""

from __future__ import annotations

import pickle

import pytest
import torch
from devices import INSTRUCTION_SETS
from problems import DAMPING, gradients, gram_of, relative_error
from tiny import TinyEncoder, batches, snapshot, unchanged

from obert_kernels import GramFisher, NumericalError, estimate_fisher, prune
from obert_kernels.fisher.living import LiveFisher, block_fisher, fisher_bytes
from obert_kernels.ops import living, reference


def masked_problem(n: int, share: float, c: int = 1, k: int = 40):
    """Gradients, weights and a mask under which ``share`` of the groups of c is left."""
    alive = (torch.rand(n // c) < share).repeat_interleave(c)
    return gradients(k, n), torch.randn(n) * alive, alive


def both(g, alive, size, c, dtype=torch.float64):
    """The Fisher of all weights, pruned ones without gradient, and that of the living."""
    full = GramFisher(len(alive), size, dtype=dtype)
    full.accumulate(g * alive)
    live = LiveFisher(alive, size, c, dtype=dtype)
    live.accumulate(g[:7])  # pruned weights have gradients, which are left aside
    live.accumulate(g[7:])
    return full, live


@pytest.mark.parametrize("c", [1, 4])
def test_results_on_cuda_are_those_of_the_cpu(request, c):
    g, weight, alive = masked_problem(600, 0.1, c)

    def results():
        fisher = LiveFisher(alive, 50, c)
        fisher.accumulate(g)
        scores = fisher.greedy_scores(weight, alive, DAMPING, c)
        keep = alive & (scores > scores.median()).repeat_interleave(c)
        return fisher._gram, scores, fisher.update(weight, keep, DAMPING, c)[0]

    on_cpu = results()
    cuda_on_host = request.getfixturevalue("cuda_on_host")
    cuda_on_host.reset_counters()
    on_cuda = results()
    assert cuda_on_host.counters()["load_bytes"] > 0
    for actual, known in zip(on_cuda, on_cpu, strict=True):
        assert relative_error(actual, known) < 1e-6


@pytest.mark.parametrize(("size", "c"), [(50, 1), (32, 1), (50, 4), (16, 16), (10, 4), (256, 2)])
@pytest.mark.parametrize("share", [0.5, 0.1, 0.003])
def test_results_are_those_of_the_full_blocks(size, c, share):
    n = 12 * size + 16 * c
    n -= n % c
    g, weight, alive = masked_problem(n, share, c)
    if c > 1:  # single weights of a group may be gone as well
        alive &= torch.rand(n) < 0.8
        weight *= alive
    alive[0] = True
    full, live = both(g, alive, size, c)
    assert live.num_gradients == full.num_gradients == len(g)
    assert live.mean_squares() == pytest.approx(full.mean_squares(), rel=1e-12)
    assert relative_error(live.diagonal(DAMPING), full.diagonal(DAMPING)) < 1e-6
    assert relative_error(live.scores(weight, DAMPING, c), full.scores(weight, DAMPING, c)) < 1e-6
    greedy = full.greedy_scores(weight, alive, DAMPING, c)
    assert relative_error(live.greedy_scores(weight, alive, DAMPING, c), greedy) < 1e-6
    keep = alive & (greedy > greedy.median()).repeat_interleave(c)
    for rule in ("joint", "sum"):
        new, increase = full.update(weight, keep, DAMPING, c, rule)
        found, predicted = live.update(weight, keep, DAMPING, c, rule)
        assert relative_error(found, new) < 1e-6
        assert predicted == pytest.approx(increase, rel=1e-6)
        assert not found[~keep].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_gradients_may_be_of_any_type_and_lie_apart(dtype):
    g, weight, alive = masked_problem(170, 0.3)
    apart = torch.randn(40, 200).to(dtype)[:, :170]
    apart.copy_(g)
    full, live = both(apart, alive, 50, 1)
    assert relative_error(live.scores(weight, DAMPING), full.scores(weight, DAMPING)) < 1e-6


def test_at_ninety_per_cent_an_eighth_of_the_memory_is_not_needed():
    alive = torch.rand(768 * 768) < 0.1
    full = GramFisher(len(alive), 50)
    live = block_fisher(alive, 50)
    assert isinstance(live, LiveFisher)
    assert live.num_bytes == fisher_bytes(alive, 50)
    assert live.num_bytes < full.num_bytes / 8


@pytest.mark.parametrize("c", [1, 4, 16])
def test_living_rows_alone_where_they_save_a_quarter(c):
    for share in (1.0, 0.95, 0.5, 0.2):
        alive = (torch.rand(1600 // c) < share).repeat_interleave(c)
        fisher = block_fisher(alive, 50, c)
        assert fisher.num_bytes == fisher_bytes(alive, 50, c)
        full = GramFisher(1600, 50).num_bytes
        assert fisher.num_bytes == full or fisher.num_bytes <= 0.75 * full
    assert isinstance(fisher, LiveFisher)
    assert isinstance(block_fisher(torch.ones(1600, dtype=torch.bool), 50, c), GramFisher)


def test_groups_that_outgrow_the_largest_block_take_full_blocks():
    alive = torch.ones(255 * 4, dtype=torch.bool)
    alive[-5:] = False
    assert isinstance(block_fisher(alive, 255, 4), GramFisher)
    with pytest.raises(ValueError, match="up to 260 places in whole groups of 4; 256 is the most"):
        LiveFisher(alive, 255, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gram_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 33, 70])
def test_the_operator_against_its_oracle(isa, dtype, gram_dtype, k):
    n = 3000
    alive = torch.rand(n) < torch.linspace(0.0, 1.2, n)  # blocks of every size
    live = LiveFisher(alive, 50, 1, dtype=gram_dtype)
    apart = gradients(k, n + 13).to(dtype)[:, 5 : n + 5]
    live.accumulate(apart)
    expected = LiveFisher(alive, 50, 1, dtype=torch.float64)
    tables = (expected._gram_start, expected._first_place, expected._source)
    reference.gram_accumulate_living(expected._gram, apart, *tables)
    assert relative_error(live._gram, expected._gram) < (
        1e-5 if gram_dtype.itemsize == 4 else 1e-12
    )


@pytest.mark.parametrize("gram_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("blocks", [1, 5, 1500])
def test_blocks_of_any_sizes_in_any_order(isa, gram_dtype, blocks):
    """Small ones share vectors; some are empty, and some places have no weight."""
    sizes = torch.randint(0, 11, (blocks,))
    sizes[torch.rand(blocks) < 0.05] = 256
    sizes[blocks // 3 : 2 * blocks // 3] *= (
        torch.rand(blocks)[: blocks // 3 * 2 - blocks // 3] < 0.1
    )
    first_place = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])
    places = int(first_place[-1])
    source = torch.arange(places, dtype=torch.int32)
    source[torch.rand(places) < 0.2] = -1
    triangles = sizes * (sizes + 1) // 2
    gram_start = triangles.cumsum(0) - triangles
    gram = torch.randn(int(triangles.sum()), dtype=gram_dtype)
    expected = gram.double().clone()  # of float64 it is the Gram itself
    for k in (3, 40):
        g = gradients(k, max(places, 1))
        living.gram_accumulate_living(gram, g, gram_start, first_place, source)
        reference.gram_accumulate_living(expected, g, gram_start, first_place, source)
    if gram.numel():
        assert relative_error(gram, expected) < (1e-5 if gram_dtype.itemsize == 4 else 1e-12)


@pytest.mark.parametrize("size", [3, 7, 11])
def test_a_gradient_that_is_nan_stays_in_its_block(isa, size):
    blocks, triangle = 403, size * (size + 1) // 2
    first_place, gram_start = torch.arange(blocks + 1) * size, torch.arange(blocks) * triangle
    source = torch.arange(blocks * size, dtype=torch.int32)
    gram, g = torch.zeros(blocks * triangle, dtype=torch.float64), gradients(8, blocks * size)
    g[:, [10 * size, 402 * size]] = float("nan")
    living.gram_accumulate_living(gram, g, gram_start, first_place, source)
    bad = gram.view(blocks, triangle).isnan().any(dim=1).nonzero().flatten()
    assert bad.tolist() == [10, 402]


def test_the_operator_checks_its_arguments():
    live = LiveFisher(torch.arange(100) % 3 == 0, 10)
    tables = [live._gram_start, live._first_place, live._source]
    operator = living.gram_accumulate_living
    torch.library.opcheck(operator, (live._gram, gradients(4, 100), *tables))
    with pytest.raises(ValueError, match="first_place must have one entry more"):
        operator(live._gram, gradients(4, 100), tables[0][1:], *tables[1:])
    with pytest.raises(TypeError, match="weight_at_place must be"):
        operator(live._gram, gradients(4, 100), *tables[:2], tables[2].long())


# What to change in which table, and the first block that it spoils.
POINT_OUTSIDE = [
    (2, 5, 100, 1),  # a weight behind the last
    (1, 3, 10_000, 2),  # a block of too many places
    (1, 0, -1, 0),
    (1, 10, 41, 9),  # places behind the last
    (1, 10, 35, 9),  # the last ends before it begins
    (0, 4, 10_000, 4),  # a Gram behind the end
    (0, 4, 100, 4),
    (0, 4, 99, 4),  # ... that begins before it
    (0, 4, 91, 4),
    (0, 4, -1, 4),
    (0, 4, 2**63 - 1, 4),
]
# The next block is sound by itself, and its Gram reaches into others.
ENDS_BEFORE_IT_BEGINS = (1, 2, 2, 1)


@pytest.mark.parametrize(
    ("table", "place", "value", "block"), [*POINT_OUTSIDE, ENDS_BEFORE_IT_BEGINS]
)
@pytest.mark.parametrize("isa", INSTRUCTION_SETS, indirect=True)
def test_tables_that_point_outside_are_refused(isa, table, place, value, block):
    live = LiveFisher(torch.arange(100) % 3 == 0, 10)
    tables = [live._gram_start.clone(), live._first_place.clone(), live._source.clone()]
    tables[table][place] = value
    message = f"block {block}: gram_start, first_place or weight_at_place"
    with pytest.raises(ValueError, match=message):
        living.gram_accumulate_living(live._gram, gradients(4, 100), *tables)


@pytest.mark.parametrize(("table", "place", "value", "block"), POINT_OUTSIDE)
def test_cuda_leaves_blocks_alone_whose_tables_point_outside(
    cuda_on_host, table, place, value, block
):
    live = LiveFisher(torch.arange(100) % 3 == 0, 10)
    tables = [live._gram_start.clone(), live._first_place.clone(), live._source.clone()]
    g = gradients(4, 100)
    expected, gram = live._gram.clone(), live._gram
    reference.gram_accumulate_living(expected, g, *tables)
    expected, found = expected.view(10, -1), gram.view(10, -1)  # blocks of four places each
    tables[table][place] = value
    living.gram_accumulate_living(gram, g, *tables)
    assert not found[block].any()
    others = torch.arange(10) != block
    if table == 1 and 0 < place < 10:  # the next block begins elsewhere, too
        assert not found[place].any()
        others[place] = False
    assert relative_error(found[others], expected[others]) < 1e-12


# Places of two blocks, of which a table of 300 holds the first and not the second.
STRANGE = [
    (0, 100, 320),  # goes on behind the table, where more places stand
    (0, 43, 300),  # more than the largest block
    (280, 300, 200),  # ends far before it begins
]


@pytest.mark.parametrize("first_place", STRANGE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cuda_leaves_blocks_alone_that_are_none(cuda_on_host, first_place, dtype):
    """All they could use is there: nothing but the check keeps them from it."""
    g = gradients(4, 400)
    places = torch.arange(400, dtype=torch.int32)[:300]
    first, length = first_place[0], first_place[1] - first_place[0]
    begins = length * (length + 1) // 2
    gram = torch.zeros(begins + 300 * 301 // 2, dtype=dtype)
    starts = torch.tensor([0, begins])
    living.gram_accumulate_living(gram, g, starts, torch.tensor(first_place), places)
    assert not gram[begins:].any()
    expected = gram_of(g[:, first : first + length].double(), length)
    assert relative_error(gram[:begins], expected.flatten()) < 1e-6


@pytest.mark.parametrize("places", [27, 61, 66, 67, 256])
def test_nothing_is_added_behind_the_last_gram(isa, places):
    """Not even zero, which would take the sign from what stands there."""
    entries = places * (places + 1) // 2
    storage = torch.full((entries + 300,), -0.0, dtype=torch.float64)
    tables = (torch.zeros(1, dtype=torch.int64), torch.tensor([0, places]))
    g = gradients(5, places)
    order = torch.arange(places, dtype=torch.int32)
    living.gram_accumulate_living(storage[:entries], g, *tables, order)
    assert relative_error(storage[:entries], gram_of(g, places).flatten()) < 1e-14
    assert storage[entries:].signbit().all() and not storage[entries:].any()


def test_no_blocks_are_no_work(isa):
    none = torch.zeros(0, dtype=torch.int64)
    places = torch.zeros(0, dtype=torch.int32)
    living.gram_accumulate_living(
        torch.zeros(0), gradients(3, 5), none, torch.zeros(1).long(), places
    )


def test_no_gradients_change_nothing(isa):
    live = LiveFisher(torch.arange(100) % 3 == 0, 10)
    live.accumulate(torch.empty(0, 100))
    assert not live._gram.any() and live.num_gradients == 0


def test_one_weight_or_none_may_be_left():
    g, weight = gradients(40, 130), torch.randn(130)
    for places in ([], [129]):
        alive = torch.zeros(130, dtype=torch.bool)
        alive[places] = True
        full, live = both(g, alive, 50, 1)
        assert torch.equal(live.scores(weight * alive, DAMPING) > 0, alive)
        new, _ = live.update(weight * alive, alive, DAMPING)
        assert torch.equal(new, weight * alive)
        assert live.mean_squares() == pytest.approx(full.mean_squares())


def test_sums_of_two_workers_merge():
    g, weight, alive = masked_problem(170, 0.3)
    whole, one, two = (LiveFisher(alive, 50) for _ in range(3))
    whole.accumulate(g)
    one.accumulate(g[:15])
    two.accumulate(g[15:])
    one, two = (pickle.loads(pickle.dumps(fisher)) for fisher in (one, two))  # sent to another
    one.merge(two)
    assert one.num_gradients == 40
    assert relative_error(one.scores(weight, DAMPING), whole.scores(weight, DAMPING)) < 1e-6
    assert one.mean_squares() == pytest.approx(whole.mean_squares())
    with pytest.raises(ValueError, match="other weights were left"):
        one.merge(LiveFisher(~alive, 50))


def test_a_failed_block_has_the_number_it_has_in_the_matrix():
    g, weight, alive = masked_problem(500, 0.3)
    g[3, 317] = torch.nan
    alive[310:320] = True
    live = LiveFisher(alive, 50, name="the.layer")
    live.accumulate(g)
    with pytest.raises(NumericalError, match=r"the\.layer: block 6 is not .* NaN") as caught:
        live.scores(weight, DAMPING)
    assert caught.value.block == 6


def test_groups_must_be_known_from_the_start():
    live = LiveFisher(torch.arange(200) % 4 == 0, 50, 2)
    with pytest.raises(ValueError, match="groups of 2: group_size must divide that, got 4"):
        live.scores((torch.arange(200) % 4 == 0).float(), DAMPING, 4)


@pytest.mark.parametrize(("sparsity", "kind"), [(0.6, LiveFisher), (0.1, GramFisher)])
def test_weights_that_came_back_are_not_lost(sparsity, kind):
    model = TinyEncoder()
    dense = snapshot(model)
    prune(model, sparsity=sparsity, selection="magnitude")
    fisher = estimate_fisher(model, batches(), num_grads=12)
    assert {type(found) for found in fisher.fishers.values()} == {kind}
    prune(model, sparsity=0.7, fisher=fisher, damping=1e-4)
    model.load_state_dict(dense)
    for selection, update in (("greedy", "joint"), ("diagonal", "sum"), ("magnitude", "joint")):
        with pytest.raises(ValueError, match=r"wide.* pruned when its Fisher was estimated"):
            prune(
                model, sparsity=0.7, fisher=fisher, damping=1e-4, selection=selection,
                update=update,
            )  # fmt: skip
        assert unchanged(model, dense)


def test_its_memory_is_that_of_its_tensors():
    fisher = LiveFisher(torch.rand(5000) < 0.1, 50)
    tensors = [value for value in vars(fisher).values() if isinstance(value, torch.Tensor)]
    held = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    assert fisher.num_bytes == pytest.approx(held, rel=0.01)
