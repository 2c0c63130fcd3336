"""Validate and measure the CUDA kernels on one GPU: ``python benchmarks/gpu.py --help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.kernels.gpu.run import main

if __name__ == "__main__":
    main()
