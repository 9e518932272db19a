"""Checkpoints with random, valid contents in ModelOpt's exact format, up to the real model's size."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.header import ITEM_BITS
from ..checkpoint.source import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME
from ..quantization.recipes import BLOCKS
from ..spec import Format
from .plans import RECIPES, Planned, plan_checkpoint, random_tensor

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


QWEN_IMAGE = SMALL | {
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "axes_dims_rope": [16, 56, 56],
}
"""The released Qwen-Image of 20 billion parameters."""


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
    share: bool = True,
) -> Path:
    """Writes ``config.json`` and one or more safetensors files; memory use is that of one tensor.

    Args:
        folder: where to; created if need be.
        config: arguments of ``QwenImageTransformer2DModel``.
        recipe: a key of :data:`~svdq_compile.testing.plans.RECIPES`.
        rank: R of the low-rank branch, for all linears or as a function of a linear's name.
        blocks_kept: blocks at each end that stay unquantised.
        dtype: the model's dtype, ``BF16``, ``F16`` or ``F32``.
        seed: of the random contents.
        shards: number of files; more than one come with an index.
        sparse: leave the tensors' bytes out; the files have their full length and hold zeros.
        share: as an export does, give linears that read one tensor the same smoothing, scale and down-projection.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plan = plan_checkpoint(config, recipe=recipe, rank=rank, blocks_kept=blocks_kept, dtype=dtype, share=share)
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


def _shards(plan: list[Planned], count: int) -> dict[str, list[Planned]]:
    """File name -> its tensors: runs of about equal size, each in the order safetensors gives them."""
    total, position = sum(tensor.nbytes for tensor in plan), 0
    files: list[list[Planned]] = [[] for _ in range(count)]
    for tensor in plan:
        files[min(count - 1, position * count // max(1, total))].append(tensor)
        position += tensor.nbytes
    stem = WEIGHTS_NAME.removesuffix(".safetensors")
    names = [f"{stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)] if count > 1 else [WEIGHTS_NAME]
    return {name: sorted(tensors, key=lambda t: (-ITEM_BITS[t.dtype], t.key)) for name, tensors in zip(names, files)}


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
    inputs = {
        "hidden_states": image.to(device, dtype),
        "encoder_hidden_states": prompt.to(device, dtype),
        "timestep": torch.full((batch,), 0.5, device=device, dtype=dtype),
        "img_shapes": [[(1, height, width)]] * batch,
        "return_dict": False,
    }
    if model.config.use_additional_t_cond:
        inputs["additional_t_cond"] = torch.zeros(batch, dtype=torch.long, device=device)
    return inputs
