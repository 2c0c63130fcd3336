"""Exact counts, ties, per-layer targets, and weights that are already gone."""

import pytest
import torch

from obert_kernels import magnitude_scores, select_masks
from obert_kernels.sparsity.masks import prunes_anything


def layers(*shapes):
    scores = {f"layer{i}": torch.rand(a * b) for i, (a, b) in enumerate(shapes)}
    keep = {f"layer{i}": torch.ones(shape, dtype=torch.bool) for i, shape in enumerate(shapes)}
    return scores, keep


def pruned(masks):
    return sum(int((~m).sum()) for m in masks.values())


@pytest.mark.parametrize("sparsity", [0, 0.001, 0.3, 0.5, 0.77, 0.999, 1, 1.0])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_exact_counts(sparsity, scope):
    scores, keep = layers((7, 12), (30, 5), (1, 1))
    masks = select_masks(scores, keep, sparsity, scope=scope)
    if scope == "global":
        assert pruned(masks) == round(sparsity * 235)
    else:
        for mask in masks.values():
            assert int((~mask).sum()) == round(sparsity * mask.numel())
    assert all(masks[name].shape == keep[name].shape for name in keep)


def test_the_smallest_go_in_one_ranking_over_all_layers():
    scores, keep = layers((20, 30), (40, 10))
    scores["layer0"] *= 1e-20  # also tells values apart that differ only in the exponent
    masks = select_masks(scores, keep, 0.55)
    everything = torch.cat([scores["layer0"], scores["layer1"]])
    gone = torch.zeros(1000, dtype=torch.bool)
    gone[everything.argsort()[:550]] = True
    assert torch.equal(torch.cat([~m.flatten() for m in masks.values()]), gone)


def test_ties_are_cut_exactly_and_by_position():
    scores = {"a": torch.ones(10), "b": torch.ones(10)}
    keep = {name: torch.ones(2, 5, dtype=torch.bool) for name in scores}
    masks = select_masks(scores, keep, 0.7)
    assert not masks["a"].any()
    assert masks["b"].flatten().tolist() == [False] * 4 + [True] * 6
    scores["b"][5] = 0.5
    masks = select_masks(scores, keep, 0.05)
    assert pruned(masks) == 1 and not masks["b"].flatten()[5]


def test_zero_scores_and_subnormals_are_ordered():
    scores = {"a": torch.tensor([0.0, 1e-45, 1e-40, 1e-38, 1.0, -0.0])}
    keep = {"a": torch.ones(6, dtype=torch.bool)}
    mask = select_masks(scores, keep, 4 / 6)["a"]
    assert mask.tolist() == [False, False, False, True, True, False]


@pytest.mark.parametrize("group_size", [2, 4, 8])
def test_groups_live_and_die_together(group_size):
    keep = {"a": torch.ones(6, 16, dtype=torch.bool)}
    scores = {"a": torch.rand(96 // group_size)}
    mask = select_masks(scores, keep, 0.5, group_size)["a"].view(-1, group_size)
    assert torch.equal(mask.any(1), mask.all(1))
    assert int((~mask.any(1)).sum()) == round(0.5 * 96 / group_size)


def test_pruned_weights_stay_pruned_and_count():
    scores, keep = layers((10, 10), (10, 10))
    keep["layer0"][:5] = False
    scores["layer0"][:50] = 9.0  # however high they score
    masks = select_masks(scores, keep, 0.4)
    assert pruned(masks) == 80
    assert not masks["layer0"][:5].any()


@pytest.mark.parametrize("target", [0.0, 0.1, 0.25])
def test_a_target_at_or_below_the_present_sparsity_changes_nothing(target):
    scores, keep = layers((10, 10), (10, 10))
    keep["layer0"][:5] = False
    masks = select_masks(scores, keep, target)
    assert all(torch.equal(masks[name], keep[name]) for name in keep)
    assert masks["layer0"] is not keep["layer0"]


def test_single_dead_weights_in_a_living_group_stay_dead():
    keep = {"a": torch.ones(2, 8, dtype=torch.bool)}
    keep["a"][0, 1] = False
    mask = select_masks({"a": torch.tensor([3.0, 1.0, 2.0, 4.0])}, keep, 0.25, group_size=4)["a"]
    assert mask[0].tolist() == [True, False, True, True, False, False, False, False]
    assert mask[1].all()


def test_a_sparsity_for_each_layer():
    scores, keep = layers((10, 10), (10, 10))
    masks = select_masks(scores, keep, {"layer0": 0.9, "layer1": 0.2})
    assert int((~masks["layer0"]).sum()) == 90 and int((~masks["layer1"]).sum()) == 20


def test_whether_anything_goes():
    """A layer below its target counts, also where all together are above."""
    _, keep = layers((4, 4), (4, 4))
    keep["layer0"][:] = False
    assert not prunes_anything(keep, 0.4)
    assert prunes_anything(keep, 0.4, scope="layer")
    assert prunes_anything(keep, {"layer0": 0.5, "layer1": 0.1})
    assert not prunes_anything(keep, {"layer0": 0.5, "layer1": 0.0})


def test_bad_input_is_named():
    scores, keep = layers((4, 4))
    for sparsity in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="sparsity must be between 0 and 1"):
            select_masks(scores, keep, sparsity)
    with pytest.raises(TypeError, match="sparsity must be a number from 0 to 1, got 'half'"):
        select_masks(scores, keep, "half")
    with pytest.raises(ValueError, match="scope must be"):
        select_masks(scores, keep, 0.5, scope="block")
    scores["layer0"][3] = float("nan")
    with pytest.raises(ValueError, match="layer0 hold NaN or negative"):
        select_masks(scores, keep, 0.5)


def test_magnitude_of_groups():
    weight = torch.tensor([[1.0, -2.0, 0.0, 3.0]])
    assert magnitude_scores(weight, 2).tolist() == [5.0, 9.0]
