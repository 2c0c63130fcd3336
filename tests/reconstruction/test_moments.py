"""Normal equations against the rows they were added up from."""

import pytest
import torch

from obert_kernels.reconstruction.moments import Moments

ROWS, INPUTS, OUTPUTS = 90, 7, 5


def rows(dtype=torch.float64, offset=0.0):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, INPUTS, generator=generator, dtype=torch.float64) + offset
    t = x @ torch.randn(INPUTS, OUTPUTS, generator=generator, dtype=torch.float64) + 2
    noisy = t + torch.randn(ROWS, OUTPUTS, generator=generator, dtype=torch.float64)
    return x.to(dtype), noisy.to(dtype)


def added_up(x, *targets, parts=4):
    moments = Moments()
    for pieces in zip(*(tensor.chunk(parts) for tensor in (x, *targets)), strict=True):
        moments.add(pieces[0], list(pieces[1:]))
    return moments


@pytest.mark.parametrize("parts", [1, 4])
def test_centred_moments_are_covariances(parts):
    x, t = rows(offset=3)
    found = added_up(x, t, parts=parts).normal(0, centred=True)
    xc, tc = x - x.mean(0), t - t.mean(0)
    torch.testing.assert_close(found.inputs, xc.mT @ xc / ROWS)
    torch.testing.assert_close(found.targets, tc.mT @ xc / ROWS)
    torch.testing.assert_close(found.input_mean, x.mean(0))
    torch.testing.assert_close(found.target_mean, t.mean(0))
    torch.testing.assert_close(found.target_square, tc.square().mean(0))


def test_others_are_second_moments():
    x, t = rows(offset=3)
    found = added_up(x, t).normal(0, centred=False)
    torch.testing.assert_close(found.inputs, x.mT @ x / ROWS)
    torch.testing.assert_close(found.targets, t.mT @ x / ROWS)
    torch.testing.assert_close(found.target_square, t.square().mean(0))
    assert not found.input_mean.any() and not found.target_mean.any()


@pytest.mark.parametrize("centred", [True, False])
def test_errors_are_those_of_the_rows(centred):
    x, t = rows(offset=3)
    found = added_up(x, t).normal(0, centred)
    weight = torch.randn(OUTPUTS, INPUTS, dtype=torch.float64)
    bias = torch.randn(OUTPUTS, dtype=torch.float64) if centred else None
    expected = (t - x @ weight.mT - (0 if bias is None else bias)).square().mean(0)
    torch.testing.assert_close(found.errors(weight, bias), expected)


def test_the_best_bias_leaves_no_mean_error():
    x, t = rows(offset=3)
    found = added_up(x, t).normal(0, centred=True)
    weight = torch.randn(OUTPUTS, INPUTS, dtype=torch.float64)
    left = t - x @ weight.mT - found.bias(weight)
    torch.testing.assert_close(left.mean(0), torch.zeros(OUTPUTS, dtype=torch.float64))


def test_float32_loses_nothing_to_a_large_mean():
    """Uncentred products of float32 would be off by some 1e-7 * 1e8."""
    x, t = rows(torch.float32, offset=1e4)
    found = added_up(x, t).normal(0, centred=True)
    xc = (x.double() - x.double().mean(0)).float().double()
    torch.testing.assert_close(found.inputs, xc.mT @ xc / ROWS, rtol=1e-3, atol=1e-3)


def test_layers_with_the_same_inputs_share_them():
    x, t = rows()
    moments = added_up(x, t, 2 * t[:, :3])
    first, second = moments.normal(0, True), moments.normal(1, True)
    assert torch.equal(first.inputs, second.inputs)
    torch.testing.assert_close(second.targets, 2 * first.targets[:3])


def test_a_part_has_the_equations_of_some_rows():
    x, t = rows()
    whole = added_up(x, t).normal(0, True)
    some = torch.tensor([3, 1])
    weight = torch.randn(OUTPUTS, INPUTS, dtype=torch.float64)
    bias = torch.randn(OUTPUTS, dtype=torch.float64)
    expected = whole.errors(weight, bias)[some]
    torch.testing.assert_close(whole.part(some).errors(weight[some], bias[some]), expected)
