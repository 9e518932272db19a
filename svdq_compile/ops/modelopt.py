"""NVIDIA ModelOpt's own simulation: every operand rounded to the activation's dtype, every product in it.

NVFP4 is reproduced bit for bit where the products sum in the same order. Letters as in
:mod:`svdq_compile.ops.reference`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..spec import E2M1_MAX
from . import codec
from .reference import dynamic_input_scale, dynamic_input_scale_fp8, low_rank, smooth

MODELOPT_TINY_STEP = 1e-5
"""ModelOpt's activation kernel divides a block by 1 where block scale times tensor scale is below this."""


def fake_quantize_modelopt(x_hat: torch.Tensor, input_scale: torch.Tensor) -> torch.Tensor:
    """ModelOpt's simulated NVFP4 activation: quantised and multiplied out again, in the activation's dtype.

    Args:
        x_hat: [..., K].
        input_scale: float32, a scalar or [..., 1].
    """
    blocks = x_hat.float().unflatten(-1, (-1, 16))
    amax = blocks.abs().amax(-1, keepdim=True)
    tensor_scale = input_scale.float().unsqueeze(-1) if input_scale.dim() else input_scale.float()
    step = codec.round_e4m3(amax / (E2M1_MAX * tensor_scale)).float() * tensor_scale
    step = torch.where(step < MODELOPT_TINY_STEP, torch.ones_like(step), step)
    values = codec.decode_e2m1(codec.encode_e2m1(blocks / step)) * step
    return values.flatten(-2).to(x_hat.dtype)


def dequantize_weight(qweight: torch.Tensor, weight_scale: torch.Tensor, weight_scale_2: torch.Tensor) -> torch.Tensor:
    """The NVFP4 residual R multiplied out as ModelOpt does, ``code * (block scale * tensor scale)``: float32 [N, K]."""
    codes = codec.decode_e2m1(codec.unpack_codes(qweight)).unflatten(-1, (-1, 16))
    return (codes * (weight_scale.float() * weight_scale_2.float()).unsqueeze(-1)).flatten(-2)


def nvfp4_linear_modelopt(
    x: torch.Tensor,
    qweight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_scale_2: torch.Tensor,
    input_scale: torch.Tensor | None,
    pre_quant_scale: torch.Tensor | None,
    lora_down: torch.Tensor | None,
    lora_up: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """The whole NVFP4 linear as ModelOpt simulates it: x.dtype [..., N]. Arguments as ``svdq::linear``."""
    dtype = x.dtype
    x_hat = smooth(x, pre_quant_scale)
    x_q = fake_quantize_modelopt(x_hat, dynamic_input_scale(x_hat) if input_scale is None else input_scale)
    w_q = dequantize_weight(qweight, weight_scale, weight_scale_2).to(dtype)
    y = F.linear(x_q, w_q, None if bias is None else bias.to(dtype))
    if lora_down is not None:
        y = y + low_rank(x_hat, lora_down.to(dtype), lora_up.to(dtype))
    return y


def fp8_linear_modelopt(
    x: torch.Tensor,
    qweight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """ModelOpt's simulation of its FP8 linear: operands multiplied out and rounded to x.dtype [..., N]."""
    dtype = x.dtype
    scale = dynamic_input_scale_fp8(x) if input_scale is None else input_scale.float()
    x_q = (codec.round_e4m3(x.float() / scale).float() * scale).to(dtype)
    w_q = (qweight.float() * weight_scale).to(dtype)
    return F.linear(x_q, w_q, None if bias is None else bias.to(dtype))
