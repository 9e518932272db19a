"""Sums of partial down-projections in Inductor's graph: a launch, or work on the side of another one."""

from __future__ import annotations

import sympy

from .. import _compat
from .._compat import ir
from . import launch as launches
from .call import Call


class Sum:
    """One that is to be made; as :func:`svdq_kernels.projection.sum_partials`.

    Attributes:
        partials: [S, M, R].
        h: [1, M, R], nothing in it yet.
        size: values of h.
        splits: S.
    """

    def __init__(self, partials: ir.TensorBox, call: Call):
        self.partials, self.splits = partials, splits_of(partials)
        self.h = launches.empty([1, call.tokens, call.rank], call.dtype, call.device)
        self.size: sympy.Expr = call.tokens * call.rank


def splits_of(partials: ir.TensorBox | None) -> int:
    """In how many parts a down-projection is; 1 without one."""
    return 1 if partials is None else int(partials.get_size()[0])


def blocks(each: Sum | None, block: int) -> sympy.Expr | int:
    """How many times block values a sum has; 0 without one."""
    return 0 if each is None else _compat.ceildiv(each.size, block)


def arguments(beside: Sum | None) -> dict[str, object]:
    """As :func:`svdq_kernels.projection.beside_arguments`."""
    return {
        "beside_partials_ptr": None if beside is None else beside.partials,
        "beside_h_ptr": None if beside is None else beside.h,
        "beside_size": None if beside is None else beside.size,
        "BESIDE_SPLITS": None if beside is None else beside.splits,
    }


def launch(each: Sum | None) -> None:
    """Makes a sum, if there is one to make."""
    from svdq_kernels import projection as kernels

    if each is not None:
        given = {
            "partials_ptr": each.partials,
            "h_ptr": each.h,
            "size": each.size,
            "SPLITS": each.splits,
            "BLOCK": kernels.BLOCK,
        }
        launches.launch(kernels._sum_kernel, [blocks(each, kernels.BLOCK), 1, 1], given)
