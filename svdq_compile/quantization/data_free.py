"""Quantise one weight from its values alone: no calibration data, no ModelOpt.

    R = W - L1 @ L2,  t = max|R| / (6 * 448),  s = e4m3(blockmax / (6 * t)),  code = e2m1(R / (s * t))

Without calibration there is no smoothing, and the activation scale is computed per token at run time. For the
same R the codes and scales are, bit for bit, what ModelOpt 0.47's exporter writes.
"""

from __future__ import annotations

import torch

from ..dtypes import DTYPE_NAMES
from ..errors import QuantizeError
from ..ops import codec
from ..spec import COMPONENTS, E2M1_MAX, E4M3_MAX, E4M3_MIN, GROUP_SIZE, MODEL_DTYPES, Format, LinearSpec


def quantize_weight(weight: torch.Tensor, format: Format, rank: int = 32) -> tuple[LinearSpec, dict[str, torch.Tensor]]:
    """One weight as an unsmoothed linear with a dynamic activation scale.

    Args:
        weight: W, bfloat16, float16 or float32 [N, K], K a multiple of 16, on any device.
        format: NVFP4 or NVFP4_SVD.
        rank: R of the low-rank pair, 1 or more; only NVFP4_SVD uses it. Beyond min(N, K) the pair is filled
            up with zeros.

    Returns:
        The spec, and its components by name in the order of ``spec.COMPONENTS``, on the weight's device.

    Raises:
        QuantizeError: shape, dtype, values, format or rank cannot be quantised.
    """
    _check(weight, format, rank)
    # A string compares equal to its Format, but the `is` tests need the member.
    format = Format(format)
    values = weight.detach().double()
    factors: dict[str, torch.Tensor] = {}
    if format is Format.NVFP4_SVD:
        down, up = low_rank_factors(values, rank)
        factors = {"lora_down": down.to(weight.dtype), "lora_up": up.to(weight.dtype)}
        if not torch.isfinite(factors["lora_up"]).all():
            raise QuantizeError(f"the low-rank pair of a weight of shape {list(weight.shape)} overflows {weight.dtype}")
        values = values - factors["lora_up"].double() @ factors["lora_down"].double()
    codes, scale, tensor_scale = quantize_as_exported(values.float())
    parts = {
        "qweight": codec.pack_codes(codes),
        "weight_scale": scale,
        "weight_scale_2": tensor_scale,
        **factors,
    }
    spec = LinearSpec(
        format=format,
        out_features=weight.shape[0],
        in_features=weight.shape[1],
        rank=rank if factors else 0,
        dtype=DTYPE_NAMES[weight.dtype],
        dynamic=True,
    )
    return spec, {name: parts[name].contiguous() for name in COMPONENTS if name in parts}


def quantize_as_exported(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """NVFP4 codes, block scales and tensor scale of a weight, as ModelOpt's exporter computes them.

    Differs from ``codec.quantize_nvfp4``: a block scale that is zero becomes 1, other block scales do not go
    below 2**-9, and a value that is not below zero after the division has no sign. A weight that is all zero,
    or so small that its tensor scale underflows to zero, gets the tensor scale 1 (ModelOpt: 0, and NaN block
    scales for zeros).

    Args:
        values: float32 [N, K], K a multiple of 16.

    Returns:
        codes uint8 [N, K], block scales float8_e4m3fn [N, K/16], tensor scale float32 scalar.
    """
    blocks = values.unflatten(-1, (-1, GROUP_SIZE))
    tensor_scale = values.abs().amax() / (E2M1_MAX * E4M3_MAX)
    tensor_scale = torch.where(tensor_scale == 0, torch.ones_like(tensor_scale), tensor_scale)
    scale = blocks.abs().amax(-1) / (E2M1_MAX * tensor_scale)
    scale = codec.round_e4m3(torch.where(scale == 0, torch.ones_like(scale), scale.clamp(min=E4M3_MIN)))
    step = (scale.float() * tensor_scale).unsqueeze(-1)
    # A product of two tiny scales can underflow; such a block decodes to zero whatever its codes are.
    scaled = torch.where(step == 0, torch.zeros_like(blocks), blocks / step)
    # Adding zero turns -0.0 into 0.0, whose code has no sign.
    return codec.encode_e2m1(scaled + 0.0).flatten(-2), scale, tensor_scale


FULL_SVD_SIZE = 512
"""Up to this smaller side a full SVD is quick; beyond, subspace iteration finds the leading directions alone."""

OVERSAMPLING, ITERATIONS = 16, 8
"""Extra directions and rounds of the subspace iteration (Halko, Martinsson, Tropp, arXiv:0909.4061, section 4.5)."""


def low_rank_factors(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Best rank-R approximation ``L1 @ L2`` of a weight: ``W = U S V.T``, ``L2 = V.T``, ``L1 = U S``.

    The entry of largest magnitude in each row of L2 is positive, which fixes the signs an SVD leaves open.
    Deterministic: the subspace iteration starts from fixed random numbers.

    Args:
        weight: float64 [N, K].
        rank: R; beyond min(N, K) the factors are filled up with zeros.

    Returns:
        L2 [R, K] and L1 [N, R], float64.
    """
    u, s, vt = _leading_svd(weight, rank)
    down, up = vt[:rank], u[:, :rank] * s[:rank]
    peak = down.gather(1, down.abs().argmax(1, keepdim=True))
    sign = torch.where(peak < 0, -1.0, 1.0).to(weight.dtype)
    missing = rank - down.shape[0]
    down = torch.nn.functional.pad(down * sign, (0, 0, 0, missing))
    return down, torch.nn.functional.pad(up * sign.T, (0, missing))


def _leading_svd(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U [N, P], S [P], V.T [P, K] with P >= min(rank, N, K) leading directions."""
    width = rank + OVERSAMPLING
    if min(weight.shape) <= max(FULL_SVD_SIZE, width):
        return torch.linalg.svd(weight, full_matrices=False)
    start = torch.randn(weight.shape[1], width, generator=torch.Generator().manual_seed(0), dtype=weight.dtype)
    basis = torch.linalg.qr(weight @ start.to(weight.device)).Q
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ basis).Q).Q
    u, s, vt = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    return basis @ u, s, vt


def _check(weight: torch.Tensor, format: Format, rank: int) -> None:
    shape = list(weight.shape)
    if format not in (Format.NVFP4, Format.NVFP4_SVD):
        raise QuantizeError(f"quantising without calibration data gives nvfp4 or nvfp4_svd, not {format}")
    if weight.dim() != 2 or not weight.numel():
        raise QuantizeError(f"a linear's weight has the shape [out, in]; this one has {shape}")
    if weight.shape[1] % GROUP_SIZE:
        raise QuantizeError(f"a weight of shape {shape} has {shape[1]} inputs; NVFP4 needs a multiple of {GROUP_SIZE}")
    if DTYPE_NAMES.get(weight.dtype) not in MODEL_DTYPES:
        raise QuantizeError(f"a weight of shape {shape} is {weight.dtype}; quantise bfloat16, float16 or float32")
    if format == Format.NVFP4_SVD and rank < 1:
        raise QuantizeError(f"rank must be 1 or more, not {rank}; for no low-rank branch use format nvfp4")
    if not torch.isfinite(weight).all():
        raise QuantizeError(f"a weight of shape {shape} holds NaN or infinity")
