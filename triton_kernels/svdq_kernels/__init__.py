"""Triton kernels of svdq_compile.

Importing this package does not import Triton; its modules do. ``triton_kernels/README.md`` draws the layouts.
"""
