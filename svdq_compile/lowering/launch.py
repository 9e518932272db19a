"""A launch of one of our Triton kernels as a node of Inductor's graph."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import sympy
import torch
import triton

from .. import _compat
from .._compat import ir

aten = torch.ops.aten


@functools.cache
def _configured(kernel, num_warps: int, num_stages: int):
    """The kernel with launch options, in the form Inductor takes them."""
    return triton.autotune([triton.Config({}, num_warps=num_warps, num_stages=num_stages)], key=[])(kernel)


def launch(
    kernel,
    grid: Sequence[sympy.Expr | int],
    arguments: dict[str, object],
    num_warps: int = 4,
    num_stages: int = 3,
) -> None:
    """Launches a kernel; Inductor finds out by analysis which of its tensors it writes.

    Args:
        kernel: a ``triton.jit`` function.
        grid: one to three sizes.
        arguments: by the kernel's parameter names: TensorBox, size, constant, or None for an absent pointer.
    """
    table = _compat.kernel_side_table
    tensors = {k: v for k, v in arguments.items() if isinstance(v, (ir.TensorBox, sympy.Expr))}
    constants = {k: v for k, v in arguments.items() if k not in tensors}
    _compat.lowerings[_compat.triton_kernel_wrapper_mutation](
        kernel_idx=table.add_kernel(_configured(kernel, num_warps, num_stages)),
        constant_args_idx=table.add_constant_args(constants),
        grid=[tuple(grid)],
        tma_descriptor_metadata={},
        kwargs=tensors,
    )


def with_scratch(compiled: Callable) -> Callable:
    """Compiled code whose kernels get the memory they ask for in whatever thread or task it is called.

    Inductor sets Triton's allocator at the first launches only (torch 2.13 and later), where they happen to be.

    Args:
        compiled: what Inductor made of a graph with launches of ours on a GPU.
    """
    from svdq_kernels import scratch

    def call(*arguments: object) -> object:
        scratch.provide()
        return compiled(*arguments)

    return call


def empty(size: Sequence[sympy.Expr | int], dtype: torch.dtype, device: torch.device) -> ir.TensorBox:
    """An uninitialised contiguous buffer for a kernel to write."""
    return _compat.lowerings[aten.empty_strided.default](list(size), None, dtype=dtype, device=device)


def reshape(x: ir.TensorBox, size: Sequence[sympy.Expr | int]) -> ir.TensorBox:
    """A view of another shape."""
    return _compat.lowerings[aten.reshape.default](x, list(size))


def stored(x: ir.TensorBox) -> ir.TensorBox:
    """x in memory with a fixed layout, as kernels read it."""
    x = ir.ExternKernel.realize_input(x)
    x = x if isinstance(x, ir.TensorBox) else ir.TensorBox(x)
    x.realize()
    x.freeze_layout()
    return x


def contiguous_rows(x: ir.TensorBox) -> ir.TensorBox:
    """x in memory with unit stride along its last dimension; copied only if it lies otherwise."""
    x = ir.ExternKernel.realize_input(x)
    unit = x.get_stride()[-1] == 1 or x.get_size()[-1] == 1
    return stored(x) if unit else contiguous(x)


def contiguous(x: ir.TensorBox) -> ir.TensorBox:
    """x in memory, contiguous."""
    return stored(ir.ExternKernel.require_contiguous(x))


def aligned(x: ir.TensorBox) -> ir.TensorBox:
    """x in memory from a multiple of 16 bytes on, as tensor descriptors need it; copied only if it lies otherwise."""
    x = stored(x)
    offset = x.get_layout().offset * x.get_dtype().itemsize
    return (
        x
        if _compat.V.graph.sizevars.statically_known_multiple_of(offset, 16)
        else stored(ir.ExternKernel.copy_input(x))
    )


def with_dtype(x: ir.TensorBox, dtype: torch.dtype) -> ir.TensorBox:
    """The same memory read as another dtype of the same size."""
    return _view(x, dtype, x.get_layout().size)


def first_rows(x: ir.TensorBox, rows: sympy.Expr | int) -> ir.TensorBox:
    """The first rows of a buffer."""
    return _view(x, x.get_dtype(), [rows, *x.get_layout().size[1:]])


def _view(x: ir.TensorBox, dtype: torch.dtype, size: Sequence[sympy.Expr | int]) -> ir.TensorBox:
    layout = x.get_layout()
    fixed = ir.FixedLayout(x.get_device(), dtype, size, layout.stride, layout.offset)
    return ir.TensorBox(ir.ReinterpretView(data=ir.StorageBox(x.data.data), layout=fixed))
