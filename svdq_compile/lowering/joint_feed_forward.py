"""Inductor's lowering of ``svdq::joint_feed_forward``: the first GEMMs of both streams are one launch."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from .._compat import ir
from ..ops.plan import separate
from . import feed_forward, gemm, launch

log = logging.getLogger(__name__)

Tensor = ir.TensorBox


def lower(
    x: Sequence[Tensor],
    first_up: Sequence[Tensor | None],
    first_down: Sequence[Tensor | None],
    second_up: Sequence[Tensor | None],
    second_down: Sequence[Tensor | None],
    compute_up: str = "auto",
    compute_down: str = "auto",
) -> tuple[Tensor, ...]:
    """The nodes of one call; arguments as the operator's. Streams that must be apart are lowered one by one."""
    layers = (x[0], first_up, first_down), (x[1], second_up, second_down)
    streams = [feed_forward.calls(*layer, compute_up, compute_down) for layer in layers]
    reasons = [separate(up.plan, down.plan, down.facts, down.dynamic) for up, down in streams]
    tokens = [up.tokens for up, _ in streams]
    log.debug("svdq::joint_feed_forward %s tokens: %s", tokens, reasons if any(reasons) else "one kernel for both")
    if any(reasons):
        return tuple(feed_forward.lower(*layer, compute_up, compute_down) for layer in layers)
    results = []
    for (_, down), operand in zip(streams, feed_forward.second_operands(streams), strict=True):
        y = gemm.dense_product(down, *operand)
        results.append(launch.reshape(y, [*down.leading, down.out_features]))
    return tuple(results)
