"""The kernels a large linear is made of, behind three functions; the only place here that knows their signatures."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..ops.reference import FP8_WEIGHT_DIVISOR
from ..ops.weight import SVDQWeight
from ..spec import E2M1_MAX
from .layers import Layer


class Operand(NamedTuple):
    """What the activation kernel makes of x: the product's operand [M, K], its scale, and x @ L2.T in slices."""

    matrix: torch.Tensor
    scale: torch.Tensor | None
    partials: torch.Tensor | None


def operand_dtype(mode: str) -> torch.dtype:
    """Dtype of both operands of a mode's product; BF16 holds the 4-bit ones exactly."""
    return torch.float8_e4m3fn if mode == "fp8" else torch.bfloat16


def prepare(x: torch.Tensor, layer: Layer, mode: str, low_rank: bool = True) -> Operand:
    """Smooths and quantises x, and multiplies it with ``lora_down`` on the way.

    Args:
        x: BF16 [M, K].
        layer: smoothing, scales and factors.
        mode: which operand is made.
        low_rank: False leaves ``lora_down`` out.
    """
    from svdq_kernels.activation import prepare

    weight = layer.packed
    lora_down = weight.lora_down if low_rank else None
    made = prepare(
        x,
        weight.pre_quant_scale,
        weight.input_scale,
        lora_down,
        "plain" if mode == "bf16" else mode,
        scale_factor=_input_factor(weight, mode),
    )
    return Operand(*made)


def expand(weight: SVDQWeight, mode: str) -> torch.Tensor:
    """The packed weight as the product's operand [N, K], without its tensor scale."""
    from svdq_kernels.expand import expand_nvfp4

    return expand_nvfp4(weight.qweight, weight.weight_scale, operand_dtype(mode))


def multiply(operand: Operand, matrix: torch.Tensor, layer: Layer, mode: str) -> torch.Tensor:
    """The product with scales, low-rank branch and bias, BF16 [M, N].

    Args:
        operand: what :func:`prepare` made; without partials there is no low-rank branch.
        matrix: what :func:`expand` made.
        layer: scales, ``lora_up`` and bias.
        mode: the mode both were made for.
    """
    from svdq_kernels.dense import multiply

    weight = layer.packed
    return multiply(
        operand.matrix,
        matrix,
        operand.scale,
        weight.weight_scale_2,
        operand.partials,
        None if operand.partials is None else weight.lora_up,
        layer.bias,
        torch.bfloat16,
        factor_a=_input_factor(weight, mode),
        factor_b=FP8_WEIGHT_DIVISOR if mode == "fp8" else 1.0,
    )


def _input_factor(weight: SVDQWeight, mode: str) -> float:
    """What turns the stored scale, amax / (6 * 448), into e4m3's, amax / 448; one made per token needs no turning."""
    return E2M1_MAX if mode == "fp8" and weight.input_scale is not None else 1.0
