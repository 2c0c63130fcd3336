"""The Python examples of README.md and docs, run as they stand there; and the links."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TinyEncoder, batches, snapshot, unchanged
from tiny_text import save_model

from obert_kernels import GramFisher, find_weights, load_plugin, model_loss, prune
from obert_kernels.deploy.checkpoints import save_pruned
from obert_kernels.fisher.estimators import estimators
from obert_kernels.plugins import Registry

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if "results" not in page.parts]
EXTENDING = ROOT / "docs" / "extending.md"


def examples(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


EXAMPLES = examples(EXTENDING)


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the examples take for granted: names, and files in the working folder."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    folder = save_model(tmp_path / "my-finetuned-bert", head=True)
    save_model(tmp_path / "my-embedding-model", head=False)
    bert = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["good film", "the plot was awful", "a nice and fine film", "bad"] * 16
    tokens = tokenizer(texts[:4], padding=True, return_tensors="pt")
    labelled = [{**tokens, "labels": torch.tensor([1, 0, 1, 0])}]
    (tmp_path / "pruned").mkdir()
    save_pruned(prune(bert, sparsity=0.5, selection="magnitude"), None, "pruned/sparsity-0.5")
    return {
        "torch": torch, "model": TinyEncoder(), "another_model": TinyEncoder(16),
        "batches": batches(), "held_back": batches(4), "bert": bert, "tokenizer": tokenizer,
        "texts": texts, "token_batches": labelled, "labelled": labelled,
        "regressor": torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)),
        "pairs": [(torch.randn(4, 8), torch.randn(4, 2)) for _ in range(8)],
        "correct": correct, "loss": mean_loss,
    }  # fmt: skip


@torch.no_grad()
def correct(model: torch.nn.Module, data: list[dict[str, torch.Tensor]]) -> float:
    hits = [(model(**batch)["logits"].argmax(1) == batch["labels"]).float() for batch in data]
    return float(torch.cat(hits).mean())


@torch.no_grad()
def mean_loss(model: torch.nn.Module, data: list[dict[str, torch.Tensor]]) -> float:
    return float(torch.stack([model(**batch)["loss"] for batch in data]).mean())


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page != EXTENDING and examples(page)],
    ids=lambda page: page.stem,
)
def test_examples_run(page: Path, names: dict[str, Any]) -> None:
    source = "\n".join(examples(page))
    exec(compile(source, str(page), "exec"), names)
    if "masks" in names and page.stem in ("README", "python"):
        assert all(not names["model"].get_parameter(name)[~mask].any()
                   for name, mask in names["masks"].items())  # fmt: skip
    if page.stem == "sweep":
        assert len(names["outcomes"]) == 8 and not names["left_out"]
        assert all(value.all() for value in names["model"].state_dict().values()), "dense again"
    if page.stem == "checkpoints":
        weights = dict(names["pruned"].named_parameters())
        assert all(torch.equal(weights[name] != 0, mask) for name, mask in names["masks"].items())
        assert Path("my-pruned-bert", "masks.safetensors").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    missing = [
        target for target in targets
        if "://" not in target and not (page.parent / target).exists()
    ]  # fmt: skip
    assert not missing


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


@pytest.fixture
def plugins(tmp_path):
    for number, source in enumerate(EXAMPLES):
        path = tmp_path / f"plugin{number}.py"
        path.write_text(source)
        load_plugin(path)


@pytest.mark.parametrize("source", EXAMPLES)
def test_under_thirty_lines(source):
    assert len([line for line in source.splitlines() if line.strip()]) < 30


@pytest.mark.usefixtures("plugins")
@pytest.mark.parametrize("selection", ["greedy", "diagonal"])
@pytest.mark.parametrize("pattern", ["unstructured", "block4", "2:4"])
def test_diagonal_fisher(selection, pattern):
    model, data = TinyEncoder(), batches()
    before = snapshot(model)
    result = prune(
        model, data, None if pattern == "2:4" else 0.5, pattern, num_grads=24, damping=1e-6,
        estimator="diagonal", selection=selection, reconstruction=None,
    )  # fmt: skip
    assert result.report.sparsity == 0.5
    model.eval()
    for name, weight in find_weights(model).items():
        mask = result.masks[name]
        assert torch.equal(weight, before[name] * mask), "nothing adapts"
        if pattern == "unstructured":
            continue
        groups = mask.view(-1, 4).sum(1)
        assert (groups == 2).all() if pattern == "2:4" else set(groups.tolist()) <= {0, 4}
    assert result.report.predicted_increase > 0


@pytest.mark.usefixtures("plugins")
def test_diagonal_fisher_scores_by_hand():
    model, data = TinyEncoder(), batches(6)
    name = "layer.0.wide.weight"
    weight = find_weights(model)[name]
    squares = torch.zeros_like(weight)
    model.eval()
    for batch in data:
        (gradient,) = torch.autograd.grad(model(**batch)["loss"], [weight])
        squares += gradient.square()
    cost = (squares / 6 + 1e-6) * weight.detach().square()
    mask = prune(
        model, data, 0.25, params=name, num_grads=6, damping=1e-6, estimator="diagonal",
        loss_fn=model_loss,
    ).masks[name]  # fmt: skip
    assert cost[~mask].max() <= cost[mask].min()


@pytest.mark.usefixtures("plugins")
def test_refilled_blocks_are_full():
    """Those of a dense model are the built-in ones; of a pruned one, of its remaining weights."""
    g, weight = torch.randn(40, 60), torch.randn(60)
    for alive in (torch.ones(60, dtype=torch.bool), torch.arange(60) % 3 == 0):
        refilled = estimators.find("refilled").create(alive, 10, 1, dtype=torch.float64, name="w")
        refilled.accumulate(g)
        known = GramFisher(int(alive.sum()), 10)
        known.accumulate(g[:, alive])
        scores = refilled.greedy_scores(weight, alive, 1e-3)
        left = alive[alive]
        assert torch.equal(scores[alive], known.greedy_scores(weight[alive], left, 1e-3))
        assert not scores[~alive].any() and refilled.mean_squares() == known.mean_squares()
        assert torch.equal(refilled.scores(weight, 1e-3)[alive], known.scores(weight[alive], 1e-3))
        keep = alive & (torch.arange(60) > 20)
        new, increase = refilled.update(weight, keep, 1e-3)
        expected = known.update(weight[alive], keep[alive], 1e-3)
        assert torch.equal(new[alive], expected[0]) and increase == expected[1] > 0
        assert not new[~keep].any()


@pytest.mark.usefixtures("plugins")
def test_sub_steps_with_refilled_blocks():
    options = {"num_grads": 12, "steps": 3, "damping": 1e-3, "block_size": 20}
    pruned = {}
    for estimator in ("gram", "refilled"):
        torch.manual_seed(0)
        model = TinyEncoder()
        result = prune(model, batches(), 0.8, estimator=estimator, **options)
        assert result.report.sparsity == pytest.approx(0.8, abs=0.002)
        for name, weight in find_weights(model).items():
            assert torch.equal(weight != 0, result.masks[name])
        pruned[estimator] = torch.cat([w.flatten() for w in find_weights(model).values()])
    assert not torch.equal(pruned["gram"], pruned["refilled"])  # they had other company
    with pytest.raises(ValueError, match="refilled blocks are for single weights"):
        prune(model, batches(), 0.9, "block4", estimator="refilled", **options)


def test_wanda():
    model, data = TinyEncoder(), batches()
    seen = []
    handle = model.layer[1]["narrow"].register_forward_hook(lambda m, i, o: seen.append(i[0]))
    model.eval()
    for batch in data:
        model(**batch)
    handle.remove()
    before = snapshot(model)
    result = prune(model, data, 0.5, selection="wanda", reconstruction=None)
    norms = torch.cat([x.flatten(0, 1) for x in seen]).norm(dim=0)
    name = "layer.1.narrow.weight"
    score, mask = before[name].abs() * norms, result.masks[name]
    assert (mask.sum(1) == 12).all(), "as many in every row"
    for row in range(12):
        assert score[row][~mask[row]].max() <= score[row][mask[row]].min()
    assert torch.equal(find_weights(model)[name], before[name] * mask), "no update by default"
    with pytest.raises(ValueError, match="batches is needed: this selection"):
        prune(model, sparsity=0.6, selection="wanda")
    with pytest.raises(ValueError, match="was used up before"):
        prune(model, iter(data), 0.6, selection="wanda", update="joint", num_grads=24, damping=1e-4)
    joint = prune(model, data, 0.7, selection="wanda", update="joint", num_grads=8, damping=1e-4)
    assert joint.report.predicted_increase > 0


@pytest.mark.usefixtures("plugins")
@pytest.mark.parametrize(("pattern", "shape"), [("tile16x1", (16, 1)), ("tile2x2", (2, 2))])
@pytest.mark.parametrize("samples_per_grad", [None, 2])
def test_tiles(pattern, shape, samples_per_grad):
    model = TinyEncoder(16)
    result = prune(
        model, batches(), 0.5, pattern, num_grads=12, samples_per_grad=samples_per_grad,
        damping=1e-4, block_size=32,
    )  # fmt: skip
    assert result.report.sparsity == 0.5
    for name, weight in find_weights(model).items():
        tiles = result.masks[name].unfold(0, shape[0], shape[0]).unfold(1, shape[1], shape[1])
        assert torch.equal(tiles.flatten(2).any(2), tiles.flatten(2).all(2))
        assert torch.equal(weight != 0, result.masks[name])


@pytest.mark.usefixtures("plugins")
def test_the_tile_of_one_column_is_the_built_in_pattern():
    built_in, made = TinyEncoder(16), TinyEncoder(16)
    made.load_state_dict(built_in.state_dict())
    arguments = {"num_grads": 12, "damping": 1e-4, "block_size": 16}
    first = prune(built_in, batches(), 0.5, "block16x1", **arguments)
    second = prune(made, batches(), 0.5, "tile16x1", **arguments)
    assert all(torch.equal(first.masks[name], second.masks[name]) for name in first.masks)


def test_unknown_names_are_refused(tmp_path):
    model = TinyEncoder()
    before = snapshot(model)
    with pytest.raises(ValueError, match="selection must be one of greedy, diagonal, magnitude"):
        prune(model, batches(), selection="random")
    with pytest.raises(ValueError, match=r"estimator must be one of gram.*got 'kfac'"):
        prune(model, batches(), estimator="kfac")
    assert unchanged(model, before)
    with pytest.raises(ValueError, match="selection needs a name"):
        Registry("selection").add("", 0)


def test_plugins_that_fail_say_why(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.py could not be loaded: .*no such file"):
        load_plugin(tmp_path / "nothing.py")
    with pytest.raises(ValueError, match="no_such_module could not be loaded: ModuleNotFound"):
        load_plugin("no_such_module")
    bad = tmp_path / "bad.py"
    bad.write_text("1 / 0")
    with pytest.raises(ValueError, match=r"bad\.py could not be loaded: ZeroDivisionError"):
        load_plugin(bad)
