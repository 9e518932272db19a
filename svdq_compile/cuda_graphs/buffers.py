"""Tensors at a fixed address that stand in a graph for the caller's."""

from __future__ import annotations

import torch

from .arguments import ALIGNMENT
from .refusal import Refused


class StaticInput:
    """A tensor of another one's shape, strides, dtype, device and alignment, whose values can be replaced.

    Args:
        like: the tensor it stands for; its values are the first.

    Raises:
        Refused: elements of the tensor overlap other than by a stride of zero.
    """

    def __init__(self, like: torch.Tensor) -> None:
        # Elements along a stride of zero are one element; only that one is stored.
        self._expanded = tuple(i for i, (n, s) in enumerate(zip(like.shape, like.stride())) if s == 0 and n > 1)
        source = self._stored(like)
        if _overlaps(source):
            raise Refused(f"an argument of shape {list(like.shape)} and strides {like.stride()} overlaps itself")
        span = 1 + sum((n - 1) * s for n, s in zip(source.shape, source.stride())) if source.numel() else 0
        offset = like.data_ptr() % ALIGNMENT // like.element_size()
        # An inference tensor would count no versions, by which writes into it are found.
        with torch.inference_mode(False):
            storage = torch.empty(span + offset, dtype=like.dtype, device=like.device)
            self._target = storage.as_strided(source.shape, source.stride(), offset)
            self.tensor = self._target.expand(like.shape)
        self.nbytes = storage.numel() * storage.element_size()
        self._target.copy_(source)

    def load(self, source: torch.Tensor) -> None:
        """Replaces the values."""
        self._target.copy_(self._stored(source))

    def _stored(self, tensor: torch.Tensor) -> torch.Tensor:
        for dim in self._expanded:
            tensor = tensor.narrow(dim, 0, 1)
        return tensor


def _overlaps(tensor: torch.Tensor) -> bool:
    """Whether two indices may share an element: a stride does not step over all that smaller strides reach."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False
