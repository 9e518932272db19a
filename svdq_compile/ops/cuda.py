"""``svdq::linear`` and ``svdq::linear_group`` on CUDA tensors outside compiled graphs, by the kernels a plan names.

A linear is a group of one: each kernel makes the operand of x once and multiplies it with every member's weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ..spec import E2M1_MAX
from .linear import linear_reference, resolved, validate
from .native import has_native_fp4
from .plan import Facts, Plan, plan

FP8_SCALE_FACTOR = E2M1_MAX
"""NVFP4's ``input_scale`` is ``amax / (6 * 448)``, e4m3 wants ``amax / 448``."""


def capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of an NVIDIA GPU, None of any other device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


def call_facts(x, qweight, input_scale, lora_down, compute: str, tokens: int | None = None) -> Facts:
    """Of one call; arguments as ``svdq::linear``'s, and as :attr:`Facts.tokens` where x's own are symbolic."""
    return Facts(
        mode=resolved(x, qweight, compute),
        capability=capability(x.device),
        native=has_native_fp4(x.device),
        weight=qweight.dtype,
        activation=x.dtype,
        in_features=x.shape[-1],
        tokens=x.numel() // max(1, x.shape[-1]) if tokens is None else tokens,
        rank=0 if lora_down is None else lora_down.shape[0],
        low_rank=None if lora_down is None else lora_down.dtype,
        scale_is_one_value=input_scale is None or (input_scale.numel() == 1 and input_scale.device == x.device),
    )


def plan_call(*arguments) -> Plan:
    """The plan of one call; arguments as :func:`call_facts`'s."""
    return plan(call_facts(*arguments))


@dataclasses.dataclass(frozen=True)
class Member:
    """What one linear of a group has for itself, as ``svdq::linear``'s arguments."""

    qweight: torch.Tensor
    weight_scale: torch.Tensor
    weight_scale_2: torch.Tensor | None
    lora_up: torch.Tensor | None
    bias: torch.Tensor | None


def linear_cuda(
    x: torch.Tensor,
    qweight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_scale_2: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    pre_quant_scale: torch.Tensor | None,
    lora_down: torch.Tensor | None,
    lora_up: torch.Tensor | None,
    bias: torch.Tensor | None,
    compute: str = "auto",
) -> torch.Tensor:
    """``svdq::linear``. Arguments and result as ``linear_reference``, which computes what no kernel takes."""
    member = Member(qweight, weight_scale, weight_scale_2, lora_up, bias)
    return linears_cuda(x, [member], input_scale, pre_quant_scale, lora_down, compute)[0]


def linears_cuda(
    x: torch.Tensor,
    members: Sequence[Member],
    input_scale: torch.Tensor | None,
    pre_quant_scale: torch.Tensor | None,
    lora_down: torch.Tensor | None,
    compute: str = "auto",
) -> list[torch.Tensor]:
    """Linears that share everything but their :class:`Member`; arguments and results as ``linear_reference``'s."""
    chosen = plan_call(x, members[0].qweight, input_scale, lora_down, compute)
    for m in members:
        validate(
            x,
            m.qweight,
            m.weight_scale,
            m.weight_scale_2,
            pre_quant_scale,
            lora_down,
            m.lora_up,
            m.bias,
            compute,
        )
    if not chosen.fused or x.numel() == 0:
        return [
            linear_reference(
                x,
                m.qweight,
                m.weight_scale,
                m.weight_scale_2,
                input_scale,
                pre_quant_scale,
                lora_down,
                m.lora_up,
                m.bias,
                compute,
            )
            for m in members
        ]
    if lora_down is not None and not lora_down.shape[0]:
        lora_down = None
        members = [dataclasses.replace(member, lora_up=None) for member in members]
    tokens = x.reshape(-1, x.shape[-1])
    results = KERNELS[chosen.kernel](chosen, tokens, members, input_scale, pre_quant_scale, lora_down)
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in results]


def _dense(chosen, x, members, input_scale, pre_quant_scale, lora_down) -> list[torch.Tensor]:
    """Activation kernel, unpacked weights, GEMMs on dense operands."""
    from svdq_kernels.activation import prepare
    from svdq_kernels.dense import multiply
    from svdq_kernels.expand import divisor, expand_weights

    packed = members[0].qweight.dtype == torch.uint8
    factor = FP8_SCALE_FACTOR if packed and input_scale is not None and chosen.operand == "fp8" else 1.0
    operand, scale_a, partials = prepare(x, pre_quant_scale, input_scale, lora_down, chosen.operand, factor)
    if packed:
        weights = expand_weights([(m.qweight, m.weight_scale) for m in members], operand.dtype)
        scales, factor_b = [m.weight_scale_2 for m in members], divisor(operand.dtype)
    else:
        weights = [m.qweight.contiguous().to(operand.dtype) for m in members]
        scales, factor_b = [m.weight_scale for m in members], 1.0
    return [
        multiply(operand, weight, scale_a, scale_b, partials, m.lora_up, m.bias, x.dtype, factor, factor_b)
        for m, weight, scale_b in zip(members, weights, scales, strict=True)
    ]


def _blockscaled(chosen, x, members, input_scale, pre_quant_scale, lora_down) -> list[torch.Tensor]:
    """Packed activation, GEMMs on packed operands; the down-projection apart."""
    from svdq_kernels.activation import prepare
    from svdq_kernels.blockscaled import multiply_nvfp4
    from svdq_kernels.packed import quantize_nvfp4_packed

    codes, scale, t = quantize_nvfp4_packed(x, pre_quant_scale, input_scale)
    partials = prepare(x, pre_quant_scale, None, lora_down, "none")[2] if lora_down is not None else None
    return [
        multiply_nvfp4(
            codes, scale, m.qweight, m.weight_scale, t, m.weight_scale_2, partials, m.lora_up, m.bias, x.dtype
        )
        for m in members
    ]


def _gemv(chosen, x, members, input_scale, pre_quant_scale, lora_down) -> list[torch.Tensor]:
    """Activation kernel, then reads of the packed weights."""
    from svdq_kernels.activation import prepare
    from svdq_kernels.gemv import multiply_few

    operand, t, partials = prepare(x, pre_quant_scale, input_scale, lora_down, chosen.operand)
    return [
        multiply_few(operand, m.qweight, m.weight_scale, t, m.weight_scale_2, partials, m.lora_up, m.bias)
        for m in members
    ]


KERNELS = {"dense": _dense, "blockscaled": _blockscaled, "gemv": _gemv}
"""Kernel of a plan -> what launches it."""
