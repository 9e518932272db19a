"""From checkpoint files to a model that runs."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..checkpoint.manifest import Manifest, read_manifest
from ..checkpoint.source import CONFIG_NAME
from ..checkpoint.tensors import stream
from ..dtypes import TORCH_DTYPES
from ..errors import ConfigError, ShapeError
from ..ops.weight import SVDQWeight
from .bind import Entry, check_fit, new_parameters, slots_of, unwrap

log = logging.getLogger(__name__)

CONFIG_ATTRIBUTE = "_svdq_quantization_config"
"""Where a loaded model keeps the checkpoint's quantization_config, for saving it again."""


@dataclasses.dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint's tensors in memory, for lending to models more than once."""

    manifest: Manifest
    entries: tuple[Entry, ...]

    def to(self, device: torch.device | str) -> Iterator[Entry]:
        """The entries on a device."""
        for name, part, tensor in self.entries:
            yield name, part, tensor.to(device)


def load_checkpoint(
    path: str | os.PathLike[str], device: torch.device | str = "cpu", *, revision: str | None = None
) -> LoadedCheckpoint:
    """Reads a checkpoint without a model; give the result to :func:`svdq_compile.patch` any number of times.

    Args:
        path: transformer folder, pipeline folder, ``.safetensors`` file or Hub id.
        device: where the tensors go.
        revision: Hub branch, tag or commit.

    Raises:
        CheckpointError: see :mod:`svdq_compile.errors`.
    """
    manifest = read_manifest(path, revision=revision)
    return LoadedCheckpoint(manifest, tuple(_with_progress(manifest, device)))


def load_transformer(
    path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    compute: str = "exact",
    quantize: str | None = None,
    rank: int = 32,
    blocks_kept: int = 2,
    revision: str | None = None,
) -> nn.Module:
    """A diffusers transformer with a checkpoint's weights, packed as the files store them.

    Tensors go to the device one by one; a quantised weight is never expanded.

    Args:
        path: transformer folder, pipeline folder, ``.safetensors`` file or Hub id.
        device: where the model goes.
        dtype: dtype of the unquantised tensors and of the activations the model asks for; None keeps the
            checkpoint's. Packed tensors keep theirs always.
        compute: ``exact`` (what block-scaled hardware computes) or ``modelopt`` (ModelOpt's own simulation).
        quantize: for an unquantised checkpoint: ``nvfp4`` or ``nvfp4_svd`` quantises its linears while they load,
            without data: no smoothing, activation scale per token.
        rank: rank of the low-rank branch with ``quantize="nvfp4_svd"``.
        blocks_kept: blocks at each end that ``quantize`` leaves alone.
        revision: Hub branch, tag or commit.

    Returns:
        The model in eval mode, its parameters frozen.

    Raises:
        CheckpointError: see :mod:`svdq_compile.errors`; nothing is loaded then.
        QuantizeError: ``quantize`` with a checkpoint that is quantised already.
    """
    manifest = read_manifest(path, revision=revision)
    model = build_model(manifest)
    entries = _with_progress(manifest, device)
    if quantize is not None:
        from ..quantization.on_load import quantize_entries
        from ..quantization.recipes import Recipe

        recipe = Recipe(quantize, rank=rank, blocks_kept=blocks_kept)
        manifest, entries = quantize_entries(model, manifest, entries, recipe)
    _install(model, manifest, entries, compute, dtype or TORCH_DTYPES[manifest.dtype])
    return model.eval().requires_grad_(False)


def load_into(
    model: nn.Module,
    path: str | os.PathLike[str] | LoadedCheckpoint,
    *,
    compute: str = "exact",
    revision: str | None = None,
) -> nn.Module:
    """Puts a checkpoint's weights into an existing model, for good.

    Tensors go to the device of the model's first tensor, and unquantised ones take the dtype of those they replace.
    If anything is wrong with the checkpoint, the model stays as it was.

    Args:
        model: the model, or what ``torch.compile(model)`` returned.
        path: transformer folder, pipeline folder, ``.safetensors`` file, Hub id, or a loaded checkpoint.
        compute: ``exact`` or ``modelopt``.
        revision: Hub branch, tag or commit.

    Returns:
        The same model.

    Raises:
        CheckpointError: see :mod:`svdq_compile.errors`.
    """
    inner = unwrap(model)
    manifest, entries = open_entries(path, device_of(inner), revision)
    _install(inner, manifest, entries, compute, None)
    return model


def open_entries(
    source: str | os.PathLike[str] | LoadedCheckpoint, device: torch.device | str, revision: str | None = None
) -> tuple[Manifest, Iterator[Entry]]:
    """Manifest and tensor stream of a path or of a loaded checkpoint."""
    if isinstance(source, LoadedCheckpoint):
        return source.manifest, source.to(device)
    manifest = read_manifest(source, revision=revision)
    return manifest, _with_progress(manifest, device)


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first tensor that is not on ``meta``; the CPU if there is none."""
    for slot in slots_of(model).values():
        if slot.get().device.type != "meta":
            return slot.get().device
    return torch.device("cpu")


def build_model(manifest: Manifest) -> nn.Module:
    """The diffusers model a checkpoint's config describes, its parameters on ``meta``.

    Raises:
        ConfigError: the class is not in diffusers, or it refuses the config.
    """
    import diffusers
    from accelerate import init_empty_weights

    file = manifest.folder / CONFIG_NAME
    name = manifest.config.get("_class_name")
    model_class = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(model_class, type) and issubclass(model_class, diffusers.ModelMixin)):
        raise ConfigError("no such model in diffusers", file=file, key="_class_name", found=name)
    _check_sizes(manifest, manifest.config)
    try:
        with init_empty_weights():
            model = model_class.from_config(manifest.model_config)
    except Exception as error:
        raise ConfigError(f"{name} refuses the config", file=file, found=f"{type(error).__name__}: {error}") from error
    # Again with the class's defaults in the place of entries that config.json leaves out.
    _check_sizes(manifest, model.config)
    return model


def _check_sizes(manifest: Manifest, config: Mapping[str, Any]) -> None:
    """Sizes that cost time or memory to try, or that no tensor's shape depends on.

    The number of blocks must be that of the tensors, and the rotary axes must split a head as large as the tensors
    say.
    """
    file = manifest.folder / CONFIG_NAME
    names = [*manifest.dense, *manifest.linears]
    for key, value in config.items():
        if key.startswith("num_") and key.endswith("layers") and isinstance(value, int) and value > len(names):
            raise ConfigError("more layers than tensors", file=file, key=key, found=value, needed=f"<= {len(names)}")
    blocks = {name.split(".")[1] for name in names if name.startswith("transformer_blocks.")}
    if blocks and config.get("num_layers", len(blocks)) != len(blocks):
        raise ConfigError(
            "num_layers does not match the tensors",
            file=file,
            key="num_layers",
            found=config["num_layers"],
            needed=len(blocks),
        )
    if "axes_dims_rope" not in config or "attention_head_dim" not in config:
        return
    axes, head = config["axes_dims_rope"], config["attention_head_dim"]
    ok = isinstance(axes, (list, tuple)) and all(type(axis) is int and axis > 0 and axis % 2 == 0 for axis in axes)
    if not ok or sum(axes) != head:
        raise ConfigError(
            "the rotary axes are not even numbers that add up to the head size",
            file=file,
            key="axes_dims_rope",
            found=axes,
            needed=head,
        )
    norm = manifest.dense.get("transformer_blocks.0.attn.norm_q.weight")
    if norm is not None and norm.shape != (head,):
        raise ShapeError(
            "the head size does not match the tensors",
            file=norm.file,
            key="transformer_blocks.0.attn.norm_q.weight",
            found=list(norm.shape),
            needed=[head],
        )


def _with_progress(manifest: Manifest, device: torch.device | str) -> Iterator[Entry]:
    from diffusers.utils.logging import tqdm

    for warning in manifest.warnings:
        log.warning("%s: %s", manifest.folder, warning)
    total = len(manifest.dense) + sum(len(linear.tensors) for linear in manifest.linears.values())
    yield from tqdm(stream(manifest, device), desc="Loading svdq checkpoint", total=total, unit="tensor", leave=False)


def _install(
    model: nn.Module, manifest: Manifest, entries: Iterator[Entry], compute: str, dtype: torch.dtype | None
) -> None:
    slots = check_fit(model, manifest)
    for slot, value in list(new_parameters(manifest, slots, entries, compute, dtype)):
        slot.set(value)
    setattr(model, CONFIG_ATTRIBUTE, manifest.quantization_config)


def quantised_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear of a model that carries a quantised weight, by name."""
    return {
        name: module
        for name, module in unwrap(model).named_modules()
        if isinstance(module, nn.Linear) and isinstance(module.weight, SVDQWeight)
    }


def set_compute(model: nn.Module, compute: str) -> nn.Module:
    """Switches every quantised linear to a compute mode (``exact`` or ``modelopt``); packed tensors are shared.

    Returns:
        The same model.
    """
    for module in quantised_linears(model).values():
        module.weight = nn.Parameter(module.weight.with_compute(compute), requires_grad=False)
    return model
