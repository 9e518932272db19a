"""Inductor's lowering of ``svdq::feed_forward``: the first GEMM writes the operand of the second."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from .. import _compat
from .._compat import ir
from ..ops.plan import separate
from . import gemm, launch, linear, operands
from .call import Call, Unwritten

log = logging.getLogger(__name__)

aten = torch.ops.aten

Operand = tuple[ir.TensorBox, ir.TensorBox, ir.TensorBox | None]
"""What :func:`.gemm.dense_product` takes of an activation: operand, tensor scale, down-projection."""


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
    (operand,) = second_operands([(first, second)])
    return launch.reshape(gemm.dense_product(second, *operand), [*second.leading, second.out_features])


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
    wide = cast(x, torch.float32)
    exponent = mul(wide, add(mul(mul(wide, wide), CUBIC.value), LINEAR.value))
    return cast(div(wide, add(exp2(exponent), 1.0)), x.get_dtype())


def second_operands(streams: Sequence[tuple[Call, Call]]) -> list[Operand]:
    """What the second linears of one or two streams multiply, by one GEMM of the first ones; as
    :func:`svdq_kernels.feed_forward.multiply_gelu_quantize`.

    Returns:
        Per stream operand, tensor scale and down-projection.
    """
    from svdq_kernels import dense
    from svdq_kernels import feed_forward as kernels

    any_call, _ = streams[0]
    n = any_call.out_features
    config = kernels.configuration(max(first.hint for first, _ in streams), n, any_call.capability)
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    columns = -(-n // config["BLOCK_N"])
    arguments = [_arguments(*calls, columns) for calls in streams]
    constants = {
        **kernels.numbered(arguments),
        "N": n,
        "K": any_call.in_features,
        "BFLOAT16": any_call.dtype == torch.bfloat16,
        "TMA": dense.uses_tma(any_call.capability),
    }
    grid = [dense.multiprocessors(any_call.device), 1, 1]
    launch.launch(kernels._gelu_quantize_kernel, grid, constants | config, **options)
    total = _compat.lowerings[aten.sum.dim_IntList]
    results = []
    for own in arguments:
        slices = own["next_partials_ptr"]
        down = None if slices is None else total(slices, [0], True)
        results.append((own["operand_ptr"], own["t_ptr"], down))
    return results


def _arguments(first: Call, second: Call, columns: int) -> dict[str, object]:
    """What the kernel takes of one stream, by its parameters' names without the stream's number.

    Args:
        first, second: the linears.
        columns: in how many parts the second down-projection is summed.
    """
    from svdq_kernels import activation, dense

    m = first.tokens
    x, scale_a, partials = operands.prepare(first, first.plan.operand)
    w, scale_b, factor_b = operands.weight(first, x.get_dtype())
    slices = launch.empty([columns, m, second.rank], torch.float32, first.device) if second.rank else None
    return {
        "x": x,
        "w": w,
        "scale_a_ptr": scale_a,
        "scale_b_ptr": scale_b,
        "partials_ptr": partials,
        "up_ptr": launch.contiguous(first.lora_up) if first.rank else None,
        "bias_ptr": None if first.bias is None else launch.contiguous(first.bias),
        "s_ptr": None if second.pre_quant_scale is None else launch.contiguous(second.pre_quant_scale),
        "t_ptr": launch.stored(second.input_scale),
        "down_ptr": launch.contiguous(second.lora_down) if second.rank else None,
        "operand_ptr": launch.empty([m, first.out_features], torch.float8_e4m3fn, first.device),
        "next_partials_ptr": slices,
        "M": m,
        "PER_TOKEN": first.dynamic,
        "FACTOR_A": first.factor_a,
        "FACTOR_B": factor_b,
        "R": first.rank,
        "SPLITS": int(partials.get_size()[0]) if first.rank else 1,
        "CHUNK": dense.rank_chunk(first.rank),
        "NEXT_R": second.rank,
        "NEXT_RANK": activation.padded_rank(second.rank),
        "SCALE_FACTOR": second.factor_a,
    }
