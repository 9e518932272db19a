"""The specification of a quantised linear, one function per stage, in plain PyTorch.

    x_hat = x * s
    y     = quantize(x_hat) @ dequantize(R).T + (x_hat @ L2.T) @ L1.T + bias

Three kinds of arithmetic compute it, by what the product of x_hat and R takes as operands: ``nvfp4`` both in 4 bits,
``fp8`` both in e4m3, ``bf16`` the weight's 4 bits and x_hat as it is. In each of them operands are exact, sums are
float32, and the result is rounded once. Float64 activations make it the oracle: the same operands, summed in float64.
(ModelOpt's simulation, which rounds in between, is :mod:`svdq_compile.ops.modelopt`.)

Letters: M tokens, K in_features, N out_features, R rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..spec import E2M1_MAX, E4M3_MAX
from . import codec

FP8_WEIGHT_DIVISOR = 8.0
"""Brings code times block scale, up to 6 * 448, below e4m3's 448; a power of two, so only exponents change."""


def accumulate_dtype(x: torch.Tensor) -> torch.dtype:
    """Dtype of sums: float64 for float64 activations, else float32."""
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


def dynamic_input_scale_fp8(x_hat: torch.Tensor) -> torch.Tensor:
    """Per-token scale ``amax / 448`` for e4m3 activations; 1 for an all-zero token. Shapes as above."""
    return _token_scale(x_hat, E4M3_MAX)


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


def fp8_weight(
    qweight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_scale_2: torch.Tensor | None,
    input_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The weight of ``fp8`` arithmetic: ``w_q = e4m3(code * block scale / 8)``, and the scales that belong to it.

    Args:
        qweight: uint8 [N, K/2], or float8_e4m3fn [N, K], which is its own w_q.
        weight_scale: float8_e4m3fn [N, K/16], or float32 scalar.
        weight_scale_2: t, float32 scalar (uint8 only).
        input_scale: i, float32 scalar, or None for a dynamic one per token.

    Returns:
        w_q float8_e4m3fn [N, K]; its scale, float32 scalar, ``8 * t``; the activation's scale, float32 scalar,
        ``6 * i`` (i is amax / (6 * 448), e4m3 needs amax / 448), or None.
    """
    if qweight.dtype != torch.uint8:
        return qweight, weight_scale, input_scale
    products = codec.decode_nvfp4(codec.unpack_codes(qweight), weight_scale)
    w_q = codec.round_e4m3(products / FP8_WEIGHT_DIVISOR)
    scale = None if input_scale is None else input_scale.float() * E2M1_MAX
    return w_q, weight_scale_2.float() * FP8_WEIGHT_DIVISOR, scale


def quantize_fp8(x_hat: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``e4m3(x_hat * (1 / scale))``: float32 reciprocal, float32 product, saturating at 448, NaN stays NaN.

    Args:
        x_hat: [..., K].
        scale: float32, a scalar or [..., 1].

    Returns:
        float8_e4m3fn [..., K].
    """
    return codec.round_e4m3(x_hat.float() * (torch.ones_like(scale) / scale))


def product_nvfp4(
    x_hat: torch.Tensor,
    qweight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_scale_2: torch.Tensor,
    input_scale: torch.Tensor | None,
) -> torch.Tensor:
    """Block-scaled codes times block-scaled codes, tensor scales afterwards.

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


def product_fp8(
    x_hat: torch.Tensor,
    qweight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_scale_2: torch.Tensor | None,
    input_scale: torch.Tensor | None,
) -> torch.Tensor:
    """``(x_q @ w_q.T) * (a * b)`` of e4m3 operands with their scales a and b.

    Arguments as :func:`product_nvfp4`, or ``qweight`` float8_e4m3fn [N, K] with a scalar ``weight_scale``.
    """
    wide = accumulate_dtype(x_hat)
    w_q, weight_scale, input_scale = fp8_weight(qweight, weight_scale, weight_scale_2, input_scale)
    scale = dynamic_input_scale_fp8(x_hat) if input_scale is None else input_scale.float()
    x_q = quantize_fp8(x_hat, scale)
    return F.linear(x_q.to(wide), w_q.to(wide)) * (scale.to(wide) * weight_scale.to(wide))


def product_bf16(
    x_hat: torch.Tensor,
    qweight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_scale_2: torch.Tensor | None,
    input_scale: torch.Tensor | None,
) -> torch.Tensor:
    """``(x_hat @ w_q.T) * t``: the weight as it is stored, the activation not quantised. Arguments as above."""
    wide = accumulate_dtype(x_hat)
    if qweight.dtype == torch.uint8:
        w_q, scale = codec.decode_nvfp4(codec.unpack_codes(qweight), weight_scale, wide), weight_scale_2
    else:
        w_q, scale = qweight.to(wide), weight_scale
    return F.linear(x_hat.to(wide), w_q) * scale.to(wide)


_PRODUCTS = {"nvfp4": product_nvfp4, "fp8": product_fp8, "bf16": product_bf16}


def linear_wide(
    x: torch.Tensor,
    qweight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_scale_2: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    pre_quant_scale: torch.Tensor | None,
    lora_down: torch.Tensor | None,
    lora_up: torch.Tensor | None,
    bias: torch.Tensor | None,
    arithmetic: str,
) -> torch.Tensor:
    """The whole linear before its one rounding: accumulation dtype [..., N]. Arguments as ``svdq::linear``.

    Args:
        arithmetic: ``nvfp4``, ``fp8`` or ``bf16``, whatever the number of tokens. A float8_e4m3fn ``qweight`` has no
            4-bit codes; ``nvfp4`` takes its own operands, those of ``fp8``.
    """
    wide = accumulate_dtype(x)
    if arithmetic == "nvfp4" and qweight.dtype != torch.uint8:
        arithmetic = "fp8"
    x_hat = smooth(x, pre_quant_scale)
    y = _PRODUCTS[arithmetic](x_hat, qweight, weight_scale, weight_scale_2, input_scale)
    if lora_down is not None:
        y = y + low_rank(x_hat.to(wide), lora_down.to(wide), lora_up.to(wide))
    return y if bias is None else y + bias.to(wide)
