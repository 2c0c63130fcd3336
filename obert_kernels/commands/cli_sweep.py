"""The command ``obert-prune sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..ops.checks import MAX_BLOCK_SIZE
from ..trials.outcome import make_grid, number_or_word
from .config import RunConfig
from .options import (
    Data,
    EstimatorName,
    FisherDtype,
    FitTexts,
    GradientsOf,
    LabelColumn,
    MaxLength,
    MaxMemory,
    MaxTestTexts,
    Model,
    PairColumn,
    Params,
    PatternName,
    Plugin,
    Precision,
    Reconstruction,
    Scope,
    Seed,
    Sparsity,
    TextColumn,
    TrustRemoteCode,
    load_plugins,
    output_folder,
    prescribed_sparsity,
)
from .sweep import sweep_classifier
from .terminal import shown_work

_GRID = "Grid (each may be repeated)"


def sweep(
    model: Model,
    data: Data,
    sparsity: Sparsity = None,
    output: Annotated[Path, output_folder("table and plot")] = Path("obert-sweep"),
    texts: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Texts used for gradients in all. Default: 4096.",
            rich_help_panel=_GRID,
        ),
    ] = None,
    texts_per_grad: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Texts in each gradient. Default: 16.", rich_help_panel=_GRID),
    ] = None,
    block_size: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            max=MAX_BLOCK_SIZE,
            help="Weights per Fisher block. Default: 50, or the multiple of M below for N:M.",
            rich_help_panel=_GRID,
        ),
    ] = None,
    damping: Annotated[
        list[str] | None,
        typer.Option(
            help="A number, or auto, which chooses one on held-back texts. Default: auto.",
            rich_help_panel=_GRID,
        ),
    ] = None,
    selection: Annotated[
        list[str] | None,
        typer.Option(
            help="How weights are ranked: greedy, diagonal, magnitude, or a plugin's. Default: "
            "greedy.",
            rich_help_panel=_GRID,
        ),
    ] = None,
    update: Annotated[
        list[str] | None,
        typer.Option(
            help="joint, sum, none, or auto: sum for diagonal (oBERT's own), none for those that "
            "use no Fisher, joint for others. Default: auto.",
            rich_help_panel=_GRID,
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            metavar="MINUTES",
            help="Start nothing that would not end in this time; the same command goes on later.",
        ),
    ] = None,
    pattern: PatternName = "unstructured",
    scope: Scope = "global",
    reconstruction: Reconstruction = "auto",
    fit_texts: FitTexts = RunConfig.fit_texts,
    params: Params = None,
    estimator: EstimatorName = "gram",
    plugin: Plugin = None,
    gradients_of: GradientsOf = "predictions",
    fisher_dtype: FisherDtype = "float64",
    max_memory: MaxMemory = None,
    text_column: TextColumn = None,
    pair_column: PairColumn = None,
    label_column: LabelColumn = None,
    max_test_texts: MaxTestTexts = None,
    max_length: MaxLength = 128,
    precision: Precision = "auto",
    trust_remote_code: TrustRemoteCode = False,
    seed: Seed = 0,
) -> None:
    """Prune a text classifier in many settings at each sparsity, and find the best.

    Writes to OUTPUT: sweep.csv, which gets a line as soon as a trial is finished, sweep.md and
    sweep.png. Started again, it does what is not in sweep.csv yet; more of the grid may be asked
    for then. The best is chosen on held-back texts.
    """
    load_plugins(plugin)
    settings = RunConfig(
        model=model,
        data=data,
        sparsity=sparsity or [prescribed_sparsity(pattern)],
        output=output,
        pattern=pattern,
        scope=scope,
        reconstruction=reconstruction,
        fit_texts=fit_texts,
        params=params,
        estimator=estimator,
        plugin=plugin,
        gradients_of=gradients_of,
        fisher_dtype=fisher_dtype,
        max_memory=max_memory,
        text_column=text_column,
        pair_column=pair_column,
        label_column=label_column,
        max_test_texts=max_test_texts,
        max_length=max_length,
        precision=precision,
        trust_remote_code=trust_remote_code,
        seed=seed,
    )
    grid = make_grid(
        texts=texts or [4096],
        texts_per_grad=texts_per_grad or [16],
        block_size=block_size or [None],
        damping=[number_or_word(value) for value in damping or ["auto"]],
        selection=selection or ["greedy"],
        update=update or ["auto"],
        base=settings.pruning_config(),
    )
    with shown_work() as bars:
        sweep_classifier(settings, grid, budget, bars, typer.echo)
