"""Checkpoints with random, valid contents in ModelOpt's exact format, from a few kilobytes up to the real size."""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.header import ITEM_BITS
from ..checkpoint.source import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME
from ..dtypes import TORCH_DTYPES
from ..quantize.recipes import BLOCKS, TEXT_AND_MODULATION, Recipe
from ..spec import MODELOPT_LEAF, Format, LinearSpec

SMALL = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "guidance_embeds": False,
    "axes_dims_rope": [4, 6, 6],
    "zero_cond_t": False,
    "use_additional_t_cond": False,
    "use_layer3d_rope": False,
}
"""A Qwen-Image of 127 216 parameters; every size that has to be is a multiple of 16."""

RECIPES = {
    "mixed": Recipe(Format.NVFP4_SVD, skip=TEXT_AND_MODULATION),
    "all": Recipe(Format.NVFP4_SVD, skip=()),
    "nvfp4": Recipe(Format.NVFP4),
    "fp8": Recipe(Format.FP8),
}
"""``mixed`` is ModelOpt's recipe since July 2026, ``all`` the one before it."""

SHARED_INPUT = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
"""Linears that an export fuses: all of their components but the codes, the block scales and L1 are equal."""

UNSHARED = ("qweight", "weight_scale", "lora_up", "bias")


@dataclasses.dataclass(frozen=True)
class Planned:
    """One tensor of a checkpoint to be.

    Args:
        key: its key.
        dtype: safetensors spelling.
        shape: its shape.
        role: component name, ``bias``, or ``dense``.
        source: what its random numbers depend on; tensors of equal source and shape are equal.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    role: str
    source: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BITS[self.dtype] // 8


def write_checkpoint(
    folder: Path,
    *,
    config: Mapping[str, Any] = SMALL,
    recipe: str = "mixed",
    rank: int | Callable[[str], int] = 8,
    blocks_kept: int = 1,
    dtype: str = "BF16",
    seed: int = 0,
    shards: int = 1,
    sparse: bool = False,
) -> Path:
    """Writes ``config.json`` and one or more safetensors files; memory use is that of one tensor.

    Args:
        folder: where to; created if need be.
        config: arguments of ``QwenImageTransformer2DModel``.
        recipe: a key of :data:`RECIPES`.
        rank: R of the low-rank branch, for all linears or as a function of a linear's name.
        blocks_kept: blocks at each end that stay unquantised.
        dtype: the model's dtype, ``BF16``, ``F16`` or ``F32``.
        seed: of the random contents.
        shards: number of files; more than one come with an index.
        sparse: leave the tensors' bytes out; the files have their full length and hold zeros.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plan = plan_checkpoint(config, recipe=recipe, rank=rank, blocks_kept=blocks_kept, dtype=dtype)
    weight_map = {}
    for name, tensors in _shards(plan, shards).items():
        weight_map.update({tensor.key: name for tensor in tensors})
        _write_file(folder / name, tensors, seed, sparse)
    if shards > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for t in plan)}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    whole = {
        "_class_name": "QwenImageTransformer2DModel",
        "_diffusers_version": "0.40.0",
        **config,
        "quantization_config": quantization_config(recipe, rank, blocks_kept, config["num_layers"]),
    }
    (folder / CONFIG_NAME).write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n")
    return folder


def quantization_config(
    recipe: str, rank: int | Callable[[str], int], blocks_kept: int, num_layers: int
) -> dict[str, Any]:
    """The entry ModelOpt 0.47 writes into ``config.json``."""
    format = RECIPES[recipe].format
    quantizer = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    if format is Format.FP8:
        quantizer = {"dynamic": False, "num_bits": 8, "type": "float"}
    group = {"input_activations": quantizer, "weights": dict(quantizer), "targets": ["Linear"]}
    if format is Format.NVFP4_SVD:
        declared = rank if isinstance(rank, int) else 32
        group |= {"has_zero_point": False, "pre_quant_scale": True, "lora_rank": declared}
    kept = sorted({*range(blocks_kept), *range(num_layers - blocks_kept, num_layers)})
    outside = ["img_in", "norm_out*", "proj_out", "time_text_embed*", "txt_in"]
    return {
        "config_groups": {"group_0": group},
        "ignore": sorted([*outside, *(f"{BLOCKS}.{i}.*" for i in kept)]),
        "quant_algo": format.name,
        "producer": {"name": "modelopt", "version": "0.47.0"},
        "quant_method": "modelopt",
    }


def plan_checkpoint(
    config: Mapping[str, Any],
    *,
    recipe: str,
    rank: int | Callable[[str], int],
    blocks_kept: int,
    dtype: str,
) -> list[Planned]:
    """Every tensor of a checkpoint, in the order of the model's modules (arguments of :func:`write_checkpoint`)."""
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
            plan += _quantised_linear(name, module, settings, rank if isinstance(rank, int) else rank(name), dtype)
            continue
        for leaf, value in module.named_parameters(recurse=False):
            key = f"{name}.{leaf}" if name else leaf
            plan.append(Planned(key, dtype, tuple(value.shape), "dense", key))
    return plan


def _quantised_linear(name: str, module: nn.Linear, settings: Recipe, rank: int, dtype: str) -> Iterable[Planned]:
    format = settings.format
    # Every block has the same linears, so a skip pattern is its block-independent ending.
    if format is Format.NVFP4_SVD and any(name.endswith(pattern.lstrip("*")) for pattern in settings.skip):
        format = Format.NVFP4
    low_rank = format is Format.NVFP4_SVD
    spec = LinearSpec(
        format, module.out_features, module.in_features, rank if low_rank else 0, dtype, smooth=low_rank
    )
    parent, _, last = name.rpartition(".")
    shared = next((f"{parent}.{group[0]}" for group in SHARED_INPUT if last in group), name)
    parts = {role: (c.dtype, c.shape) for role, c in spec.components().items()}
    if module.bias is not None:
        parts["bias"] = (dtype, (module.out_features,))
    for role, (part_dtype, shape) in parts.items():
        source = f"{name if role in UNSHARED else shared}.{role}"
        yield Planned(f"{name}.{MODELOPT_LEAF.get(role, role)}", part_dtype, shape, role, source)


def _shards(plan: list[Planned], count: int) -> dict[str, list[Planned]]:
    """File name -> its tensors: runs of about equal size, within a file in the order safetensors gives them."""
    total, position = sum(tensor.nbytes for tensor in plan), 0
    files: list[list[Planned]] = [[] for _ in range(count)]
    for tensor in plan:
        files[min(count - 1, position * count // max(1, total))].append(tensor)
        position += tensor.nbytes
    stem = WEIGHTS_NAME.removesuffix(".safetensors")
    names = [f"{stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)] if count > 1 else [WEIGHTS_NAME]
    return {
        name: sorted(tensors, key=lambda t: (-ITEM_BITS[t.dtype], t.key)) for name, tensors in zip(names, files)
    }


def _write_file(file: Path, tensors: list[Planned], seed: int, sparse: bool) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        offsets = [position, position + tensor.nbytes]
        header[tensor.key] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        position = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        if sparse:
            stream.truncate(8 + len(text) + position)
            return
        for tensor in tensors:
            stream.write(random_tensor(tensor, seed).reshape(-1).view(torch.uint8).numpy().tobytes())


def random_tensor(tensor: Planned, seed: int) -> torch.Tensor:
    """Contents of a planned tensor, valid for its role: codes uniform, scales positive, smoothing with outliers."""
    generator = torch.Generator().manual_seed(zlib.crc32(tensor.source.encode()) ^ seed)
    shape, dtype = tensor.shape, TORCH_DTYPES[tensor.dtype]
    if tensor.dtype == "U8":
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    if tensor.dtype == "F8_E4M3":
        low, high = (0x20, 0x7F) if tensor.role == "weight_scale" else (0, 0x7F)
        codes = torch.randint(low, high, shape, generator=generator, dtype=torch.uint8)
        if tensor.role == "qweight":
            codes |= torch.randint(0, 2, shape, generator=generator, dtype=torch.uint8) << 7
        return codes.view(dtype)
    if not shape:
        span = 9e-3 if tensor.role == "input_scale" else 9e-5
        return torch.rand(shape, generator=generator) * span + span / 9
    values = torch.randn(shape, generator=generator)
    if tensor.role == "pre_quant_scale":
        outlier = torch.rand(shape, generator=generator) < 0.02
        values = torch.exp2(values / 4) * torch.where(outlier, 4.0, 1.0)
    elif len(shape) == 1:
        norm = tensor.role == "dense" and tensor.key.endswith(".weight")
        values = values * 0.02 + float(norm)
    else:
        values /= shape[-1] ** 0.5 * (4 if tensor.role == "lora_up" else 1)
    return values.to(dtype)


def example_inputs(
    model: nn.Module,
    batch: int = 1,
    height: int = 4,
    width: int = 4,
    text: int = 5,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Keyword arguments for a Qwen-Image transformer's forward.

    Args:
        model: the transformer; its config gives the channel counts.
        batch: images.
        height: of the packed latent, in tokens.
        width: of the packed latent, in tokens.
        text: prompt tokens.
        dtype: of the floating-point inputs.
        device: of the tensors.
    """
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(batch, height * width, model.config.in_channels, generator=generator)
    prompt = torch.randn(batch, text, model.config.joint_attention_dim, generator=generator)
    return {
        "hidden_states": image.to(device, dtype),
        "encoder_hidden_states": prompt.to(device, dtype),
        "timestep": torch.full((batch,), 0.5, device=device, dtype=dtype),
        "img_shapes": [(1, height, width)] * batch,
        "return_dict": False,
    }
