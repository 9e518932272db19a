"""Single quantised layers with random, valid contents."""

from __future__ import annotations

import torch
from torch import nn

from ..dtypes import DTYPE_NAMES, TORCH_DTYPES
from ..ops.weight import SHARED_PARTS, Fingerprint, SVDQWeight
from ..spec import E2M1_MAX, E4M3_MAX, Format, LinearSpec


def random_linear(
    out_features: int,
    in_features: int,
    *,
    format: Format = Format.NVFP4_SVD,
    rank: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = True,
    smooth: bool = True,
    dynamic: bool = False,
    compute: str = "auto",
    generator: torch.Generator | None = None,
) -> nn.Linear:
    """An ``nn.Linear`` with a random quantised weight, calibrated for standard normal inputs.

    Args:
        out_features: N.
        in_features: K, a multiple of 16 for the NVFP4 formats.
        format: storage format; rank and smoothing apply to NVFP4_SVD and FP8_SVD only.
        rank: R.
        dtype: model dtype.
        bias: whether the layer has a bias.
        smooth: whether the weight has a ``pre_quant_scale``.
        dynamic: no calibrated activation scale.
        compute: compute mode.
        generator: source of the random numbers.
    """
    svd = format in (Format.NVFP4_SVD, Format.FP8_SVD)
    fp8 = format in (Format.FP8, Format.FP8_SVD)
    spec = LinearSpec(
        format, out_features, in_features, rank if svd else 0, DTYPE_NAMES[dtype], smooth and svd, dynamic
    )
    parts = {}
    for name, part in spec.components().items():
        noise = torch.randn(part.shape, generator=generator)
        if name == "qweight" and part.dtype == "U8":
            value = torch.randint(0, 256, part.shape, generator=generator)
        elif name == "qweight":
            value = noise.clamp(-4, 4) * 100
        elif name == "weight_scale" and part.shape:
            value = torch.exp2(noise)
        elif name == "pre_quant_scale":
            value = torch.exp2(noise / 2)
        elif name == "input_scale":
            value = torch.tensor(6.0 / (E4M3_MAX if fp8 else E2M1_MAX * E4M3_MAX))
        elif not part.shape:
            value = torch.tensor(0.01) / in_features**0.5
        else:
            value = noise / max(1, part.shape[-1]) ** 0.5
        parts[name] = value.to(TORCH_DTYPES[part.dtype])
    layer = nn.Linear(in_features, out_features, bias=bias, device="meta", dtype=dtype)
    layer.weight = nn.Parameter(SVDQWeight(parts, Fingerprint(spec, compute), dtype), requires_grad=False)
    if bias:
        values = torch.randn(out_features, generator=generator).to(dtype)
        layer.bias = nn.Parameter(values, requires_grad=False)
    return layer


def share_activation(*layers: nn.Linear) -> None:
    """Gives layers of one in_features and rank the smoothing, activation scale and down-projection of the first."""
    first = layers[0].weight
    for layer in layers[1:]:
        parts = layer.weight.parts() | {name: part for name, part in first.parts().items() if name in SHARED_PARTS}
        weight = SVDQWeight(parts, layer.weight.fingerprint, layer.weight.dtype)
        layer.weight = nn.Parameter(weight, requires_grad=False)
