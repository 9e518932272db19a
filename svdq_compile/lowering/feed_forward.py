"""Inductor's lowering of ``svdq::feed_forward``: the first GEMM writes the operand of the second."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from .. import _compat
from .._compat import ir
from ..ops.plan import separate
from . import gemm, launch, linear, operands, sums
from .call import Call, Unwritten

log = logging.getLogger(__name__)

aten = torch.ops.aten


def lower(
    x: ir.TensorBox,
    up: Sequence[ir.TensorBox | None],
    down: Sequence[ir.TensorBox | None],
    compute_up: str = "auto",
    compute_down: str = "auto",
) -> ir.TensorBox:
    """The nodes of one call; arguments as the operator's. Linears that must be apart are lowered one by one."""
    first, second = calls(x, up, down, compute_up, compute_down)
    reason = separate(first.plan, second.plan, second.facts, second.dynamic)
    log.debug("svdq::feed_forward %s tokens: %s", first.tokens, reason or "one kernel up to the second operand")
    if reason:
        return linear.lower(_gelu(linear.lower(x, *up, compute_up)), *down, compute_down)
    prepared = operands.prepare(first, first.plan.operand)
    weights = operands.weights([first], torch.float8_e4m3fn)
    [operand] = second_operands([(first, second)], [prepared], weights)
    y = gemm.dense_product(second, *operand)
    return launch.reshape(y, [*second.leading, second.out_features])


def calls(
    x: ir.TensorBox,
    up: Sequence[ir.TensorBox | None],
    down: Sequence[ir.TensorBox | None],
    compute_up: str,
    compute_down: str,
) -> tuple[Call, Call]:
    """The two linears; arguments as the operator's."""
    first = Call(x, *up, compute_up)
    between = Unwritten((*first.leading, first.out_features), first.dtype, first.device)
    return first, Call(between, *down, compute_down)


def _gelu(x: ir.TensorBox) -> ir.TensorBox:
    """As :func:`svdq_kernels.feed_forward.gelu_tanh`, for Inductor to fuse behind the first GEMM."""
    from svdq_kernels.feed_forward import CUBIC, LINEAR

    add, mul, div, exp2, cast = (
        _compat.lowerings[op]
        for op in (
            aten.add.Tensor,
            aten.mul.Tensor,
            aten.div.Tensor,
            aten.exp2.default,
            torch.ops.prims.convert_element_type.default,
        )
    )
    wide = cast(x, torch.promote_types(x.get_dtype(), torch.float32))
    exponent = mul(wide, add(mul(mul(wide, wide), CUBIC.value), LINEAR.value))
    return cast(div(wide, add(exp2(exponent), 1.0)), x.get_dtype())


def second_operands(
    layers: Sequence[tuple[Call, Call]],
    prepared: Sequence[operands.Operand],
    weights: Sequence[tuple[ir.TensorBox, ir.TensorBox, float]],
) -> list[operands.Operand]:
    """What the second linears' GEMMs read, which the first ones' make, the longest first; as
    :func:`svdq_kernels.feed_forward.multiply_gelu_quantize`. A projection is summed beside the next layer's GEMM.

    Args:
        layers: both linears of each.
        prepared, weights: the first ones', of :mod:`.operands`.
    """
    made: dict[int, operands.Operand] = {}
    beside = None
    for i in sorted(range(len(layers)), key=lambda i: layers[i][0].hint, reverse=True):
        made[i], beside = _second_operand(*layers[i], prepared[i], weights[i], beside)
    sums.launch(beside)
    return [made[i] for i in range(len(layers))]


def _second_operand(
    first: Call,
    second: Call,
    prepared: operands.Operand,
    weight: tuple[ir.TensorBox, ir.TensorBox, float],
    beside: sums.Sum | None,
) -> tuple[operands.Operand, sums.Sum | None]:
    """Of one layer, and the sum its projection still needs; ``beside`` is the sum of another one, which is made."""
    from svdq_kernels import activation, dense
    from svdq_kernels import feed_forward as kernels

    m, n = first.tokens, first.out_features
    x, scale_a, partials = prepared
    w, scale_b, factor_b = weight
    config = kernels.configuration(first.hint, n, first.capability)
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    tma = dense.uses_tma(first.capability)
    scale = launch.stored(second.input_scale)
    result = launch.empty([m, n], torch.float8_e4m3fn, first.device)
    columns = -(-n // config["BLOCK_N"])
    slices = launch.empty([columns, m, second.rank], second.dtype, first.device) if second.rank else None
    tensors = {
        "x": x,
        "w": w,
        "scale_a_ptr": scale_a,
        "scale_b_ptr": scale_b,
        "partials_ptr": partials,
        "up_ptr": launch.contiguous(first.lora_up) if first.rank else None,
        "bias_ptr": None if first.bias is None else launch.contiguous(first.bias),
        "s_ptr": None if second.pre_quant_scale is None else launch.contiguous(second.pre_quant_scale),
        "t_ptr": scale,
        "down_ptr": launch.contiguous(second.lora_down) if second.rank else None,
        "operand_ptr": result,
        "next_partials_ptr": slices,
    }
    sizes = {"M": m, "N": n, "K": first.in_features, "stride_xm": x.get_stride()[0], "stride_wn": w.get_stride()[0]}
    constants = {
        "PER_TOKEN": first.dynamic,
        "FACTOR_A": first.factor_a,
        "FACTOR_B": factor_b,
        "R": first.rank,
        "SPLITS": sums.splits_of(partials),
        "CHUNK": dense.rank_chunk(first.rank),
        "NEXT_R": second.rank,
        "NEXT_RANK": activation.padded_rank(second.rank),
        "SCALE_FACTOR": second.factor_a,
        "BFLOAT16": first.dtype == torch.bfloat16,
        "TMA": tma,
        "SUM_BLOCK": kernels.SUM_BLOCK,
    }
    grid = [dense.multiprocessors(first.device), 1, 1]
    given = tensors | sizes | constants | sums.arguments(beside)
    launch.launch(kernels._gelu_quantize_kernel, grid, given | config, **options)
    last = sums.Sum(slices, second) if second.rank else None
    return (result, scale, None if last is None else last.h), last
