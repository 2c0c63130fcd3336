"""Least squares on masks: optimal, zero where pruned, and the same both ways."""

import pytest
import torch

from obert_kernels import NumericalError
from obert_kernels.reconstruction import least_squares
from obert_kernels.reconstruction.least_squares import fit_on_masks

N, M = 40, 12


def problem(share=0.5, columns=N, rows=M):
    inputs = torch.randn(3 * columns, columns, dtype=torch.float64)
    moments = inputs.T @ inputs / len(inputs) + 0.1 * torch.eye(columns, dtype=torch.float64)
    targets = torch.randn(rows, columns, dtype=torch.float64)
    return moments, targets, torch.rand(rows, columns) < share


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_gradient_is_zero_on_what_remains(share):
    moments, targets, keep = problem(share)
    fitted = fit_on_masks(moments, targets, keep, "layer")
    assert (fitted[~keep] == 0).all()
    gradient = (fitted @ moments - targets)[keep]
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-11)


def test_rows_that_share_a_mask_come_back_in_their_order():
    moments, targets, keep = problem()
    keep[7], keep[2], keep[9] = keep[4], keep[0], keep[4]
    fitted = fit_on_masks(moments, targets, keep, "layer")
    for row in range(M):
        alone = fit_on_masks(moments, targets[row : row + 1], keep[row : row + 1], "layer")
        torch.testing.assert_close(fitted[row], alone[0], rtol=1e-12, atol=1e-14)


def test_by_pruned_columns_gives_the_same(monkeypatch):
    moments, targets, keep = problem(0.7)
    ways = []
    for pruned in (False, True):
        monkeypatch.setattr(
            least_squares, "_by_pruned_columns", lambda keep, p=pruned: torch.full((M,), p)
        )
        ways.append(fit_on_masks(moments, targets, keep, "layer"))
    assert not torch.equal(*ways)
    torch.testing.assert_close(*ways, rtol=1e-9, atol=1e-12)


def test_rows_take_the_cheaper_way():
    keep = torch.zeros(600, 600, dtype=torch.bool)
    keep[:, :30] = True
    keep[:200] = True
    by_pruned = least_squares._by_pruned_columns(keep)
    assert by_pruned[:200].all() and not by_pruned[200:].any()


@pytest.mark.parametrize("share", [0.3, 0.95])
def test_moments_that_are_not_positive_definite(share):
    moments, targets, keep = problem(share, 64, 64)
    assert least_squares._by_pruned_columns(keep).any() == (share > 0.5)
    keep[:, 3] = True
    moments[3, 3] = -1
    with pytest.raises(NumericalError, match=r"layer: .*use a larger ridge") as e:
        fit_on_masks(moments, targets, keep, "layer")
    assert (e.value.matrix, e.value.remedy) == ("layer", "use a larger ridge")


def test_no_rows():
    moments, _, _ = problem()
    empty = torch.zeros(0, N)
    assert fit_on_masks(moments, empty.double(), empty.bool(), "layer").shape == (0, N)
