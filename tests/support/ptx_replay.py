"""Runs what an operator launches on the PTX of its kernel."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from ptx import Program
from torch import Tensor

from benchmarks.kernels import occupancy

ROOT = Path(__file__).parents[2]
NVCC = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc to compile the kernels")
# All devices run what 7.5 gives; nvcc writes another text for the newest.
ARCHITECTURES = (75, 120)


@functools.cache
def text(source: str, arch: int) -> str:
    return occupancy.ptx(source, arch)


@functools.cache
def program(source: str, arch: int) -> Program:
    return Program(text(source, arch))


@functools.cache
def source_of(kernel: str) -> str:
    """The file that defines a kernel, by its name and the type of its first parameter."""
    name, parameter = re.findall(r"(\w+_kernel)(?:<.*>)?\(obert::(\w+)", kernel)[0]
    definition = f"{name}(const __grid_constant__ {parameter} "
    [found] = [
        source
        for source in occupancy.SOURCES
        if definition in (occupancy.KERNELS / f"{source}.cu").read_text()
    ]
    return found


def program_of_changed(folder: Path, source: str, file: str, old: str, new: str) -> Program:
    """The kernels of a source for compute capability 7.5, one statement of a file changed."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    kernels = folder / "csrc" / "pruning" / "cuda"
    before = (kernels / file).read_text()
    assert old in before, f"{file} has no {old}"
    (kernels / file).write_text(before.replace(old, new))
    ptx = folder / "changed.ptx"
    command = ["nvcc", *occupancy.FLAGS, "-ptx", "-arch=compute_75", str(kernels / f"{source}.cu")]
    subprocess.run([*command, "-o", str(ptx)], check=True)
    return Program(ptx.read_text())


def bytes_of(tensor: Tensor) -> np.ndarray:
    assert tensor.is_contiguous()
    return tensor.view(-1).view(torch.uint8).numpy()


def replay(
    host: ModuleType,
    call: Callable[[], Any],
    *arguments: Tensor,
    architectures: tuple[int, ...] = ARCHITECTURES,
    changed: Program | None = None,
) -> Iterator[Any]:
    """What ``call`` returns once its kernels have run, for every architecture.

    Args:
        host: the kernels compiled for the host, which say what is launched.
        call: runs one operator.
        arguments: the contiguous tensors that ``call`` hands to it; where they begin in memory is
            where they begin for the kernel.
        architectures: compute capabilities.
        changed: runs instead of the true kernels.
    """
    result, launches = occupancy.record_all(host, call)
    results = result if isinstance(result, tuple) else () if result is None else (result,)
    # An operator passes no pointer for an empty tensor.
    buffers = [bytes_of(tensor) for tensor in (*arguments, *results) if tensor.numel()]
    before = [buffer.copy() for buffer in buffers]
    for arch in architectures:
        for buffer, values in zip(buffers, before, strict=True):
            buffer[:] = values
        for launch in launches:
            kernels = changed or program(source_of(launch["kernel"]), arch)
            names = occupancy.demangled(kernels.kernels)
            symbol = next(name for name, known in names.items() if known == launch["kernel"])
            kernels.launch(
                symbol,
                launch["grid"],
                launch["block"],
                launch["parameters"],
                buffers,
                launch["shared_bytes"],
            )
        yield result


def off_border(tensor: Tensor, elements: int) -> Tensor:
    """A copy that begins so many elements behind a 16-byte border, with NaN on both sides."""
    per = 16 // tensor.itemsize
    room = torch.zeros(tensor.numel() + 2 * per, dtype=tensor.dtype)
    if room.is_floating_point():
        room.fill_(float("nan"))
    begin = -(room.data_ptr() // tensor.itemsize) % per + elements
    copy = room[begin : begin + tensor.numel()].view(tensor.shape)
    copy.copy_(tensor)
    return copy
