"""Inductor's lowering of ``svdq::linear``: kernels that make the operands, and a GEMM template.

Outside :func:`active` the operator stays one opaque call. Under other backends Inductor's caches would not know our
sources (:mod:`svdq_compile.passes.base`) and could answer with code of an older version.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
from collections.abc import Iterator

from .. import _compat
from ..ops.linear import linear
from . import gemm, launch
from .call import Call

log = logging.getLogger(__name__)

_active: contextvars.ContextVar[bool] = contextvars.ContextVar("svdq_lowering", default=False)


@contextlib.contextmanager
def active() -> Iterator[None]:
    """Compiles ``svdq::linear`` to kernels within the block."""
    install()
    token = _active.set(True)
    try:
        yield
    finally:
        _active.reset(token)


def install() -> None:
    """Registers the lowering with Inductor, once."""
    if linear in _compat.lowerings:
        return
    opaque = _compat.fallback_handler(linear, add_to_fallback_set=False)

    def svdq_linear(*arguments):
        if not _active.get():
            return opaque(*arguments)
        call = Call(*arguments)
        log.debug("svdq::linear %s tokens: %s (%s)", call.tokens, call.plan.kernel, call.plan.reason)
        if not call.plan.fused:
            return opaque(*arguments)
        y = gemm.KERNELS[call.plan.kernel](call)
        return launch.reshape(y, [*call.leading, call.out_features])

    _compat.register_lowering(linear, type_promotion_kind=None)(svdq_linear)
