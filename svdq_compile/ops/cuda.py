"""``svdq::linear`` in ``exact`` mode on an NVIDIA GPU: Triton makes the operands, cuBLAS the products.

    x_q, t, x_hat = quantize(x * s)
    y             = (x_q @ w_q.T) * (t * weight_scale_2) + (x_hat @ L2.T) @ L1.T + bias

x_q and w_q are code times block scale, which bfloat16 holds exactly, so the bfloat16 product with float32
sums has the specification's operands; only the order of its sums is its own.
"""

from __future__ import annotations

import torch

HALF_DTYPES = (torch.bfloat16, torch.float16)


def is_supported(x: torch.Tensor, qweight: torch.Tensor, input_scale: torch.Tensor | None, compute: str) -> bool:
    """Whether :func:`linear_cuda` has its own way to compute a linear; the reference computes all others."""
    return (
        compute == "exact"
        and x.numel() > 0
        and qweight.numel() > 0
        and qweight.dtype == torch.uint8
        and x.dtype in (*HALF_DTYPES, torch.float32)
        and (input_scale is None or (input_scale.numel() == 1 and input_scale.device == x.device))
        # mm(out_dtype=) is cuBLAS only, and Triton starts at sm_80.
        and torch.version.hip is None
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )


def matmul_float32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b.T`` of one 16-bit dtype, summed and returned in float32, [M, N].

    Args:
        a: [M, K].
        b: [N, K].
    """
    return torch.mm(a, b.t(), out_dtype=torch.float32)


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
    compute: str = "exact",
) -> torch.Tensor:
    """``svdq::linear`` on CUDA tensors. Arguments and result as ``linear_reference``, which computes whatever
    :func:`is_supported` declines.

    Products of float32 operands follow ``torch.set_float32_matmul_precision``. For 16-bit activations that is
    the second low-rank product alone, and TF32's 10 fraction bits are no coarser than the result's. Float32
    activations multiply in float32 throughout, because tensor cores drop low bits of their sums; full
    precision then needs the setting ``highest``, PyTorch's default.
    """
    from .linear import linear_reference, validate

    if not is_supported(x, qweight, input_scale, compute):
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

    from svdq_kernels.activation import quantize_nvfp4
    from svdq_kernels.expand import expand_nvfp4

    tokens = x.reshape(-1, x.shape[-1])
    input_scale = None if input_scale is None else input_scale.float()
    x_q, tensor_scale, x_hat = quantize_nvfp4(tokens, pre_quant_scale, input_scale)
    w_q = expand_nvfp4(qweight, weight_scale)
    y = matmul_float32(x_q, w_q) if x.dtype in HALF_DTYPES else x_q.float() @ w_q.float().t()
    y *= tensor_scale * weight_scale_2.float()
    if lora_down is not None and lora_down.shape[0]:
        if x_hat.dtype == lora_down.dtype and x_hat.dtype in HALF_DTYPES:
            low = matmul_float32(x_hat, lora_down)
        else:
            low = x_hat.float() @ lora_down.float().t()
        y.addmm_(low, lora_up.float().t())
    if bias is not None:
        y += bias
    return y.to(x.dtype).view(*x.shape[:-1], -1)
