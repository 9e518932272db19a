"""Random quantised linears on a device, with the outlier channels real activations have."""

from __future__ import annotations

import dataclasses
import functools

import torch

from ..dtypes import TORCH_DTYPES
from ..ops import codec, reference
from ..ops.modelopt import dequantize_weight
from ..ops.weight import Fingerprint, SVDQWeight
from ..spec import COMPONENTS, E2M1_MAX, E4M3_MAX, Format, LinearSpec

OUTLIER_SHARE = 0.01
OUTLIER_GAIN = (10.0, 40.0)
WEIGHT_STD = 0.02
CALIBRATION_TOKENS = 512


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """One linear of random contents; bias and activations are BF16.

    Args:
        packed: the weight as a checkpoint stores it.
        bias: [N].
        gain: size of each input channel [K], float32.
    """

    packed: SVDQWeight
    bias: torch.Tensor
    gain: torch.Tensor

    @functools.cached_property
    def expanded(self) -> SVDQWeight:
        """The weight with one e4m3 byte per element."""
        from ..ops.storage import expand

        return expand(self.packed)

    def stored(self, storage: str) -> SVDQWeight:
        """The weight under ``packed`` or ``expanded``."""
        return self.expanded if storage == "expanded" else self.packed

    @functools.cached_property
    def residual(self) -> SVDQWeight:
        """The packed weight without its low-rank branch."""
        spec = dataclasses.replace(self.packed.spec, format=Format.NVFP4, rank=0)
        parts = {name: part for name, part in self.packed.parts().items() if name in spec.components()}
        return SVDQWeight(parts, Fingerprint(spec), self.packed.dtype)

    @functools.cached_property
    def dense(self) -> torch.Tensor:
        """The BF16 weight [N, K] that does to x what the whole quantised linear approximates."""
        w = self.packed
        dense = dequantize_weight(w.qweight, w.weight_scale, w.weight_scale_2)
        if w.lora_down is not None:
            dense = torch.addmm(dense, w.lora_up.float(), w.lora_down.float())
        return (dense * w.pre_quant_scale.float()).to(torch.bfloat16)

    def activations(self, tokens: int, seed: int = 1) -> torch.Tensor:
        """BF16 [tokens, K], the same for the same seed."""
        return _activations(tokens, self.gain, seed)


def make_layer(shape: tuple[int, int], rank: int, dynamic: bool, device: torch.device, seed: int = 0) -> Layer:
    """A linear whose low-rank branch and residual contribute alike.

    Args:
        shape: (in_features, out_features).
        rank: R; 0 gives a weight without a low-rank branch.
        dynamic: no calibrated activation scale.
        device: where everything is made.
        seed: of the contents.
    """
    k, n = shape
    # Never the default generator: a failed graph capture leaves it unusable.
    generator = torch.Generator(device).manual_seed(seed)

    def noise(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device)

    low, high = OUTLIER_GAIN
    is_outlier = torch.rand(k, generator=generator, device=device) < OUTLIER_SHARE
    gain = torch.where(is_outlier, low + (high - low) * torch.rand(k, generator=generator, device=device), 1.0)
    residual = noise(n, k) * WEIGHT_STD
    weight_scale_2 = residual.abs().amax() / (E2M1_MAX * E4M3_MAX)
    codes, weight_scale = codec.quantize_nvfp4(residual, weight_scale_2, min_block_scale=2.0**-9)
    smoothing = (gain.rsqrt() * torch.exp2(noise(k) / 4)).to(torch.bfloat16)
    x_hat = reference.smooth(_activations(CALIBRATION_TOKENS, gain, seed=2), smoothing)
    factor = (WEIGHT_STD / max(rank, 1) ** 0.5) ** 0.5
    made = {
        "qweight": codec.pack_codes(codes),
        "weight_scale": weight_scale,
        "weight_scale_2": weight_scale_2,
        "input_scale": x_hat.float().abs().amax() / (E2M1_MAX * E4M3_MAX),
        "pre_quant_scale": smoothing,
        "lora_down": noise(rank, k) * factor,
        "lora_up": noise(n, rank) * factor,
    }
    spec = LinearSpec(Format.NVFP4_SVD if rank else Format.NVFP4, n, k, rank, "BF16", True, dynamic)
    parts = {name: made[name].to(TORCH_DTYPES[part.dtype]) for name, part in spec.components().items()}
    packed = SVDQWeight(parts, Fingerprint(spec), torch.bfloat16)
    return Layer(packed, noise(n).to(torch.bfloat16), gain)


def call(x: torch.Tensor, weight: SVDQWeight, bias: torch.Tensor | None, mode: str) -> torch.Tensor:
    """The public operator on a weight's components."""
    return torch.ops.svdq.linear(x, *(getattr(weight, name) for name in COMPONENTS), bias, mode)


def _activations(tokens: int, gain: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator(gain.device).manual_seed(seed)
    noise = torch.randn(tokens, gain.numel(), generator=generator, device=gain.device)
    return (noise * gain).to(torch.bfloat16)
