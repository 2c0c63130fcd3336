"""Plants every fault listed beside this file, and says which ones no test notices.

    python tests/cuda/mutants/run.py [--only PATTERN] [--same] [--sample N] [--seconds S] [TESTS]

One build holds nearly all faults, a number switches one of them on.  For each fault a copy of
this process runs the tests that pass its place, those first that found the most so far, until one
fails, crashes, or takes far longer than without the fault.  Prints the faults that survive and the
score; ends with 1 if a fault survives that the lists do not explain.

With ``--seconds 5`` all of them take about ten minutes of one core, the build included.  Without
it a fault that survives has run every test that passes its place, up to a minute and a half.
"""

from __future__ import annotations

import argparse
import bisect
import functools
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import devices
import host_cuda_build
import mutants
import pytest
import torch
from _pytest.runner import runtestprotocol

FOLDER = ROOT / "build" / "mutants"
TESTS = ["tests/ops", "tests/cuda", "tests/fisher"]


def is_on_host(item: pytest.Item) -> bool:
    """Whether a test runs the CUDA kernels on the host."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    return (
        "cuda_on_host" in getattr(item, "fixturenames", ())
        or parameters.get("isa") == devices.CUDA_ON_HOST
        or item.path.stem == "test_cuda_resources"
    )


def passes(item: pytest.Item) -> bool:
    reports = runtestprotocol(item, log=False, nextitem=None)
    return not any(report.failed for report in reports)


class Trial:
    """Tests of one fault in a copy of this process."""

    def __init__(self, seconds: dict[pytest.Item, float]) -> None:
        self.seconds = seconds

    def killer(self, prepare: Callable[[], None], items: list[pytest.Item]) -> pytest.Item | None:
        """The first test that fails, crashes or hangs; none if all pass."""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            self._run(prepare, items, writer)
        os.close(writer)
        with open(reader, "rb") as started:
            words = started.read()
        status = os.waitpid(child, 0)[1]
        return None if status == 0 else items[int.from_bytes(words[-4:], "little")]

    def _run(self, prepare: Callable[[], None], items: list[pytest.Item], writer: int) -> None:
        """In the copy: never returns."""
        code = 1
        try:
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            prepare()
            for index, item in enumerate(items):
                os.write(writer, index.to_bytes(4, "little"))
                # Its end if it hangs: of processor time, as others may use the machine.
                signal.setitimer(signal.ITIMER_PROF, 10 + 20 * self.seconds[item])
                if not passes(item):
                    break
            else:
                code = 0
        finally:
            os._exit(code)


class Run:
    """A pytest plugin that takes the place of its loop over the tests."""

    def __init__(
        self, faults: list[mutants.Mutant], most_seconds: float, say: Callable[[str], None]
    ) -> None:
        self.faults, self.most, self.say = faults, most_seconds, say
        self.switched = mutants.Switched(faults, FOLDER)
        self.module: ModuleType = self.switched.module
        devices.host_cuda = functools.cache(lambda: self.module)
        self.killed: list[mutants.Mutant] = []
        self.survived: list[mutants.Mutant] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = filter(is_on_host, items)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        torch.set_num_threads(1)  # a copy of a process has none of its threads
        seconds: dict[pytest.Item, float] = {}
        reached: dict[pytest.Item, set[int]] = {}
        for item in session.items:
            start = time.perf_counter()
            if not passes(item):
                raise pytest.UsageError(f"fails without any fault: {item.nodeid}")
            seconds[item], reached[item] = time.perf_counter() - start, self.switched.take_reached()
        self.say(f"{len(seconds)} tests, {sum(seconds.values()):.0f} s")
        trial, found = Trial(seconds), Counter()
        for number, mutant in enumerate(self.faults):
            items = [i for i in session.items if mutant.constant or number in reached[i]]
            items.sort(key=lambda item: seconds[item] / (1 + 10 * found[item, mutant.file]))
            items = items[: bisect.bisect([*accumulate(map(seconds.get, items))], self.most) + 1]
            try:
                killer = trial.killer(self.planter(number), items)
            except mutants.RefusedByCompiler:
                self.killed.append(mutant)
                self.say(f"a static assertion\t{mutant}")
                continue
            if killer is None:
                self.survived.append(mutant)
            else:
                self.killed.append(mutant)
                found[killer, mutant.file] += 1
            end = killer.nodeid if killer else f"SURVIVED {len(items)} tests"
            self.say(f"{end}\t{mutant}")
        return True

    def planter(self, number: int) -> Callable[[], None]:
        """What plants a fault in a copy of this process; compiles here what has to be."""
        mutant = self.faults[number]
        if not mutant.constant:
            return functools.partial(self.switched.switch_on, number)
        library = mutants.build(
            FOLDER,
            lambda file, text: mutants.planted(mutant, text) if file == mutant.file else text,
        )

        def plant() -> None:
            self.module = host_cuda_build.load(library)
            devices.host_cuda.cache_clear()

        return plant


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="faults in whose file or line this is found")
    parser.add_argument("--same", action="store_true", help="also those that make no difference")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="of tests for a fault, for a first look"
    )
    parser.add_argument("--sample", type=int, default=1, metavar="N", help="every Nth fault")
    parser.add_argument("tests", nargs="*", default=TESTS, help="files and folders of tests")
    return parser.parse_args()


def summary(run: Run, listed: list[mutants.Mutant]) -> Iterable[str]:
    """What survived and why, and the score."""
    unexplained = [mutant for mutant in run.survived if not mutant.same]
    yield from (f"SURVIVED  {mutant}" for mutant in unexplained)
    yield from (f"noticed, though listed as the same  {m}" for m in run.killed if m.same)
    yield from (f"same  {m}\n          {m.same}" for m in listed if m.same)
    yield from (f"not seen on the host  {m}\n          {m.seen_by}" for m in listed if m.seen_by)
    tried = len(run.killed) + len(run.survived)
    yield f"{len(run.killed)} of {tried} faults noticed, {len(unexplained)} survive unexplained"


def main() -> int:
    options = arguments()
    listed = [m for m in mutants.all_mutants() if re.search(options.only, str(m))]
    faults = [m for m in listed if not m.seen_by and (options.same or not m.same)]
    stdout = open(os.dup(1), "w")  # pytest takes the other  # noqa: SIM115

    def say(line: str) -> None:
        print(line, file=stdout, flush=True)

    os.chdir(ROOT)
    run = Run(faults[options.sample // 2 :: options.sample], options.seconds, say)
    if pytest.main(["-q", "-p", "no:cacheprovider", *options.tests], plugins=[run]) != 0:
        return 2
    print(*summary(run, listed), sep="\n")
    return int(any(not mutant.same for mutant in run.survived))


if __name__ == "__main__":
    sys.exit(main())
