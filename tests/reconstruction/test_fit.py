"""The fit of one layer: the formula, the choice of the ridge, and the veto of held-back batches."""

import pytest
import torch

from obert_kernels import NumericalError
from obert_kernels.reconstruction.fit import RIDGES, fit_layer
from obert_kernels.reconstruction.moments import Moments

ROWS, INPUTS, OUTPUTS = 60, 12, 8


def equations(x, t, centred=True):
    moments = Moments()
    moments.add(x, [t])
    return moments.normal(0, centred)


def problem(noise=0.0, seed=0):
    """Inputs that are correlated, so that some can stand in for others."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mixed = normal(INPUTS, INPUTS)
    true = normal(OUTPUTS, INPUTS)
    keep = torch.rand(OUTPUTS, INPUTS, generator=generator) < 0.6
    keep[:, 0] = True
    seen, unseen = (normal(count, INPUTS) @ mixed + 1 for count in (ROWS, 400))
    outputs = [x @ true.mT + 3 + noise * normal(len(x), OUTPUTS) for x in (seen, unseen)]
    return true * keep, keep, equations(seen, outputs[0]), equations(unseen, outputs[1])


def test_rows_are_the_least_squares_of_their_inputs():
    """Each row of the formula, written out with a plain solve."""
    weight, keep, seen, held = problem(noise=0.5)
    ridge = 0.05
    fitted = fit_layer("w", weight, torch.zeros(OUTPUTS), keep, seen, held, ridge)
    assert fitted.report.is_kept
    r = ridge * seen.inputs.diagonal().mean()
    for row in range(OUTPUTS):
        s = keep[row].nonzero()[:, 0]
        system = seen.inputs[s][:, s] + r * torch.eye(len(s), dtype=torch.float64)
        right = seen.targets[row, s] + r * weight[row, s]
        expected = torch.zeros(INPUTS, dtype=torch.float64)
        expected[s] = torch.linalg.solve(system, right)
        torch.testing.assert_close(fitted.weight[row], expected)
    torch.testing.assert_close(fitted.bias, seen.target_mean - fitted.weight @ seen.input_mean)


def test_nothing_pruned_and_little_ridge_gives_the_layer_back():
    weight, keep, seen, held = problem()
    whole = torch.ones_like(keep)
    true, _, _, _ = problem()
    fitted = fit_layer("w", weight, torch.zeros(OUTPUTS), whole, seen, held, 1e-9)
    assert fitted.report.after < 1e-9
    torch.testing.assert_close(fitted.weight * keep, true, rtol=1e-4, atol=1e-4)


def test_the_ridge_is_the_one_with_the_least_error_on_held_back_rows():
    weight, keep, seen, held = problem(noise=3.0)
    bias = torch.zeros(OUTPUTS)
    chosen = fit_layer("w", weight, bias, keep, seen, held, "auto").report
    errors = {
        ridge: fit_layer("w", weight, bias, keep, seen, held, ridge).report.after
        for ridge in RIDGES
    }
    assert chosen.ridge == min(errors, key=errors.get)
    assert chosen.after == min(errors.values())
    assert len(set(errors.values())) == len(RIDGES)


def test_a_fit_that_is_worse_on_held_back_rows_is_not_kept():
    """The rows to fit have the signs of their outputs turned."""
    weight, keep, seen, held = problem()
    turned = seen._replace(targets=-seen.targets, target_mean=-seen.target_mean)
    bias = torch.full((OUTPUTS,), 3.0, dtype=torch.float64)
    fitted = fit_layer("w", weight, bias, keep, turned, held, 0.01)
    assert not fitted.report.is_kept
    assert fitted.report.after > fitted.report.before
    assert torch.equal(fitted.weight, weight) and torch.equal(fitted.bias, bias)


def test_errors_are_shares_of_the_variance():
    weight, keep, seen, held = problem()
    nothing = torch.zeros_like(weight)
    none = torch.zeros_like(keep)
    report = fit_layer("w", nothing, torch.zeros(OUTPUTS), none, seen, held, 0.1).report
    assert report.after == pytest.approx(1, rel=0.05)  # the mean alone
    assert report.before > 1.2  # not even that


def test_moments_that_are_not_finite_are_an_error_that_names_the_layer():
    weight, keep, seen, held = problem()
    broken = seen._replace(inputs=seen.inputs * float("inf"))
    with pytest.raises(NumericalError, match=r"encoder\.7\.weight: inputs or outputs"):
        fit_layer("encoder.7.weight", weight, None, keep, broken, held, "auto")


def test_held_back_rows_that_are_not_finite_are_an_error_as_well():
    weight, keep, seen, held = problem()
    broken = held._replace(target_square=held.target_square * float("nan"))
    with pytest.raises(NumericalError, match=r"7\.weight: inputs or outputs"):
        fit_layer("7.weight", weight, torch.zeros(OUTPUTS), keep, seen, broken, "auto")


@pytest.mark.parametrize("ridge", ["auto", 0.01])
@pytest.mark.parametrize("rows", [3, 48])
def test_inputs_that_are_constant_but_for_rounding(rows, ridge):
    """What is left of their covariance counts for nothing, and the bias takes it all."""
    generator = torch.Generator().manual_seed(rows)
    keep = torch.ones(OUTPUTS, INPUTS, dtype=torch.bool)
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator)
    x = torch.randn(INPUTS, generator=generator).expand(rows, INPUTS)
    moments = Moments()
    for _ in range(5):
        moments.add(x, [x @ weight.mT + 3])
    found = moments.normal(0, True)
    fitted = fit_layer("w", weight, torch.zeros(OUTPUTS), keep, found, found, ridge)
    assert torch.equal(fitted.weight.float(), weight)
    torch.testing.assert_close(fitted.bias.float(), torch.full((OUTPUTS,), 3.0))


def test_a_ridge_too_small_for_the_inputs_is_no_candidate():
    weight, keep, seen, held = problem()
    moments = seen.inputs.clone()
    moments.diagonal().sub_(torch.linalg.eigvalsh(moments)[0] + 2e-3 * moments.diagonal().mean())
    indefinite = seen._replace(inputs=moments)
    whole = torch.ones_like(keep)
    fitted = fit_layer("w", weight, torch.zeros(OUTPUTS), whole, indefinite, held, "auto")
    assert fitted.report.ridge > RIDGES[0]
    with pytest.raises(NumericalError, match="use a larger ridge"):
        fit_layer("w", weight, torch.zeros(OUTPUTS), whole, indefinite, held, RIDGES[0])
