"""Which operators Inductor lowers to our kernels, and when.

Outside :func:`active` an operator stays one opaque call. Under other backends Inductor's caches would not know our
sources (:mod:`svdq_compile.passes.base`) and could answer with code of an older version.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator

from .. import _compat
from ..ops.feed_forward import feed_forward as feed_forward_operator
from ..ops.joint_feed_forward import joint_feed_forward as joint_feed_forward_operator
from ..ops.joint_heads import joint_heads as joint_heads_operator
from ..ops.joint_linear import joint_linear as joint_linear_operator
from ..ops.linear import linear as linear_operator
from ..ops.linear_group import linear_group as linear_group_operator
from ..ops.modulated_norm import modulated_norm as modulated_norm_operator
from . import feed_forward, group, joint_feed_forward, joint_heads, joint_linear, linear, modulated_norm
from .reductions import rows_in_registers

LOWERINGS = {
    linear_operator: linear.lower,
    linear_group_operator: group.lower,
    feed_forward_operator: feed_forward.lower,
    joint_feed_forward_operator: joint_feed_forward.lower,
    modulated_norm_operator: modulated_norm.lower,
    joint_heads_operator: joint_heads.lower,
    joint_linear_operator: joint_linear.lower,
}
"""Operator -> its lowering."""

_active: contextvars.ContextVar[bool] = contextvars.ContextVar("svdq_lowering", default=False)


@contextlib.contextmanager
def active() -> Iterator[None]:
    """Compiles our operators to kernels within the block."""
    install()
    active, known = _active.set(True), modulated_norm.known.set({})
    try:
        with rows_in_registers():
            yield
    finally:
        modulated_norm.known.reset(known)
        _active.reset(active)


def install() -> None:
    """Registers the lowerings with Inductor, once."""
    for operator, lower in LOWERINGS.items():
        if operator not in _compat.lowerings:
            opaque = _compat.fallback_handler(operator, add_to_fallback_set=False)
            _compat.register_lowering(operator, type_promotion_kind=None)(_gated(lower, opaque))


def _gated(lower: Callable, opaque: Callable) -> Callable:
    @functools.wraps(lower)
    def lowering(*arguments):
        return lower(*arguments) if _active.get() else opaque(*arguments)

    return lowering
