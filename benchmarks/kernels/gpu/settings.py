"""What is validated and measured, and how large."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.kernels.gpu.whole_runs import Work
from benchmarks.support.report import RESULTS

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROW_SECONDS = 5.0  # with --minutes


@dataclass(frozen=True)
class Settings:
    """What is run, and how large.

    Attributes:
        block_sizes: the one that matters most first.
        fits: columns of a matrix, and the share of each row that is left.
        minutes: the whole run takes; None: as long as it needs.
        row_seconds: after which a row begins no further round, once it has a few; None: all
            rounds are done.
        work: whole prunings.
    """

    block_sizes: tuple[int, ...] = (50, 4, 32, 64, 128)
    gradient_types: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    gradients_per_call: tuple[int, ...] = (16, 64)
    rounds: int = 20
    validation_blocks: int = 200
    least_copy_bytes: int = 256 << 20
    ceiling_bytes: int = 1 << 30
    matrix_size: int = 4096
    fits: tuple[tuple[int, float], ...] = ((768, 0.1), (768, 0.5), (3072, 0.1))
    minutes: float | None = None
    row_seconds: float | None = None
    work: Work = field(default_factory=Work)


def parse(arguments: list[str], description: str) -> tuple[Settings, Path]:
    """Settings, and the folder that results are written to."""
    parser = argparse.ArgumentParser(description=description)
    default = Settings()
    parser.add_argument(
        "--minutes", type=float, help="stop before they are over, what matters most first"
    )
    parser.add_argument("--block", type=int, nargs="+", default=default.block_sizes)
    parser.add_argument("--type", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument(
        "-k", type=int, nargs="+", default=default.gradients_per_call, help="gradients per call"
    )
    parser.add_argument("--rounds", type=int, default=default.rounds, help="at least 20")
    parser.add_argument("--results", type=Path, default=RESULTS / "gpu", help="folder to write to")
    found = parser.parse_args(arguments)
    if found.rounds < 20:
        parser.error("--rounds must be at least 20: medians of fewer say little")
    if found.minutes is not None and not found.minutes >= 1:
        parser.error("--minutes must be at least 1")
    settings = Settings(
        tuple(found.block),
        tuple(TYPES[name] for name in found.type),
        tuple(found.k),
        found.rounds,
        minutes=found.minutes,
        row_seconds=None if found.minutes is None else ROW_SECONDS,
    )
    return settings, found.results
