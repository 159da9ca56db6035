"""Triton kernels and their launchers, one module per op; importing one needs Triton."""
