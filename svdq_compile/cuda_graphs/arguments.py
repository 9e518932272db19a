"""A call's arguments, taken apart into tensors and what a graph was captured for."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator
from typing import Any

import torch

from .refusal import Refused

STATIC = (type(None), bool, int, str, bytes, torch.dtype, torch.device)
"""Types whose values are compared by ``==``; a float is compared by its digits, so that NaN equals itself."""
ALIGNMENT = 16
"""Bytes; kernels are chosen by whether addresses are multiples of it."""


@dataclasses.dataclass(frozen=True)
class TensorKey:
    """What a graph fixes about a tensor; not its address, not its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    misaligned: int


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Arguments of one call.

    Args:
        args, kwargs: as they were given.
        tensors: every tensor in them, in order.
        key: equal for calls one graph can serve, as far as arguments go.
    """

    args: tuple
    kwargs: dict[str, Any]
    tensors: tuple[torch.Tensor, ...]
    key: Hashable

    def replace(self, tensors: tuple[torch.Tensor, ...]) -> tuple[tuple, dict[str, Any]]:
        """The same arguments with other tensors in the tensors' places."""
        rest = iter(tensors)
        return _rebuild(self.args, rest), _rebuild(self.kwargs, rest)

    def __str__(self) -> str:
        named = [*((str(i), a) for i, a in enumerate(self.args)), *self.kwargs.items()]
        return ", ".join(f"{name}={_text(value)}" for name, value in named if value is not None)


def read(args: tuple, kwargs: dict[str, Any], device: torch.device) -> Arguments:
    """Takes a call's arguments apart.

    Args:
        args, kwargs: nested lists, tuples and dicts of tensors and of plain Python values.
        device: the model's.

    Raises:
        Refused: a tensor elsewhere than on the device, whose values a graph would freeze, or an object that
            cannot be compared with the next call's.
    """
    kwargs = dict(sorted(kwargs.items()))
    tensors: list[torch.Tensor] = []
    positional = tuple(_key(value, str(i), device, tensors) for i, value in enumerate(args))
    named = tuple((name, _key(value, name, device, tensors)) for name, value in kwargs.items())
    return Arguments(args, kwargs, tuple(tensors), (positional, named))


def _key(value: Any, path: str, device: torch.device, tensors: list[torch.Tensor]) -> Hashable:
    kind = type(value)
    if isinstance(value, torch.Tensor):
        if kind not in (torch.Tensor, torch.nn.Parameter) or value.layout is not torch.strided:
            raise Refused(f"argument {path} is a {kind.__name__} of layout {value.layout}, not a plain tensor")
        if value.device != device:
            raise Refused(
                f"argument {path} is on {value.device}, the model on {device}; a graph would freeze its values"
            )
        tensors.append(value)
        return TensorKey(tuple(value.shape), value.stride(), value.dtype, value.device, value.data_ptr() % ALIGNMENT)
    if kind in (list, tuple):
        return kind, tuple([_key(item, f"{path}[{i}]", device, tensors) for i, item in enumerate(value)])
    if kind is dict:
        return kind, tuple([(name, _key(item, f"{path}[{name!r}]", device, tensors)) for name, item in value.items()])
    if kind is float:
        return kind, value.hex()
    if kind in STATIC:
        return kind, value
    raise Refused(f"argument {path} is a {kind.__name__}, whose contents cannot be compared with the next call's")


def _rebuild(value: Any, tensors: Iterator[torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return next(tensors)
    if type(value) in (list, tuple):
        return type(value)([_rebuild(item, tensors) for item in value])
    if type(value) is dict:
        return {name: _rebuild(item, tensors) for name, item in value.items()}
    return value


def _text(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return repr(value)
