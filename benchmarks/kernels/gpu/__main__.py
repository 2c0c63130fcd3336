"""``python -m benchmarks.kernels.gpu --help``."""

from benchmarks.kernels.gpu.run import main

main()
