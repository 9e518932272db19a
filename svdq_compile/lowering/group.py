"""Inductor's lowering of ``svdq::linear_group``: one activation kernel, and one GEMM template over all members."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import sympy

from .. import _compat
from .._compat import ir
from ..ops.linear_group import linear_group, members_of
from . import gemm, group_templates, launch, operands
from .call import Call

log = logging.getLogger(__name__)


def lower(
    x: ir.TensorBox,
    qweight: Sequence[ir.TensorBox],
    weight_scale: Sequence[ir.TensorBox],
    weight_scale_2: Sequence[ir.TensorBox],
    input_scale: ir.TensorBox | None,
    pre_quant_scale: ir.TensorBox | None,
    lora_down: ir.TensorBox | None,
    lora_up: Sequence[ir.TensorBox],
    bias: Sequence[ir.TensorBox | None],
    compute: str = "auto",
) -> ir.TensorBox:
    """The nodes of one call; arguments as the operator's. What no kernel of ours computes stays the operator, which
    computes member by member."""
    shared = (input_scale, pre_quant_scale, lora_down)
    members = members_of(qweight, weight_scale, weight_scale_2, lora_up, bias)
    calls = [Call(x, *own, *shared, up, b, compute) for *own, up, b in members]
    first = calls[0]
    log.debug(
        "svdq::linear_group of %d, %s tokens: %s (%s)", len(calls), first.tokens, first.plan.kernel, first.plan.reason
    )
    if not first.plan.fused:
        opaque = _compat.fallback_handler(linear_group, add_to_fallback_set=False)
        return opaque(x, qweight, weight_scale, weight_scale_2, *shared, lora_up, bias, compute)
    y = KERNELS[first.plan.kernel](calls)
    return launch.reshape(y, [*first.leading, sum(call.out_features for call in calls)])


def _dense(calls: list[Call]) -> ir.TensorBox:
    from svdq_kernels.dense import uses_tma

    first, n = calls[0], sum(call.out_features for call in calls)
    whole_tiles = gemm.has_whole_tiles(first)
    x, scale_a, partials = operands.prepare(first, first.plan.operand, whole_tiles)
    weights = operands.weights(calls, x.get_dtype())
    inputs, parts = _inputs(calls, (x,), [weight[:2] for weight in weights], scale_a, partials)
    template = group_templates.dense(parts, len(calls), uses_tma(first.capability))
    constants = gemm.dense_constants(first, x, scale_a, partials, weights[0][2], n, whole_tiles)
    return _call(calls, template, inputs, constants)


def _blockscaled(calls: list[Call]) -> ir.TensorBox:
    first = calls[0]
    codes, scale, t = operands.quantize_packed(first)
    _, _, partials = operands.prepare(first, "none")
    own = [(launch.contiguous(call.qweight), operands.block_scale(call), call.weight_scale_2) for call in calls]
    inputs, parts = _inputs(calls, (codes, scale), own, t, partials)
    template = group_templates.blockscaled(parts, len(calls))
    return _call(calls, template, inputs, [gemm.blockscaled_constants(first, t, partials)])


def _gemv(calls: list[Call]) -> ir.TensorBox:
    first = calls[0]
    x, t, partials = operands.prepare(first, first.plan.operand)
    own = [(launch.contiguous(call.qweight), operands.block_scale(call), call.weight_scale_2) for call in calls]
    inputs, parts = _inputs(calls, (x,), own, t, partials)
    template = group_templates.gemv(parts, len(calls))
    n = sum(call.out_features for call in calls)
    return _call(calls, template, inputs, [gemm.gemv_constants(first, t, partials, n)])


def _inputs(
    calls: list[Call],
    shared: tuple[ir.TensorBox, ...],
    own: list[tuple[ir.TensorBox, ...]],
    scale_a: ir.TensorBox | None,
    partials: ir.TensorBox | None,
) -> tuple[list[ir.TensorBox], tuple[str, ...]]:
    """A template's inputs in the order of :func:`.group_templates.names`, and the optional ones among them by name."""
    optional = {"SCALE_A": scale_a, "PARTIALS": partials, "UP": calls[0].lora_up, "BIAS": calls[0].bias}
    parts = tuple(name for name, tensor in optional.items() if tensor is not None)
    inputs = [*shared, *(tensor for tensor in (scale_a, partials) if tensor is not None)]
    for call, tensors in zip(calls, own, strict=True):
        inputs += tensors
        inputs += [launch.contiguous(tensor) for tensor in (call.lora_up, call.bias) if tensor is not None]
    return [launch.stored(tensor) for tensor in inputs], parts


def _call(calls: list[Call], template, inputs: list[ir.TensorBox], configs: list[dict]) -> ir.TensorBox:
    """The template's node, [M, sum of N]."""
    first, sizes = calls[0], [call.out_features for call in calls]
    n = sympy.Integer(sum(sizes))
    layout = ir.FixedLayout(first.device, first.dtype, [first.tokens, n], [n, sympy.Integer(1)])
    for config in configs:
        config["TILES_N"] = sum(-(-size // config["BLOCK_N"]) for size in sizes)
    return _compat.template_call(template, "svdq_linear_group", inputs, layout, configs)


KERNELS = {"dense": _dense, "blockscaled": _blockscaled, "gemv": _gemv}
"""Kernel of a plan -> its lowering."""
