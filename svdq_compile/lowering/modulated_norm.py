"""Inductor's lowering of ``svdq::modulated_norm``: an expression, which a kernel of ours may leave unread.

Beside the result stands what it is made of, and an activation kernel that finds its input here reads that instead; then
nothing needs the result, and Inductor never computes it.
"""

from __future__ import annotations

import contextvars
import dataclasses
import math

import torch

from .. import _compat
from .._compat import ir
from . import launch

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Parts:
    """``result = (x - mean) * deviation * (1 + scale) + shift``.

    Args:
        result: what the parts are of.
        x: [..., K], in memory.
        scale, shift: K elements each, the same for all tokens.
        eps: added to the variance.
        position: how many operations the graph had when they were made.
        moments: mean and deviation, float32 [M] each, once a kernel finds them.
    """

    result: ir.TensorBox
    x: ir.TensorBox
    scale: ir.TensorBox
    shift: ir.TensorBox
    eps: float
    position: int
    moments: list[ir.TensorBox] = dataclasses.field(default_factory=list)


known: contextvars.ContextVar[dict[int, Parts]] = contextvars.ContextVar("svdq_modulated")
"""Results of the graph that is being lowered, by identity."""


def parts_of(x: ir.TensorBox) -> Parts | None:
    """What an activation is made of, if it is such a result and nothing has written to that since."""
    parts = known.get({}).get(id(x))
    return None if parts is None or _written(parts) else parts


def _written(parts: Parts) -> bool:
    names = {each.maybe_get_name() for each in (parts.x, parts.scale, parts.shift)}
    later = _compat.V.graph.operations[parts.position :]
    return any(not names.isdisjoint(out.get_mutation_names()) for each in later for out in each.get_outputs())


def lower(x: ir.TensorBox, scale: ir.TensorBox, shift: ir.TensorBox, eps: float) -> ir.TensorBox:
    """The nodes of one call; arguments as the operator's."""
    add, mul, sub, rsqrt, cast = (
        _compat.lowerings[op]
        for op in (
            aten.add.Tensor,
            aten.mul.Tensor,
            aten.sub.Tensor,
            aten.rsqrt.default,
            torch.ops.prims.convert_element_type.default,
        )
    )
    # Read by whoever finds the moments, by every activation kernel and, as a residual, by what comes later.
    x = launch.stored(x)
    wide = cast(x, torch.float32)
    variance, mean = _compat.lowerings[aten.var_mean.correction](wide, [-1], correction=0, keepdim=True)
    normalised = mul(sub(wide, mean), rsqrt(add(variance, eps)))
    gain = add(cast(scale, torch.float32), 1.0)
    result = cast(add(mul(normalised, gain), cast(shift, torch.float32)), x.get_dtype())
    k = x.get_size()[-1]
    if all(math.prod(part.get_size()) == k for part in (scale, shift)):
        known.get()[id(result)] = Parts(result, x, scale, shift, eps, len(_compat.V.graph.operations))
    return result
