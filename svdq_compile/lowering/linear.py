"""Inductor's lowering of ``svdq::linear``: kernels that make the operands, and a GEMM template."""

from __future__ import annotations

import logging

from .. import _compat
from .._compat import ir
from ..ops.linear import linear
from . import gemm, launch
from .call import Call

log = logging.getLogger(__name__)


def lower(*arguments) -> ir.TensorBox:
    """The nodes of one call; arguments as the operator's. What no kernel of ours computes stays the operator."""
    call = Call(*arguments)
    log.debug("svdq::linear %s tokens: %s (%s)", call.tokens, call.plan.kernel, call.plan.reason)
    if not call.plan.fused:
        return _compat.fallback_handler(linear, add_to_fallback_set=False)(*arguments)
    y = gemm.KERNELS[call.plan.kernel](call)
    return launch.reshape(y, [*call.leading, call.out_features])
