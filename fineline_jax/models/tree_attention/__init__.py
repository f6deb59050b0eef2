"""Attention over prefix-tree rows: XLA's form and the plain one, and kernels for TPU and GPU."""
