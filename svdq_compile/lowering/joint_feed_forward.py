"""Inductor's lowering of ``svdq::joint_feed_forward``: the second GEMMs of both streams are one launch.

The first ones are a launch each: in one they were measured to be slower (docs/design.md).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from .._compat import ir
from ..ops.plan import separate
from . import feed_forward, operands
from .joint_linear import gated_sums, residual_product

log = logging.getLogger(__name__)

Tensor = ir.TensorBox


def lower(
    x: Sequence[Tensor],
    first_up: Sequence[Tensor | None],
    first_down: Sequence[Tensor | None],
    second_up: Sequence[Tensor | None],
    second_down: Sequence[Tensor | None],
    residual: Sequence[Tensor],
    gate: Sequence[Tensor],
    compute_up: str = "auto",
    compute_down: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The nodes of one call; arguments as the operator's. Streams that must be apart are lowered one by one."""
    layers = (x[0], first_up, first_down), (x[1], second_up, second_down)
    streams = [feed_forward.calls(*layer, compute_up, compute_down) for layer in layers]
    reasons = [separate(up.plan, down.plan, down.facts, down.dynamic) for up, down in streams]
    tokens = [up.tokens for up, _ in streams]
    log.debug(
        "svdq::joint_feed_forward %s tokens: %s",
        tokens,
        reasons if any(reasons) else "the second linears in one kernel",
    )
    if any(reasons):
        return gated_sums([feed_forward.lower(*layer, compute_up, compute_down) for layer in layers], residual, gate)
    first = [up for up, _ in streams]
    prepared = operands.prepare_both(first, first[0].plan.operand)
    weights = operands.weights(first, torch.float8_e4m3fn)
    second = feed_forward.second_operands(streams, prepared, weights)
    return residual_product([down for _, down in streams], second, residual, gate)
