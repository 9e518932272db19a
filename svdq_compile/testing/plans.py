"""Which tensors a random checkpoint holds, and their values."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..checkpoint.header import ITEM_BITS
from ..dtypes import TORCH_DTYPES
from ..quantization.recipes import BLOCKS, TEXT_AND_MODULATION, Recipe
from ..spec import MODELOPT_LEAF, Format, LinearSpec

RECIPES = {
    "mixed": Recipe(Format.NVFP4_SVD, skip=TEXT_AND_MODULATION),
    "all": Recipe(Format.NVFP4_SVD, skip=()),
    "nvfp4": Recipe(Format.NVFP4),
    "fp8": Recipe(Format.FP8),
}
"""``mixed`` is ModelOpt's recipe since July 2026, ``all`` the one before it."""

FUSED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
"""Linears that an export fuses: all of their components but the codes, the block scales and L1 are equal."""

OWN = ("qweight", "weight_scale", "lora_up", "bias")

MODULATION = ("img_mod.1", "txt_mod.1")
"""Linears that read the time embedding in every block: as it is, it has one range, hence one ``input_scale``."""


@dataclasses.dataclass(frozen=True)
class Planned:
    """One tensor of a checkpoint to be.

    Args:
        key: its key.
        dtype: safetensors spelling.
        shape: its shape.
        role: component name, ``bias``, or ``dense``.
        source: what its random numbers depend on; tensors of equal source and shape are equal.
        spec: of the quantised linear it is a part of.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    role: str
    source: str
    spec: LinearSpec | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BITS[self.dtype] // 8


def plan_checkpoint(
    config: Mapping[str, Any],
    *,
    recipe: str,
    rank: int | Callable[[str], int],
    blocks_kept: int,
    dtype: str,
    share: bool = True,
) -> list[Planned]:
    """Every tensor of a checkpoint in the model's order; the arguments are those of ``write_checkpoint``."""
    from accelerate import init_empty_weights
    from diffusers import QwenImageTransformer2DModel

    with init_empty_weights():
        model = QwenImageTransformer2DModel.from_config(dict(config))
    settings = dataclasses.replace(RECIPES[recipe], blocks_kept=blocks_kept)
    quantised = {f"{BLOCKS}.{i}." for i in settings.quantized_blocks(config["num_layers"])}
    plan = []
    for name, module in model.named_modules():
        inside = any(name.startswith(prefix) for prefix in quantised)
        if inside and isinstance(module, nn.Linear):
            own_rank = rank if isinstance(rank, int) else rank(name)
            plan += _quantised_linear(name, module, settings, own_rank, dtype, share)
            continue
        for leaf, value in module.named_parameters(recurse=False):
            key = f"{name}.{leaf}" if name else leaf
            plan.append(Planned(key, dtype, tuple(value.shape), "dense", key))
    return plan


def _quantised_linear(
    name: str, module: nn.Linear, settings: Recipe, rank: int, dtype: str, share: bool
) -> Iterable[Planned]:
    format = settings.format
    # Every block has the same linears, so a skip pattern is its block-independent ending.
    if format is Format.NVFP4_SVD and any(name.endswith(pattern.lstrip("*")) for pattern in settings.skip):
        format = Format.NVFP4
    low_rank = format is Format.NVFP4_SVD
    spec = LinearSpec(format, module.out_features, module.in_features, rank if low_rank else 0, dtype, smooth=low_rank)
    parent, _, last = name.rpartition(".")
    fused = next((f"{parent}.{group[0]}" for group in FUSED if last in group and share), name)
    parts = {role: (c.dtype, c.shape) for role, c in spec.components().items()}
    if module.bias is not None:
        parts["bias"] = (dtype, (module.out_features,))
    for role, (part_dtype, shape) in parts.items():
        source = f"{name if role in OWN else fused}.{role}"
        if share and role == "input_scale" and not spec.smooth and name.endswith(MODULATION):
            source = f"modulation.{role}"
        yield Planned(f"{name}.{MODELOPT_LEAF.get(role, role)}", part_dtype, shape, role, source, spec)


def random_tensor(tensor: Planned, seed: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Contents valid for a tensor's role: codes uniform, scales positive, smoothing with outliers.

    Args:
        tensor: what to make.
        seed: of the numbers, which differ between kinds of devices.
        device: where.
    """
    generator = torch.Generator(device).manual_seed(zlib.crc32(tensor.source.encode()) ^ seed)
    made = {"generator": generator, "device": device}
    shape, dtype = tensor.shape, TORCH_DTYPES[tensor.dtype]
    if tensor.dtype == "U8":
        return torch.randint(0, 256, shape, dtype=torch.uint8, **made)
    if tensor.dtype == "F8_E4M3":
        low, high = (0x20, 0x7F) if tensor.role == "weight_scale" else (0, 0x7F)
        codes = torch.randint(low, high, shape, dtype=torch.uint8, **made)
        if tensor.role == "qweight":
            codes |= torch.randint(0, 2, shape, dtype=torch.uint8, **made) << 7
        return codes.view(dtype)
    if not shape:
        span = 9e-3 if tensor.role == "input_scale" else 9e-5
        return torch.rand(shape, **made) * span + span / 9
    values = torch.randn(shape, **made)
    if tensor.role == "pre_quant_scale":
        outlier = torch.rand(shape, **made) < 0.02
        values = torch.exp2(values / 4) * torch.where(outlier, 4.0, 1.0)
    elif len(shape) == 1:
        norm = tensor.role == "dense" and tensor.key.endswith(".weight")
        values = values * 0.02 + float(norm)
    else:
        values /= shape[-1] ** 0.5 * (4 if tensor.role == "lora_up" else 1)
    return values.to(dtype)
