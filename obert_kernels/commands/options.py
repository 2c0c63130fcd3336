"""Options that the commands share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..files import expanded
from ..plugins import load_plugin
from ..sparsity.patterns import NofM, find_pattern

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


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


def prescribed_sparsity(pattern: str) -> float:
    """Return the sparsity that a pattern has by itself; where it has none, --sparsity is missing.

    Raises:
        typer.BadParameter: it has none.
    """
    shape = find_pattern(pattern)
    if not isinstance(shape, NofM):
        raise typer.BadParameter("is needed, for example --sparsity 0.8", param_hint="--sparsity")
    return 1 - shape.kept / shape.span


def load_plugins(sources: list[str] | None) -> None:
    """Import the files and modules that --plugin names."""
    for source in sources or ():
        load_plugin(expanded(source) if source.endswith(".py") else source)


def _folder(text: str) -> Path:
    if not str(text).strip():
        raise typer.BadParameter("the name is empty: give a folder, . for this one")
    return expanded(text)


def output_folder(content: str) -> Any:
    """Return the option --output; shells leave a ``~`` in ``--output=~/pruned`` as it is."""
    return typer.Option(
        "--output", "-o", parser=_folder, metavar="FOLDER", help=f"Folder for {content}."
    )


Model = Annotated[
    str,
    typer.Argument(
        help="Folder of a Hugging Face model with tokenizer, or its name on the hub; "
        "demo:minilm is the demo's."
    ),
]
Data = Annotated[
    str,
    typer.Argument(
        help="CSV, TSV, JSON, JSONL or Parquet file, a folder with such files named train, "
        "validation and test, or a name for the datasets library (NAME or NAME:CONFIGURATION); "
        "demo:trec and demo:mr are the demo's. A single file is split 75/10/15 % into train, held "
        "back and test by a hash of the text."
    ),
]
Sparsity = Annotated[
    list[float] | None,
    typer.Option(
        "--sparsity",
        "-s",
        min=0.0,
        max=1.0,
        help="Share of the weights to remove, 0.8 is 80 %. Repeat it for several, each "
        "of which starts from the same weights. Not needed for N:M.",
    ),
]
PatternName = Annotated[
    str,
    typer.Option(
        help="unstructured; block4 (any block<c>): c consecutive weights of a row go "
        "together; block4x1: of a column; 2:4 (any N:M): at most 2 of every 4 remain.",
        rich_help_panel="Pruning",
    ),
]
Scope = Annotated[
    Literal["global", "layer"],
    typer.Option(
        help="One ranking over all matrices, or the same sparsity in each.",
        rich_help_panel="Pruning",
    ),
]
EstimatorName = Annotated[
    str,
    typer.Option(
        help="gram: the block Fisher; or a plugin's estimate.",
        rich_help_panel="Fisher",
    ),
]
Plugin = Annotated[
    list[str] | None,
    typer.Option(
        help="Python file or module that registers selections, estimators or patterns; repeatable.",
        rich_help_panel="Pruning",
    ),
]
Params = Annotated[
    list[str] | None,
    typer.Option(
        help="Matrix to prune: a parameter name or re:EXPRESSION; repeatable. "
        "Default: the linear layers of the encoder.",
        rich_help_panel="Pruning",
    ),
]
Reconstruction = Annotated[
    Literal["auto", "none"],
    typer.Option(
        help="auto: after pruning, fits the weights that remain in each layer, by least squares, "
        "to what the layer computed before; it needs no labels. none: leaves them.",
        rich_help_panel="Pruning",
    ),
]
FitTexts = Annotated[
    int,
    typer.Option(
        min=1,
        help="Texts that the reconstruction looks at, at most; they are some of those that "
        "gradients are taken of.",
        rich_help_panel="Pruning",
    ),
]
FisherDtype = Annotated[
    Literal["float64", "float32"],
    typer.Option(
        help="float32 takes half the memory but needs a larger damping.",
        rich_help_panel="Fisher",
    ),
]
GradientsOf = Annotated[
    Literal["predictions", "labels"],
    typer.Option(
        help="The model's own predictions, or the loss on the given labels (the empirical "
        "Fisher, as in the papers).",
        rich_help_panel="Fisher",
    ),
]
Precision = Annotated[
    Literal["auto", "float32", "bfloat16"],
    typer.Option(
        help="Type that gradients, evaluations and training are computed in. auto: bfloat16 on "
        "processors with AMX and on AMD's with AVX512_BF16, float32 on others.",
    ),
]
MaxMemory = Annotated[
    int | None,
    typer.Option(
        parser=_memory,
        metavar="SIZE",
        help="Memory on top of the model, such as 8GB; layers are then worked on in several "
        "passes where needed, which repeats the gradients. Default: what is free.",
        rich_help_panel="Fisher",
    ),
]
TextColumn = Annotated[
    str | None,
    typer.Option(help="Column of the text. Default: found by name.", rich_help_panel="Data"),
]
PairColumn = Annotated[
    str | None,
    typer.Option(
        help="Column of a second text. Default: known pairs such as premise, hypothesis.",
        rich_help_panel="Data",
    ),
]
LabelColumn = Annotated[
    str | None,
    typer.Option(help="Column of the class. Default: found by name.", rich_help_panel="Data"),
]
MaxTestTexts = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Test on no more texts than this: always the same ones, whatever the seed. Default: "
        "all.",
        rich_help_panel="Data",
    ),
]
MaxLength = Annotated[
    int,
    typer.Option(min=1, help="Tokens; longer texts are cut.", rich_help_panel="Data"),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run code that comes with the model (auto_map in its config.json). It may do anything "
        "you may: read it first.",
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        min=0,
        max=2**32 - 1,  # of NumPy's, which training seeds too
        help="Of everything random: order, dropout, a new head.",
    ),
]
