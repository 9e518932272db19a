"""Inductor's lowering of ``svdq::joint_linear``: one GEMM for two streams, which finishes their residuals."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import sympy
import torch

from .. import _compat
from .._compat import ir
from ..ops.plan import in_turn
from . import launch, linear, operands, sums
from .call import Call

log = logging.getLogger(__name__)

aten = torch.ops.aten

Tensor = ir.TensorBox


def lower(
    x: Sequence[Tensor],
    first: Sequence[Tensor | None],
    second: Sequence[Tensor | None],
    residual: Sequence[Tensor],
    gate: Sequence[Tensor],
    compute: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The nodes of one call; arguments as the operator's. Linears of different kernels are lowered one by one."""
    streams = [(each, *stream, compute) for each, stream in zip(x, (first, second), strict=True)]
    calls = [Call(*stream) for stream in streams]
    reason = in_turn([call.plan for call in calls], calls[0].capability)
    log.debug("svdq::joint_linear, %s tokens: %s", [call.tokens for call in calls], reason or "in one kernel")
    if reason:
        return gated_sums([linear.lower(*stream) for stream in streams], residual, gate)
    return residual_product(calls, operands.prepare_both(calls, calls[0].plan.operand), residual, gate)


def gated_sums(results: Sequence[Tensor], residual: Sequence[Tensor], gate: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """``residual + gate * result`` of two streams, for Inductor to fuse."""
    add, mul = (_compat.lowerings[op] for op in (aten.add.Tensor, aten.mul.Tensor))
    one, two = (add(added, mul(factor, y)) for added, factor, y in zip(residual, gate, results, strict=True))
    return one, two


def residual_product(
    calls: Sequence[Call],
    prepared: Sequence[operands.Operand],
    residual: Sequence[Tensor],
    gate: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """``residual + gate * y`` of two streams' linears in one launch; as
    :func:`svdq_kernels.residual.multiply_residual`.

    Args:
        calls: the linears, with e4m3 operands and of the same out_features N.
        prepared: operand, tensor scale and down-projection of each.
        residual: [B, S_i, N] of each stream.
        gate: [B, 1, N] of each stream.

    Returns:
        The results, [B, S_i, N] each.
    """
    from svdq_kernels import dense
    from svdq_kernels import residual as kernels

    any_call = calls[0]
    multiprocessors = dense.multiprocessors(any_call.device)
    rows, n = sum(call.hint for call in calls), any_call.out_features
    config = kernels.configuration(rows, n, any_call.capability, multiprocessors)
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    outs = [launch.empty([call.tokens, call.out_features], call.dtype, call.device) for call in calls]
    weights = operands.weights(calls, torch.float8_e4m3fn)
    given = zip(calls, prepared, weights, residual, gate, outs, strict=True)
    arguments = kernels.numbered([_arguments(*stream) for stream in given])
    arguments |= {"N": n, "TMA": dense.uses_tma(any_call.capability)}
    launch.launch(kernels._residual_kernel, [multiprocessors, 1, 1], arguments | config, **options)
    one, two = (launch.reshape(y, [*call.leading, call.out_features]) for y, call in zip(outs, calls, strict=True))
    return one, two


def _arguments(
    call: Call,
    prepared: operands.Operand,
    weight: tuple[Tensor, Tensor, float],
    residual: Tensor,
    gate: Tensor,
    out: Tensor,
) -> dict[str, object]:
    """What the kernel takes of one stream, by its parameters' names without the number."""
    from svdq_kernels import dense

    x, scale_a, partials = prepared
    w, scale_b, factor_b = weight
    batch, *rest = call.leading
    gate = launch.contiguous_rows(launch.reshape(gate, [batch, call.out_features]))
    return {
        "x": x,
        "w": w,
        "scale_a_ptr": scale_a,
        "scale_b_ptr": scale_b,
        "partials_ptr": partials,
        "up_ptr": launch.contiguous(call.lora_up) if call.rank else None,
        "bias_ptr": None if call.bias is None else launch.contiguous(call.bias),
        "residual_ptr": launch.contiguous(residual),
        "gate_ptr": gate,
        "out_ptr": out,
        "M": call.tokens,
        "K": call.in_features,
        "stride_gate": gate.get_stride()[0],
        "tokens": sympy.Mul(*rest),
        "PER_TOKEN": call.dynamic,
        "FACTOR_A": call.factor_a,
        "FACTOR_B": factor_b,
        "R": call.rank,
        "SPLITS": sums.splits_of(partials),
        "CHUNK": dense.rank_chunk(call.rank),
    }
