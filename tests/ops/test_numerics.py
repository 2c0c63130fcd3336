"""Large gradients, small damping, NaN: accurate, or an error that names layer and block."""

import numpy as np
import pytest
import torch
from problems import gradients

from obert_kernels import EmpiricalBlockFisherInverse, GramFisher, NumericalError, WoodburyFisher

SCALES = [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0]
DAMPING = 1e-7


def exact_diagonal(g: torch.Tensor, damping: float) -> np.ndarray:
    """diag(F^-1) in extended precision from the same float32 gradients (numpy longdouble)."""
    x = g.cpu().numpy().astype(np.longdouble)
    f = x.T @ x / x.shape[0] + np.longdouble(damping) * np.eye(x.shape[1], dtype=np.longdouble)
    n = f.shape[0]
    inverse = np.eye(n, dtype=np.longdouble)
    for i in range(n):  # Gauss-Jordan; pivots of a positive definite matrix are positive
        pivot = f[i, i]
        f[i] /= pivot
        inverse[i] /= pivot
        for j in range(n):
            if j != i:
                factor = f[j, i]
                f[j] -= factor * f[i]
                inverse[j] -= factor * inverse[i]
    return np.diag(inverse)


@pytest.mark.parametrize("scale", SCALES)
def test_float64_gram_is_exact_to_1e_6(isa, scale):
    g = gradients(128, 50, scale)
    fisher = GramFisher(50, 50, device=g.device)
    fisher.accumulate(g)
    expected = exact_diagonal(g, DAMPING)
    error = np.abs(fisher.diagonal(DAMPING, torch.float64).cpu().numpy() / expected - 1).max()
    assert error < 1e-6


@pytest.mark.parametrize("scale", [*SCALES, 10.0, 1e3])
def test_singular_blocks_are_accurate_or_refused(isa, scale):
    """m < B, where only the damping keeps F regular: the hardest case for every path."""
    g = gradients(20, 50, scale)
    expected = exact_diagonal(g, DAMPING)
    outcomes = {}
    for kind in ("float64", "float32", "woodbury"):
        try:
            if kind == "woodbury":
                fisher = WoodburyFisher(50, 20, 50, damping=DAMPING, device=g.device)
                fisher.accumulate(g)
                diagonal = fisher.diagonal()
            else:
                fisher = GramFisher(50, 50, dtype=getattr(torch, kind), device=g.device)
                fisher.accumulate(g)
                diagonal = fisher.diagonal(DAMPING, torch.float64)
        except NumericalError as error:
            outcomes[kind] = "refused"
            assert "weights: block 0" in str(error) and "raise damping" in str(error)
            continue
        assert torch.isfinite(diagonal).all() and (diagonal > 0).all()
        outcomes[kind] = float(np.abs(diagonal.cpu().numpy() / expected - 1).max())
    assert outcomes["woodbury"] == "refused" or outcomes["woodbury"] < 1e-4
    if scale <= 1:
        assert outcomes["float64"] < 1e-6
    if scale <= 1e-3:
        assert outcomes["float32"] < 0.5


def test_too_small_damping_names_block_and_remedy():
    fisher = GramFisher(100, 50, dtype=torch.float32, name="encoder.layer.3.weight")
    fisher.accumulate(gradients(20, 100, 10.0))
    with pytest.raises(NumericalError, match=r"encoder\.layer\.3\.weight: block \d") as caught:
        fisher.diagonal(1e-7)
    assert "float64 Gram" in str(caught.value)
    assert fisher.diagonal(1.0).isfinite().all(), "the Gram is still good for a larger damping"


def test_nan_gradient_is_reported_with_its_block():
    g = gradients(20, 100)
    g[3, 77] = float("nan")
    fisher = GramFisher(100, 50, name="layer")
    fisher.accumulate(g)
    weight, keep = torch.randn(100), torch.rand(100) < 0.5
    for call in (
        lambda: fisher.diagonal(1e-4),
        lambda: fisher.inverse(1e-4),
        lambda: fisher.scores(weight, 1e-4),
        lambda: fisher.scores(weight, 1e-4, 4),
        lambda: fisher.update(weight, keep, 1e-4),
        lambda: fisher.solve(weight, 1e-4),
    ):
        with pytest.raises(NumericalError, match=r"layer: block 1 .*NaN or infinity") as caught:
            call()
        assert caught.value.block == 1
    woodbury = WoodburyFisher(100, 20, 50, damping=1e-4)
    with pytest.raises(NumericalError, match="block 1"):
        woodbury.accumulate(g)
    assert torch.isfinite(woodbury.packed).all()
    untouched = torch.eye(50) / 1e-4
    assert torch.equal(woodbury.inverse()[1], untouched), "the failed block keeps its state"
    assert not torch.equal(woodbury.inverse()[0], untouched)


def test_drop_in_class_raises_where_the_reference_turns_nan():
    inverse = EmpiricalBlockFisherInverse(4, 50, 100, 1e-7)
    for g in gradients(4, 100):
        inverse.add_grad(g)
    assert torch.isfinite(inverse.diag()).all()
    inverse.add_grad(torch.full((100,), float("inf")))
    with pytest.raises(NumericalError):
        inverse.diag()


def test_gradients_of_several_types_keep_theirs():
    inverse, fisher = EmpiricalBlockFisherInverse(2, 50, 100, 1e-3), GramFisher(100, 50)
    rough, fine = torch.randn(100).bfloat16(), torch.randn(100)
    for g in (rough, fine):
        inverse.add_grad(g)
        fisher.accumulate(g)
    assert torch.equal(inverse.diag(), fisher.diagonal(1e-3))


def test_overflowing_update_changes_nothing():
    """float16 weights whose update leaves the range of the type."""
    from torch import nn

    from obert_kernels import FisherEstimate, prune
    from obert_kernels.fisher.memory import MemoryPlan

    model = nn.Linear(50, 2, bias=False).half()
    with torch.no_grad():
        model.weight.copy_(torch.full((2, 50), 6e4))
    before = model.weight.clone()
    g = torch.randn(200, 1) * torch.ones(1, 100)  # all weights fully correlated
    fisher = GramFisher(100, 50, name="weight")
    fisher.accumulate(g)
    plan = MemoryPlan([["weight"]], 0, 0, 0, 1)
    estimate = FisherEstimate({"weight": fisher}, 200, {}, plan, [])
    with pytest.raises(ArithmeticError, match="weight left the range"):
        prune(model, fisher=estimate, sparsity=0.9, damping=1e-4)
    assert torch.equal(model.weight, before)
