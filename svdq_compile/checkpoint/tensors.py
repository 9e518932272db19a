"""Streaming a checkpoint's tensors to a device, one at a time, with every value check on the way.

No tensor is read before its file's header was checked; the files are mapped, copied from, and let go shard by shard.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import torch

from ..errors import HeaderError, NonFiniteError, ScaleError, ZeroScaleError
from .header import TensorInfo
from .manifest import Manifest

log = logging.getLogger(__name__)


def stream(manifest: Manifest, device: torch.device | str = "cpu") -> Iterator[tuple[str, str | None, torch.Tensor]]:
    """Yields ``(name, part, tensor)`` for every tensor, shard by shard in file order.

    For a quantised linear, ``name`` is the module and ``part`` our component name (or ``bias``); for a dense
    tensor, ``name`` is its key and ``part`` is None. Tensors own their memory.

    Raises:
        ScaleError, ZeroScaleError, NonFiniteError: a value no correct export holds.
        HeaderError: the safetensors library refuses a file whose header was found correct.
    """
    roles: dict[str, tuple[str, str | None, TensorInfo]] = {
        key: (key, None, info) for key, info in manifest.dense.items()
    }
    for linear in manifest.linears.values():
        for part, key in linear.keys.items():
            roles[key] = (linear.name, part, linear.tensors[part])
    by_file: dict[Path, list[str]] = {}
    for key, (_, _, info) in sorted(roles.items(), key=lambda item: item[1][2].start):
        by_file.setdefault(info.file, []).append(key)
    device = torch.device(device)
    for file in sorted(by_file):
        for key, mapped in _mapped_tensors(file, by_file[file]):
            name, part, _ = roles[key]
            # A tensor on the CPU would share the mapped file, and with it any later change of the file.
            tensor = mapped.clone() if device.type == "cpu" else mapped.to(device)
            check_values(mapped if device.type == "meta" else tensor, part, key=key, file=file)
            yield name, part, tensor


def _mapped_tensors(file: Path, keys: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that share the mapped file's memory."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as handle:
            for key in keys:
                yield key, handle.get_tensor(key)
    except SafetensorError as error:
        raise HeaderError("safetensors cannot read the file", file=file, found=str(error)) from None


def check_values(tensor: torch.Tensor, part: str | None, *, key: str, file: Path | None = None) -> None:
    """Refuses values no correct export holds.

    Args:
        tensor: the tensor.
        part: our component name, ``bias``, or None for a dense tensor.
        key: its key, for the message.
        file: its file, for the message.
    """
    if part == "qweight" and tensor.dtype == torch.uint8:
        return
    values = tensor.float() if tensor.dtype == torch.float8_e4m3fn else tensor
    if not values.is_floating_point():
        return
    is_scale = part in ("weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale")
    if not bool(torch.isfinite(values).all()):
        bad = values[~torch.isfinite(values)]
        error = ScaleError if is_scale else NonFiniteError
        raise error(
            "not a finite number",
            file=file,
            key=key,
            found=f"{bad.numel()} of {values.numel()}, {bad.flatten()[0]}",
        )
    if not is_scale:
        return
    if bool((torch.signbit(values) & (values != 0)).any()):
        raise ScaleError("a scale is negative", file=file, key=key, found=float(values.min()), needed="> 0")
    may_be_zero = part == "weight_scale" and values.dim() > 0
    if not may_be_zero and bool((values == 0).any()):
        raise ZeroScaleError("a scale is zero", file=file, key=key, found=0.0, needed="> 0")
