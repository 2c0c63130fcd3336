"""The command line."""

INSTALL = "install it with `pip install '.[cli]'` in the folder of obert_kernels' source"
