"""From checkpoint files to a model that runs."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator

import torch
from torch import nn

from ..checkpoint.manifest import Manifest, read_manifest
from ..checkpoint.tensors import stream
from ..dtypes import TORCH_DTYPES
from ..errors import OptionError
from ..ops.modes import check_compute
from ..ops.weight import SVDQWeight
from .bind import Entry, Slot, check_fit, check_modes, new_parameters, slots_of, unwrap
from .build import build_model
from .resident import nbytes_of, resident, size_text
from .rope import move_tables
from .share import mark_shared
from .stock_save import guard

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

    Returns:
        What the files hold, with every tensor in memory.

    Raises:
        CheckpointError: see :mod:`svdq_compile.errors`.
    """
    manifest = read_manifest(path, revision=revision)
    total = len(manifest.dense) + sum(len(linear.tensors) for linear in manifest.linears.values())
    return LoadedCheckpoint(manifest, tuple(_progress(_entries(manifest, device), total)))


def load_transformer(
    path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    compute: str = "auto",
    storage: str = "packed",
    quantize: str | None = None,
    rank: int = 32,
    blocks_kept: int = 2,
    revision: str | None = None,
) -> nn.Module:
    """A diffusers transformer with a checkpoint's weights.

    Tensors go to the device one by one; a quantised weight never exists in the model's dtype.

    Args:
        path: transformer folder, pipeline folder, ``.safetensors`` file or Hub id.
        device: where the model goes.
        dtype: dtype of the unquantised tensors and of the activations the model asks for; None keeps the
            checkpoint's. Packed tensors keep theirs always.
        compute: ``auto`` (by device), ``nvfp4`` (what block-scaled hardware computes), ``fp8``, ``bf16`` or
            ``modelopt`` (ModelOpt's own simulation); see :mod:`svdq_compile.ops.modes`.
        storage: ``packed`` (as the files have it) or ``expanded`` (NVFP4 weights as FP8, for ``fp8`` and ``bf16``,
            but for linears that see one vector per picture).
        quantize: for an unquantised checkpoint: ``nvfp4`` or ``nvfp4_svd`` quantises the linears of its blocks while
            they load, without data: no smoothing, activation scale per token. With ``nvfp4_svd`` every linear of the
            quantised blocks gets a low-rank branch, those of the text and of the modulations too.
        rank: rank of the low-rank branch with ``quantize="nvfp4_svd"``.
        blocks_kept: blocks at each end that ``quantize`` leaves alone.
        revision: Hub branch, tag or commit.

    Returns:
        The model in eval mode, its parameters frozen.

    Raises:
        CheckpointError: see :mod:`svdq_compile.errors`; nothing is loaded then.
        OptionError: ``dtype`` is none that models compute in, or no such compute mode.
        QuantizeError: ``quantize`` with a checkpoint that is quantised already.
        StorageError: no such storage, or ``expanded`` with a compute mode that needs the 4-bit codes.
    """
    if dtype not in (None, torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise OptionError(f"dtype={dtype!r}: needs torch.bfloat16, torch.float16 or torch.float32")
    manifest = read_manifest(path, revision=revision)
    model = build_model(manifest)
    entries = _entries(manifest, device)
    if quantize is not None:
        from ..quantization.on_load import quantize_entries
        from ..quantization.recipes import Recipe

        recipe = Recipe(quantize, rank=rank, blocks_kept=blocks_kept)
        manifest, entries = quantize_entries(model, manifest, entries, recipe)
    elif not manifest.linears and (compute, storage) != ("auto", "packed"):
        # An unknown one is not merely one that does nothing.
        check_modes(manifest, compute, storage)
        log.warning(
            "%s has no quantised linear: compute=%r and storage=%r do nothing; quantize='nvfp4_svd' makes some",
            manifest.folder,
            compute,
            storage,
        )
    _install(model, manifest, entries, compute, storage, dtype or TORCH_DTYPES[manifest.dtype])
    return model.eval().requires_grad_(False)


def load_into(
    model: nn.Module,
    path: str | os.PathLike[str] | LoadedCheckpoint,
    *,
    compute: str = "auto",
    storage: str = "packed",
    revision: str | None = None,
) -> nn.Module:
    """Puts a checkpoint's weights into an existing model, for good; within a :func:`svdq_compile.patch` of it, until
    that ends.

    Tensors go to the device of the model's first tensor, and unquantised ones take the dtype of those they replace.
    If anything is wrong with the checkpoint, the model stays as it was.

    Args:
        model: the model, or what ``torch.compile(model)`` returned.
        path: transformer folder, pipeline folder, ``.safetensors`` file, Hub id, or a loaded checkpoint.
        compute: as for :func:`load_transformer`.
        storage: as for :func:`load_transformer`.
        revision: Hub branch, tag or commit.

    Returns:
        The same model.

    Raises:
        CheckpointError: see :mod:`svdq_compile.errors`.
        OptionError: no such compute mode.
        StorageError: as for :func:`load_transformer`.
    """
    inner = unwrap(model)
    manifest, entries = open_entries(path, device_of(inner), revision)
    _install(inner, manifest, entries, compute, storage, None, quiet=isinstance(path, LoadedCheckpoint))
    return model


def open_entries(
    source: str | os.PathLike[str] | LoadedCheckpoint, device: torch.device | str, revision: str | None = None
) -> tuple[Manifest, Iterator[Entry]]:
    """Manifest and tensor stream of a path or of a loaded checkpoint."""
    if isinstance(source, LoadedCheckpoint):
        return source.manifest, source.to(device)
    manifest = read_manifest(source, revision=revision)
    return manifest, _entries(manifest, device)


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first tensor that is not on ``meta``; the CPU if there is none."""
    for slot in slots_of(model).values():
        if slot.get().device.type != "meta":
            return slot.get().device
    return torch.device("cpu")


def read_parameters(
    manifest: Manifest,
    slots: dict[str, Slot],
    entries: Iterator[Entry],
    compute: str,
    storage: str,
    dtype: torch.dtype | None,
    *,
    quiet: bool = False,
) -> list[tuple[Slot, torch.Tensor]]:
    """All of :func:`new_parameters` at once, behind a progress bar of them and of the bytes they keep; weights that
    share their activation's parts are marked.

    Args:
        quiet: no progress bar, for a checkpoint that is in memory; the others are those of :func:`new_parameters`.

    Raises:
        OptionError, StorageError: see :func:`check_modes`.
    """
    check_modes(manifest, compute, storage)
    made, nbytes = [], 0
    bar = _progress(new_parameters(manifest, slots, entries, compute, storage, dtype), len(slots), quiet)
    for slot, value in bar:
        made.append((slot, value))
        nbytes += nbytes_of(value)
        bar.set_postfix_str(size_text(nbytes), refresh=False)
    names = {slot: key.removesuffix(".weight") for key, slot in slots.items()}
    mark_shared({names[slot]: value for slot, value in made if isinstance(value, SVDQWeight)})
    return made


def _entries(manifest: Manifest, device: torch.device | str) -> Iterator[Entry]:
    for warning in manifest.warnings:
        log.warning("%s: %s", manifest.folder, warning)
    yield from stream(manifest, device)


def _progress(items: Iterator, total: int, quiet: bool = False):
    from diffusers.utils.logging import tqdm

    return tqdm(items, desc="Loading svdq checkpoint", total=total, unit="tensor", leave=False, disable=quiet)


def _install(
    model: nn.Module,
    manifest: Manifest,
    entries: Iterator[Entry],
    compute: str,
    storage: str,
    dtype: torch.dtype | None,
    *,
    quiet: bool = False,
) -> None:
    slots = check_fit(model, manifest)
    for slot, value in read_parameters(manifest, slots, entries, compute, storage, dtype, quiet=quiet):
        slot.set(value)
    setattr(model, CONFIG_ATTRIBUTE, manifest.quantization_config)
    guard(model)
    move_tables(model, device_of(model))
    log.info("%s: %s", manifest.folder, resident(model))


def quantised_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear of a model that carries a quantised weight, by name."""
    return {
        name: module
        for name, module in unwrap(model).named_modules()
        if isinstance(module, nn.Linear) and isinstance(module.weight, SVDQWeight)
    }


def set_compute(model: nn.Module, compute: str) -> nn.Module:
    """Switches every quantised linear to a compute mode (:mod:`svdq_compile.ops.modes`); stored tensors are shared.

    Args:
        model: the model, or what ``torch.compile(model)`` returned.
        compute: as for :func:`load_transformer`.

    Returns:
        The same model.

    Raises:
        OptionError: no such mode; the model is as it was.
        StorageError: a weight of the model has given up what the mode needs; the model is as it was.
    """
    linears = quantised_linears(model).values()
    check_compute(compute)
    if not linears:
        log.warning("%s has no quantised linear: compute=%r does nothing", type(unwrap(model)).__name__, compute)
    weights = [module.weight.with_compute(compute) for module in linears]
    for module, weight in zip(linears, weights, strict=True):
        module.weight = nn.Parameter(weight, requires_grad=False)
    return model
