"""Lending a checkpoint's weights to a model for the length of a ``with`` block."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Iterator

import torch
from torch import nn

from .bind import Slot, check_fit, parameters_of, slots_of, unwrap
from .load import LoadedCheckpoint, device_of, open_entries, read_parameters
from .stock_save import guard

Layer = list[tuple[Slot, torch.Tensor]]

_lock = threading.RLock()
_layers: weakref.WeakKeyDictionary[nn.Module, list[Layer]] = weakref.WeakKeyDictionary()
"""Per model: what it owned at the bottom, then one layer per patch that is active, in order of entry."""


@contextlib.contextmanager
def patch(
    model: nn.Module,
    path_or_loaded: str | os.PathLike[str] | LoadedCheckpoint | nn.Module,
    *,
    compute: str = "auto",
    storage: str = "packed",
    revision: str | None = None,
) -> Iterator[nn.Module]:
    """Runs a stock model with a checkpoint's weights, and gives it its own objects back at the end.

        with svdq_compile.patch(pipe.transformer, "path/to/export"):
            image = pipe(prompt).images[0]

    Patches nest, and may be entered and left in any order and from any thread: the one entered last counts, and
    when the last one is left the model holds the very objects it held before the first. The weights belong to the
    model, so every thread that runs it meanwhile sees them. Compiled code notices the change by its guards.

    Args:
        model: the model, or what ``torch.compile(model)`` returned.
        path_or_loaded: transformer folder, pipeline folder, ``.safetensors`` file, Hub id, or what
            :func:`svdq_compile.load_checkpoint` or :func:`svdq_compile.load_transformer` returned.
        compute: as for :func:`svdq_compile.load_transformer`; a loaded transformer keeps its own.
        storage: as for :func:`svdq_compile.load_transformer`; a loaded transformer keeps its own. A loaded checkpoint
            stays packed and is expanded anew for each patch.
        revision: Hub branch, tag or commit.

    Raises:
        CheckpointError: see :mod:`svdq_compile.errors`; the model is untouched.
        OptionError: no such compute mode.
        StorageError: no such storage, or ``expanded`` with a compute mode that needs the 4-bit codes.
    """
    inner = unwrap(model)
    if isinstance(path_or_loaded, nn.Module):
        slots = slots_of(inner)
        layer: Layer = list(parameters_of(unwrap(path_or_loaded), slots))
    else:
        manifest, entries = open_entries(path_or_loaded, device_of(inner), revision)
        slots = check_fit(inner, manifest)
        quiet = isinstance(path_or_loaded, LoadedCheckpoint)
        layer = read_parameters(manifest, slots, entries, compute, storage, None, quiet=quiet)
    with _lock:
        _layers.setdefault(inner, [[(slot, slot.get()) for slot in slots.values()]]).append(layer)
        _put(layer)
    guard(inner)
    try:
        yield model
    finally:
        with _lock:
            layers = _layers[inner]
            # By identity: equality of layers would compare tensors.
            del layers[next(i for i, candidate in enumerate(layers) if candidate is layer)]
            _put(layers[-1])
            if len(layers) == 1:
                del _layers[inner]


def _put(layer: Layer) -> None:
    for slot, value in layer:
        slot.set(value)
