"""The operators as torch sees them: opcheck, fakes, torch.compile, other devices."""

import pytest
import torch
from problems import DAMPING, fresh_inverse, gradients, gram_of

from obert_kernels import ops
from obert_kernels.fisher.living import LiveFisher
from obert_kernels.ops import native

N, B = 110, 25


def samples():
    gram = gram_of(gradients(30, N), B)
    weight, keep = torch.randn(N), torch.rand(N) < 0.5
    inverse = fresh_inverse(gram.shape[0], B)
    fisher = (B, 30.0, DAMPING)
    live = LiveFisher(keep, B)
    tables = (live._gram_start, live._first_place, live._source)
    keeps, g = torch.rand(2, N) < 0.5, gradients(3 * N, N).double()
    return {
        "fit_rows": (g.T @ g, g[:5], keeps, torch.tensor([0, 3, 5]), ops.new_status()),
        "gram_accumulate_living": (live._gram, gradients(3, N), *tables),
        "gram_n_of_m": (gram, weight, keep, 2, 5, *fisher, ops.new_status()),
        "gram_accumulate": (gram.clone(), gradients(3, N), B),
        "gram_inverse": (gram, N, *fisher, torch.float32, ops.new_status()),
        "gram_diagonal": (gram, N, *fisher, torch.float64, ops.new_status()),
        "gram_solve": (gram, weight, *fisher, ops.new_status()),
        "gram_scores": (gram, weight, 1, *fisher, ops.new_status()),
        "gram_greedy_scores": (gram, weight, keep, 1, *fisher, ops.new_status()),
        "gram_update": (gram, weight, keep, 1, True, *fisher, ops.new_status()),
        "woodbury_update": (inverse.clone(), gradients(3, N), 3.0, ops.new_status()),
        "inverse_scores": (inverse, weight, 1, ops.new_status()),
        "inverse_update": (inverse, weight, keep, 1, False, False, ops.new_status()),
    }


NAMES = list(samples())


def operator(name):
    return getattr(torch.ops.obert_kernels, name).default


def test_every_operator_is_listed():
    defined = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("obert_kernels::")
    }
    assert defined == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    torch.library.opcheck(operator(name), samples()[name])


@pytest.mark.parametrize("name", NAMES)
def test_fake_shapes(name):
    """Meta tensors go through the fake and come out like real ones."""
    arguments = samples()[name]
    real = operator(name)(*arguments)
    meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
    fake = operator(name)(*meta)
    for r, f in zip(_tuple(real), _tuple(fake), strict=True):
        assert (r.shape, r.dtype) == (f.shape, f.dtype)


def _tuple(value):
    return () if value is None else value if isinstance(value, tuple) else (value,)


def test_compile_fullgraph():
    def step(gram, g, weight, keep, status):
        ops.gram_accumulate(gram, g, B)
        scores = ops.gram_scores(gram, weight, 1, B, 33.0, DAMPING, status)
        new, increase = ops.gram_update(gram, weight, keep, 1, True, B, 33.0, DAMPING, status)
        return scores * 2, new, increase.sum()

    gram, g = gram_of(gradients(30, N), B), gradients(3, N)
    weight, keep = torch.randn(N), torch.rand(N) < 0.5
    expected = step(gram.clone(), g, weight, keep, ops.new_status())
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    actual = compiled(gram.clone(), g, weight, keep, ops.new_status())
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_the_core_wants_every_argument_by_its_name():
    core = native.core()
    gram, out, status = torch.ones(1, 1).double(), torch.ones(1), ops.new_status()
    fisher = native.fisher_parameters(core, gram, 1, 1, 1.0, 0.5, status)
    given = {"fisher": fisher, "diagonal": out.data_ptr(), "diagonal_type": 0}
    assert core.gram_diagonal(1, **given) == -1
    assert out.item() == pytest.approx(2 / 3)
    for wrong, message in (
        ({"fisher": fisher, "diagonal": 0, "type": 0}, "gram_diagonal needs diagonal_type"),
        ({**given, "other": 1}, "gram_diagonal: unknown arguments"),
        ({**given, "fisher": 1}, "gram_diagonal: fisher has a wrong type"),
    ):
        with pytest.raises(TypeError, match=message):
            core.gram_diagonal(1, **wrong)
