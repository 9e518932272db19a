"""GEMM operands in Inductor's graph: what ``svdq_kernels.activation``, ``packed`` and ``expand`` compute, as nodes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import _compat
from .._compat import ir
from . import launch, modulation, sums
from .call import Call
from .modulation import Modulation
from .sums import Sum

Tensor = ir.TensorBox


Operand = tuple[Tensor | None, Tensor | None, Tensor | None]
"""What a GEMM reads of its activation: operand, tensor scale, and the down-projection, in parts or as their sum."""


def prepare(call: Call, operand: str, whole_tiles: bool = False) -> Operand:
    """What a linear's GEMM reads; as :func:`svdq_kernels.activation.prepare`.

    Args:
        whole_tiles: give a new operand memory for whole tiles, of which the one returned is the first M rows.
    """
    [modulated] = _modulations([call], operand)
    prepared, last = _prepare(call, operand, modulated, whole_tiles)
    sums.launch(last)
    return prepared


def prepare_both(calls: Sequence[Call], operand: str) -> list[Operand]:
    """The same of two streams' linears; the longer one's projection is summed beside the shorter one's work."""
    longer, shorter = sorted(calls, key=lambda call: call.hint, reverse=True)
    modulations = _modulations([longer, shorter], operand)
    of_longer, beside = _prepare(longer, operand, modulations[0])
    of_shorter, last = _prepare(shorter, operand, modulations[1], beside=beside)
    sums.launch(last)
    return [of_longer, of_shorter] if longer is calls[0] else [of_shorter, of_longer]


def _modulations(calls: Sequence[Call], operand: str) -> list[Modulation | None]:
    """Of those linears whose activation kernel takes one."""
    takes = [call for call in calls if operand != "plain" or call.rank]
    made = dict(zip(takes, modulation.modulations(takes, operand), strict=True))
    return [made.get(call) for call in calls]


def _prepare(
    call: Call,
    operand: str,
    modulated: Modulation | None,
    whole_tiles: bool = False,
    beside: Sum | None = None,
) -> tuple[Operand, Sum | None]:
    """One linear's, and the sum its projection still needs.

    Args:
        modulated: what x is to be modulated with.
        beside: the sum of another linear, which is made.
    """
    from svdq_kernels import activation as kernels
    from svdq_kernels import few

    m, k = call.tokens, call.in_features
    if operand == "plain" and not call.rank:
        sums.launch(beside)
        return (launch.aligned(_smoothed(call)), None, None), None
    scaled = operand in kernels.TOKEN_RANGE
    x, s = _activation(call, call.x if modulated is None else modulated.x)
    few_tokens = kernels.takes_few(call.hint, call.rank, modulated is not None)
    if modulated is not None:
        config = dict(modulated.config)
    elif few_tokens:
        config = few.configuration(k, call.rank)
    else:
        config = kernels.configuration(call.hint, k, call.rank, operand)
    warps = config.pop("num_warps")
    splits = 1 if few_tokens else -(-k // config["SPLIT_K"])
    parts_dtype = call.dtype if few_tokens else kernels.partials_dtype(operand, call.dtype)
    partials = launch.empty([splits, m, call.rank], parts_dtype, call.device) if call.rank else None
    t = _token_scale(call, operand, x, s) if scaled else None
    untouched = s is None and modulated is None and x.get_stride()[0] == k
    as_is = operand == "none" or (operand == "plain" and untouched)
    dtype = torch.float8_e4m3fn if operand == "fp8" else call.dtype
    rows = kernels.ROWS * _compat.ceildiv(m, kernels.ROWS) if whole_tiles else m
    if as_is and operand == "plain":
        x = launch.aligned(x)
    result = x if as_is else launch.empty([rows, k], dtype, call.device)
    given = {
        "x_ptr": x,
        "s_ptr": s,
        "t_ptr": t,
        "down_ptr": _down(call, modulated),
        "operand_ptr": None if as_is else result,
        "K": k,
        "R": call.rank,
        "stride_xm": x.get_stride()[0],
        "stride_tm": int(scaled and call.dynamic),
        "OPERAND": operand,
        "SCALE_FACTOR": call.factor_a,
    }
    if few_tokens:
        launch.launch(few._few_kernel, [*few.grid(m, call.rank), 1], given | {"h_ptr": partials} | config, warps)
    elif not as_is or call.rank:
        own = {"partials_ptr": partials, "M": m, "RANK": kernels.padded_rank(call.rank), **config}
        own |= modulation.NONE if modulated is None else modulated.arguments
        own |= sums.arguments(beside) | {"SUM_BLOCK": kernels.BLOCK, "WGMMA": kernels.uses_wgmma(call.capability)}
        places = _compat.ceildiv(m, config["BLOCK_M"]) + _compat.ceildiv(sums.blocks(beside, kernels.BLOCK), splits)
        launch.launch(kernels._prepare_kernel, [splits, places, 1], given | own, warps)
        beside = None
    sums.launch(beside)
    last = None
    if kernels.sums_partials(operand, splits, call.rank):
        last = sums.Sum(partials, call)
        partials = last.h
    if whole_tiles and not as_is:
        result = launch.first_rows(result, m)
    return (None if operand == "none" else result, t, partials), last


def quantize_packed(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, block scales and tensor scale; as :func:`svdq_kernels.packed.quantize_nvfp4_packed`."""
    from svdq_kernels import packed as kernels

    m, k = call.tokens, call.in_features
    x, s = _activation(call, call.x)
    codes = launch.empty([m, k // 2], torch.uint8, call.device)
    scale = launch.empty([m, k // kernels.GROUP], torch.uint8, call.device)
    t = launch.empty([m, 1], torch.float32, call.device) if call.dynamic else launch.stored(call.input_scale)
    span = k if call.dynamic else kernels.BLOCK_K
    arguments = {
        "x_ptr": x,
        "s_ptr": s,
        "t_ptr": t,
        "q_ptr": codes,
        "scale_ptr": scale,
        "K": k,
        "SPAN": span,
        "stride_xm": x.get_stride()[0],
        "DYNAMIC": call.dynamic,
        "GROUP": kernels.GROUP,
        "BLOCK_K": kernels.BLOCK_K,
    }
    launch.launch(kernels._quantize_packed_kernel, [m, -(-k // span), 1], arguments)
    return codes, scale, t


def weights(calls: Sequence[Call], dtype: torch.dtype) -> list[tuple[Tensor, Tensor, float]]:
    """Of each linear the dense weight [N, K] of a dtype, its tensor scale, and what the scale is to be multiplied with;
    packed ones are unpacked as by :func:`svdq_kernels.expand.expand_weights`.
    """
    from svdq_kernels import expand as kernels

    dense = {call: _stored_weight(call, dtype) for call in calls if not call.packed}
    packed = [call for call in calls if call.packed]
    for i in range(0, len(packed), kernels.MAX_MEMBERS):
        dense |= _unpacked(packed[i : i + kernels.MAX_MEMBERS], dtype)
    return [dense[call] for call in calls]


def _stored_weight(call: Call, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """Of a weight that is e4m3 already."""
    stored = launch.contiguous(call.qweight)
    if dtype != torch.float8_e4m3fn:
        stored = launch.stored(_compat.lowerings[torch.ops.prims.convert_element_type.default](stored, dtype))
    return stored, launch.stored(call.weight_scale), 1.0


def _unpacked(calls: Sequence[Call], dtype: torch.dtype) -> dict[Call, tuple[Tensor, Tensor, float]]:
    """Of the packed weights of one launch."""
    from svdq_kernels import expand as kernels

    out = [launch.empty([call.out_features, call.in_features], dtype, call.device) for call in calls]
    codes = [launch.contiguous(call.qweight) for call in calls]
    scales = [block_scale(call) for call in calls]
    groups = [call.out_features * call.in_features // kernels.GROUP for call in calls]
    factor = kernels.divisor(dtype)
    constants = {"DIVISOR": factor, "GROUP": kernels.GROUP, "BLOCK_G": kernels.BLOCK_G}
    arguments = kernels.arguments(codes, scales, out, groups) | constants
    launch.launch(kernels._expand_kernel, [*kernels.grid(groups), 1], arguments, kernels.NUM_WARPS)
    return {call: (dense, launch.stored(call.weight_scale_2), factor) for call, dense in zip(calls, out, strict=True)}


def block_scale(call: Call) -> Tensor:
    """The weight's block scales as kernels take them: below sm_89 Triton has no e4m3, and they are read as bits."""
    scale = launch.contiguous(call.weight_scale)
    return launch.with_dtype(scale, torch.uint8) if call.capability < (8, 9) else scale


def _activation(call: Call, x: Tensor) -> tuple[Tensor, Tensor | None]:
    x = launch.contiguous_rows(launch.reshape(x, [call.tokens, call.in_features]))
    return x, None if call.pre_quant_scale is None else launch.contiguous(call.pre_quant_scale)


def _smoothed(call: Call) -> Tensor:
    """``x * s`` rounded once to x's dtype, [M, K] contiguous, by nodes that Inductor fuses with what comes before."""
    x = launch.reshape(call.x, [call.tokens, call.in_features])
    if call.pre_quant_scale is not None:
        cast, mul = (
            _compat.lowerings[op] for op in (torch.ops.prims.convert_element_type.default, torch.ops.aten.mul.Tensor)
        )
        x = cast(mul(cast(x, torch.float32), cast(call.pre_quant_scale, torch.float32)), call.dtype)
    return launch.contiguous(x)


def _down(call: Call, modulated: Modulation | None) -> Tensor | None:
    """L2 as the activation kernel takes it."""
    if not call.rank:
        return None
    return launch.contiguous(call.lora_down) if modulated is None else modulated.down


def _token_scale(call: Call, operand: str, x: Tensor, s: Tensor | None) -> Tensor:
    from svdq_kernels import activation as kernels

    if not call.dynamic:
        return launch.stored(call.input_scale)
    t = launch.empty([call.tokens, 1], torch.float32, call.device)
    arguments = {
        "x_ptr": x,
        "s_ptr": s,
        "t_ptr": t,
        "K": call.in_features,
        "stride_xm": x.get_stride()[0],
        "TOKEN_RANGE": kernels.TOKEN_RANGE[operand],
        "BLOCK_K": kernels.TOKEN_SCALE_BLOCK,
    }
    launch.launch(kernels._token_scale_kernel, [call.tokens, 1, 1], arguments)
    return t
