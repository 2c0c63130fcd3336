"""What ptxas makes of the CUDA kernels: no spills, no local memory, no warnings; all launches fit.

The compiled output is shared with benchmarks/kernels/occupancy.py, which reports the rest.
"""

from __future__ import annotations

import shutil

import pytest
from devices import host_cuda

from benchmarks.kernels import occupancy

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc to compile the kernels"),
]


@pytest.mark.parametrize("arch", occupancy.ARCHITECTURES)
def test_every_kernel_lives_in_registers(arch):
    """Nothing is spilled, and no array is indexed so that it must live in memory."""
    found = [kernel for kernel in occupancy.kernels() if kernel.arch == arch]
    files = occupancy.compile_kernels(machine_code=True)
    ptx = "".join(files[source, arch][0].read_text() for source in occupancy.SOURCES)
    assert len(found) == len({kernel.name for kernel in found}) == ptx.count(".entry ") > 30
    outside = [k for k in found if k.spill_bytes or k.stack_bytes or k.local_bytes]
    assert not outside
    # All shared memory is asked for by the launch.
    assert not any(kernel.static_shared_bytes for kernel in found)


def test_the_compilers_warn_of_nothing():
    for (source, arch), (_, said) in occupancy.compile_kernels(machine_code=True).items():
        warnings = [line for line in said.splitlines() if "warning" in line.lower()]
        assert not warnings, f"{source}, sm_{arch}: {warnings}"


def test_every_launch_fits_on_a_multiprocessor():
    rows = occupancy.rows(host_cuda())
    sizes = [*occupancy.BLOCK_SIZES, *occupancy.GENERAL]
    others = occupancy.of_any_size()
    families = {row["family"] for row in rows} - set(others)
    here = len(families) * len(sizes) + len(others)
    assert len(rows) == here * len(occupancy.ARCHITECTURES)
    for row in rows:
        assert "refused" not in row, row
        assert row["thread_blocks"] >= 1 and 0 < row["occupancy"] <= 1, row
        assert row["limited_by"], row
    text = occupancy.markdown(
        {"made_by": [{"command": "command"}], "config": {"nvcc": "13"}, "outcomes": rows}
    )
    assert occupancy.LABEL in text
    for size in occupancy.DESCRIBED:
        assert f"B = {size} is limited by " in text
