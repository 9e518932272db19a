"""What a model's tensors take in memory."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from ..ops.weight import SVDQWeight
from .bind import slots_of, unwrap


@dataclasses.dataclass(frozen=True)
class Resident:
    """Storage and bytes of a model. ``str()`` is one phrase for messages.

    Args:
        storage: ``expanded`` if any quantised weight is, ``packed`` if all are as their checkpoint has them, ``dense``
            without quantised weights.
        nbytes: bytes of all parameters and buffers.
        quantised_nbytes: those of them that are quantised weights.
    """

    storage: str
    nbytes: int
    quantised_nbytes: int

    def __str__(self) -> str:
        if self.storage == "dense":
            return f"dense, {size_text(self.nbytes)}"
        return f"{self.storage}, {size_text(self.nbytes)}, {size_text(self.quantised_nbytes)} in quantised weights"


def nbytes_of(tensor: torch.Tensor) -> int:
    """Bytes a tensor takes; for a quantised weight, those of its components."""
    return tensor.packed_nbytes() if isinstance(tensor, SVDQWeight) else tensor.numel() * tensor.element_size()


def size_text(nbytes: int) -> str:
    """Decimal megabytes below a gigabyte, else gigabytes: ``2.6 MB``, ``13.70 GB``."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def resident(model: nn.Module) -> Resident:
    """What a model's parameters and buffers take now.

    Args:
        model: the model, or what ``torch.compile(model)`` returned.
    """
    tensors = [slot.get() for slot in slots_of(unwrap(model)).values()]
    quantised = [tensor for tensor in tensors if isinstance(tensor, SVDQWeight)]
    storages = {weight.spec.storage for weight in quantised}
    storage = "expanded" if "expanded" in storages else "packed" if storages else "dense"
    return Resident(storage, sum(map(nbytes_of, tensors)), sum(map(nbytes_of, quantised)))
