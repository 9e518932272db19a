"""Triton kernels of svdq_compile."""
