"""CUDA kernels against the reference algorithm and torch on one GPU, and against its ceilings.

    python -m benchmarks.kernels.gpu              # everything; writes results/gpu/<device>.*
    python -m benchmarks.kernels.gpu --minutes 8  # what matters most first, as far as that goes
    python -m benchmarks.kernels.gpu --block 50 -k 16 --type float32

First every operator is checked against the float64 oracle on the device; a mismatch ends the
run.  Then the device's own ceilings are measured (copying memory, matrix products without
TF32), and every operator is timed by CUDA events, alternating with its contenders, on data
larger than the L2 cache, each time on the next of several copies.  A time is the median over
rounds and of the whole operator: outputs allocated and cleared are part of it.  Whole prunings
of two models come after the operators that they consist of.  Results are written after each row.
"""

from __future__ import annotations

import itertools
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.kernels.gpu import whole_runs
from benchmarks.kernels.gpu.fit import fit_kernel
from benchmarks.kernels.gpu.kernels import Kernel, kernels
from benchmarks.kernels.gpu.report import HEADER, left_out, table_row, write
from benchmarks.kernels.gpu.rows import Ceilings, Row, measure, measure_ceilings
from benchmarks.kernels.gpu.settings import Settings, parse
from benchmarks.kernels.gpu.timer import CudaTimer, Deadline, Timer, reason_to_refuse
from benchmarks.kernels.gpu.validation import Mismatch, is_refusal, validate
from benchmarks.support.machine import machine
from benchmarks.support.report import command
from obert_kernels.ops.fallback import SlowOperatorsWarning

# Of the time there is; block sizes that are not validated by then are not timed.
VALIDATION_SHARE = 0.3
FIRST_ROW = 10.0  # seconds that the first row may take
# What a pruning consists of, and what is compared with the reference.
MATTER_MOST = (
    "gram_accumulate", "gram_scores", "gram_greedy_scores", "gram_update", "woodbury_update",
)  # fmt: skip


def validated(timer: Timer, settings: Settings, deadline: Deadline) -> tuple[list[int], int]:
    """Block sizes validated in time, and the number of comparisons.

    Raises:
        Mismatch: an operator disagrees with the oracle.
    """
    sizes: list[int] = []
    count = 0
    for size in settings.block_sizes:
        if sizes and deadline.used() > VALIDATION_SHARE:
            break
        count += validate(
            (size,), settings.gradient_types, settings.validation_blocks, timer.device
        )
        sizes.append(size)
        print(f"B = {size}: {count} comparisons with the float64 oracle passed so far", flush=True)
    return sizes, count


class Run:
    """One run: the document, which is written whenever something is new in it."""

    def __init__(
        self, timer: Timer, settings: Settings, folder: Path, command: str, deadline: Deadline
    ) -> None:
        self.timer, self.settings, self.folder, self.deadline = timer, settings, folder, deadline
        about = {"torch": torch.__version__, **timer.describe()}
        print(f"{timer.name}: {', '.join(f'{name} {what}' for name, what in about.items())}")
        sizes, count = validated(timer, settings, deadline)
        self.sizes = sizes
        self.document: Row = {
            "command": command,
            "name": timer.name,
            "device": timer.describe(),
            "machine": machine(),
            "checks": count,
            "minutes": settings.minutes,
            "refused": [],
            "left_out": [f"B = {b}" for b in settings.block_sizes if b not in sizes],
            "finished": False,
            "whole_runs": [],
            "rows": [],
        }
        self.top: Ceilings = measure_ceilings(timer, settings)
        self.document["ceilings"] = {
            "bytes_per_s": self.top.bytes_per_s,
            "flops_per_s": self.top.flops_per_s,
        }
        self.longest = FIRST_ROW

    def all(self) -> Row:
        chosen = (
            kernels(size, self.settings.gradients_per_call, self.settings.gradient_types)
            for size in self.sizes
        )
        fits = [fit_kernel(*fit) for fit in self.settings.fits]
        every = [*itertools.chain.from_iterable(chosen), *fits]
        first = [k for k in every if k.block_size == self.sizes[0] and k.operator in MATTER_MOST]
        first += fits[:1]
        print(HEADER, flush=True)
        self.time_kernels(first)
        self.prune_models()
        print(HEADER, flush=True)
        self.time_kernels([kernel for kernel in every if kernel not in first])
        self.document["finished"] = True
        for path in write(self.document, self.folder, plot=True):
            print(f"wrote {path}")
        for what in left_out(self.document):
            print(what)
        return self.document

    def time_kernels(self, chosen: list[Kernel]) -> None:
        """Rows of operators, as far as the time goes."""
        for kernel in chosen:
            if not self.deadline.allows(self.longest):
                self.leave_out(f"B = {kernel.block_size} {kernel.operator}, {kernel.variant}")
                continue
            before = self.deadline.seconds()
            try:
                row = measure(kernel, self.timer, self.settings, self.top)
            except (ValueError, torch.OutOfMemoryError) as error:
                if isinstance(error, ValueError) and not is_refusal(error):
                    raise
                said = str(error) if isinstance(error, ValueError) else "out of memory"
                self.document["refused"].append(f"{kernel.variant}: {said}")
                print(f"refused: {self.document['refused'][-1]}", flush=True)
                continue
            spent = self.deadline.seconds() - before
            first = not self.document["rows"]
            self.longest = spent if first else max(self.longest, spent)
            self.document["rows"].append(row)
            print(table_row(row), flush=True)
            write(self.document, self.folder)

    def prune_models(self) -> None:
        """A row for each model, renewed after every round."""
        problem = whole_runs.reason_to_leave_out()
        print(whole_runs.HEADER, flush=True)
        for size in self.settings.work.models:
            rows = [] if problem else self.rounds_of(size)
            if not rows:
                self.leave_out(f"{size.name}: {problem or 'too little time'}")

    def rounds_of(self, size: whole_runs.Model) -> list[Row]:
        others = list(self.document["whole_runs"])
        found = []
        for row in whole_runs.measure_model(size, self.settings.work, self.timer, self.deadline):
            found.append(row)
            self.document["whole_runs"] = [*others, row]
            print(whole_runs.table_row(row), flush=True)
            write(self.document, self.folder)
        return found

    def leave_out(self, what: str) -> None:
        self.document["left_out"].append(what)


def run(
    timer: Timer,
    settings: Settings,
    folder: Path,
    command: str,
    clock: Callable[[], float] = time.monotonic,
) -> Row:
    """Validate, measure, write.

    Raises:
        Mismatch: an operator disagrees with the oracle, and nothing was timed; or whole prunings
            disagree.
    """
    return Run(timer, settings, folder, command, Deadline(settings.minutes, clock)).all()


def main() -> None:
    settings, folder = parse(sys.argv[1:], (__doc__ or "").splitlines()[0])
    reason = reason_to_refuse()
    if reason is not None:
        raise SystemExit(f"benchmarks/gpu.py: {reason}")
    torch.set_float32_matmul_precision("highest")  # no TF32, for torch and the reference alike
    try:
        with warnings.catch_warnings():
            # Nobody shall time torch in place of the kernels.
            warnings.simplefilter("error", SlowOperatorsWarning)
            run(CudaTimer(), settings, folder, command())
    except (Mismatch, SlowOperatorsWarning) as problem:
        raise SystemExit(f"benchmarks/gpu.py: {problem}") from None


if __name__ == "__main__":
    main()
