"""N:M masks: the cheapest set of every group, from the oracle up to the model."""

import itertools

import pytest
import torch
from problems import DAMPING, gradients, gram_of, onto_nan
from test_ops import skip_if_refused
from tiny import TinyEncoder, batches, snapshot, train, unchanged

from obert_kernels import GramFisher, estimate_fisher, find_weights, ops, prune
from obert_kernels.fisher.living import LiveFisher
from obert_kernels.ops import reference
from obert_kernels.sparsity.masks import n_of_m_mask

PATTERNS = [(2, 4), (1, 4), (3, 4), (4, 8), (1, 2), (2, 3), (3, 16)]


def problem(n, block_size, k=40):
    return gram_of(gradients(k, n), block_size), (block_size, float(k), DAMPING)


@pytest.mark.parametrize(("kept", "group"), PATTERNS)
@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_against_the_oracle(isa, kept, group, blocks):
    """Which works everything out anew for every group."""
    block_size = group * blocks
    skip_if_refused(isa, block_size)
    for n in (block_size, 3 * block_size, 2 * block_size + group):
        gram, fisher = problem(n, block_size)
        for share in (1.0, 0.6, 0.0):
            keep = torch.rand(n) < share
            weight = torch.randn(n) * keep
            arguments = (kept, group, *fisher)
            status = ops.new_status()
            found = onto_nan(ops.gram_n_of_m, gram, weight, keep, *arguments, status)
            assert int(status) == -1
            expected = reference.gram_n_of_m(gram, weight.double(), keep, *arguments, status)
            assert found.dtype == torch.bool
            assert torch.equal(found, expected)
            before, after = (x.view(-1, group).sum(1) for x in (keep, found))
            assert torch.equal(after, before.clamp(max=kept))
            assert not found[~keep].any()


@pytest.mark.parametrize("block_size", [48, 64, 96, 128, 256])
def test_large_blocks(isa, block_size):
    skip_if_refused(isa, block_size)
    n = block_size + 8
    gram, fisher = problem(n, block_size)
    keep, weight = torch.rand(n) < 0.9, torch.randn(n)
    found = ops.gram_n_of_m(gram, weight, keep, 2, 4, *fisher, ops.new_status())
    expected = reference.gram_n_of_m(gram, weight.double(), keep, 2, 4, *fisher, ops.new_status())
    assert torch.equal(found, expected)


def cost(fisher, weight, gone):
    """Least increase of the quadratic model when the weights ``gone`` are zero."""
    inverse = fisher.inverse()[gone][:, gone].inverse()
    return float(0.5 * weight[gone] @ inverse @ weight[gone])


def test_one_group_gives_up_its_cheapest_set(isa):
    gram, fisher = problem(6, 6)
    dense = reference.unpack_fisher(gram, 40, DAMPING)[0]
    weight = torch.randn(6, dtype=torch.float64)
    best = min(itertools.combinations(range(6), 4), key=lambda q: cost(dense, weight, list(q)))
    everything = torch.ones(6, dtype=torch.bool)
    found = ops.gram_n_of_m(gram, weight, everything, 2, 6, *fisher, ops.new_status())
    assert (~found).nonzero().flatten().tolist() == list(best)


@pytest.mark.parametrize(("kept", "group"), [(2, 4), (3, 8), (13, 16)])
def test_of_equal_sets_the_first_goes(isa, kept, group):
    gram, fisher = torch.zeros(1, 48 * 49 // 2, dtype=torch.float64), (48, 1.0, 1.0)
    keep = torch.ones(48, dtype=torch.bool)
    found = ops.gram_n_of_m(gram, torch.ones(48), keep, kept, group, *fisher, ops.new_status())
    assert torch.equal(found, torch.arange(48) % group >= group - kept)


def test_later_groups_know_what_went_before(isa):
    """A pair of twins in two groups: after the first has gone the second is needed."""
    g = torch.randn(200, 2).repeat(1, 2) + 1e-3 * torch.randn(200, 4)  # 0 and 2, 1 and 3 alike
    gram = gram_of(g, 4)
    weight = torch.tensor([1.0, 1.2, 1.0, 1.2])
    keep = torch.ones(4, dtype=torch.bool)
    found = ops.gram_n_of_m(gram, weight, keep, 1, 2, 4, 200.0, DAMPING, ops.new_status())
    gone = (~found).nonzero().flatten().tolist()
    assert gone in ([0, 3], [1, 2]), "not both twins"


def test_a_failed_block_is_reported(isa):
    gram, fisher = problem(24, 8)
    gram[1] = torch.nan
    status = ops.new_status()
    everything = torch.ones(24, dtype=torch.bool)
    found = ops.gram_n_of_m(gram, torch.randn(24), everything, 2, 4, *fisher, status)
    assert int(status) == 1
    assert found[8:16].all(), "what failed is left as it was"
    assert found[:8].sum() == found[16:].sum() == 4


def test_a_block_that_fails_at_its_last_group_is_left_as_it_was(isa):
    gram, fisher = problem(24, 8)
    weight, keep = torch.randn(24), torch.ones(24, dtype=torch.bool)
    weight[12:16] = torch.inf
    arguments = (2, 4, *fisher)
    status, expected_status = ops.new_status(), ops.new_status()
    found = onto_nan(ops.gram_n_of_m, gram, weight, keep, *arguments, status)
    expected = reference.gram_n_of_m(gram, weight.double(), keep, *arguments, expected_status)
    assert int(status) == int(expected_status) == 1
    assert found[8:16].all() and torch.equal(found, expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("alive", [True, False])
def test_one_weight_that_is_no_number(isa, value, alive):
    """It is in no set that would go, and would stay."""
    gram, fisher = problem(24, 8)
    weight, keep = torch.randn(24), torch.ones(24, dtype=torch.bool)
    weight[9], keep[9] = value, alive
    status, expected_status = ops.new_status(), ops.new_status()
    found = onto_nan(ops.gram_n_of_m, gram, weight, keep, 2, 4, *fisher, status)
    expected = reference.gram_n_of_m(gram, weight.double(), keep, 2, 4, *fisher, expected_status)
    assert int(status) == int(expected_status) == (1 if alive else -1)
    assert torch.equal(found, expected)
    assert bool(found[8:16].all()) == alive and found[:8].sum() == found[16:].sum() == 4


@pytest.mark.parametrize(
    ("kept", "group", "block_size", "message"),
    [(2, 4, 10, "multiple of the group of 4, got 10"), (4, 4, 8, "less than group"),
     (0, 4, 8, "at least 1"), (2, 20, 20, "group at most 16")],
)  # fmt: skip
def test_bad_arguments(kept, group, block_size, message):
    gram, fisher = problem(40, block_size)
    everything = torch.ones(40, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        ops.gram_n_of_m(gram, torch.randn(40), everything, kept, group, *fisher, ops.new_status())


def test_living_rows_give_the_same_mask():
    n = 480
    g, alive = gradients(40, n), torch.rand(n) < 0.4
    weight = torch.randn(n) * alive
    full, live = GramFisher(n, 48), LiveFisher(alive, 48, 4)
    full.accumulate(g * alive)
    live.accumulate(g)
    expected = full.n_of_m(weight, alive, DAMPING, 2, 4)
    assert torch.equal(live.n_of_m(weight, alive, DAMPING, 2, 4), expected)
    assert not torch.equal(expected, alive)


def test_a_mask_by_scores():
    scores = torch.tensor([3.0, 1.0, 2.0, 2.0, 9.0, 8.0, 7.0, 6.0])
    everything = torch.ones(8, dtype=torch.bool)
    assert n_of_m_mask(scores, everything, 2, 4).tolist() == [1, 0, 0, 1, 1, 1, 0, 0]
    some = everything.clone()
    some[[4, 5, 6, 0]] = False
    assert n_of_m_mask(scores, some, 2, 4).tolist() == [0, 0, 1, 1, 0, 0, 0, 1]


@pytest.mark.parametrize("selection", ["greedy", "diagonal", "magnitude"])
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4"])
def test_the_model_has_the_pattern(selection, pattern):
    model = TinyEncoder(16)
    kept, group = map(int, pattern.split(":"))
    result = prune(
        model, batches(), pattern=pattern, num_grads=12, damping=1e-4, selection=selection
    )
    assert result.report.sparsity == 1 - kept / group
    assert result.report.settings["block_size"] == 48
    for name, weight in find_weights(model).items():
        assert ((weight != 0).view(-1, group).sum(1) == kept).all()
        assert torch.equal(weight != 0, result.masks[name])
    before = snapshot(model)
    again = prune(model, batches(), pattern=pattern, num_grads=12, damping=1e-4)
    assert unchanged(model, before)
    assert "nothing was pruned" in again.report.notes[0]


def test_better_than_magnitude_and_diagonal_on_the_loss():
    model, data = TinyEncoder(16), batches(40)
    train(model, data, 15)
    trained = snapshot(model)
    fisher = estimate_fisher(model, data, num_grads=40, pattern="1:4")
    losses, predicted = {}, {}
    for selection in ("magnitude", "diagonal", "greedy"):
        model.load_state_dict(trained)
        report = prune(
            model, pattern="1:4", fisher=fisher, damping=1e-4, selection=selection,
            update="joint", reconstruction=None,
        ).report  # fmt: skip
        predicted[selection] = report.predicted_increase
        with torch.no_grad():
            losses[selection] = sum(float(model.eval()(**b)["loss"]) for b in data) / len(data)
    assert predicted["greedy"] < min(predicted["diagonal"], predicted["magnitude"])
    assert losses["greedy"] < losses["magnitude"]


def test_partly_pruned_models_and_layer_passes():
    for max_memory in (None, 140_000):
        model = TinyEncoder(16)
        prune(model, sparsity=0.3, selection="magnitude")
        result = prune(
            model, batches(), pattern="2:4", num_grads=8, damping=1e-4, max_memory=max_memory
        )
        assert (result.report.memory["passes"] > 1) == (max_memory is not None)
        for weight in find_weights(model).values():
            assert (weight.view(-1, 4) != 0).sum(1).max() == 2


def test_what_does_not_fit_is_refused():
    model = TinyEncoder(16)
    before = snapshot(model)
    for arguments, message in (
        ({"pattern": "2:4", "sparsity": 0.8}, "pattern 2:4 prunes to a sparsity of 0.5"),
        ({"pattern": "2:4", "block_size": 50}, "a multiple of 4, such as 48; got 50"),
        ({"pattern": "2:4", "steps": 2}, "takes one step"),
        ({"pattern": "4:4"}, "N < M and M at most 16"),
        ({"pattern": "2:32"}, "N < M and M at most 16"),
        ({"pattern": "2:5"}, "the 16 columns of .* are not divisible by 5"),
    ):
        with pytest.raises(ValueError, match=message):
            prune(model, batches(), **arguments)
    assert unchanged(model, before)


def test_a_model_that_has_the_pattern_needs_no_gradients():
    model = TinyEncoder(16)
    prune(model, pattern="2:4", selection="magnitude")
    before = snapshot(model)
    prune(model, [], pattern="2:4", damping=1e-4)
    assert unchanged(model, before)
