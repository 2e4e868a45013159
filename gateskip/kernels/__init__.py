"""Compiled CPU kernels: building, calling, and choosing them."""
