"""``svdq::linear``: the one operator a quantised linear becomes, in eager code and in compiled graphs.

The schema takes every stored tensor as it lies in the checkpoint, so no operand is prepared, cached or mutated
behind the caller's back. The format follows from the dtypes: uint8 ``qweight`` is NVFP4, float8_e4m3fn is FP8.
``compute="auto"`` is resolved at each call by the activation's device.
"""

from __future__ import annotations

import math

import torch

from ..errors import SvdqError
from ..spec import Format
from . import modelopt, modes, reference

SCHEMA = (
    "linear(Tensor x, Tensor qweight, Tensor weight_scale, Tensor? weight_scale_2, Tensor? input_scale, "
    "Tensor? pre_quant_scale, Tensor? lora_down, Tensor? lora_up, Tensor? bias, str compute='auto') -> Tensor"
)

library = torch.library.Library("svdq", "DEF")
library.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))


def _check(condition: bool, message: str) -> None:
    torch._check(condition, lambda: f"svdq::linear: {message}")


def validate(x, qweight, weight_scale, weight_scale_2, pre_quant_scale, lora_down, lora_up, bias, compute) -> None:
    """Shapes that must agree; dynamic sizes are compared symbolically."""
    nvfp4 = qweight.dtype == torch.uint8
    _check(
        nvfp4 or qweight.dtype == torch.float8_e4m3fn,
        f"qweight is {qweight.dtype}, needs uint8 or float8_e4m3fn",
    )
    _check(x.is_floating_point() and x.element_size() >= 2, f"x is {x.dtype}, needs a 16-bit or wider float")
    _check(compute in modes.COMPUTE_MODES, f"compute={compute!r}, needs one of {modes.COMPUTE_MODES}")
    _check(x.dim() >= 1 and qweight.dim() == 2, "x needs at least one dimension and qweight exactly two")
    n = qweight.shape[0]
    k = qweight.shape[1] * (2 if nvfp4 else 1)
    _check(x.shape[-1] == k, f"x has {x.shape[-1]} features, the weight {k}")
    if nvfp4:
        _check(k % 16 == 0, f"in_features {k} is not a multiple of 16")
        _check(weight_scale_2 is not None, "NVFP4 needs weight_scale_2")
        _check(tuple(weight_scale.shape) == (n, k // 16), f"weight_scale is {tuple(weight_scale.shape)}")
    else:
        plain = pre_quant_scale is None and lora_down is None
        _check(plain or compute not in modes.NEEDS_CODES, f"compute={compute!r} needs the 4-bit codes of qweight")
    _check((lora_down is None) == (lora_up is None), "lora_down and lora_up come together")
    if lora_down is not None:
        r = lora_down.shape[0]
        _check(tuple(lora_down.shape) == (r, k) and tuple(lora_up.shape) == (n, r), "LoRA factors do not fit")
    _check(pre_quant_scale is None or tuple(pre_quant_scale.shape) == (k,), "pre_quant_scale does not fit")
    _check(bias is None or tuple(bias.shape) == (n,), "bias does not fit")


def linear_reference(
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
    """``y = quantize(x * s) @ dequantize(R).T + (x * s @ L2.T) @ L1.T + bias`` by the specification.

    Args:
        x: activations [..., K], float16, bfloat16, float32 or float64 (the oracle), any strides.
        qweight: R, uint8 [N, K/2] (two e2m1 codes a byte, even column low) or float8_e4m3fn [N, K].
        weight_scale: float8_e4m3fn [N, K/16] row-major (NVFP4) or float32 scalar (FP8).
        weight_scale_2: float32 scalar (NVFP4 only).
        input_scale: float32 scalar; None computes one per token.
        pre_quant_scale: s [K] or None.
        lora_down: L2 [R, K] or None; R may be 0.
        lora_up: L1 [N, R] or None.
        bias: [N] or None.
        compute: one of :data:`svdq_compile.ops.modes.COMPUTE_MODES`.

    Returns:
        x.dtype [..., N], contiguous.

    Raises:
        RuntimeError: shapes or dtypes that do not fit together.
    """
    validate(x, qweight, weight_scale, weight_scale_2, pre_quant_scale, lora_down, lora_up, bias, compute)
    mode = resolved(x, qweight, compute)
    operands = x, qweight, weight_scale, weight_scale_2, input_scale, pre_quant_scale, lora_down, lora_up, bias
    # Autocast would round the sums' operands to 16 bits.
    with torch.autocast(x.device.type, enabled=False):
        if mode != "modelopt":
            mode = modes.arithmetic(mode, math.prod(x.shape[:-1]), qweight.dtype == torch.uint8)
            y = reference.linear_wide(*operands, mode)
        elif qweight.dtype == torch.uint8:
            y = modelopt.nvfp4_linear_modelopt(*operands)
        else:
            y = modelopt.fp8_linear_modelopt(x, qweight, weight_scale, input_scale, bias)
    return y.to(x.dtype)


def resolved(x: torch.Tensor, qweight: torch.Tensor, compute: str) -> str:
    """The compute mode of one call, ``auto`` resolved by x's device.

    An FP8_SVD weight looks like an FP8 checkpoint's here, so ``SVDQWeight.operator_compute`` resolves it beforehand.
    """
    format = Format.NVFP4 if qweight.dtype == torch.uint8 else Format.FP8
    return modes.resolve(compute, format, x.device)


def _fake(
    x,
    qweight,
    weight_scale,
    weight_scale_2,
    input_scale,
    pre_quant_scale,
    lora_down,
    lora_up,
    bias,
    compute="auto",
):
    validate(x, qweight, weight_scale, weight_scale_2, pre_quant_scale, lora_down, lora_up, bias, compute)
    return x.new_empty((*x.shape[:-1], qweight.shape[0]))


def _cuda(*args, **kwargs):
    from .cuda import linear_cuda

    with torch.autocast("cuda", enabled=False):
        return linear_cuda(*args, **kwargs)


def without_gradient(name: str) -> None:
    """Makes the backward pass of one of our operators an error that says what to do."""

    def refuse(ctx, *grads):
        raise SvdqError(
            f"svdq::{name} has no gradient: the 4-bit codes cannot be trained.\n"
            "  hint:   run inference under torch.no_grad() or torch.inference_mode()"
        )

    torch.library.register_autograd(f"svdq::{name}", refuse, lib=library)


library.impl("linear", linear_reference, "CompositeExplicitAutograd")
library.impl("linear", _cuda, "CUDA")
torch.library.register_fake("svdq::linear", _fake, lib=library)
without_gradient("linear")

linear = torch.ops.svdq.linear.default
