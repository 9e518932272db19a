"""Everything besides its arguments that decides what a forward computes, as one comparable value.

A graph reads weights by address. Two calls may share one if every tensor of the model lies where it lay, with the
same shape, dtype and meaning, and if nothing Python decides by has changed. Contents may change: a replay reads them.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Hashable, Iterator

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .._compat import sdpa_priority
from .refusal import Refused, hooks_of

INSTANCE_ATTRIBUTES = ("forward", "_compiled_call_impl", "processor", "training")
"""Entries of a module's ``__dict__`` that decide what it computes and may be replaced by others."""
MATMUL_SETTINGS = (
    "fp32_precision",
    "allow_bf16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction_split_k",
    "allow_fp16_reduced_precision_reduction",
    "allow_fp16_reduced_precision_reduction_split_k",
    "allow_fp16_accumulation",
)
"""Of ``torch.backends.cuda.matmul``; not every torch has all."""
PLAIN = (torch.Tensor, nn.Parameter)
"""Classes of tensors that lie at an address."""


class _Same:
    """An object that is equal to itself only."""

    __slots__ = ("_value",)

    def __init__(self, value: object) -> None:
        self._value = value

    def __hash__(self) -> int:
        return id(self._value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value is other._value


class StateKey:
    """A model's state; equal for states one graph can serve. Hashed once, since it has thousands of parts."""

    __slots__ = ("_hash", "_parts")

    def __init__(self, parts: tuple[Hashable, ...]) -> None:
        self._parts, self._hash = parts, hash(parts)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, StateKey) and self._parts == other._parts)


class ModelState:
    """Watches a model for changes.

    Every call asks, so the question whether anything changed is put to flat lists made at the last change. They hold
    the objects they compare: the id of one that is gone could come back as another's.

    Args:
        model: the model, or what ``torch.compile(model)`` returned.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._scan()

    def key(self) -> StateKey:
        """What the model computes with.

        Raises:
            Refused: something of the model runs Python on every call, or a weight cannot be watched.
        """
        if self._structure() != self._known_structure or self._contents() != self._known_contents:
            self._scan()
        if self._has_hooks or any(self._hooks) or any(self._registries):
            reason = hooks_of(self._modules)
            if reason is not None:
                raise Refused(reason)
        if self._key is None:
            self._key = StateKey(tuple(self._parts()))
        return self._key

    def device(self) -> torch.device:
        """The device of the model's first tensor; the CPU if it has none."""
        return next((t.device for t in self._tensors()), torch.device("cpu"))

    def check_devices(self) -> None:
        """Refuses a model that is spread over devices.

        Raises:
            Refused: its tensors are on several.
        """
        devices = {t.device for t in self._tensors()}
        if len(devices) > 1:
            raise Refused(f"the model's tensors are on several devices: {', '.join(sorted(map(str, devices)))}")

    def _scan(self) -> None:
        self._key: StateKey | None = None
        self._modules = modules = list(self._model.modules())
        self._dicts = [module.__dict__ for module in modules]
        self._children = [module._modules for module in modules if module._modules]
        self._tables = [table for m in modules for table in (m._parameters, m._buffers) if table]
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._registries = [d["_diffusers_hook"].hooks for d in self._dicts if "_diffusers_hook" in d]
        self._has_hooks = any("_hf_hook" in d or "peft_config" in d for d in self._dicts)
        self._attributes = [
            (d, name)
            for d in self._dicts
            for name, value in d.items()
            if name in INSTANCE_ATTRIBUTES or isinstance(value, torch.Tensor)
        ]
        self._held = list(self._tensors())
        self._wrappers = [vars(tensor) for tensor in self._held if is_traceable_wrapper_subclass(tensor)]
        self._plain = [tensor for tensor in self._held if type(tensor) in PLAIN]
        # One dimension cannot be laid out anew where it lies.
        self._matrices = [tensor for tensor in self._plain if tensor.dim() > 1]
        self._held += [part for wrapper in self._wrappers for part in wrapper.values()]
        self._held += [d[name] for d, name in self._attributes]
        # ``.data`` moves a tensor that stays the object it is.
        self._placed = [tensor for tensor in self._held if type(tensor) in PLAIN]
        self._processors = [p for d in self._dicts if (p := d.get("processor")) is not None]
        self._known_structure, self._known_contents = self._structure(), self._contents()

    def _tensors(self) -> Iterator[torch.Tensor]:
        return (tensor for table in self._tables for tensor in table.values() if tensor is not None)

    def _structure(self) -> list:
        """Sizes of the modules' ``__dict__`` and tables, and which modules are where."""
        children = itertools.chain.from_iterable(map(dict.values, self._children))
        return [*map(len, self._dicts), *map(len, self._tables), *map(id, children)]

    def _contents(self) -> list:
        """Which tensors and other objects are where, where all tensors lie, and what form those of the tables have."""
        tensors = itertools.chain.from_iterable(map(dict.values, self._tables))
        parts = itertools.chain.from_iterable(map(dict.values, self._wrappers))
        return [
            *map(id, tensors),
            *map(id, parts),
            *[id(d.get(name)) for d, name in self._attributes],
            *map(torch.Tensor.data_ptr, self._placed),
            *[tensor.dtype for tensor in self._plain],
            *map(torch.Tensor.size, self._matrices),
            *map(torch.Tensor.stride, self._matrices),
            *[getattr(processor, "_attention_backend", None) for processor in self._processors],
        ]

    def _parts(self) -> list[Hashable]:
        parts: list[Hashable] = []
        for table in self._tables:
            for tensor in table.values():
                _describe(tensor, parts)
        for attributes, name in self._attributes:
            value = attributes.get(name)
            _describe(value, parts) if isinstance(value, torch.Tensor) else parts.append(_Same(value))
        parts += [getattr(processor, "_attention_backend", None) for processor in self._processors]
        return parts


def _describe(tensor: torch.Tensor | None, parts: list[Hashable]) -> None:
    if tensor is None:
        parts.append(None)
    elif is_traceable_wrapper_subclass(tensor):
        names, context = tensor.__tensor_flatten__()
        parts.append(context)
        for name in names:
            _describe(getattr(tensor, name), parts)
    elif type(tensor) in PLAIN:
        parts += (tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.stride())
    else:
        raise Refused(f"a weight is a {type(tensor).__name__}, whose storage cannot be watched")


def environment(device: torch.device) -> Hashable:
    """Global settings of torch and diffusers that choose kernels."""
    matmul, backends = torch.backends.cuda.matmul, torch.backends.cuda
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    return (
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type),
        torch.are_deterministic_algorithms_enabled(),
        *[getattr(matmul, name, None) for name in MATMUL_SETTINGS],
        backends.flash_sdp_enabled(),
        backends.mem_efficient_sdp_enabled(),
        backends.math_sdp_enabled(),
        backends.cudnn_sdp_enabled(),
        sdpa_priority(),
        dispatch and dispatch._AttentionBackendRegistry.get_active_backend()[0],
    )
