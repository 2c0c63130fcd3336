"""Gradients of groups of samples from one backward pass: those of autograd, group by group."""

import subprocess
import sys
import warnings
from contextlib import nullcontext

import pytest
import torch
import transformers
from gradients_by_hand import assert_same, by_hooks
from tiny import TinyEncoder, batches, snapshot, unchanged
from torch import nn

from obert_kernels import GramFisher, WoodburyFisher, estimate_fisher, find_weights, prune
from obert_kernels.gradients.batches import samples_in, split_batch
from obert_kernels.gradients.losses import default_loss, model_loss
from obert_kernels.gradients.per_samples import GroupGradients, NotServed


@pytest.mark.parametrize("group", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("count", [1, 5])
def test_every_group_has_its_own_gradient(group, count):
    model = TinyEncoder()
    assert_same(model, batches(5, size=7), find_weights(model), count, group)


def test_more_groups_than_are_made_at_once():
    model = TinyEncoder()
    weights = find_weights(model)
    together = by_hooks(model, batches(2, size=11), weights, 12, 2)
    for at_once in (1, 2, 3):
        found = by_hooks(model, batches(2, size=11), weights, 12, 2, at_once=at_once)
        for name in weights:
            torch.testing.assert_close(found[name], together[name])


def bert(**kwargs):
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        vocab_size=50, max_position_embeddings=16, num_labels=3, **kwargs,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def padded_batch(size=6):
    lengths = torch.arange(3, 3 + size)
    mask = (torch.arange(12) < lengths[:, None]).long()
    tokens = torch.randint(1, 50, (size, 12)) * mask
    labels = torch.arange(size) % 3
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("group", [1, 4])
def test_a_bert_with_padding(group):
    model = bert()
    assert_same(model, [padded_batch(), padded_batch(5)], find_weights(model), 4, group)


def test_bfloat16_autocast():
    def loss_fn(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return model(**batch).loss

    model = bert()
    assert_same(model, [padded_batch()], find_weights(model), 3, 2, loss_fn, tolerance=3e-2)


def test_half_precision_model():
    model = bert().bfloat16()
    assert_same(model, [padded_batch()], find_weights(model), 3, 2, tolerance=5e-2)


def test_the_model_is_left_as_it_was():
    model = TinyEncoder()
    model.layer[0].eval()
    model.layer[1]["wide"].weight.requires_grad_(False)
    for parameter in (model.head.weight, model.layer[0]["wide"].weight):
        parameter.grad = torch.ones_like(parameter)
    weights = find_weights(model)
    trained = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    before = snapshot(model)

    def is_as_it_was():
        grads = {name for name, p in model.named_parameters() if p.grad is not None}
        return (
            grads == {"head.weight", "layer.0.wide.weight"}
            and bool(model.head.weight.grad.eq(1).all())
            and bool(model.layer[0]["wide"].weight.grad.eq(1).all())
            and [p.requires_grad for p in model.parameters()] == trained
            and [m.training for m in model.modules()] == modes
            and not any(m._forward_hooks for m in model.modules())
            and unchanged(model, before)
        )

    with torch.no_grad():
        found = by_hooks(model, batches(), weights, 5, 2)
    assert found["layer.1.wide.weight"].any(), "frozen weights are pruned too"
    assert is_as_it_was()
    broken = [*batches(1), {"tokens": batches(1)[0]["tokens"]}]
    with pytest.raises(TypeError, match="returned no loss"):
        by_hooks(model, broken, weights, 5, 2)
    assert is_as_it_was()
    run = GroupGradients(model, weights, 2).run(batches(), 9, lambda name, rows: None)
    next(run)
    run.close()
    assert is_as_it_was()


def attend(model, batch):
    """The output projection of the attention is used without a call of its module."""
    return nn.functional.mse_loss(model(batch[0], batch[0], batch[0])[0], batch[1])


def mixed(model, batch):
    """So is this weight, once out of two times."""
    again = nn.functional.linear(model(batch[0]), model.weight)
    return nn.functional.mse_loss(again, batch[1])


def contrast(model, batch):
    """Every sample's loss depends on the others."""
    x = model(batch[0]).mean(dim=1)
    return nn.functional.cross_entropy(x @ x.T, torch.arange(len(x)))


def sideways(model, batch):
    """The samples lie along the second dimension of the layer's input."""
    return nn.functional.mse_loss(model(batch[0].transpose(0, 1)), batch[1].transpose(0, 1))


@pytest.mark.parametrize("loss_fn", [attend, mixed, contrast, sideways])
def test_what_hooks_cannot_serve_takes_more_passes(loss_fn):
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    model, params = (attention, "out_proj") if loss_fn is attend else (nn.Linear(8, 8), "re:.*")
    batch = (torch.randn(6, 6, 8), torch.randn(6, 6, 8))
    reason = "called as a module" if loss_fn is attend else "when they are alone"
    with pytest.raises(NotServed, match=reason):
        GroupGradients(model, find_weights(model, params), 3, loss_fn).check(batch)
    options = {"num_grads": 4, "params": params, "loss_fn": loss_fn, "block_size": 8}
    expected = estimate_fisher(model, split_batch(batch, 3) * 2, **options)
    for data in ([batch, batch], iter([batch, batch])):
        estimate = estimate_fisher(model, data, samples_per_grad=3, **options)
        assert "every gradient took a backward pass of its own" in estimate.notes[0]
        for name, fisher in expected.fishers.items():
            torch.testing.assert_close(estimate.fishers[name].gram, fisher.gram)


@pytest.mark.parametrize("max_memory", [None, 700_000])
def test_pruning_is_the_same_as_with_a_pass_for_every_group(max_memory):
    data = batches(6, size=8)
    pieces = [piece for batch in data for piece in split_batch(batch, 2)]
    first = TinyEncoder(width=40)
    second = TinyEncoder(width=40)
    second.load_state_dict(first.state_dict())
    options = {"damping": 1e-4, "block_size": 20, "fisher_dtype": torch.float64}
    options |= {"num_grads": 22, "max_memory": max_memory, "reconstruction": None}
    report = prune(first, data, 0.6, samples_per_grad=2, **options).report
    assert (report.memory["passes"] > 1) == (max_memory is not None)
    assert report.settings["samples_per_grad"] == 2
    assert prune(second, pieces, 0.6, **options).report.sparsity == report.sparsity
    for name, weight in find_weights(first).items():
        torch.testing.assert_close(weight, find_weights(second)[name], rtol=1e-3, atol=1e-5)
    assert {"gradients", "fisher"} <= set(report.seconds)
    assert all(seconds >= 0 for seconds in report.seconds.values())


def test_pruned_weights_stay_out_of_the_fisher():
    model = TinyEncoder()
    weight = model.layer[0]["wide"].weight
    with torch.no_grad():
        weight[:, 3:9] = 0
    fisher = estimate_fisher(
        model, batches(2), num_grads=4, samples_per_grad=2, block_size=12
    ).fishers["layer.0.wide.weight"]
    apart = fisher.diagonal(0.5).view_as(weight)[:, 3:9]
    assert (apart == 2).all() and (fisher.diagonal(0.5) < 2).any()
    assert fisher.num_bytes < GramFisher(weight.numel(), 12).num_bytes


def test_repetition_is_noted_and_iterators_are_used_up():
    model = TinyEncoder()
    estimate = estimate_fisher(model, batches(3), num_grads=12, samples_per_grad=2)
    assert "12 gradients were taken from 3 batches, gone through 2.0 times" in estimate.notes[0]
    estimate_fisher(model, iter(batches(3)), num_grads=6, samples_per_grad=2)
    with pytest.raises(ValueError, match="ended after 3: pass a list"):
        estimate_fisher(model, iter(batches(3)), num_grads=7, samples_per_grad=2)


def test_bad_input_is_named():
    model, weights = TinyEncoder(), None
    weights = find_weights(model)
    with pytest.raises(ValueError, match="samples_per_grad must be at least 1"):
        estimate_fisher(model, batches(), samples_per_grad=0)
    odd = [{"tokens": torch.zeros(4, 3, dtype=torch.long), "labels": torch.tensor(1)}]
    with pytest.raises(ValueError, match="tensors all have one row per sample; got a dict"):
        estimate_fisher(model, odd, samples_per_grad=2)
    with pytest.raises(ValueError, match="batches is empty"):
        estimate_fisher(model, [], samples_per_grad=2)

    class Nan(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float("nan")

    seen = []

    def loss_fn(model, batch):
        seen.append(batch)
        loss = model(**batch)["loss"]
        return Nan.apply(loss) if len(seen) == 5 else loss

    # The check takes two passes, so the fifth is batch 2.
    with pytest.raises(ValueError, match=r"batch 2: the gradient of layer\.1\.narrow\.weight"):
        by_hooks(model, batches(), weights, 20, 2, loss_fn)


def test_samples_in():
    assert samples_in({"a": torch.zeros(3, 2), "b": torch.zeros(3)}) == 3
    assert samples_in((torch.zeros(3, 2), [torch.zeros(2)])) is None
    assert samples_in({"a": torch.zeros(3), "b": torch.tensor(1.0)}) is None
    assert samples_in({"a": 1}) is None


MEASURE = """
import gc, resource, torch
from torch import nn
from obert_kernels.gradients.per_samples import GroupGradients

model = nn.Sequential(*[nn.Linear(512, 512, bias=False) for _ in range(24)])
loss_fn = lambda m, b: m(b).square().mean()
weights = dict(model.named_parameters())
groups = GroupGradients(model, weights, 4, loss_fn)
sizes = []
def receive(name, rows):
    sizes.append(rows.numel() * 4)
def rss():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
for _ in groups.run([torch.randn(8, 512)], 2, receive):
    pass
before = rss()
open("/proc/self/clear_refs", "w").write("5")
for _ in groups.run([torch.randn(64, 512)], 16, receive):
    pass
high = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
print(high - before, max(sizes), sum(w.numel() * 4 for w in weights.values()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_more_than_one_layer_is_held():
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True)
    if "clear_refs" in done.stderr:
        pytest.skip("this system cannot restart the peak of resident memory")
    assert done.returncode == 0, done.stderr
    used, buffer, all_gradients = map(int, done.stdout.split())
    # Inputs and outputs of all layers are 6 MiB of that.
    assert used < buffer + all_gradients / 2, "one gradient of every layer would be more"


def test_no_warning_of_its_own():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = TinyEncoder()
        by_hooks(model, batches(1), find_weights(model), 2, 2)


def test_what_makes_a_batch_may_run_the_model():
    """Forward and backward, as to look for samples that the model finds hard."""
    model, data = TinyEncoder(), batches(4)
    expected = estimate_fisher(model, data, samples_per_grad=2, num_grads=8).fishers

    def hard():
        for batch in data:
            model.embedding.weight.requires_grad_(True)
            model(**batch)["loss"].backward()
            yield batch

    found = estimate_fisher(model, hard(), samples_per_grad=2, num_grads=8).fishers
    for name, fisher in found.items():
        assert fisher.num_gradients == 8
        torch.testing.assert_close(fisher.gram, expected[name].gram)


def test_gradients_stream_into_a_woodbury_inverse():
    model, data = TinyEncoder(), batches(4, 8)
    weights = find_weights(model)
    fishers = {n: WoodburyFisher(w.numel(), 16, 12, damping=1e-4) for n, w in weights.items()}
    run = GroupGradients(model, weights, 2, default_loss).run(
        data, 16, lambda n, g: fishers[n].accumulate(g)
    )
    assert list(run) == [4, 8, 12, 16]
    expected = estimate_fisher(model, data, num_grads=16, samples_per_grad=2, block_size=12)
    for name, fisher in fishers.items():
        known = expected.fishers[name].diagonal(1e-4)
        torch.testing.assert_close(fisher.diagonal(), known, rtol=1e-3, atol=0)


def test_batches_smaller_than_a_group_are_noted():
    options = {"num_grads": 4, "samples_per_grad": 6}
    assert (
        "have fewer than 6 samples" in estimate_fisher(TinyEncoder(), batches(), **options).notes[0]
    )
    larger = [*batches(2), *batches(2, size=6)]
    assert not estimate_fisher(TinyEncoder(), larger, **options).notes


@pytest.mark.parametrize("reads_once", [False, True])
def test_a_batch_of_several_samples_is_looked_at(reads_once):
    """With a single one a sum is a mean."""

    def loss_fn(model, batch):
        logits = model(batch["tokens"])["logits"]
        return nn.functional.cross_entropy(logits, batch["labels"], reduction="sum")

    data = [*batches(2, size=1), *batches(4)]
    options = {"num_grads": 6, "loss_fn": loss_fn}
    found = estimate_fisher(
        TinyEncoder(), iter(data) if reads_once else data, samples_per_grad=2, **options
    )
    assert "every gradient took a backward pass of its own" in found.notes[0]
    short = estimate_fisher(
        TinyEncoder(), iter(batches(3, size=1)), samples_per_grad=1, num_grads=3
    )
    assert not short.notes


@pytest.mark.parametrize("samples_per_grad", [None, 2])
@pytest.mark.parametrize("loss_fn", [None, model_loss])
def test_what_a_caller_has_set_does_not_matter(samples_per_grad, loss_fn):
    """A default device that the model is not on, inference mode."""
    options = {"num_grads": 8, "samples_per_grad": samples_per_grad, "loss_fn": loss_fn}
    model, data = TinyEncoder(), batches(12)
    before = snapshot(model)
    masks = []
    for context in (nullcontext(), torch.device("meta"), torch.inference_mode()):
        model.load_state_dict(before)
        with context:
            masks.append(prune(model, data, 0.5, **options).masks)
    for found in masks[1:]:
        assert all(torch.equal(found[name], mask) for name, mask in masks[0].items())


@pytest.mark.parametrize("samples_per_grad", [None, 2])
def test_the_few_that_are_pruned_have_no_gradient(samples_per_grad):
    """Too few for a Fisher of the living weights."""
    model = TinyEncoder()
    weight = find_weights(model)["layer.0.wide.weight"]
    with torch.no_grad():
        weight[:, 0] = 0
    options = {"num_grads": 24, "samples_per_grad": samples_per_grad, "block_size": 12}
    fisher = estimate_fisher(model, batches(), **options).fishers["layer.0.wide.weight"]
    assert type(fisher) is GramFisher
    diagonal = fisher.diagonal(0.5).view_as(weight)
    assert (diagonal[:, 0] == 2).all() and (diagonal[:, 1:] < 2).any()


def test_an_input_that_is_infinite_is_named():
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    good, bad = torch.randn(4, 4), torch.randn(4, 4)
    bad[1, 2] = float("inf")

    def loss_fn(model, batch):
        return torch.nan_to_num(model(batch), 0, 0, 0).square().mean()

    with pytest.raises(ValueError, match=r"batch 1: the gradient of 0\.weight holds NaN or infini"):
        estimate_fisher(
            model, [good, bad], params="re:.*", num_grads=4, samples_per_grad=2, block_size=4,
            loss_fn=loss_fn,
        )  # fmt: skip
