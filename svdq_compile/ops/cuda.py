"""``svdq::linear`` on CUDA tensors outside compiled graphs, by the kernels its plan names."""

from __future__ import annotations

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


def plan_call(x, qweight, input_scale, lora_down, compute: str) -> Plan:
    """The plan of one call; arguments as ``svdq::linear``'s."""
    return plan(
        Facts(
            mode=resolved(x, qweight, compute),
            capability=capability(x.device),
            native=has_native_fp4(x.device),
            weight=qweight.dtype,
            activation=x.dtype,
            in_features=x.shape[-1],
            tokens=x.numel() // max(1, x.shape[-1]),
            rank=0 if lora_down is None else lora_down.shape[0],
            low_rank=None if lora_down is None else lora_down.dtype,
            scale_is_one_value=input_scale is None or (input_scale.numel() == 1 and input_scale.device == x.device),
        )
    )


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
    chosen = plan_call(x, qweight, input_scale, lora_down, compute)
    if not chosen.fused or x.numel() == 0:
        return linear_reference(
            x,
            qweight,
            weight_scale,
            weight_scale_2,
            input_scale,
            pre_quant_scale,
            lora_down,
            lora_up,
            bias,
            compute,
        )
    validate(x, qweight, weight_scale, weight_scale_2, pre_quant_scale, lora_down, lora_up, bias, compute)
    if lora_down is not None and not lora_down.shape[0]:
        lora_down = lora_up = None
    tokens = x.reshape(-1, x.shape[-1])
    y = KERNELS[chosen.kernel](
        chosen,
        tokens,
        qweight,
        weight_scale,
        weight_scale_2,
        input_scale,
        pre_quant_scale,
        lora_down,
        lora_up,
        bias,
    )
    return y.view(*x.shape[:-1], y.shape[-1])


def _dense(
    chosen, x, qweight, weight_scale, weight_scale_2, input_scale, pre_quant_scale, lora_down, lora_up, bias
) -> torch.Tensor:
    """Activation kernel, unpacked weight, GEMM on dense operands."""
    from svdq_kernels.activation import prepare
    from svdq_kernels.dense import multiply
    from svdq_kernels.expand import divisor, expand_nvfp4

    packed = qweight.dtype == torch.uint8
    factor = FP8_SCALE_FACTOR if packed and input_scale is not None and chosen.operand == "fp8" else 1.0
    operand, scale_a, partials = prepare(x, pre_quant_scale, input_scale, lora_down, chosen.operand, factor)
    if packed:
        weight, scale_b = expand_nvfp4(qweight, weight_scale, operand.dtype), weight_scale_2
        factor_b = divisor(operand.dtype)
    else:
        weight, scale_b, factor_b = qweight.contiguous().to(operand.dtype), weight_scale, 1.0
    return multiply(operand, weight, scale_a, scale_b, partials, lora_up, bias, x.dtype, factor, factor_b)


def _blockscaled(
    chosen, x, qweight, weight_scale, weight_scale_2, input_scale, pre_quant_scale, lora_down, lora_up, bias
) -> torch.Tensor:
    """Packed activation, GEMM on packed operands; the down-projection apart."""
    from svdq_kernels.activation import prepare
    from svdq_kernels.blockscaled import multiply_nvfp4
    from svdq_kernels.packed import quantize_nvfp4_packed

    codes, scale, t = quantize_nvfp4_packed(x, pre_quant_scale, input_scale)
    partials = prepare(x, pre_quant_scale, None, lora_down, "none")[2] if lora_down is not None else None
    return multiply_nvfp4(codes, scale, qweight, weight_scale, t, weight_scale_2, partials, lora_up, bias, x.dtype)


def _gemv(
    chosen, x, qweight, weight_scale, weight_scale_2, input_scale, pre_quant_scale, lora_down, lora_up, bias
) -> torch.Tensor:
    """Activation kernel, then a read of the packed weight."""
    from svdq_kernels.activation import prepare
    from svdq_kernels.gemv import multiply_vector

    operand, t, partials = prepare(x, pre_quant_scale, input_scale, lora_down, chosen.operand, word_major=True)
    return multiply_vector(operand, qweight, weight_scale, t, weight_scale_2, partials, lora_up, bias)


KERNELS = {"dense": _dense, "blockscaled": _blockscaled, "gemv": _gemv}
"""Kernel of a plan -> what launches it."""
