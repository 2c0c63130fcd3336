"""prune(): every option, exact sparsities, and nothing lost when it fails."""

import json
import time

import pytest
import torch
from tiny import TinyEncoder, batches, snapshot, train, unchanged
from torch import nn

from obert_kernels import (
    NumericalError,
    estimate_fisher,
    find_weights,
    model_loss,
    register_saliency,
)
from obert_kernels import prune as real_prune
from obert_kernels.files import write_json
from obert_kernels.pruning.rollback import Rollback
from obert_kernels.pruning.weights import commit


def prune(model, data=None, sparsity=0.5, **kwargs):
    kwargs.setdefault("num_grads", 24)
    kwargs.setdefault("damping", 1e-5)
    return real_prune(model, batches() if data is None else data, sparsity, **kwargs)


def zeros(model):
    weights = find_weights(model).values()
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


@pytest.mark.parametrize("pattern", ["unstructured", "block2", "block4", "block12"])
@pytest.mark.parametrize("update", ["sum", "joint", "none"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_all_combinations(pattern, update, scope):
    model = TinyEncoder()
    result = prune(model, pattern=pattern, update=update, scope=scope, block_size=10)
    assert result.model is model
    assert zeros(model) == result.report.sparsity == pytest.approx(0.5, abs=0.02)
    for name, weight in find_weights(model).items():
        assert torch.equal(weight != 0, result.masks[name])
    json.dumps(result.report.to_dict())
    assert "layer.0.wide.weight" in str(result.report)
    assert (result.report.predicted_increase is None) == (update == "none")


@pytest.mark.parametrize("block_size", [1, 7, 50, 256])
def test_block_sizes(block_size):
    assert prune(TinyEncoder(), block_size=block_size).report.sparsity == 0.5


def test_better_than_magnitude_on_the_loss():
    """The point of it all: a trained model loses less on the data it was trained on."""
    model, data = TinyEncoder(), batches(40)
    train(model, data, 15)
    trained = snapshot(model)
    losses = {}
    for name, options in {
        "magnitude": {"selection": "magnitude"},
        "joint": {"update": "joint"},
    }.items():
        model.load_state_dict(trained)
        prune(model, data, 0.5, num_grads=40, **options)
        with torch.no_grad():
            losses[name] = sum(float(model.eval()(**b)["loss"]) for b in data) / len(data)
    assert losses["joint"] < losses["magnitude"]


@pytest.mark.usefixtures("limits_are_of_the_fisher")
def test_same_result_in_layer_passes_and_from_an_estimate():
    model = TinyEncoder()
    dense = snapshot(model)
    whole = prune(model, block_size=20)
    expected = snapshot(model)
    for scope in ("global", "layer"):
        model.load_state_dict(dense)
        whole = prune(model, block_size=20, scope=scope)
        expected = snapshot(model)
        model.load_state_dict(dense)
        passes = prune(model, iter(batches()), block_size=20, scope=scope, max_memory=95_000)
        assert passes.report.memory["passes"] > 1
        assert whole.report.memory["passes"] == 1
        assert unchanged(model, expected)
        model.load_state_dict(dense)
        fisher = estimate_fisher(model, batches(), num_grads=24, block_size=20)
        from_estimate = prune(model, fisher=fisher, scope=scope)
        assert unchanged(model, expected)
        assert from_estimate.report.settings == whole.report.settings


def test_gradual_steps_keep_what_is_pruned():
    model = TinyEncoder()
    first = prune(model, sparsity=0.3)
    second = prune(model, sparsity=0.6)
    assert zeros(model) == pytest.approx(0.6, abs=1e-3)
    for name, mask in second.masks.items():
        assert not (mask & ~first.masks[name]).any()


@pytest.mark.parametrize("target", [0.0, 0.3, 0.5])
def test_a_target_not_above_the_present_sparsity_changes_nothing(target):
    model = TinyEncoder()
    prune(model, sparsity=0.5)
    before = snapshot(model)
    result = prune(model, sparsity=target, data=[])  # no gradient is needed
    assert unchanged(model, before)
    assert result.report.sparsity == 0.5
    assert "nothing was pruned or revived" in result.report.notes[0]


def test_sparsity_zero_and_one():
    model = TinyEncoder()
    before = snapshot(model)
    prune(model, sparsity=0)
    assert unchanged(model, before)
    prune(model, sparsity=1)
    assert zeros(model) == 1


def test_sparsity_by_name():
    model = TinyEncoder()
    before = snapshot(model)
    result = prune(model, sparsity={r"re:layer\.0": 0.75, "layer.1.wide": 0.25})
    found = {layer.name: layer.sparsity for layer in result.report.layers}
    assert found == {
        "layer.0.wide.weight": 0.75, "layer.0.narrow.weight": 0.75, "layer.1.wide.weight": 0.25,
    }  # fmt: skip
    assert torch.equal(model.layer[1]["narrow"].weight, before["layer.1.narrow.weight"])
    with pytest.raises(ValueError, match="matched twice"):
        prune(model, sparsity={r"re:layer": 0.75, "layer.1.wide": 0.25})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_weight_types(dtype):
    model = TinyEncoder(dtype=dtype)
    prune(model)
    assert zeros(model) >= 0.5
    assert all(p.dtype == dtype for p in model.parameters())


def test_non_contiguous_weights():
    model = TinyEncoder()
    other = TinyEncoder()
    other.load_state_dict(model.state_dict())
    weight = other.layer[0]["wide"].weight
    weight.data = weight.data.T.contiguous().T
    assert not weight.is_contiguous()
    prune(model)
    prune(other)
    assert unchanged(other, snapshot(model))


def test_progress_and_times():
    seen = []
    result = prune(TinyEncoder(), progress=lambda *event: seen.append(event))
    assert ("gradients", 24, 24) in seen and ("update", 4, 4) in seen
    stages = {"gradients", "fisher", "scores", "masks", "update", "reconstruction"}
    assert stages == set(result.report.seconds)


def test_repeated_batches_are_noted():
    result = prune(TinyEncoder(), batches(6))
    assert "24 gradients were taken from 6 batches" in result.report.notes[0]


def test_bad_arguments_are_named_before_anything_happens():
    model = TinyEncoder()
    before = snapshot(model)
    cases = [
        ("sparsity must be between 0 and 1", {"sparsity": 80}),
        ("pattern must be", {"pattern": "rows"}),
        ("divisible by 5", {"pattern": "block5"}),
        ("num_grads must be at least 1", {"num_grads": 0}),
        ("block_size must be between 1 and 256", {"block_size": 512}),
        ("damping must be positive", {"damping": 0}),
        ("selection must be", {"selection": "random"}),
        ("update must be", {"update": "both"}),
        ("scope must be", {"scope": "everywhere"}),
        ("matches no prunable", {"params": ["nothing"]}),
    ]
    for message, options in cases:
        with pytest.raises(ValueError, match=message):
            prune(model, **options)
    wrong = [
        ("damping must be a positive number or 'auto'", {"damping": None}),
        ("sparsity must be a number", {"sparsity": torch.tensor(0.5)}),
        ("block_size must be a whole number", {"block_size": 50.0}),
        (r"fisher_dtype must be torch.float64 or torch.float32", {"fisher_dtype": "float32"}),
        (r"an iterable of batches, got a mapping: pass \[batch\]", {"data": batches()[0]}),
    ]
    for message, options in wrong:
        with pytest.raises(TypeError, match=message):
            prune(model, **options)
    with pytest.raises(ValueError, match="batches is needed"):
        real_prune(model)
    with pytest.raises(ValueError, match=r"fisher has no estimate for layer\.0\.wide"):
        fisher = estimate_fisher(TinyEncoder(16), batches(), num_grads=2)
        real_prune(model, fisher=fisher)
    assert unchanged(model, before)


def test_too_little_memory_is_refused_with_remedies():
    with pytest.raises(MemoryError, match="raise max_memory to at least") as caught:
        prune(TinyEncoder(), max_memory=1000)
    for remedy in ("smaller block_size", "float32"):
        assert remedy in str(caught.value)


def test_free_memory_is_checked(monkeypatch):
    monkeypatch.setattr("obert_kernels.fisher.memory.available_memory", lambda device: 1000)
    with pytest.raises(MemoryError, match=r"free memory is 0\.0 MiB.*set max_memory"):
        prune(TinyEncoder())


class _Stop(KeyboardInterrupt):
    pass


@pytest.mark.parametrize("stage", ["gradients", "scores", "update"])
def test_an_interrupted_run_leaves_the_model_as_it_was(stage):
    def stop(now, done, total):
        if now == stage and done == 1:
            raise _Stop

    model = TinyEncoder()
    before = snapshot(model)
    with pytest.raises(_Stop):
        prune(model, progress=stop)
    assert unchanged(model, before)
    assert all(m.training for m in model.modules())


def test_an_interruption_while_writing_is_rolled_back(monkeypatch):
    """Stop after each possible number of weights written: none stays changed."""
    model = TinyEncoder()
    before = snapshot(model)
    weights = find_weights(model)
    for point in range(len(weights)):
        rollback = Rollback(model, weights)
        new = {name: torch.zeros_like(w) for name, w in weights.items()}
        calls = 0
        copy_ = torch.Tensor.copy_

        def stopping(self, *args, _point=point, _copy=copy_):
            nonlocal calls
            calls += 1
            result = _copy(self, *args)
            if calls == _point + 1:
                raise _Stop
            return result

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "copy_", stopping)
            with pytest.raises(_Stop):
                commit(weights, new, rollback)
        assert not unchanged(model, before)
        rollback.undo()
        assert unchanged(model, before)


def test_a_numerical_failure_leaves_the_model_as_it_was():
    model = TinyEncoder()
    with torch.no_grad():
        model.head.weight.mul_(1e6)
    before = snapshot(model)
    with pytest.raises(NumericalError, match=r"layer\.\d\.\w+\.weight: block \d+") as caught:
        prune(model, num_grads=4, damping=1e-9, fisher_dtype=torch.float32, loss_fn=model_loss)
    assert "raise damping" in str(caught.value)
    assert unchanged(model, before)


def test_magnitude_needs_no_batches_and_matches_torch():
    model = TinyEncoder()
    weights = {n: w.detach().clone() for n, w in find_weights(model).items()}
    real_prune(model, selection="magnitude", sparsity=0.7)
    flat = torch.cat([w.flatten().abs() for w in weights.values()])
    threshold = flat.sort().values[round(0.7 * flat.numel()) - 1]
    for name, weight in find_weights(model).items():
        assert torch.equal(weight, weights[name] * (weights[name].abs() > threshold))


def test_model_without_encoder_layers():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    data = [(torch.randn(5, 6), torch.randn(5, 2)) for _ in range(8)]
    result = real_prune(
        model, data, 0.5, num_grads=8, params="re:.*weight",
        loss_fn=lambda m, b: nn.functional.mse_loss(m(b[0]), b[1]),
    )  # fmt: skip
    assert result.report.sparsity == 0.5


@pytest.mark.parametrize("pattern", ["unstructured", "block4", "2:4"])
@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (lambda weight: weight.abs()[:-1], r"must give \d+ scores of layer\.0\.wide"),
        (lambda weight: weight.view(1, -1).abs(), r"must give \d+ scores of layer\.0\.wide"),
        (lambda weight: -weight.abs() - 1, r"layer\.0\.wide\.weight hold NaN or negative"),
        (lambda weight: weight * float("nan"), r"layer\.0\.wide\.weight hold NaN or negative"),
    ],
)
def test_scores_that_cannot_be_ranked_are_refused(pattern, scores, message):
    @register_saliency("odd", uses_fisher=False)
    def odd(problem):
        c = problem.pattern.group_size
        return {name: scores(problem.flat(name)[::c]) for name in problem.names()}

    model = TinyEncoder()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        real_prune(
            model, sparsity=None if pattern == "2:4" else 0.5, pattern=pattern, selection="odd"
        )
    assert unchanged(model, before)


def test_reports_are_json_whatever_they_hold(tmp_path):
    nan, infinity = float("nan"), float("inf")
    write_json(tmp_path / "a.json", {"x": [1.5, nan, {"y": (-infinity, "inf", None)}]})

    def refuse(name):
        raise AssertionError(name)

    found = json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)
    assert found == {"x": [1.5, None, {"y": [None, "inf", None]}]}


def test_a_selection_sees_the_model_in_eval_mode():
    modes = []

    @register_saliency("modes", uses_fisher=False)
    def saliency(problem):
        modes.append(problem.model.training)
        return {name: problem.flat(name).abs() for name in problem.names()}

    model = TinyEncoder().train()
    real_prune(model, sparsity=0.5, selection="modes")
    assert modes == [False] and model.training


def test_trials_tell_no_progress_and_no_time_is_counted_twice():
    seen = []
    start = time.perf_counter()
    report = prune(
        TinyEncoder(64), batches(64, 16), damping="auto", num_grads=256, samples_per_grad=4,
        progress=lambda *event: seen.append(event),
    ).report  # fmt: skip
    assert sum(report.seconds.values()) <= time.perf_counter() - start
    assert len(report.damping_trials) > 1 and seen.count(("update", 4, 4)) == 1
