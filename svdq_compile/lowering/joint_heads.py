"""Inductor's lowering of ``svdq::joint_heads``: one GEMM of both streams writes attention's operands."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from .. import _compat
from .._compat import ir
from ..ops.joint_heads import MEMBERS, group_arguments, joint_heads
from ..ops.linear_group import members_of
from ..ops.plan import apart
from . import launch, operands, sums
from .call import Call

log = logging.getLogger(__name__)

Tensor = ir.TensorBox


def lower(
    x: Sequence[Tensor],
    first: Sequence[Tensor | None],
    second: Sequence[Tensor | None],
    norms: Sequence[Tensor | None],
    freqs: Sequence[Tensor],
    head_dim: int,
    eps: float,
    compute: str = "auto",
) -> tuple[Tensor, ...]:
    """The nodes of one call; arguments as the operator's. What no kernel of ours computes stays the operator."""
    from svdq_kernels import dense
    from svdq_kernels import heads as kernels

    streams = [_calls(each, stream, compute) for each, stream in zip(x, (first, second), strict=True)]
    any_call = streams[0][0]
    reason = apart([call.plan for calls in streams for call in calls], head_dim, any_call.capability)
    log.debug("svdq::joint_heads, %s tokens: %s", [calls[0].tokens for calls in streams], reason or "one kernel")
    if reason:
        opaque = _compat.fallback_handler(joint_heads, add_to_fallback_set=False)
        return opaque(x, first, second, norms, freqs, head_dim, eps, compute)
    batch, n = any_call.leading[0], any_call.out_features
    sequence = sum(calls[0].leading[1] for calls in streams)
    out = [launch.empty([batch, sequence, n], any_call.dtype, any_call.device) for _ in range(MEMBERS)]
    operand = operands.prepare_both([calls[0] for calls in streams], any_call.plan.operand)
    weights = operands.weights([call for calls in streams for call in calls], torch.float8_e4m3fn)
    per_stream = zip(
        streams, operand, (weights[:MEMBERS], weights[MEMBERS:]), (norms[:2], norms[2:]), freqs, strict=True
    )
    own = [_arguments(*each) for each in per_stream]
    hint = max(calls[0].hint for calls in streams)
    config = kernels.configuration(hint, n, head_dim, any_call.capability)
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    shared = {
        "q_ptr": out[0],
        "k_ptr": out[1],
        "v_ptr": out[2],
        "N": n,
        "EPS": eps,
        "HEAD_DIM": head_dim,
        "TMA": dense.uses_tma(any_call.capability),
    }
    grid = [dense.multiprocessors(any_call.device), 1, 1]
    launch.launch(kernels._heads_kernel, grid, kernels.both(*own) | shared | config, **options)
    return tuple(launch.reshape(each, [batch, sequence, n // head_dim, head_dim]) for each in out)


def _calls(x: Tensor, stream: Sequence[Tensor | None], compute: str) -> list[Call]:
    """The linears of one stream."""
    *lists, input_scale, pre_quant_scale, lora_down, lora_up, bias = group_arguments(stream)
    members = members_of(*lists, lora_up, bias)
    return [Call(x, *own, input_scale, pre_quant_scale, lora_down, up, b, compute) for *own, up, b in members]


def _arguments(
    calls: list[Call],
    operand: operands.Operand,
    weights: Sequence[tuple[Tensor, Tensor, float]],
    norms: Sequence[Tensor | None],
    freqs: Tensor,
) -> dict[str, object]:
    """One stream's arguments of the kernel; as :func:`svdq_kernels.heads.stream_arguments`."""
    from svdq_kernels import dense
    from svdq_kernels import heads as kernels

    stream = calls[0]
    x, scale_a, partials = operand
    dense_weights, scales, factors = zip(*weights, strict=True)
    own = {
        "w": dense_weights,
        "scale_b_ptr": scales,
        "up_ptr": [_contiguous(call.lora_up) for call in calls],
        "bias_ptr": [_contiguous(call.bias) for call in calls],
    }
    return {
        "x": x,
        "scale_a_ptr": scale_a,
        "partials_ptr": partials,
        **kernels.members(own),
        "norm_q_ptr": _contiguous(norms[0]),
        "norm_k_ptr": _contiguous(norms[1]),
        "freqs_ptr": _contiguous(freqs),
        "M": stream.tokens,
        "K": stream.in_features,
        "tokens": stream.leading[1],
        "PER_TOKEN": stream.dynamic,
        "FACTOR_A": stream.factor_a,
        "FACTOR_B": factors[0],
        "R": stream.rank,
        "SPLITS": sums.splits_of(partials),
        "CHUNK": dense.rank_chunk(stream.rank),
    }


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else launch.contiguous(tensor)
