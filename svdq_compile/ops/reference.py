"""The specification of a quantised linear, one function per stage, in plain PyTorch.

    x_hat = x * s
    y     = quantize(x_hat) @ dequantize(R).T + (x_hat @ L2.T) @ L1.T + bias

Two modes compute it. ``exact`` is what block-scaled hardware does: operands exact, sums in float32, one rounding at
the end. ``modelopt`` reproduces NVIDIA ModelOpt's own simulation, NVFP4 bit for bit: every operand rounded to the
activation's dtype, every product in it. Float64 activations make ``exact`` the oracle: the same quantised operands,
summed in float64.

Letters: M tokens, K in_features, N out_features, R rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..spec import E2M1_MAX, E4M3_MAX
from . import codec

COMPUTE_MODES = ("exact", "modelopt")

MODELOPT_TINY_STEP = 1e-5
"""ModelOpt's activation kernel divides a block by 1 where block scale times tensor scale is below this."""


def accumulate_dtype(x: torch.Tensor) -> torch.dtype:
    """Dtype of sums in ``exact`` mode: float64 for float64 activations, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def smooth(x: torch.Tensor, pre_quant_scale: torch.Tensor | None) -> torch.Tensor:
    """``x * s`` rounded once to the activation's dtype.

    Args:
        x: [..., K].
        pre_quant_scale: s [K], or None for no smoothing.
    """
    if pre_quant_scale is None:
        return x
    wide = accumulate_dtype(x)
    return (x.to(wide) * pre_quant_scale.to(wide)).to(x.dtype)


def dynamic_input_scale(x_hat: torch.Tensor) -> torch.Tensor:
    """Per-token tensor scale ``amax / (6 * 448)`` for checkpoints without a calibrated one; 1 for an all-zero token.

    Args:
        x_hat: [..., K].

    Returns:
        float32 [..., 1].
    """
    return _token_scale(x_hat, E2M1_MAX * E4M3_MAX)


def dynamic_input_scale_fp8(x: torch.Tensor) -> torch.Tensor:
    """Per-token scale ``amax / 448`` for e4m3 activations; 1 for an all-zero token. Shapes as above."""
    return _token_scale(x, E4M3_MAX)


def _token_scale(x: torch.Tensor, largest: float) -> torch.Tensor:
    amax = x.float().abs().amax(-1, keepdim=True)
    # A Python number would be divided by as a product with its reciprocal on CUDA.
    scale = amax / torch.full_like(amax, largest)
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def low_rank(x_hat: torch.Tensor, lora_down: torch.Tensor, lora_up: torch.Tensor) -> torch.Tensor:
    """``(x_hat @ L2.T) @ L1.T``, in the common dtype of the operands.

    Args:
        x_hat: smoothed, un-quantised activations [..., K].
        lora_down: L2 [R, K].
        lora_up: L1 [N, R].
    """
    return F.linear(F.linear(x_hat, lora_down), lora_up)


def residual_exact(
    x_hat: torch.Tensor,
    qweight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_scale_2: torch.Tensor,
    input_scale: torch.Tensor | None,
) -> torch.Tensor:
    """NVFP4 product with exact operands: block-scaled codes times block-scaled codes, tensor scales afterwards.

    Args:
        x_hat: [..., K].
        qweight: packed codes uint8 [N, K/2].
        weight_scale: float8_e4m3fn [N, K/16].
        weight_scale_2: float32 scalar.
        input_scale: float32 scalar, or None for a dynamic one per token.

    Returns:
        accumulation dtype [..., N].
    """
    wide = accumulate_dtype(x_hat)
    if input_scale is None:
        input_scale = dynamic_input_scale(x_hat)
    codes, scale = codec.quantize_nvfp4(x_hat.float(), input_scale)
    x_q = codec.decode_nvfp4(codes, scale, wide)
    w_q = codec.decode_nvfp4(codec.unpack_codes(qweight), weight_scale, wide)
    return F.linear(x_q, w_q) * (input_scale.to(wide) * weight_scale_2.to(wide))


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


def nvfp4_linear_exact(
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
    """The whole NVFP4 linear before its one rounding: accumulation dtype [..., N]. Arguments as ``svdq::linear``."""
    wide = accumulate_dtype(x)
    x_hat = smooth(x, pre_quant_scale)
    y = residual_exact(x_hat, qweight, weight_scale, weight_scale_2, input_scale)
    if lora_down is not None:
        y = y + low_rank(x_hat.to(wide), lora_down.to(wide), lora_up.to(wide))
    return y if bias is None else y + bias.to(wide)


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


def fp8_linear_exact(
    x: torch.Tensor,
    qweight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """ModelOpt's FP8 linear before its one rounding: ``(e4m3(x / i) @ w.T) * (i * t) + bias``.

    Args:
        x: [..., K].
        qweight: float8_e4m3fn [N, K].
        weight_scale: t, float32 scalar.
        input_scale: i, float32 scalar, or None for a dynamic one per token.
        bias: [N] or None.

    Returns:
        accumulation dtype [..., N].
    """
    wide = accumulate_dtype(x)
    scale = dynamic_input_scale_fp8(x) if input_scale is None else input_scale
    x_q = codec.round_e4m3(x.float() / scale).to(wide)
    y = F.linear(x_q, qweight.to(wide)) * (scale.to(wide) * weight_scale.to(wide))
    return y if bias is None else y + bias.to(wide)
