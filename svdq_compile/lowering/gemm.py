"""The GEMM of a linear in Inductor's graph, one function per kernel a plan can name."""

from __future__ import annotations

from .. import _compat
from .._compat import ir
from . import launch, operands, scaled_mm, sums, templates
from .call import Call


def dense(call: Call) -> ir.TensorBox:
    """y [M, N] by the template on dense operands."""
    whole_tiles = has_whole_tiles(call)
    return dense_product(call, *operands.prepare(call, call.plan.operand, whole_tiles), whole_tiles)


def has_whole_tiles(call: Call) -> bool:
    """Whether the operand ``prepare`` makes for a template gets memory for whole tiles: always a new one, and loaded by
    tensor descriptors.
    """
    from svdq_kernels.dense import uses_tma

    return call.plan.operand == "fp8" and uses_tma(call.capability)


def dense_product(
    call: Call,
    x: ir.TensorBox,
    scale_a: ir.TensorBox | None,
    partials: ir.TensorBox | None,
    whole_tiles: bool = False,
) -> ir.TensorBox:
    """y [M, N] by the template, of an activation that is an operand already."""
    from svdq_kernels.dense import uses_tma

    [(w, scale_b, factor_b)] = operands.weights([call], x.get_dtype())
    present = _optional(call, scale_a, partials)
    cublas = call.plan.operand == "fp8" and not call.dynamic and call.out_features % 16 == 0
    return _compat.template_call(
        templates.dense(tuple(present), uses_tma(call.capability)),
        "svdq_linear",
        [launch.stored(tensor) for tensor in (x, w, scale_b, *present.values())],
        call.layout,
        dense_constants(call, x, scale_a, partials, factor_b, call.out_features, whole_tiles),
        scaled_mm.CHOICE if cublas and _compat.tunes_gemms() else None,
        {"parts": tuple(present), "factor_a": call.factor_a, "factor_b": factor_b},
    )


def dense_constants(
    call: Call,
    x: ir.TensorBox,
    scale_a: ir.TensorBox | None,
    partials: ir.TensorBox | None,
    factor_b: float,
    out_features: int,
    whole_tiles: bool,
) -> list[dict[str, object]]:
    """Constants of a template on dense operands, of each configuration to be measured or of the one to take;
    out_features of all members together, whole_tiles as :func:`.operands.prepare` took it.
    """
    from svdq_kernels import dense as kernels

    fixed = {
        **constants(call, scale_a, partials),
        "FACTOR_A": call.factor_a,
        "FACTOR_B": factor_b,
        "CHUNK": kernels.rank_chunk(call.rank),
        "TMA": kernels.uses_tma(call.capability),
        "WHOLE_TILES": whole_tiles,
    }
    configs = kernels.configurations(call.hint, out_features, x.get_dtype().itemsize, call.capability)
    if not _compat.tunes_gemms():
        configs = configs[:1]
    return [{**fixed, **config, "PARTS": kernels.column_parts_of(config["BLOCK_N"])} for config in configs]


def blockscaled(call: Call) -> ir.TensorBox:
    """y [M, N] by the template for block-scaled tensor cores."""
    codes, scale, t = operands.quantize_packed(call)
    _, _, partials = operands.prepare(call, "none")
    present = _optional(call, t, partials)
    weight = (launch.contiguous(call.qweight), operands.block_scale(call))
    inputs = (codes, scale, *weight, call.weight_scale_2, *present.values())
    return _compat.template_call(
        templates.blockscaled(tuple(present)),
        "svdq_linear",
        [launch.stored(tensor) for tensor in inputs],
        call.layout,
        [blockscaled_constants(call, t, partials)],
    )


def blockscaled_constants(call: Call, t: ir.TensorBox, partials: ir.TensorBox | None) -> dict[str, object]:
    """Constants of a template for block-scaled tensor cores."""
    from svdq_kernels import blockscaled as kernels

    block_m, block_n, block_k, warps, stages = kernels.NATIVE_TILES[call.capability]
    return {
        **constants(call, t, partials),
        "CHUNK": kernels.block_r(call.rank),
        "EVEN_K": call.in_features % block_k == 0,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "GROUP_M": kernels.GROUP_M,
        "num_warps": warps,
        "num_stages": stages,
    }


def gemv(call: Call) -> ir.TensorBox:
    """y [M, N] of a few tokens by the template that reads the packed weight."""
    x, t, partials = operands.prepare(call, call.plan.operand)
    present = _optional(call, t, partials)
    inputs = (x, launch.contiguous(call.qweight), operands.block_scale(call), call.weight_scale_2, *present.values())
    return _compat.template_call(
        templates.gemv(tuple(present)),
        "svdq_linear",
        [launch.stored(tensor) for tensor in inputs],
        call.layout,
        [gemv_constants(call, t, partials, call.out_features)],
    )


def gemv_constants(
    call: Call, t: ir.TensorBox | None, partials: ir.TensorBox | None, out_features: int
) -> dict[str, object]:
    """Constants of a template that reads the packed weight; out_features of all members together."""
    from svdq_kernels import gemv as kernels

    return {
        **constants(call, t, partials),
        "IN_FEATURES": call.in_features,
        "FACTOR": kernels.FACTOR,
        **kernels.configuration(call.hint, out_features, call.in_features),
        "num_stages": 1,
    }


def _optional(call: Call, scale_a: ir.TensorBox | None, partials: ir.TensorBox | None) -> dict[str, ir.TensorBox]:
    """The optional inputs that are there, by name."""
    up = launch.contiguous(call.lora_up) if call.rank else None
    bias = None if call.bias is None else launch.contiguous(call.bias)
    every = zip(templates.OPTIONAL, (scale_a, partials, up, bias), strict=True)
    return {name: tensor for name, tensor in every if tensor is not None}


def constants(call: Call, scale_a: ir.TensorBox | None, partials: ir.TensorBox | None) -> dict[str, object]:
    """Constants every template takes."""
    from svdq_kernels.dense import multiprocessors

    return {
        "PER_TOKEN": scale_a is not None and call.dynamic,
        "RANK": call.rank,
        "SPLITS": sums.splits_of(partials),
        "PROGRAMS": multiprocessors(call.device),
    }


KERNELS = {"dense": dense, "blockscaled": blockscaled, "gemv": gemv}
"""Kernel of a plan -> its lowering."""
