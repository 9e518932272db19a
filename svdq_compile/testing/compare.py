"""Exact comparison of loaded models."""

from __future__ import annotations

import torch
from torch import nn

from ..model.bind import slots_of, unwrap
from ..ops.weight import SVDQWeight

Stored = tuple[str, tuple[int, ...], bytes]


def stored_bytes(tensor: torch.Tensor) -> Stored:
    """A dense tensor's dtype, shape and bytes; two tensors are bit-equal exactly if these are."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return str(tensor.dtype), tuple(tensor.shape), flat.numpy().tobytes()


def model_bytes(model: nn.Module) -> dict[str, object]:
    """All a model's tensors hold, by key.

    A quantised weight adds each of its components, and its fingerprint and the dtype it pretends to have.
    """
    contents: dict[str, object] = {}
    for key, slot in slots_of(unwrap(model)).items():
        value = slot.get()
        if not isinstance(value, SVDQWeight):
            contents[key] = stored_bytes(value)
            continue
        contents[key] = value.fingerprint, value.dtype
        contents.update({f"{key}:{name}": stored_bytes(part) for name, part in value.parts().items()})
    return contents


def differing(left: nn.Module, right: nn.Module) -> list[str]:
    """Keys (``name`` or ``name:component``) whose contents differ or that only one of the models has."""
    first, second = model_bytes(left), model_bytes(right)
    return sorted(key for key in first.keys() | second.keys() if first.get(key) != second.get(key))
