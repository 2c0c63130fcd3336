"""Which trials a grid has, and what they are called."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny import GREEDY

from obert_kernels import PruningConfig, ReconstructionConfig, register_saliency
from obert_kernels.trials.outcome import (
    GridPoint,
    Outcome,
    batches_for,
    estimate_key,
    label,
    make_grid,
    point_of,
)


def test_combinations_that_differ_in_nothing_run_once():
    settings = make_grid(
        texts=[64, 32, 64],
        texts_per_grad=[8, 16],
        block_size=[None, 50, 10],
        damping=["auto", 1e-3, 0.001],
        selection=["greedy", "diagonal", "magnitude"],
    )
    assert len(settings) == len(set(settings)) == 1 + 2 * 2 * 2 * 2 * 2
    assert point_of(settings[0]) == GridPoint("magnitude", "none"), (
        "knows neither gradients nor damping"
    )
    estimates = list(dict.fromkeys(point_of(setting)[2:5] for setting in settings))
    assert estimates[:3] == [(None, None, None), (2, 16, 10), (4, 8, 10)], "the cheapest first"
    assert {s.update for s in settings if s.selection == "diagonal"} == {"sum"}
    assert {s.update for s in settings if s.selection == "greedy"} == {"joint"}


def test_texts_that_give_the_same_gradients_are_one_setting():
    settings = make_grid(texts=[64, 71], texts_per_grad=[8])
    assert [(point_of(s).texts, s.fisher.num_grads) for s in settings] == [(64, 8)]


def test_updates_can_be_asked_for():
    settings = make_grid(selection=["diagonal", "magnitude"], update=["auto", "joint"])
    assert [(setting.selection, setting.update) for setting in settings] == [
        ("magnitude", "none"), ("diagonal", "sum"), ("diagonal", "joint"), ("magnitude", "joint"),
    ]  # fmt: skip
    assert [setting.uses_fisher for setting in settings] == [False, True, True, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": [8]}, "8 texts give no gradient of 16"),
        ({"texts_per_grad": [0]}, "at least 1"),
        ({"pattern": "2:4", "block_size": [50]}, "multiple of 4"),
        ({"pattern": "rows"}, "pattern must be"),
    ],
)
def test_impossible_grids(options, message):
    with pytest.raises(ValueError, match=message):
        make_grid(**options)


@pytest.mark.parametrize(
    "options", [{"texts": 1024}, {"block_size": None}, {"selection": "greedy"}, {"damping": 1e-7}]
)
def test_one_value_is_no_list(options):
    (name, value), *_ = options.items()
    with pytest.raises(TypeError, match=rf"{name} is a list .* write \[{value!r}\]"):
        make_grid(**options)


def test_names_tell_apart_what_stands_side_by_side():
    settings = make_grid(texts=[32, 64], damping=["auto", 1e-3], selection=["greedy", "magnitude"])
    names = [label(point_of(setting), [point_of(s) for s in settings]) for setting in settings]
    assert names[:3] == ["magnitude", "greedy, n 32, damping auto", "greedy, n 32, damping 0.001"]
    assert len(set(names)) == len(names)
    assert label(point_of(GREEDY), [point_of(GREEDY)]) == "greedy"


def test_names_tell_apart_settings_without_a_fisher():
    @register_saliency("looking", uses_fisher=False)
    def looking(problem):
        raise NotImplementedError

    settings = [point_of(config) for config in make_grid(texts=[32, 64], selection=["looking"])]
    assert [label(one, settings) for one in settings] == ["looking, n 32", "looking, n 64"]


FEW = ReconstructionConfig(num_samples=8)


def test_fits_tell_trials_apart_but_share_an_estimate():
    for base in (GREEDY, PruningConfig(selection="magnitude")):
        ways = [replace(base, reconstruction=how) for how in ("auto", None, FEW)]
        assert len({Outcome(way, 0.5).key for way in ways}) == 3
    assert len({estimate_key(replace(GREEDY, reconstruction=how)) for how in ("auto", None)}) == 1


def test_a_grid_keeps_how_its_base_fits():
    settings = make_grid(selection=["greedy", "magnitude"], base=PruningConfig(reconstruction=FEW))
    assert [setting.reconstruction for setting in settings] == [FEW] * 2


def test_what_batches_are_asked_for():
    magnitude = PruningConfig(selection="magnitude", reconstruction=None)
    assert batches_for(magnitude) is None
    assert batches_for(replace(magnitude, reconstruction=FEW)) == (1, 8), "to be fitted on"
    more = ReconstructionConfig(num_samples=1000)
    assert batches_for(replace(magnitude, reconstruction=more)) == (63, 16), "as many, or more"
    assert batches_for(replace(GREEDY, reconstruction=FEW)) == (4, 2), "of the Fisher"
