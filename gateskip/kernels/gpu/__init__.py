"""Kernels for GPUs, written in Triton. Imported only where a model is on a GPU."""
